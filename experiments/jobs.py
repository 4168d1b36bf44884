"""A seed's jobs, each a command that anyone can give by hand, and what says that one is done.

    RUN/seed-N/scenes/{train,validation,test}, vision, llm, llm-plain; with --emoji, scenes/{train,test}/emoji.json
    RUN/seed-N/noise/NOISE/                     pairs.json, scores/, and the levels that its arms need
    RUN/seed-N/stage-{1,2}/ARM                  training runs
    RUN/seed-N/drawn/ARM                        models of stage 1 with a gate that is drawn larger
    RUN/seed-N/measures/stage-{1,2}/ARM.json    python -m experiments.measure
    RUN/seed-N/measures/choosing/ARM.json       python -m experiments.choosing
    RUN/jobs/JOB.json                           what a job was done by, its command, code and commit, and its seconds
    RUN/logs/JOB.log                            what it said

A result counts if it was made by the command that would make it now, with the same code of what decides it. A measure
that was not is taken again. Anything else is refused: what stands on it has taken hours.
"""

import functools
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligngpt.data.scenes import PIXELS
from aligngpt.data.tables import write_json
from demo.jobs import ROOT, Job, RunError, miniature, slug, training
from experiments.plan import AnswerArm, CaptionArm, Noise, Sizes

# The code that decides what `python -m MODULE` makes. A training run holds its own settings, and refuses others.
SCENES = "aligngpt/data/scenes.py"
CODE = {
    "demo.vision": ("demo/vision.py", "demo/miniature.py", SCENES),
    "demo.language": ("demo/language.py", "demo/miniature.py", SCENES),
    "experiments.noise": ("experiments/noise.py", "experiments/emoji.py", SCENES),
    "experiments.emoji": ("experiments/emoji.py",),
    "experiments.gate": ("experiments/gate.py",),
    "experiments.measure": ("experiments/measure.py", "demo/evaluate.py", SCENES),
    "experiments.choosing": ("experiments/choosing.py", "experiments/measure.py", "demo/evaluate.py", SCENES),
}
MEASURES = ("experiments.measure", "experiments.choosing")
# Pictures are decoded alike whatever is installed.
TRAINING = ("--data.decoder", "pil", "--save-every", "200", "--keep-last", "1")


