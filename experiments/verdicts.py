"""What numbers of a few seeds allow to say, in words and in cells of tables.

Every verdict follows from the 95 % interval of a paired difference by one rule: one that contains 0 is "no difference
seen", any other "better" or "worse"; of a single seed nothing is said.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from aligngpt.data.scenes import KINDS
from experiments.readings import (
    ADAPTIVE,
    CUTS,
    DRAWN_LARGER,
    FIRST_NOISE,
    FROZEN,
    HIGHER_RATE,
    MODES,
    NLL,
    NONE,
    NUM_LEVELS,
    OURS,
    PLAIN,
    QUARTER,
    QUARTER_START,
    RANDOM_TABLE,
    READS_ANSWERS,
    SAME_START,
    SAMPLED,
    WAYS,
    Result,
    Rows,
    Values,
    accuracy,
    answer_nll,
    answers,
    by_level,
    by_noise,
    captions,
    choosing,
    correlations,
    levels,
    own,
)
from experiments.statistics import Estimate, estimate, never_falls, paired

UNMEASURED = "Unmeasured."
ADVISED = ("uniform 0.5", "biased 0.5", "swapped 0.5")
WORDS = {1: "better", 0: "no difference seen", -1: "worse", None: "undecided: one seed"}
WITHOUT = {  # what adaptive is held against
    FROZEN: "a gate left as it was drawn",
    RANDOM_TABLE: "a table of random numbers",
    SAME_START: "no token, from the same stage 1",
    QUARTER_START: "no token, from the top quarter's stage 1",
}
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
    return f"{mean:.3f} against {other:.3f}, **{word(ours, rival, better)}** ({apart(found)})"


def apart(found: Estimate) -> str:
    """A paired difference in brackets: its mean, its interval, how many seeds."""
    return "; ".join([signed(found.mean)] + [interval(found)] * (found.interval is not None) + [seeds(found.seeds)])


def seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def common(*values: Mapping[int, Any]) -> str:
    """How many seeds all of them have."""
    return str(len(set.intersection(*map(set, values))))


def means(found: Rows, number: int = NUM_LEVELS, digits: int = 3) -> list[str]:
    """Over seeds, for each of `number` levels."""
    columns = list(zip(*found.values(), strict=True)) or [()] * number
    return [f"{fmean(column):.{digits}f}" if column else "—" for column in columns]


def answer(results: Sequence[Result]) -> Iterator[str]:
    """What a reader comes for: levels against their rivals, the gate against the same without it, what to use."""
    measures = (*WAYS.values(), NLL)
    rows = []
    for rival, plain in zip((NONE, QUARTER), PLAIN[1:], strict=True):
        for arm, other, name in ((OURS, rival, rival), (PLAIN[0], plain, f"{rival}, both with the plain LLM")):
            pairs = [(captions(results, arm, of), captions(results, other, of)) for of in measures]
            cells = [difference(*pair, of.better) for pair, of in zip(pairs, measures, strict=True)]
            if arm == OURS or pairs[0][0]:
                rows.append([name, common(*pairs[0]), *cells])
    yield table(["captions: 8 levels minus", "seeds", *(of.head for of in measures)], rows)

    own, same = (
        [choosing(results, ADAPTIVE, f"{row} row {key}") for key in ("NLL", "accuracy")] for row in ("own", "mean")
    )
    adaptive, *others = ([answer_nll(results, arm), accuracy(results, arm)] for arm in (ADAPTIVE, *WITHOUT))
    rivals = {"the mean of its rows for all questions": (own, same)}
    rivals |= {name: (adaptive, other) for name, other in zip(WITHOUT.values(), others, strict=True)}
    rows = []
    for name, ((nats, right), (other_nats, other_right)) in rivals.items():
        cells = [difference(nats, other_nats, -1), difference(right, other_right)]
        rows.append([name, common(nats, other_nats), *cells])
    yield table(["answers: adaptive minus", "seeds", "NLL", "accuracy"], rows)

    said = f"**The gate**: {gate_said(results)}", f"**Which to use.** {advice(results)}"
    yield "\n".join(
        textwrap.fill(of, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) for of in said
    )


def in_short(results: Sequence[Result]) -> Iterator[str]:
    """Sentences that depend on the numbers."""
    yield f"**Is the level obeyed?** {obeyed(results)}"
    yield f"**Levels against random levels**, true facts: {against(results, 'random levels')}."
    ours = captions(results, OURS, SAMPLED)
    said = "; ".join(f"{arm}: {word(captions(results, arm, SAMPLED), ours)}" for arm in CUTS[1:])
    yield f"**Instead of 8 levels of equal count**, sampled facts: {said}."
    for way, measure in WAYS.items():
        said = "; ".join(
            f"{noise}: {' / '.join(word(facts[OURS], facts[rival]) for rival in (NONE, QUARTER))}"
            for noise, facts in by_noise(results, measure).items()
        )
        yield f"**Under each noise**, levels against no token / top quarter, {way} facts: {said or 'unmeasured'}."
    yield f"**By kind of question**, lowest and highest mean accuracy of stage 2's arms: {ranges(results)}."


def ranges(results: Sequence[Result]) -> str:
    """Of each kind of question the lowest and the highest mean among arms, the widest first."""
    found: dict[str, tuple[float, float]] = {}
    for kind in KINDS:
        measured = [answers(results, arm, "accuracy", kind) for arm in MODES]
        if means := [fmean(values.values()) for values in measured if values]:
            found[kind] = min(means), max(means)
    widest = sorted(found, key=lambda kind: found[kind][0] - found[kind][1])
    return ", ".join(f"{kind} {found[kind][0]:.3f} to {found[kind][1]:.3f}" for kind in widest) or "unmeasured"


def against(results: Sequence[Result], rival: str) -> str:
    """Levels and a rival with levels, by true facts."""
    said = [
        f"{way} {compared(captions(results, OURS, measure), captions(results, rival, measure))}"
        for way, measure in WAYS.items()
    ]
    return f"asked for level {levels(results, OURS)}, and {levels(results, rival)}: {', '.join(said)}"


def obeyed(results: Sequence[Result]) -> str:
    found = by_level(results, OURS, SAMPLED)
    whole = estimate(list(correlations(found).values()))
    if whole is None:
        return UNMEASURED
    said = {1: "Yes", 0: "Not as far as seen", -1: "The other way round", None: "One seed"}[whole.sign]
    ways = []
    for way, measure in WAYS.items():
        rows = by_level(results, OURS, measure)
        first, *_, last = means(rows)
        rising, rank = sum(map(never_falls, rows.values())), fmean(correlations(rows).values())
        ways.append(
            f"{way} facts go from {first} at the lowest level to {last} at the highest, and fall nowhere between in "
            f"{rising} of {seeds(len(rows))} (rank correlation {rank:.2f})"
        )
    shares = means(own(results))
    return (
        f"{said}, by the rank correlation of sampled facts with the level: {'; '.join(ways)}. For comparison, the "
        f"share of true facts in training captions is {shares[0]} in the lowest level and {shares[-1]} in the highest."
    )


def gate_said(results: Sequence[Result]) -> str:
    """Inert where training it moves the answers' NLL by no difference that is seen from a gate left as it was drawn."""
    nats, frozen = (answer_nll(results, arm) for arm in (ADAPTIVE, FROZEN))
    found = paired(nats, frozen)
    if not found:
        return UNMEASURED
    said = {
        1: "**not inert**, training it is seen to help",
        0: "**inert** as far as is seen, training it makes no difference that is told from chance",
        -1: "**not inert**, training it is seen to harm",
        None: "**undecided**, one seed",
    }[verdict(nats, frozen, -1)]
    bits, drawn = (answers(results, arm, "gate", "mutual information") for arm in (ADAPTIVE, FROZEN))
    changed = paired(bits, drawn)
    return (
        f"{said}. The answers' NLL with it and with one left as it was drawn: {compared(nats, frozen, -1)}; accuracy, "
        f"which does not decide: {compared(accuracy(results, ADAPTIVE), accuracy(results, FROZEN))}. Bits that a level "
        f"drawn by its weights tells about the kind of question, with both: {spread(bits)} and {spread(drawn)}"
        f"{f' ({apart(changed)})' if changed else ''}."
    )


