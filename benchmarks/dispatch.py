"""`python -m benchmarks.dispatch FILE …`: what "auto" goes by, from results files of benchmarks.run.

Writes kernels/aligngpt_kernels/measured.json: by compute capability and op, the time of what an op replaces divided by
its own, the worst over its cases, rounded down. Where several things do what an op replaces, the fastest that was right
counts. 0 where our kernel failed or was wrong. Cases in which what it replaces could not run (out of memory, say), or
that other code than the file's last was measured in, count for nothing. Ops that the files say nothing of keep their
numbers.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.requirements import finished
from benchmarks.results import write_json

MEASURED = Path(__file__).parents[1] / "kernels/aligngpt_kernels/measured.json"


def ratios(results: Mapping[str, Any]) -> dict[str, float]:
    """By key of the dispatch table, from one results file."""
    worst: dict[str, float] = {}
    for record in finished(results).values():
        if record.get("dispatch") is None:
            continue
        key, ours, replaced = record["dispatch"]
        found = record["contenders"].get(ours, {})
        others = [record["contenders"].get(name, {}).get("us") for name in replaced]
        times = [us for us in others if us is not None]
        if {"wrong", "failed"} & found.keys():
            ratio = 0.0
        elif "us" in found and times:
            ratio = math.floor(100 * min(times) / found["us"]) / 100
        else:
            continue
        worst[key] = min(ratio, worst.get(key, math.inf))
    return worst


def merge(measured: dict[str, dict[str, float]], files: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The table with the files' numbers in it; of several files for one capability, the worst."""
    fresh: dict[str, dict[str, float]] = {}
    for results in files:
        for key, ratio in ratios(results).items():
            chip = fresh.setdefault(results["capability"], {})
            chip[key] = min(ratio, chip.get(key, math.inf))
    chips = sorted(measured.keys() | fresh.keys())
    return {chip: dict(sorted((measured.get(chip, {}) | fresh.get(chip, {})).items())) for chip in chips}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--measured", type=Path, default=MEASURED)
    arguments = parser.parse_args()
    files = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.files]
    table = merge(json.loads(arguments.measured.read_text(encoding="utf-8")), files)
    write_json(arguments.measured, table)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
