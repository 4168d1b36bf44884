"""LLaVA's JSON files and an image folder to samples; JSON lines are the same records, one a line.

    [{"id": "000000033471", "image": "coco/000000033471.jpg", "align_level": 5,
      "conversations": [{"from": "human", "value": "<image>\\nWhat is shown?"}, {"from": "gpt", "value": "A bus."}]}, …]

Reads LLaVA's own files (`blip_laion_cc_sbu_558k.json`, `llava_v1_5_mix665k.json`) as they are: ids may be numbers and
may repeat, text-only records have no "image", "image" may be a list, unknown keys ("model", …) are ignored. As in the
public code, gpt turns before the first human one are dropped: ShareGPT conversations cut out of longer ones begin so.
"align_level" is the stage-1 level of the pair, absent in stage 2. `<image>` marks count in human turns; elsewhere, and
in a record without an image, it is a word like any other, unless a human turn begins or ends with it: then the image is
missing.

What is no record of this form is refused while reading, with the file, the record's number (from 0, as a list index)
and what was wanted. A record of this form that nothing can be learned from, because its conversation is empty, its
roles are out of order or its marks are not as many as its images, becomes a sample with a `problem`, which training
drops. `image_path` is the one way from a name in the data to a file: nothing outside the image folder is ever opened.
The whole file is parsed at once; the 665K records are 1 GB of JSON (`aligngpt pack` makes shards of them).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..text import IMAGE_MARK, Turn

_ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
}
_MOST_LEVEL = 2**31 - 1
_UNUSABLE = re.compile("[\x00\ud800-\udfff\ufdd0\ufdd1]")


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. `images` are names below the image folder, one per `<image>` mark, in order.

    problem: why it cannot be learned from, None if it can.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    level: int | None
    record: int
    problem: str | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"record {self.record} (id {printable(self.id)})"


def printable(text: str) -> str:
    """The text with what would steer a terminal escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_llava_json(path: str | os.PathLike[str]) -> list[Sample]:
    """All samples of a LLaVA JSON file, in file order.

    ValueError, naming the file and the line or record: no UTF-8 or no JSON, not a list of objects, no conversation, a
    wrong type, an unknown role, a level below 0, NUL, lone surrogates and the noncharacters U+FDD0 and U+FDD1.
    """
    return [parse_record(record, number, where) for number, (record, where) in enumerate(json_records(path))]


def read_llava_jsonl(path: str | os.PathLike[str]) -> list[Sample]:
    """All samples of a file with a record in each line, in file order; blank lines are skipped.

    ValueError: as `read_llava_json`, naming the line.
    """
    return [parse_record(record, number, where) for number, (record, where) in enumerate(jsonl_records(path))]


def json_records(path: str | os.PathLike[str]) -> Iterator[tuple[Any, str]]:
    """What a LLaVA JSON file lists, parsed and no more, each with what errors call it (for `parse_record`)."""
    needs = "a JSON list of records; JSON lines must be called .jsonl"
    records = parse_json(Path(path).read_bytes(), path, needs)
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds {_kind(records)}; needs {needs}")
    for number, record in enumerate(records):
        yield record, f"{path}: record {number}"


def jsonl_records(path: str | os.PathLike[str]) -> Iterator[tuple[Any, str]]:
    """The same of a file with a record in each line."""
    number = 0
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, 1):
            if line.strip():
                record = parse_json(line.rstrip(), path, "a JSON object", line_number)
                yield record, f"{path}: line {line_number}: record {number}"
                number += 1


