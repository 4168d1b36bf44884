"""What a results file says, whichever version of the benchmarks wrote it.

A record that names no stage has that of its group's first word; one without `ratio` has that of the median times.
Nothing is measured here, and a file is never changed.
"""

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.case import OFF_DEVICE
from benchmarks.results import is_current
from benchmarks.stages import TABLE

Content = Mapping[str, Any]  # of a file
Record = Mapping[str, Any]  # of a case
RESULTS = Path(__file__).parent / "results"
STAGE_OF_GROUP = {
    "chain": "projector + gate + injection",
    "decode": "decode step",
    "step": "training step",
    "generate": "answering",
    "images": "read + decode",
}
PLAN = "plan"  # the stage of a prediction
REASONS = ("absent", "wrong", "failed", "noisy")  # why a contender has no time
REFERENCE = "reference"  # a contender that on a CPU is ours: there ops run as plain PyTorch


class Ratio(NamedTuple):
    """A contender's time divided by ours."""

    median: float
    low: float | None = None  # quartiles over pairs of rounds
    high: float | None = None


class Part(NamedTuple):
    """A stage inside of a whole."""

    name: str
    us: float
    numbers: Mapping[str, Any]


class Breakdown(NamedTuple):
    """A whole and its stages, timed inside of it."""

    case: str
    whole_us: float
    parts: list[Part]
    rest: list[Part]  # what is no stage, by name
    peak_bytes: float | None = None  # of the whole
    syncs: float | None = None

    @property
    def sum_us(self) -> float:
        return sum(part.us for part in self.parts)


def load(folder: Path = RESULTS) -> dict[str, Content]:
    """By the files' names, GPUs first."""
    files = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
    return dict(sorted(files.items(), key=lambda item: (not is_gpu(item[1]), item[0])))


def is_gpu(content: Content) -> bool:
    return str(content.get("capability", "")).startswith("sm_")


def cases(content: Content) -> dict[str, Record]:
    """Those that are through, whatever code they were measured with, in the order of the stages."""
    rows = list(TABLE)
    found = {name: record for name, record in content["cases"].items() if record.get("finished")}

    def place(item: tuple[str, Record]) -> tuple[int, str, str]:
        stage = stage_of(item[1])
        return rows.index(stage) if stage in rows else len(rows), item[1].get("group") or "", item[0]

    return dict(sorted(found.items(), key=place))


def is_old(record: Record, content: Content) -> bool:
    """Whether the code changed between this case and the newest of its file."""
    return not is_current(record, content)


def stage_of(record: Record) -> str:
    group = record.get("group") or ""
    word = group.split(" ")[0]
    return record.get("stage") or STAGE_OF_GROUP.get(word, word)


def our_name(record: Record) -> str | None:
    """Of our first contender, whom the others are compared with."""
    return next((name for name in record["contenders"] if name.startswith("ours")), None)


def reason(found: Mapping[str, Any]) -> str:
    """Why a contender has no time: "absent: flash_attn is not installed"."""
    return "; ".join(f"{kind}: {found[kind]}" for kind in REASONS if kind in found) or "not timed"


def ratio(record: Record, name: str, ours: str | None = None) -> Ratio | None:
    """The contender's time divided by that of ours, or None where one of them has none."""
    ours = ours or our_name(record)
    contenders = record["contenders"]
    ours_found, found = contenders.get(ours or "", {}), contenders.get(name, {})
    if "us" not in found or "us" not in ours_found:
        return None
    if "ratio" in found and ours == our_name(record):
        return Ratio(found["ratio"]["median"], found["ratio"].get("low"), found["ratio"].get("high"))
    return Ratio(found["us"] / ours_found["us"])


def peers(record: Record, on_gpu: bool = True) -> list[str]:
    """Everyone but us; on a CPU the reference is us too."""
    names = [name for name in record["contenders"] if not name.startswith("ours")]
    return [name for name in names if on_gpu or name != REFERENCE]


def share(record: Record, found: Mapping[str, Any]) -> float | None:
    """The part of the measured ceiling that a contender (or a stage of a whole) reached."""
    if found.get("stage", record.get("stage")) in OFF_DEVICE:
        return None
    if found.get("share_of_ceiling") is not None:
        return found["share_of_ceiling"]
    top = record.get("ceilings")
    num_bytes, flops = (found.get(kind) or record.get(kind) or 0 for kind in ("bytes", "flops"))
    if not top or not found.get("us") or not num_bytes + flops:
        return None
    return max(num_bytes / top["bytes_per_second"], flops / top["flops_per_second"]) / (found["us"] * 1e-6)


def breakdowns(content: Content) -> Iterator[Breakdown]:
    for case, record in cases(content).items():
        found = record["contenders"].get(our_name(record) or "", {})
        if "stages" in found:
            parts = [Part(part["stage"], part["us"], part) for part in found["stages"]]
            rest = [Part(name, us, {}) for name, us in found.get("rest", {}).items()]
            numbers = found.get("whole_peak_bytes"), found.get("whole_syncs")
            yield Breakdown(case, found["whole_us"], parts, rest, *numbers)
        elif "stages_ms" in found:
            timed = [Part(name, ms * 1e3, {}) for name, ms in found["stages_ms"].items() if ms]
            parts = [part for part in timed if part.name in TABLE]
            order = list(TABLE)
            parts.sort(key=lambda part: order.index(part.name))
            yield Breakdown(case, found["us"], parts, [part for part in timed if part.name not in TABLE])


def tops(content: Content) -> tuple[float, float] | None:
    """The medians of the ceilings measured beside the cases: bytes and floating-point operations a second."""
    found = [record["ceilings"] for record in cases(content).values() if record.get("ceilings")]
    if not found:
        return None
    kinds = ("bytes_per_second", "flops_per_second")
    by_bytes, by_flops = (statistics.median(top[kind] for top in found) for kind in kinds)
    return by_bytes, by_flops
