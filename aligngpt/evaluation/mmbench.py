"""MMBench and MMBench-CN: multiple choice, asked with the options in each rotation (arXiv 2307.06281).

    mmbench/mmbench_dev_20230712.tsv        index, question, hint, A to D, answer, category, l2-category, image, split
    mmbench/mmbench_dev_cn_20231003.tsv     the same in Chinese; in mmbench_cn/ too

The row with index 1000000 r + i is question i with its options rotated r times. Questions of a file without such rows
are rotated here: i-0 is the row itself, in i-r an option stands r letters earlier. Cells that pandas reads as missing
are missing, as the official scripts have it; an image is base64, or the index of the row that has it.

`circular` counts a question as right if it is so in all rotations, `single` as it stands in row i; each in percent, of
all, by l2-category and by category. The paper's numbers are circular, from MMBench's server, which takes the .xlsx: all
rows of the file with their answers.

The letter of an answer is found as by VLMEvalKit's exact matching: that of the one option whose letter stands alone in
it, if among its last four words; else of the one option whose text it holds, if it is at most twice as long as all
options. The server asks a language model about other answers; here they are wrong, and `unparsed` counts them.
"""

import base64
import io
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import openpyxl
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from .files import Row, tsv_rows
from .task import Answered, Outcome, Question, Task, average, percent

_ROTATION = 1_000_000
_LETTERS = tuple("ABCD")
_MISSING = {  # and, in any case, nan and none
    *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "n/a", "null"),
}
_CLASSES = ("l2-category", "category")
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SHEET = ("index", "question", *_LETTERS, "prediction", "answer", "split")


def _questions(file: str, last_line: str, root: Path) -> list[Question]:
    path = next((path for path in (root / "mmbench" / file, root / "mmbench_cn" / file) if path.is_file()), None)
    rows: dict[int, Row] = {}
    for row in tsv_rows(path or root / "mmbench" / file):
        cell = row.text("index")
        if not cell.isdecimal() or int(cell) in rows:
            raise row.wrong("index", f"is {cell!r}", "a whole number, another one in each row")
        rows[int(cell)] = row
    sizes = Counter(index % _ROTATION for index in rows)
    rotated = max(rows, default=0) >= _ROTATION
    found = []
    for index, row in rows.items():
        options, image = _options(row), _image(row, rows)
        letters, answer = _LETTERS[: len(options)], row.text("answer")
        if answer not in _LETTERS:
            raise row.wrong("answer", f"is {answer!r}", f"one of {', '.join(_LETTERS)}")
        cells = {"index": index} | {name: _cell(row, name) for name in _SHEET[1:]}
        classes = {name: row.text(name) for name in _CLASSES}
        for rotation in [0] if rotated else range(len(options)):
            texts = dict(zip(letters, options[rotation:] + options[:rotation], strict=True))
            hint = _cell(row, "hint")
            asked = [*([hint] if hint else []), row.text("question"), *(f"{key}. {texts[key]}" for key in letters)]
            facts = {
                "question": index % _ROTATION,
                "rotations": sizes[index % _ROTATION] if rotated else len(options),
                "single": index < _ROTATION and rotation == 0,
                "classes": classes,
                "options": texts,
                # An option that reads "None" is left out, as LLaVA does, and then no answer is right.
                "answer": letters[letters.index(answer) - rotation] if answer in letters else answer,
                "cells": cells if rotation == 0 else None,
            }
            key = f"{index}" if rotated else f"{index}-{rotation}"
            found.append(Question(key, "\n".join([*asked, last_line]), image, 1024, facts, f"{index % _ROTATION}"))
    return found


def _cell(row: Row, name: str) -> str | None:
    text = row.content.get(name, "")
    return None if not text or text in _MISSING or text.lower() in ("nan", "none") else text