def gate_why(results: Sequence[Result]) -> str:
    """Scale, initialisation, rate and what it reads: each changed alone."""
    nats = answer_nll(results, ADAPTIVE)

    def of(arm: str, key: str) -> str:
        return spread(answers(results, arm, "gate", key), 2)

    def beside(arm: str) -> str:
        return f"logits {of(arm, 'logits std')}, answers' NLL {compared(answer_nll(results, arm), nats, -1)}"

    said = (
        f"*Scale*, by standard deviations: as drawn, the gate turns dots of {of(FROZEN, 'dots std')} into logits of "
        f"{of(FROZEN, 'logits std')} between questions; trained, dots of {of(ADAPTIVE, 'dots std')} into logits of "
        f"{of(ADAPTIVE, 'logits std')}, and its weights keep {of(ADAPTIVE, 'entropy')} of 2.81 bits of entropy. "
        f"*Initialisation*, four times as large: {beside(DRAWN_LARGER)}. *Rate*, ten times as high: "
        f"{beside(HIGHER_RATE)}. *Text*, answers read in training as the public code does: {beside(READS_ANSWERS)}."
    )
    verdicts = {arm: verdict(answer_nll(results, arm), nats, -1) for arm in (HIGHER_RATE, DRAWN_LARGER)}
    if helpful := [arm for arm, sign in verdicts.items() if sign == 1]:
        said += f" Within the paper's model answers are seen to be likelier with {' and with '.join(helpful)}."
        said += " `--optim.align-lr` is the gate's rate." * (HIGHER_RATE in helpful)
    elif None not in verdicts.values():
        said += " No gain from a higher rate or a larger initialisation is told from chance."
    return f"{said} The defaults are the paper's and stay."


