"""Samples that cannot be used, and why: one `Drop` each, in training, in `aligngpt doctor DATA`, in a run's
bad_samples.jsonl."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from .data.llava_json import Sample, printable
from .data.records import Records

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Drop:
    """One sample that cannot be used.

    record: its position in the data, from 0. id: "" where the record itself cannot be read. reason: what is wrong with
    it. kind: the same without names and numbers, to count by.
    """

    record: int
    id: str
    reason: str
    kind: str

    def __str__(self) -> str:
        return printable(f"record {self.record}{f' (id {self.id})' if self.id else ''}: {self.reason}")


def use_or_drop(records: Records, record: int, use: Callable[[Sample], T]) -> T | Drop:
    """What `use` makes of a sample, or why that cannot be had: its ValueError or OSError, or the sample's problem."""
    try:
        sample = records[record]
    except ValueError as error:
        return Drop(record, "", str(error), _kind(str(error)))
    try:
        if sample.problem:
            raise ValueError(sample.problem)
        return use(sample)
    except (ValueError, OSError) as error:
        reason = kind = str(error).removeprefix(f"{sample.name}: ")
        for name in sample.images:
            kind = kind.replace(f"{name}: ", "").replace(repr(name), "…")
        return Drop(record, sample.id, reason, _kind(kind))


def _kind(reason: str) -> str:
    """The reason without a file's first bytes and numbers."""
    reason = re.sub(r"begins with b(['\"]).*\1\)", "begins with …)", reason)
    return re.sub(r"[0-9]+", "…", reason)


def commonest(drops: Iterable[Drop], most: int = 10) -> list[str]:
    """The commonest kinds, a line each: how often, what, and one example."""
    examples: dict[str, Drop] = {}
    counts: Counter[str] = Counter()
    for drop in drops:
        counts[drop.kind] += 1
        examples.setdefault(drop.kind, drop)
    return [f"{count} × {printable(kind)}; for example {examples[kind]}" for kind, count in counts.most_common(most)]
