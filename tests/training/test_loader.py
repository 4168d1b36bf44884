"""The order of samples: every one once an epoch, a function of (seed, epoch), the same for any number of processes."""

import numpy as np
import pytest

from training.loader import Order, random_level, share


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
