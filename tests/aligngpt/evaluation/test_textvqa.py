"""TextVQA's files to questions with and without OCR tokens, and answers to M4C's accuracy by hand."""

from pathlib import Path

import pytest

from aligngpt.evaluation import textvqa
from aligngpt.evaluation.runner import find_task

ENDING = "Answer the question using a single word or phrase."
ASKED = [  # picture, question as labelled and as asked, OCR tokens; humans' answers and the model's
    (
        "003a8ae2ef43b901",
        "What brand?",
        "what brand?",
        "DAKOTA, DIGITAL",
        ["dakota"] * 3 + ["nous"] * 7,
        "Dakota.",
    ),  # 0.9
    ("003a8ae2ef43b901", "How many?", "How many?", "", ["2"] * 9 + ["none"], "zero"),  # 1 of 10: 0.3
    ("00685bc495504d61", "Whose is it?", "Whose is it?", "a\tb", ["mcdonald's"] * 10, "McDonald's"),  # 1
]
SAID = {name: [answer for *_, answer in ASKED] for name in ("textvqa", "textvqa-ocr")}


def write_files(write, draw) -> Path:
    rows, labels = [], []
    for number, (of, question, asked, tokens, humans, _) in enumerate(ASKED):
        draw(f"textvqa/train_images/{of}.jpg")
        text = f"{asked}\nReference OCR token: {tokens}\n{ENDING}"
        rows.append({"question_id": of, "image": f"{of}.jpg", "text": text, "category": "default"})
        labels.append({"question_id": 34602 + number, "image_id": of, "question": question, "answers": humans})
    write("textvqa/TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": labels[::-1]})
    return write("textvqa/llava_textvqa_val_v051_ocr.jsonl", rows, lines=True)


@pytest.mark.parametrize("name", SAID)
def test_accuracy_by_hand(name: str, files: Path, root: Path, evaluate) -> None:
    task = find_task(name)
    assert task.column == {"textvqa": "", "textvqa-ocr": "TextVQA"}[name]
    questions = task.questions(root)
    assert len({question.key for question in questions}) == len(questions) == 3
    middle = "Reference OCR token: {}\n" if name == "textvqa-ocr" else ""
    assert [question.prompt for question in questions] == [
        f"{asked}\n{middle.format(tokens)}{ENDING}" for _, _, asked, tokens, *_ in ASKED
    ]
    assert questions[1].image == root / "textvqa/train_images/003a8ae2ef43b901.jpg"
    assert list(map(task.credit, questions, SAID[name])) == pytest.approx([0.9, 0.3, 1])
    outcome = evaluate(name, SAID[name])
    assert outcome.headline == pytest.approx(100 * 2.2 / 3)
    assert outcome.metrics == {"questions": 3, "accuracy": outcome.headline}


def test_what_is_wrong_is_named(files: Path, root: Path) -> None:
    labels = root / "textvqa/TextVQA_0.5.1_val.json"
    for path, old, new, said in (
        (
            files,
            "many?",
            "few?",
            r"ocr.jsonl: line 2: 'text' asks 'How few\?' of 003a8ae2ef43b901; needs a question of",
        ),
        (files, r"a\tb\n", "ab ", r"line 3: 'text' is .*; needs a question, 'Reference OCR token: …' and how"),
        (labels, '["dakota", ', "[", r"val.json: 'data'\[2\]: 'answers' holds 9; needs 10 answers"),
        (labels, '"image_id"', '"image"', r"val.json: 'data'\[0\]: 'image_id' is missing; needs a string"),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            textvqa.questions(root, ocr=True)
        path.write_text(text)
