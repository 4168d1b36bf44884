"""Which steps may change the weights, and which losses are out of the ordinary.

All processes see the same numbers (the loss of the global batch, the norm of the whole gradient), so they decide alike
without asking each other. A step whose loss or norm is not finite is skipped: the weights and the optimizer stay as
they are to the bit, the step counts as taken. So many in a row as `--guard.max-skipped` end the run.

A spike is a loss `--guard.spike` standard deviations above the running mean. Mean and variance weigh the last losses
exponentially, by 1/100 each, and plainly as long as there are fewer than 100; nothing is a spike before 20. A spike
enters them as if it lay on that limit: one wild loss moves them little, a lasting change of level is followed within
some ten steps. A loss that is not finite, and the 0 of a step without supervised tokens, do not enter.

RUN/spikes.jsonl has a line for every spike and every skipped step: step (from 1), loss, grad_norm (null where not
finite), mean, std (before this step), skipped, ids (the samples of the global batch).
"""

import dataclasses
import itertools
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.config import GuardConfig
from training.metrics import lines_until, rewrite
from training.sharding import World

logger = logging.getLogger(__name__)

FILE = "spikes.jsonl"
WARM_UP = 20  # losses, before any is a spike
HORIZON = 100  # losses that the running mean is about


@dataclass
class Seen:
    """What a guard knows of the steps so far."""

    mean: float = 0.0
    variance: float = 0.0
    losses: int = 0
    spikes: int = 0
    skipped: int = 0
    skipped_in_a_row: list[str] = field(default_factory=list)  # a phrase for each


class Guard:
    """Judges the steps of a run that goes on after `first_step` steps; made once the run's folder is this run's.

    state: what `state()` of the run's guard was then; lines of steps that are taken again go.
    """

    def __init__(
        self, config: GuardConfig, run_dir: Path, world: World, *, first_step: int, state: dict[str, Any] | None = None
    ):
        self.config = config
        self.path = run_dir / FILE
        self.world = world
        self.seen = Seen(**(state or {}))
        if world.rank == 0 and self.path.exists():
            rewrite(self.path, lines_until(self.path, first_step))

    def state(self) -> dict[str, Any]:
        """For the checkpoint, in JSON's values: a guard that is made with it judges as this one goes on to."""
        return dataclasses.asdict(self.seen)

    def check(self, step: int, loss: float, grad_norm: float, *, supervised_tokens: int, ids: list[str]) -> bool:
        """Whether step `step` (from 1) may change the weights; all processes call it for every step.

        loss, grad_norm, supervised_tokens: of the global batch. ids: of the samples that this process took.

        Raises:
            FloatingPointError: in every process, when too many steps in a row were skipped.
        """
        seen = self.seen
        mean, std = seen.mean, seen.variance**0.5
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        limit = mean + self.config.spike * std if seen.losses >= WARM_UP else math.inf
        spike = finite and loss > limit
        if spike or not finite:
            self._note(step, loss, grad_norm, mean=mean, std=std, skipped=not finite, ids=ids)
        if not finite:
            seen.skipped += 1
            seen.skipped_in_a_row.append(f"step {step} (loss {loss:g}, gradient norm {grad_norm:g})")
            if len(seen.skipped_in_a_row) >= self.config.max_skipped:
                raise FloatingPointError(
                    f"--guard.max-skipped is {self.config.max_skipped}, and so many steps in a row are not finite: "
                    f"{', '.join(seen.skipped_in_a_row)}; they did not change the weights"
                )
            return False
        seen.skipped_in_a_row.clear()
        seen.spikes += spike
        if supervised_tokens:
            self._learn(min(loss, limit))
        return True

    def _learn(self, loss: float) -> None:
        seen = self.seen
        seen.losses += 1
        weight = max(1 / seen.losses, 1 / HORIZON)
        change = loss - seen.mean
        seen.mean += weight * change
        seen.variance = (1 - weight) * (seen.variance + weight * change**2)

    def _note(self, step: int, loss: float, grad_norm: float, *, ids: list[str], **more: Any) -> None:
        gathered = list(itertools.chain.from_iterable(self.world.gather(ids)))
        if self.world.rank != 0:
            return
        what = "is skipped" if more["skipped"] else f"spikes above the running mean of {more['mean']:g}"
        logger.warning(
            "step %d %s: loss %g, gradient norm %g; its samples are in %s", step, what, loss, grad_norm, FILE
        )
        numbers = {
            name: number if math.isfinite(number) else None
            for name, number in (("loss", loss), ("grad_norm", grad_norm))
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | numbers | more | {"ids": gathered}) + "\n")