def _options(row: Row) -> list[str]:
    """Up to the first that is missing."""
    found = []
    for name in _LETTERS:
        text = _cell(row, name)
        if text is None:
            break
        found.append(text)
    return found


def _image(row: Row, rows: Mapping[int, Row]) -> bytes:
    cell = row.text("image")
    if cell.isdecimal() and len(cell) <= 64 and int(cell) in rows:
        cell = rows[int(cell)].text("image")
    try:
        return base64.b64decode("".join(cell.split()), validate=True)
    except ValueError as error:
        raise row.wrong("image", f"is {cell[:20]!r}…", "a picture in base64, or the index of a row with one") from error


def letter(answer: str, options: Mapping[str, str]) -> str | None:
    """That of the option that it says; None: it says none, or several."""
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    said = [key for key in options if key in words]
    if len(said) == 1 and words.index(said[0]) >= len(words) - 4:
        return said[0]
    lower = answer.lower()
    if (not said and "Z" in words) or len(lower) > 2 * sum(map(len, options.values())):
        return None
    held = [key for key, text in options.items() if text.lower() in lower]
    return held[0] if len(held) == 1 else None


def credit(question: Question, answer: str) -> float:
    return float(letter(answer.strip(), question.facts["options"]) == question.facts["answer"])


def _score(file: str, answered: Answered) -> Outcome:
    asked: dict[int, list[Question]] = defaultdict(list)
    for question in answered.questions:
        asked[question.facts["question"]].append(question)
    right = {question.key: credit(question, answered.answers[question.key]) for question in answered.questions}
    whole = [rotated for rotated in asked.values() if len(rotated) == rotated[0].facts["rotations"]]
    circular = [(rotated[0], all(right[question.key] for question in rotated)) for rotated in whole]
    single = [(question, right[question.key] == 1) for question in answered.questions if question.facts["single"]]
    unparsed = (letter(answered.answers[q.key].strip(), q.facts["options"]) is None for q in answered.questions)
    found = _accuracy(circular)
    metrics = {"circular": found, "single": _accuracy(single), "unparsed": sum(unparsed)}
    if not whole:
        return Outcome(None, metrics, "all rotations of a question: a larger --limit")
    files = {} if answered.partly else {f"{file}.xlsx": _sheet(answered)}
    return Outcome(found["accuracy"], metrics, files=files)


def _accuracy(hits: Sequence[tuple[Question, bool]]) -> dict[str, Any]:
    """Over all, and by the names of each kind of classes."""
    found = average([hit for _, hit in hits])
    for kind in _CLASSES:
        groups: dict[str, list[bool]] = defaultdict(list)
        for question, hit in hits:
            groups[question.facts["classes"][kind]].append(hit)
        found[kind] = {name: percent(sum(group), len(group)) for name, group in sorted(groups.items())}
    return found


def _sheet(answered: Answered) -> bytes:
    """The file's rows without pictures and classes, with their answers."""
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(_SHEET)
    rows = (question for question in answered.questions if question.facts["cells"])
    for number, question in enumerate(rows, 2):
        cells = question.facts["cells"] | {"prediction": answered.answers[question.key].strip()}
        for column, name in enumerate(_SHEET, 1):
            value, cell = cells[name], sheet.cell(number, column)
            cell.value = ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value
            if isinstance(value, str):
                cell.data_type = "s"  # an answer that begins with = is no formula
    found = io.BytesIO()
    book.save(found)
    return found.getvalue()


def _task(name: str, title: str, column: str, file: str, last_line: str) -> Task:
    return Task(name, title, column, partial(_questions, f"{file}.tsv", last_line), credit, partial(_score, file))


TASKS = (
    _task(
        *("mmbench", "MMBench", "MMB", "mmbench_dev_20230712"),
        "Answer with the option's letter from the given choices directly.",
    ),
    _task("mmbench-cn", "MMBench-CN", "MMB-CN", "mmbench_dev_cn_20231003", "请直接回答选项字母。"),
)
