"""`python -m benchmarks.run`: every case on this device, into results/<device>.json after each one.

The cases are those of every bench_*.py of this folder: `cases()` on a GPU, `cpu_cases()` elsewhere. With --full those
files that have `full_cases()`, which go on to sizes that take minutes, give these instead of `cpu_cases()`.

A case that the file holds for the same code, packages and device is not run again unless a contender was too noisy, so
a run that was stopped goes on where it was. It stops by itself before --seconds are over, with status 3 while cases are
left. What ends the process (a kernel that hangs and is killed, an illegal address) is recorded against the contender it
happened in and not run again until the code changes. Whoever ran when the time was over gets a second try: it may only
have compiled.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import ENDED, ROOM, Case, DeviceLost, check_device, run_case
from benchmarks.case import free as free_memory
from benchmarks.measure import Ceilings, ceilings, free_bytes, keep_freed_memory
from benchmarks.requirements import describe, described, summary
from benchmarks.results import Results, device_name, write_json

NOT_FINISHED, LOST = 3, 4  # exit statuses
RESERVE_SECONDS, MOST_RESERVED = 60, 200  # for a case, until one took longer; and then at most
FIRST = [f"bench_{name}" for name in ("projector", "injection", "chain", "loss", "gate", "step", "generate")]
LAST = "bench_decode"
GPU = torch.device("cuda")
OURS = ("aligngpt_kernels", "aligngpt", "training", "benchmarks")
GRACE_SECONDS = 15  # after its time, until a process counts as hung


def all_cases(device: torch.device = GPU, full: bool = False) -> list[Case]:
    """Those of requirements first; decoding, which has the most, last. A file that can't be read here is named."""
    names = {file.stem for file in Path(__file__).parent.glob("bench_*.py")}
    found = []
    for name in [*FIRST, *sorted(names - {*FIRST, LAST}), LAST]:
        kind = "cases" if device.type == "cuda" else "cpu_cases"
        try:
            file = importlib.import_module(f"benchmarks.{name}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in OURS:
                raise
            print(f"left out: {name}, the package {error.name} is not installed", flush=True)
            continue
        make: Callable[[], list[Case]] | None = getattr(file, kind, None)
        if full and kind == "cpu_cases":
            make = getattr(file, "full_cases", make)
        if make is None:
            print(f"left out: {name} has no {kind}", flush=True)
            continue
        found += [dataclasses.replace(case, file=name) for case in make()]
    return found


def run_cases(
    cases: Sequence[Case], results: Results, device: torch.device, top: Ceilings, deadline: float, seconds: float = 1.0
) -> int:
    """Run what is left until `deadline` (of time.monotonic) and return how many cases remain."""
    left = results.left(cases)
    for number, case in enumerate(left):
        started = time.monotonic()
        longest = results.content.get("longest_seconds", 0)
        if started + min(max(longest, RESERVE_SECONDS), MOST_RESERVED) > deadline:
            return len(left) - number
        record = results.record(case)
        results.save()
        _run(case, record, results, device, top, seconds)
        results.content["longest_seconds"] = max(longest, round(time.monotonic() - started, 1))
        results.save()
        print(f"{describe(case.name, record)}\n", flush=True)
    return 0


def _run(
    case: Case, record: dict[str, Any], results: Results, device: torch.device, top: Ceilings, seconds: float
) -> None:
    free_memory(device)
    record |= {"copies": case.copies(device), "ceilings": top._asdict()}
    needed, free = ROOM * case.input_bytes * record["copies"], free_bytes(device)
    for kind in ("failed", "skipped"):
        record.pop(kind, None)
    record["tries"] = record.get("tries", 0) + 1
    if record["tries"] > len(case.contenders) + 2:  # each try names one contender that ended it
        record["failed"] = f"its process ended {record['tries'] - 1} times"
    elif needed > free:
        record["skipped"] = f"its inputs need {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
    else:
        results.save()
        try:
            run_case(case, device, top, record["contenders"], results.save, seconds)
        except DeviceLost:
            raise
        except Exception as error:  # of the case itself: the others go on
            record |= {"failed": f"{type(error).__name__}: {error}"[:300], "finished": True}
            results.save()
            check_device(device, case.name)
    record |= {"finished": True, "tries": 0}


def work(folder: Path, only: str, seconds: float, probe_seconds: float, full: bool = False) -> int:
    """Measure in this process; its exit status."""
    deadline = time.monotonic() + seconds
    torch.manual_seed(0)
    device, capability = torch.device("cpu"), platform.machine()
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        keep_freed_memory()
    results = Results(folder, device_name(), capability)
    cases = [case for case in all_cases(device, full) if only in case.name]
    top = ceilings(device, probe_seconds)
    print(described(top, device), flush=True)
    free_memory(device)
    gc.freeze()  # what was imported: cases collect garbage, and would look through it each time
    try:
        left = run_cases(cases, results, device, top, deadline)
    except DeviceLost as lost:
        print(f"{lost} took the GPU from this process", flush=True)
        return LOST
    finally:
        gc.unfreeze()
    results.save()
    print(summary(results.content))
    print(f"\n{results.path}: {len(cases) - left} of {len(cases)} cases on {results.content['device']}")
    if left:
        print(f"Not finished: {left} cases are left. Run it again, and it goes on from here.")
    return NOT_FINISHED if left else 0


Mark = tuple[str, str, str]  # case, its code, and a contender that a process ended in


def marks(file: Path) -> set[Mark]:
    cases = json.loads(file.read_text(encoding="utf-8")).get("cases", {})  # the folder may hold other files
    return {
        (case, record["code"], name)
        for case, record in cases.items()
        for name, found in record["contenders"].items()
        if found.get("failed") == ENDED
    }


def forgive(file: Path, before: set[Mark]) -> None:
    """Drop the mark that a run killed at its time limit added to those `before`, once for each contender."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for case, _, name in marks(file) - before:
        record = content["cases"][case]
        if name not in record.setdefault("timed_out", []):
            record["timed_out"].append(name)
            record["tries"] -= 1
            del record["contenders"][name]
            content["longest_seconds"] = max(content.get("longest_seconds", 0), 2 * RESERVE_SECONDS)
    write_json(file, content)


def supervise(command: Sequence[str], seconds: float, folder: Path) -> int:
    """Run the command with `--seconds` that are left, anew whenever its process is lost, and return its exit status.

    The command writes its results into `folder`.
    """
    deadline = time.monotonic() + seconds
    while (rest := deadline - time.monotonic()) > RESERVE_SECONDS:
        before = {file: marks(file) for file in folder.glob("*.json")}
        try:
            status = subprocess.run([*command, "--seconds", str(rest)], timeout=rest + GRACE_SECONDS).returncode
        except subprocess.TimeoutExpired:
            for file in folder.glob("*.json"):
                forgive(file, before.get(file, set()))
            print("The process hung and was ended. Run it again, and it goes on from here.")
            return NOT_FINISHED
        if status in (0, 1, 2, NOT_FINISHED):  # 1 and 2: Python's own, which would come again
            return status
        print(f"its process ended with status {status}; the rest goes on in a new one", flush=True)
    print("Not finished: run it again, and it goes on from here.")
    return NOT_FINISHED


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the files")
    parser.add_argument("--seconds", type=float, default=440, help="stop before these are over")
    parser.add_argument("--probe-seconds", type=float, default=20, help="of streams and products at the start")
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--full", action="store_true", help="go on to sizes that take minutes, on a CPU")
    parser.add_argument("--worker", action="store_true", help="measure in this process, without a second one to watch")
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.results, arguments.only, arguments.seconds, arguments.probe_seconds, arguments.full)
    rest = ["--worker", "--results", str(arguments.results), "--only", arguments.only]
    rest += ["--probe-seconds", str(arguments.probe_seconds), *["--full"] * arguments.full]
    return supervise([sys.executable, "-m", "benchmarks.run", *rest], arguments.seconds, arguments.results)


if __name__ == "__main__":
    sys.exit(main())
