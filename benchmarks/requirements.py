"""What is required on an H100 of kernels, training steps and answering, how a results file stands beside it, and how
results are shown.

Every line takes the worst of its cases. A ratio is a contender's time, or what else the line names, divided by ours, so
that more is better unless the line says at most.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.measure import Ceilings
from benchmarks.results import is_current

Record = Mapping[str, Any]  # of a case: "bytes", "group", "contenders": {name: result}, ...
LARGE_CACHE = 250e6  # bytes, from which decoding is held to a share of the copy bandwidth
PEERS_NOT = ("ours", "reference")
NO_CHECKPOINTING = "checkpointing none"  # recomputation counts for nothing in MFU, so this is its best case


class Missing(Exception):
    """A number isn't there; the message says which and why."""

    def __init__(self, message: str, fault: bool = False) -> None:
        super().__init__(message)
        self.fault = fault  # whether our contender was wrong or failed


def result(record: Record, name: str, unit: str = "us") -> float:
    found = record["contenders"].get(name, {})
    if unit not in found:
        said = reasons(found)
        fault = name.startswith("ours") and bool({"wrong", "failed"} & found.keys())
        raise Missing(f"{name}: {said or f'no {unit}'}", fault)
    return found[unit]


def reasons(found: Record) -> str:
    """Why a contender has no time."""
    return "; ".join(f"{kind}: {why}" for kind, why in found.items() if isinstance(why, str))


def ratio(other: str, ours: str = "ours", unit: str = "us") -> Callable[[Record], float]:
    return lambda record: result(record, other, unit) / result(record, ours, unit)


def best_of_ours(other: str) -> Callable[[Record], float]:
    """The other's time divided by that of our fastest contender."""

    def measure(record: Record) -> float:
        ours = {name: found for name, found in record["contenders"].items() if name.startswith("ours")}
        times = [found["us"] for found in ours.values() if "us" in found]
        if not times:
            raise Missing(f"ours: {ours}", fault=bool(ours))
        return result(record, other) / min(times)

    return measure


def best_peer(record: Record) -> float:
    times = [
        r["us"] for name, r in record["contenders"].items() if not name.startswith(PEERS_NOT) and "us" in r
    ]  # fmt: skip
    if not times:
        raise Missing("no peer was right")
    return min(times) / result(record, "ours")


def best(unit: str) -> Callable[[Record], float]:
    """The largest of our contenders."""

    def measure(record: Record) -> float:
        contenders = record["contenders"]
        found = [r[unit] for name, r in contenders.items() if name.startswith("ours") and unit in r]
        return max(found) if found else result(record, "ours", unit)

    return measure


def share_of_weights(record: Record) -> float:
    """The least time in which the weights are read, divided by that of a token after the first."""
    found = record["contenders"].get("ours", {})  # in older records the case counted the weights alone
    weights = found.get("weight_bytes") or record["bytes"] / result(record, "ours", "new_tokens")
    floor = weights / record["ceilings"]["bytes_per_second"]
    return floor / (result(record, "ours", "ms_per_token") * 1e-3)


def share_of_copy(record: Record) -> float:
    top = record["ceilings"]
    copied = top.get("copied_bytes_per_second") or top["bytes_per_second"]  # in older records this was of the copy
    return record["bytes"] / (result(record, "ours") * 1e-6) / copied


def group(name: str, part: str = "") -> Callable[[str, Record], bool]:
    return lambda case, record: record.get("group") == name and part in case


def rows_at_most(limit: int) -> Callable[[str, Record], bool]:
    return lambda case, record: record.get("group") == "projector forward" and _rows(case) <= limit


def rows_at_least(limit: int) -> Callable[[str, Record], bool]:
    return lambda case, record: record.get("group") == "projector forward" and _rows(case) >= limit


def _rows(case: str) -> int:
    return int(case.split("M=")[1].split()[0])


class Line(NamedTuple):
    text: str
    applies: Callable[[str, Record], bool]
    measure: Callable[[Record], float]
    required: float | None = None  # None: printed for comparison
    aim: float | None = None
    at_most: bool = False  # whether less is better


