"""Bins of a global batch: every sample once, within the budget, as many for each process, evenly filled."""

import numpy as np
import pytest

from training.packing import pack, share


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("num_samples", [0, 1, 7, 128])
def test_bins_hold_every_sample_once_within_the_budget(num_processes: int, num_samples: int) -> None:
    rng = np.random.default_rng(num_samples)
    lengths = np.where(rng.random(num_samples) < 0.9, 600 + rng.integers(5, 1000, num_samples), 300).tolist()
    budget = 4096
    bins = pack(lengths, budget=budget, num_processes=num_processes)
    assert sorted(place for places in bins for place in places) == list(range(num_samples))
    assert len(bins) % num_processes == 0
    assert bins
    loads = [sum(lengths[place] for place in places) for places in bins]
    assert max(loads) <= budget
    assert loads == sorted(loads, reverse=True)
    assert all(places == sorted(places) for places in bins)
    if num_samples == 128:
        # Nobody waits long for another in a micro-step, and no more bins are made than one in ten beyond the least.
        micro_steps = [loads[start : start + num_processes] for start in range(0, len(loads), num_processes)]
        assert all(max(step) - min(step) <= 0.1 * budget for step in micro_steps)
        assert len(micro_steps) <= np.ceil(1.1 * sum(lengths) / (budget * num_processes))


def test_bins_of_one_batch_are_written_down() -> None:
    """A run that is resumed by a later version must cut as before."""
    lengths = [5, 9, 2, 7, 7, 1, 4, 3]
    assert pack(lengths, budget=10, num_processes=2) == [[1, 5], [3, 7], [2, 4], [0, 6]]
    assert pack(lengths, budget=38, num_processes=1) == [list(range(8))]


def test_a_sample_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample has 11 tokens; the token budget is 10"):
        pack([3, 11], budget=10, num_processes=1)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
def test_shares_are_the_batch_in_as_many_micro_batches_for_everybody(num_processes: int) -> None:
    for length in (1, 7, 8, 20):
        bins = share(length, per_device=2, num_processes=num_processes)
        assert len(bins) % num_processes == 0
        assert all(len(places) <= 2 for places in bins)
        assert [place for places in bins for place in places] == list(range(length))
