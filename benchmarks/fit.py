"""How cost grows in a sweep: an exponent for each, fitted to what a results file holds, and whether that is as it must.

    sweeps(content) -> list[Sweep]

The points of a sweep are the cases that say `sweep=(what, x)` and whose names are alike up to the last ", ". What may
grow, and how fast, is in the record of ours: {"grows": {"us": [1, "each token is read"]}}. Fields other than "us", a
call's microseconds, may be listed beside it: processor time, bytes.

A cost is a fixed part and one that grows: seconds = a + b · x^k. With FULL points or more all three are fitted, a and b
at least 0, by least squares of log(seconds), so that each point counts by its relative error; the fixed part takes
the place of the first points, which would pull k down. Where the cost at the last point is less than GROWS times the
one at the first, what grows is too little to tell its shape by, and with fewer points nothing can be told from a fixed
part: there k is the slope of log(seconds) on log(x).

The interval of k holds 90 % of DRAWS fits, each to points that are drawn anew as far off as a median of their rounds
may be, one of them left out while enough are left. Neighbouring rounds are disturbed together, so that no more than
INDEPENDENT of them count. A sweep grows faster than it must when the whole interval lies more than SLACK above what is
allowed: logarithms and caches that become too small add about so much over two or three decades. It grows as it must
when k itself does not lie so far above. Where only a part of the interval does not, or the interval is wider than
WIDEST, nothing is said. Points without a number (too noisy, failed, wrong) are left out and named.

Refused: nothing; a file without sweeps gives an empty list.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FULL, GROWS, SLACK, WIDEST = 4, 1.5, 0.15, 1.0
DRAWS, SEED = 300, 0
QUARTILES = 1.349  # between the quartiles of a normal distribution, in standard deviations
OF_MEDIAN, INDEPENDENT = 1.2533, 9  # standard error of a median: so many standard deviations / √rounds
LEAST_SPREAD = 0.01  # relative; of costs that state no quartiles, too
AS_IT_MUST, FASTER, NOISY = "as it must", "faster than it must", "too noisy to say"
UNLIMITED = "no limit is stated"
UNITS = {
    "us": "s",
    "processor_us": "s of all processors",
    "resident_bytes": "bytes resident",
    "collective_bytes": "bytes in collectives of a process",
}  # others: their names


class Point(NamedTuple):
    x: float
    seconds: float  # or what the unit says
    low: float  # quartiles
    high: float
    rounds: int


class Sweep(NamedTuple):
    what: str  # grows from point to point
    prefix: str  # of the cases' names
    unit: str  # of the cost: "s", "s of all processors", "bytes resident", …
    points: list[Point]
    exponent: float  # NaN with fewer than two points
    low: float
    high: float
    at_most: float  # that the exponent must be; NaN: nothing is said of it
    verdict: str
    because: str  # why it must grow so
    fixed: float  # part of the cost that does not grow, in the unit
    left_out: dict[str, str]  # points by their case's name, and why


class Power(NamedTuple):
    """seconds = fixed + factor · x^exponent"""

    exponent: float
    fixed: float
    factor: float


def sweeps(content: Mapping[str, Any]) -> list[Sweep]:
    """Of all cases of a results file, in the order in which they come there."""
    groups: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for name, record in content["cases"].items():
        if record.get("sweep"):
            groups.setdefault((record["sweep"][0], name.rpartition(", ")[0]), []).append((name, record))
    return [
        sweep
        for (what, prefix), members in groups.items()
        for field, (at_most, because) in _grows(record for _, record in members).items()
        for sweep in [_sweep(what, prefix, members, field, at_most, because)]
    ]


def _ours(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((found for name, found in record["contenders"].items() if name.startswith("ours")), {})


def _grows(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """What is allowed of each field, by the last case that says so; of none, microseconds without a limit."""
    found: dict[str, tuple[float, str]] = {}
    for record in records:
        found |= {field: (at_most, because) for field, (at_most, because) in _ours(record).get("grows", {}).items()}
    return found or {"us": (math.nan, "")}


def _sweep(
    what: str, prefix: str, members: list[tuple[str, Mapping[str, Any]]], field: str, at_most: float, because: str
) -> Sweep:
    points, left_out = [], {}
    scale = 1e-6 if field.endswith("us") else 1.0
    for name, record in members:
        ours = _ours(record)
        value = ours.get(field)
        if not value or not value > 0:
            reasons = (ours.get(kind) or record.get(kind) for kind in ("noisy", "wrong", "failed", "absent", "skipped"))
            left_out[name] = str(next(filter(None, reasons), f"has no {field}"))
            continue
        low, high = ours.get("quartiles_us" if field == "us" else f"quartiles_{field}", (value, value))
        points.append(Point(float(record["sweep"][1]), value * scale, low * scale, high * scale, ours.get("rounds", 1)))
    points.sort()
    unit = UNITS.get(field, field)
    if len({point.x for point in points}) < 2:
        nothing = math.nan, math.nan, math.nan
        return Sweep(what, prefix, unit, points, *nothing, at_most, NOISY, because, math.nan, left_out)
    power = fit([point.x for point in points], [point.seconds for point in points])
    low, high = interval(points)
    verdict = judge(power.exponent, low, high, at_most)
    return Sweep(
        what, prefix, unit, points, power.exponent, low, high, at_most, verdict, because, power.fixed, left_out
    )


def judge(exponent: float, low: float, high: float, at_most: float) -> str:
    if math.isnan(at_most):
        return UNLIMITED
    if high - low > WIDEST:
        return NOISY
    return FASTER if low > at_most + SLACK else AS_IT_MUST if exponent <= at_most + SLACK else NOISY


EXPONENTS = np.arange(4, 401, 2) / 100
SHARES = np.unique(np.concatenate(([0.0], np.logspace(-1.5, -0.02, 40), 1 - np.logspace(-1.3, -3, 20))))


def fit(x: Sequence[float], cost: Sequence[float]) -> Power:
    """The power of two points and more; see the module's docstring."""
    exponents, shares, firsts = _fit(np.array(x, float), np.array([cost], float))
    exponent, share, first = float(exponents[0]), float(shares[0]), float(firsts[0])
    return Power(exponent, first * share, first * (1 - share) / x[0] ** exponent)


