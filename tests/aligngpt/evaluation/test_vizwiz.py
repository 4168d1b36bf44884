"""VizWiz's files to questions, to what its server takes, and to the accuracy of its labelled split by hand."""

import json
from pathlib import Path

import pytest

from aligngpt.evaluation import vizwiz
from aligngpt.evaluation.runner import find_task
from aligngpt.evaluation.task import Answered

ENDING = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)
VAL = [  # the answer's type, humans' answers and the model's
    ("unanswerable", ["unanswerable"] * 8 + ["unsuitable"] * 2, "Unanswerable"),  # 1
    ("unanswerable", ["unanswerable"] * 2 + ["blurry"] * 8, "unanswerable."),  # 2 of 10: 0.6
    ("other", ["Coca Cola"] * 7 + ["coca cola"] + ["soda"] * 2, "Coca Cola"),  # humans' "Coca Cola" counts not: 0.3
    ("number", ["12 oz"] * 10, "12,oz"),  # uploaded as "12oz": 0
]
SAID = {"vizwiz": ["Unanswerable", "The 1,000 cans."], "vizwiz-val": [answer for *_, answer in VAL]}


def write_files(write, draw) -> tuple[Path, Path]:
    return write_unlabelled(write, draw), write_labelled(write, draw)


def write_unlabelled(write, draw) -> Path:
    rows = []
    for number in range(2):
        name = f"VizWiz_test_{number:08}.jpg"
        draw(f"vizwiz/test/{name}")
        rows.append({"question_id": number, "image": name, "text": f"What {number}?{ENDING}", "category": "default"})
    return write("vizwiz/llava_test.jsonl", rows, lines=True)


def write_labelled(write, draw) -> Path:
    rows = []
    for number, (answer_type, humans, _) in enumerate(VAL):
        name = f"VizWiz_val_{number:08}.jpg"
        draw(f"vizwiz/val/{name}")
        answers = [{"answer": human, "answer_confidence": "yes"} for human in humans]
        answerable = int(answer_type != "unanswerable")
        rows.append(
            {
                "image": name,
                "question": f"What {number}?",
                "answers": answers,
                "answer_type": answer_type,
                "answerable": answerable,
            }
        )
    return write("vizwiz/val.json", rows)


def test_submission(files: tuple[Path, Path], root: Path, evaluate) -> None:
    task = find_task("vizwiz")
    questions = task.questions(root)
    assert [question.prompt for question in questions] == [f"What 0?{ENDING}", f"What 1?{ENDING}"]
    assert task.credit(questions[0], "yes") is None
    outcome = evaluate("vizwiz", SAID["vizwiz"])
    assert outcome.headline is None
    (name,) = outcome.files
    assert outcome.needs.startswith(f"its server: upload {name} to https:")
    assert json.loads(outcome.files[name]) == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "1000 cans"},
    ]
    assert task.score(Answered(root, questions[:1], {"0": "can"}, root, partly=True)).files == {}


def test_accuracy_by_hand(files: tuple[Path, Path], root: Path, evaluate) -> None:
    task = find_task("vizwiz-val")
    questions = task.questions(root)
    assert questions[1].prompt == f"What 1?{ENDING}"
    assert questions[1].image == root / "vizwiz/val/VizWiz_val_00000001.jpg"
    assert list(map(task.credit, questions, SAID["vizwiz-val"])) == pytest.approx([1, 0.6, 0.3, 0])
    outcome = evaluate("vizwiz-val", SAID["vizwiz-val"])
    assert outcome.headline == pytest.approx(100 * 1.9 / 4)
    assert outcome.metrics == {
        "questions": 4,
        "accuracy": pytest.approx(47.5),
        "answer_type": {
            "number": {"questions": 1, "accuracy": 0},
            "other": {"questions": 1, "accuracy": pytest.approx(30)},
            "unanswerable": {"questions": 2, "accuracy": pytest.approx(80)},
        },
    }


def test_what_is_wrong_is_named(files: tuple[Path, Path], root: Path) -> None:
    unlabelled, labelled = files
    for path, ask, old, new, said in (
        (unlabelled, vizwiz.test_questions, '"image"', '"picture"', r"llava_test.jsonl: line 1: 'image' is missing"),
        (
            unlabelled,
            vizwiz.test_questions,
            "00000001.jpg",
            "00000009.jpg",
            r"line 2: its picture .*00000009.jpg is no file",
        ),
        (labelled, vizwiz.val_questions, '"answer_type"', '"type"', r"val.json: record 0: 'answer_type' is missing"),
        (
            labelled,
            vizwiz.val_questions,
            '"answers": [',
            '"answers": [7, ',
            r"record 0: 'answers'\[0\]: is 7; needs an obj",
        ),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            ask(root)
        path.write_text(text)
