"""A field of questions answered by `aligngpt eval`'s runner, against `generate` asked one question after the other.

Both go from POPE's files, pictures of 640 x 480 in JPEG and six questions about each, to a score; the runner also keeps
every answer in a file as it comes. Answers are cut to NEW tokens, so that a random model, which never ends one, gives
as long a one as a trained model does.

In float32 both must give the answers of the same model in float64, every one, and their score. In 16 bits two tokens
may be as good as equally likely: the first answers are then judged as bench_generate judges them, and ours has recorded
how many of the others' answers are the same, as `equal_answers`.

A GPU has the shapes of 7B, a CPU the demo's sizes. Reading the files' questions is timed, making the engine is not.
"""

import contextlib
import copy
import dataclasses
import io
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aligngpt.evaluation import answers, pope, runner
from aligngpt.evaluation.ablation import Condition
from aligngpt.evaluation.task import Answered, Question, Task
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.processor import AlignGPTProcessor
from aligngpt.team import Team
from benchmarks import bench_generate, lengths
from benchmarks.bench_generate import (
    DEMO,
    MICRO,
    ONE_AT_A_TIME,
    Work,
    kept_bytes,
    make_model,
    none_lacking,
    plain_error,
    plain_lacking,
    shortfall,
    twin,
    whole_work,
)
from benchmarks.bench_images import photo
from benchmarks.bench_step import LLAMA_7B, Size
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs, Run, count_syncs, peak_bytes

NEW = 4
PER_PICTURE = 6  # questions
Answers = dict[str, str]  # by the questions' keys


class Field(NamedTuple):
    """The inputs of a case."""

    root: Path  # POPE's files, as long as the last of these lives
    task: Task
    questions: Sequence[Question]
    engine: Any  # of ours
    peer: AlignGPTForConditionalGeneration  # the same weights, with attention by SDPA
    processor: AlignGPTProcessor
    said: dict[str, Answers]  # by contender, in its latest call
    kept: dict[str, int]  # bytes that a contender keeps between calls

    @property
    def model(self) -> AlignGPTForConditionalGeneration:
        return self.engine.model


def cut_questions(root: Path) -> list[Question]:
    return [dataclasses.replace(question, max_new_tokens=NEW) for question in pope.questions(root)]


def make(device: torch.device, size: Size, dtype: torch.dtype, questions: int, rows: int) -> Field:
    root = Path(tempfile.mkdtemp(prefix="bench-evaluation-"))
    words = 40 // size.scale + 4
    write_pope(root, questions, words, size.vocabulary)
    task = dataclasses.replace(pope.TASKS[0], questions=cut_questions)
    model = make_model(size, device, dtype)
    model.generation_config.suppress_tokens = list(range(len(lengths.SPECIAL)))  # which a text would not show
    processor = lengths.processor(size.vocabulary, scale=size.scale, image_size=size.image_size, template="chat")
    work = runner.read_work(task, root, None)
    peer = twin(model)
    engine = runner.make_engine(model, processor, rows, runner.needed_length([work], processor, model))
    weakref.finalize(engine, shutil.rmtree, root, ignore_errors=True)
    return Field(root, task, work.questions, engine, peer, processor, {}, {})


