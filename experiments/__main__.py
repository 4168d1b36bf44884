"""`make evidence`: every arm of the plan trained and measured for every seed, two commands at a time.

Each command is printed before it runs, so it can be run again by hand. A job that is done is not done again: after an
interruption the same command goes on, and of a longer plan it trains what is new. When all measures of a seed are
there, or the run ends, those that are there are collected into experiments/results/SIZES/seed-N.json; at the end
docs/evidence.md is written from those, unless they are collected elsewhere.
All of it runs on the CPU, with or without a GPU, on two cores; "large" and "smollm2" use a GPU where there is one.
"smollm2" takes the LLM of a folder, SmolLM2-135M for example, and, if a folder of them is given, emoji beside scenes.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from aligngpt.data.scenes import read_scenes
from aligngpt.data.tables import read_table, write_json
from demo.evaluate import evaluate_levels
from demo.jobs import ROOT, Job, RunError, as_typed, call, locked, run_whole, side_by_side
from experiments import measure
from experiments.jobs import Seed, clear_unfinished, commits, record, total_seconds
from experiments.noise import mean_true_facts
from experiments.plan import SEEDS, SIZES, STAGE_1, STAGE_2, AnswerArm, CaptionArm

RESULTS = Path("experiments/results")  # what the report is written from


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/evidence"), help="default: runs/evidence")
    default = " ".join(map(str, SEEDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help=f"default: {default}")
    parser.add_argument("--sizes", choices=SIZES, default="small", help='default: small; "quick" learns nothing')
    parser.add_argument("--only", default="", metavar="TEXT", help="arms with this in their name; nothing is collected")
    elsewhere = "with another folder docs/evidence.md is not written"
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}; {elsewhere}")
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
    seeds = [Seed(run_dir, number, SIZES[args.sizes], llm, emoji) for number in args.seeds]
    run_whole(functools.partial(run, run_dir, seeds, args.only, results / args.sizes), run_dir)


def run(run_dir: Path, seeds: Sequence[Seed], only: str, results: Path) -> None:
    """All jobs of these seeds in one queue; a seed's results as soon as they are whole. All have the same sizes."""
    os.chdir(ROOT)
    for name in ("jobs", "logs"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    with locked(run_dir, "run"):
        captions, answers = chosen_arms(only, given_llm=seeds[0].given_llm is not None)
        jobs_of = {seed: seed.jobs(captions, answers) for seed in seeds}
        jobs = [job for of_seed in jobs_of.values() for job in of_seed]
        clear_unfinished(run_dir, jobs)
        left = {job for job in jobs if not job.result.exists()}
        uncollected = [] if only else list(jobs_of)

        def collect_seeds(*, whole: bool) -> None:
            for seed in [seed for seed in uncollected if not whole or left.isdisjoint(jobs_of[seed])]:
                if found := collect(seed, captions, answers, [job for job in jobs_of[seed] if job not in left]):
                    write_json(results / f"seed-{seed.number}.json", found, indent=1)
                uncollected.remove(seed)

        def finished(job: Job, seconds: float) -> None:
            record(run_dir, job, seconds)
            left.discard(job)
            tqdm.write(f"{job.name}: {seconds:.0f} seconds; {len(left)} of {len(jobs)} jobs are left")
            collect_seeds(whole=True)

        results.mkdir(parents=True, exist_ok=True)
        collect_seeds(whole=True)
        try:
            side_by_side(jobs, run_dir / "logs", finished, gpu=seeds[0].sizes.gpu)
        finally:
            collect_seeds(whole=False)
    if not only and results.parent == RESULTS and results.name != "quick":
        call(("python", "-m", "experiments.report"))


def chosen_arms(only: str, *, given_llm: bool = False) -> tuple[list[CaptionArm], list[AnswerArm]]:
    """The arms with a text in their name, and the arms of stage 1 that those of stage 2 start from.

    A given LLM has read nothing of how sure a text is, so for it there is no other, plain one.
    """
    answers = [arm for arm in STAGE_2 if only in arm.name]
    starts = {arm.start for arm in answers}
    captions = [arm for arm in STAGE_1 if only in arm.name or arm.name in starts]
    captions = [arm for arm in captions if not (given_llm and arm.llm)]
    if not captions:
        raise RunError(f"--only is {only!r}; it needs to be in the name of an arm")
    return captions, answers


# ---------------------------------------------------------------------------------------------------- results


def collect(
    seed: Seed, captions: Sequence[CaptionArm], answers: Sequence[AnswerArm], jobs: Sequence[Job]
) -> dict[str, Any] | None:
    """A seed's results file, of the arms that these jobs have measured; None where there are none."""
    done = {job.result for job in jobs}
    captions = [arm for arm in captions if seed.measures(arm) in done]
    answers = [arm for arm in answers if done.issuperset(seed.all_measures(arm))]
    if not captions:
        return None
    noise = {}
    for arm in captions:
        if (arm.levels, arm.num_levels, arm.cut, arm.llm) == ("score", 8, "count", ""):
            noise[arm.noise.name] = levels_found(seed, arm)
    stage_1 = {}
    for arm in captions:
        found = read_measures(seed, arm)
        stage_1[arm.name] = {"noise": arm.noise.name} | {split: found[split] for split in ("validation", "test")}
        if "emoji" in found:
            stage_1[arm.name]["emoji"] = found["emoji"]
        if arm.levels == "constant":  # the other level was never trained
            stage_1[arm.name] |= {split: {"1": found[split]["1"]} for split in ("validation", "test")}
    return {
        "seed": seed.number,
        "sizes": dataclasses.asdict(seed.sizes),
        "commits": commits(seed.run, jobs),
        "device": device_name(seed.sizes.gpu),
        "job minutes": round(total_seconds(seed.run, jobs) / 60, 1),  # two jobs run at a time
        "runs": sum(job.metrics is not None for job in jobs),  # models trained, tower and LLMs among them
        "measured": {
            "pictures": measure.PICTURES,
            "questions": measure.QUESTIONS,
            "questions by level": measure.QUESTIONS_BY_LEVEL,
        },
        "noise": noise,
        "stage 1": stage_1,
        "stage 2": {arm.name: read_measures(seed, arm) for arm in answers},
        "choosing": {arm.name: read_json(seed.choosing(arm)) for arm in answers if arm.mixes},
        "samples": read_measures(seed, STAGE_1[0])["samples"] if STAGE_1[0] in captions else [],
    }


def levels_found(seed: Seed, arm: CaptionArm) -> dict[str, Any]:
    """How well the scores found the true alignment, and the true facts by level as a model's captions are measured."""
    levels, pairs = seed.level_file(arm), seed.noise(arm.noise) / "pairs.json"
    captions = [record["conversations"][1]["value"] for record in json.loads(pairs.read_text(encoding="utf-8"))]
    level_of = read_table(levels, "levels", ["level"])[0]["level"].to_pylist()
    facts = mean_true_facts(captions, read_scenes(seed.train_scenes), level_of)
    return evaluate_levels(levels, pairs) | {"mean true facts": facts}


def read_measures(seed: Seed, arm: CaptionArm | AnswerArm) -> dict[str, Any]:
    return read_json(seed.measures(arm))


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


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
