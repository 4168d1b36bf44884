"""Answers the questions of benchmarks with the generation engine, and keeps every answer.

    OUT/run.json                    which model, how it was asked; a folder begun otherwise is refused
    OUT/pope/questions.json         a hash of the task's questions
    OUT/pope/answers-0.jsonl        the answers to process 0, a line each; a run that was killed goes on after the last
    OUT/pope/answers.jsonl          all answers in the order of the questions, once there are all
    OUT/pope/metrics.json           the score, beside the files that a server takes
    OUT/report.md, OUT/report.json  the scores beside the paper's

With conditions (`ablation.py`) a task's folder is OUT/<condition>/<task>. All questions of all tasks are read, their
pictures found and their prompts measured before the first is answered. The processes of torchrun share what is left of
a task evenly, each on its own GPU; they may be others in number than those that began it. An answer that was written
is never asked again: at most those are lost that a killed process was giving.

Answers are greedy. As in the model's own `generate`, its generation_config's end tokens, suppress_tokens and
repetition_penalty count; its other settings don't.
"""

import hashlib
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.llava_json import parse_json
from ..data.tables import differences, whole_file, write_json
from ..generate import LONGEST, Engine, Request, window_of
from ..model import AlignGPTForConditionalGeneration
from ..processor import AlignGPTProcessor
from ..sampling import Sampling
from ..team import Team
from ..text import IMAGE_MARK, Tokenized, Turn, render
from .ablation import Condition
from .answers import AnswerFile, join_answers, read_answers
from .task import Answered, Question, Task

if TYPE_CHECKING:
    from .judge import Judge

TASKS = {  # by file
    "vqav2": ("vqav2", "vqav2-val"),
    "gqa": ("gqa",),
    "vizwiz": ("vizwiz", "vizwiz-val"),
    "scienceqa": ("scienceqa",),
    "textvqa": ("textvqa", "textvqa-ocr"),
    "pope": ("pope",),
    "mme": ("mme",),
    "mmbench": ("mmbench", "mmbench-cn"),
    "seed": ("seed",),
    "llava_bench": ("llava-bench",),
    "mmvet": ("mmvet",),
}
NAMES = [name for names in TASKS.values() for name in names]


def find_task(name: str) -> Task:
    """The benchmark of that name. ValueError: there is none."""
    for file, names in TASKS.items():
        if name in names:
            return next(task for task in import_module(f".{file}", __package__).TASKS if task.name == name)
    raise ValueError(f"--task holds {name!r}; it needs names among {', '.join(NAMES)}, or all")


def find_tasks(names: str) -> list[Task]:
    """The benchmarks of these names, with commas between them; "all": the paper's, TextVQA in both ways."""
    if names == "all":
        return [task for task in map(find_task, NAMES) if not task.is_extra]
    return [find_task(name) for name in dict.fromkeys(name.strip() for name in names.split(","))]


@dataclass(frozen=True)
class Work:
    """A task to be answered. `chosen` are the questions that are asked: all, or evenly spaced ones."""

    task: Task
    questions: Sequence[Question]
    chosen: Sequence[Question]

    @property
    def sha256(self) -> str:
        """Of the questions as they are asked; of a picture's file its name, so that a damaged one may be replaced."""
        digest = hashlib.sha256()
        for question in self.questions:
            image: Any = question.image
            if isinstance(image, bytes):
                image = hashlib.sha256(image).hexdigest()
            elif image is not None:
                image = image.name
            digest.update(json.dumps([question.key, question.prompt, image, question.max_new_tokens]).encode() + b"\n")
        return digest.hexdigest()


def read_work(task: Task, root: Path, limit: int | None) -> Work:
    """ValueError: a file is missing or wrong, or two questions have one key."""
    questions = task.questions(root)
    if not questions:
        raise ValueError(f"{task.title} has no question in {root}; its official files hold some")
    seen: set[str] = set()
    for question in questions:
        if question.key in seen:
            raise ValueError(
                f"{task.title} has two questions called {question.key!r} in {root}; each needs its own name"
            )
        seen.add(question.key)
    return Work(task, questions, questions if limit is None else _evenly(questions, limit))


def read_all(tasks: Sequence[Task], root: Path, limit: int | None) -> list[Work]:
    """ValueError, with all that is wrong: a line for each task that can't be asked."""
    work: list[Work] = []
    wrong: dict[str, ValueError] = {}
    for task in tasks:
        try:
            work.append(read_work(task, root, limit))
        except ValueError as error:
            wrong[task.name] = error
    if len(wrong) > 1:
        lines = "".join(f"\n  {name}: {error}" for name, error in wrong.items())
        raise ValueError(f"--task names {len(tasks)} benchmarks; {len(wrong)} of them need other --data:{lines}")
    for only in wrong.values():
        raise only
    return work


