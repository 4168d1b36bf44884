"""`python -m benchmarks.rates FILE …`: what training/plan.py predicts hours from, from results files of benchmarks.run.

Writes training/rates.json: for each device what the cases "step at 7B shapes" reached, by stage of training and way of
checkpointing. FLOPs are counted as MFU counts them; each record says how many it did, in which stage of the step how
long it took, and of how many decoder layers. A record that was made with older code counts, and its commit is named.
Devices that the files say nothing of keep their rates.
"""

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bench_step import LLAMA_7B
from benchmarks.results import write_json
from training import sharding
from training.cluster import OPTIMIZER_BYTES, RATES
from training.config import Stage, aligngpt_7b
from training.flops import count_flops

STAGES: tuple[Stage, Stage] = ("pretrain", "finetune")
NAME = re.compile(r"step at 7B shapes, (?P<stage>\w+), .*checkpointing (?P<checkpointing>\w+)")
IMAGES = ("vision tower", "projector + gate + injection", "projector", "gate", "injection")
OPTIMIZER = ("optimizer", "gradient norm")
BESIDE = ("the rest", "unmarked", "batch to device", "data wait")  # of a step, none of its work


class Measured(NamedTuple):
    """One record. Seconds of a step of one micro-batch."""

    stage: Stage
    checkpointing: str
    llm_flops: float  # of LLM and head
    tower_flops: float  # and the projector's
    trained_weights: float
    tower: float  # and what lies between it and the LLM
    forward: float
    llm: float  # forward, loss, and all of backward
    optimizer: float
    beside: float


def stage_seconds(ours: Mapping[str, Any]) -> dict[str, float]:
    """By name, from either form that a record has had."""
    if "stages_ms" in ours:
        return {name: spent / 1e3 for name, spent in ours["stages_ms"].items()}
    rows = {row["stage"]: row["us"] for row in ours["stages"]} | ours.get("rest", {})
    return {name: spent / 1e6 for name, spent in rows.items()}


def read(name: str, ours: Mapping[str, Any]) -> Measured | None:
    """None: it is of another case, or says not enough."""
    found = NAME.match(name)
    needed = {"flops", "images", "layers"}
    if not found or not needed <= ours.keys() or not ({"stages_ms", "stages"} & ours.keys()):
        return None
    (stage,) = (known for known in STAGES if known == found["stage"])
    model = sharding.build(LLAMA_7B._replace(layers=ours["layers"]).config())
    sharding.freeze(model, aligngpt_7b(stage).model.train)
    of_image = count_flops(model).image * ours["images"]
    spent = stage_seconds(ours)
    tower, optimizer, beside = (sum(spent.get(name, 0.0) for name in names) for names in (IMAGES, OPTIMIZER, BESIDE))
    return Measured(
        stage,
        found["checkpointing"],
        ours["flops"] - of_image,
        of_image,
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        tower,
        spent["LLM forward"],
        sum(spent.values()) - tower - optimizer - beside,
        optimizer,
        beside,
    )


def optimizer_rate(records: Sequence[Measured]) -> tuple[float, float]:
    """Bytes a second, and seconds beside that: the line through what was measured, or without two sizes through 0."""
    updated = np.array([OPTIMIZER_BYTES * record.trained_weights for record in records])
    spent = np.array([record.optimizer for record in records])
    if np.ptp(updated) > 0.5 * updated.max():
        each, once = np.polyfit(updated, spent, 1)
        if each > 0 and once >= 0:
            return float(1 / each), float(once)
    largest = int(updated.argmax())
    return float(updated[largest] / spent[largest]), 0.0


def rates(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those of one results file; None where it has no such case."""
    cases = {name: record for name, record in results["cases"].items() if record.get("finished")}
    named = [(name, record["contenders"].get("ours", {})) for name, record in cases.items()]
    records = [found for name, ours in named if "us" in ours and (found := read(name, ours))]
    if not records:
        return None
    of_bytes, once = optimizer_rate(records)
    llm: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        llm.setdefault(record.stage, {})[record.checkpointing] = {
            "flops_per_second": round(record.llm_flops / record.llm / 1e9) * 1e9,
            "forward": round(record.forward / record.llm, 4),
        }
    commits = sorted({cases[name]["commit"].rstrip("+")[:12] for name, _ in named if NAME.match(name)})
    return {
        "measured": f"torch {results['versions']['torch']}, {len(records)} steps, code of {', '.join(commits)}",
        "tower": round(statistics.median(record.tower_flops / record.tower for record in records) / 1e9) * 1e9,
        "optimizer": round(of_bytes / 1e9) * 1e9,
        "optimizer_seconds": round(once, 6),
        "micro_batch_seconds": round(statistics.median(record.beside for record in records), 6),
        "llm": {stage: dict(sorted(found.items())) for stage, found in sorted(llm.items())},
    }


def merge(known: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rates with the files' devices in them."""
    fresh = {results["device"]: found for results in files if (found := rates(results))}
    return dict(sorted((dict(known) | fresh).items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rates", type=Path, default=RATES)
    arguments = parser.parse_args()
    files = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.files]
    known = json.loads(arguments.rates.read_text(encoding="utf-8")) if arguments.rates.exists() else {}
    found = merge(known, files)
    write_json(arguments.rates, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
