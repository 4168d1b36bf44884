"""POPE's files to questions, and answers to its numbers, worked out by hand."""

from pathlib import Path

import pytest

from aligngpt.evaluation import pope

ASKED = {  # category: label and answer of each question
    # "yes" is said 3 times, right twice; of 3 true ones one is missed: precision 2/3, recall 2/3, F1 2/3, accuracy 3/5.
    "adversarial": [
        ("yes", "Yes"),
        ("yes", "Yes, it is."),
        ("yes", "no"),
        ("no", "Yes. It has no tail."),
        ("no", "There are not, I think"),
    ],
    # Nothing but "yes": precision 1/2, recall 1, F1 2/3.
    "popular": [("yes", "yes"), ("no", "nothing"), ("no", "No,")],
    "random": [("no", "No"), ("yes", "I see none")],  # all right
}
LINE = "\nAnswer the question using a single word or phrase."
SAID = {"pope": [answer for asked in ASKED.values() for _, answer in asked]}


def write_files(write, draw) -> Path:
    rows, number = [], 0
    for category, asked in ASKED.items():
        labels = []
        for label, _ in asked:
            name = f"COCO_val2014_{number % 2:012}.jpg"
            draw(f"pope/val2014/{name}")
            text = f"Is there a {number}?"
            rows.append({"question_id": number, "image": name, "text": text + LINE, "category": category})
            labels.append({"question_id": len(labels) + 1, "image": name, "text": text, "label": label})
            number += 1
        write(f"pope/coco/coco_pope_{category}.json", labels, lines=True)
    return write("pope/llava_pope_test.jsonl", rows, lines=True)


def test_numbers_by_hand(files: Path, root: Path, evaluate) -> None:
    questions = pope.questions(root)
    assert [question.prompt for question in questions] == [f"Is there a {number}?{LINE}" for number in range(10)]
    assert questions[3].image == root / "pope/val2014/COCO_val2014_000000000001.jpg"
    outcome = evaluate("pope", SAID["pope"])
    wanted = {
        "adversarial": {"accuracy": 60, "precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3, "yes_ratio": 60},
        "popular": {"accuracy": 200 / 3, "precision": 50, "recall": 100, "f1": 200 / 3, "yes_ratio": 200 / 3},
        "random": {"accuracy": 100, "precision": 100, "recall": 100, "f1": 100, "yes_ratio": 50},
    }
    for category, numbers in wanted.items():
        assert outcome.metrics[category] == pytest.approx(numbers | {"questions": len(ASKED[category])}), category
    assert outcome.headline == pytest.approx((200 / 3 + 200 / 3 + 100) / 3)
    assert sum(map(pope.credit, questions, SAID["pope"])) == 3 + 2 + 2


def test_what_is_wrong_is_named(files: Path, root: Path, write) -> None:
    text = files.read_text()
    for broken, said in (
        (text.replace('"text"', '"prompt"', 1), r"llava_pope_test.jsonl: line 1: 'text' is missing; needs a string"),
        (text.replace("adversarial", "easy", 1), r"line 1: 'category' is 'easy'; needs one of adversarial"),
        (
            text.replace("000000000000.jpg", "000000000009.jpg", 1),
            r"line 1: 'text' asks .* of .*009.jpg; needs 'Is there a 0\?' of .*, as .*adversarial.json: line 1 has",
        ),
        (  # another of the same picture, as in other versions of POPE
            text.replace("a 2?", "a 4?", 1),
            r"line 3: 'text' asks 'Is there a 4\?.*; needs 'Is there a 2\?' of .*_adversarial.json: line 3 has it",
        ),
        (
            text + text.splitlines()[-1],
            r"line 11: 'category' is 'random'; needs as many of them as coco_pope_ran",
        ),
        (text.replace("}\n", "\n", 1), r"llava_pope_test.jsonl: line 1, column"),
        (text[: text.rstrip().rindex("\n") + 1], r"coco_pope_random.json: line 2: no question"),
    ):
        files.write_text(broken)
        with pytest.raises(ValueError, match=said):
            pope.questions(root)
    files.write_text(text)
    next((root / "pope/val2014").iterdir()).unlink()
    with pytest.raises(
        ValueError, match=r"line \d: its picture .* is no file; needs the benchmark's pictures in .*val2014"
    ):
        pope.questions(root)