def _evenly(questions: Sequence[Question], limit: int) -> list[Question]:
    """About so many of them, evenly spaced, in their order; all or none of a group."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        groups[f"group {question.group}" if question.group else f"key {question.key}"].append(place)
    count = max(min(limit, len(questions)) * len(groups) // len(questions), 1)
    each = list(groups.values())
    chosen = [place for number in range(count) for place in each[number * len(each) // count]]
    return [questions[place] for place in sorted(chosen)]


# ---------------------------------------------------------------------------------------------------- prompts


def prompt_of(question: Question, processor: AlignGPTProcessor) -> Tokenized:
    """A question in the model's template, up to where the answer begins."""
    has_image = question.image is not None
    name = f"question {question.key}"
    parts = render(
        [Turn("user", f"{IMAGE_MARK}\n" * has_image + question.prompt)],
        processor.template,
        tokenizer=processor.tokenizer,
        add_generation_prompt=True,
        has_images=has_image,
        name=name,
    )
    return processor.tokenize(parts, num_images=int(has_image), max_length=None, name=name)


def requests_of(
    questions: Sequence[Question],
    processor: AlignGPTProcessor,
    level: int | None,
    workers: int,
    ahead: int,
    repetition_penalty: float = 1.0,
) -> Iterator[Request]:
    """The questions as the engine takes them, in order; threads read pictures for about `ahead` questions in front.

    One picture is often asked about several times in a row: it is then read once.
    """
    groups = (list(group) for _, group in itertools.groupby(questions, key=lambda question: question.image))
    with ThreadPoolExecutor(workers) as pool:
        begun: deque[tuple[list[Question], Future[Tensor]]] = deque()
        waiting = 0
        try:
            while True:
                while waiting < ahead and (group := next(groups, None)) is not None:
                    begun.append((group, pool.submit(_pixels, group[0], processor)))
                    waiting += len(group)
                if not begun:
                    return
                group, pixels = begun.popleft()
                for question in group:
                    prompt = prompt_of(question, processor)
                    inputs = {"input_ids": prompt.input_ids[None], "gate_mask": prompt.gate_mask[None]}
                    if question.image is not None:
                        inputs["pixel_values"] = pixels.result()
                    own_level = None if question.image is None else level
                    sampling = Sampling(question.max_new_tokens, repetition_penalty=repetition_penalty)
                    yield Request(inputs, sampling, own_level)
                waiting -= len(group)
        finally:
            for _, pixels in begun:
                pixels.cancel()


def _pixels(question: Question, processor: AlignGPTProcessor) -> Tensor:
    """Of its picture (1, 3, size, size), prepared as in training; of none (0, 3, size, size)."""
    pictures, image = processor.image_processor, question.image
    if image is None:
        return pictures.normalised([])
    name = str(image) if isinstance(image, Path) else f"the picture of question {question.key}"
    return pictures.normalised([pictures.read(image, name)])


# ---------------------------------------------------------------------------------------------------- a run

_RESULT = {
    "task",
    "title",
    "column",
    "headline",
    "metrics",
    "needs",
    "questions",
    "partly",
    "credit",
    "files",
    "answered",
    "seconds",
}


@dataclass(frozen=True)
class Run:
    """What all tasks share.

    about: what makes answers comparable: model, processor, precision, condition; a folder keeps to one.
    how: what may differ from sitting to sitting.
    """

    out: Path
    root: Path
    engine: Engine
    everyone: Team
    about: Mapping[str, Any]
    how: Mapping[str, Any]
    workers: int
    judge: "Judge | None" = None


def needed_length(
    work: Iterable[Work],
    processor: AlignGPTProcessor,
    model: AlignGPTForConditionalGeneration,
    rank: int = 0,
    size: int = 1,
) -> int:
    """Tokens of the longest prompt and its answer, or the model's window; of a process's share of the questions.

    ValueError: a prompt is longer than the window.
    """
    most = min(window_of(model.config.text_config), LONGEST)
    longest = 0
    for piece in work:
        for question in piece.chosen[rank::size]:
            try:
                length = len(prompt_of(question, processor).input_ids)
            except ValueError as error:  # names the question
                raise ValueError(f"{piece.task.title}: {error}") from error
            if length >= most:
                raise ValueError(
                    f"question {question.key} of {piece.task.title} has {length} tokens; the model reads {most}, its "
                    "answer included"
                )
            longest = max(longest, length + question.max_new_tokens)
    return min(longest, most)


