"""Parquet files that say something about a data set, and the hash that says which data set that is.

    scores.parquet   `aligngpt score`:  a row for each image-text pair
    levels.parquet   `aligngpt levels`: the same rows, with a level each

What a file is and how it was made stands in its schema's metadata as one JSON object, under the key "aligngpt"; its
"kind" is "scores" or "levels". The column "record" is the position of a pair's sample in its data, from 0.

The commands that make them ask `prepare_outputs` first, so that hours of work do not end at a name, and write every
file whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .llava_json import Sample

if TYPE_CHECKING:
    import pyarrow

_KEY = b"aligngpt"


def data_hash(samples: Iterable[Sample]) -> str:
    """SHA-256, in hex, of the samples' ids, image names and turns, in order.

    It is taken over what was read, not over the file: the same samples have the same hash however their JSON is
    written, in whichever container they lie, with and without levels. Images count by name; their pixels are not
    covered.
    """
    digest = hashlib.sha256()
    for sample in samples:
        content = [sample.id, sample.images, [(turn.role, turn.text) for turn in sample.turns]]
        digest.update(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode())
        digest.update(b"\n")  # JSON writes no line break of its own, so samples cannot run together
    return digest.hexdigest()


def prepare_outputs(outputs: Iterable[tuple[str, str]], read: Iterable[str]) -> None:
    """Make the folders that a command will write to, before it does any work.

    outputs: a flag and the file that it makes the command write, for each; read: the files that the command reads.
    ValueError: a file that is read, or written twice, or is a folder, or whose folder takes no files.
    """
    uses = {Path(path).resolve(): "read" for path in read}
    for flag, path in outputs:
        file = Path(path)
        if use := uses.get(file.resolve()):
            raise ValueError(f"{flag} would write {path}, which is {use} here; it needs another name")
        uses[file.resolve()] = "already written"
        if file.is_dir():
            raise ValueError(f"{flag} would write {path}, which is a folder; it needs the name of a file")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            raise ValueError(
                f"{flag} would write {path}, but {file.parent} takes no files ({error.strerror}); "
                "it needs a folder that can be written to"
            ) from error


def write_table(path: str | os.PathLike[str], table: pyarrow.Table, metadata: dict[str, Any]) -> None:
    """Write a table and what it is."""
    import pyarrow.parquet

    with _whole(path) as temporary:
        described = table.replace_schema_metadata({_KEY: json.dumps(metadata).encode()})
        pyarrow.parquet.write_table(described, temporary)


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = None) -> None:
    """Write JSON, without any blanks unless `indent` is given."""
    separators = (",", ":") if indent is None else None
    with _whole(path) as temporary:
        text = json.dumps(content, ensure_ascii=False, indent=indent, separators=separators)
        temporary.write_text(text + "\n", encoding="utf-8")


@contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name ending in .tmp to write to; it becomes `path` when all went well and is removed when not."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: str | os.PathLike[str], kind: str) -> tuple[pyarrow.Table, dict[str, Any]]:
    """A table that `write_table` wrote, and its metadata, whose "kind" must be `kind`.

    ValueError: no Parquet file, or another kind of file. OSError: it cannot be read.
    """
    import pyarrow.parquet

    with open(path, "rb") as file:
        try:
            table = pyarrow.parquet.read_table(file)
            metadata = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
        except (ValueError, OSError) as error:  # pyarrow raises either for damaged content
            raise ValueError(f"{path} is no Parquet file ({error}); it needs to be one made by `aligngpt`") from error
    if metadata.get("kind") != kind:
        found = f"holds {metadata['kind']}" if "kind" in metadata else "was not made by aligngpt"
        maker = {"scores": "score"}.get(kind, kind)
        raise ValueError(f"{path} {found}; it needs {kind}, made by `aligngpt {maker}`")
    return table, metadata
