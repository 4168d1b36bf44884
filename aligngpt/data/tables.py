"""Parquet files that say something about a data set, and the hash that says which data set that is.

    scores.parquet   `aligngpt score`:  a row for each image-text pair
    levels.parquet   `aligngpt levels`: the same rows, with a level each

What a file is and how it was made stands in its schema's metadata as one JSON object, under the key "aligngpt"; its
"kind" is "scores" or "levels". The column "record" is the position of a pair's sample in its data, from 0.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
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


def write_table(path: str | os.PathLike[str], table: pyarrow.Table, metadata: dict[str, Any]) -> None:
    """Write a table and what it is, under a name ending in .tmp that is renamed when the file is whole."""
    import pyarrow.parquet

    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        described = table.replace_schema_metadata({_KEY: json.dumps(metadata).encode()})
        pyarrow.parquet.write_table(described, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: str | os.PathLike[str], kind: str) -> tuple[pyarrow.Table, dict[str, Any]]:
    """A table that `write_table` wrote, and its metadata, whose "kind" must be `kind`.

    ValueError: no Parquet file, or another kind of file. OSError: it cannot be read.
    """
    import pyarrow.parquet

    try:
        with open(path, "rb") as file:
            table = pyarrow.parquet.read_table(file)
        metadata = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    except (pyarrow.ArrowInvalid, ValueError) as error:
        raise ValueError(f"{path} is no Parquet file ({error}); it needs to be one made by `aligngpt`") from error
    if metadata.get("kind") != kind:
        found = f"holds {metadata['kind']}" if "kind" in metadata else "was not made by aligngpt"
        maker = {"scores": "score"}.get(kind, kind)
        raise ValueError(f"{path} {found}; it needs {kind}, made by `aligngpt {maker}`")
    return table, metadata
