"""`python -m benchmarks.check`: has a ratio of a peer's time to ours fallen since it was recorded on such a machine?

`--record N` takes N sittings, each in a process of its own, and writes into the results file of this device

    "checks": {"commit", "machine", "cases": {case: {contender: {"ratios": [one of each sitting], "stable": bool}}}}

A ratio is stable when all sittings lie within STEADY of their median; peak memory and waits of ours are kept beside
them where every sitting found the same. Without it the cases with a stable ratio are measured here and now. A ratio
counts as fallen when the whole interval of its median lies below LEAST times the recorded one, and still does when the
case is measured again for longer, twice, each time in a process of its own; one whose interval reaches across is called
too noisy. Ours being wrong fails too, and a kept number of waits or bytes that grew. What is not checked is named with
the reason.

Checked is on the same machine alone: the device's name, the processor's numbers, which say more than the names that
virtual machines give, and torch's version. On another one nothing is checked, and that is no failure. What else the
machine does is not known. On a CPU the reference is our own code and no contender.
"""

import argparse
import dataclasses
import importlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.case import Case, run_case
from benchmarks.fit import INDEPENDENT
from benchmarks.measure import keep_freed_memory
from benchmarks.readings import REFERENCE, RESULTS, Content, load, our_name, reason
from benchmarks.results import Results, commit, device_name, write_json
from benchmarks.stages import TABLE

STAGES = ("injection", "optimizer")  # whose peers are timed in a minute; others take that for compiling alone
SHORT_US = 100e3  # a call of ours, for enough rounds in a second
STEADY = 0.05  # of the median, from it to the farthest sitting
LEAST = 0.9  # of the recorded ratio
SECONDS, LONGER = 1.0, (2.0, 4.0)  # of timing; and again, of those that look fallen
RECORDED_SECONDS, BUDGET_SECONDS = 40, 55  # of the cases that are recorded; after which no further one is begun
KEPT = ("syncs", "peak_bytes")
PROCESSOR = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")  # in /proc/cpuinfo

Measure = Callable[[Case, float], Mapping[str, Any]]  # a record of each contender, after so many seconds of timing


class Interval(NamedTuple):
    """Of a median ratio."""

    median: float
    low: float
    high: float


class Verdict(NamedTuple):
    case: str
    contender: str
    said: str
    suspect: bool = False  # whether measuring longer may change it
    failed: bool = False


def candidates(device: torch.device) -> list[Case]:
    """All cases of STAGES on this kind of device."""
    files: list[Any] = [importlib.import_module(f"benchmarks.{name}") for name in dict.fromkeys(map(TABLE.get, STAGES))]
    if device.type == "cuda":
        return [case for file in files for case in file.cases()]
    return [_with_quick_peers(case) for file in files for case in file.cpu_cases()]


def _with_quick_peers(case: Case) -> Case:
    """Without what is ours on a CPU, and what compiles for longer than all others are timed."""
    others = {
        name: contender
        for name, contender in case.contenders.items()
        if name != REFERENCE and "torch.compile" not in name
    }
    return dataclasses.replace(case, contenders=others)


def machine(device: torch.device) -> dict[str, str]:
    """What must be the same beside the device's name."""
    found = {"torch": str(torch.__version__)}
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.exists():
        first = info.read_text(encoding="utf-8").partition("\n\n")[0]
        numbers = {
            name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())
        }
        found |= {name: numbers[name] for name in PROCESSOR if name in numbers}
    return found


def interval(numbers: Mapping[str, Any]) -> Interval:
    """95 % of the median of paired ratios, from their quartiles: those of a normal distribution lie 1.35 standard
    deviations apart, and the median of n draws deviates by 1.25 of them over the root of n. Neighbouring rounds are
    disturbed together: of many no more than INDEPENDENT count."""
    found = numbers["ratio"]
    half = 1.96 * 1.25 / 1.35 * (found["high"] - found["low"]) / min(numbers["rounds"], INDEPENDENT) ** 0.5
    return Interval(found["median"], found["median"] - half, found["median"] + half)


def judge(recorded: float, found: Interval) -> str:
    """held, fell or noisy"""
    bar = LEAST * recorded
    if found.high < bar:
        return "fell"
    return "held" if found.median >= bar else "noisy"


