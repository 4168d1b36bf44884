"""`make demo`: from nothing to a model that answers questions about pictures, through the commands of a real run.

    RUN/scenes/{train,validation,test}   pictures, captions and questions, drawn
    RUN/vision, RUN/llm                  what a real run would download: a miniature CLIP and a miniature LLM
    RUN/scores/, levels.parquet          aligngpt score, aligngpt levels
    RUN/stage-1-*                        training/pretrain.py: with 8 levels, and three rivals of the same budget
    RUN/stage-2                          training/finetune.py
    RUN/results.json, RUN/pictures/*.png what came out, on pictures that nothing was trained on

Every command is printed before it runs, so it can be run again by hand; what it says goes to RUN/logs. A step whose
result is there is not done again: after an interruption the same command goes on. All of it runs on the CPU, with or
without a GPU, on two cores.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligngpt.data.scenes import write_json, write_scenes
from demo.jobs import (
    ROOT,
    Job,
    RunError,
    as_typed,
    call,
    locked,
    miniature,
    progress,
    run_whole,
    side_by_side,
    slug,
    training,
)

RIVALS = ("no token", "random levels", "top quarter")


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are `make demo`'s."""

    train: int = 16_000
    validation: int = 1_000
    test: int = 1_000
    vision_steps: int = 600
    llm_steps: int = 270
    stage_1_steps: int = 550
    stage_1_batch: int = 32
    stage_2_steps: int = 240
    stage_2_batch: int = 128


QUICK = Sizes(320, 40, 40, 4, 4, 6, 16, 4, 16)  # every step once, in a minute; nothing is learned


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="every step at a minute's size; nothing is learned")
    args = parser.parse_args()
    demo = Demo(as_typed(args.run_dir), args.seed, QUICK if args.quick else Sizes())
    run_whole(demo.run, args.run_dir)


