"""GQA: questions made from scene graphs, its balanced test-dev split (arXiv 1902.09506).

    gqa/llava_gqa_testdev_balanced.jsonl        question_id, image, text
    gqa/data/testdev_balanced_questions.json    by question_id: answer, types (structural, semantic)
    gqa/data/images/                            pictures

An answer is right that is the label's, letter for letter, once it is in lower case and without periods at its end. The
number is the accuracy in percent; it is also given for binary and open questions and by type, as the official eval.py
does. Its consistency, validity, plausibility, grounding and distribution, which want other files, are left out.
"""

from pathlib import Path

from .files import Row, json_row, jsonl_rows, picture
from .short_answers import averages
from .task import Answered, Outcome, Question, Task


def questions(root: Path) -> list[Question]:
    labels = json_row(root / "gqa/data/testdev_balanced_questions.json")
    left = set(labels.content)
    found = []
    for row in jsonl_rows(root / "gqa/llava_gqa_testdev_balanced.jsonl"):
        key = row.id("question_id")
        if key not in labels:
            raise row.wrong("question_id", f"is {key}", "one of testdev_balanced_questions.json")
        left.discard(key)
        image = picture(root / "gqa/data/images", row.text("image"), row)
        found.append(Question(key, row.text("text"), image, 128, _facts(labels.row(key))))
    if left:
        raise ValueError(
            f"{labels.where}: {min(left)!r} is not in llava_gqa_testdev_balanced.jsonl; needs a question for each label"
        )
    return found


def _facts(label: Row) -> dict[str, str]:
    types = label.row("types")
    structural = types.text("structural")
    return {
        "answer": label.text("answer"),
        "kind": "open" if structural == "query" else "binary",
        "structural": structural,
        "semantic": types.text("semantic"),
    }


def credit(question: Question, answer: str) -> float:
    return float(answer.strip().rstrip(".").lower() == question.facts["answer"])


def score(answered: Answered) -> Outcome:
    metrics = averages(answered, credit, "kind", "structural", "semantic")
    return Outcome(metrics["accuracy"], metrics)


TASKS = (Task("gqa", "GQA", "GQA", questions, credit, score),)
