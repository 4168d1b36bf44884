"""`make evidence`: every arm of the plan trained and measured for every seed, two commands at a time.

Each command is printed before it runs, so it can be run again by hand. A job that is done is not done again: after an
interruption the same command goes on, and of a longer plan it trains what is new. When all measures of a seed are
there, they are collected into experiments/results/SIZES/seed-N.json; at the end docs/evidence.md is written from those.
All of it runs on the CPU, with or without a GPU, on two cores; "large" and "smollm2" use a GPU where there is one.
"smollm2" takes the LLM of a folder, SmolLM2-135M for example, and, if a folder of them is given, emoji beside scenes.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from aligngpt.data.tables import write_json
from demo.evaluate import evaluate_levels
from demo.jobs import ROOT, Job, RunError, as_typed, call, locked, run_whole, side_by_side
from experiments.jobs import Seed, clear_unfinished, record, total_seconds
from experiments.plan import SEEDS, SIZES, STAGE_1, STAGE_2, AnswerArm, CaptionArm


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/evidence"), help="default: runs/evidence")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="default: 0 1 2 3 4")
    parser.add_argument("--sizes", choices=SIZES, default="small", help='default: small; "quick" learns nothing')
    parser.add_argument("--only", default="", metavar="TEXT", help="arms with this in their name; nothing is collected")
    parser.add_argument("--results", type=Path, default="experiments/results", help="default: experiments/results")
    parser.add_argument("--llm", type=Path, help="folder of the LLM, for smollm2")
    parser.add_argument("--emoji", type=Path, help="folder with pretrain.json and images, for smollm2")
    args = parser.parse_args()
    for name in ("llm", "emoji"):
        if getattr(args, name) and args.sizes != "smollm2":
            parser.error(f"--{name} is given; it needs --sizes smollm2")
    if args.sizes == "smollm2" and not args.llm:
        parser.error("--sizes is smollm2; it needs --llm")
    llm, emoji = (folder and as_typed(folder) for folder in (args.llm, args.emoji))
    run_dir, results = as_typed(args.run_dir), as_typed(args.results)
    run_whole(
        functools.partial(run, run_dir, args.seeds, args.sizes, args.only, results / args.sizes, llm, emoji), run_dir
    )


def run(
    run_dir: Path,
    seeds: Sequence[int],
    sizes: str,
    only: str,
    results: Path,
    llm: Path | None = None,
    emoji: Path | None = None,
) -> None:
    """All jobs of these seeds in one queue; a seed's results as soon as they are whole."""
    os.chdir(ROOT)
    for name in ("jobs", "logs"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    with locked(run_dir, "run"):
        captions, answers = chosen_arms(only)
        jobs_of = {
            seed: seed.jobs(captions, answers) for seed in (Seed(run_dir, n, SIZES[sizes], llm, emoji) for n in seeds)
        }
        jobs = [job for of_seed in jobs_of.values() for job in of_seed]
        clear_unfinished(run_dir, jobs)
        left = {job for job in jobs if not job.result.exists()}
        uncollected = [] if only else list(jobs_of)

        def collect_whole() -> None:
            for seed in [seed for seed in uncollected if left.isdisjoint(jobs_of[seed])]:
                write_json(results / f"seed-{seed.number}.json", collect(seed, jobs_of[seed]), indent=1)
                uncollected.remove(seed)

        def finished(job: Job, seconds: float) -> None:
            record(run_dir, job, seconds)
            left.discard(job)
            tqdm.write(f"{job.name}: {seconds:.0f} seconds; {len(left)} of {len(jobs)} jobs are left")
            collect_whole()

        results.mkdir(parents=True, exist_ok=True)
        collect_whole()
        side_by_side(jobs, run_dir / "logs", finished, gpu=SIZES[sizes].gpu)
    if not only and sizes != "quick":
        call(("python", "-m", "experiments.report"))


def chosen_arms(only: str) -> tuple[list[CaptionArm], list[AnswerArm]]:
    """The arms with a text in their name, and the arms of stage 1 that those of stage 2 start from."""
    answers = [arm for arm in STAGE_2 if only in arm.name]
    starts = {arm.start for arm in answers}
    captions = [arm for arm in STAGE_1 if only in arm.name or arm.name in starts]
    if not captions:
        raise RunError(f"--only is {only!r}; it needs to be in the name of an arm")
    return captions, answers


# ---------------------------------------------------------------------------------------------------- results


def collect(seed: Seed, jobs: Sequence[Job]) -> dict[str, Any]:
    """A seed's results file, from its measures."""
    noise = {}
    for arm in STAGE_1:
        if (arm.levels, arm.num_levels, arm.cut) == ("score", 8, "count"):
            noise[arm.noise.name] = evaluate_levels(seed.level_file(arm), seed.noise(arm.noise) / "pairs.json")
    stage_1 = {}
    for arm in STAGE_1:
        found = read_measures(seed, arm)
        stage_1[arm.name] = {"noise": arm.noise.name} | {split: found[split] for split in ("validation", "test")}
        if "emoji" in found:
            stage_1[arm.name]["emoji"] = found["emoji"]
        if arm.levels == "constant":  # the other level was never trained
            stage_1[arm.name] |= {split: {"1": found[split]["1"]} for split in ("validation", "test")}
    return {
        "seed": seed.number,
        "sizes": dataclasses.asdict(seed.sizes),
        "commit": commit(),
        "device": device_name(seed.sizes.gpu),
        "minutes": round(total_seconds(seed.run, jobs) / 60, 1),  # of one core
        "runs": 1 + (seed.given_llm is None) + len(STAGE_1) + len(STAGE_2),  # models trained, the tower among them
        "noise": noise,
        "stage 1": stage_1,
        "stage 2": {arm.name: read_measures(seed, arm) for arm in STAGE_2},
        "samples": read_measures(seed, STAGE_1[0])["samples"],
    }


def read_measures(seed: Seed, arm: CaptionArm | AnswerArm) -> dict[str, Any]:
    return json.loads(seed.measures(arm).read_text(encoding="utf-8"))


def commit() -> str:
    """The commit's name, with a plus sign if files but results differ from it; "unknown" outside a repository."""
    git = ["git", "-C", str(ROOT)]
    status = [*git, "status", "--porcelain", "--", ".", ":!experiments/results"]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed.strip() else "")


def device_name(gpu: bool) -> str:
    """The GPU if one is used, else the processor, for example "AMD EPYC, 2 cores"."""
    if gpu:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