def parse_json(data: bytes, path: str | os.PathLike[str], needs: str, first_line: int = 1) -> Any:
    """What JSON in UTF-8 holds. ValueError naming the file and the line: it is none; needs: what it should be."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line
        raise ValueError(
            f"{path}: line {line}: byte {error.start} is not UTF-8 ({error.reason}); needs UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise ValueError(f"{path}: line {line}, column {error.colno}: {error.msg}; needs {needs}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        line_or_file = path if b"\n" in data else f"{path}: line {first_line}"
        raise ValueError(f"{line_or_file}: {error}; needs {needs}") from error


def image_path(root: str | os.PathLike[str], name: str) -> Path:
    """The file of an image name below `root`; whether it exists is for `open_image` to say.

    ValueError: an absolute name, a URL, "..", a link that leads out of the folder, or a folder, a pipe or a device.
    """
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name:
        raise ValueError(f"image name is {name!r}; it must be a path below the image folder")
    if "://" in name:
        raise ValueError(f"image name {name!r} is a URL; it must be a path below the image folder")
    if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name):
        raise ValueError(f"image name {name!r} leaves the image folder; it must be relative, without '..'")
    return inside(root, name, f"image name {name!r}", "the image folder")


def inside(root: str | os.PathLike[str], name: str, what: str, where: str) -> Path:
    """The file called `name` in a folder, if there is one: no link out of it, and nothing that blocks who opens it.

    ValueError, in which the file is `what` and the folder `where`: it is something else.
    """
    root = Path(os.path.realpath(root))  # unlike `resolve`, it takes a link to itself: for no file
    path = root / name
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise ValueError(f"{what} is a link out of {where}; it must stay in there")
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError(f"{what} is no plain file; it must not be a folder, a pipe or a device")
    return path


def parse_record(record: Any, number: int, where: str) -> Sample:
    """The sample of a parsed JSON record. number: its position; where: what errors call it."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {_kind(record)}; needs an object")
    id = record.get("id", number)
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise ValueError(f"{where}: 'id' is {_kind(id)}; needs a string or a whole number")
    id = str(id)
    _check_text(id, "'id'", where)
    where = f"{where} (id {id!r})"

    images = record.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"{where}: 'image' is {_kind(record['image'])}; needs a name, or a list of names")
    for image in images:
        _check_text(image, "'image'", where)

    turns, problem = _turns(record, where)
    asked = [turn.text for turn in turns if turn.role == "user"]
    marks = sum(text.count(IMAGE_MARK) for text in asked) if images else _meant(asked)
    if marks != len(images) and problem is None:
        problem = f"the text has {marks} {IMAGE_MARK} marks; needs one for each of {len(images)} images"

    level = record.get("align_level")
    if level is not None:
        if isinstance(level, bool) or not isinstance(level, int):
            raise ValueError(f"{where}: 'align_level' is {_kind(level)}; needs a whole number from 0")
        if not 0 <= level <= _MOST_LEVEL:
            raise ValueError(f"{where}: 'align_level' is {_kind(level)}; needs a whole number from 0 to {_MOST_LEVEL}")
    return Sample(id, tuple(images), turns, level, number, problem)


def _meant(asked: list[str]) -> int:
    """Human turns of a record without an image in which `<image>` stands where LLaVA puts it: one was meant."""
    return sum(text.strip().startswith(IMAGE_MARK) or text.strip().endswith(IMAGE_MARK) for text in asked)


def _turns(record: dict[str, Any], where: str) -> tuple[tuple[Turn, ...], str | None]:
    """The turns, and why nothing can be learned from them."""
    if "conversations" not in record:
        raise ValueError(f"{where} has no 'conversations'; needs a list of {{'from', 'value'}}")
    messages = record["conversations"]
    if not isinstance(messages, list):
        raise ValueError(f"{where}: 'conversations' is {_kind(messages)}; needs a list of {{'from', 'value'}}")
    if not messages:
        return (), "the conversation is empty"
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: turn {index} is {_kind(message)}; needs an object with 'from' and 'value'")
        speaker, value = message.get("from"), message.get("value")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise ValueError(f"{where}: turn {index} is from {speaker!r}; needs 'human', 'gpt' or 'system'")
        if not isinstance(value, str):
            raise ValueError(f"{where}: 'value' of turn {index} is {_kind(value)}; needs a string")
        _check_text(value, f"'value' of turn {index}", where)
        turns.append(Turn(_ROLES[speaker], value))

    system = turns[:1] if turns[0].role == "system" else []
    spoken = turns[len(system) :]
    first = next((index for index, turn in enumerate(spoken) if turn.role == "user"), len(spoken))
    if all(turn.role == "assistant" for turn in spoken[:first]):
        spoken = spoken[first:]
    wanted = ["user" if index % 2 == 0 else "assistant" for index in range(len(spoken))]
    if len(spoken) < 2 or [turn.role for turn in spoken] != wanted:
        speakers = [message["from"] for message in messages]
        return tuple(turns), f"the turns are from {speakers}; needs human and gpt in turn, with one answer at least"
    return (*system, *spoken), None


def _check_text(text: str, what: str, where: str) -> None:
    bad = _UNUSABLE.search(text)
    if bad is not None:
        raise ValueError(f"{where}: {what} holds U+{ord(bad[0]):04X} at {bad.start()}; needs text without it")


def _kind(value: Any) -> str:
    """What a JSON value is, in words short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return json.dumps(value)[:60]
