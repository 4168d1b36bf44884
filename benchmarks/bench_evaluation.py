"""A benchmark of the field answered by `aligngpt eval`'s runner, against `generate` asked one question after the other.

Both go from POPE's files, pictures of 640 x 480 in JPEG and six questions about each, to answers as text; the runner
also writes them down and scores them. On a CPU, in float32, the answers must be the same before anything is timed. In
bf16 two tokens may be as good as equally likely, so on a GPU the share of equal answers is printed instead.

A CPU has the demo's sizes, a GPU those of 7B; weights are random, and every answer has NEW tokens.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aligngpt.evaluation import answers, pope, runner
from aligngpt.evaluation.ablation import Condition
from aligngpt.processor import AlignGPTProcessor
from aligngpt.team import Team
from benchmarks import lengths
from benchmarks.bench_generate import DEMO, make_model, twin
from benchmarks.bench_step import LLAMA_7B
from benchmarks.conftest import device_name
from benchmarks.measure import synchronize

GPU = torch.cuda.is_available()
SIZE, DTYPE, ROWS, QUESTIONS, ROUNDS = (
    (LLAMA_7B, torch.bfloat16, 32, 192, 1) if GPU else (DEMO, torch.float32, 32, 192, 3)
)
NEW = 4
WORDS = 40 // SIZE.scale + 4  # of a question
REQUIRED = 5  # times the answers a second, on a CPU


def write_pope(root: Path) -> None:
    (root / "pope/coco").mkdir(parents=True)
    (root / "pope/val2014").mkdir()
    lengths.with_photos([], root / "pope/val2014")
    rows: list[dict[str, object]] = []
    for place, category in enumerate(("adversarial", "popular", "random")):
        labels = []
        for number in range(place * QUESTIONS // 3, (place + 1) * QUESTIONS // 3):
            words = [f"w{10 + (31 * number + 7 * word) % 400}" for word in range(WORDS)]
            asked = {"image": f"{number // 6 % lengths.PHOTOS}.jpg", "text": " ".join(words)}
            labels.append({**asked, "label": ("yes", "no")[number % 2]})
            rows.append({"question_id": number, **asked, "category": category})
        (root / f"pope/coco/coco_pope_{category}.json").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (root / "pope/llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_at_a_time(work: runner.Work, model: Any, processor: AlignGPTProcessor) -> dict[str, str]:
    answers = {}
    for question in work.questions:
        shown = [{"type": "image", "image": question.image}, {"type": "text", "text": question.prompt}]
        inputs = processor.apply_chat_template([{"role": "user", "content": shown}], tokenize=True)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=question.max_new_tokens)
        said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers[question.key] = said.strip()
    return answers


def test_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio is printed, whatever it is."""
    question = pope.Question
    monkeypatch.setattr(
        pope, "Question", lambda key, prompt, image, longest, facts: question(key, prompt, image, NEW, facts)
    )
    write_pope(tmp_path / "eval")
    work = runner.read_work(pope.TASKS[0], tmp_path / "eval", None)
    device = torch.device("cuda" if GPU else "cpu")
    model = make_model(SIZE, device, DTYPE)
    plain = twin(model)
    processor = lengths.processor(SIZE.vocabulary, scale=SIZE.scale, image_size=SIZE.image_size, template="chat")
    length = runner.needed_length([work], processor, model)
    engine = runner.make_engine(model, processor, ROWS, length)
    folders = (tmp_path / f"out-{number}" for number in range(99))

    def ours() -> dict[str, str]:
        run = runner.Run(next(folders), tmp_path / "eval", engine, Team(0, 1, 0, None), {}, {}, workers=2)
        condition = Condition("", model.config.align_mode, None)
        runner.run_tasks(run, [work], [condition])
        return answers.read_answers(run.out / "pope")

    contenders: dict[str, Callable[[], dict[str, str]]] = {
        "ours": ours,
        "generate, one at a time": lambda: one_at_a_time(work, plain, processor),
    }
    first = {name: run() for name, run in contenders.items()}  # also compiles
    equal = sum(first["ours"][key] == said for key, said in first["generate, one at a time"].items())
    if not GPU:
        assert equal == QUESTIONS
    assert len(set(first["ours"].values())) > QUESTIONS // 20
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    print(f"\nevaluation: {QUESTIONS} questions, {length - NEW} tokens at most, {NEW} new, {device_name()}", end="")
    rates = {name: QUESTIONS / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        spread = f"{QUESTIONS / max(seconds[name]):.2f} to {QUESTIONS / min(seconds[name]):.2f}"
        print(f"\n  {name:<28}{rate:.2f} answers/s ({spread}, {ROUNDS} rounds)", end="")
    ratio = rates["ours"] / rates["generate, one at a time"]
    print(f"\n  ours is {ratio:.2f} × as fast; {equal} of {QUESTIONS} answers are the same", end="")
    print("" if GPU else f"; required: {REQUIRED}")