def verdicts(case: str, recorded: Mapping[str, Any], contenders: Mapping[str, Any]) -> Iterator[Verdict]:
    """Of every number that was recorded as stable, beside what was found now."""
    ours = contenders[our_name({"contenders": contenders}) or "ours"]
    if "us" not in ours:
        said = reason(ours)
        yield Verdict(case, "ours", said, suspect="noisy" in ours, failed="noisy" not in ours and "absent" not in ours)
        return
    for name, kept in recorded.items():
        if name in KEPT:
            found = ours.get(name)
            grew = found is not None and found > (kept if name == "syncs" else kept / LEAST)
            yield Verdict(case, f"ours, {name}", f"{found}, recorded {kept}", failed=grew)
        elif kept["stable"]:
            numbers = contenders.get(name, {})
            before = statistics.median(kept["ratios"])
            if "us" not in numbers or "ratio" not in numbers:
                yield Verdict(case, name, f"not checked, {reason(numbers)}", suspect="noisy" in numbers)
                continue
            now = interval(numbers)
            kind = judge(before, now)
            said = f"{now.median:.3g} ({now.low:.3g} to {now.high:.3g}), recorded {before:.3g}: "
            said += {"held": "held", "fell": "FELL", "noisy": "too noisy to say"}[kind]
            yield Verdict(case, name, said, suspect=kind != "held", failed=kind == "fell")


def check(
    content: Content,
    cases: Sequence[Case],
    measure: Measure,
    again: Measure,
    say: Callable[[str], None] = print,
    budget: float = BUDGET_SECONDS,
) -> list[Verdict]:
    """What failed, when measured, and again for longer. Everything that is checked, or is not and why, is said."""
    started, failed = time.monotonic(), []
    by_name = {case.name: case for case in cases}
    for name, recorded in content["checks"]["cases"].items():
        unsteady = [peer for peer, kept in recorded.items() if peer not in KEPT and not kept["stable"]]
        if unsteady:
            say(f"{name}: not checked, sittings differed: {', '.join(unsteady)}")
        if not any(peer in KEPT or kept["stable"] for peer, kept in recorded.items()):
            continue
        if name not in by_name:
            say(f"{name}: not checked, there is no such case any more; record again")
            continue
        if time.monotonic() - started > budget:
            say(f"{name}: not checked, {budget:g} seconds are over")
            continue
        found = list(verdicts(name, recorded, measure(by_name[name], SECONDS)))
        for seconds in LONGER:
            held = {verdict.contender: verdict for verdict in found if not verdict.suspect}
            if len(held) == len(found):
                break
            longer = verdicts(name, recorded, again(by_name[name], seconds))
            found = [held.get(verdict.contender, verdict) for verdict in longer]
        for verdict in found:
            say(f"{verdict.case}: {verdict.contender}: {verdict.said}")
        failed += [verdict for verdict in found if verdict.failed]
    return failed


def sitting(cases: Sequence[Case], measure: Measure, say: Callable[[str], None] = print) -> dict[str, Any]:
    """By case its seconds, the ratio of each contender, and what is kept of ours; long cases are named and left out."""
    results: dict[str, Any] = {}
    for case in cases:
        started = time.monotonic()
        contenders = measure(case, SECONDS)
        name = our_name({"contenders": contenders}) or "ours"
        ours = contenders.get(name, {})
        if "us" not in ours:
            say(f"{case.name}: left out, {reason(ours)}")
        elif ours["us"] > SHORT_US:
            say(f"{case.name}: left out, a call takes {ours['us'] / 1e3:.0f} ms")
        else:
            others = {peer: numbers for peer, numbers in contenders.items() if not peer.startswith("ours")}
            ratios = {peer: numbers["ratio"]["median"] for peer, numbers in others.items() if "ratio" in numbers}
            results[case.name] = ratios | {kept: ours[kept] for kept in KEPT if ours.get(kept) is not None}
            results[case.name]["seconds"] = time.monotonic() - started
    return results


