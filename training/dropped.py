"""Samples that a run could not use: a line each in RUN/bad_samples.jsonl, and the limit at which the run stops.

A line holds: step (from 1), attempt (0 for a sample of the order; 1, 2, … for one that was to stand in), record, id,
reason, kind (the reason without names and numbers). All processes keep the same lines; rank 0 writes. The limit is on
the samples of the order.
"""

import json
from pathlib import Path

from aligngpt.drops import Drop, commonest
from training.metrics import lines_until, rewrite
from training.sharding import World

FILE = "bad_samples.jsonl"
_FIELDS = ("record", "id", "reason", "kind")  # of a Drop


class BadSampleError(ValueError):
    """Too many samples cannot be used; the message has the commonest reasons."""


class DroppedSamples:
    """The dropped samples of a run that goes on after `first_step` steps and takes `total` samples in all.

    max_rate: share of the total that may be dropped. The file is written once the run's folder is this run's, from
    `start` on.
    """

    def __init__(self, run_dir: Path, *, first_step: int, total: int, max_rate: float, world: World):
        self.path = run_dir / FILE
        self.first_step = first_step
        self.total = total
        self.max_rate = max_rate
        self.started = False
        self.unwritten: list[str] = []
        kept = map(json.loads, lines_until(self.path, first_step)) if world.rank == 0 else ()
        earlier = [(line["attempt"], Drop(*(line[name] for name in _FIELDS))) for line in kept]
        self.drops: list[tuple[int, Drop]] = world.gather(earlier)[0]

    @property
    def count(self) -> int:
        """How many samples of the order were dropped."""
        return sum(attempt == 0 for attempt, _ in self.drops)

    def start(self) -> None:
        """Write from now on; lines of steps that are taken again go. For rank 0 alone."""
        if self.path.exists():
            rewrite(self.path, lines_until(self.path, self.first_step))
        self.started = True
        self._write()

    def step(self, number: int, drops: list[tuple[int, Drop]], *, taken: int) -> None:
        """Take down what step `number` (from 0) dropped. taken: samples that the run has taken with it.

        Raises:
            BadSampleError: it is more than the run may drop.
        """
        self.drops += drops
        for attempt, drop in drops:
            line = {"step": number + 1, "attempt": attempt} | {name: getattr(drop, name) for name in _FIELDS}
            self.unwritten.append(json.dumps(line) + "\n")
        self._write()
        if too_many(self.count, taken=taken, total=self.total, max_rate=self.max_rate):
            raise BadSampleError(
                f"{self.count} of the first {taken} samples cannot be used; --data.max-drop-rate allows "
                f"{self.max_rate:g} of the run's {self.total}. {self.reasons()}"
            )

    def reasons(self) -> str:
        """The ten commonest, a line each."""
        lines = commonest(drop for _, drop in self.drops)
        return "\n  ".join(["The commonest reasons (`aligngpt doctor` lists all samples):", *lines])

    def _write(self) -> None:
        if self.started:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self.unwritten)
            self.unwritten.clear()


def too_many(dropped: int, *, taken: int, total: int, max_rate: float) -> bool:
    """Whether more than max_rate of all samples was dropped, or so many of those taken that this is where it leads.

    The first would be the whole rule, if a run of a day had not to wait for it. A share of max_rate among the samples
    exceeds six deviations beyond its mean, in a Poisson count, once in a billion steps.
    """
    expected = max_rate * taken
    return dropped > min(max_rate * total, expected + 6 * expected**0.5 + 6)