LINES = [
    Line("projector forward, M >= 4608, vs eager", rows_at_least(4608), ratio("eager"), 1.05, 1.08),
    Line("projector forward, M <= 1152, vs eager", rows_at_most(1152), ratio("eager"), 1.10, 1.15),
    Line("projector forward, all M, vs torch.compile", rows_at_least(1), ratio("torch.compile")),
    Line(
        "projector forward + backward vs torch.compile",
        group("projector forward + backward"), ratio("torch.compile"), 1.03, 1.10,
    ),
    Line("injection vs concatenating: GPU time", group("injection forward", "equal"), ratio("concatenating"), 5),
    Line(
        "injection vs concatenating: wall time",
        group("injection forward", "equal"), ratio("concatenating, searching", unit="wall_us"), 20,
    ),
    Line("injection vs concatenating: GPU time, any layout", group("injection forward"), ratio("concatenating")),
    Line("injection: syncs", group("injection forward"), lambda r: result(r, "ours", "syncs"), 0, at_most=True),
    Line(
        "injection forward + backward vs concatenating: GPU time",
        group("injection forward + backward"), ratio("concatenating"),
    ),
    Line(
        "projector + gate + injection vs eager + concatenating",
        group("chain forward"), best_of_ours("eager + concatenating"), 1.6, 1.8,
    ),
    Line(
        "the same, forward + backward",
        group("chain forward + backward"), best_of_ours("eager + concatenating"),
    ),
    Line(
        "decode, cache >= 250 MB: share of copy bandwidth",
        lambda case, record: record.get("group") == "decode" and record["bytes"] >= LARGE_CACHE,
        share_of_copy, 0.85, 0.92,
    ),
    Line("decode vs best peer", group("decode"), best_peer, 1.0, 1.1),
    Line("loss V 32000 vs full logits", group("loss V=32000"), ratio("full logits"), 4),
    Line("loss V 32000 vs Liger", group("loss V=32000"), ratio("Liger"), 2),
    Line("loss V 32000 vs Liger on compacted rows", group("loss V=32000"), ratio("Liger, compacted rows")),
    Line(
        "loss V 32000: memory / that of full logits",
        group("loss V=32000"), lambda r: 1 / ratio("full logits", unit="peak_bytes")(r), 0.1, at_most=True,
    ),
    *(
        Line(
            f"step at 7B shapes, {stage}{'' if part == NO_CHECKPOINTING else ', checkpointing ' + part}: MFU",
            group(f"step at 7B shapes, {stage}", part), lambda r: result(r, "ours", "mfu"),
            required if part == NO_CHECKPOINTING else None,
        )
        for stage, required in (("pretrain", 0.55), ("finetune", 0.50))
        for part in (NO_CHECKPOINTING, "selective", "full")
    ),
    Line("step packed vs padded: useful tokens/s", group("step lengths"), ratio("ours, padded", "ours, packed"), 1.5),
    Line(
        "step packed vs padded and grouped: useful tokens/s",
        group("step lengths"), ratio("ours, padded, grouped", "ours, packed"),
    ),
    *(
        Line(f"step vs a plain loop, {stage}", group(f"step beside a plain loop, {stage}"), ratio("plain loop"))
        for stage in ("pretrain", "finetune")
    ),
    Line(
        "answering at 7B, one: tokens/s after the first",
        group("generate one"), lambda r: 1e3 / result(r, "ours", "ms_per_token"), 170, 195,
    ),
    Line("the same: share of what reading the weights allows", group("generate one"), share_of_weights),
    Line(
        "the same: waits for the device a token",
        group("generate one"), lambda r: result(r, "ours", "syncs_per_token"), 0, at_most=True,
    ),
    Line("the same vs generate", group("generate one"), ratio("generate", unit="ms_per_token")),
    Line(
        "the same vs generate, static cache",
        group("generate one, static cache"), ratio("generate, static cache", unit="ms_per_token"),
    ),
    Line("answering at 7B, 48 with an image: images/s", group("generate images"), best("answers_per_second"), 16, 20),
    Line("the same vs generate, all at once", group("generate images"), best_of_ours("generate, all at once")),
    Line("the same without an image vs continuous batching", group("generate texts"), ratio("continuous batching")),
]  # fmt: skip


