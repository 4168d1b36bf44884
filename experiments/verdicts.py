"""What numbers of a few seeds allow to say, in words and in cells of tables.

Every verdict follows from the 95 % interval of a paired difference by one rule: one that contains 0 is "no difference
seen", any other "better" or "worse"; of a single seed nothing is said.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.readings import (
    CUTS,
    FROZEN,
    MODES,
    NONE,
    NUM_LEVELS,
    OURS,
    QUARTER,
    SAMPLED,
    WAYS,
    Result,
    Rows,
    Values,
    accuracy,
    answers,
    by_level,
    by_noise,
    captions,
    correlations,
    levels,
)
from experiments.statistics import Estimate, estimate, never_falls, paired

UNMEASURED = "Unmeasured."
WORDS = {1: "better", 0: "no difference seen", -1: "worse", None: "undecided: one seed"}
MARKS = {1: " ▲", 0: "", -1: " ▼", None: ""}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def spread(values: Values, digits: int = 3) -> str:
    found = estimate(list(values.values()))
    if found is None:
        return "—"
    return f"{found.mean:.{digits}f}" + ("" if found.deviation is None else f" ± {found.deviation:.{digits}f}")


def interval(found: Estimate) -> str:
    return "no interval" if found.interval is None else " to ".join(map(signed, found.interval))


def verdict(ours: Values, rival: Values, better: int = 1) -> int | None:
    """1, 0, −1 for better, no difference seen, worse; None without an interval."""
    found = paired(ours, rival)
    return None if found is None or found.sign is None else found.sign * better


def word(ours: Values, rival: Values, better: int = 1) -> str:
    return WORDS[verdict(ours, rival, better)] if paired(ours, rival) else "unmeasured"


def difference(ours: Values, rival: Values, better: int = 1) -> str:
    """A table's cell."""
    found = paired(ours, rival)
    return f"{signed(found.mean)} ({interval(found)}){MARKS[verdict(ours, rival, better)]}" if found else "—"


def compared(ours: Values, rival: Values, better: int = 1) -> str:
    """Both means over the seeds that both have, and what their difference allows to say."""
    found = paired(ours, rival)
    if found is None:
        return "unmeasured"
    mean, other = (fmean(values[seed] for seed in ours.keys() & rival.keys()) for values in (ours, rival))
    said = f"difference {signed(found.mean)}, 95 % interval {interval(found)}, {seeds(found.seeds)}"
    return f"{mean:.3f} against {other:.3f}, **{word(ours, rival, better)}** ({said})"


def seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def common(*values: Mapping[int, Any]) -> str:
    """How many seeds all of them have."""
    return str(len(set.intersection(*map(set, values))))


def means(found: Rows, number: int = NUM_LEVELS, digits: int = 3) -> list[str]:
    """Over seeds, for each of `number` levels."""
    columns = list(zip(*found.values(), strict=True)) or [()] * number
    return [f"{fmean(column):.{digits}f}" if column else "—" for column in columns]


def in_short(results: Sequence[Result]) -> Iterator[str]:
    """Sentences that depend on the numbers."""
    for rival in (NONE, QUARTER, "random levels"):
        yield f"**8 levels against {rival}**, true facts: {against(results, rival)}."
    yield f"**Is the level obeyed?** {obeyed(results)}"
    ours = captions(results, OURS, SAMPLED)
    said = "; ".join(f"{arm}: {word(captions(results, arm, SAMPLED), ours)}" for arm in CUTS[1:])
    yield f"**Instead of 8 levels of equal count**, sampled facts: {said}."
    said = "; ".join(
        f"{noise}: {' / '.join(word(facts[OURS], facts[rival]) for rival in (NONE, QUARTER))}"
        for noise, facts in by_noise(results, SAMPLED).items()
    )
    yield f"**Under each noise** 8 levels against no token / top quarter, sampled facts: {said or 'unmeasured'}."
    found = accuracy(results, "adaptive")
    said = "; ".join(f"against {arm} {compared(found, accuracy(results, arm))}" for arm in MODES[1:])
    yield f"**Stage 2**, mean accuracy of `adaptive`: {said}."
    yield f"**The gate** {gate_said(results)}"
    yield f"**Which to use.** {advice(results)}"


def against(results: Sequence[Result], rival: str) -> str:
    said = []
    for way, measure in WAYS.items():
        found = compared(captions(results, OURS, measure), captions(results, rival, measure))
        said.append(f"{way}, at level {levels(results, OURS, measure)}, {found}")
    return "; ".join(said)


def obeyed(results: Sequence[Result]) -> str:
    found = by_level(results, OURS, SAMPLED)
    whole = estimate(list(correlations(found).values()))
    if whole is None:
        return UNMEASURED
    said = {1: "Yes", 0: "Not as far as seen", -1: "The other way round", None: "One seed"}[whole.sign]
    first, *_, last = means(found)
    rising = sum(map(never_falls, found.values()))
    return (
        f"{said}: sampled facts go from {first} at the lowest level to {last} at the highest, and never fall between "
        f"in {rising} of {seeds(len(found))}; their rank correlation with the level is {whole.mean:.2f}."
    )


def gate_said(results: Sequence[Result]) -> str:
    """Called inert where training it makes no difference that is seen, beside a gate that stays as it was drawn."""
    right, right_drawn = (accuracy(results, arm) for arm in ("adaptive", FROZEN))
    nats, nats_drawn = (answers(results, arm, "answer NLL") for arm in ("adaptive", FROZEN))
    bits, bits_drawn = (answers(results, arm, "gate", "mutual information") for arm in ("adaptive", FROZEN))
    if not paired(right, right_drawn):
        return "is unmeasured."
    found = {verdict(right, right_drawn), verdict(nats, nats_drawn, -1)}
    inert = "not inert" if found & {1, -1} else "inert" if found == {0} else "undecided"
    return (
        f"is **{inert}**. Trained, against left as it was drawn: mean accuracy {compared(right, right_drawn)}; "
        f"nats a token of the right answer {compared(nats, nats_drawn, -1)}. A level drawn by its weights tells "
        f"{spread(bits)} bits about the kind of question, and {spread(bits_drawn)} where the gate was never trained."
    )


def advice(results: Sequence[Result]) -> str:
    said = []
    for rival in (NONE, QUARTER):
        choice = {1: "the levels", -1: rival, 0: "no difference seen", None: "not known"}
        chosen = []
        for way, measure in WAYS.items():
            found = verdict(captions(results, OURS, measure), captions(results, rival, measure))
            chosen.append(f"{choice[found]} ({way})")
        said.append(f"Levels or {rival}, for true captions: {', '.join(chosen)}.")
    said.append(
        "By design, levels learn from all pairs and any of them can be asked for; the top quarter needs no token and "
        "drops three pairs of four."
    )
    texts = {
        1: "`adaptive` answers better than `global`, so the gate's mix is worth its layers.",
        -1: "`global` answers better than `adaptive`, and needs no gate.",
        0: "No difference is seen between `adaptive` and `global`, which needs no gate.",
        None: "Whether the gate's mix is worth its layers is not known.",
    }
    return " ".join([*said, texts[verdict(accuracy(results, "adaptive"), accuracy(results, "global"))]])
