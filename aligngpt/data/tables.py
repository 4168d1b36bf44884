"""Parquet files that say something about a data set, and the hash that says which data set that is.

    SCORES/           `aligngpt score`:  a folder of part-000000.parquet, …, and manifest.json, which is written last
    levels.parquet    `aligngpt levels`: a row for each of theirs, with a level

A row is an image-text pair; the column "record" is the position of its sample in the data, from 0, and rows ascend by
it. What a file is and how it was made stands in its schema's metadata as one JSON object, under the key "aligngpt"; its
"kind" is "scores" or "levels". Pages carry checksums, so damage to the columns is found when a file is read; damage to
headers and footer is found by `table_file`, which makes a file's bytes again from what was read, and by SHA-256.

manifest.json says that a scoring is finished. It holds the parts' metadata, names, counts, and for each part its rows
and SHA-256; `read_part` refuses a part that isn't the one it names.

The commands that make them ask `prepare_outputs` or `prepare_folder` first, so that hours of work do not end at a name,
and write every file whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .. import __version__
from .llava_json import Sample

if TYPE_CHECKING:
    import pyarrow

MANIFEST = "manifest.json"
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


# ---------------------------------------------------------------------------------------------------- places to write


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
        _make_folder(file.parent, f"{flag} would write {path}, but {file.parent}")


def prepare_folder(flag: str, path: str, read: Iterable[str]) -> None:
    """Make the folder that a command will write its files to.

    ValueError: it is a file, or is read by the command, or takes no files.
    """
    if Path(path).resolve() in {Path(other).resolve() for other in read}:
        raise ValueError(f"{flag} would write into {path}, which is read here; it needs another name")
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{flag} would write into {path}, which is a file; it needs the name of a folder")
    _make_folder(Path(path), f"{flag} would write into {path}, but it")


def _make_folder(folder: Path, who: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{who} takes no files ({error.strerror}); it needs a folder that can be written to"
        ) from error


@contextmanager
def gone_if_empty(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Leave no new and empty folder behind: the command that was to fill it was refused."""
    is_new = not os.path.exists(folder)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty
                os.rmdir(folder)


