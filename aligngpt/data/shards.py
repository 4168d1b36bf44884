"""Tar shards to samples: the sets that `aligngpt pack` makes, and WebDataset shards made by others.

    open_shards(path) -> Records        a packed folder, a folder of `*.tar`, or one `.tar`

**A packed folder** holds

    shard-000000.tar …   000000123.json, the record, then its images, 000000123.jpg (of several: 000000123.0.jpg, …)
    records.npy          a `RECORD` for each record: where its JSON lies, its checksum, a few facts
    images.npy           an `IMAGE` for each image of each record, in order; size -1 where packing found none
    manifest.json        counts, `data_hash`, size and SHA-256 of every other file
    SHA256SUMS           the same for `sha256sum -c`

Opening reads the manifest, checks the index against its SHA-256 and the shards against their sizes, and maps the index
into memory, so that all processes of a machine share its pages. A record is one `pread` and one small parse, whatever
the size of the set. Every record and image is compared with its CRC-32 at each access. Where a shard is shorter than
it should be, what lies before the cut stays usable; the shard is named in a warning, and in the error of what is lost.

**Other WebDataset shards** have no index, so opening walks through the headers of all members and keeps every sample
in memory. Members that follow each other and agree up to the first dot of their file name are one sample. It is a
LLaVA record (`.json` with "conversations") with its images in order, or images and a caption (`.txt`, or "caption" in
the `.json`), which becomes the turns "<image>" and caption; a caption without an image is a sample with a `problem`.
Other members (`.cls`, `.pkl`, `.npy`, …) are never read. A tar that ends too early gives the samples that are surely
whole, and a warning: its last caption is dropped, because another image of it may have followed.

Refused, always by ValueError: links, devices, absolute names, ".." and sizes below 0 in a tar, and headers that would
fill memory; compressed tars; shards that are links out of their folder, or pipes; an index that is not the one of the
manifest, or contradicts itself or the shards. Members are read in place and never written to disk, records of more
than `MOST_TEXT` and images of more than `MAX_BYTES` are not read at all, no name in a tar or a record becomes a path,
and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import tarfile
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import numpy as np

from .llava_json import Sample, inside, parse_json, parse_record
from .records import RecordList, Records, is_tar

FORMAT = 1  # of a packed folder
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # of the JSON in its shard
        ("first_image", "<i8"),  # row of images.npy
        ("shard", "<i4"),
        ("size", "<i4"),  # bytes of JSON
        ("crc32", "<u4"),
        ("num_images", "<i4"),
        ("num_characters", "<i4"),
        ("level", "<i4"),  # NO_LEVEL where the record states none
    ]
)
IMAGE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("crc32", "<u4")])  # in the shard of the record
MISSING = -1  # as the size of an image
MANIFEST = "manifest.json"
INDEX = {"records.npy": RECORD, "images.npy": IMAGE}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm")

MOST_TEXT = 1 << 26  # bytes of one record or caption
_MOST_OPEN = 512  # shards that a process keeps open; further ones are opened for each read
_MOST_HEADER = 1 << 20  # bytes that one read of a tar's headers may ask for; long names and PAX fields are read whole
_MEMBER = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]+)", re.DOTALL)  # WebDataset's key and extension

logger = logging.getLogger(__name__)


def shard_name(number: int) -> str:
    """File name of a packed folder's shard."""
    return f"shard-{number:06d}.tar"


def open_shards(path: str | os.PathLike[str]) -> Records:
    """The samples of a packed folder, of a folder of WebDataset tars in the order of their names, or of one tar.

    ValueError: none of the three, or what the module's docstring says is refused.
    """
    if (Path(path) / MANIFEST).is_file():
        return PackedShards(path)
    return TarShards(path, scan_tars(path))


# ---------------------------------------------------------------------------------------------------- packed shards


