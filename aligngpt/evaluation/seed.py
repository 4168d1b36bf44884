"""SEED-Bench: multiple choice about pictures and about frames of videos (arXiv 2307.16125).

    seed_bench/llava-seed-bench.jsonl       question_id, image (below seed_bench/), text
    seed_bench/SEED-Bench.json              questions: question_id, answer, question_type_id, data_type (image, video);
                                            question_type: the dimensions' ids by name
    seed_bench/SEED-Bench-image/            pictures
    seed_bench/SEED-Bench-video-image/      the middle frames of the videos

An answer is right if it is the letter and nothing else: "B." is wrong. The paper's number, SEED-Bench-IMG, is the
accuracy over the questions about pictures, in percent. Where the folder of frames is missing, only these are asked:
`video` says how many are missing, and there is no accuracy of all. Questions without a label are not asked: later
versions of SEED-Bench.json label fewer about videos. The leaderboard takes seed_upload.jsonl.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import Row, json_row, jsonl_rows, picture
from .task import Answered, Outcome, Question, Task, average


def questions(root: Path) -> list[Question]:
    folder = root / "seed_bench"
    frames = (folder / "SEED-Bench-video-image").is_dir()
    labels = {
        label.id("question_id"): label for label in _labels(root)[0] if frames or label.text("data_type") == "image"
    }
    found = {}
    for row in jsonl_rows(folder / "llava-seed-bench.jsonl"):
        key = row.id("question_id")
        if key in labels:
            facts = {"answer": labels[key].text("answer")}
            found[key] = Question(key, row.text("text"), picture(folder, row.text("image"), row), 128, facts)
    for key, label in labels.items():
        if key not in found:
            raise label.wrong("question_id", f"is {key!r}", "a question in llava-seed-bench.jsonl")
    return list(found.values())


def _labels(root: Path) -> tuple[list[Row], dict[int, str]]:
    """The labelled questions, and the dimensions' names by id, in the order of their ids."""
    path = root / "seed_bench/SEED-Bench.json"
    file = json_row(path)
    types = file.row("question_type")
    dimensions = dict(sorted((types.whole(name), name) for name in types.content))
    labels = [Row(content, f"{path}: question {number}") for number, content in enumerate(file.items("questions"))]
    for label in labels:
        if label.text("data_type") not in ("image", "video"):
            raise label.wrong("data_type", f"is {label.text('data_type')!r}", "image or video")
        if label.whole("question_type_id") not in dimensions:
            raise label.wrong("question_type_id", f"is {label.whole('question_type_id')}", "an id of 'question_type'")
    return labels, dimensions


def credit(question: Question, answer: str) -> float:
    return float(answer.strip() == question.facts["answer"])


def score(answered: Answered) -> Outcome:
    labels, dimensions = _labels(answered.root)
    said = {question.key: answered.answers[question.key].strip() for question in answered.questions}
    asked = [label for label in labels if label.id("question_id") in said]
    kinds = {kind: [label for label in asked if label.text("data_type") == kind] for kind in ("image", "video")}
    metrics: dict[str, Any] = {kind: _accuracy(found, said) for kind, found in kinds.items()}
    missing = 0 if answered.partly else len(labels) - len(asked)
    if missing:
        metrics["video"] = {"questions": 0, "missing": missing}
    else:
        metrics["all"] = _accuracy(asked, said)
    metrics["dimensions"] = {}
    for number, name in dimensions.items():
        found = [label for label in asked if label.whole("question_type_id") == number]
        if found:
            metrics["dimensions"][name] = _accuracy(found, said)["accuracy"]
    lines = (
        json.dumps({"question_id": label.content["question_id"], "prediction": said[label.id("question_id")]}) + "\n"
        for label in asked
    )
    files = {} if answered.partly else {"seed_upload.jsonl": "".join(lines).encode()}
    if not kinds["image"]:
        return Outcome(None, metrics, "questions about pictures: a larger --limit", files)
    return Outcome(metrics["image"]["accuracy"], metrics, files=files)


def _accuracy(labels: Sequence[Row], said: Mapping[str, str]) -> dict[str, Any]:
    return average([said[label.id("question_id")] == label.text("answer") for label in labels])


TASKS = (Task("seed", "SEED-Bench-IMG", "SEED", questions, credit, score),)
