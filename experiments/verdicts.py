"""What numbers of a few seeds allow to say, in words and in cells of tables.

Every verdict follows from the 95 % interval of a paired difference by one rule: one that contains 0 is "no difference
seen", any other "better" or "worse"; of a single seed nothing is said.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from aligngpt.data.scenes import KINDS
from experiments.readings import (
    CUTS,
    FROZEN,
    MODES,
    NLL,
    NONE,
    NUM_LEVELS,
    OURS,
    PLAIN,
    QUARTER,
    SAMPLED,
    WAYS,
    WILDER,
    Result,
    Rows,
    Values,
    accuracy,
    answer_nll,
    answers,
    by_level,
    by_noise,
    captions,
    correlations,
    levels,
    read,
)
from experiments.statistics import Estimate, estimate, never_falls, paired

UNMEASURED = "Unmeasured."
ADVISED = ("uniform 0.5", "biased 0.5", "swapped 0.5")
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
    return f"{mean:.3f} against {other:.3f}, **{word(ours, rival, better)}** ({apart(found)})"


def apart(found: Estimate) -> str:
    """A paired difference in brackets: its mean, its interval, how many seeds."""
    return "; ".join([signed(found.mean)] + [interval(found)] * (found.interval is not None) + [seeds(found.seeds)])


def standing(ours: Values, rivals: Mapping[str, Values], better: int = 1) -> str:
    """An arm's mean among its rivals', which are put together by what may be said of them."""
    if not ours:
        return "unmeasured"
    texts = {1: "better than", 0: "no difference seen from", -1: "worse than", None: "undecided, one seed, beside"}
    said: dict[str, list[str]] = {text: [] for text in [*texts.values(), "not measured beside"]}
    for arm, values in rivals.items():
        if found := paired(ours, values):
            text = f"{arm} {fmean(values.values()):.3f} ({apart(found)})"
            said[texts[verdict(ours, values, better)]].append(text)
        else:
            said["not measured beside"].append(arm)
    return f"{fmean(ours.values()):.3f}, " + "; ".join(f"{text} {', '.join(of)}" for text, of in said.items() if of)


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
    said = "; ".join(f"against {rival} {against(results, rival, PLAIN[0])}" for rival in PLAIN[1:])
    yield f"**With an LLM that has read nothing of sureness**, true facts of {PLAIN[0]}: {said}."
    yield f"**Is the level obeyed?** {obeyed(results)}"
    ours = captions(results, OURS, SAMPLED)
    said = "; ".join(f"{arm}: {word(captions(results, arm, SAMPLED), ours)}" for arm in CUTS[1:])
    yield f"**Instead of 8 levels of equal count**, sampled facts: {said}."
    said = "; ".join(
        f"{noise}: {' / '.join(word(facts[OURS], facts[rival]) for rival in (NONE, QUARTER))}"
        for noise, facts in by_noise(results, SAMPLED).items()
    )
    yield f"**Under each noise** 8 levels against no token / top quarter, sampled facts: {said or 'unmeasured'}."
    for name, measured, better in (("mean accuracy", accuracy, 1), ("answers' NLL", answer_nll, -1)):
        rivals = {arm: measured(results, arm) for arm in MODES[1:]}
        yield f"**Stage 2**, {name} of `adaptive`: {standing(measured(results, 'adaptive'), rivals, better)}."
    yield f"**Where modes differ in stage 2**, lowest and highest accuracy by kind of question: {ranges(results)}."
    yield f"**The gate** {gate_said(results)} {gate_why(results)}"
    yield f"**Which to use.** {advice(results)}"


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
    first, *_, last = means(found)
    rising = sum(map(never_falls, found.values()))
    return (
        f"{said}: sampled facts go from {first} at the lowest level to {last} at the highest, and never fall between "
        f"in {rising} of {seeds(len(found))}; their rank correlation with the level is {whole.mean:.2f}."
    )


def gate_said(results: Sequence[Result]) -> str:
    """Inert where training it moves the answers' NLL by no difference that is seen from a gate left as it was drawn."""
    nats, frozen = (answer_nll(results, arm) for arm in ("adaptive", FROZEN))
    if not paired(nats, frozen):
        return "is unmeasured."
    said = {
        1: "is **not inert**: training it helps",
        0: "is **inert**: training it makes no difference that is seen",
        -1: "is **not inert**: training it harms",
        None: "is **undecided**: one seed",
    }
    return (
        f"{said[verdict(nats, frozen, -1)]}. Trained, against left as it was drawn: nats a token of the right answer "
        f"{compared(nats, frozen, -1)}; beside it, mean accuracy "
        f"{compared(accuracy(results, 'adaptive'), accuracy(results, FROZEN))}."
    )


