"""The order of samples: every one once an epoch, a function of (seed, epoch), the same for any number of processes.
What cannot be used is dropped and replaced, as much a function of the data; and how batches come from workers."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from aligngpt import data_doctor
from aligngpt.batch import load_in_order
from aligngpt.data.records import open_records
from aligngpt.drops import commonest
from aligngpt.processor import AlignGPTImageProcessor, AlignGPTProcessor
from training import loader
from training.config import DataConfig, TrainConfig
from training.dali_pipeline import why_not_dali
from training.dropped import BadSampleError, DroppedSamples, too_many
from training.loader import ATTEMPTS, Cut, Loaded, Order, Part, Samples, micro_batches, random_level, replacement
from training.loop import read_steps

ROOT = Path(__file__).parents[2]
needs_dali = pytest.mark.skipif(why_not_dali() is not None, reason=str(why_not_dali()))


@pytest.mark.parametrize("kind", ["shuffle", "grouped"])
@pytest.mark.parametrize("num_samples", [1, 8, 37])  # less than a batch, whole batches, a ragged end
def test_an_epoch_shows_every_sample_once(kind: str, num_samples: int) -> None:
    lengths = np.arange(num_samples) * 7 % 5
    order = Order(num_samples, 8, 3, kind, lengths=lengths, has_image=np.arange(num_samples) % 3 > 0)  # type: ignore[arg-type]
    steps = list(order.steps(0, 2 * order.steps_per_epoch))
    for epoch in (0, 1):
        batches = steps[epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch]
        assert sorted(np.concatenate(batches)) == list(range(num_samples))
        assert all(len(batch) == 8 for batch in batches[:-1])
    if num_samples > 8:
        assert not np.array_equal(order.epoch(0), order.epoch(1))


def test_order_is_frozen_and_can_be_entered_anywhere() -> None:
    order = Order(10, 4, seed=5)
    assert order.epoch(0).tolist() == [5, 9, 3, 0, 4, 1, 7, 2, 6, 8]
    whole = [batch.tolist() for batch in order.steps(0, 9)]
    assert [batch.tolist() for batch in order.steps(4, 9)] == whole[4:]


def test_grouped_batches_hold_one_kind_sorted_by_length() -> None:
    rng = np.random.default_rng(0)
    has_image, lengths = rng.random(203) < 0.8, rng.integers(0, 1000, 203)
    batches = list(Order(203, 8, 0, "grouped", lengths=lengths, has_image=has_image).steps(0, 26))
    mixed = [batch for batch in batches if 0 < has_image[batch].sum() < len(batch)]
    assert len(mixed) <= 2  # fewer than 8 left over of each kind
    assert all((np.diff(lengths[batch]) >= 0).all() for batch in batches)
    with_image = [bool(has_image[batch[0]]) for batch in batches]
    assert with_image != sorted(with_image)  # the kinds are shuffled among each other
    assert with_image != sorted(with_image, reverse=True)


def test_random_levels_are_fixed_and_even() -> None:
    levels = [random_level(0, record, 8) for record in range(4000)]
    assert levels == [random_level(0, record, 8) for record in range(4000)]
    assert levels != [random_level(1, record, 8) for record in range(4000)]
    counts = np.bincount(levels, minlength=8)
    assert (abs(counts - 500) < 5 * np.sqrt(500)).all()


def test_fault_59_a_run_of_665k_samples_is_entered_anywhere_within_a_second() -> None:
    """All that is done for it before the first sample is read, in the middle of an epoch."""
    lengths, has_image = np.arange(665_000) % 997, np.arange(665_000) % 16 > 0
    started = time.perf_counter()
    for kind in ("shuffle", "grouped"):
        order = Order(665_000, 128, 0, kind, lengths=lengths, has_image=has_image)  # type: ignore[arg-type]
        parts = [Part(0, batch.tolist()) for batch in order.steps(2600, order.steps_per_epoch)]
        assert len(parts[0].indices) == 128
    assert time.perf_counter() - started < 1


# ---------------------------------------------------------------------------------------------------- dropping


@pytest.fixture
def make_samples(parts: Any, tmp_path: Path) -> Callable[..., Samples]:
    """Twelve pairs, of which 3 to 8 cannot be used, each for another reason."""
    images = Path(shutil.copytree(parts.images, tmp_path / "images"))
    (images / "3.png").unlink()
    (images / "4.png").write_bytes((images / "4.png").read_bytes()[:900])
    (images / "5.png").write_bytes(b"")
    (images / "6.png").write_text("<html>not found</html>")
    records = json.loads(parts.captions.read_text())
    records[7]["conversations"] = []
    records[8]["conversations"][0]["value"] = "<image>" + 400 * " Describe it."  # its answer is cut off
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))

    def make(decode_by_dali: bool = False, **changed: Any) -> Samples:
        processor = AlignGPTProcessor(
            AlignGPTImageProcessor(28),
            AutoTokenizer.from_pretrained(parts.llms["llama"]),
            rows_per_image=4,
            align_token_id=321,
            image_token_id=322,
            max_length=300,
        )
        settings: dict[str, Any] = {"levels": None, "num_levels": 8, "seed": 3, "decode_by_dali": decode_by_dali}
        settings["cut"] = Cut(per_device=12)
        return Samples(open_records(path, images), processor, **settings | changed)

    return make


def ids_of(loaded: Loaded) -> list[str]:
    assert loaded.batches is not None
    return [id for batch in loaded.batches for id in batch.ids]


@pytest.mark.parametrize("decode_by_dali", [False, pytest.param(True, marks=needs_dali)])
@pytest.mark.parametrize("workers", [0, 2])
def test_fault_1_3_5_13_25_26_what_cannot_be_used_is_dropped_and_replaced(
    make_samples: Callable[..., Samples], decode_by_dali: bool, workers: int
) -> None:
    """Each bad sample is named with its reason; its stand-in is the one that (seed, epoch, index, attempt) gives."""
    samples = make_samples(decode_by_dali)
    plan = [Part(epoch, indices) for epoch in (0, 1) for indices in ([0, 3, 4], [5, 6, 7], [8, 1, 11])]
    found = list(micro_batches(samples, plan, workers=workers, device=torch.device("cpu"), prefetch=2))

    reasons = {
        3: "3.png: no such file",
        4: "4.png: can't be decoded",
        5: "5.png: not an image (it is empty)",
        6: "6.png: not an image (it begins with b'<html>",
        7: "the conversation is empty",
        8: "nothing of its answers is within max_length, ",  # or the length of the place it is to take
    }
    for part, loaded in zip(plan, found, strict=True):
        ids, dropped = [], []
        for index in part.indices:
            attempts = [index, *(replacement(3, part.epoch, index, attempt, 12) for attempt in range(1, 10))]
            used = next(taken for taken in attempts if taken not in reasons)
            dropped += attempts[: attempts.index(used)]
            ids.append(f"s{used}")
        assert ids_of(loaded) == ids
        assert [drop.record for _, drop in loaded.dropped] == dropped
        assert sum(attempt == 0 for attempt, _ in loaded.dropped) == sum(index in reasons for index in part.indices)
        for _, drop in loaded.dropped:
            assert drop.id == f"s{drop.record}"
            assert drop.reason.startswith(reasons[drop.record])
            assert ".png" not in drop.kind
    assert [ids_of(loaded) for loaded in found[:3]] != [ids_of(loaded) for loaded in found[3:]]  # epochs differ
    assert {drop.record for loaded in found for _, drop in loaded.dropped} == set(reasons)


@needs_dali
def test_fault_6_a_picture_that_only_decoding_finds_bad_is_replaced_too(make_samples: Callable[..., Samples]) -> None:
    """The screen passes a PNG whose pixels are damaged. PIL's batches and DALI's drop the same."""
    for samples in (make_samples(True), make_samples(False)):
        file = Path(samples.records.image(samples.records[1], 0))
        data = bytearray(file.read_bytes())
        start = data.index(b"IDAT") + 4
        data[start + 2 : start + 40] = bytes(38)
        file.write_bytes(data)
        (loaded,) = micro_batches(samples, [Part(0, [0, 1, 2, 1])], workers=0, device=torch.device("cpu"), prefetch=1)
        assert loaded.batches is not None
        assert [attempt for attempt, drop in loaded.dropped if drop.record == 1] == [0, 0]
        assert ids_of(loaded)[0::2] == ["s0", "s2"]
        assert "s1" not in ids_of(loaded)
        images = sum(id != "s11" for id in ids_of(loaded))  # that one is text alone
        assert loaded.batches[0].pixel_values.shape == (images, 3, 28, 28)


def packed_by(samples: Samples, part: Part, num_processes: int, budget: int) -> list[Loaded]:
    """What each process makes of a global batch."""
    found = []
    for rank in range(num_processes):
        samples.cut = Cut(rank, num_processes, token_budget=budget)
        found += micro_batches(samples, [part], workers=0, device=torch.device("cpu"), prefetch=1)
    return found


def test_processes_pack_the_same_batch_and_each_drop_is_told_once(make_samples: Callable[..., Samples]) -> None:
    """Any number of them, without a word between them; padded batches hold the same samples with the same tokens."""
    part = Part(0, [11, 0, 3, 4, 1, 5, 2, 6, 7, 10, 8])
    samples = make_samples()
    (padded,) = micro_batches(samples, [part], workers=0, device=torch.device("cpu"), prefetch=1)
    assert padded.batches is not None
    (rows,) = padded.batches
    assert rows.attention_mask is not None
    wanted = sorted(ids[mask.bool()].tolist() for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True))
    for num_processes, budget in ((1, 3000), (1, 300), (2, 400), (3, 300), (13, 300)):
        found = packed_by(samples, part, num_processes, budget)
        assert len({len(loaded.batches or []) for loaded in found}) == 1
        assert len({loaded.checksum for loaded in found}) == 1
        assert sorted(id for loaded in found for id in ids_of(loaded)) == sorted(rows.ids)
        assert sorted(map(str, padded.dropped)) == sorted(str(drop) for loaded in found for drop in loaded.dropped)
        tokens = []
        for batch in (batch for loaded in found for batch in loaded.batches or []):
            assert batch.cu_seqlens is not None
            ends = batch.cu_seqlens.tolist()
            assert ends[-1] == batch.input_ids.numel() <= budget
            assert batch.num_tokens == (ends[-1] if batch.ids else 0)
            for _, start, end in zip(batch.ids, ends, ends[1:], strict=False):
                tokens.append(batch.input_ids[0, start:end].tolist())
        assert sorted(tokens) == wanted
    assert num_processes > len(part.indices)
    assert sum(ids_of(loaded) == [] for loaded in found) == 2  # those have a padding token to work at


def test_processes_that_read_different_samples_stop_together(make_samples: Callable[..., Samples]) -> None:
    """One cannot read a record's text that the others read; with bins of its own it would leave them waiting."""
    meeting, values = threading.Barrier(3), {}

    def add(rank: int, *mine: float) -> list[float]:
        values[rank] = mine
        meeting.wait(60)
        total = [float(sum(numbers)) for numbers in zip(*(values[n] for n in range(3)), strict=True)]
        meeting.wait(60)
        return total

    def tokens(rank: int, bad: int | None) -> int:
        samples = make_samples(cut=Cut(rank, 3, token_budget=300), kept=np.array([0, 1, 2, 9, 10, 11]))
        if rank == 1 and bad is not None:
            samples.records.samples[bad] = dataclasses.replace(samples.records.samples[bad], problem="cannot be read")  # type: ignore[attr-defined]
        order = Order(len(samples), 6, seed=3)
        world: Any = SimpleNamespace(
            size=3, device=torch.device("cpu"), add=partial(add, rank), gather=lambda value: [value]
        )
        dropped = DroppedSamples(Path("unused"), lines=[], total=6, max_rate=1.0)
        (step,) = read_steps(TrainConfig(data=DataConfig(workers=0)), samples, order, 0, 1, dropped, world)
        return step.tokens

    with ThreadPoolExecutor(3) as pool:
        assert len({future.result() for future in [pool.submit(tokens, rank, None) for rank in range(3)]}) == 1
        for future in [pool.submit(tokens, rank, 9) for rank in range(3)]:
            with pytest.raises(BadSampleError, match="step 1: the processes do not read the same samples"):
                future.result()