class PackedShards(Records):
    """A folder that `aligngpt pack` made. Processes may be forked from one that has it open, and it can be pickled."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._folder = Path(path).absolute()
        manifest = read_manifest(path)
        self._sha256: str = manifest["data_hash"]
        for name, described in manifest["index"].items():
            try:
                with _inside(self._folder, name).open("rb") as file:  # mapped pages would count as resident
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise ValueError(f"{self._folder / name} can't be read ({error.strerror}); needs the index") from error
            if found != described["sha256"]:
                raise ValueError(
                    f"{self._folder / name}: SHA-256 is {found[:12]}…; {MANIFEST} needs {described['sha256'][:12]}…"
                )
        self._files = _Files([_inside(self._folder, shard["name"]) for shard in manifest["shards"]])
        for file_path, shard in zip(self._files.paths, manifest["shards"], strict=True):
            size = file_path.stat().st_size if file_path.is_file() else 0
            if size != shard["bytes"]:
                logger.warning(
                    "%s has %d bytes and needs %d; what is not in it can't be used", file_path, size, shard["bytes"]
                )
        self._map()
        self._check()
        self._map()  # anew, so that the pages that were checked do not stay resident

    def _map(self) -> None:
        self._rows, self._images = (_mapped(self._folder / name, fields) for name, fields in INDEX.items())

    def _check(self) -> None:
        """The index leads into the shards, and gives every record images of its own."""
        num_shards = len(self._files.paths)
        shard, size, num_images = (self._rows[field] for field in ("shard", "size", "num_images"))
        ends = np.cumsum(num_images, dtype=np.int64)
        good = (
            np.all((shard >= 0) & (shard < num_shards) & (size >= 0) & (num_images >= 0))
            and np.all(self._rows["first_image"] == ends - num_images)
            and sum(ends[-1:]) == len(self._images)
            and np.all(self._images["size"] >= MISSING)
        )
        if not good:
            raise ValueError(
                f"{self._folder}: the index does not fit {num_shards} shards and {len(self._images)} images; needs the "
                "files that `aligngpt pack` wrote"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_rows", "_images")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # negative ones count from the end
        row = self._rows[number]
        shard = int(row["shard"])
        where = f"{self._files.paths[shard]}: record {number}"
        data = self._files.read(shard, int(row["offset"]), int(row["size"]), where, MOST_TEXT)
        if zlib.crc32(data) != row["crc32"]:
            raise ValueError(f"{where}: its bytes are not those that were packed (CRC-32); sha256sum -c finds the file")
        return parse_record(parse_json(data, where, "a JSON object"), number, where)

    def image(self, sample: Sample, number: int) -> bytes:
        name = sample.images[number]
        row = self._rows[sample.record]
        if len(sample.images) != row["num_images"]:
            raise ValueError(
                f"{name}: the record has {len(sample.images)} images, the index of {self.path} {row['num_images']}"
            )
        image = self._images[int(row["first_image"]) + number]
        shard, size = int(row["shard"]), int(image["size"])
        if size == MISSING:
            raise ValueError(f"{name}: was missing when the data were packed")
        data = self._files.read_image(shard, int(image["offset"]), size, name)
        if zlib.crc32(data) != image["crc32"]:
            raise ValueError(
                f"{name}: its bytes in {self._files.paths[shard]} are not those that were packed (CRC-32); "
                "sha256sum -c finds the file"
            )
        return data

    @property
    def sha256(self) -> str:
        return self._sha256

    @property
    def num_images(self) -> np.ndarray:
        return self._rows["num_images"]

    @property
    def num_characters(self) -> np.ndarray:
        return self._rows["num_characters"]

    @property
    def levels(self) -> np.ndarray:
        return self._rows["level"]


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a packed folder says of itself. ValueError: it is damaged, or of another version."""
    path = _inside(Path(folder), MANIFEST)
    manifest = parse_json(path.read_bytes(), path, "a JSON object")
    try:
        if manifest["format"] != FORMAT:
            raise ValueError(f"{path}: format is {manifest['format']!r}; this version reads {FORMAT}")
        names = [shard["name"] for shard in manifest["shards"]]
        whole = (
            list(manifest["index"]) == list(INDEX)
            and names == [shard_name(number) for number in range(len(names))]
            and all(isinstance(shard["bytes"], int) for shard in manifest["shards"])
            and all(isinstance(index["sha256"], str) for index in manifest["index"].values())
            and isinstance(manifest["data_hash"], str)
        )
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} does not describe shards and an index; needs a file that `aligngpt pack` wrote")
    return manifest


def _inside(folder: Path, name: str) -> Path:
    return inside(folder, name, str(folder / name), "its folder")


