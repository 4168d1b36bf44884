"""What a benchmark is: questions read from its official files, and a score of the answers.

    questions = task.questions(root)                 all of them; nothing is answered before every file was found
    outcome = task.score(Answered(root, questions, {question.key: answer, …}, folder))

A file of this folder describes one benchmark by a `Task` for each of its names (`TASKS` in `runner.py` lists them).
Prompts are the user's words after the picture; the processor puts them into the model's template.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .judge import Judge


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with at most one picture.

    Fields:
        key: names it and its answer, once in its task.
        prompt: the user's words, without the picture's mark.
        image: a file, the bytes of one, or None.
        facts: what the task's score wants to know of it.
        group: of questions that are scored together, so that `--limit` takes all or none of them; "": it stands alone.
    """

    key: str
    prompt: str
    image: Path | bytes | None
    max_new_tokens: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Answered:
    """A benchmark whose questions have all been answered.

    Fields:
        root: the data.
        answers: by the questions' keys.
        folder: where its results go, for what must survive an interruption.
        partly: whether questions were left out (`--limit`), so that nothing can be had that needs them all.
    """

    root: Path
    questions: Sequence[Question]
    answers: Mapping[str, str]
    folder: Path
    judge: "Judge | None" = None
    partly: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Fields:
        headline: the number of the paper's column, in its unit; None: a server or a judge has yet to give it.
        metrics: all numbers by name, nested by split or category; percentages are 0 to 100.
        needs: who has yet to give the headline, and how: "a judge: …" or "its server: upload … to …"; else "".
        files: what is written beside them, by name: submissions as their servers take them.
    """

    headline: float | None
    metrics: Mapping[str, Any]
    needs: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Fields:
        name: on the command line.
        title: in reports.
        column: of the paper's table, "" for none.
        questions: all of them, in the order of the official file.
        credit: the share of a point, 0 to 1, that an answer gets by itself, None where nobody here knows; it is shown
            while a task is being answered.
        score: of all answers.
        is_extra: whether it wants other files than the paper's benchmark, so that "all" leaves it out.
    """

    name: str
    title: str
    column: str
    questions: Callable[[Path], list[Question]]
    credit: Callable[[Question, str], float | None]
    score: Callable[[Answered], Outcome]
    is_extra: bool = False


def no_credit(question: Question, answer: str) -> None:
    """Only a server or a judge knows."""


def average(credits: Collection[float]) -> dict[str, Any]:
    """The mean credit in percent, with the number of questions."""
    return {"questions": len(credits), "accuracy": percent(sum(credits), len(credits))}


def percent(part: float, whole: float) -> float:
    """0 where there is nothing."""
    return 100 * part / whole if whole else 0.0
