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
        for arm, other, name in ((OURS, rival, rival), (PLAIN[0], plain, f"{rival}, LLM without sureness")):
            pairs = [(captions(results, arm, of), captions(results, other, of)) for of in measures]
            cells = [difference(*pair, of.better) for pair, of in zip(pairs, measures, strict=True)]
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

    said = f"**The gate** is {gate_said(results)}", f"**Which to use.** {advice(results)}"
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
    yield f"**Where modes differ in stage 2**, lowest and highest accuracy by kind of question: {ranges(results)}."


def ranges(results: Sequence[Result]) -> str:
    """Of each kind of question the lowest and the highest mean among modes, the widest first."""
    found: dict[str, tuple[float, float]] = {}
    for kind in KINDS:
        measured = [answers(results, arm, "accuracy", kind) for arm in MODES]
        if means := [fmean(values.values()) for values in measured if values]:
            found[kind] = min(means), max(means)
    widest = sorted(found, key=lambda kind: found[kind][0] - found[kind][1])
    return ", ".join(f"{kind} {found[kind][0]:.3f} to {found[kind][1]:.3f}" for kind in widest) or "unmeasured"


def against(results: Sequence[Result], rival: str, arm: str = OURS) -> str:
    """An arm with levels and a rival, by true facts."""
    said = []
    for way, measure in WAYS.items():
        found = compared(captions(results, arm, measure), captions(results, rival, measure))
        said.append(f"{way} {found}")
    return f"at level {levels(results, arm)}, {', '.join(said)}"


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
        f"{said}, by the rank correlation of sampled facts with the level: {'; '.join(ways)}. In order, not in amount: "
        f"the training captions of the lowest level have {shares[0]} true facts, those of the highest {shares[-1]}."
    )


def gate_said(results: Sequence[Result]) -> str:
    """Inert where training it moves the answers' NLL by no difference that is seen from a gate left as it was drawn."""
    nats, frozen = (answer_nll(results, arm) for arm in (ADAPTIVE, FROZEN))
    found = paired(nats, frozen)
    if not found:
        return "unmeasured."
    bits, drawn = (spread(answers(results, arm, "gate", "mutual information")) for arm in (ADAPTIVE, FROZEN))
    said = {
        1: "**not inert**, training it helps",
        0: "**inert**, no effect of training it on the answers is seen",
        -1: "**not inert**, training it harms",
        None: "**undecided**, one seed",
    }[verdict(nats, frozen, -1)]
    if found.interval and not found.sign:
        said += f", though a gain of up to {max(0.0, -found.interval[0]):.3f} nats a token is possible"
    return (
        f"{said}: against one left as it was drawn the answers' NLL is {compared(nats, frozen, -1)}. Training changes "
        f"its weights: a level drawn by them tells {bits} bits about the kind of question, before training {drawn}."
    )


def gate_why(results: Sequence[Result]) -> str:
    """Scale, initialisation, rate and what it reads: each changed alone."""
    nats = answer_nll(results, ADAPTIVE)

    def of(arm: str, key: str) -> str:
        return spread(answers(results, arm, "gate", key), 2)

    def beside(arm: str) -> str:
        return f"logits {of(arm, 'logits std')}, answers' NLL {compared(answer_nll(results, arm), nats, -1)}"

    said = (
        f"*Scale*: the dots have a standard deviation of {of(ADAPTIVE, 'dots std')}, of which the gate as it is drawn "
        f"makes logits that differ by {of(FROZEN, 'logits std')} from question to question, and trained by "
        f"{of(ADAPTIVE, 'logits std')}; its weights keep {of(ADAPTIVE, 'entropy')} of 2.81 bits of entropy. "
        f"*Initialisation*, four times as large: {beside(DRAWN_LARGER)}. *Rate*, ten times as high: "
        f"{beside(HIGHER_RATE)}. *Text*, answers read in training as the public code does: {beside(READS_ANSWERS)}."
    )
    helpful = [arm for arm in (HIGHER_RATE, DRAWN_LARGER) if verdict(answer_nll(results, arm), nats, -1) == 1]
    if helpful:
        said += f" So within the paper's model a gate can do more: answers are likelier with {' and '.join(helpful)}."
        said += " `--optim.align-lr` is its rate." * (HIGHER_RATE in helpful)
    elif all(verdict(answer_nll(results, arm), nats, -1) in (0, -1) for arm in (HIGHER_RATE, DRAWN_LARGER)):
        said += " So neither rate nor initialisation is seen to hold it back."
    return f"{said} The defaults are the paper's and stay."


def advice(results: Sequence[Result]) -> str:
    """By LLM and noise those of levels, top quarter and no token that none of the others beats; the same of answers."""
    names = {OURS: "levels", QUARTER: "top quarter", NONE: "no token"}
    cases: dict[str, list[str]] = {}
    for way, measure in WAYS.items():
        plain = {arm: captions(results, f"{arm}, plain LLM", measure) for arm in names}
        noises = {f"{noise}": of for noise, of in by_noise(results, measure).items() if noise in ADVISED}
        for case, facts in ({f"{FIRST_NOISE}, LLM without sureness": plain} | noises).items():
            cases.setdefault(case, []).append(f"{unbeaten({name: facts[arm] for arm, name in names.items()})} ({way})")
    said = "; ".join(f"under {case}: {', '.join(of)}" for case, of in cases.items())
    arms = [arm for arm in MODES if answer_nll(results, arm)]
    best = unbeaten({arm: answer_nll(results, arm) for arm in arms}, -1) if arms else "unmeasured"
    return (
        f"Named is what nothing else is seen to beat. True captions, of levels, top quarter and no token: {said}. "
        f"Answers, of the arms of stage 2, by NLL: {best}."
    )


def unbeaten(values: Mapping[str, Values], better: int = 1) -> str:
    found = {(a, b): verdict(values[a], values[b], better) for a in values for b in values if a != b}
    if None in found.values():
        return "not known"
    return " or ".join(arm for arm in values if all(found[arm, b] != -1 for b in values if b != arm))
