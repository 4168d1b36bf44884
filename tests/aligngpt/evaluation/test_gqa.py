"""GQA's files to questions, and answers to its accuracies by hand."""

from pathlib import Path

import pytest

from aligngpt.evaluation import gqa

ASKED = {  # structural and semantic type, label, answer
    "201307251": ("verify", "obj", "no", "No."),  # right
    "201307252": ("query", "attr", "light blue", "Light Blue.."),  # right
    "201640614": ("query", "attr", "blue", "the blue"),  # wrong: articles count
    "202225914": ("choose", "rel", "left", "left!"),  # wrong: only periods are dropped
    "202225915": ("query", "rel", "table", " table\n"),  # right
}
SAID = {"gqa": [answer for *_, answer in ASKED.values()]}


def write_files(write, draw) -> Path:
    rows, labels = [], {}
    for key, (structural, semantic, answer, _) in ASKED.items():
        draw(f"gqa/data/images/n{key[:6]}.jpg")
        rows.append({"question_id": key, "image": f"n{key[:6]}.jpg", "text": f"Is it {key}?", "category": "default"})
        labels[key] = {
            "semantic": [],
            "entailed": [],
            "question": f"Is it {key}?",
            "isBalanced": True,
            "answer": answer,
            "types": {"detailed": "any", "semantic": semantic, "structural": structural},
        }
    write("gqa/data/testdev_balanced_questions.json", dict(reversed(labels.items())))
    return write("gqa/llava_gqa_testdev_balanced.jsonl", rows, lines=True)


def test_accuracy_by_hand(files: Path, root: Path, evaluate) -> None:
    questions = gqa.questions(root)
    assert [(question.key, question.prompt) for question in questions] == [(key, f"Is it {key}?") for key in ASKED]
    assert questions[0].image == root / "gqa/data/images/n201307.jpg"
    assert list(map(gqa.credit, questions, SAID["gqa"])) == [1, 1, 0, 0, 1]
    outcome = evaluate("gqa", SAID["gqa"])
    assert outcome.headline == pytest.approx(60)
    assert outcome.metrics == {
        "questions": 5,
        "accuracy": pytest.approx(60),
        "kind": {
            "binary": {"questions": 2, "accuracy": 50},
            "open": {"questions": 3, "accuracy": pytest.approx(200 / 3)},
        },
        "structural": {
            "choose": {"questions": 1, "accuracy": 0},
            "query": {"questions": 3, "accuracy": pytest.approx(200 / 3)},
            "verify": {"questions": 1, "accuracy": 100},
        },
        "semantic": {
            "attr": {"questions": 2, "accuracy": 50},
            "obj": {"questions": 1, "accuracy": 100},
            "rel": {"questions": 2, "accuracy": 50},
        },
    }


def test_what_is_wrong_is_named(files: Path, root: Path) -> None:
    labels = root / "gqa/data/testdev_balanced_questions.json"
    for path, old, new, said in (
        (
            files,
            '"201307252"',
            '"7"',
            r"balanced.jsonl: line 2: 'question_id' is 7; needs one of testdev_balanced_quest",
        ),
        (files, files.read_text().splitlines()[0], "", r"questions.json: '201307251' is not in llava_gqa_testdev_bal"),
        (
            labels,
            '"structural"',
            '"structure"',
            r"questions.json: '201307251': 'types': 'structural' is missing; needs",
        ),
        (labels, '"answer": "no"', '"answer": 0', r"'201307251': 'answer' is 0; needs a string"),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            gqa.questions(root)
        path.write_text(text)