def _mapped(path: Path, fields: np.dtype) -> np.ndarray:
    """An array of the index, in shared pages of the file."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # unlike `np.load`, it takes neither pickles nor archives
    except (ValueError, OSError, OverflowError) as error:
        raise ValueError(f"{path} can't be mapped ({error}); needs an array that `aligngpt pack` wrote") from error
    if array.dtype != fields or array.ndim != 1:
        raise ValueError(f"{path} has rows of {array.dtype}; needs {fields}")
    return array.view(np.ndarray)


class _Files:
    """Shards, opened when they are first read. Reads name their place, so forked processes share no position."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._open: dict[int, int] = {}  # descriptors by shard
        weakref.finalize(self, _close, self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Files, (self.paths,)

    def read_image(self, shard: int, offset: int, size: int, name: str) -> bytes:
        from ..image import MAX_BYTES

        return self.read(shard, offset, size, name, MAX_BYTES)

    def read(self, shard: int, offset: int, size: int, what: str, most: int) -> bytes:
        """`size` bytes from `offset`. ValueError, beginning with `what`: more than `most`, or they are not there."""
        if size > most:
            raise ValueError(f"{what}: {size} bytes; at most {most} are read")
        path = self.paths[shard]
        try:
            descriptor = self._open.get(shard)
            if descriptor is not None:
                data = _pread(descriptor, offset, size)
            else:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                data = _pread(descriptor, offset, size)
                if len(self._open) >= _MOST_OPEN or self._open.setdefault(shard, descriptor) != descriptor:
                    os.close(descriptor)
        except OSError as error:
            raise ValueError(f"{what}: {path} can't be read ({error.strerror})") from error
        if len(data) < size:
            raise ValueError(f"{what}: lies in {path} from byte {offset} to {offset + size}, where the file is cut")
        return data


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def _close(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


# ---------------------------------------------------------------------------------------------------- others' shards


@dataclass(frozen=True, slots=True)
class Found:
    """A sample of a WebDataset tar: as a LLaVA record, parsed, and (offset, size) of each image, None where it is not
    there.

    whole: it says how many images it has, and they are there.
    """

    record: dict[str, Any]
    sample: Sample
    path: Path
    images: list[tuple[int, int] | None]
    whole: bool


class TarShards(RecordList):
    """The samples of WebDataset tars, in memory; their images stay in the tars."""

    def __init__(self, path: str | os.PathLike[str], found: Iterable[Found]):
        samples: list[Sample] = []
        first: list[int] = []  # of each sample: place in `spans`
        spans: list[tuple[int, int, int]] = []  # shard, offset, size
        shards: dict[Path, int] = {}
        for one in found:
            samples.append(one.sample)
            first.append(len(spans))
            shard = shards.setdefault(one.path, len(shards))
            spans += [(shard, *(span or (0, MISSING))) for span in one.images]
        if not samples:
            raise ValueError(f"{os.fspath(path)} holds no sample; needs tars with one at least")
        super().__init__(samples, None, path=os.fspath(path))
        self._first = np.array(first, dtype=np.int64)
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 3)
        self._files = _Files(list(shards))

    def image(self, sample: Sample, number: int) -> bytes:
        name = sample.images[number]
        shard, offset, size = self._spans[self._first[sample.record] + number].tolist()
        if size == MISSING:
            raise ValueError(f"{name}: {self.path} holds no image for it")
        return self._files.read_image(shard, offset, size, name)


def scan_tars(path: str | os.PathLike[str]) -> Iterator[Found]:
    """The samples of a tar, or of a folder's tars in the order of their names."""
    root = Path(path)
    paths = [root]
    if root.is_dir():
        names = sorted(file.name for file in root.iterdir() if is_tar(file.name))
        if not names:
            raise ValueError(f"{root} holds neither {MANIFEST} nor a .tar; needs a folder of shards")
        paths = [_inside(root, name) for name in names]
    number = 0
    for tar in paths:
        for found in _scan(tar, number):
            yield found
            number += 1


def _scan(path: Path, number: int) -> Iterator[Found]:
    """The samples of one tar; number: position of the first."""
    members, problem = _members(path)
    if problem:
        logger.warning("%s %s; only the samples before it are used", path, problem)
    groups = [(key, list(group)) for key, group in groupby(members, key=lambda member: member.key)]
    with path.open("rb") as file:
        for place, (key, group) in enumerate(groups):
            last_of_cut = problem is not None and place == len(groups) - 1
            try:
                found = _sample(path, file, key, group, number)
            except ValueError:
                if last_of_cut:
                    return
                raise
            if last_of_cut and not found.whole:
                return
            yield found
            number += 1


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    key: str
    extension: str
    offset: int
    size: int


def _members(path: Path) -> tuple[list[_Member], str | None]:
    """A tar's files that have a key and are wholly there, and what is wrong with its end."""
    length = path.stat().st_size
    infos: list[tarfile.TarInfo] = []
    with _Headers(io.FileIO(path)) as file:
        if file.read(2) == b"\x1f\x8b" or path.suffix != ".tar":
            raise ValueError(f"{path} is a compressed tar; needs a plain one, in which members can be read in place")
        file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                while (info := tar.next()) is not None:
                    _check_member(info)  # before the next: a size below 0 would lead back to where we were
                    infos.append(info)
                end = tar.offset
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from error
        except Exception as error:  # a damaged header: tarfile raises whatever its parser trips over
            if not infos and length >= tarfile.BLOCKSIZE:
                raise ValueError(f"{path} is no tar ({error}); needs a plain one") from error
            end = length
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    problem = None
    if len(block) < tarfile.BLOCKSIZE:
        problem = f"is cut after {length} bytes"
    elif any(block):
        problem = f"is damaged at byte {end}"
    members = []
    for info in infos:
        match = _MEMBER.fullmatch(info.name)
        if match and info.isreg() and info.offset_data + info.size <= length:
            members.append(_Member(info.name, match[1], match[2].lower(), info.offset_data, info.size))
    return members, problem


class _Refused(ValueError):
    """Of a tar whose headers say what no honest one says."""


class _Headers(io.BufferedReader):
    """A tar of which `tarfile` reads headers alone."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MOST_HEADER:
            raise _Refused(f"a header of {size} bytes at byte {self.tell()}; needs 0 to {_MOST_HEADER}")
        return super().read(size)


def _check_member(info: tarfile.TarInfo) -> None:
    what = f"member {info.name!r}"
    if info.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", info.name):
        raise _Refused(f"{what} leaves the archive; its name must be relative, without '..'")
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise _Refused(f"{what} is of type {info.type!r}; needs to be a plain file: no link, no device, not sparse")
    if info.size < 0:
        raise _Refused(f"{what} has {info.size} bytes; needs 0 at least")


def _sample(path: Path, file: Any, key: str, members: list[_Member], number: int) -> Found:
    """The sample of the members with one key."""
    texts: dict[str, bytes] = {}
    images: list[_Member] = []
    for member in members:
        if member.extension in ("json", "txt"):
            if member.extension in texts:
                raise ValueError(f"{path}: member {member.name!r} is there twice; needs one for each sample")
            if member.size > MOST_TEXT:
                raise ValueError(
                    f"{path}: member {member.name!r} has {member.size} bytes; at most {MOST_TEXT} are read"
                )
            file.seek(member.offset)
            texts[member.extension] = file.read(member.size)
        elif member.extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            images.append(member)
    where = f"{path}: {key!r}"
    record = parse_json(texts["json"], f"{where}.json", "a JSON object") if "json" in texts else None
    if isinstance(record, dict) and "conversations" in record:
        sample = parse_record(record, number, where)
        placed = _placed(where, images, len(sample.images))
        return Found(record, sample, path, placed, whole=None not in placed)
    caption = record.get("caption") if isinstance(record, dict) else None
    if "txt" in texts:
        try:
            caption = texts["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}.txt is not UTF-8 ({error}); needs UTF-8") from error
    if not isinstance(caption, str):
        kinds = ", ".join(member.extension for member in members)
        raise ValueError(f"{where} has {kinds}; needs a .json with 'conversations', or an image and its caption")
    marks = "\n".join(["<image>"] * max(1, len(images)))  # where the image is missing, its mark makes a problem
    record = {
        "id": key,
        "image": [member.name for member in images],
        "conversations": [{"from": "human", "value": marks}, {"from": "gpt", "value": caption.strip()}],
    }
    spans: list[tuple[int, int] | None] = [(member.offset, member.size) for member in images]
    return Found(record, parse_record(record, number, where), path, spans, whole=False)


def _placed(where: str, members: list[_Member], num_images: int) -> list[tuple[int, int] | None]:
    """Where each of a record's images lies. "0.jpg", "1.jpg" say which they are; others are taken in order."""
    spans: list[tuple[int, int] | None] = [None] * num_images
    for order, member in enumerate(members):
        stated = re.fullmatch(r"([0-9]{1,6})\.\w+", member.extension)
        place = int(stated[1]) if stated else order
        if place >= num_images or spans[place] is not None:
            raise ValueError(f"{where} has {len(members)} images, {member.name!r} among them; needs {num_images}")
        spans[place] = (member.offset, member.size)
    return spans