def test_what_stands_in_for_a_bad_image_is_no_longer_than_that_sample(make_samples: Callable[..., Samples]) -> None:
    """The bins are made by then. What stands in for a bad text was known before, and is whole."""
    samples = make_samples()
    processor, records = samples.processor, samples.records
    cut = []
    for index in (3, 4, 5, 6):
        room = len(processor.text(records[index]).input_ids)
        taken = next(t for t in (replacement(3, 0, index, n, 12) for n in range(1, 10)) if t not in range(3, 9))
        whole = processor.text(records[taken]).input_ids
        (loaded,) = packed_by(samples, Part(0, [index]), 1, room)
        assert loaded.batches is not None
        assert loaded.batches[0].input_ids[0].tolist() == whole[:room].tolist()
        cut.append(len(whole) > room)
    assert any(cut)


def test_a_place_that_no_sample_can_take_is_reported_by_one_process(make_samples: Callable[..., Samples]) -> None:
    samples = make_samples(kept=np.array([7, 8]))  # their texts are bad
    found = packed_by(samples, Part(0, [0, 1]), 2, 300)
    assert all(loaded.batches is None for loaded in found)
    assert sum(len(loaded.dropped) for loaded in found) == 2 * ATTEMPTS


@pytest.mark.parametrize("decode_by_dali", [False, pytest.param(True, marks=needs_dali)])
def test_the_doctor_lists_what_training_drops(make_samples: Callable[..., Samples], decode_by_dali: bool) -> None:
    """To the letter: record, id, reason and kind; and it judges by the same limit."""
    samples = make_samples(decode_by_dali)
    parts = [Part(0, [record]) for record in range(12)]
    found = micro_batches(samples, parts, workers=0, device=torch.device("cpu"), prefetch=1)
    dropped = [loaded.dropped[0][1] for loaded in found if loaded.dropped]  # before what stood in for it
    assert data_doctor.scan(samples.records, samples.processor).drops == dropped
    assert [drop.record for drop in dropped] == [3, 4, 5, 6, 7, 8]
    assert DataConfig().max_drop_rate == data_doctor.MAX_DROP_RATE


