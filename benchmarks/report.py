"""`python -m benchmarks.report`: docs/performance.md, its charts, and the README's numbers, from results files alone.

`--check` writes nothing and fails when a page does not say, or a chart does not draw, what the files give. Every table
works on whatever a file holds: what was not measured has a dash, who has no time has the sentence that says why.
"""

import argparse
import hashlib
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import charts, readings
from benchmarks.claims import OLD, UNMEASURED, number, tables, times
from benchmarks.fit import FASTER, SLACK, Sweep, sweeps
from benchmarks.readings import (
    PLAN,
    REFERENCE,
    Breakdown,
    Content,
    Part,
    Record,
    breakdowns,
    cases,
    is_gpu,
    is_old,
    our_name,
    peers,
    ratio,
    reason,
    share,
    stage_of,
    tops,
)
from benchmarks.requirements import LINES, standing
from benchmarks.stages import TABLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
PAGE, CHARTS = Path("docs/performance.md"), Path("docs/performance")
OPENING, CLOSING = "<!-- numbers: written by python -m benchmarks.report -->", "<!-- end of numbers -->"
SCALING = "scaling"  # the group of cases that are points of a sweep and nothing else

INTRODUCTION = """\
# Performance

Written by `python -m benchmarks.report` from the files in [benchmarks/results](../benchmarks/results), and from nothing
else; a test fails when this page says anything different.

**To repeat it**, in a clone of this repository:

```bash
make bench          # pytest benchmarks/: every stage on this machine, CPU or GPU, in under ten minutes
.venv/bin/pytest benchmarks --quick   # the smallest cases, under a minute
make bench-record   # into benchmarks/results/<device>.json; run again, it goes on where it stopped
make bench-gpu      # the same on a GPU, with the python3 that is there, in pieces of under eight minutes
make bench-check    # is any ratio more than 10 % below the one recorded for this kind of machine?
make bench-report   # this page, its charts and the README's numbers
```

**To read it.** Nothing is timed before its answer is checked: ours may be twice as far from float64 as plain PyTorch in
the same type, a peer eight times; *error* is that distance in units of plain PyTorch's. Contenders take turns in one
process; on a GPU the inputs are rotated past the L2 cache, and a time is that between two events. A time is a median,
with quartiles. *Times as fast* is a contender's time divided by ours, so **bold, below 1, is where ours is slower**;
behind it stand the quartiles over pairs of the same round. *Ceiling* is what large copies and matrix products reached
on the same machine in the same run; a share of it is the least time that the counted bytes and FLOPs need, divided by
the measured one. *Memory* is the peak beyond inputs and results, *waits* are those of the host for the device. A dash
is a number that was not measured. † marks a case measured with older code than the newest
of its kind in the same results file; what changed since that one is not marked.
"""
CHANCE = """\
On a CPU ops run as plain PyTorch, so *reference* is our own code under another name: its ratios show what chance does.
"""


def page(files: Mapping[str, Content]) -> str:
    """The whole of docs/performance.md."""
    parts = [INTRODUCTION]
    for slug, content in files.items():
        parts += [section for section in sections(slug, content) if section]
    return "\n".join(parts)


