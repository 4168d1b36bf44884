"""The order of samples: every one once an epoch, a function of (seed, epoch), the same for any number of processes."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aligngpt.processor import AlignGPTImageProcessor
from training import loader
from training.loader import BadSample, Order, Undecoded, random_level, share


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_are_the_batch_in_as_many_micro_batches_for_everybody(world_size: int) -> None:
    for length in (1, 7, 8, 20):
        batch = np.arange(length)
        shares = [share(batch, rank=rank, world_size=world_size, per_device=2) for rank in range(world_size)]
        assert len({len(parts) for parts in shares}) == 1
        assert all(len(part) <= 2 for parts in shares for part in parts)
        assert sorted(index for parts in shares for part in parts for index in part) == batch.tolist()


def test_random_levels_are_fixed_and_even() -> None:
    levels = [random_level(0, record, 8) for record in range(4000)]
    assert levels == [random_level(0, record, 8) for record in range(4000)]
    assert levels != [random_level(1, record, 8) for record in range(4000)]
    counts = np.bincount(levels, minlength=8)
    assert (abs(counts - 500) < 5 * np.sqrt(500)).all()


def test_665k_samples_are_ordered_within_a_second() -> None:
    import time

    lengths, has_image = np.arange(665_000) % 997, np.arange(665_000) % 16 > 0
    started = time.perf_counter()
    next(Order(665_000, 128, 0, "grouped", lengths=lengths, has_image=has_image).steps(3000, 3001))
    assert time.perf_counter() - started < 1


def decoded_ahead(items: Iterator[Any], decoded: Any) -> Any:
    """`loader._decoded_ahead` of items, which it decodes by the given function."""
    samples: Any = SimpleNamespace(processor=SimpleNamespace(image_processor=AlignGPTImageProcessor(28)))
    samples.decoded = lambda item, pixels: decoded(item)
    return loader._decoded_ahead(items, samples, torch.device("cpu"))


def undecoded(number: int) -> Any:
    batch: Any = number
    return Undecoded(batch, [])


def test_decoding_ahead_keeps_the_order_and_hands_its_exceptions_over() -> None:
    def decoded(item: Any) -> int:
        if item.batch == 7:
            raise RuntimeError("DALI fails")
        return 10 * item.batch

    bad = BadSample("data.json: record 3")
    items = [undecoded(0), undecoded(1), bad, *(undecoded(number) for number in range(2, 7))]
    expected = [0, 10, bad, 20, 30, 40, 50, 60]
    assert list(decoded_ahead(iter(items), decoded)) == expected

    stream = decoded_ahead(iter([*items, undecoded(7), undecoded(8)]), decoded)
    assert [next(stream) for _ in expected] == expected
    with pytest.raises(RuntimeError, match="DALI fails"):
        next(stream)


def test_decoding_ahead_is_closed_without_waiting_for_a_loader_that_hangs() -> None:
    """The thread ends with the item it is at. Were it waited for, `close` would not come back."""
    hangs, goes_on = threading.Event(), threading.Event()
    threads = []

    def items() -> Iterator[Any]:
        threads.append(threading.current_thread())
        yield undecoded(0)
        hangs.set()
        assert goes_on.wait(60)
        for number in range(1, 100):
            yield undecoded(number)

    stream = decoded_ahead(items(), lambda item: item.batch)
    assert next(stream) == 0
    assert hangs.wait(60)
    stream.close()
    assert not goes_on.is_set()
    assert threads[0].is_alive()
    assert threads[0].daemon
    goes_on.set()
    threads[0].join(60)
    assert not threads[0].is_alive()


def test_decoding_ahead_is_closed_while_its_thread_waits_for_room() -> None:
    threads = []

    def items() -> Iterator[Any]:
        threads.append(threading.current_thread())
        yield from map(undecoded, range(100))

    stream = decoded_ahead(items(), lambda item: item.batch)
    assert next(stream) == 0
    stream.close()
    threads[0].join(60)
    assert not threads[0].is_alive()
