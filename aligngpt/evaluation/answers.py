"""A task's answers on the disk: lines that are appended, of which a killed process loses at most the last.

answers-0.jsonl     of process 0, as they come: {"key": …, "prompt": …, "answer": …}
answers.jsonl       of all, in the order of the questions, once there are all; the others are then gone
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.llava_json import parse_json
from ..data.tables import whole_file
from .task import Question


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"answers(-[0-9]+)?\.jsonl", path.name))


def read_answers(folder: Path) -> dict[str, str]:
    """What is written, by key. A last line without an end is one that a process was writing when it was killed."""
    found: dict[str, str] = {}
    for path in _files(folder):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            record = parse_json(line, path, "an answer, or that line removed", number)
            if not (isinstance(record, dict) and all(isinstance(record.get(name), str) for name in ("key", "answer"))):
                raise ValueError(f"{path}: line {number} is no answer; it needs key and answer, or to be removed")
            found.setdefault(record["key"], record["answer"])
    return found


def _line(question: Question, answer: str) -> bytes:
    record = {"key": question.key, "prompt": question.prompt, "answer": answer}
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"  # as JSON has it


class AnswerFile:
    """Where a process puts its answers: each is with the system when `add` returns."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"answers-{rank}.jsonl"
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        content = self.path.read_bytes()
        os.ftruncate(self.file, content.rfind(b"\n") + 1)

    def add(self, question: Question, answer: str) -> None:
        """OSError, naming the file: there is no room for it. What is there of its line counts for nothing."""
        line = _line(question, answer)
        try:
            while line:
                line = line[os.write(self.file, line) :]
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        os.close(self.file)


def join_answers(folder: Path, questions: Sequence[Question], answers: Mapping[str, str]) -> None:
    """All answers in one file, in the order of the questions, in place of the processes' files."""
    path = folder / "answers.jsonl"
    with whole_file(path, sync=True) as temporary, temporary.open("wb") as file:
        for question in questions:
            if question.key in answers:
                file.write(_line(question, answers[question.key]))
    for part in _files(folder):
        if part != path:
            part.unlink()