def test_a_place_that_no_sample_can_take_has_no_batch(make_samples: Callable[..., Samples]) -> None:
    samples = make_samples(kept=np.arange(3, 9))
    loaded = samples[Part(0, [2])]
    assert loaded.batches is None
    assert [attempt for attempt, _ in loaded.dropped] == list(range(ATTEMPTS))
    count = sum(drop.record == 5 for _, drop in loaded.dropped)
    (line,) = (line for line in commonest(drop for _, drop in loaded.dropped) if "it is empty" in line)
    assert line.startswith(f"{count} × not an image (it is empty); it must be one of ")
    assert "; for example record 5 (id s5): 5.png: not an image" in line


def test_fault_14_the_limit_allows_what_is_within_and_stops_early_what_leads_beyond() -> None:
    def stops(dropped: int, taken: int, max_rate: float = 0.01) -> bool:
        return too_many(dropped, taken=taken, total=500_000, max_rate=max_rate)

    assert not stops(5000, 500_000)
    assert stops(5001, 500_000)
    assert stops(1, 500_000, max_rate=0)
    assert not stops(3, 256)  # one in a hundred
    assert not stops(10, 256)  # bad luck
    assert stops(64, 256)  # a quarter of the samples
    assert too_many(2, taken=100, total=100, max_rate=0.01)
    # Counts of samples of which exactly one in a hundred is bad stay below it: 2000 runs of 50,000 samples.
    counts = np.random.default_rng(0).binomial(256, 0.01, (2000, 196)).cumsum(1)
    taken = 256 * np.arange(1, 197)
    expected = 0.01 * taken
    assert (counts <= expected + 6 * np.sqrt(expected) + 6).all()