def merged(sittings: Sequence[Mapping[str, Mapping[str, Any]]], say: Callable[[str], None] = print) -> dict[str, Any]:
    """The cases of "checks": what every sitting found, shortest cases first, until their time is used up."""
    found = {case: [one[case] for one in sittings if case in one] for case in sittings[0]}
    seconds = {case: statistics.median(one["seconds"] for one in of) for case, of in found.items()}
    checks: dict[str, Any] = {}
    left = RECORDED_SECONDS
    for case in sorted(found, key=lambda case: seconds[case]):
        if len(found[case]) < len(sittings):
            say(f"{case}: left out, not every sitting could time it")
            continue
        kept = {name: agreed(name, [one.get(name) for one in found[case]]) for name in found[case][0]}
        kept = {name: of for name, of in kept.items() if of is not None}
        if any(not isinstance(of, Mapping) or of["stable"] for of in kept.values()):
            left -= seconds[case]
            if left < 0:
                say(f"{case}: left out, the cases before it take {RECORDED_SECONDS} seconds")
                continue
        checks[case] = kept
    return {case: kept for case, kept in checks.items() if kept}


def agreed(name: str, values: Sequence[float | None]) -> Any:
    """What is recorded of one number of every sitting; None where one lacks it, or what must be equal is not."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or name == "seconds":
        return None
    if name in KEPT:
        return known[0] if len(set(known)) == 1 else None
    median = statistics.median(known)
    stable = all(abs(value / median - 1) <= STEADY for value in known)
    return {"ratios": [round(value, 4) for value in known], "stable": stable}


def sit(file: Path, *more: str) -> None:
    """A sitting in a process of its own, into the file."""
    subprocess.run([sys.executable, "-m", "benchmarks.check", "--sitting", str(file), *more], check=True)


def apart(case: Case, seconds: float) -> Mapping[str, Any]:
    """Measure a case in a process of its own, where memory lies elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "record.json"
        sit(file, "--case", case.name, "--seconds", str(seconds))
        return json.loads(file.read_text(encoding="utf-8"))


def record(number: int, folder: Path, device: torch.device, capability: str) -> Path:
    """Sit so many times, and write what is stable into the device's file; its path."""
    sittings = []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(number):
            print(f"sitting {turn + 1} of {number}", flush=True)
            file = Path(scratch) / f"{turn}.json"
            sit(file)
            sittings.append(json.loads(file.read_text(encoding="utf-8")))
    fresh = Results(folder, device_name(), capability)
    path, content = fresh.path, fresh.content
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
    content["checks"] = {"commit": commit(), "machine": machine(device), "cases": merged(sittings)}
    write_json(path, content)
    return path


def measurer(device: torch.device) -> Measure:
    return lambda case, seconds: run_case(case, device, seconds=seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files")
    parser.add_argument("--record", type=int, nargs="?", const=5, metavar="N", help="sit N times (5) and record")
    parser.add_argument("--sitting", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    device, capability = torch.device("cpu"), platform.machine()
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if arguments.case:
        (case,) = (case for case in candidates(device) if case.name == arguments.case)
        write_json(arguments.sitting, measurer(device)(case, arguments.seconds))
        return 0
    if arguments.sitting:
        write_json(arguments.sitting, sitting(candidates(device), measurer(device)))
        return 0
    if arguments.record:
        path = record(arguments.record, arguments.results, device, capability)
        checks = json.loads(path.read_text(encoding="utf-8"))["checks"]["cases"]
        kept = [of for case in checks.values() for name, of in case.items() if name not in KEPT]
        print(f"{path}: {sum(of['stable'] for of in kept)} of {len(kept)} ratios are stable")
        return 0
    files = [content for content in load(arguments.results).values() if content.get("checks")]
    here = [content for content in files if content["device"] == device_name()]
    if not here:
        kinds = ", ".join(content["device"] for content in files) or "none"
        print(f"nothing is checked: no ratio was recorded on {device_name()!r} (recorded: {kinds})")
        return 0
    recorded_on, is_on = here[0]["checks"]["machine"], machine(device)
    if recorded_on != is_on:
        print(f"nothing is checked: the ratios of {device_name()!r} were recorded on {recorded_on}; this is {is_on}")
        return 0
    started = time.monotonic()
    failed = check(here[0], candidates(device), measurer(device), apart)
    for verdict in failed:
        print(f"FAILED: {verdict.case}: {verdict.contender}: {verdict.said}")
    print(f"{len(failed)} of the checked numbers fell, on {device_name()}, in {time.monotonic() - started:.0f} seconds")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
