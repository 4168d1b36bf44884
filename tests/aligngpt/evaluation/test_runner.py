"""The runner: what ends a sitting costs no answer, and what a folder holds is told as it is."""

import copy
import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aligngpt import AlignGPTProcessor
from aligngpt.data.tables import whole_file
from aligngpt.evaluation import answers, report, runner
from aligngpt.evaluation.ablation import Condition
from aligngpt.evaluation.task import Answered, Outcome, Question, Task
from aligngpt.generate import Engine
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.team import Team

ALONE = Team(0, 1, 0, None)
NEW = 6  # tokens of an answer
PICTURE = 3  # questions about each


def score(answered: Answered) -> Outcome:
    return Outcome(float(len(answered.questions)), {"questions": len(answered.questions)})


@pytest.fixture
def work(root: Path) -> Callable[..., runner.Work]:
    """Some questions of a task, about noise."""

    def work(count: int = 9, name: str = "pope", prompts: dict[int, str] | None = None) -> runner.Work:
        questions = []
        for number in range(count):
            picture = root / f"{number // PICTURE}.png"
            if not picture.exists():
                root.mkdir(exist_ok=True)
                noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).save(picture)
            prompt = (prompts or {}).get(number, f"What of {number}?")
            questions.append(Question(str(number), prompt, picture, NEW))
        return runner.Work(
            Task(name, name.upper(), "", lambda root: questions, lambda *_: 1.0, score), questions, questions
        )

    return work


@pytest.fixture
def model(talker: Any) -> Any:
    """One of its own, since an engine changes its model's attention."""
    return copy.deepcopy(talker)


@pytest.fixture
def processor(talker: Any, tokenizer: Any) -> AlignGPTProcessor:
    return AlignGPTProcessor.for_model(talker.config, AlignGPTImageProcessor(56), tokenizer)