def _fit(xs: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exponent, share of the fixed part at the first point, and the cost there, of each row of costs (rows, points)."""
    logs, log_costs = np.log(xs / xs[0]), np.log(costs)
    (exponents, levels), shares = np.polyfit(logs, log_costs.T, 1), np.zeros(len(costs))
    tells = costs[:, -1] >= GROWS * costs[:, 0]
    if len(xs) < FULL or not tells.any():
        return exponents, shares, np.exp(levels)
    # All pairs of an exponent and a share; the cost at the first point is then a mean.
    each, share = (grid.ravel()[:, None] for grid in np.meshgrid(EXPONENTS, SHARES))
    shapes = np.log(share + (1 - share) * np.exp(each * logs))
    means = shapes.mean(1, keepdims=True)
    centred, wanted = shapes - means, log_costs[tells] - log_costs[tells].mean(1, keepdims=True)
    best = np.argmin((centred**2).sum(1)[:, None] - 2 * centred @ wanted.T, axis=0)
    exponents[tells], shares[tells] = each[best, 0], share[best, 0]
    levels[tells] = log_costs[tells].mean(1) - means[best, 0]
    return exponents, shares, np.exp(levels)


def interval(points: Sequence[Point]) -> tuple[float, float]:
    """Of the exponent, 90 %."""
    random = np.random.default_rng(SEED)
    xs, costs, lows, highs, rounds = (np.array(column) for column in zip(*points, strict=True))
    of_median = OF_MEDIAN / np.sqrt(rounds.clip(1, INDEPENDENT))
    spread = np.maximum(np.log(highs / lows) / QUARTILES * of_median, LEAST_SPREAD)
    drawn = costs * np.exp(random.normal(0, spread, (DRAWS, len(xs))))
    out = random.integers(len(xs), size=DRAWS) if len(xs) > FULL else np.full(DRAWS, -1)
    found = []
    for place in np.unique(out):
        kept = np.arange(len(xs)) != place
        found.append(_fit(xs[kept], drawn[out == place][:, kept])[0])
    low, high = np.quantile(np.concatenate(found), [0.05, 0.95])
    return float(low), float(high)
