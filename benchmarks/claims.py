"""The speed that the README claims: each claim is one line here, and its number comes from a results file.

A claim takes every case of its group whose name contains `part`; where several were measured, it has the least and the
largest value. What no file holds is "unmeasured". A ratio is the contender's number divided by ours, as it is. A dagger
marks a row with a number of older code than the newest of its file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from benchmarks.readings import Content, Record, cases, is_gpu, is_old, ratio

GPU, CPU = "GPU", "CPU"
UNMEASURED = "unmeasured"
OLD = " †"


class Claim(NamedTuple):
    text: str
    where: str  # GPU or CPU
    group: str
    contender: str  # whom ours is compared with; "": ours alone
    part: str = ""  # of the case's name
    field: str = "us"
    ours: str = "ours"
    shown_as: str = ""  # instead of the contender's name; for ours alone, the unit


def _inject(where: str, direction: str, part: str = "") -> Iterator[Claim]:
    text, group = f"sequence building (`inject`) {direction}" + f", {part}" * bool(part), f"injection {direction}"
    for name, shown in (
        ("concatenating", "the public concatenating algorithm"),
        ("concatenating once", "the leanest concatenation"),
        ("concatenating, searching", "searching the ids, as the public code"),
    ):
        yield Claim(text, where, group, name, part, shown_as=shown)


def _auto(direction: str) -> Claim:
    text, against = f"projector + gate + injection {direction}, as `auto` runs it", "eager + concatenating"
    return Claim(text, GPU, f"chain {direction}", against, ours="ours, eager projector")


LOSS, PICTURES, STEP = "loss with backward, V 32,000", "answers to 48 pictures at 7B", "training step, lengths of 665K"
TINY = "answers to 16 pictures by a tiny model"
CLAIMS = [
    *_inject(GPU, "forward", "packed"),
    *(
        claim._replace(text="the same by the clock, host included", field="wall_us")
        for claim in _inject(GPU, "forward", "packed")
    ),
    *_inject(GPU, "forward + backward", "packed"),
    _auto("forward"),
    _auto("forward + backward"),
    *(
        Claim(f"text mean + gate {way}", GPU, "gate", name, f"text_mean + align_gate {way},", shown_as=shown)
        for way in ("forward", "forward + backward")
        for name, shown in (("reference", "PyTorch"), ("reference, torch.compile", "compiled"))
    ),
    Claim(LOSS, GPU, "loss V=32000", "full logits"),
    Claim(LOSS, GPU, "loss V=32000", "full logits, torch.compile", shown_as="compiled"),
    Claim(LOSS, GPU, "loss V=32000", "Liger"),
    Claim(LOSS, GPU, "loss V=32000", "Liger, compacted rows", shown_as="Liger on supervised rows"),
    Claim(f"{LOSS}: times as little memory", GPU, "loss V=32000", "full logits", field="peak_bytes"),
    *(Claim("decoding attention, the caches measured", GPU, "decode", name) for name in ("SDPA flash", "SDPA cuDNN")),
    Claim("projector kernel forward", GPU, "projector forward", "eager"),
    Claim("projector kernel forward + backward", GPU, "projector forward + backward", "eager"),
    Claim(PICTURES, GPU, "generate images", "", field="answers_per_second", shown_as="pictures a second"),
    Claim(PICTURES, GPU, "generate images", "generate, all at once", shown_as="`generate` on the whole batch"),
    Claim("one answer at 7B", GPU, "generate one", "", field="new_tokens_per_second", shown_as="tokens a second"),
    Claim("one answer at 7B", GPU, "generate one", "generate", shown_as="`generate`"),
    Claim("one answer at 7B", GPU, "generate one", "", field="first_tokens_ms", shown_as="ms to the first token"),
    Claim("`aligngpt eval` at 7B", GPU, "evaluation", "generate, one at a time", shown_as="`generate`, one at a time"),
    *(
        Claim(f"training step of {named} at 7B, {way}", GPU, group, "", part, "mfu", shown_as="MFU")
        for named, group in (("stage 1", "step at 7B shapes, pretrain"), ("stage 2", "step at 7B shapes, finetune"))
        for way, part in (
            ("no checkpointing", "checkpointing none"),
            ("selective checkpointing", "checkpointing selective"),
        )
    ),
    *(
        Claim(f"training step of {named}, two layers of 7B", GPU, f"step beside a plain loop, {stage}", "plain loop")
        for named, stage in (("stage 1", "pretrain"), ("stage 2", "finetune"))
    ),
    *(
        Claim("LLM forward + backward, packed, two layers of 7B", GPU, "LLM forward + backward", name, shown_as=shown)
        for name, shown in (
            ("padded, SDPA", "padded, SDPA"),
            ("padded, SDPA, torch.compile", "padded, compiled"),
            ("padded, SDPA, Liger", "padded, Liger's layers"),
        )
    ),
    *(
        Claim("forward of packed samples, two layers of 7B", GPU, "llava forward", name, shown_as=shown)
        for name, shown in (
            ("transformers Llava", "transformers' Llava"),
            ("transformers Llava, torch.compile", "compiled"),
            ("Liger's Llava", "Liger's"),
        )
    ),
    *_inject(CPU, "forward"),
    *_inject(CPU, "forward + backward"),
    Claim(STEP, CPU, "step lengths", "ours, padded", ours="ours, packed", shown_as="padding in plain order"),
    Claim(STEP, CPU, "step lengths", "ours, padded, grouped", ours="ours, packed", shown_as="padding sorted by length"),
    *(
        Claim(f"training step of {named}", CPU, f"step beside a plain loop, {stage}", "plain loop")
        for named, stage in (("stage 1", "pretrain"), ("stage 2", "finetune"))
    ),
    Claim("forward of packed samples", CPU, "llava forward", "transformers Llava", shown_as="transformers' Llava"),
    Claim(TINY, CPU, "generate images", "generate, all at once", shown_as="`generate` on the whole batch"),
    Claim(TINY, CPU, "generate images", "generate, one at a time", shown_as="`generate`, one at a time"),
    Claim("one answer of a tiny model", CPU, "generate one", "generate", shown_as="`generate`"),
    Claim(
        "the same with compiled steps", CPU, "generate one", "generate", ours="ours, compiled", shown_as="`generate`"
    ),
    Claim(
        "`aligngpt eval`, tiny model",
        CPU,
        "evaluation",
        "generate, one at a time",
        shown_as="`generate`, one at a time",
    ),
    *(
        Claim(text, CPU, f"images {aspect}", "PIL + DataLoader", ours="ours, DALI", shown_as="`DataLoader` and PIL")
        for text, aspect in (("photos to pixels, centre cut out", "square"), ("photos to pixels, padded", "pad"))
    ),
]


def number(value: float) -> str:
    """Three digits, never in powers of ten."""
    text = f"{value:#.3g}"
    return f"{value:,.0f}" if "e" in text else text.rstrip(".")


def times(value: float) -> str:
    """A ratio, bold where ours is slower."""
    return f"**{number(value)}**" if value < 1 else number(value)


def value(claim: Claim, record: Record) -> float | None:
    contenders: Mapping[str, Any] = record["contenders"]
    ours = contenders.get(claim.ours, {}).get(claim.field)
    if not claim.contender:
        return ours
    if claim.field == "us":
        found = ratio(record, claim.contender, claim.ours)
        return found.median if found else None
    theirs = contenders.get(claim.contender, {}).get(claim.field)
    return theirs / ours if theirs is not None and ours else None


class Found(NamedTuple):
    value: float
    is_old: bool


def values(claim: Claim, content: Content) -> list[Found]:
    """One of each case that was measured."""
    chosen = [r for name, r in cases(content).items() if r.get("group") == claim.group and claim.part in name]
    found = [(value(claim, record), is_old(record, content)) for record in chosen]
    return [Found(of, old) for of, old in found if of is not None]


def shown(claim: Claim, found: Sequence[Found]) -> str:
    """The contender and its ratio, or our number and its unit."""
    if not found:
        return UNMEASURED
    numbers = sorted(of.value for of in found)
    if claim.contender:
        return f"{claim.shown_as or claim.contender} {ends(times, numbers)}"
    scale, unit = (100, "% ") if claim.field == "mfu" else (1, "")
    return f"{ends(number, [scale * of for of in numbers])} {unit}{claim.shown_as}"


def ends(said: Callable[[float], str], numbers: Sequence[float]) -> str:
    """The first and the last, or both as one."""
    return " to ".join(dict.fromkeys((said(numbers[0]), said(numbers[-1]))))


def tables(files: Sequence[Content], claims: Sequence[Claim] = CLAIMS) -> str:
    """Markdown: a table for each kind of machine, claims with the same text in one row."""
    lines: list[str] = []
    has_old = False
    for where in (GPU, CPU):
        said = [claim for claim in claims if claim.where == where]
        machines = [content for content in files if is_gpu(content) == (where == GPU)]
        for content in machines:
            lines += [f"| {content['device']} | times as fast as |", "|---|---|"]
            for text, of in groupby(said, key=lambda claim: claim.text):
                row = [(claim, values(claim, content)) for claim in of]
                old = any(found.is_old for _, several in row for found in several)
                cells = dict.fromkeys(shown(claim, found) for claim, found in row)
                lines.append(f"| {text}{OLD * old} | {' · '.join(cells)} |")
                has_old |= old
            lines.append("")
        if not machines:
            lines += [f"On a {where}: {UNMEASURED}.", ""]
    if has_old:
        lines.append("† measured with older code.")
    return "\n".join(lines).rstrip()