# ---------------------------------------------------------------------------------------------------- handing over


class Sized(Dataset[torch.Tensor]):
    """Tensors of a megabyte each. A key of -1 kills the process that loads it."""

    def __getitem__(self, key: int) -> torch.Tensor:
        if key < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((2**18,), float(key))


def test_fault_57_a_killed_worker_is_said_in_a_sentence() -> None:
    """It dies while it sends a large item, so that the item's end never comes."""
    items = load_in_order(Sized(), [0, 1, -1, 3], workers=1)
    with pytest.raises(ChildProcessError, match=r"a process that loads samples was killed or crashed .*fewer workers"):
        list(items)


def test_fault_57_shared_memory_is_not_needed() -> None:
    """Items of a megabyte where no file may exceed a page, which shared memory obeys too (locks take 32 bytes)."""
    code = """
import resource, sys
sys.path.insert(0, "tests/training")
import torch
from torch.utils.data import DataLoader
from aligngpt import data_doctor
from aligngpt.batch import load_in_order
from test_loader import Sized

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    torch.ones(8192).share_memory_()
    sys.exit("shared memory takes a tensor")
except RuntimeError:
    pass
for number, item in enumerate(load_in_order(Sized(), range(12), workers=2)):
    assert (item == number).all()
sys.stdout.write(f"{number} ")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "11 ", done.stderr


def decoded_ahead(items: Iterator[Any], decoded: Any) -> Any:
    """`loader._decoded_ahead` of items, which it decodes by the given function."""
    samples: Any = SimpleNamespace(decoder=lambda device: None, decoded=lambda part, item, decode: decoded(item))
    return loader._decoded_ahead(((None, item) for item in items), samples, torch.device("cpu"), 2)  # type: ignore[misc]


def test_decoding_ahead_keeps_the_order_and_hands_its_exceptions_over() -> None:
    def decoded(item: int) -> int:
        if item == 7:
            raise RuntimeError("DALI fails")
        return 10 * item

    expected = [0, 10, 20, 30, 40, 50, 60]
    assert list(decoded_ahead(iter(range(7)), decoded)) == expected

    stream = decoded_ahead(iter(range(9)), decoded)
    assert [next(stream) for _ in expected] == expected
    with pytest.raises(RuntimeError, match="DALI fails"):
        next(stream)


def test_decoding_ahead_is_closed_without_waiting_long_for_a_loader_that_hangs(monkeypatch) -> None:
    """The thread ends with the item it is at. Were that waited for without end, `close` would not come back."""
    monkeypatch.setattr(loader, "LEAVE_SECONDS", 0.1)
    hangs, goes_on = threading.Event(), threading.Event()
    threads = []

    def items() -> Iterator[Any]:
        threads.append(threading.current_thread())
        yield 0
        hangs.set()
        assert goes_on.wait(60)
        yield from range(1, 100)

    stream = decoded_ahead(items(), lambda item: item)
    assert next(stream) == 0
    assert hangs.wait(60)
    stream.close()
    assert not goes_on.is_set()
    assert threads[0].is_alive()
    assert threads[0].daemon
    goes_on.set()
    threads[0].join(60)
    assert not threads[0].is_alive()


@pytest.mark.parametrize("number", [2, 3, 4, 100])
def test_decoding_ahead_is_closed_while_its_thread_waits_for_room(number: int) -> None:
    """With so many items in all: the thread may be at the last one, or have nothing to put but the end."""
    threads = []

    def items() -> Iterator[Any]:
        threads.append(threading.current_thread())
        yield from range(number)

    stream = decoded_ahead(items(), lambda item: item)
    assert next(stream) == 0
    stream.close()
    assert not threads[0].is_alive(), "it was waited for: a process that ends beside it may be aborted"
