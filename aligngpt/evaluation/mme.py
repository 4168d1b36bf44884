"""MME: two questions on each picture, one with the answer yes and one with no (arXiv 2306.13394).

    MME/llava_mme.jsonl                                question_id (<category>/…/<picture>), image, text
    MME/MME_Benchmark_release_version/<category>/      pictures, and for each a <picture>.txt with its two labels
    …/<category>/images/, questions_answers_YN/        the same in categories that hold them apart

A label is a question that ends in "Please answer yes or no.", a tab, and Yes or No. An answer says yes if its first
four characters hold "yes", else no if they hold "no" ("Not" does, "I know" does not); anything else is wrong on both
sides. A category scores its accuracy plus the share of its pictures with both answers right (`acc_plus`), up to 200;
perception, the paper's number, is the sum over ten categories, cognition that over four. The <category>.txt files are
for the official eval_tool/calculation.py; white space in their answers is folded, for it splits lines at tabs.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import Row, jsonl_rows, picture, read_bytes
from .task import Answered, Outcome, Question, Task, percent

_KINDS = {
    "perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
_CATEGORIES = [category for categories in _KINDS.values() for category in categories]
_BRIEFLY, _YES_OR_NO = "Answer the question using a single word or phrase.", "Please answer yes or no."


def questions(root: Path) -> list[Question]:
    folder = root / "MME/MME_Benchmark_release_version"
    if (folder / "MME_Benchmark").is_dir():  # as later archives have it
        folder /= "MME_Benchmark"
    labels: dict[Path, Mapping[str, str]] = {}
    asked: Counter[str] = Counter()
    found = []
    for row in jsonl_rows(root / "MME/llava_mme.jsonl"):
        parts = row.text("question_id").split("/")
        category, stem = parts[0], parts[-1].partition(".")[0]
        if category not in _CATEGORIES:
            raise row.wrong("question_id", f"is of {category!r}", f"one of {', '.join(_CATEGORIES)}")
        apart = (folder / category / "images").is_dir()
        file = folder / category / ("questions_answers_YN" if apart else "") / f"{stem}.txt"
        if file not in labels:
            labels[file] = _labels(file)
        question = _labelled(row, labels[file], file)
        shown = f"{category}/{stem}"
        asked[shown] += 1
        facts = {"category": category, "picture": stem, "question": question, "label": labels[file][question]}
        image = picture(folder, row.text("image"), row)
        found.append(Question(f"{shown}-{asked[shown]}", row.text("text"), image, 128, facts, shown))
    for shown, number in asked.items():
        if number != 2:
            raise ValueError(
                f"{root / 'MME/llava_mme.jsonl'}: {shown} has {number} questions; needs 2 for each picture"
            )
    return found


def _labels(file: Path) -> dict[str, str]:
    """Yes or No by question."""
    found = {}
    for number, line in enumerate(read_bytes(file).decode("utf-8", "replace").split("\n"), 1):
        if line.strip():
            question, _, label = line.strip().partition("\t")
            if label.lower() not in ("yes", "no"):
                raise ValueError(f"{file}: line {number}: {line.strip()!r}; needs a question, a tab, and Yes or No")
            found[question] = label
    return found


def _labelled(row: Row, labels: Mapping[str, str], file: Path) -> str:
    """The question as the label file has it: one or two spaces stand before its last sentence."""
    question = row.text("text").replace(_BRIEFLY, "").strip()
    forms = [question] if _YES_OR_NO in question else [f"{question} {_YES_OR_NO}", f"{question}  {_YES_OR_NO}"]
    for form in forms:
        if form in labels:
            return form
    raise row.wrong("text", f"asks {question!r}", f"a question of {file}")


def verdict(answer: str) -> str:
    """yes, no or other."""
    start = " ".join(answer.split()).lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def credit(question: Question, answer: str) -> float:
    return float(verdict(answer) == question.facts["label"].lower())


def score(answered: Answered) -> Outcome:
    pictures: dict[str, dict[str, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for question in answered.questions:
        pictures[question.facts["category"]][question.facts["picture"]].append(question)
    metrics: dict[str, dict[str, Any]] = {}
    for kind, categories in _KINDS.items():
        scored = {category: _scored(pictures[category], answered) for category in categories if category in pictures}
        metrics[kind] = {"score": sum(found["score"] for found in scored.values()), **scored}
    files = {} if answered.partly else {f"{name}.txt": _lines(pictures[name], answered) for name in pictures}
    if not any(category in pictures for category in _KINDS["perception"]):
        return Outcome(None, metrics, "questions of perception: a larger --limit", files)
    return Outcome(metrics["perception"]["score"], metrics, files=files)


def _scored(pictures: Mapping[str, list[Question]], answered: Answered) -> dict[str, float]:
    both = [questions for questions in pictures.values() if len(questions) == 2]
    right = {q.key: credit(q, answered.answers[q.key]) for questions in pictures.values() for q in questions}
    accuracy = percent(sum(right.values()), len(right))
    plus = percent(sum(all(right[question.key] for question in questions) for questions in both), len(both))
    return {
        "score": accuracy + plus,
        "acc": accuracy,
        "acc_plus": plus,
        "questions": len(right),
        "other": sum(verdict(answered.answers[key]) == "other" for key in right),
    }


def _lines(pictures: Mapping[str, list[Question]], answered: Answered) -> bytes:
    """In the official tool's format, the two of a picture together."""
    lines = []
    for name, questions in pictures.items():
        for question in questions:
            answer = " ".join(answered.answers[question.key].split())
            lines.append("\t".join((f"{name}.txt", question.facts["question"], question.facts["label"], answer)) + "\n")
    return "".join(lines).encode()


TASKS = (Task("mme", "MME", "MME", questions, credit, score),)