class Standing(NamedTuple):
    line: Line
    value: float | None
    case: str  # the worst one; or why there is no value
    fault: bool = False  # whether there is none because our contender was wrong or failed

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not met" if self.fault else "unmeasured"
        if self.line.required is None:
            return ""
        better = (lambda bar: self.value <= bar) if self.line.at_most else (lambda bar: self.value >= bar)
        if self.line.aim is not None and better(self.line.aim):
            return "aim met"
        return "met" if better(self.line.required) else "not met"


def standing(line: Line, cases: Mapping[str, Record]) -> Standing:
    """The worst of the line's cases; one that lacks the number, unless it was too large, makes the line unmeasured."""
    values = []
    for case, record in cases.items():
        if line.applies(case, record) and "skipped" not in record:
            try:
                values.append((line.measure(record), case))
            except Missing as missing:
                return Standing(line, None, f"{case}: {missing}", missing.fault)
    if not values:
        return Standing(line, None, "no case was run")
    return Standing(line, *(max(values) if line.at_most else min(values)))


def finished(results: Mapping[str, Any]) -> dict[str, Record]:
    """The cases that are through, with the code that the file was last written by."""
    return {
        name: record
        for name, record in results["cases"].items()
        if record.get("finished") and is_current(record, results)
    }


def summary(results: Mapping[str, Any]) -> str:
    """On a GPU each requirement with its value, bar and verdict; then every case with its contenders."""
    cases = finished(results)
    gpu = results.get("capability", "sm_").startswith("sm_")
    lines = [f"{'requirement':<58}{'value':>8}{'required':>10}{'aim':>7}  verdict, worst case"] if gpu else []
    for found in (standing(line, cases) for line in LINES if gpu):
        shown = ["" if n is None else f"{n:.3g}" for n in (found.value, found.line.required, found.line.aim)]
        verdict = f"{found.verdict}, {found.case}" if found.verdict else found.case
        lines.append(f"{found.line.text:<58}{shown[0]:>8}{shown[1]:>10}{shown[2]:>7}  {verdict}")
    for name, record in cases.items():
        lines += ["", describe(name, record)]
    return "\n".join(lines)


def describe(name: str, record: Record) -> str:
    """A case: median time, quartiles, ratio to ours, share of the ceiling and error of each contender."""
    work = f" · {record['bytes'] / 1e6:.1f} MB, {record['flops'] / 1e9:.1f} GFLOP" if record["bytes"] else ""
    lines = [name + work]
    lines += [f"  {kind}: {record[kind]}" for kind in ("failed", "skipped") if kind in record]
    if record.get("copies") == 1 and record["bytes"]:
        lines.append("  there is one copy of the inputs: parts of it may be read from the cache")
    for contender, found in record["contenders"].items():
        if "us" not in found:
            lines.append(f"  {contender:<32}{reasons(found)}")
            continue
        low, high = found["quartiles_us"]
        said = f"  {contender:<32}{found['us']:>11.1f} µs ({low:.1f} to {high:.1f})"
        said += f"{ratio_said(found):>30}" if "ratio" in found else ""
        said += share_said(found["share_of_ceiling"]) if "share_of_ceiling" in found else ""
        if record.get("items"):
            said += f", {record['items'] / found['us'] * 1e6:.4g} {record['unit']}/s"
        said += f", error {found['error_in_plain_errors']:g} of plain" if found["error_in_plain_errors"] else ""
        for unit, text in (
            ("wall_us", "{:.1f} µs wall"),
            ("syncs", "{} syncs"),
            ("peak_bytes", "{:.3e} bytes peak"),
        ):
            said += f", {text.format(found[unit])}" if unit in found else ""
        said += f", host-bound {found['host_bound']:.0%}" if found["host_bound"] else ""
        lines += [said, *_of_step(found, record), *_of_answers(found)]
    return "\n".join(lines)