@dataclass(frozen=True)
class Seed:
    """A seed's part of a run folder. The seed decides scenes, noise, tower and LLM, and what training draws.

    given_llm: folder of the LLM, which is then the same for all seeds. emoji: folder of pictures beside the scenes.
    """

    run: Path
    number: int
    sizes: Sizes
    given_llm: Path | None = None
    emoji: Path | None = None

    @property
    def folder(self) -> Path:
        return self.run / f"seed-{self.number}"

    @property
    def train_scenes(self) -> Path:
        return self.folder / "scenes/train"

    def llm(self, kind: str = "") -> Path:
        assert not (kind and self.given_llm), f"of a given LLM there is no {kind} one"
        return self.given_llm or self.folder / (f"llm-{kind}" if kind else "llm")

    @property
    def names(self) -> tuple[Path, ...]:
        """What is there when the emoji are."""
        return (self.folder / "scenes/test/emoji.json",) if self.emoji else ()

    def noise(self, noise: Noise) -> Path:
        return self.folder / "noise" / slug(noise.name)

    def model(self, arm: CaptionArm | AnswerArm) -> Path:
        return self.folder / arm.stage / slug(arm.name) / "model"

    def measures(self, arm: CaptionArm | AnswerArm) -> Path:
        return self.folder / "measures" / arm.stage / f"{slug(arm.name)}.json"

    def choosing(self, arm: AnswerArm) -> Path:
        return self.folder / "measures/choosing" / f"{slug(arm.name)}.json"

    def all_measures(self, arm: AnswerArm) -> list[Path]:
        return [self.measures(arm)] + [self.choosing(arm)] * arm.mixes

    # ------------------------------------------------------------------------------------------------ jobs

    def jobs(self, captions: Sequence[CaptionArm], answers: Sequence[AnswerArm]) -> list[Job]:
        """All that these arms need, each job once; first those for which others wait."""
        sizes = self.sizes
        jobs = [self.scenes("train", sizes.train), self.scenes("test", sizes.test), *self.parts()]
        jobs.append(self.scenes("validation", sizes.validation))
        for arm in captions:
            jobs += [self.language(arm.llm)] if arm.llm else []
            jobs += [*self.data(arm), self.captioning(arm), self.measuring(arm)]
        starts = {arm.name: self.model(arm) for arm in captions}
        for answer_arm in answers:
            start = starts[answer_arm.start]
            if answer_arm.gate_drawn != 1:
                jobs.append(self.drawing(answer_arm, start))
                start = jobs[-1].result
            jobs += [self.answering(answer_arm, start), self.measuring(answer_arm)]
            if answer_arm.mixes:
                jobs.append(self.measuring_choice(answer_arm))
        return list(dict.fromkeys(jobs))

    def named(self, name: str) -> str:
        return f"seed {self.number}: {name}"

    def scenes(self, split: str, number: int) -> Job:
        folder = self.folder / "scenes" / split
        options = ("--number", str(number), "--seed", f"{self.number} {split}", *self.pixels())
        return Job(self.named(f"{split} scenes"), module("noise", "scenes", folder, *options), folder)

    def pixels(self) -> tuple[str, ...]:
        return () if self.sizes.pixels == PIXELS else ("--pixels", str(self.sizes.pixels))

    def parts(self) -> Iterator[Job]:
        """Tower and LLM, and before them the emoji, whose names the tower learns."""
        sizes, seed, scenes = self.sizes, self.number, self.folder / "scenes"
        options = (*self.pixels(), *sizes.vision)
        if self.emoji:
            command, needs = (
                module("emoji", self.emoji, scenes, "--seed", str(seed)),
                (scenes / "train", scenes / "test"),
            )
            yield Job(self.named("emoji"), command, self.names[0], needs=needs)
            options += ("--pairs", str(self.train_scenes / "emoji.json"))
        yield miniature(
            self.named("CLIP"),
            "vision",
            self.folder / "vision",
            options,
            steps=sizes.vision_steps,
            seed=seed,
            needs=self.names,
        )
        if self.given_llm is None:
            yield self.language()

    def language(self, kind: str = "") -> Job:
        """The LLM, or the one of another kind."""
        options = self.sizes.language + (("--sureness", "0") if kind == "plain" else ())
        name = self.named(f"{kind} LLM".strip())
        return miniature(name, "language", self.llm(kind), options, seed=self.number, steps=self.sizes.llm_steps)

    def data(self, arm: CaptionArm) -> Iterator[Job]:
        """The pairs and levels of an arm."""
        folder, name, seed = self.noise(arm.noise), arm.noise.name, ("--seed", str(self.number))
        pairs, scores = folder / "pairs.json", folder / "scores"

        def made(what: str, source: Path, out: Path, *options: str) -> Job:
            command = module("noise", what, source, out, *options)
            return Job(self.named(f"{out.stem}, {name}"), command, out, needs=(source, *self.names))

        noise = ("--kind", arm.noise.kind, "--rate", f"{arm.noise.rate:g}")
        yield made("pairs", self.train_scenes, pairs, *noise, *seed)
        if arm.levels == "true":
            yield made("true-levels", pairs, self.data_file(arm), "--num-levels", str(arm.num_levels), *seed)
        if arm.levels == "constant":
            yield made("constant", pairs, self.data_file(arm))
        if arm.levels == "score" or arm.best_quarter:
            command = ["aligngpt", "score", str(pairs), "--model", str(self.folder / "vision")]
            command += ["--image-folder", str(self.train_scenes), "--out", str(scores), "--workers", "1"]
            needs, manifest = (pairs, self.folder / "vision"), scores / "manifest.json"
            yield Job(self.named(f"scores, {name}"), tuple(command), manifest, needs=needs)
            file = self.level_file(arm)
            command = ["aligngpt", "levels", str(scores), "--num-levels", str(arm.num_levels), "--cut", arm.cut]
            command += ["--data", str(pairs), "--out", str(file), "--json", str(file.with_suffix(".json"))]
            yield Job(self.named(f"{file.stem}, {name}"), tuple(command), file.with_suffix(".json"), needs=(manifest,))
        if arm.best_quarter:
            yield made("best-quarter", self.level_file(arm).with_suffix(".json"), self.data_file(arm))

    def level_file(self, arm: CaptionArm) -> Path:
        """The arm's pairs in levels by their scores."""
        return self.noise(arm.noise) / f"{arm.num_levels}-levels-{arm.cut}.parquet"

    def data_file(self, arm: CaptionArm) -> Path:
        """What the arm is trained on."""
        if arm.best_quarter:
            name = "best-quarter"
        elif arm.levels in ("true", "constant"):
            name = f"{arm.num_levels}-levels-{arm.levels}"
        else:
            name = "pairs"
        return self.noise(arm.noise) / f"{name}.json"

    def captioning(self, arm: CaptionArm) -> Job:
        """Stage 1 of an arm."""
        parts, data = (self.llm(arm.llm), self.folder / "vision"), self.data_file(arm)
        needs = [*parts, data]
        options = ["--model.llm", str(parts[0]), "--model.vision", str(parts[1]), "--data.path", str(data), *TRAINING]
        if arm.levels == "none":
            options += ["--model.align-mode", "none"]
        else:
            levels = {"score": str(self.level_file(arm)), "random": "random"}.get(arm.levels, "record")
            options += ["--model.num-levels", str(arm.num_levels), "--data.levels", levels]
        if arm.levels == "score":
            needs.append(self.level_file(arm).with_suffix(".json"))  # which is written after the levels
        budget = (self.sizes.stage_1_batch, self.sizes.stage_1_rate, self.sizes.stage_1_steps)
        return self.training(arm, "pretrain", options, budget, needs)

    def drawing(self, arm: AnswerArm, start: Path) -> Job:
        """The model in `start` with a gate that is drawn larger."""
        out = self.folder / "drawn" / slug(arm.name)
        command = module("gate", start, out, "--times", f"{arm.gate_drawn:g}")
        return Job(self.named(f"drawn: {arm.name}"), command, out, needs=(start,))

    def answering(self, arm: AnswerArm, start: Path) -> Job:
        """Stage 2 of an arm, from the model in `start`."""
        questions = self.train_scenes / "questions.json"
        options = ["--model.init", str(start), "--data.path", str(questions), "--data.template", "chat", *TRAINING]
        options += ["--model.align-mode", arm.mode] + (["--model.random-table"] if arm.random_table else [])
        options += ["--model.train", "llm", "projector"] if arm.gate_frozen else []
        options += ["--model.gate-text", arm.gate_text] if arm.gate_text != "prompt" else []
        if arm.gate_rate != 1:
            options += ["--optim.align-lr", f"{arm.gate_rate * self.sizes.stage_2_rate:g}"]
        budget = (self.sizes.stage_2_batch, self.sizes.stage_2_rate, self.sizes.stage_2_steps)
        return self.training(arm, "finetune", options, budget, [start, self.train_scenes])

    def training(
        self,
        arm: CaptionArm | AnswerArm,
        script: str,
        options: Sequence[str],
        budget: tuple[int, float, int],
        needs: Sequence[Path],
    ) -> Job:
        name, folder = self.named(f"{arm.stage}: {arm.name}"), self.model(arm).parent
        return training(
            name,
            script,
            folder,
            [*options, *self.sizes.training],
            budget=budget,
            image_folder=self.train_scenes,
            seed=self.number,
            needs=tuple(needs),
        )

    def measuring(self, arm: CaptionArm | AnswerArm) -> Job:
        scenes, out = self.folder / "scenes", self.measures(arm)
        needs = (self.model(arm), scenes / "validation", scenes / "test", *self.names)
        command = module("measure", arm.stage, self.model(arm), scenes, out)
        return Job(self.named(f"measures, {arm.stage}: {arm.name}"), command, out, needs=needs)

    def measuring_choice(self, arm: AnswerArm) -> Job:
        scenes, out = self.folder / "scenes", self.choosing(arm)
        command = module("choosing", self.model(arm), scenes, out)
        return Job(self.named(f"choosing: {arm.name}"), command, out, needs=(self.model(arm), scenes / "test"))


