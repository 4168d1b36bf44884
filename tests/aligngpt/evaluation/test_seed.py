"""SEED-Bench's files to questions, and answers to its numbers, worked out by hand."""

import json
import shutil
from pathlib import Path

import pytest

from aligngpt.evaluation import seed
from aligngpt.evaluation.task import Answered

DIMENSIONS = {"Action Recognition": 10, "Scene Understanding": 1, "Instance Counting": 5}
ASKED = {  # dimension, label and answer
    "101669": (5, "A", "A"),
    "101670": (5, "B", "B."),  # not the letter alone
    "36087": (1, "C", " C\n"),
    "36088": (1, "D", "d"),
    "36089": (1, "A", "A"),
    "v1": (10, "B", "B"),
    "v2": (10, "B", "C"),
}
SAID = {"seed": [answer for *_, answer in ASKED.values()]}


def write_files(write, draw) -> Path:
    rows, labels = [], []
    for name, (dimension, label, _) in ASKED.items():
        kind = "video" if dimension == 10 else "image"
        image = f"SEED-Bench{'-video' * (kind == 'video')}-image/{name}"
        picture = draw(f"seed_bench/{image}.png")
        picture.rename(picture.with_suffix(""))  # as there
        number = int(name) if name.isdigit() else name
        rows.append({"question_id": number, "image": image, "text": f"{name}?\nA. One", "category": dimension})
        labels.append({"question_id": name, "answer": label, "question_type_id": dimension, "data_type": kind})
    rows.append(rows[5] | {"question_id": "v3", "image": "has no label"})
    write("seed_bench/SEED-Bench.json", {"questions": labels[::-1], "question_type": DIMENSIONS})
    return write("seed_bench/llava-seed-bench.jsonl", rows, lines=True)


def test_numbers_by_hand(files: Path, root: Path, evaluate) -> None:
    questions = seed.questions(root)
    assert [question.key for question in questions] == list(ASKED)
    assert questions[0].prompt == "101669?\nA. One"
    assert questions[5].image == root / "seed_bench/SEED-Bench-video-image/v1"
    outcome = evaluate("seed", SAID["seed"])
    assert outcome.metrics == {
        "image": {"questions": 5, "accuracy": 60},  # 101669, 36087 and 36089
        "video": {"questions": 2, "accuracy": 50},
        "all": {"questions": 7, "accuracy": pytest.approx(400 / 7)},
        "dimensions": {
            "Scene Understanding": pytest.approx(200 / 3),
            "Instance Counting": 50,
            "Action Recognition": 50,
        },
    }
    assert list(outcome.metrics["dimensions"]) == sorted(DIMENSIONS, key=DIMENSIONS.__getitem__)
    assert outcome.headline == 60
    assert sum(map(seed.credit, questions, SAID["seed"])) == 4
    lines = [json.loads(line) for line in outcome.files["seed_upload.jsonl"].decode().splitlines()]
    wanted = [{"question_id": name, "prediction": answer.strip()} for name, (*_, answer) in ASKED.items()]
    assert lines == wanted[::-1]  # in the order of SEED-Bench.json


def test_a_part_without_pictures(files: Path, root: Path) -> None:
    part = seed.questions(root)[5:]
    outcome = seed.score(Answered(root, part, {"v1": "B", "v2": "B"}, root, partly=True))
    assert outcome.headline is None
    assert "pictures" in outcome.needs
    assert outcome.metrics["video"] == outcome.metrics["all"] == {"questions": 2, "accuracy": 100}
    assert not outcome.files


def test_without_frames(files: Path, root: Path, evaluate) -> None:
    shutil.rmtree(root / "seed_bench/SEED-Bench-video-image")
    questions = seed.questions(root)
    assert [question.key for question in questions] == list(ASKED)[:5]
    outcome = evaluate("seed", SAID["seed"][:5])
    assert outcome.metrics["image"] == {"questions": 5, "accuracy": 60}
    assert outcome.metrics["video"] == {"questions": 0, "missing": 2}
    assert "all" not in outcome.metrics
    assert set(outcome.metrics["dimensions"]) == {"Scene Understanding", "Instance Counting"}


def test_what_is_wrong_is_named(files: Path, root: Path) -> None:
    labels = root / "seed_bench/SEED-Bench.json"
    for file, old, new, said in (
        (files, ": 101669", ": 7", r"SEED-Bench.json: question 6: 'question_id' is '101669'; needs a question in"),
        (files, '"text": "v2', '"prompt": "v2', r"llava-seed-bench.jsonl: line 7: 'text' is missing; needs a string"),
        (
            labels,
            '"question_type_id": 5',
            '"question_type_id": 6',
            r"SEED-Bench.json: question 6: 'question_type_id' is 6",
        ),
        (labels, '"image"', '"text"', r"question 6: 'data_type' is 'text'; needs image or video"),
        (files, files.read_text().splitlines()[6], "", r"SEED-Bench.json: question 0: 'question_id' is 'v2'; needs a"),
    ):
        whole = file.read_text()
        start = whole.rindex(old)
        file.write_text(whole[:start] + new + whole[start + len(old) :])
        with pytest.raises(ValueError, match=said):
            seed.questions(root)
        file.write_text(whole)
    (root / "seed_bench/SEED-Bench-image/36088").unlink()
    with pytest.raises(ValueError, match=r"line 4: its picture .*36088 is no file"):
        seed.questions(root)
