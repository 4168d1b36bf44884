"""Samples that a run could not use: a line each in RUN/bad_samples.jsonl, and the limit at which the run stops.

A line holds: step (from 1), attempt (0 for a sample of the order; 1, 2, … for one that was to stand in), record, id,
reason, kind (the reason without names and numbers). All processes keep the same lines; rank 0 writes; a checkpoint
holds those until then, and the file follows the checkpoint. The limit is on the samples of the order.
"""

import json
from pathlib import Path
from typing import Any

from aligngpt.drops import Drop, commonest
from training.metrics import rewrite

FILE = "bad_samples.jsonl"
_FIELDS = ("record", "id", "reason", "kind")  # of a Drop


class BadSampleError(ValueError):
    """Too many samples cannot be used (the message has the commonest reasons), or processes read different ones."""


class DroppedSamples:
    """The dropped samples of a run that takes `total` samples in all, `lines` of them so far.

    max_rate: share of the total that may be dropped. The file is written once the run's folder is this run's, from
    `start` on.
    """

    def __init__(self, run_dir: Path, *, lines: list[dict[str, Any]], total: int, max_rate: float):
        self.path = run_dir / FILE
        self.lines: list[dict[str, Any]] = []
        self.count = 0  # samples of the order that were dropped
        self._take_down(lines)
        self.total = total
        self.max_rate = max_rate
        self.started = False

    def start(self) -> None:
        """Write from now on, in place of what the file holds. For rank 0 alone."""
        if self.lines or self.path.exists():
            rewrite(self.path, [json.dumps(line) + "\n" for line in self.lines])
        self.started = True

    def step(self, number: int, drops: list[tuple[int, Drop]], *, taken: int) -> None:
        """Take down what step `number` (from 0) dropped. taken: samples that the run has taken with it.

        Raises:
            BadSampleError: it is more than the run may drop.
        """
        lines = [
            {"step": number + 1, "attempt": attempt} | {name: getattr(drop, name) for name in _FIELDS}
            for attempt, drop in drops
        ]
        self._take_down(lines)
        if self.started:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        if too_many(self.count, taken=taken, total=self.total, max_rate=self.max_rate):
            raise BadSampleError(
                f"{self.count} of the first {taken} samples cannot be used; --data.max-drop-rate allows "
                f"{self.max_rate:g} of the run's {self.total}. {self.reasons()}"
            )

    def _take_down(self, lines: list[dict[str, Any]]) -> None:
        self.lines += lines
        self.count += sum(line["attempt"] == 0 for line in lines)

    def reasons(self) -> str:
        """The ten commonest, a line each."""
        lines = commonest(Drop(*(line[name] for name in _FIELDS)) for line in self.lines)
        return "\n  ".join(["The commonest reasons (`aligngpt doctor` lists all samples):", *lines])


def too_many(dropped: int, *, taken: int, total: int, max_rate: float) -> bool:
    """Whether more than max_rate of all samples was dropped, or so many of those taken that this is where it leads.

    The first would be the whole rule, if a run of a day had not to wait for it. A share of max_rate among the samples
    exceeds six deviations beyond its mean, in a Poisson count, once in a billion steps.
    """
    expected = max_rate * taken
    return dropped > min(max_rate * total, expected + 6 * expected**0.5 + 6)