def gate_why(results: Sequence[Result]) -> str:
    """Numbers by which the verdict on the gate is understood."""
    fixed = read(results, "stage 2", "adaptive", "test", "by level", "NLL")
    answering = {seed: max(of) - min(of) for seed, of in fixed.items()}
    captioning = {seed: of[0] - of[-1] for seed, of in by_level(results, OURS, NLL).items()}
    bits, drawn = (answers(results, arm, "gate", "mutual information") for arm in ("adaptive", FROZEN))
    nats = answer_nll(results, "adaptive")
    other = "; ".join(
        f"{arm} {compared(answer_nll(results, arm), nats, -1)}, "
        f"{spread(answers(results, arm, 'gate', 'mutual information'))} bits"
        for arm in WILDER
    )
    said = (
        f"Between the best and the worst fixed level the answers' NLL differs by {spread(answering)} nats a token, and "
        f"that of true captions in stage 1 between the lowest and the highest level by {spread(captioning)}. A level "
        f"drawn by the gate's weights tells {spread(bits)} bits about the kind of question, and {spread(drawn)} where "
        f"the gate was never trained. Answers' NLL beside adaptive: {other}."
    )
    if helpful := [arm for arm in WILDER if verdict(answer_nll(results, arm), nats, -1) == 1]:
        said += f" So the gate can do more than it does by the paper's recipe: {', '.join(helpful)}."
    elif verdict(nats, answer_nll(results, FROZEN), -1) == 0:
        said += (
            " One reading, not a finding: the prompt and the picture, of which the gate makes its row, are read by the "
            "LLM anyway."
        )
    return said


def advice(results: Sequence[Result]) -> str:
    """By noise those of levels, top quarter and no token that none of the others beats, and whether the gate pays."""
    ways = {way: by_noise(results, measure) for way, measure in WAYS.items()}
    said = [
        f"under {noise}: " + ", ".join(f"{unbeaten(of[noise])} ({way})" for way, of in ways.items())
        for noise in ADVISED
        if noise in ways["sampled"]
    ]
    return (
        "For true captions, what none of the others (levels, top quarter, no token) is seen to beat, "
        f"{'; '.join(said) or 'unmeasured'}. {gate_advice(results)}"
    )


def unbeaten(facts: Mapping[str, Values]) -> str:
    arms = {OURS: "levels", QUARTER: "top quarter", NONE: "no token"}
    found = {(a, b): verdict(facts[a], facts[b]) for a in arms for b in arms if a != b}
    if None in found.values():
        return "not known"
    return " or ".join(name for arm, name in arms.items() if all(found[arm, b] != -1 for b in arms if b != arm))


def gate_advice(results: Sequence[Result]) -> str:
    nats = answer_nll(results, "adaptive")
    found = {arm: verdict(nats, answer_nll(results, arm), -1) for arm in ("global", "average", FROZEN)}
    if set(found.values()) == {1}:
        return f"The gate's mix is worth its layers: by the answers' NLL, adaptive is better than {', '.join(found)}."
    texts = {
        0: "no difference is seen from {}",
        -1: "better than adaptive: {}",
        1: "worse: {}",
        None: "not known of {}",
    }
    arms = {sign: ", ".join(arm for arm, of in found.items() if of == sign) for sign in texts}
    said = "; ".join(text.format(arms[sign]) for sign, text in texts.items() if arms[sign])
    return f"That the gate's mix is worth its layers is not shown, by the answers' NLL: {said}."
