"""Data sets of any size for the sweeps over records, written by the array: no loop makes their text.

    json_file(records), packed_folder(records), scores_folder(records) -> path

A record is one question and its answer without a picture, of words that are one token each; texts are drawn from
DISTINCT ones, ids are numbers. All records have the same bytes of JSON, padded by spaces. Files are made once and live
in temporary folders as long as the process: of a million records 0.26 GB of JSON, 1.07 GB packed, 0.03 GB of scores.
"""

import atexit
import functools
import hashlib
import io
import json
import random
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow

from aligngpt.data.records import NO_LEVEL
from aligngpt.data.shards import FORMAT, IMAGE, INDEX, MANIFEST, RECORD, shard_name
from aligngpt.data.tables import part_name, write_manifest, write_table

DISTINCT, PER_SHARD = 512, 5000
ID_DIGITS = 9
JSON_BYTES = 256
ROWS_PER_PART = 8192  # of scores
MEMBER = 2 * tarfile.BLOCKSIZE  # header and JSON
WORDS = (1000, 2000)  # w1000 to w1999, each with its space five characters

_folders = ExitStack()
atexit.register(_folders.close)


@functools.cache
def json_file(records: int) -> Path:
    path = new_folder() / "data.json"
    _write_json(path, records)
    return path


@functools.cache
def packed_folder(records: int) -> Path:
    """The same records as `json_file`'s."""
    folder = new_folder()
    _write_packed(folder, records)
    return folder


@functools.cache
def scores_folder(records: int) -> Path:
    """Drawn at random, as `aligngpt score` writes them."""
    folder = new_folder()
    write_scores(folder, records)
    return folder


def write_scores(folder: Path, pairs: int) -> None:
    """A finished scoring of `pairs` rows; one in a thousand has no score, most scores are shared by several."""
    about = {"kind": "scores", "data": {"sha256": "0" * 64, "samples": pairs}}
    rng = np.random.default_rng(0)
    starts = range(0, pairs, ROWS_PER_PART)
    for number, start in enumerate(starts):
        records = np.arange(start, min(pairs, start + ROWS_PER_PART))
        scores = rng.normal(0.25, 0.06, len(records)).astype(np.float32)
        lost = rng.random(len(records)) < 1e-3
        scores[lost] = np.nan
        column = pyarrow.array(records, pyarrow.int64())
        table = {
            "record": column,
            "id": column.cast(pyarrow.string()),
            "score": pyarrow.array(scores, pyarrow.float32()),
            "truncated": pyarrow.array(np.zeros(len(records), bool)),
            "problem": pyarrow.array(np.full(len(records), "no such file"), pyarrow.string(), mask=~lost),
        }
        write_table(folder / part_name(number), pyarrow.table(table), about)
    write_manifest(folder, about, len(starts), {})


def new_folder() -> Path:
    """One that is there as long as the process."""
    return Path(_folders.enter_context(tempfile.TemporaryDirectory(prefix="records-")))


def characters(records: int) -> int:
    """Of all turns."""
    each = _texts()[1]
    return int(each.sum()) * (records // DISTINCT) + int(each[: records % DISTINCT].sum())


@functools.cache
def _texts() -> tuple[np.ndarray, np.ndarray]:
    """JSON of DISTINCT records with an id of zeros (DISTINCT, JSON_BYTES), and the characters of their turns."""
    generator = random.Random(0)
    rows, each = [], []
    for _ in range(DISTINCT):
        question, answer = (" ".join(f"w{generator.randrange(*WORDS)}" for _ in range(generator.randint(3, 14)))
                            for _ in range(2))  # fmt: skip
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        text = json.dumps({"id": "0" * ID_DIGITS, "conversations": talk}, separators=(",", ":"))
        rows.append(np.frombuffer(text.ljust(JSON_BYTES).encode("ascii"), np.uint8))
        each.append(len(question) + len(answer))
    return np.stack(rows), np.array(each)


def _blocks(records: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of records (n,), a shard of them at a time, and their JSON (n, JSON_BYTES)."""
    at = len('{"id":"')
    for start in range(0, records, PER_SHARD):
        numbers = np.arange(start, min(start + PER_SHARD, records))
        rows = _texts()[0][numbers % DISTINCT]
        rows[:, at : at + ID_DIGITS] = _digits(numbers)
        yield numbers, rows


def _digits(numbers: np.ndarray, base: int = 10, width: int = ID_DIGITS) -> np.ndarray:
    """(n, width) of ASCII."""
    return (numbers[:, None] // base ** np.arange(width - 1, -1, -1) % base + ord("0")).astype(np.uint8)


def _write_json(path: Path, records: int) -> None:
    with path.open("wb") as file:
        file.write(b"[")
        for numbers, rows in _blocks(records):
            ends = np.full((len(rows), 2), np.frombuffer(b",\n", np.uint8))
            content = np.concatenate((rows, ends), axis=1).tobytes()
            file.write(content[:-2] if numbers[-1] == records - 1 else content)
        file.write(b"]\n")


def _write_packed(folder: Path, records: int) -> None:
    each, shards, index = _texts()[1], [], np.zeros(records, RECORD)
    for number, (numbers, rows) in enumerate(_blocks(records)):
        members = np.zeros((len(rows), MEMBER), np.uint8)
        members[:, : tarfile.BLOCKSIZE] = _headers(numbers)
        members[:, tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + JSON_BYTES] = rows
        content = members.tobytes() + bytes(2 * tarfile.BLOCKSIZE)
        (folder / shard_name(number)).write_bytes(content)
        shards.append(_described(content) | {"name": shard_name(number)})
        part = index[numbers[0] : numbers[-1] + 1]
        part["offset"] = np.arange(len(rows)) * MEMBER + tarfile.BLOCKSIZE
        part["shard"], part["size"] = number, JSON_BYTES
        part["crc32"] = [zlib.crc32(row) for row in rows]
        part["num_characters"], part["level"] = each[numbers % DISTINCT], NO_LEVEL
    of_index = {}
    for name, array in zip(INDEX, (index, np.empty(0, IMAGE)), strict=True):
        memory = io.BytesIO()
        np.save(memory, array, allow_pickle=False)
        (folder / name).write_bytes(memory.getvalue())
        of_index[name] = _described(memory.getvalue())
    made_for = hashlib.sha256(f"{records} records of a benchmark".encode()).hexdigest()  # reading all takes minutes
    manifest = {"format": FORMAT, "records": records, "data_hash": made_for, "index": of_index, "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _headers(numbers: np.ndarray) -> np.ndarray:
    """(n, 512) of the tar members 000000000.json, …"""
    info = tarfile.TarInfo("0" * ID_DIGITS + ".json")
    info.size = JSON_BYTES
    headers = np.tile(np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8), (len(numbers), 1))
    headers[:, :ID_DIGITS] = _digits(numbers)
    headers[:, 148:156] = ord(" ")  # the checksum, which is taken with spaces in its place
    headers[:, 148:154] = _digits(headers.sum(1, dtype=np.int64), base=8, width=6)
    headers[:, 154] = 0
    return headers


def _described(content: bytes) -> dict[str, object]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
