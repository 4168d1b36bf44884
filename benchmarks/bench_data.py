"""What a data set costs by its records: opening, reading, ordering, planning, cutting into levels, packing, resuming.

sets.py makes the records. Where a set is opened, beside the time stands what a process that does nothing else holds
more of memory. A resumed run finds its place by epochs and by records. `cpu_cases` orders a million records, opens 100K
in shards and 6000 as JSON. `full_cases`, those of `python -m benchmarks.run --full`, go to a million; JSON is opened to
300K and packed to 100K, since a million would take minutes. All is the host's: on a GPU there are no cases.
"""

import contextlib
import ctypes
import gc
import io
import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import torch

from aligngpt import cli
from aligngpt.data.records import open_records
from aligngpt.levels import SET_ASIDE
from aligngpt.pack import Source, pack, read_source
from benchmarks import lengths, sets
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs
from benchmarks.sweep import ROUNDS, Grows, swept
from benchmarks.worlds import alone
from training.loader import Cut, Order, Samples
from training.plan import sample_lengths

SEED = 0
MIB = 2**20
ACCESSES = 200  # records of one call
PLANNED = 256  # records whose planned length is compared with the true one
OF_EPOCHS = 100_000  # records whose order is asked for after many epochs
AFTER = 3  # epochs, where records grow
BATCH = 128


def data_case(
    name: str,
    make: Callable[[], Any],  # in the time of nobody
    run: Callable[[Any], Outputs],
    exact: Callable[[Any], Outputs],
    records: int,
    grows: Grows,
    *,
    finish: Callable[[Any, Outputs], Outputs] | None = None,
    items: int = 0,
    floors: Sequence[float] = (),
    more: Callable[[Any, Any], dict[str, Any]] = lambda run, inputs: {},
    what: str = "records",
    rounds: int = ROUNDS,
) -> Case:
    case = Case(
        name=name,
        make=lambda device: make(),
        contenders={"ours": Contender(lambda made: lambda: run(made), finish)},
        exact=exact,
        plain=exact,
        floors=floors,
        equal=not floors,
        stage="data set",
        clock="host",
        items=items or records,
        unit="records",
        rounds=rounds,
        trains=True,
        one_copy=True,
    )
    return swept(case, what, records, grows, more)


def opened(path: Path) -> Outputs:
    records = open_records(path)
    return [torch.tensor([len(records), int(records.num_characters.sum())])]


def what_is_there(records: int) -> Outputs:
    return [torch.tensor([records, sets.characters(records)])]


class Held:
    """Work of a process of its own: what it holds more once a set is open, in bytes."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self) -> dict[str, int]:
        give_back()
        before = resident_bytes()
        records = open_records(self.path)
        give_back()
        assert len(records)
        return {"resident_bytes": max(resident_bytes() - before, MIB)}  # less is chance


def give_back() -> None:
    """To the system, what nothing refers to."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def opening_case(kind: str, file: Callable[[int], Path], records: int, grows: Grows) -> Case:
    return data_case(
        f"opening {kind} by records",
        lambda: file(records),
        opened,
        lambda path: what_is_there(records),
        records,
        grows,
        more=lambda run, path: alone(Held(path)),
        rounds=3 if kind == "JSON" else ROUNDS,
    )


def packed_case(records: int) -> Case:
    held = (0, "the index is mapped; less than 1 MiB counts as 1")
    return opening_case("packed shards", sets.packed_folder, records, {
        "us": (1, "the index is hashed"), "resident_bytes": held,
    })  # fmt: skip


def json_case(records: int) -> Case:
    reason = 1, "each record is parsed and kept"
    return opening_case("JSON", sets.json_file, records, {"us": reason, "resident_bytes": reason})


def access_case(records: int) -> Case:
    places = np.random.default_rng(SEED).integers(0, records, ACCESSES).tolist()
    return data_case(
        f"{ACCESSES} packed records at random by records",
        lambda: open_records(sets.packed_folder(records)),
        lambda opened: [torch.tensor([int(opened[place].id) for place in places])],
        lambda opened: [torch.tensor(places)],
        records,
        {"us": (0, "the index says where each lies")},
        items=ACCESSES,
    )


def order_case(kind: Any, records: int) -> Case:
    def make() -> Order:
        random = np.random.default_rng(SEED)
        return Order(records, BATCH, SEED, kind, random.integers(20, 2048, records), random.random(records) > 0.06)

    return data_case(
        f"an epoch's order, {kind}, by records",
        make,
        lambda order: [torch.from_numpy(order.epoch(AFTER))],
        lambda order: [torch.arange(records)],
        records,
        {"us": (1, "each record has a place, at random")},
        finish=lambda order, outputs: [outputs[0].sort().values],
    )


def resume_case(records: int, epochs: int, *, by_epochs: bool) -> Case:
    order, step = Order(records, BATCH, SEED), records // BATCH // 2
    first = epochs * order.steps_per_epoch + step
    reason = (0, "the order comes from seed and epoch") if by_epochs else (1, "each record has a place, at random")
    return data_case(
        "the place of a resumed run by " + ("epochs" if by_epochs else "records"),
        lambda: order,
        lambda order: [torch.from_numpy(next(order.steps(first, first + 1)).copy())],
        lambda order: [torch.from_numpy(order.epoch(epochs)[step * BATCH : (step + 1) * BATCH].copy())],
        epochs if by_epochs else records,
        {"us": reason},
        items=BATCH,
        what="epochs" if by_epochs else "records",
    )


