"""LLaVA's JSON files and an image folder to samples.

    [{"id": "000000033471", "image": "coco/000000033471.jpg", "align_level": 5,
      "conversations": [{"from": "human", "value": "<image>\\nWhat is shown?"}, {"from": "gpt", "value": "A bus."}]}, …]

Reads LLaVA's own files (`blip_laion_cc_sbu_558k.json`, `llava_v1_5_mix665k.json`) as they are: ids may be numbers and
may repeat, text-only records have no "image", "image" may be a list, unknown keys ("model", …) are ignored. As in the
public code, gpt turns before the first human one are dropped: ShareGPT conversations cut out of longer ones begin so.
"align_level" is the stage-1 level of the pair, absent in stage 2. In a record without an image `<image>` is a word like
any other, unless a human turn begins or ends with it: then the image is missing, which is an error.

Everything about a record that can be wrong without opening its image is refused while reading, with the file, the
record's number (from 0, as a list index) and what was wanted. `image_path` is the one way from a name in the data to a
file: nothing outside the image folder is ever opened. The whole file is parsed at once; the 665K records are 1 GB of
JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..text import IMAGE_MARK, Turn

_ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
}
_UNUSABLE = re.compile("[\x00\ud800-\udfff\ufdd0\ufdd1]")


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. `images` are names below the image folder, one per `<image>` mark, in order."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    level: int | None
    record: int

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"record {self.record} (id {self.id})"


def read_llava_json(path: str | os.PathLike[str], *, num_levels: int | None = None) -> list[Sample]:
    """All samples of a LLaVA JSON file, in file order.

    num_levels: N; a record's "align_level" must then lie in 0..N-1 (without it, be a whole number from 0).

    ValueError, naming the file and the line or record: no UTF-8 or no JSON, not a list of objects, a missing or empty
    conversation, a wrong type, roles out of order, no gpt turn, a level out of range, marks and images that differ in
    number, `<image>` outside a human turn, NUL, lone surrogates and the noncharacters U+FDD0 and U+FDD1.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        records = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line}: byte {error.start} is not UTF-8 ({error.reason}); needs UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; needs a JSON list"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise ValueError(f"{path}: {error}; needs a JSON list of records") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds {_kind(records)}; needs a list of records")
    return [_sample(record, number, f"{path}: record {number}", num_levels) for number, record in enumerate(records)]


def image_path(root: str | os.PathLike[str], name: str) -> Path:
    """The file of an image name below `root`; whether it exists is for `open_image` to say.

    ValueError: an absolute name, a URL, "..", or a link that leads out of the folder.
    """
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name:
        raise ValueError(f"image name is {name!r}; it must be a path below the image folder")
    if "://" in name:
        raise ValueError(f"image name {name!r} is a URL; it must be a path below the image folder")
    if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name):
        raise ValueError(f"image name {name!r} leaves the image folder; it must be relative, without '..'")
    root = Path(root).resolve()
    path = root / name
    target = path.resolve()
    if not target.is_relative_to(root):
        raise ValueError(f"image name {name!r} is a link out of the image folder, to {target}; it must stay in {root}")
    return path


def _sample(record: Any, number: int, where: str, num_levels: int | None) -> Sample:
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

    turns = _turns(record, where, bool(images))
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns) if images else _meant(turns)
    if marks != len(images):
        raise ValueError(
            f"{where}: the text has {marks} {IMAGE_MARK} marks; needs one for each of {len(images)} images"
        )

    level = record.get("align_level")
    if level is not None:
        wanted = "a whole number from 0" if num_levels is None else f"a whole number in 0..{num_levels - 1}"
        if isinstance(level, bool) or not isinstance(level, int):
            raise ValueError(f"{where}: 'align_level' is {_kind(level)}; needs {wanted}")
        if level < 0 or (num_levels is not None and level >= num_levels):
            raise ValueError(f"{where}: 'align_level' is {level}; needs {wanted}")
    return Sample(id, tuple(images), turns, level, number)


def _meant(turns: tuple[Turn, ...]) -> int:
    """Turns of a record without an image in which `<image>` stands where LLaVA puts it: one was meant."""
    texts = [turn.text.strip() for turn in turns if turn.role == "user"]
    return sum(text.startswith(IMAGE_MARK) or text.endswith(IMAGE_MARK) for text in texts)


def _turns(record: dict[str, Any], where: str, has_images: bool) -> tuple[Turn, ...]:
    if "conversations" not in record:
        raise ValueError(f"{where} has no 'conversations'; needs a list of {{'from', 'value'}}")
    messages = record["conversations"]
    if not isinstance(messages, list) or not messages:
        got = _kind(messages) if messages != [] else "empty"
        raise ValueError(f"{where}: 'conversations' is {got}; needs a list of {{'from', 'value'}}")
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
        if has_images and speaker != "human" and IMAGE_MARK in value:
            raise ValueError(f"{where}: turn {index} ({speaker}) holds {IMAGE_MARK}; only human turns may")
        turns.append(Turn(_ROLES[speaker], value))

    system = turns[:1] if turns[0].role == "system" else []
    spoken = turns[len(system) :]
    first = next((index for index, turn in enumerate(spoken) if turn.role == "user"), len(spoken))
    if all(turn.role == "assistant" for turn in spoken[:first]):
        spoken = spoken[first:]
    speakers = [message["from"] for message in messages]
    wanted = ["user" if index % 2 == 0 else "assistant" for index in range(len(spoken))]
    if len(spoken) < 2 or [turn.role for turn in spoken] != wanted:
        raise ValueError(
            f"{where}: the turns are from {speakers}; needs human and gpt in turn, with one answer at least"
        )
    return (*system, *spoken)


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