def sections(slug: str, content: Content) -> Iterator[str]:
    yield heading(content)
    if not is_gpu(content) and any(REFERENCE in record["contenders"] for record in cases(content).values()):
        yield CHANCE
    if points(content):
        by_bytes, by_flops = tops(content) or (0, 0)
        alt = (
            f"{content['device']}: FLOP/s of {len(points(content))} cases against their FLOPs a byte, below roofs of "
            f"{amount(by_bytes, 'B')}/s and {amount(by_flops, 'FLOP')}/s"
        )
        yield chart(slug, "roofline", alt)
    yield stage_table(content)
    wholes = list(breakdowns(content))
    if wholes:
        yield "### Where the time of a whole goes\n\nStages are timed in marked steps, the whole in unmarked ones.\n"
        alt = "; ".join(f"{whole.case}: {largest(whole)}" for whole in wholes)
        yield chart(slug, "stages", f"Shares of each stage. {alt}")
        for whole in wholes:
            yield breakdown_table(whole, content)
    if spread(content):
        yield "### Ours against peers\n"
        slower = sum(value < 1 for of in spread(content).values() for values in of.values() for value in values)
        total = sum(len(values) for of in spread(content).values() for values in of.values())
        yield chart(slug, "peers", f"{total} times of contenders divided by ours, {slower} of them below 1")
    yield from peer_tables(content)
    if is_gpu(content):
        yield requirements_table(content)
    if found := growths(content):
        yield "### How cost grows\n"
        yield chart(slug, "scaling", f"{len(found)} sweeps: cost of each point beside what it may grow to")
        yield scaling_table(found, content)
    yield plan_table(content)
    yield checks_table(content)


def heading(content: Content) -> str:
    found = cases(content)
    versions = content.get("versions", {})
    there = [f"{name} {version}" for name, version in versions.items() if version not in ("not installed", "None")]
    missing = [name for name, version in versions.items() if version == "not installed"]
    lines = [f"## {content['device']}\n"]
    said = [f"{content['capability']}"] if content.get("capability") else []
    said += [", ".join(there)] if there else []
    said += [f"not installed: {', '.join(missing)}"] if missing else []
    top = tops(content)
    if top:
        said.append(f"measured ceilings: {amount(top[0], 'B')}/s copied, {amount(top[1], 'FLOP')}/s in products")
    said.append(f"{len(found)} cases")
    commits: dict[str, int] = {}
    for record in found.values():
        name = str(record.get("commit", content.get("commit", "unknown")))
        commits[name] = commits.get(name, 0) + 1
    said.append("measured at " + ", ".join(f"{commit_name(name)} ({n})" for name, n in sorted(commits.items())))
    return "\n".join([*lines, "; ".join(said) + ".", ""])


def commit_name(name: str) -> str:
    return f"`{name[:10]}`" + (" with changes" if name.endswith("+") else "")


def chart(slug: str, kind: str, alt: str) -> str:
    return f"![{alt}]({CHARTS.name}/{slug}-{kind}.svg)\n"


def amount(value: float | None, unit: str) -> str:
    """With a prefix: 4.26 TB."""
    if value is None:
        return "—"
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{number(value / size)} {prefix}{unit}"
    return f"{number(value) if value % 1 else int(value)} {unit}".rstrip()