def write_pope(root: Path, questions: int, words: int, vocabulary: int) -> None:
    """Its four files and the photos that they ask about."""
    (root / "pope/coco").mkdir(parents=True)
    (root / "pope/val2014").mkdir()
    for number in range(-(-questions // PER_PICTURE)):
        photo(number).save(root / f"pope/val2014/{number}.jpg", quality=90)
    first = len(lengths.SPECIAL)
    rows: list[dict[str, object]] = []
    for place, category in enumerate(("adversarial", "popular", "random")):
        labels = []
        for number in range(place * questions // 3, (place + 1) * questions // 3):
            spoken = [f"w{first + (31 * number + 7 * word) % (vocabulary - first)}" for word in range(words)]
            asked = {"image": f"{number // PER_PICTURE}.jpg", "text": " ".join(spoken)}
            labels.append({**asked, "label": ("yes", "no")[number % 2]})
            rows.append({"question_id": number, **asked, "category": category})
        (root / f"pope/coco/coco_pope_{category}.json").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (root / "pope/llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------ contenders


def ours(field: Field) -> Run:
    def run() -> Outputs:
        out = Path(tempfile.mkdtemp(dir=field.root))
        work = runner.read_work(field.task, field.root, None)
        condition = Condition("", field.model.config.align_mode, None)
        everything = runner.Run(out, field.root, field.engine, Team(0, 1, 0, None), {}, {}, workers=2)
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            ((result,),) = runner.run_tasks(everything, [work], [condition]).values()
        field.said["ours"] = answers.read_answers(out / field.task.name)
        shutil.rmtree(out)
        return outputs(field, field.said["ours"], result["headline"])

    if "ours" not in field.kept:  # the engine makes its cache when it is first used
        field.kept["ours"] = kept_bytes(run, field.model.device)
    return run


def one_at_a_time(field: Field) -> Run:
    def run() -> Outputs:
        found = answered_by(field, field.peer)
        field.said[ONE_AT_A_TIME] = found
        return outputs(field, found, score(field, found))

    return run


def answered_by(field: Field, model: Any) -> Answers:
    """`generate`'s answers, as a user of transformers asks for them."""
    found = {}
    for question in field.task.questions(field.root):
        inputs = inputs_of(question, field)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=question.max_new_tokens)
        said = field.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found[question.key] = said.strip()
    return found


def inputs_of(question: Question, field: Field) -> dict[str, Tensor]:
    shown = [{"type": "image", "image": question.image}, {"type": "text", "text": question.prompt}]
    inputs = field.processor.apply_chat_template([{"role": "user", "content": shown}], tokenize=True)
    return {name: value.to(field.model.device) for name, value in inputs.items()}


def score(field: Field, found: Answers) -> float:
    outcome = field.task.score(Answered(field.root, field.questions, found, field.root))
    assert outcome.headline is not None
    return outcome.headline


def outputs(field: Field, found: Answers, headline: float) -> Outputs:
    """Tokens (questions, NEW) of the answers, -1 where there is none, and the score."""
    tokens = torch.full((len(field.questions), NEW), -1)
    for row, question in zip(tokens, field.questions, strict=True):
        ids = field.processor.tokenizer(found[question.key], add_special_tokens=False)["input_ids"][:NEW]
        row[: len(ids)] = torch.tensor(ids)
    return [tokens, torch.tensor(headline, dtype=torch.float64)]


# ------------------------------------------------------------------------------------------------ what is right


def exact_answers(field: Field) -> Outputs:
    """Those of the model in float64."""
    found = answered_by(field, copy.deepcopy(field.peer).double())
    return outputs(field, found, score(field, found))


def asked(field: Field, size: Size) -> bench_generate.Asked:
    """The first questions as bench_generate judges answers."""
    prompts = [inputs_of(question, field) for question in field.questions[: bench_generate.CHECKED]]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    work = Work(size, longest, NEW, len(prompts), pictures=False, dtype=field.model.dtype)
    found = bench_generate.Asked(work, field.model, field.peer, field.processor, prompts, 0.0)
    return found._replace(error=plain_error(found))


def lacking(field: Field, found: Outputs, size: Size) -> Outputs:
    """How far the logits of the first answers' tokens lie below the largest."""
    judged = asked(field, size)
    return shortfall(judged, [found[0][: judged.work.requests].clamp(min=0)])


def memory(run: Run, field: Field, seconds: float, *, name: str) -> dict[str, Any]:
    """What it keeps between calls, and the peak together with that."""
    kept = field.kept.get(name, 0)
    return {"kept_bytes": kept, "peak_bytes": kept + peak_bytes(run, field.model.device)}


def done(field: Field, size: Size, rows: int) -> dict[str, Any]:
    """Work of all answers, so many at a time. All prompts are equally long."""
    prompt = inputs_of(field.questions[0], field)["input_ids"].shape[1]
    text = prompt - lengths.IMAGE_ROWS // size.scale
    of_rows = whole_work(Work(size, text, NEW, rows, pictures=True, dtype=field.model.dtype))
    times = len(field.questions) / rows
    return {"bytes": int(times * of_rows.bytes), "flops": int(times * of_rows.flops)}


def equal_answers(run: Run, field: Field, seconds: float, *, size: Size, rows: int) -> dict[str, Any]:
    """Memory, waits for the device, what there is to do, and how many answers are those of the peer."""
    found = memory(run, field, seconds, name="ours") | {"syncs": count_syncs(run, field.model.device)}
    found |= done(field, size, rows)
    if {"ours", ONE_AT_A_TIME} <= field.said.keys():
        mine, other = field.said["ours"], field.said[ONE_AT_A_TIME]
        found |= {"equal_answers": sum(mine[key] == other[key] for key in mine), "questions": len(mine)}
    return found


def case(size: Size, dtype: torch.dtype, questions: int, rows: int, rounds: int) -> Case:
    assert questions % 3 == 0
    is_exact = dtype == torch.float32
    finish = None if is_exact else partial(lacking, size=size)
    return Case(
        name=f"evaluation: {questions} questions in POPE's form, {rows} at a time",
        make=partial(make, size=size, dtype=dtype, questions=questions, rows=rows),
        contenders={
            "ours": Contender(ours, finish, details=partial(equal_answers, size=size, rows=rows)),
            ONE_AT_A_TIME: Contender(one_at_a_time, finish, details=partial(memory, name=ONE_AT_A_TIME)),
        },
        exact=exact_answers if is_exact else lambda field: none_lacking(asked(field, size)),
        plain=(lambda field: []) if is_exact else lambda field: plain_lacking(asked(field, size)),
        stage="evaluation",
        clock="host",
        items=questions,
        unit="answers",
        group="evaluation",
        equal=is_exact,
        rounds=rounds,
        trains=True,
        one_copy=True,
    )


def cases() -> list[Case]:
    return [case(LLAMA_7B, torch.bfloat16, questions=96, rows=32, rounds=2)]


def cpu_cases() -> list[Case]:
    return [case(DEMO, torch.float32, questions=48, rows=16, rounds=3)]


def small_cases() -> list[Case]:
    return [case(MICRO, torch.float32, questions=6, rows=2, rounds=2)]


def test_evaluation(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