def share_said(share: float) -> str:
    above = ", ABOVE it: read from a cache, or the ceiling was measured on a busier machine" if share > 1 else ""
    return f"{share:>8.1%} of the ceiling{above}"


def ratio_said(found: Record) -> str:
    return "{median:.2f} × ours ({low:.2f} to {high:.2f})".format(**found["ratio"])


def described(top: Ceilings, device: torch.device) -> str:
    kind = "bfloat16" if device.type == "cuda" else "float32"
    copied = top.copied_bytes_per_second or top.bytes_per_second
    return (
        f"this device copies {copied / 1e9:.1f} GB/s, read + write, streams {top.bytes_per_second / 1e9:.1f} GB/s at "
        f"most, and multiplies {kind} matrices at {top.flops_per_second / 1e12:.3g} TFLOP/s"
        + (f"; its ceilings are noisy: {top.noisy}" if top.noisy else "")
    )


def exceptions(cases: Mapping[str, Record]) -> list[str]:
    """What a table of times and ratios does not say: who has no time and why, and which others are faster than ours."""
    missing: dict[tuple[str, str], list[str]] = {}  # cases by contender and reason
    faster, compared = [], 0
    for case, record in cases.items():
        for kind in ("failed", "skipped"):
            if kind in record:
                missing.setdefault(("the whole case", f"{kind}: {record[kind]}"), []).append(case)
        for name, found in record["contenders"].items():
            if "us" not in found:
                missing.setdefault((name, "too noisy" if "noisy" in found else reasons(found)), []).append(case)
            elif "ratio" in found:
                compared += 1
                if found["ratio"]["median"] < 1:
                    faster.append(f"  {case}: {name}, {ratio_said(found)}")
    lines = [f"{len(faster)} of {compared} contenders of {len(cases)} cases are faster than ours", *faster]
    if missing:
        lines.append("without a time:")
    for (name, why), found_in in missing.items():
        lines.append(f"  {name}: {why} ({found_in[0] if len(found_in) == 1 else f'{len(found_in)} cases'})")
    return lines


def _of_step(found: Record, record: Record) -> list[str]:
    """What a training step says of itself beside its time."""
    lines = []
    if "tokens_per_second" in found:
        lines.append(f"    {found['tokens_per_second']:.0f} useful tokens/s")
    if "mfu" in found:
        reached, top = found["flops"] / (found["us"] * 1e-6), record["ceilings"]["flops_per_second"]
        lines.append(
            f"    MFU {found['mfu']:.1%}, {reached / top:.1%} of the ceiling; {found['layers']} layers, "
            f"{found['tokens']} tokens, {found['images']} images; {found['peak_bytes'] / 1e9:.1f} GB at the peak, "
            f"{found['planned_bytes'] / 1e9:.1f} planned"
        )
    if "stages" in found:
        times = {row["stage"]: row["us"] for row in found["stages"]} | found["rest"]
        total = sum(times.values())
        lines += [f"    {stage:<32}{us / 1e3:>9.1f} ms{us / total:>7.1%}" for stage, us in times.items() if us]
        lines.append(f"    {'sum':<32}{total / 1e3:>9.1f} ms, {total / found['whole_us']:.2f} × the step without marks")
        lines += [f"    the step without marks: {found['whole_noisy']}"] if "whole_noisy" in found else []
    return lines


def _of_answers(found: Record) -> list[str]:
    """What answering says of itself beside its time."""
    if "ms_per_token" not in found:
        return []
    lines = [
        f"    {found['first_tokens_ms']:.1f} ms to the first tokens, {found['ms_per_token']:.3f} ms for each after; "
        f"{found['new_tokens_per_second']:.0f} tokens/s, {found['answers_per_second']:.2f} answers/s; "
        f"the first call took {found['first_call_seconds']:.0f} s"
    ]
    if "syncs_per_token" in found:
        lines[0] += f"; {found['syncs_per_token']:g} waits for the device a token"
    return lines