def make_engine(
    model: AlignGPTForConditionalGeneration, processor: AlignGPTProcessor, batch_size: int, max_length: int
) -> Engine:
    """For throughput: steps of all rows alone, which compile once."""
    step_rows = [batch_size] if model.device.type == "cuda" else None
    return Engine(model, processor, max_batch_size=batch_size, max_length=max_length, step_rows=step_rows)


def claim(run: Run) -> None:
    """Say in the folder what it holds. ValueError: it holds something else. Done by one process."""
    path = run.out / "run.json"
    if path.is_file():
        found = parse_json(path.read_bytes(), path, "what a run wrote")
        if differing := differences(run.about, found if isinstance(found, dict) else {}):
            raise ValueError(
                f"--out {run.out} holds answers that were given otherwise: {', '.join(differing)}; it needs a folder "
                "of its own"
            )
    write_json(path, {**run.about, **run.how}, indent=1)


def claim_task(folder: Path, work: Work) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path, about = folder / "questions.json", {"task": work.task.name, "questions": len(work.questions)}
    about["sha256"] = work.sha256
    if path.is_file() and parse_json(path.read_bytes(), path, "what a run wrote") != about:
        raise ValueError(
            f"{folder} holds answers to other questions than {work.task.title} has in the data now; --out needs a "
            "folder of its own"
        )
    for left in folder.glob("*.tmp"):  # by processes that were killed
        left.unlink()
    write_json(path, about, indent=1)


def run_task(
    run: Run, folder: Path, work: Work, level: int | None, unscored: list[Exception] | None = None
) -> dict[str, Any]:
    """Answer what is left of a task and score it; what metrics.json holds ({} in all processes but the first).

    unscored: takes what goes wrong in scoring, so that other tasks can be answered first.
    """
    everyone = run.everyone
    is_first = everyone.rank == 0
    everyone.agree(lambda: claim_task(folder, work) if is_first else None)
    known = everyone.agree(lambda: read_answers(folder))
    left = [question for question in work.chosen if question.key not in known]
    everyone.gather(None)  # all have read before any writes
    share = left[len(left) * everyone.rank // everyone.size : len(left) * (everyone.rank + 1) // everyone.size]
    started = time.monotonic()
    everyone.agree(lambda: answer(run, folder, work, share, level, known))
    seconds = time.monotonic() - started

    def finished() -> dict[str, Any]:
        try:
            return finish(run, folder, work, len(left), seconds) if is_first else {}
        except (ValueError, OSError) as error:
            if unscored is None:
                raise
            unscored.append(error)
            return {}

    return everyone.agree(finished)


def answer(
    run: Run, folder: Path, work: Work, share: Sequence[Question], level: int | None, known: Mapping[str, str]
) -> None:
    """Have these questions answered, with a bar that tells how well it goes in the first process."""
    from tqdm import tqdm

    task, everyone = work.task, run.everyone
    label = task.title if everyone.size == 1 else f"{task.title}, 1 of {everyone.size} shares"
    is_first = everyone.rank == 0
    done = [question for question in work.chosen if question.key in known]
    credits = Mean()
    for question in done if is_first else ():
        credits.add(task.credit(question, known[question.key]))
    engine, errors = run.engine, list[Exception]()
    penalty = engine.model.generation_config.repetition_penalty or 1.0
    requests = requests_of(share, engine.processor, level, run.workers, 4 * engine.max_batch_size, penalty)
    file = AnswerFile(folder, everyone.rank)
    try:
        with tqdm(
            total=len(done) + len(share),
            initial=len(done),
            desc=label,
            unit="answer",
            disable=not is_first,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; a log is read later
        ) as bar:
            for question, given in zip(share, engine.run(_while_well(requests, everyone, errors)), strict=False):
                file.add(question, text := given.text.strip())
                if is_first:
                    credits.add(task.credit(question, text))
                    bar.set_postfix_str(credits.said, refresh=False)
                    bar.update()
        if errors:
            raise errors[0]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"--batch-size is {engine.max_batch_size}, for which the GPU's memory is too small; it needs fewer"
        ) from error
    finally:
        file.close()


def _while_well(requests: Iterator[Request], everyone: Team, errors: list[Exception]) -> Iterator[Request]:
    """Requests until one can't be made, here or in another process: those before it are answered and kept."""
    try:
        for request in requests:
            if everyone.failed:
                return
            yield request
    except (ValueError, OSError) as error:
        everyone.fail()
        errors.append(error)