class Cutting(NamedTuple):
    scores: Path
    out: Path


def cut(made: Cutting) -> Outputs:
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(["levels", str(made.scores), "--out", str(made.out)])
    assert status == 0
    return []


def levels_in_order(made: Cutting, outputs: Outputs) -> Outputs:
    """Pairs of each level, of 1000, and how many levels reach below the one before or miss a score they should have."""
    table = pyarrow.parquet.read_table(made.out)
    scores = table["score"].to_numpy()
    levels = table["level"].fill_null(SET_ASIDE).to_numpy()
    ends = [(scores[levels == level].min(), scores[levels == level].max()) for level in range(8)]
    wrong = sum(high > low for (_, high), (low, _) in itertools.pairwise(ends))
    wrong += int(((levels == SET_ASIDE) != np.isnan(scores)).sum())
    counts = np.bincount(levels[levels != SET_ASIDE], minlength=8)
    return [torch.from_numpy(counts / counts.sum()), torch.tensor([float(wrong)])]


def levels_case(records: int) -> Case:
    return data_case(
        "aligngpt levels by records",
        lambda: Cutting(sets.scores_folder(records), sets.new_folder() / "levels.parquet"),
        cut,
        lambda made: [torch.full((8,), 1 / 8, dtype=torch.float64), torch.zeros(1)],
        records,
        {"us": (1, "each score is read")},
        finish=levels_in_order,
        floors=(max(0.1, 16 / records), 0.0),  # of equal scores all go to one level, and few are not divided by 8
    )


@cache
def reader() -> Any:
    return lengths.processor(sets.WORDS[1], scale=1, image_size=16, template="chat")


def planning_case(records: int) -> Case:
    def make() -> Samples:
        opened = open_records(sets.packed_folder(records))
        return Samples(opened, reader(), levels=None, num_levels=8, seed=SEED, cut=Cut(token_budget=16384))

    def true(samples: Samples) -> Outputs:
        texts = [reader().text(record) for record in samples.records[:PLANNED]]
        return [torch.tensor([len(text.input_ids) for text in texts], dtype=torch.float64)]

    return data_case(
        "planning the lengths by records",
        make,
        lambda samples: [torch.from_numpy(sample_lengths(samples).tokens[:PLANNED]).double()],
        true,
        records,
        {"us": (1, "each record has a length")},
        floors=(0.02,),
        rounds=3,
    )


class Packing(NamedTuple):
    source: Source
    out: Path


def packing_case(records: int) -> Case:
    def run(made: Packing) -> Outputs:
        shutil.rmtree(made.out, ignore_errors=True)
        assert not pack(made.source, made.out, records_per_shard=1000)
        return []

    return data_case(
        "packing by records",
        lambda: Packing(read_source(sets.json_file(records)), sets.new_folder() / "packed"),
        run,
        lambda made: what_is_there(records),
        records,
        {"us": (1, "each record is written")},
        finish=lambda made, outputs: opened(made.out),
    )


# ---- cases and tests


class Counts(NamedTuple):
    """Records of each point."""

    shards: Sequence[int]  # that are opened and read
    planned: Sequence[int]
    ordered: Sequence[int]  # numbers alone
    scored: Sequence[int]
    parsed: Sequence[int]  # as JSON
    packed: Sequence[int]  # one by one
    epochs: Sequence[int]


TO_MILLION = (1000, 10_000, 100_000, 1_000_000)
CPU = Counts(
    shards=(1000, 10_000, 30_000, 100_000),
    planned=(1000, 10_000, 100_000),
    ordered=TO_MILLION,
    scored=(1000, 10_000, 30_000, 100_000),
    parsed=(300, 1000, 3000, 6000),
    packed=(250, 500, 1000, 2000),
    epochs=(1, 10, 100, 1000),
)
FULL = Counts(
    shards=(*CPU.shards, 1_000_000),
    planned=TO_MILLION,
    ordered=TO_MILLION,
    scored=(*CPU.scored, 1_000_000),
    parsed=(*CPU.parsed, 30_000, 300_000),
    packed=(*CPU.packed, 10_000, 100_000),
    epochs=(*CPU.epochs, 1_000_000),
)


def data_cases(counts: Counts) -> list[Case]:
    return [
        *map(packed_case, counts.shards),
        *map(access_case, counts.shards),
        *map(planning_case, counts.planned),
        *(order_case(kind, count) for kind in ("shuffle", "grouped") for count in counts.ordered),
        *map(levels_case, counts.scored),
        *(resume_case(OF_EPOCHS, epochs, by_epochs=True) for epochs in counts.epochs),
        *(resume_case(count, AFTER, by_epochs=False) for count in counts.ordered),
        *map(json_case, counts.parsed),
        *map(packing_case, counts.packed),
    ]


def cases() -> list[Case]:
    return []


def cpu_cases() -> list[Case]:
    return data_cases(CPU)


def full_cases() -> list[Case]:
    return data_cases(FULL)


def small_cases() -> list[Case]:
    few = (100,)
    return data_cases(Counts(few, few, (1000,), few, few, few, (10,)))


def test_data(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
