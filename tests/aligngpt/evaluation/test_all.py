"""All benchmarks in one folder, laid out as eval.zip: each question reaches the model, each number its column."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aligngpt import AlignGPTProcessor
from aligngpt.evaluation import answers, report, runner
from aligngpt.evaluation.task import Question
from aligngpt.generate import Engine, Request

BENCHMARKS = {file: runpy.run_path(str(Path(__file__).with_name(f"test_{file}.py"))) for file in runner.TASKS}
SAID = {task: said for benchmark in BENCHMARKS.values() for task, said in benchmark["SAID"].items()}


@pytest.fixture
def files(write: Callable[..., Path], draw: Callable[..., Path]) -> None:
    """Those of all."""
    for benchmark in BENCHMARKS.values():
        benchmark["write_files"](write, draw)


def row(out: Path) -> list[str]:
    """This run's, of the report's table."""
    lines = (out / "report.md").read_text().splitlines()
    (ours,) = (line for line in lines if "(this run)" in line)
    return ours.strip("| ").split(" | ")[1:]


def test_every_number_is_in_its_column(files, command, judge_server) -> None:
    """The numbers are those that each benchmark's own test works out."""
    tasks = runner.find_tasks("all")
    assert [task.column for task in tasks if task.name != "textvqa"] == list(report.COLUMNS)
    out = command("all", said=[text for task in tasks for text in SAID[task.name]])
    numbers = ["server", "60.0", "server", "50.0", "73.3", "77.8", "125.0", "33.3", "50.0", "60.0"]
    assert row(out) == [*numbers, "judge", "judge"]
    results = json.loads((out / "report.json").read_text())["results"]
    assert [result["task"] for result in results] == [t.name for t in sorted(tasks, key=lambda t: not t.column)]
    assert {result["task"]: result["questions"] for result in results} == {
        task.name: len(SAID[task.name]) for task in tasks
    }
    for result in results:
        folder = out / result["task"]
        assert json.loads((folder / "metrics.json").read_text()) == result
        names = {path.name for path in folder.iterdir()}
        assert names == {"answers.jsonl", "questions.json", "metrics.json", *result["files"]}

    replies = {"system": "llava_bench", "user": "mmvet"}  # by who speaks first
    reply = {role: BENCHMARKS[file]["make_reply"]() for role, file in replies.items()}
    judge_server.reply = lambda request: reply[request["messages"][0]["role"]](request)
    command("all", "--judge-url", judge_server.url, "--judge-model", "gpt-4", said=[])  # nothing is asked again
    assert row(out) == [*numbers, "78.8", "45.0"]


def test_one_task_after_the_other_fills_one_report(files, command) -> None:
    command("pope")
    numbers = dict(zip(report.COLUMNS, row(command("gqa")), strict=True))
    assert {name for name, number in numbers.items() if number != report.NOTHING} == {"POPE", "GQA"}


def test_every_question_reaches_the_model(files, command, root: Path, model_folder: Path, monkeypatch) -> None:
    """Of all tasks, as a conversation that the processor gets; then the model's own answers are scored."""
    given: list[Request] = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda engine, request: given.append(request) or submit(engine, request))
    out = command(",".join(runner.NAMES))
    processor = AlignGPTProcessor.from_pretrained(model_folder)
    requests = iter(given)
    for task in map(runner.find_task, runner.NAMES):
        questions = task.questions(root)
        for question in questions:
            request = next(requests)
            shown = [{"type": "image", "image": question.image}] if question.image is not None else []
            content = [*shown, {"type": "text", "text": question.prompt}]
            inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
            for name in ("input_ids", "gate_mask", "pixel_values"):
                wanted, found = inputs.get(name), request.inputs.get(name)
                assert (wanted is None) == (found is None), (task.name, question.key, name)
                assert wanted is None or torch.equal(wanted, found), (task.name, question.key, name)
        answers = [json.loads(line) for line in (out / task.name / "answers.jsonl").read_bytes().splitlines()]
        assert [answer["key"] for answer in answers] == [question.key for question in questions]
        assert all(answer["answer"] for answer in answers)
        metrics = json.loads((out / task.name / "metrics.json").read_text())
        assert metrics["answered"] == metrics["questions"] == len(questions)
    assert next(requests, None) is None


def test_an_answer_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Whatever is in it: line ends of any kind, control characters, half a surrogate pair."""
    texts = ["", "a\nb\r\x1c\u0085\u2028c", '"\\u0041\x00', "反\U0001f600\ud83d"]
    file = answers.AnswerFile(tmp_path, 0)
    for text in texts:
        file.add(Question(f"of {text}", text, None, 1), text)
    file.close()
    assert answers.read_answers(tmp_path) == {f"of {text}": text for text in texts}
