"""`aligngpt pack DATA --out FOLDER`: records and their images into tar shards with an index and checksums.

DATA is a LLaVA JSON file, the same as JSON lines, or WebDataset tars. What is in FOLDER says `aligngpt.data.shards`,
which reads it; every shard is also a WebDataset tar. Records keep their order and their content, whatever its keys, so
DATA and FOLDER give the same samples and the same `data_hash`. The same input gives the same bytes, however many
processes make them.

All records are read and checked before anything is written. An image that is missing, leads out of the image folder or
is larger than `MAX_BYTES` leaves its record where it is and is marked missing; the command counts and names those. URLs
are refused like other names that leave the folder, unless `--download` asks for them: then http and https are fetched
into the shard, once, with a limit in time and size. Images are not decoded.

Shards are made in FOLDER.partial, each written whole and synced before it gets its name, and beside each its part of
the index. A packing that was interrupted goes on from there when the command is given again. FOLDER appears when all is
done. Packing 665K records holds their JSON in memory, about three times the size of the file while it is parsed.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch.utils.data import Dataset

from .batch import load_in_order
from .data.llava_json import Sample, json_records, jsonl_records, parse_record, printable
from .data.records import NO_LEVEL, RecordList, Records, in_shards
from .data.shards import (
    FORMAT,
    IMAGE,
    IMAGE_EXTENSIONS,
    INDEX,
    MANIFEST,
    MISSING,
    MOST_TEXT,
    RECORD,
    Found,
    TarShards,
    read_manifest,
    scan_tars,
    shard_name,
)
from .data.tables import data_hash, sync_to_disk, whole_file
from .image import MAX_BYTES

SECONDS_PER_DOWNLOAD = 60
_SECONDS_OF_SILENCE = 20  # of a server, before it is given up


@dataclass(frozen=True, eq=False)
class Source:
    """What is packed: the JSON of each record, and `Records` that know where images are."""

    lines: list[bytes]
    records: Records
    data_hash: str
    download: bool = False

    def sample(self, number: int) -> Sample:
        return parse_record(json.loads(self.lines[number]), number, f"record {number}")

    def image(self, sample: Sample, number: int) -> bytes:
        """The bytes of an image. ValueError, OSError: it can't be had."""
        name = sample.images[number]
        if self.download and re.match("https?://", name, re.IGNORECASE):
            return fetch(name)
        found = self.records.image(sample, number)
        if isinstance(found, bytes):
            return found
        if not found.is_file():
            raise ValueError(f"{name}: no such file")
        if (size := found.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{name}: {size} bytes; at most {MAX_BYTES} are packed")
        return found.read_bytes()


def read_source(
    path: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None, *, download: bool = False
) -> Source:
    """All records of a JSON file, JSON lines or WebDataset tars.

    ValueError: what their reader refuses, a packed folder, an image folder for tars or none for JSON with images.
    """
    name = os.fspath(path)
    lines: list[bytes] = []

    def add(record: dict[str, Any], where: str) -> None:
        line = json.dumps(record, separators=(",", ":")).encode("ascii")
        if len(line) > MOST_TEXT:
            raise ValueError(f"{where} has {len(line)} bytes of JSON; at most {MOST_TEXT} are read from a shard")
        lines.append(line)

    def json_samples() -> Iterator[Sample]:
        read = jsonl_records if name.endswith(".jsonl") else json_records
        for number, (record, where) in enumerate(read(path)):
            sample = parse_record(record, number, where)
            if sample.images and image_folder is None and not download:
                raise ValueError(f"{where} has an image; packing needs an image folder")
            yield sample
            add(record, where)

    def tar_samples() -> Iterator[Found]:
        for found in scan_tars(path):
            yield found
            add(found.record, f"{found.path}: {found.sample.name}")

    if not in_shards(path):
        found_hash = data_hash(json_samples())  # samples are not kept: their JSON is
        return Source(lines, RecordList([], image_folder, path=name), found_hash, download)
    if image_folder is not None or download:
        raise ValueError(
            f"{name} are shards, which hold their images; they need neither an image folder nor --download"
        )
    if (Path(path) / MANIFEST).is_file():
        raise ValueError(f"{name} is packed already; needs a JSON file, JSON lines or tars without a {MANIFEST}")
    shards = TarShards(path, tar_samples())
    return Source(lines, shards, shards.sha256)


def fetch(url: str) -> bytes:
    """What an http or https address gives, redirects to such addresses included.

    ValueError: another scheme, an error of the server, more than `MAX_BYTES` or than `SECONDS_PER_DOWNLOAD`.
    """
    opener = urllib.request.OpenerDirector()  # `build_opener` would add file:, ftp: and data:
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        _HttpRedirects,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    deadline = time.monotonic() + SECONDS_PER_DOWNLOAD
    data = io.BytesIO()
    try:
        response: HTTPResponse = opener.open(url, timeout=_SECONDS_OF_SILENCE)
        with response:
            while piece := response.read1(1 << 16):
                data.write(piece)
                if data.tell() > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES} bytes; at most that many are fetched")
                if time.monotonic() > deadline:
                    raise ValueError(f"not there after {SECONDS_PER_DOWNLOAD} s")
            if response.length:
                raise ValueError(f"the connection ended {response.length} bytes too early")
    except (ValueError, OSError, HTTPException) as error:
        raise ValueError(f"{url}: {' '.join(str(error).split())}") from error
    return data.getvalue()