def duration(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if abs(us) >= size:
            return f"{number(us / size)} {unit}"
    return f"{number(us)} µs"


def percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.3g} %" if value < 1 else f"{100 * value:.0f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def rate(items: float | None, unit: str, us: float) -> str:
    return f"{amount(items / (us * 1e-6), '')} {unit}/s" if items else "—"


def work(record: Record) -> float:
    return record.get("bytes", 0) + record.get("flops", 0)


def stage_table(content: Content) -> str:
    """The largest case of each group, by stage; a stage that has none says so."""
    rows: dict[str, list[list[str]]] = {}
    found = [item for item in cases(content).items() if is_single(item[1]) and not is_whole(item[1])]
    for (stage, _), of in groupby(found, key=lambda item: (stage_of(item[1]), item[1].get("group") or "")):
        case, record = max(of, key=lambda item: work(item[1]))
        cells = [case + OLD * is_old(record, content), *of_ours(record), against(record, is_gpu(content))]
        rows.setdefault(stage, []).append([stage, *cells])
    inside = {part.name for whole in breakdowns(content) for part in whole.parts}
    swept = {stage_of(record) for record in cases(content).values() if record.get("group") == SCALING}
    for stage in TABLE:
        if stage not in rows and stage != PLAN:
            said = "measured as it grows, below" if stage in swept else UNMEASURED
            said = "unmeasured by itself; below, in a whole" if stage in inside else said
            rows[stage] = [[stage, said, *["—"] * 8]]
    order = sorted(rows, key=lambda stage: list(TABLE).index(stage) if stage in TABLE else len(TABLE))
    head = "stage", "case", "time", "done", "bytes", "FLOPs", "of the ceiling", "memory", "waits", "times as fast as"
    said = "One row for each group of cases: the one with the most bytes and FLOPs."
    return f"### Stages\n\n{said}\n\n{table(head, [row for stage in order for row in rows[stage]])}"


def is_single(record: Record) -> bool:
    """Whether it stands for itself, and not for a point of a curve or a prediction."""
    return stage_of(record) != PLAN and record.get("group") != SCALING


def is_whole(record: Record) -> bool:
    return "stages" in record["contenders"].get(our_name(record) or "", {})


def of_ours(record: Record) -> list[str]:
    """Time, items a second, bytes, FLOPs, share of the ceiling, memory and waits of our first contender."""
    found = record["contenders"].get(our_name(record) or "", {})
    num_bytes = record.get("bytes") or found.get("bytes")
    num_flops = record.get("flops") or found.get("flops")
    counted = [amount(num_bytes, "B") if num_bytes else "—", amount(num_flops, "") if num_flops else "—"]
    if "us" not in found:
        return [reason(found), "—", *counted, "—", "—", "—"]
    done = [rate(record.get("items"), record.get("unit", ""), found["us"])]
    done = list(dict.fromkeys(([] if done == ["—"] else done) + more_of(found)))
    memory, waits = found.get("peak_bytes"), found.get("syncs", found.get("syncs_per_token"))
    return [
        duration(found["us"]),
        ", ".join(done) or "—",
        *counted,
        percent(share(record, found)),
        amount(memory, "B"),
        "—" if waits is None else f"{waits:g}",
    ]


def more_of(found: Mapping[str, Any]) -> list[str]:
    """What a step or an answer says of itself."""
    units = {
        "tokens_per_second": "{} useful tokens/s",
        "answers_per_second": "{} answers/s",
        "new_tokens_per_second": "{} new tokens/s",
        "first_tokens_ms": "first tokens after {} ms",
        "ms_per_token": "{} ms for each after",
    }
    said = [text.format(number(found[name])) for name, text in units.items() if name in found]
    return said + ([f"{number(100 * found['mfu'])} % MFU"] if "mfu" in found else [])


def against(record: Record, on_gpu: bool) -> str:
    """Everyone's ratio in one cell; who has no time is in the tables of peers."""
    found = [(name, ratio(record, name)) for name in peers(record, on_gpu)]
    return ", ".join(f"{name} {times(of.median)}" for name, of in found if of) or "—"


def largest(whole: Breakdown) -> str:
    parts = sorted(whole.parts, key=lambda part: -part.us)[:3]
    return ", ".join(f"{part.name} {100 * part.us / whole.whole_us:.0f} %" for part in parts)


def breakdown_table(whole: Breakdown, content: Content) -> str:
    """A row for each stage, then their sum, what is no stage, and the whole."""
    record = cases(content)[whole.case]

    def of_whole(us: float) -> str:
        return percent(us / whole.whole_us)

    def row(part: Part) -> list[str]:
        numbers = part.numbers
        waits = numbers.get("syncs")
        return [
            part.name,
            duration(part.us),
            of_whole(part.us),
            rate(numbers.get("items"), numbers.get("unit", ""), part.us),
            amount(numbers["bytes"], "B") if numbers.get("bytes") else "—",
            amount(numbers["flops"], "") if numbers.get("flops") else "—",
            percent(share({"ceilings": record.get("ceilings")}, numbers) if numbers else None),
            amount(numbers.get("peak_bytes"), "B"),
            "—" if waits is None else f"{waits:g}",
        ]

    empty = ["—"] * 6
    rows = [row(part) for part in whole.parts]
    rows.append(["*sum of the stages*", duration(whole.sum_us), of_whole(whole.sum_us), *empty])
    rows += [[f"rest: {part.name}", duration(part.us), of_whole(part.us), *empty] for part in whole.rest]
    over = whole.sum_us + sum(part.us for part in whole.rest) - whole.whole_us
    rows.append(["*marked steps took longer by*", duration(over), of_whole(over), *empty])
    waited = "—" if whole.syncs is None else f"{whole.syncs:g}"
    rows.append(["**the whole**", duration(whole.whole_us), "100 %", *empty[:4], amount(whole.peak_bytes, "B"), waited])
    head = ["stage", "time", "of the whole", "done", "bytes", "FLOPs", "of the ceiling", "memory", "waits"]
    if all(row[3:] == empty for row in rows):
        head, rows = head[:3], [row[:3] for row in rows]
    return f"**{whole.case}**{OLD * is_old(record, content)}\n\n{table(head, rows)}"


def spread(content: Content) -> dict[str, dict[str, list[float]]]:
    """By group and contender the ratios of all cases."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in cases(content).values():
        for name in peers(record, is_gpu(content)):
            of = ratio(record, name)
            if of is not None and is_single(record):
                found.setdefault(record.get("group") or stage_of(record), {}).setdefault(name, []).append(of.median)
    return found


def peer_tables(content: Content) -> Iterator[str]:
    """By stage, every contender of every case: one that has no time says why."""
    head = "case", "contender", "time", "quartiles", "times as fast", "error", "memory"
    found = [item for item in cases(content).items() if is_single(item[1]) and len(item[1]["contenders"]) > 1]
    for stage, of in groupby(found, key=lambda item: stage_of(item[1])):
        rows: list[list[str]] = []
        number_of_cases = 0
        for case, record in of:
            number_of_cases += 1
            first = len(rows)
            silent: dict[str, list[str]] = {}
            for name, numbers in record["contenders"].items():
                if "us" in numbers:
                    chance = name == REFERENCE and not is_gpu(content)
                    rows.append(["", name, *contender_cells(record, name, numbers, chance)])
                else:
                    silent.setdefault(reason(numbers).replace("|", "\\|"), []).append(name)
            rows += [["", ", ".join(names), why, "", "", "", ""] for why, names in silent.items()]
            rows[first][0] = case + OLD * is_old(record, content)
        cases_said = f"{number_of_cases} case{'s' * (number_of_cases > 1)}"
        yield f"<details><summary>{stage}: {cases_said}</summary>\n\n{table(head, rows)}\n</details>\n"


def contender_cells(record: Record, name: str, numbers: Mapping[str, Any], chance: bool) -> list[str]:
    low, high = numbers["quartiles_us"]
    found = ratio(record, name)
    shown = number if chance else times
    said = "—" if found is None or name == our_name(record) else shown(found.median)
    if found is not None and found.low is not None and found.high is not None and said != "—":
        said += f" ({number(found.low)} to {number(found.high)})"
    error = numbers.get("error_in_plain_errors")
    return [
        duration(numbers["us"]),
        f"{duration(low)} to {duration(high)}",
        said,
        "—" if error is None else "exact" if error == 0 else f"{error:g}",
        amount(numbers.get("peak_bytes"), "B"),
    ]


def requirements_table(content: Content) -> str:
    """Each requirement of an H100 with the worst of its cases."""
    rows = []
    found = cases(content)
    for line in LINES:
        of = standing(line, found)
        shown = ["—" if n is None else f"{n:.3g}" for n in (of.value, line.required, line.aim)]
        verdict = {"not met": "**not met**", "": "—"}.get(of.verdict, of.verdict)
        old = of.value is not None and is_old(found[of.case], content)
        rows.append([line.text, *shown, verdict, of.case.replace("|", "\\|") + OLD * old])
    head = "requirement", "measured", "required", "aim", "verdict", "worst case, or why there is no number"
    return f"### Requirements\n\nThey are stated for an H100; each takes the worst of its cases.\n\n{table(head, rows)}"


def growths(content: Content) -> list[Sweep]:
    """Sweeps that say how fast they may grow."""
    return [sweep for sweep in sweeps({"cases": cases(content)}) if not math.isnan(sweep.at_most)]


def scaling_table(found: Sequence[Sweep], content: Content) -> str:
    """Each sweep with its points and its exponent beside what it may be."""
    rows = []
    for sweep in found:
        cost = [f"{amount(point.x, '')}: {cost_said(point.seconds, sweep.unit)}" for point in sweep.points]
        old = any(is_old(record, content) for record in members(sweep, content))
        power = "—" if math.isnan(sweep.exponent) else f"{sweep.exponent:.2f} ({sweep.low:.2f} to {sweep.high:.2f})"
        verdict = f"**{sweep.verdict}**" if sweep.verdict == FASTER else sweep.verdict
        said = [verdict, *(f"without {name}: {why}" for name, why in sweep.left_out.items())]
        about = [sweep.prefix.removeprefix("scaling: ") + OLD * old, sweep.what, ", ".join(cost)]
        rows.append([*about, power, f"{sweep.at_most:g}", sweep.because, "; ".join(said).replace("|", "\\|")])
    head = "sweep", "of", "cost", "exponent", "at most", "because", "verdict"
    return (
        "A cost is a fixed part and one that grows as a power of what is swept; fitted is the power, with 90 % of the "
        "fits to points drawn anew as far off as their medians may be; *faster* is said where all of it lies more than "
        f"{SLACK:g} above what is allowed, *as it must* only where the power itself does not.\n\n{table(head, rows)}"
    )


def members(sweep: Sweep, content: Content) -> list[Record]:
    """The cases that are its points."""
    swept = [item for item in cases(content).items() if item[1].get("sweep")]
    return [r for name, r in swept if (r["sweep"][0], name.rpartition(", ")[0]) == (sweep.what, sweep.prefix)]


def cost_said(cost: float, unit: str) -> str:
    return duration(cost * 1e6) if unit == "s" else amount(cost, "B" if "bytes" in unit else unit)


def checks_table(content: Content) -> str:
    """Which ratios `benchmarks.check` holds this kind of machine to."""
    rows = []
    checks = content.get("checks", {"cases": {}})
    for case, kept in checks["cases"].items():
        ratios = {name: of for name, of in kept.items() if isinstance(of, Mapping)}
        steady = [f"{name} {times(statistics.median(of['ratios']))}" for name, of in ratios.items() if of["stable"]]
        exact = [f"{name} {kept[name]}" for name in kept if name not in ratios]
        unsteady = [name for name, of in ratios.items() if not of["stable"]]
        rows.append([case, ", ".join([*steady, *exact]) or "—", ", ".join(unsteady) or "—"])
    head = "case", "checked: times as fast as", "not steady enough"
    if not rows:
        return ""
    kind = ", ".join(f"{name} {value}" for name, value in checks["machine"].items())
    said = f"Recorded at {commit_name(checks['commit'])}; checked where the machine is the same: {kind}."
    return f"### What `make bench-check` holds this kind of machine to\n\n{said}\n\n{table(head, rows)}"


def plan_table(content: Content) -> str:
    """What the plan of a run predicted, beside what was measured."""
    rows = []
    for case, record in cases(content).items():
        found = record["contenders"].get(our_name(record) or "", {})
        if stage_of(record) == PLAN and "measured_us" in found:
            predicted, measured = found["predicted_us"], found["measured_us"]
            total = f"{found['total_error']:+.1%}" if "total_error" in found else "—"
            named = case + OLD * is_old(record, content)
            rows.append([named, duration(predicted), duration(measured), f"{predicted / measured - 1:+.1%}", total])
        elif stage_of(record) == PLAN and "us" not in found:
            rows.append([case, record.get("failed") or reason(found), *["—"] * 3])
    head = "run", "a step, predicted", "measured", "off by", "all steps together"
    return f"### What a plan predicts of a run\n\n{table(head, rows)}" if rows else ""


def points(content: Content) -> list[charts.Point]:
    """Ours in every case with counted work."""
    found = []
    for record in cases(content).values():
        numbers = record["contenders"].get(our_name(record) or "", {})
        if "us" in numbers and work(record) and record.get("ceilings") and is_single(record):
            found.append(charts.Point(stage_of(record), record["flops"], record["bytes"], numbers["us"] * 1e-6))
    return found


class Drawing(NamedTuple):
    """A chart, not drawn yet."""

    draw: "Callable[..., Figure]"
    arguments: tuple[Any, ...]

    @property
    def mark(self) -> str:
        """Tells this chart from one of other numbers. It stands in the file."""
        return hashlib.sha256(f"{self.draw.__name__} {rounded(self.arguments)}".encode()).hexdigest()[:16]


def rounded(value: Any) -> str:
    """Numbers to six digits: fits differ in the last ones from machine to machine."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return rounded(tuple(value.items()))
    return "(" + ", ".join(map(rounded, value)) + ")" if isinstance(value, tuple | list) else repr(value)


def drawings(slug: str, content: Content) -> dict[str, Drawing]:
    """The charts that the page names, by file."""
    device, top, wholes, grown = content["device"], tops(content), list(breakdowns(content)), growths(content)
    found = {}
    if top and points(content):
        found["roofline"] = Drawing(charts.roofline, (points(content), *top, f"{device}: ours below the roofs"))
    if wholes:
        found["stages"] = Drawing(charts.stages, (wholes, f"{device}: where the time goes"))
    if spread(content):
        found["peers"] = Drawing(charts.peers, (spread(content), f"{device}: ours against peers"))
    if grown:
        found["scaling"] = Drawing(charts.scaling, (grown, f"{device}: how cost grows"))
    return {f"{slug}-{kind}.svg": drawing for kind, drawing in found.items()}


def draw(slug: str, content: Content, folder: Path) -> None:
    for name, drawing in drawings(slug, content).items():
        charts.save(drawing.draw(*drawing.arguments), folder / name, drawing.mark)


def fill(text: str, block: str) -> str:
    """A document with the block between its markers."""
    pattern = re.compile(re.escape(OPENING) + ".*?" + re.escape(CLOSING), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"README.md has {len(pattern.findall(text))} blocks of numbers; it needs one, from {OPENING}")
    return pattern.sub(lambda _: f"{OPENING}\n\n{block}\n\n{CLOSING}", text)


def texts(files: Mapping[str, Content], root: Path = ROOT) -> dict[Path, str]:
    """What each page must say."""
    readme = root / "README.md"
    return {
        root / PAGE: page(files),
        readme: fill(readme.read_text(encoding="utf-8"), tables(list(files.values()))),
    }


def differences(files: Mapping[str, Content], root: Path = ROOT) -> list[str]:
    """A sentence for each page that does not say what the files give, and for each chart that does not draw it."""
    found = []
    wanted = texts(files, root)
    for path, text in wanted.items():
        said = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = zip(said.splitlines(), text.splitlines(), strict=False)
        if said != text:
            differing = (n for n, (a, b) in enumerate(lines, 1) if a != b)
            line = next(differing, min(said.count("\n"), text.count("\n")) + 1)
            found.append(f"{path.relative_to(root)} differs from the results files from line {line}")
    for slug, content in files.items():
        for name, drawing in drawings(slug, content).items():
            file = root / CHARTS / name
            if not file.exists():
                found.append(f"{CHARTS / name} is missing")
            elif charts.marked(drawing.mark) not in file.read_text(encoding="utf-8"):
                found.append(f"{CHARTS / name} does not draw what the results files hold")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs from the files")
    chosen = parser.parse_args(arguments)
    files = readings.load()
    if chosen.check:
        found = differences(files)
        print(
            "\n".join([*found, "Run `python -m benchmarks.report`."]) if found else "the pages say what the files give"
        )
        return bool(found)
    for path, text in texts(files).items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    for slug, content in files.items():
        draw(slug, content, ROOT / CHARTS)
    print(f"{CHARTS}/*.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