class Demo:
    """The steps, in order. Paths are relative to the project's folder, in which all commands run."""

    def __init__(self, folder: Path, seed: int, sizes: Sizes):
        self.folder, self.seed, self.sizes = folder, seed, sizes
        self.train_scenes = folder / "scenes/train"
        self.pairs = self.train_scenes / "pairs.json"
        self.levels = folder / "levels.parquet"

    def run(self) -> None:
        os.chdir(ROOT)
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        (self.folder / "pictures").mkdir(exist_ok=True)
        with locked(self.folder, "demo"):
            self.check_settings()
            self.draw_scenes()
            self.train_parts()
            self.make_levels()
            self.train_stages()
            self.evaluate()
            self.chat()

    def check_settings(self) -> None:
        """A folder belongs to one seed, one size and one version of the demo."""
        code = hashlib.sha256()
        for file in (*sorted(Path("demo").glob("*.py")), Path("aligngpt/data/scenes.py")):
            code.update(file.read_bytes())
        path, settings = self.folder / "demo.json", {"seed": self.seed, **vars(self.sizes), "code": code.hexdigest()}
        if not path.exists():
            write_json(path, settings)
        elif json.loads(path.read_text(encoding="utf-8")) != settings:
            raise RunError(
                f"--run-dir {self.folder} is a demo of another seed, size or version; it needs its own folder"
            )

    # ------------------------------------------------------------------------------------------------ steps

    def draw_scenes(self) -> None:
        splits = {"train": self.sizes.train, "validation": self.sizes.validation, "test": self.sizes.test}
        missing = {
            name: n for name, n in splits.items() if not (self.folder / "scenes" / name / "scenes.json").exists()
        }
        if not missing:
            return
        say("scenes: pictures, captions of which some facts are false, questions")
        with progress(sum(missing.values()), "drawn", unit="scene") as bar:
            for name, number in missing.items():
                shutil.rmtree(self.folder / "scenes" / name, ignore_errors=True)  # half drawn
                for _ in write_scenes(self.folder / "scenes" / name, number, seed=f"{self.seed} {name}"):
                    bar.update()

    def train_parts(self) -> None:
        say("the parts that a real run downloads: a miniature CLIP and a miniature LLM, trained on scenes of their own")
        sizes, seed = self.sizes, self.seed
        clip = miniature("miniature CLIP", "vision", self.folder / "vision", steps=sizes.vision_steps, seed=seed)
        llm = miniature("miniature LLM", "language", self.folder / "llm", steps=sizes.llm_steps, seed=seed)
        self.side_by_side([clip, llm])

    def make_levels(self) -> None:
        """Scores, levels, their pictures, and the quarter of the pairs with the highest scores."""
        scores, leveled = self.folder / "scores", self.folder / "pairs-with-levels.json"
        best, report = self.folder / "top-quarter.json", self.folder / "pictures"
        pictures = ["--image-folder", str(self.train_scenes)]
        say("alignment: how well each caption fits its picture, cut into 8 levels")
        if not (scores / "manifest.json").exists():
            command = ["aligngpt", "score", str(self.pairs), "--model", str(self.folder / "vision"), *pictures]
            call([*command, "--out", str(scores), "--workers", "1"])
        if not (report / "contact-sheet.png").exists():  # what the command makes last
            command = ["aligngpt", "levels", str(scores), "--data", str(self.pairs), *pictures]
            outputs = ["--out", str(self.levels), "--json", str(leveled), "--report", str(report)]
            call([*command, *outputs])
        if not best.exists():
            records = json.loads(leveled.read_text(encoding="utf-8"))
            write_json(best, [record for record in records if record["align_level"] >= 6])

    def train_stages(self) -> None:
        say("stage 1: projector and alignment table learn from captions; beside it three rivals of the same budget")
        parts = ["--model.llm", str(self.folder / "llm"), "--model.vision", str(self.folder / "vision")]
        pairs = ["--data.path", str(self.pairs)]
        sizes = self.sizes
        budget = (sizes.stage_1_batch, 3e-3, sizes.stage_1_steps)
        jobs = []
        for name, options in (
            ("8 levels", [*pairs, "--data.levels", str(self.levels)]),
            ("no token", [*pairs, "--model.align-mode", "none"]),
            ("random levels", [*pairs, "--data.levels", "random"]),
            ("top quarter", ["--data.path", str(self.folder / "top-quarter.json"), "--model.align-mode", "none"]),
        ):
            jobs.append(self.training(f"stage 1: {name}", "pretrain", 1, budget, [*parts, *options]))
        self.side_by_side(jobs)

        say("stage 2: LLM, projector and gate learn from questions and answers")
        init = ["--model.init", str(jobs[0].result), "--data.template", "chat"]
        questions = ["--data.path", str(self.train_scenes / "questions.json")]
        budget = (sizes.stage_2_batch, 1e-3, sizes.stage_2_steps)
        self.side_by_side([self.training("stage 2", "finetune", 2, budget, [*init, *questions])])

    def training(
        self, name: str, script: str, processes: int, budget: tuple[int, float, int], options: list[str]
    ) -> Job:
        folder, images = self.run_folder(name), self.train_scenes
        return training(
            name, script, folder, options, budget=budget, image_folder=images, seed=self.seed, processes=processes
        )

    def run_folder(self, name: str) -> Path:
        return self.folder / slug(name)

    def evaluate(self) -> None:
        """Scores on the test scenes to results.json and, as a table, to the terminal; the pictures."""
        path = self.folder / "results.json"
        say("evaluation, on test scenes of two and three objects")
        if not path.exists():
            from transformers.utils import logging

            from demo.evaluate import (
                Speaker,
                evaluate_answers,
                evaluate_captions,
                evaluate_levels,
                read_questions,
            )
            from demo.pictures import draw_answers, draw_gate, draw_losses

            logging.disable_progress_bar()  # a bar for each model that is loaded
            test, pictures = self.folder / "scenes/test", self.folder / "pictures"
            stage_1 = {name: self.run_folder(f"stage 1: {name}") for name in ("8 levels", *RIVALS)}
            captioner = Speaker.load(stage_1["8 levels"] / "model")
            answerer = Speaker.load(self.folder / "stage-2/model")
            captions = {}
            with progress(8 + 1 + len(RIVALS) + 1, "evaluated", unit="set") as bar:
                for level in range(8):
                    captions[f"level {level}"] = evaluate_captions(captioner, test, level=level)
                    bar.update()
                captions["another picture"] = evaluate_captions(captioner, test, level=7, another_picture=True)
                bar.update()
                for name in RIVALS:
                    rival, level_7 = Speaker.load(stage_1[name] / "model"), 7 if name == "random levels" else None
                    captions[name] = evaluate_captions(rival, test, level=level_7)
                    bar.update()
                answers = evaluate_answers(answerer, test)
                bar.update()
            asked = read_questions(self.folder / "scenes/validation")
            runs = {"CLIP": self.folder / "vision", "LLM": self.folder / "llm"}
            runs |= {f"stage 1: {name}": folder for name, folder in stage_1.items()}
            draw_losses(runs | {"stage 2": self.folder / "stage-2"}, pictures / "losses.png")
            draw_gate(answerer, asked, pictures / "gate.png")
            draw_answers(answerer, captioner, asked, pictures / "answers.png")
            levels = evaluate_levels(self.levels, self.pairs)
            write_json(path, {"levels": levels, "captions": captions, "answers": answers})
        print(format_results(json.loads(path.read_text(encoding="utf-8"))))
        print(f"\npictures: {', '.join(sorted(str(file) for file in (self.folder / 'pictures').glob('*.png')))}")

    def chat(self) -> None:
        say("a question about a picture")
        questions = json.loads((self.folder / "scenes/test/questions.json").read_text(encoding="utf-8"))
        question = questions[0]
        prompt = question["conversations"][0]["value"].removeprefix("<image>\n")
        picture = self.folder / "scenes/test" / question["image"]
        command = ["aligngpt", "chat", str(self.folder / "stage-2/model"), "--image", str(picture), "--prompt", prompt]
        call(command)
        print(f"(right: {question['conversations'][1]['value']})")

    def side_by_side(self, jobs: Sequence[Job]) -> None:
        side_by_side(jobs, self.folder / "logs")


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def format_results(results: dict[str, Any]) -> str:
    """The tables of results.json."""
    levels, captions, answers = results["levels"], results["captions"], results["answers"]
    lines = [
        "",
        "true alignment of the pairs in levels 0 to 7: "
        + " ".join(f"{mean:.2f}" for mean in levels["mean true alignment"]),
        f"rank correlation of CLIP's score with it: {levels['rank correlation']:.2f}",
        "",
        f"{'captions, by what stage 1 was given':38}{'true facts':>14}{'whole objects (F1)':>24}",
        f"{'':38}{'sampled':>8}{'greedy':>8}{'sampled':>14}{'greedy':>8}",
    ]
    for name, label in (
        ("level 7", "8 levels, asked for level 7"),
        ("level 4", "8 levels, asked for level 4"),
        ("level 0", "8 levels, asked for level 0"),
        ("no token", "no alignment token"),
        ("random levels", "random levels, asked for level 7"),
        ("top quarter", "no token, CLIP's top quarter alone"),
        ("another picture", "chance: level 7, another picture"),
    ):
        row = captions[name]
        lines.append(
            f"{label:38}{row['sampled fact precision']:8.2f}{row['greedy fact precision']:8.2f}"
            f"{row['sampled object F1']:14.2f}{row['greedy object F1']:8.2f}"
        )
    lines += ["", f"{'answers':14}{'right':>8}{'reference':>12}{'another picture':>18}{'questions':>12}"]
    for kind, row in answers.items():
        references = f"{row['reference']:12.2f}{row['another picture']:18.2f}"
        lines.append(f"{kind:14}{row['accuracy']:8.2f}{references}{row['questions']:12}")
    lines.append("reference: any object's answer; for count and presence always the commonest answer")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
