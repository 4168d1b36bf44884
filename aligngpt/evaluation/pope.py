"""POPE: whether there is such an object in the picture (arXiv 2305.10355).

    pope/llava_pope_test.jsonl                                  question_id, image, text, category
    pope/coco/coco_pope_{adversarial,popular,random}.json       image, text, label: in each category in the same order
    pope/val2014/                                               pictures

The label files are those of POPE's commit e3e39262, which LLaVA's instructions name: 3000, 3000 and 2910 lines. Later
ones ask about other pictures; since labels are found by their place, each question has to be that of its label.

An answer says no if its first sentence holds the word "No", "no" or "not", else yes. Each category has accuracy,
precision, recall and F1 of "yes", and the share of "yes"; the paper's number is the mean F1 of the three, in percent.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .files import Row, jsonl_rows, picture
from .task import Answered, Outcome, Question, Task, percent

_CATEGORIES = ("adversarial", "popular", "random")


def questions(root: Path) -> list[Question]:
    labels = {
        category: iter(list(jsonl_rows(root / f"pope/coco/coco_pope_{category}.json"))) for category in _CATEGORIES
    }
    found = []
    for row in jsonl_rows(root / "pope/llava_pope_test.jsonl"):
        category, image = row.text("category"), row.text("image")
        if category not in labels:
            raise row.wrong("category", f"is {category!r}", f"one of {', '.join(_CATEGORIES)}")
        label = next(labels[category], None)
        if label is None:
            raise row.wrong("category", f"is {category!r}", f"as many of them as coco_pope_{category}.json has labels")
        if label.text("image") != image or row.text("text").split("\n")[0] != label.text("text"):
            raise row.wrong(
                "text",
                f"asks {row.text('text')!r} of {image}",
                f"{label.text('text')!r} of {label.text('image')}, as {label.where} has it",
            )
        facts = {"category": category, "yes": _is_yes(label)}
        found.append(
            Question(row.id("question_id"), row.text("text"), picture(root / "pope/val2014", image, row), 128, facts)
        )
    for label in (next(rows, None) for rows in labels.values()):
        if label is not None:
            raise ValueError(
                f"{label.where}: no question of llava_pope_test.jsonl is left for it; needs one for each label"
            )
    return found


def _is_yes(label: Row) -> bool:
    if label.text("label") not in ("yes", "no"):
        raise label.wrong("label", f"is {label.text('label')!r}", "yes or no")
    return label.text("label") == "yes"


def says_yes(answer: str) -> bool:
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def credit(question: Question, answer: str) -> float:
    return float(says_yes(answer) == question.facts["yes"])


def score(answered: Answered) -> Outcome:
    metrics = {}
    for category in _CATEGORIES:
        asked = [question for question in answered.questions if question.facts["category"] == category]
        if asked:
            metrics[category] = _binary(
                [says_yes(answered.answers[question.key]) for question in asked],
                [question.facts["yes"] for question in asked],
            )
    mean = sum(found["f1"] for found in metrics.values()) / len(metrics)
    return Outcome(mean, metrics)


def _binary(said: Sequence[bool], true: Sequence[bool]) -> dict[str, float]:
    count = Counter(zip(said, true, strict=True))
    hits = count[True, True]
    precision = percent(hits, hits + count[True, False])
    recall = percent(hits, hits + count[False, True])
    return {
        "questions": len(said),
        "accuracy": percent(hits + count[False, False], len(said)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": percent(hits + count[True, False], len(said)),
    }


TASKS = (Task("pope", "POPE", "POPE", questions, credit, score),)