class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not re.match("https?://", newurl, re.IGNORECASE):  # a proxy would take ftp: too
            raise ValueError(f"it leads to {newurl}; only http and https are fetched")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


# ---------------------------------------------------------------------------------------------------- the folder


def pack(source: Source, out: str | os.PathLike[str], *, records_per_shard: int = 5000, workers: int = 0) -> list[str]:
    """Pack into the folder `out`, going on where an interrupted packing stopped; returns the images that are missing.

    workers: processes that make shards; with 0 they are made here.
    ValueError: `out` or its partial folder is of other data, or another process packs into it. OSError: disk full, …
    """
    from tqdm import tqdm

    out = Path(os.path.abspath(out))  # "." has no name
    about = describe(source, records_per_shard)
    _check_free(out)
    partial = _partial(out)
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{partial} is in use by another process; it needs to end first") from error
        _check_plan(partial, about | {"images": _where(source)})
        for leftover in partial.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)
        num_records = len(source.lines)
        numbers = range(-(-num_records // records_per_shard))
        todo = [number for number in numbers if _whole_part(partial, number) is None]
        made = load_in_order(_Shards(source, partial, records_per_shard), todo, workers=min(workers, len(todo)))
        with tqdm(total=num_records, unit="record", disable=None) as progress:
            progress.update(num_records - sum(_count(num_records, records_per_shard, number) for number in todo))
            for number, problem in zip(todo, made, strict=True):
                if problem is not None:
                    raise _explained(problem, partial)
                progress.update(_count(num_records, records_per_shard, number))
        try:
            missing = _finish(partial, len(numbers), about)
            os.rename(partial / "shards", out)
            sync_to_disk(out.parent)
        except OSError as error:
            raise _explained(error, partial) from error
        shutil.rmtree(partial)
    return missing


def describe(source: Source, records_per_shard: int) -> dict[str, Any]:
    """What a manifest says of the data, by which a packing knows that it goes on with the same."""
    digest = hashlib.sha256()
    for line in source.lines:
        digest.update(line + b"\n")
    return {
        "format": FORMAT,
        "records": len(source.lines),
        "data_hash": source.data_hash,
        "records_sha256": digest.hexdigest(),
        "records_per_shard": records_per_shard,
    }


def is_packed(out: str | os.PathLike[str], about: dict[str, Any]) -> bool:
    """Whether `out` holds just this, finished. ValueError: it holds something else."""
    out = Path(out)
    if not (out / MANIFEST).is_file():
        _check_free(out)
        return False
    manifest = read_manifest(out)
    other = [key for key, value in about.items() if manifest.get(key) != value]
    if other:
        raise ValueError(f"{out} holds a packing with another {', '.join(other)}; needs a folder of its own")
    return True


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; packing needs a new or an empty folder")


def _check_plan(partial: Path, plan: dict[str, Any]) -> None:
    path = partial / "plan.json"
    if not path.exists():
        _save(path, _json(plan))
    elif json.loads(path.read_bytes()) != plan:
        raise ValueError(f"{partial} is the beginning of another packing; remove it, or choose another --out")


def _where(source: Source) -> dict[str, Any]:
    """Where the images come from."""
    records = source.records
    folder = records.image_folder if isinstance(records, RecordList) else None
    return {"folder": os.path.abspath(folder or records.path), "download": source.download}


def _count(num_records: int, records_per_shard: int, number: int) -> int:
    return min(records_per_shard, num_records - number * records_per_shard)


def _whole_part(partial: Path, number: int) -> dict[str, Any] | None:
    """The index of a shard that is finished. It gets its name after the shard, so both are whole."""
    try:
        part = json.loads((partial / f"{number:06d}.json").read_bytes())
        size = (partial / "shards" / shard_name(number)).stat().st_size
    except FileNotFoundError:
        return None
    return part if size == part["bytes"] else None


def _explained(error: OSError, partial: Path) -> OSError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return OSError(
        f"no space is left for {partial} ({error.strerror}); the shards in it are whole, and packing goes on from them "
        "when the same command is given with space for the rest"
    )


class _Shards(Dataset[OSError | None]):
    """Makes shard `number` and its part of the index; gives the error that stopped it."""

    def __init__(self, source: Source, partial: Path, records_per_shard: int):
        self.source = source
        self.partial = partial
        self.records_per_shard = records_per_shard

    def __getitem__(self, number: int) -> OSError | None:
        try:
            path = self.partial / "shards" / shard_name(number)
            with whole_file(path, sync=True) as temporary, temporary.open("wb") as file:
                part = self._write(_Tar(file), number)
            _save(self.partial / f"{number:06d}.json", _json(part))
        except OSError as error:
            return error
        return None

    def _write(self, tar: _Tar, number: int) -> dict[str, Any]:
        records: list[tuple[int, ...]] = []
        images: list[tuple[int, int, int]] = []
        missing: list[str] = []
        start = number * self.records_per_shard
        for record in range(start, start + _count(len(self.source.lines), self.records_per_shard, number)):
            sample, line = self.source.sample(record), self.source.lines[record]
            row = {
                "offset": tar.add(f"{record:09d}.json", line),
                "first_image": len(images),
                "shard": number,
                "size": len(line),
                "crc32": zlib.crc32(line),
                "num_images": len(sample.images),
                "num_characters": sum(len(turn.text) for turn in sample.turns),
                "level": NO_LEVEL if sample.level is None else sample.level,
            }
            records.append(tuple(row[field] for field in RECORD.names or ()))
            for place, name in enumerate(sample.images):
                try:
                    data = self.source.image(sample, place)
                except (ValueError, OSError) as error:
                    missing.append(f"{sample.name}: {error}")
                    images.append((0, MISSING, 0))
                    continue
                which = f".{place}" if len(sample.images) > 1 else ""
                offset = tar.add(f"{record:09d}{which}.{_extension(name)}", data)
                images.append((offset, len(data), zlib.crc32(data)))
        tar.end()
        return {
            "bytes": tar.size,
            "sha256": tar.digest.hexdigest(),
            "records": records,
            "images": images,
            "missing": missing,
        }


class _Tar:
    """Writes a ustar archive whose bytes depend on its members alone."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Returns where the data begin."""
        info = tarfile.TarInfo(name)  # its owner, mode and time are constants
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def end(self) -> None:
        self._write(bytes(2 * tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)


def _extension(name: str) -> str:
    found = name.rpartition(".")[2].lower()
    return found if found in IMAGE_EXTENSIONS else "jpg"  # readers of WebDataset look into the file


def _finish(partial: Path, num_shards: int, about: dict[str, Any]) -> list[str]:
    """Join the parts of the index and write the manifest; returns the images that are missing."""
    folder = partial / "shards"
    records: list[np.ndarray] = []
    images: list[np.ndarray] = []
    shards: list[dict[str, Any]] = []
    missing: list[str] = []
    num_images = 0
    for number in range(num_shards):
        part = _whole_part(partial, number)
        assert part is not None, f"shard {number} was made"
        records.append(np.array([tuple(row) for row in part["records"]], dtype=RECORD))
        records[-1]["first_image"] += num_images
        images.append(np.array([tuple(row) for row in part["images"]], dtype=IMAGE))
        num_images += len(images[-1])
        shards.append({"name": shard_name(number), "bytes": part["bytes"], "sha256": part["sha256"]})
        missing += part["missing"]
    index = {}
    for name, parts in zip(INDEX, (records, images), strict=True):
        memory = io.BytesIO()
        np.save(memory, np.concatenate([np.empty(0, INDEX[name]), *parts]), allow_pickle=False)
        index[name] = _checked(folder / name, memory.getvalue())
    counts = {"images": num_images, "missing": len(missing)}
    manifest = _checked(folder / MANIFEST, _json(about | counts | {"index": index, "shards": shards}, indent=1))
    sums = [*((shard["name"], shard) for shard in shards), *index.items(), (MANIFEST, manifest)]
    _checked(folder / "SHA256SUMS", "".join(f"{file['sha256']}  {name}\n" for name, file in sums).encode())
    for leftover in folder.glob("*.tmp"):  # of a worker that outlived an interrupted packing for a moment
        leftover.unlink(missing_ok=True)
    sync_to_disk(folder)
    return missing


def _checked(path: Path, data: bytes) -> dict[str, Any]:
    _save(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _json(content: Any, indent: int | None = None) -> bytes:
    return (json.dumps(content, indent=indent) + "\n").encode("ascii")


def _save(path: Path, data: bytes) -> None:
    with whole_file(path, sync=True) as temporary:
        temporary.write_bytes(data)


# ---------------------------------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt pack`."""
    parser.add_argument(
        "data", metavar="DATA", help="a LLaVA JSON file, JSON lines (.jsonl), a tar or a folder of tars"
    )
    parser.add_argument("--image-folder", metavar="DIR", help="what the data's image names start from")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--records-per-shard", type=int, default=5000, metavar="N", help="default 5000")
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that make shards (default 4, or as many as there are cores)",
    )  # fmt: skip
    parser.add_argument("--download", action="store_true", help="fetch images whose names are http or https addresses")


def run(args: argparse.Namespace) -> int:
    """`aligngpt pack`: makes the folder, then says in a few lines what is in it. 1: none of its images."""
    for flag, value, least in (("--records-per-shard", args.records_per_shard, 1), ("--workers", args.workers, 0)):
        if value < least:
            raise ValueError(f"{flag} is {value}; it needs a whole number of at least {least}")
    if args.image_folder is not None and not Path(args.image_folder).is_dir():
        raise ValueError(f"--image-folder is {args.image_folder}; it needs a folder that exists")
    out = Path(os.path.abspath(args.out))
    if not (out / MANIFEST).is_file():
        _check_free(out)
    source = read_source(args.data, args.image_folder, download=args.download)
    if is_packed(out, describe(source, args.records_per_shard)):
        shutil.rmtree(_partial(out), ignore_errors=True)  # where it was interrupted after its last step but one
        print(f"{out} is finished; it holds these {len(source.lines)} records")
        return _usable(out)
    missing = pack(source, out, records_per_shard=args.records_per_shard, workers=args.workers)
    manifest = read_manifest(out)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(
        f"{manifest['records']} records and {manifest['images'] - len(missing)} images packed into {out}: "
        f"{len(manifest['shards'])} shards, {_size(size)}"
    )
    if missing:
        print(f"{len(missing)} images could not be packed; their records can't be used:", file=sys.stderr)
        for line in missing[:10]:
            print(f"  {printable(line)}", file=sys.stderr)
        if len(missing) > 10:
            print("  …", file=sys.stderr)
    return _usable(out)


def _usable(out: Path) -> int:
    """The exit status for a finished folder: 1, with a word on why, where images were meant and none is there."""
    manifest = read_manifest(out)
    if not manifest["images"] or manifest["missing"] < manifest["images"]:
        return 0
    print(
        f"none of the {manifest['images']} images is in {out}; remove it and pack with the --image-folder that their "
        "names start from",
        file=sys.stderr,
    )
    return 1


def _size(num_bytes: int) -> str:
    power = (len(str(num_bytes)) - 1) // 3
    return f"{num_bytes / 1000**power:.4g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
