"""How the samples of an optimizer step become micro-batches: the same number of them for every process.

`pack` puts samples end to end into bins of at most `budget` tokens. It is given the lengths of the whole global batch,
so every process finds the same bins without asking the others. The longest sample comes first, each goes to the bin
that is emptiest by then, and there are as few bins as this allows: processes that work at the same time have about as
much to do, which is what a step's time depends on. Bins of like size share a micro-step. A bin may stay empty; its
process runs a dummy without supervised tokens, since all must take part in every collective.

`share` is the same for padded batches, which are counted in samples.

Both return bins of positions in the global batch, in order inside each bin: bin m·P + r is what process r of P takes in
micro-step m.
"""

import heapq
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], *, budget: int, num_processes: int) -> list[list[int]]:
    """Bins of at most `budget` tokens for samples of these lengths.

    Raises:
        ValueError: a sample is longer than the budget.
    """
    if max(lengths, default=0) > budget:
        raise ValueError(
            f"a sample has {max(lengths)} tokens; the token budget is {budget}, it needs to hold the longest"
        )
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    micro_steps = max(1, -(-sum(lengths) // (budget * num_processes)))
    while (bins := _fill(longest_first, lengths, budget, micro_steps * num_processes)) is None:
        micro_steps += 1
    bins.sort(key=lambda places: -sum(lengths[place] for place in places))
    return [sorted(places) for places in bins]


def _fill(longest_first: list[int], lengths: Sequence[int], budget: int, num_bins: int) -> list[list[int]] | None:
    """Each sample in the bin that is emptiest by then; None: one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, number) for number in range(num_bins)]
    for place in longest_first:
        tokens, number = emptiest[0]
        if tokens + lengths[place] > budget:
            return None
        bins[number].append(place)
        heapq.heapreplace(emptiest, (tokens + lengths[place], number))
    return bins


def share(num_samples: int, *, per_device: int, num_processes: int) -> list[list[int]]:
    """Bins of at most `per_device` samples, filled in order; what is left over is shared out evenly."""
    micro_step = num_processes * per_device
    return [
        places.tolist()
        for start in range(0, num_samples, micro_step)
        for places in np.array_split(np.arange(start, min(start + micro_step, num_samples)), num_processes)
    ]