@pytest.fixture
def run(model: Any, processor: AlignGPTProcessor, root: Path, tmp_path: Path) -> runner.Run:
    engine = runner.make_engine(model, processor, 2, 256)
    return runner.Run(tmp_path / "out", root, engine, ALONE, {"dtype": "fp32"}, {}, workers=2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What engines were asked."""
    submit, found = Engine.submit, list[Any]()
    monkeypatch.setattr(Engine, "submit", lambda self, request: found.append(request) or submit(self, request))
    return found


def lines(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_bytes().splitlines()]


def test_answers_before_a_damaged_picture_are_kept_and_it_may_be_replaced(work, run, asked, root):
    """By one of another size, too."""
    questions = work()
    whole = (root / "2.png").read_bytes()
    (root / "2.png").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"2\.png: can't be decoded"):
        runner.run_task(run, run.out / "pope", questions, None)
    assert lines(run.out / "pope/answers-0.jsonl") == list("012345")
    (root / "2.png").write_bytes(whole)
    asked.clear()
    assert runner.run_task(run, run.out / "pope", questions, None)["headline"] == 9
    assert len(asked) == 3
    assert lines(run.out / "pope/answers.jsonl") == list("012345678")


def test_a_failure_elsewhere_lets_what_was_asked_be_answered(work, run, asked):
    """Another process failed after this one had put its third question."""

    class Store:
        def check(self, names: list[str]) -> bool:
            return len(asked) >= 3

    everyone = Team(0, 2, 0, Store())  # type: ignore[arg-type]  # all that is asked of it
    questions, folder = work(), run.out / "pope"
    folder.mkdir(parents=True)
    told = runner.Run(run.out, run.root, run.engine, everyone, {}, {}, workers=2)
    runner.answer(told, folder, questions, questions.chosen, None, {})
    assert lines(folder / "answers-0.jsonl") == list("012")


def test_a_full_disk_is_told_with_the_file_and_half_an_answer_is_asked_again(work, run, monkeypatch):
    questions, folder = work(), run.out / "pope"
    write, room = os.write, [500]

    def full(file: int, content: bytes) -> int:
        if not content.startswith(b'{"key"') and room[0]:
            return write(file, content)
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(file, content[: room[0]])
        room[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*answers-0\.jsonl'"):
            runner.run_task(run, folder, questions, None)
    content = (folder / "answers-0.jsonl").read_bytes()
    assert len(content) == 500
    assert not content.endswith(b"\n")
    before = content.count(b"\n")
    assert runner.run_task(run, folder, questions, None)["answered"] == 9 - before
    assert lines(folder / "answers.jsonl") == list("012345678")


def test_a_full_disk_is_told_with_the_file_of_results_too(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*run\.json'"), whole_file(tmp_path / "run.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_penalty_of_the_models_own_counts_as_in_generate(work, run, talker, model, processor):
    questions, talker = work(), copy.deepcopy(talker)

    def alone(question: Question) -> str:
        shown = [{"type": "image", "image": question.image}, {"type": "text", "text": question.prompt}]
        inputs = processor.apply_chat_template([{"role": "user", "content": shown}], tokenize=True)
        tokens = talker.generate(**inputs, do_sample=False, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(tokens, skip_special_tokens=True).strip()

    plain = [alone(question) for question in questions.chosen]
    for name, value in (("repetition_penalty", 1.9), ("do_sample", True), ("temperature", 0.9), ("top_p", 0.5)):
        setattr(talker.generation_config, name, value)
        setattr(model.generation_config, name, value)
    runner.run_task(run, run.out / "pope", questions, None)
    found = list(answers.read_answers(run.out / "pope").values())
    assert found == [alone(question) for question in questions.chosen]
    assert found != plain


def test_only_its_own_files_are_answers_and_none_may_be_missing(work, run, monkeypatch):
    questions, folder = work(), run.out / "pope"
    folder.mkdir(parents=True)
    (folder / "answers-old.jsonl").write_text("mine\n")
    (folder / "answers.jsonl.7.tmp").write_text("of a process that was killed")
    assert runner.run_task(run, folder, questions, None)["answered"] == 9
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers-old.jsonl",
        "answers.jsonl",
        "metrics.json",
        "questions.json",
    ]
    monkeypatch.setattr(runner, "read_answers", lambda folder: {"1": "yes"})
    with pytest.raises(ValueError, match="has no answer to 8 questions, '0' for one"):
        runner.finish(run, folder, questions, 0, 0.0)
    assert lines(folder / "answers.jsonl") == list("012345678")


def test_the_processes_measure_all_prompts_between_them(work, talker, processor):
    questions = work(prompts={4: "What " * 40})
    longest = runner.needed_length([questions], processor, talker)
    shares = [runner.needed_length([questions], processor, talker, rank, 3) for rank in range(3)]
    assert max(shares) == shares[1] == longest
    assert max(shares[0], shares[2]) < longest
    assert runner.needed_length([work(1)], processor, talker, 2, 3) == 0
    with pytest.raises(ValueError, match="POPE: question 4: the text has 2 <image> marks"):
        runner.needed_length([work(prompts={4: "<image> What?"})], processor, talker)


def test_a_folders_results_are_those_of_all_its_tasks(work, run):
    for name in ("pope", "seed"):
        runner.run_task(run, run.out / name, work(name=name), None)
    assert [result["task"] for result in runner.finished(run.out, ["pope"])] == ["seed"]

    few = work(4)
    part = runner.run_task(run, run.out / "pope", runner.Work(few.task, work().questions, few.chosen), None)
    assert (part["questions"], part["answered"], part["partly"]) == (4, 9, True)  # answered by the sitting before
    assert "4 questions; last answered: 9 in" in report.console([part])
    (run.out / "pope/metrics.json").unlink()
    again = runner.run_task(run, run.out / "pope", work(), None)
    assert (again["answered"], again["seconds"]) == (0, 0)
    assert report.console([again]).endswith("9 questions")
    (run.out / "seed/metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"seed/metrics\.json is no result of a task"):
        runner.finished(run.out, [])


def test_a_damaged_run_json_is_refused(run):
    run.out.mkdir()
    (run.out / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="dtype is missing there, fp32 here"):
        runner.claim(run)


def test_too_little_memory_names_the_flag_and_keeps_what_was_answered(work, run, monkeypatch):
    read, calls = Engine._read, list[int]()

    def full(self: Engine, rows: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        read(self, rows)

    monkeypatch.setattr(Engine, "_read", full)
    with pytest.raises(ValueError, match="--batch-size is 2, for which the GPU's memory is too small; it needs fewer"):
        runner.run_task(run, run.out / "pope", work(), None)
    assert lines(run.out / "pope/answers-0.jsonl") == list("0123")


def test_what_fails_in_scoring_fails_when_all_is_answered(work, run, talker):
    """A judge that is away ends no run of hours."""

    def away(answered: Answered) -> Outcome:
        raise ValueError("judge: nobody is there")

    first = work(name="mmvet")
    first = runner.Work(replace(first.task, score=away), first.questions, first.chosen)
    everything = [first, work(name="pope")], [Condition("", talker.config.align_mode)]
    with pytest.raises(ValueError, match="judge: nobody is there"):
        runner.run_tasks(run, *everything)
    assert lines(run.out / "mmvet/answers.jsonl") == lines(run.out / "pope/answers.jsonl") == list("012345678")
    assert [result["task"] for result in runner.finished(run.out, [])] == ["pope"]