def advice(results: Sequence[Result]) -> str:
    """By LLM and noise which of levels, top quarter and no token has the truest captions; and the likeliest answers."""
    cases: dict[str, dict[str, list[str]]] = {}
    for way, measure in WAYS.items():
        plain = [captions(results, arm, measure) for arm in PLAIN]
        found = {f"{FIRST_NOISE} with the plain LLM": plain} if any(plain) else {}
        for noise, facts in by_noise(results, measure).items():
            if noise in ADVISED:
                found[noise] = [facts[arm] for arm in (OURS, NONE, QUARTER)]
        for case, values in found.items():
            names = dict(zip(("levels", "no token", "top quarter"), values, strict=True))
            cases.setdefault(case, {}).setdefault(" or ".join(best(names)) or "not known", []).append(way)
    ways_of = {case: [f"{names} ({', '.join(ways)})" for names, ways in of.items()] for case, of in cases.items()}
    said = "; ".join(f"under {case}: {', '.join(of)}" for case, of in ways_of.items())
    arms = {f"*{arm}*": nats for arm in MODES if (nats := answer_nll(results, arm))}
    likeliest = best(arms, -1)
    answered = " or ".join(likeliest) or "not known"
    if 1 < len(likeliest) == len(arms):
        answered = f"{likeliest[0]}, from which none of the other {len(arms) - 1} is told"
    return (
        f"Named are the best on average and what is not told from it. True captions, of levels, top quarter and no "
        f"token: {said or 'unmeasured'}. Answers, of all arms of stage 2, by NLL: {answered}."
    )


def best(values: Mapping[str, Values], better: int = 1) -> list[str]:
    """The arm with the best mean, then those of which no difference from it is seen; none where an arm has no two seeds
    in common with it."""
    if not values or not all(values.values()):
        return []
    first = max(values, key=lambda arm: better * fmean(values[arm].values()))
    found = {arm: verdict(values[first], of, better) for arm, of in values.items() if arm != first}
    return [] if None in found.values() else [first, *(arm for arm, sign in found.items() if sign != 1)]