class Mean:
    """Of the credits that are known."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, credit: float | None) -> None:
        if credit is not None:
            self.total, self.count = self.total + credit, self.count + 1

    @property
    def said(self) -> str:
        return f"{100 * self.total / self.count:.1f} % right so far" if self.count else ""


def finish(run: Run, folder: Path, work: Work, answered_now: int, seconds: float) -> dict[str, Any]:
    """Score a task whose chosen questions are all answered."""
    task, answers = work.task, read_answers(folder)
    if missing := [question.key for question in work.chosen if question.key not in answers]:
        raise ValueError(
            f"{folder} has no answer to {len(missing)} questions, {missing[0]!r} for one; it needs them all: give the "
            "command again"
        )
    join_answers(folder, work.questions, answers)
    outcome = task.score(
        Answered(run.root, work.chosen, answers, folder, run.judge, partly=len(work.chosen) < len(work.questions))
    )
    for name, content in outcome.files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content)
    path = folder / "metrics.json"
    timed = {"answered": answered_now, "seconds": round(seconds, 3) if answered_now else 0.0}
    if not answered_now and path.is_file():
        before = read_result(path)
        timed = {name: before[name] for name in timed}
    result = {
        "task": task.name,
        "title": task.title,
        "column": task.column,
        "headline": outcome.headline,
        "metrics": outcome.metrics,
        "needs": outcome.needs,
        "questions": len(work.chosen),
        "partly": len(work.chosen) < len(work.questions),
        "credit": mean_credit(_credits(work, answers)),
        "files": sorted(outcome.files),
        **timed,  # of the last sitting that answered anything
    }
    write_json(path, result, indent=1)
    return result


def mean_credit(credits: Sequence[float | None]) -> dict[str, float] | None:
    """What answers get by themselves, in percent, with its standard error. None: of some nobody here knows."""
    known = [100 * credit for credit in credits if credit is not None]
    if len(known) < len(credits):
        return None
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else 0.0
    return {"mean": statistics.fmean(known), "standard_error": error}


def read_result(path: Path) -> dict[str, Any]:
    """What a metrics.json holds. ValueError: it is none."""
    result = parse_json(path.read_bytes(), path, "what a run wrote, or to be removed")
    if not (isinstance(result, dict) and result.keys() >= _RESULT):
        raise ValueError(f"{path} is no result of a task; it needs to be what a run wrote, or to be removed")
    return result


def finished(out: Path, but: Iterable[str]) -> list[dict[str, Any]]:
    """The results of the tasks that a folder without conditions holds, but for some."""
    paths = [out / name / "metrics.json" for name in NAMES if name not in set(but)]
    return [read_result(path) for path in paths if path.is_file()]


def run_tasks(run: Run, work: Sequence[Work], conditions: Sequence[Condition]) -> dict[str, list[dict[str, Any]]]:
    """Answer and score all tasks under each condition, by condition; one without a name has its tasks in OUT itself.

    With several conditions a result has its "gain" over the first one's, where answers have a credit by themselves.
    What goes wrong in scoring, as with a judge, is raised when everything has been answered.
    """
    model, processor = run.engine.model, run.engine.processor
    results: dict[str, list[dict[str, Any]]] = {}
    unscored: list[Exception] = []
    for condition in conditions:
        model.config.align_mode = condition.align_mode
        processor.align = condition.align_mode != "none"
        results[condition.name] = [
            run_task(run, run.out / condition.name / piece.task.name, piece, condition.level, unscored)
            for piece in work
        ]

    def all_scored() -> None:
        if unscored:
            raise unscored[0]

    run.everyone.agree(all_scored)
    if run.everyone.rank == 0 and len(conditions) > 1:
        for number, piece in enumerate(work):
            credits = {name: _credits(piece, read_answers(run.out / name / piece.task.name)) for name in results}
            for name, several in results.items():
                several[number]["gain"] = _gain(credits[name], credits[conditions[0].name])
    return results


def _credits(work: Work, answers: Mapping[str, str]) -> list[float | None]:
    return [work.task.credit(question, answers[question.key]) for question in work.chosen]


def _gain(credits: Sequence[float | None], others: Sequence[float | None]) -> dict[str, float] | None:
    """How many points more of the same questions are answered right, with its standard error."""
    return mean_credit([None if a is None or b is None else a - b for a, b in zip(credits, others, strict=True)])
