"""What numbers of a few seeds allow to say: mean, spread, 95 % interval by Student's t, paired differences, rank
correlation, and the entropy of counts.

Numbers are keyed by seed, so that two arms are compared on the seeds that both have. One seed gives no interval, and
none gives no estimate. The interval assumes seeds that are independent and differences that are roughly normal; each
holds for itself, not for all of a page together.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    deviation: float | None  # standard deviation between seeds, n − 1 in its denominator; None of a single one
    seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """In which the mean over all seeds that could be lies, with 95 % confidence; None of a single seed."""
        if self.deviation is None:
            return None
        half = student_quantile(self.seeds - 1) * self.deviation / math.sqrt(self.seeds)
        return self.mean - half, self.mean + half

    @property
    def sign(self) -> int | None:
        """1 or −1 where the interval lies on one side of 0, and 0 where it contains 0; None of a single seed."""
        if self.interval is None:
            return None
        low, high = self.interval
        return (low > 0) - (high < 0)


def estimate(values: Collection[float]) -> Estimate | None:
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), deviation, len(values))


def paired(ours: Mapping[int, float], rival: Mapping[int, float]) -> Estimate | None:
    """Ours minus the rival's, over the seeds that both have."""
    return estimate([ours[seed] - rival[seed] for seed in sorted(ours.keys() & rival.keys())])


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t of which P(|T| < t) = confidence, to 12 digits or more."""
    low, high = 0.0, 1.0
    while central_share(high, degrees) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if central_share(middle, degrees) < confidence else (low, middle)
    return high


def central_share(t: float, degrees: int) -> float:
    """P(|T| < t) of Student's T; the finite sums 26.7.3 and 26.7.4 in Abramowitz and Stegun."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine, odd = math.sin(angle), math.cos(angle), degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for j in range(1, degrees // 2 + 1):
        total += term
        term *= cosine**2 * (2 * j - 1 + odd) / (2 * j + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's, in which equal values share their mean rank; 0 where all of one side are equal."""
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return 0.0
    return statistics.correlation(ranks(xs), ranks(ys))


def ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def never_falls(values: Sequence[float]) -> bool:
    return all(a <= b for a, b in pairwise(values))


def entropy_bits(counts: Collection[float]) -> float:
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n)
