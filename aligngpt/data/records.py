"""A data set by position: its samples, their image files, and a few facts about all of them.

    open_records(path, image_folder) -> Records       len, records[i] -> Sample, records.image(sample, k) -> file

`path` may be a LLaVA JSON file, the same as JSON lines (`.jsonl`), or tar shards (`aligngpt.data.shards`). All give the
same samples in the same order, with the same `sha256`. The first two are read whole into memory and need a folder of
images; packed shards are opened in a moment and read one record at a time.
"""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from .llava_json import Sample, image_path, read_llava_json, read_llava_jsonl
from .tables import data_hash

NO_LEVEL = -1  # in `levels`


class Records(Sequence[Sample]):
    """The samples of a data set. What is wrong with one record is a ValueError of that record alone.

    path: what errors call the data set.
    """

    path: str

    @abstractmethod
    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    @abstractmethod
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        """A sample, or a list of them."""

    @abstractmethod
    def image(self, sample: Sample, number: int) -> Path | bytes:
        """The file of the sample's image `number`, or what is in it; whether it is an image is for `open_image` to say.

        ValueError: the name leaves the data set, or the file is known to be missing or damaged.
        """

    @property
    @abstractmethod
    def sha256(self) -> str:
        """`data_hash` of all samples."""

    @property
    @abstractmethod
    def num_images(self) -> np.ndarray:
        """(records,) int: images of each sample."""

    @property
    @abstractmethod
    def num_characters(self) -> np.ndarray:
        """(records,) int: characters of each sample's turns."""

    @property
    @abstractmethod
    def levels(self) -> np.ndarray:
        """(records,) int: the level that each record states, `NO_LEVEL` where it states none."""


class RecordList(Records):
    """Samples in memory, with their images in a folder."""

    def __init__(
        self, samples: Sequence[Sample], image_folder: str | os.PathLike[str] | None, *, path: str = "the data"
    ):
        self.samples = samples
        self.image_folder = image_folder
        self.path = path

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self.samples[index]

    def image(self, sample: Sample, number: int) -> Path | bytes:
        if self.image_folder is None:
            raise ValueError(f"{sample.images[number]}: no image folder was given; {self.path} needs one")
        return image_path(self.image_folder, sample.images[number])

    @cached_property
    def sha256(self) -> str:
        return data_hash(self.samples)

    @cached_property
    def num_images(self) -> np.ndarray:
        return np.array([len(sample.images) for sample in self.samples], dtype=np.int64)

    @cached_property
    def num_characters(self) -> np.ndarray:
        return np.array([sum(len(turn.text) for turn in sample.turns) for sample in self.samples], dtype=np.int64)

    @cached_property
    def levels(self) -> np.ndarray:
        levels = [NO_LEVEL if sample.level is None else sample.level for sample in self.samples]
        return np.array(levels, dtype=np.int64)


def open_records(path: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None) -> Records:
    """The data set at `path`.

    image_folder: what the image names of a JSON or JSON lines file start from; shards hold their images.

    ValueError: the file is none of the three kinds or is damaged, or shards are given an image folder.
    """
    name = os.fspath(path)
    if in_shards(path):
        from .shards import open_shards

        if image_folder is not None:
            raise ValueError(f"image folder is {image_folder}; {name} are shards, which hold their images")
        return open_shards(path)
    read = read_llava_jsonl if name.endswith(".jsonl") else read_llava_json
    return RecordList(read(path), image_folder, path=name)


def in_shards(path: str | os.PathLike[str]) -> bool:
    """Whether `open_records` takes the data set at `path` for shards: a folder, or a file that is called like a tar."""
    return Path(path).is_dir() or is_tar(os.fspath(path))


def is_tar(name: str) -> bool:
    """Whether a file is called like a tar, compressed ones included: shards refuse those by name."""
    return re.search(r"\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz)$", name) is not None


def check_levels(records: Records, num_levels: int) -> None:
    """ValueError naming the first sample with an image whose level is missing or outside 0..num_levels-1."""
    levels = records.levels
    bad = np.flatnonzero((records.num_images > 0) & ((levels < 0) | (levels >= num_levels)))
    if len(bad):
        sample = records[int(bad[0])]
        got = "no align_level" if sample.level is None else f"align_level {sample.level}"
        raise ValueError(f"{records.path}: {sample.name} has {got}; it needs one in 0..{num_levels - 1}")
