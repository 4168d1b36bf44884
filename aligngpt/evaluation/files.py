"""Official files of benchmarks, read so that what is wrong with one is said by file, place and field.

    for row in jsonl_rows(root / "pope/llava_pope_test.jsonl"):
        row.text("text")           ValueError: …/llava_pope_test.jsonl: line 3: 'text' is missing; needs a string

Pictures are found before anything is answered (`picture`); none is opened outside its folder.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.llava_json import image_path, parse_json

_NEEDS = {str: "a string", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


class Row:
    """An object of a file. Each getter raises a ValueError with file, place and field where the field is not that.

    Attributes:
        content: the fields.
        where: what errors call it: the file and the line, record or key.
    """

    __slots__ = ("content", "where")

    def __init__(self, content: Any, where: str):
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}: is {_kind(content)}; needs an object")
        self.content, self.where = content, where

    def __contains__(self, name: str) -> bool:
        return name in self.content

    def text(self, name: str) -> str:
        return self._of(name, str)

    def whole(self, name: str) -> int:
        return self._of(name, int)

    def items(self, name: str) -> list[Any]:
        return self._of(name, list)

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        found = self.items(name)
        for item in found:
            if not isinstance(item, str):
                raise self.wrong(name, f"holds {_kind(item)}", "a list of strings")
        return found

    def rows(self, name: str) -> "Iterator[Row]":
        """A list of objects."""
        for number, content in enumerate(self.items(name)):
            yield Row(content, f"{self.where}: {name!r}[{number}]")

    def row(self, name: str) -> "Row":
        """A field that is an object itself."""
        return Row(self._of(name, dict), f"{self.where}: {name!r}")

    def id(self, name: str) -> str:
        """A string, or a whole number as one."""
        found = self.content.get(name)
        if isinstance(found, int) and not isinstance(found, bool):
            return str(found)
        return self._of(name, str)

    def wrong(self, name: str, got: str, needs: str) -> ValueError:
        """The error that says so of a field: what it is or holds, and what was wanted."""
        return ValueError(f"{self.where}: {name!r} {got}; needs {needs}")

    def _of(self, name: str, kind: type) -> Any:
        if name not in self.content:
            raise self.wrong(name, "is missing", _NEEDS[kind])
        found = self.content[name]
        if not isinstance(found, kind) or isinstance(found, bool):
            raise self.wrong(name, f"is {_kind(found)}", _NEEDS[kind])
        return found


def _kind(value: Any) -> str:
    short = json.dumps(value, ensure_ascii=False, default=repr)
    return short if len(short) <= 60 else f"{short[:57]}…"


def read_bytes(path: Path) -> bytes:
    """ValueError: it is not there; the benchmark's official archive should hold it."""
    return _found(path).read_bytes()


def _found(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f"{path} is no file; --data needs LLaVA's eval.zip unpacked, and the benchmark's own files in it"
        )
    return path


def read_json(path: Path) -> Any:
    return parse_json(read_bytes(path), path, "JSON")


def json_row(path: Path) -> Row:
    """A file that holds one object."""
    return Row(read_json(path), str(path))


def json_rows(path: Path) -> Iterator[Row]:
    """A file that holds a list of objects."""
    found = read_json(path)
    if not isinstance(found, list):
        raise ValueError(f"{path}: holds {_kind(found)}; needs a list of objects")
    for number, content in enumerate(found):
        yield Row(content, f"{path}: record {number}")


def jsonl_rows(path: Path) -> Iterator[Row]:
    """A file with an object in each line; blank lines are skipped."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if line.strip():
            yield Row(parse_json(line.strip(), path, "a JSON object", number), f"{path}: line {number}")


def tsv_rows(path: Path) -> Iterator[Row]:
    """A table with named columns, tabs between them and quotes as in CSV; empty cells are left out of the rows."""
    csv.field_size_limit(1 << 30)  # pictures stand in cells, in base64
    with _found(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        try:
            for content in reader:
                where = f"{path}: line {reader.line_num}"
                if None in content:
                    raise ValueError(f"{where}: has more cells than there are columns; needs one for each")
                yield Row({name: cell for name, cell in content.items() if cell}, where)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: after line {reader.line_num}: {error}; needs UTF-8") from error


def picture(folder: Path, name: str, row: Row) -> Path:
    """The file of a picture that `row` names. ValueError: it is not there, or outside the folder."""
    try:
        path = image_path(folder, name)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    if not path.is_file():
        raise ValueError(f"{row.where}: its picture {path} is no file; needs the benchmark's pictures in {folder}")
    return path
