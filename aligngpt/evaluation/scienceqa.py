"""ScienceQA: multiple choice on school subjects, with and without a picture (arXiv 2209.09513).

    scienceqa/llava_test_CQM-A.json     id, image (for some), conversations: the question, then its solution
    scienceqa/pid_splits.json           test: the ids
    scienceqa/problems.json             by id: choices, answer (an index), hint, image, subject, grade
    scienceqa/images/test/<id>/         pictures

An answer says a letter in one of three ways: it is nothing else ("B"), it begins so ("B. …"), or "The answer is B" and
one more character stand in it exactly once: the first letter of "The answer is Berlin" counts, "B." does not. What says
no letter of the choices is wrong; `unparsed` counts it. The paper's number is the accuracy over the questions with a
picture, in percent; the others are asked for the official total. The classes are those of ScienceQA's own table.

Pictures are padded, as in training; AlignGPT's public script cuts the middle out of them here.
"""

import re
from pathlib import Path
from typing import Any

from .files import Row, json_row, json_rows, picture
from .task import Answered, Outcome, Question, Task, average, percent

_LETTERS = tuple("ABCDE")
_SUBJECTS = {"natural science": "natural", "social science": "social", "language science": "language"}
_GRADES = {f"grade{number}": "grades 1-6" if number <= 6 else "grades 7-12" for number in range(1, 13)}
_CONTEXTS = ("text context", "image context", "no context")


def questions(root: Path) -> list[Question]:
    folder = root / "scienceqa"
    splits, problems = json_row(folder / "pid_splits.json"), json_row(folder / "problems.json")
    left = dict.fromkeys(splits.texts("test"))
    found = []
    for row in json_rows(folder / "llava_test_CQM-A.json"):
        name = row.id("id")
        if name not in left:
            raise row.wrong("id", f"is {name!r}", "each id of pid_splits.json's 'test' once")
        del left[name]
        image = picture(folder / "images/test", row.text("image"), row) if "image" in row else None
        prompt = f"{_first_words(row)}\nAnswer with the option's letter from the given choices directly."
        facts = _facts(problems.row(name)) | {"pictured": image is not None}
        found.append(Question(name, prompt, image, 1024, facts))
    if left:
        raise splits.wrong("test", f"has {next(iter(left))!r}", "a question in llava_test_CQM-A.json for each id")
    return found


def _first_words(row: Row) -> str:
    turns = row.items("conversations")
    if not turns:
        raise row.wrong("conversations", "is empty", "the question first")
    return Row(turns[0], f"{row.where}: 'conversations'").text("value").replace("<image>", "").strip()


def _facts(problem: Row) -> dict[str, Any]:
    choices, answer = problem.texts("choices"), problem.whole("answer")
    if not 0 <= answer < len(choices) <= len(_LETTERS):
        raise problem.wrong("answer", f"is {answer} of {len(choices)} choices", f"an index of at most {len(_LETTERS)}")
    classes = []
    for field, known in (("subject", _SUBJECTS), ("grade", _GRADES)):
        if field in problem:
            value = problem.text(field)
            if value not in known:
                raise problem.wrong(field, f"is {value!r}", f"one of {', '.join(known)}")
            classes.append(known[value])
    hint, image = problem.content.get("hint"), problem.content.get("image")
    classes += [name for name, has in zip(_CONTEXTS, (hint, image, not hint and not image), strict=True) if has]
    return {"choices": len(choices), "answer": answer, "classes": classes}


def choice(answer: str, choices: int) -> int | None:
    """The index of the choice whose letter it says, None for none."""
    answer = answer.strip()
    said = answer[0] if answer[1:3] == ". " else answer
    if said not in _LETTERS:
        letters = re.findall("The answer is ([A-Z]).", answer)
        said = letters[0] if len(letters) == 1 else ""
    return _LETTERS.index(said) if said in _LETTERS[:choices] else None


def credit(question: Question, answer: str) -> float:
    return float(choice(answer, question.facts["choices"]) == question.facts["answer"])


def score(answered: Answered) -> Outcome:
    asked = [(question, answered.answers[question.key]) for question in answered.questions]
    names = ("all", "pictured", *_SUBJECTS.values(), *_CONTEXTS, *dict.fromkeys(_GRADES.values()))
    right: dict[str, list[float]] = {name: [] for name in names}
    for question, answer in asked:
        for name in ("all", *["pictured"] * question.facts["pictured"], *question.facts["classes"]):
            right[name].append(credit(question, answer))
    metrics = average(right.pop("all"))
    metrics["image"] = average(right.pop("pictured"))
    metrics["unparsed"] = sum(choice(answer, question.facts["choices"]) is None for question, answer in asked)
    metrics["classes"] = {name: percent(sum(hits), len(hits)) for name, hits in right.items() if hits}
    if not metrics["image"]["questions"]:
        return Outcome(None, metrics, "questions with a picture: a larger --limit")
    return Outcome(metrics["image"]["accuracy"], metrics)


TASKS = (Task("scienceqa", "ScienceQA-IMG", "SQA", questions, credit, score),)
