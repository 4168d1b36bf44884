"""TextVQA: questions about the text in a picture (arXiv 1904.08920).

    textvqa/llava_textvqa_val_v051_ocr.jsonl    question_id, image, text; question_id is the picture's
    textvqa/TextVQA_0.5.1_val.json              data: image_id, question, answers
    textvqa/train_images/                       pictures

The prompts hold what an OCR system read: "question", "Reference OCR token: …", "Answer the question …", a line each.
`textvqa-ocr`, the paper's, asks them as they stand, `textvqa` without the line in the middle. Labels are found by
picture and question in lower case. The number is M4C's accuracy in percent.
"""

from collections import Counter
from functools import partial
from pathlib import Path

from .files import Row, json_row, jsonl_rows, picture
from .short_answers import averages, m4c_accuracy
from .task import Answered, Outcome, Question, Task

_HUMANS = 10


def questions(root: Path, ocr: bool) -> list[Question]:
    labels = {
        (row.id("image_id"), row.text("question").lower()): row
        for row in json_row(root / "textvqa/TextVQA_0.5.1_val.json").rows("data")
    }
    asked: Counter[str] = Counter()
    found = []
    for row in jsonl_rows(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl"):
        of, text = row.id("question_id"), row.text("text")
        lines = [line for line in text.split("\n") if not line.startswith("Reference OCR token:")]
        if len(lines) != 2:
            raise row.wrong(
                "text", f"is {text!r}", "a question, 'Reference OCR token: …' and how to answer, a line each"
            )
        if (of, lines[0].lower()) not in labels:
            raise row.wrong(
                "text", f"asks {lines[0]!r} of {of}", "a question of that picture in TextVQA_0.5.1_val.json"
            )
        asked[of] += 1
        facts = {"answers": _answers(labels[of, lines[0].lower()])}
        image = picture(root / "textvqa/train_images", row.text("image"), row)
        found.append(Question(f"{of}-{asked[of]}", text if ocr else "\n".join(lines), image, 128, facts))
    return found


def _answers(label: Row) -> list[str]:
    found = label.texts("answers")
    if len(found) != _HUMANS:
        raise label.wrong("answers", f"holds {len(found)}", f"{_HUMANS} answers")
    return found


def credit(question: Question, answer: str) -> float:
    return m4c_accuracy(answer, question.facts["answers"])


def score(answered: Answered) -> Outcome:
    metrics = averages(answered, credit)
    return Outcome(metrics["accuracy"], metrics)


TASKS = (
    Task("textvqa", "TextVQA without OCR tokens", "", partial(questions, ocr=False), credit, score),
    Task("textvqa-ocr", "TextVQA", "TextVQA", partial(questions, ocr=True), credit, score),
)