def module(name: str, *words: str | Path) -> tuple[str, ...]:
    """The command `python -m experiments.NAME …`."""
    return ("python", "-m", f"experiments.{name}", *map(str, words))


# ---------------------------------------------------------------------------------------------------- records


def record_file(run: Path, job: Job) -> Path:
    return run / "jobs" / f"{slug(job.name)}.json"


def made_by(job: Job) -> dict[str, Any]:
    """What decides a job's result: its command, and the code behind it."""
    return {"command": list(job.command), "code": code_hash(CODE.get(job.command[2], ()))}


@functools.cache  # as it was when the run began: what is changed meanwhile does not count as run
def code_hash(files: tuple[str, ...]) -> str:
    content = b"".join((ROOT / file).read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:16]


def record(run: Path, job: Job, seconds: float) -> None:
    """Write down that a job is done."""
    write_json(record_file(run, job), made_by(job) | {"commit": commit(), "seconds": round(seconds, 1)})


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


def total_seconds(run: Path, jobs: Sequence[Job]) -> float:
    """How long these jobs took together, without what an interruption lost."""
    return sum(recorded(run, job)["seconds"] for job in jobs)


def commits(run: Path, jobs: Sequence[Job]) -> list[str]:
    """The commits at which these jobs ended."""
    return sorted({recorded(run, job)["commit"] for job in jobs})


def recorded(run: Path, job: Job) -> dict[str, Any]:
    return json.loads(record_file(run, job).read_text(encoding="utf-8"))


def clear_unfinished(run: Path, jobs: Sequence[Job]) -> None:
    """Remove results that do not count, so that they are made again.

    Raises:
        RunError: one that is no measure was made by another command or code.
    """
    for job in jobs:
        file = record_file(run, job)
        found = recorded(run, job) if file.exists() else None
        if found is not None and {**found, **made_by(job)} == found and job.result.exists():
            continue
        if found is not None and job.result.exists() and job.command[2] not in MEASURES:
            raise RunError(
                f"{job.name} in --run-dir {run} was made by another command or other code; it needs its own folder. "
                f"{file} says by which; without it {job.result} is made again, and what was made from it is not"
            )
        file.unlink(missing_ok=True)
        if job.result.is_dir():  # of a job that was ended before it could be written down
            shutil.rmtree(job.result)
        job.result.unlink(missing_ok=True)
