"""VQAv2's files to questions, to what its server takes, and to the accuracy of its labelled split by hand."""

import json
from pathlib import Path

import pytest

from aligngpt.evaluation import vqav2
from aligngpt.evaluation.runner import find_task
from aligngpt.evaluation.task import Answered

ENDING = "\nAnswer the question using a single word or phrase."
VAL = {  # question: its type, the answer's type, humans' answers and the model's
    262148000: ("how many", "number", ["2"] * 6 + ["two"] * 2 + ["3"] * 2, "Two."),  # 8 of 10 once processed: 1
    262148001: ("how many", "number", ["1"] * 7 + ["three"] * 3, "3"),  # 3 of 10: 0.9
    393225000: (
        "is the",
        "yes/no",
        ["yes"] * 10,
        "Yes.",
    ),  # all agree: "yes" is compared as it stands, and uploaded so: 1
    393225001: ("what is the", "other", ["the world's"] * 9 + ["map"], "World's"),  # uploaded as "world 's": 0
}
SAID = {"vqav2": ["The two, dogs.", "a world's map"], "vqav2-val": [answer for *_, answer in VAL.values()]}


def write_files(write, draw) -> tuple[Path, Path]:
    return write_unlabelled(write, draw), write_labelled(write, draw)


def write_unlabelled(write, draw) -> Path:
    def row(number):
        return {
            "question_id": number,
            "image": f"COCO_test2015_{number // 1000:012}.jpg",
            "text": f"What is {number}?{ENDING}",
            "category": "default",
        }

    draw("vqav2/test2015/COCO_test2015_000000000001.jpg")
    write("vqav2/llava_vqav2_mscoco_test2015.jsonl", [row(number) for number in (2000, 1000, 1001, 3000)], lines=True)
    return write("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", [row(1001), row(1000)], lines=True)


def write_labelled(write, draw) -> Path:
    questions, annotations = [], []
    for number, (question_type, answer_type, humans, _) in VAL.items():
        draw(f"vqav2/val2014/COCO_val2014_{number // 1000:012}.jpg")
        questions.append({"image_id": number // 1000, "question": f"Is it {number}?", "question_id": number})
        answers = [
            {"answer": human, "answer_confidence": "yes", "answer_id": place} for place, human in enumerate(humans, 1)
        ]
        annotations.append(
            {
                "question_type": question_type,
                "multiple_choice_answer": humans[0],
                "answers": answers,
                "image_id": number // 1000,
                "answer_type": answer_type,
                "question_id": number,
            }
        )
    write("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": questions})
    return write(
        "vqav2/v2_mscoco_val2014_annotations.json", {"data_subtype": "val2014", "annotations": annotations[::-1]}
    )


def test_submission(files: tuple[Path, Path], root: Path, evaluate) -> None:
    task = find_task("vqav2")
    questions = task.questions(root)
    assert [(question.key, question.prompt) for question in questions] == [
        (number, f"What is {number}?{ENDING}") for number in ("1001", "1000")
    ]
    assert questions[0].image == root / "vqav2/test2015/COCO_test2015_000000000001.jpg"
    assert task.credit(questions[0], "yes") is None
    outcome = evaluate("vqav2", SAID["vqav2"])
    assert outcome.headline is None
    assert outcome.needs.startswith("its server: upload vqa_OpenEnded_mscoco_test2015_aligngpt_results.json to https:")
    assert {name: json.loads(content) for name, content in outcome.files.items()} == {
        "vqa_OpenEnded_mscoco_test2015_aligngpt_results.json": [
            {"question_id": 2000, "answer": ""},
            {"question_id": 1000, "answer": "world 's map"},
            {"question_id": 1001, "answer": "2 dogs"},
            {"question_id": 3000, "answer": ""},
        ]
    }
    partly = task.score(Answered(root, questions[:1], {"1001": "2"}, root, partly=True))
    assert partly.headline is None
    assert partly.needs.startswith("its server: ")
    assert partly.files == {}


def test_accuracy_by_hand(files: tuple[Path, Path], root: Path, evaluate) -> None:
    task = find_task("vqav2-val")
    questions = task.questions(root)
    assert [question.key for question in questions] == [str(number) for number in VAL]
    assert questions[0].prompt == f"Is it 262148000?{ENDING}"
    assert questions[2].image == root / "vqav2/val2014/COCO_val2014_000000393225.jpg"
    assert list(map(task.credit, questions, SAID["vqav2-val"])) == pytest.approx([1, 0.9, 1, 0])
    outcome = evaluate("vqav2-val", SAID["vqav2-val"])
    assert outcome.headline == pytest.approx(100 * 2.9 / 4)
    assert outcome.metrics == {
        "questions": 4,
        "accuracy": pytest.approx(72.5),
        "question_type": {
            "how many": {"questions": 2, "accuracy": pytest.approx(95)},
            "is the": {"questions": 1, "accuracy": 100},
            "what is the": {"questions": 1, "accuracy": 0},
        },
        "answer_type": {
            "number": {"questions": 2, "accuracy": pytest.approx(95)},
            "other": {"questions": 1, "accuracy": 0},
            "yes/no": {"questions": 1, "accuracy": 100},
        },
    }


def test_what_is_wrong_is_named(files: tuple[Path, Path], root: Path) -> None:
    unlabelled, labelled = files
    for path, ask, old, new, said in (
        (
            unlabelled,
            vqav2.test_questions,
            "1001",
            "4000",
            r"dev2015.jsonl: line 1: 'question_id' is 4000; needs one of ll",
        ),
        (unlabelled, vqav2.test_questions, '"text"', '"question"', r"line 1: 'text' is missing; needs a string"),
        (
            labelled,
            vqav2.val_questions,
            "393225001",
            "7",
            r"'questions'\[3\]: 'question_id' is 393225001; needs one of v2_ms",
        ),
        (
            labelled,
            vqav2.val_questions,
            '"answer"',
            '"a"',
            r"annotations.json: 'annotations'\[3\]: 'answers'\[0\]: 'answer' is",
        ),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            ask(root)
        path.write_text(text)
    (root / "vqav2/llava_vqav2_mscoco_test2015.jsonl").unlink()
    with pytest.raises(ValueError, match=r"llava_vqav2_mscoco_test2015.jsonl is no file"):
        vqav2.test_questions(root)
