"""The processes of one command under torchrun: they agree on what is true, and they end together.

    with team() as everyone:
        everyone.gather(value)   every process's value, in rank order
        everyone.agree(step)     runs `step` in every process; where it fails in one, all end and one of them speaks

Without torchrun there is one process, and both do what one expects. They meet over gloo, on the host.

A process that fails says so in the store that all processes share; a long step asks `failed` now and then, and returns
when a step of another process failed. A process that is killed says nothing: torchrun ends the others on its machine,
and those on other machines end at the next meeting.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
_LONGEST_WAIT = timedelta(days=7)  # until the slowest process has finished its share
_FAILED = "failed"


@dataclass(frozen=True)
class Team:
    """This process's place among all of them."""

    rank: int
    size: int
    local_rank: int  # among those of this machine
    store: dist.Store | None  # None: there are no others

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order; all wait for each other."""
        if self.store is None:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # a process is gone, of which torchrun tells
            raise SystemExit(1) from error
        return values

    def device(self, asked: str) -> torch.device:
        """The CPU, or the GPU that is this process's; `asked` is what --device says: auto, cpu or cuda."""
        gpus = torch.cuda.device_count()
        if asked == "cuda" and not gpus:
            raise ValueError("--device is cuda, but PyTorch finds no GPU; it needs one, or --device cpu")
        if asked == "cpu" or not gpus:
            if self.store is not None and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(1)  # as torchrun does for two processes and more: any number makes the same bits
            return torch.device("cpu")
        if self.local_rank >= gpus:
            raise ValueError(f"--nproc-per-node is more than {gpus}, this machine's GPUs; each process needs one")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    @property
    def failed(self) -> bool:
        """Whether the step that all are in has failed in some process."""
        return self.store is not None and self.store.check([_FAILED])

    def fail(self) -> None:
        """Have the step that all are in end; the step itself must then raise what went wrong here."""
        if self.store is not None:
            self.store.set(_FAILED, "")

    def agree(self, step: Callable[[], Result]) -> Result:
        """What `step()` gives in this process, once it has gone well in all.

        Where it ends with a ValueError or OSError in any process, none goes on: the first process raises it, with the
        rank if it isn't everybody's, and the others exit without a word. Other exceptions are raised where they occur.
        """
        if self.store is None:
            return step()
        result, said = None, None
        try:
            result = step()
        except Exception as error:
            self.fail()
            if not isinstance(error, ValueError | OSError):
                raise
            said = str(error)
        errors = self.gather(said)
        failed = [rank for rank, error in enumerate(errors) if error is not None]
        if not failed:
            return result  # type: ignore[return-value]  # step returned it
        if self.rank:
            with suppress(RuntimeError):  # torchrun ends all as soon as one is gone, so the first must have spoken
                dist.barrier()
            raise SystemExit(2)
        first = errors[failed[0]]
        raise ValueError(first if len(failed) == self.size else f"process {failed[0]} of {self.size}: {first}")


@contextmanager
def team() -> Iterator[Team]:
    """Join the other processes of torchrun, or be alone without it."""
    if "RANK" not in os.environ:
        yield Team(0, 1, 0, None)
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=_LONGEST_WAIT))
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=size, timeout=_LONGEST_WAIT
    )
    yield Team(rank, size, int(os.environ.get("LOCAL_RANK", "0")), dist.PrefixStore("team", store))
    # Gloo's threads live on in torch's caches, and one that frees the last collective's tensor while the interpreter
    # ends aborts the process. Collecting garbage first gives them a tenth of a second.
    gc.collect()
    dist.destroy_process_group()  # not after an error: others may be waiting for this process