@contextmanager
def alone(flag: str, folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of the folder. ValueError: one is in it.

    The lock belongs to this process: forked workers don't inherit it, and it ends with the process, however that ends.
    """
    path = folder / "lock"
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())  # or else removed since it was opened
        except OSError:
            held = False
        if not held:
            raise ValueError(f"{flag} {folder} is being written by another process; it needs to end first")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def differences(about: Mapping[str, Any], found: Mapping[str, Any], section: str = "") -> list[str]:
    """What a folder was begun with and what it is given now differ in, as "section.name is … there, … here".

    `found` may say more than `about`.
    """
    said = []
    may_say_more = section.count(".") < 2  # files of a model are all compared
    for name in about if may_say_more else {**about, **found}:
        ours, theirs = about.get(name, "missing"), found.get(name, "missing")
        if isinstance(ours, dict) and isinstance(theirs, dict):
            said += differences(ours, theirs, f"{section}{name}.")
        elif ours != theirs:
            short = [text if len(text) < 60 else f"{text[:12]}…" for text in map(str, (theirs, ours))]
            said.append(f"{section}{name} is {short[0]} there, {short[1]} here")
    return said


def versions(*packages: str) -> dict[str, str]:
    """Ours, and those of the packages that had a part in what is written."""
    from importlib.metadata import version

    return {"aligngpt": __version__} | {package: version(package) for package in packages}


@contextmanager
def whole_file(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[Path]:
    """A name ending in .tmp to write to; it becomes `path` when all went well and is removed when not.

    sync: the content is on the disk before that, and each process has a .tmp of its own.
    """
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp" if sync else f"{os.fspath(path)}.tmp")
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # of a write, when the disk is full
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_to_disk(path: str | os.PathLike[str]) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = None) -> None:
    """Write JSON, without any blanks unless `indent` is given."""
    separators = (",", ":") if indent is None else None
    with whole_file(path) as temporary:
        text = json.dumps(content, ensure_ascii=False, indent=indent, separators=separators)
        temporary.write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- tables


def described(schema: pyarrow.Schema, metadata: Mapping[str, Any]) -> pyarrow.Schema:
    """The schema of a file that says what it is."""
    return schema.with_metadata({_KEY: json.dumps(metadata).encode()})


def write_table(path: str | os.PathLike[str], table: pyarrow.Table, metadata: Mapping[str, Any]) -> None:
    """Write a table and what it is."""
    with whole_file(path, sync=True) as temporary:
        temporary.write_bytes(table_file(table, metadata))


def table_file(table: pyarrow.Table, metadata: Mapping[str, Any]) -> pyarrow.Buffer:
    """What `write_table` writes: the same bytes for a table that was read from them."""
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    table = table.replace_schema_metadata(described(table.schema, metadata).metadata)
    pyarrow.parquet.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def read_table(
    path: str | os.PathLike[str], kind: str, columns: Sequence[str] | None = None
) -> tuple[pyarrow.Table, dict[str, Any]]:
    """Columns of a table that `write_table` wrote (default: all), and its metadata, whose "kind" must be `kind`.

    ValueError: no Parquet file, damaged, another kind of file. OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return _parsed(file, path, kind, columns)


def _parsed(
    file: IO[bytes] | pyarrow.BufferReader, path: str | os.PathLike[str], kind: str, columns: Sequence[str] | None
) -> tuple[pyarrow.Table, dict[str, Any]]:
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        metadata = json.loads((parquet.schema_arrow.metadata or {}).get(_KEY, b"{}"))
        metadata = metadata if isinstance(metadata, dict) else {}
        if metadata.get("kind") == kind:
            return parquet.read(columns), metadata
    # What pyarrow and JSON raise for damaged content.
    except (ValueError, OSError, KeyError, NotImplementedError, RecursionError) as error:
        raise ValueError(f"{path} is no Parquet file ({error}); it needs to be one made by `aligngpt`") from error
    found = f"holds {metadata['kind']}" if "kind" in metadata else "was not made by aligngpt"
    maker = {"scores": "score"}.get(kind, kind)
    raise ValueError(f"{path} {found}; it needs {kind}, made by `aligngpt {maker}`")


# ---------------------------------------------------------------------------------------------------- scores in parts


def part_name(number: int) -> str:
    """The file of a part, by its number from 0."""
    return f"part-{number:06d}.parquet"


def write_manifest(
    folder: str | os.PathLike[str], about: Mapping[str, Any], num_parts: int, names: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Read the parts of a scoring and write manifest.json, which says that it is finished; returns what it says.

    about: the metadata of every part; names: what the manifest says beyond it, in the sections "data" and "model".
    ValueError: a part that is damaged or has other metadata, or no pair has a score.
    """
    parts, problem, counts = [], None, {"rows": 0, "problems": 0, "truncated": 0}
    for number in range(num_parts):
        path = Path(folder) / part_name(number)
        content = path.read_bytes()
        table, found = _parsed(_buffer(content), path, "scores", ["truncated", "problem"])
        if found != about:
            raise ValueError(f"{path} belongs to another scoring; it needs to be removed and scored again")
        parts.append({"file": path.name, "rows": len(table), "sha256": hashlib.sha256(content).hexdigest()})
        counts["rows"] += len(table)
        counts["problems"] += len(table) - table["problem"].null_count
        counts["truncated"] += table["truncated"].to_numpy().sum().item()
        problem = problem or next(filter(None, table["problem"].to_pylist()), None)
    if counts["problems"] == counts["rows"]:
        raise ValueError(
            f"none of the {counts['rows']} pairs for {folder} has a score, for example: {problem}; it needs one at "
            "least: check where the images are, and give the command again"
        )
    manifest = {
        **about,
        **{section: {**about.get(section, {}), **more} for section, more in names.items()},
        "text": {**about.get("text", {}), "truncated": counts["truncated"]},
        "rows": counts["rows"],
        "problems": counts["problems"],
        "parts": parts,
    }
    write_json(Path(folder) / MANIFEST, manifest, indent=1)
    return manifest


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a finished scoring. ValueError: there is none, or it is damaged."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        if Path(folder).is_file():
            raise ValueError(f"{folder} is a file; scores are a folder now and need to be made again: `aligngpt score`")
        what = "has no manifest.json" if Path(folder).is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}; it needs to be the folder of a finished `aligngpt score`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        good = manifest["kind"] == "scores" and [part["file"] for part in manifest["parts"]] == [
            part_name(number) for number in range(len(manifest["parts"]))
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); it needs to be one that `aligngpt score` wrote") from error
    if not good:
        raise ValueError(f"{path} is not about scores in parts; it needs to be one that `aligngpt score` wrote")
    return manifest


def read_part(
    folder: str | os.PathLike[str], manifest: Mapping[str, Any], number: int, columns: Sequence[str]
) -> pyarrow.Table:
    """Columns of a part. ValueError: it's missing, or not the file that the manifest names. OSError: can't be read."""
    path = Path(folder) / part_name(number)
    content = path.read_bytes() if path.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != manifest["parts"][number]["sha256"]:
        what = "is missing" if content is None else f"is not the file that {MANIFEST} names: its SHA-256 differs"
        raise ValueError(f"{path} {what}; give the `aligngpt score` command again, which makes it anew")
    return _parsed(_buffer(content), path, "scores", columns)[0]


def _buffer(content: bytes) -> pyarrow.BufferReader:
    import pyarrow

    return pyarrow.BufferReader(content)
