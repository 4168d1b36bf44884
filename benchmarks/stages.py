"""The rows of the table of stages, in the order of the work, and which file measures each by itself; and the table of
one step as it runs.

`measure` takes a step whose stages are marked (aligngpt.stages) and says for each what it takes in its place: time by
the device's own clock, memory beyond what was held when it began, and waits of the host for the device. A stage's time
and waits are without those of the stages that lie in it; its peak is with theirs. On a GPU a stage begins and ends
where its work does in the stream, so that a wait of the host which the device does not notice takes no time.

What is measured disturbs: steps are timed with and without marks in turns, and memory and waits are counted in a step
of their own. The rows and `rest` are the marked steps'; whoever shows them compares their sum with `whole_us`.
"""

import contextlib
import statistics
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aligngpt.stages import Stopwatch, listening
from benchmarks.measure import synchronize

TABLE = {
    "read + decode": "bench_images",
    "vision tower": "bench_tower",
    "projector": "bench_projector",
    "gate": "bench_gate",
    "injection": "bench_injection",
    "projector + gate + injection": "bench_chain",
    "LLM forward": "bench_llm",
    "loss": "bench_loss",
    "backward": "bench_llm",
    "optimizer": "bench_optimizer",
    "checkpoint": "bench_checkpoint",
    "prefill": "bench_prefill",
    "decode step": "bench_decode",
    "sampling": "bench_sampling",
    "training step": "bench_step",
    "answering": "bench_generate",
    "evaluation": "bench_evaluation",
}
UNMARKED = "unmarked"  # what of a step no mark covers


class StageWork(NamedTuple):
    """What a stage does in one step."""

    items: float
    unit: str
    bytes: float  # that must be read and written
    flops: float  # that must be done


def measure(
    step: Callable[[], Any],
    device: torch.device,
    work: Mapping[str, StageWork],
    rounds: int,
    before: Callable[[], Any] = lambda: None,  # each step, outside of what is measured
) -> dict[str, Any]:
    """The table of a step: {"whole_us", "whole_peak_bytes", "whole_syncs", "stages": a row for each of `work` in its
    order, "rest": microseconds of all else by name}. It runs 2 + 2 · rounds steps, which must do the same.

    Raises:
        ValueError: a stage of `work` did not run.
    """
    step()
    whole, marked = [], []
    for _ in range(rounds):
        before()
        whole.append(_seconds(step, device, listen=False)[UNMARKED])
        before()
        marked.append(_seconds(step, device, listen=True))
    before()
    observed = observe(step, device)
    missing = [name for name in work if name not in marked[0]]
    if missing:
        raise ValueError(f"work has {missing}; it needs stages that the step runs, which are {list(marked[0])[1:]}")
    us = {name: round(1e6 * statistics.median(of[name] for of in marked), 3) for name in marked[0]}
    return {
        "whole_us": round(1e6 * statistics.median(whole), 3),
        "whole_peak_bytes": observed.peaks[UNMARKED],
        "whole_syncs": sum(observed.waits.values()),
        "stages": [
            {"stage": name, "us": us[name]}
            | of_stage._asdict()
            | {"peak_bytes": observed.peaks[name], "syncs": observed.waits[name]}
            for name, of_stage in work.items()
        ],
        "rest": {name: us[name] for name in [*list(us)[1:], UNMARKED] if name not in work},
    }


def _seconds(step: Callable[[], Any], device: torch.device, *, listen: bool) -> dict[str, float]:
    """Of a step by stage; first UNMARKED, what none covers: all of it, unless the watch listens."""
    watch = Stopwatch(device)
    synchronize(device)
    with listening(watch) if listen else contextlib.nullcontext():
        watch.begin(UNMARKED)
        step()
        watch.end(UNMARKED)
    return watch.seconds()


# ------------------------------------------------------------------------------------------------ memory and waits


class Gauge(Protocol):
    def held(self) -> int:
        """Bytes now."""

    def highest(self) -> int:
        """Most bytes since this was asked last."""

    def waits(self) -> int:
        """Of the host for the device, so far."""


@dataclass
class _Open:
    name: str
    began: int
    highest: int


class Observer:
    """A listener that reads a gauge wherever a stage begins or ends."""

    def __init__(self, gauge: Gauge):
        self.gauge = gauge
        self.open: list[_Open] = []
        self.seen = gauge.waits()
        self.peaks: dict[str, int] = {}
        self.waits: dict[str, int] = {}

    def begin(self, name: str) -> None:
        self._read()
        held = self.gauge.held()
        self.open.append(_Open(name, held, held))
        self.peaks.setdefault(name, 0)
        self.waits.setdefault(name, 0)

    def end(self, name: str) -> None:
        self._read()
        ended = self.open.pop()
        assert ended.name == name, f"{name} ended inside of {ended.name}: one thread at a time can be observed"
        self.peaks[name] = max(self.peaks[name], ended.highest - ended.began)

    def _read(self) -> None:
        """What happened since the last boundary is the innermost stage's, and its peak also of those around it."""
        highest, waits = self.gauge.highest(), self.gauge.waits()
        for stage in self.open:
            stage.highest = max(stage.highest, highest)
        if self.open:
            self.waits[self.open[-1].name] += waits - self.seen
        self.seen = waits


def observe(step: Callable[[], Any], device: torch.device) -> Observer:
    """Peaks and waits of one step by stage, and of all of it as UNMARKED.

    On a CPU memory is that of storages which PyTorch's operators make in this thread, and a wait is an operator that
    would wait for a GPU. On a GPU a wait of another thread counts to the stage that is at work.
    """
    synchronize(device)
    with _of_gpu(device) if device.type == "cuda" else OfCpu() as gauge:
        observer = Observer(gauge)
        with listening(observer):
            observer.begin(UNMARKED)
            step()
            observer.end(UNMARKED)
    return observer


class _OfGpu:
    def __init__(self, device: torch.device, caught: list[warnings.WarningMessage]):
        self.device, self.caught = device, caught

    def held(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def highest(self) -> int:
        highest = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return highest

    def waits(self) -> int:
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in self.caught)


@contextlib.contextmanager
def _of_gpu(device: torch.device) -> Iterator[Gauge]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield _OfGpu(device, caught)
        finally:
            torch.cuda.set_sync_debug_mode(before)


WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")


class OfCpu(TorchDispatchMode):
    """Adds up the storages that operators make, as long as they live, and counts operators that look at values."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._held = self._highest = self._waits = 0

    def held(self) -> int:
        return self._held

    def highest(self) -> int:
        highest, self._highest = self._highest, self._held
        return highest

    def waits(self) -> int:
        return self._waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._waits += func.name().partition(".")[0] in WAITING
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key = storage._cdata
            if key not in given and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._held += self._sizes[key]
                self._highest = max(self._highest, self._held)
                weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self._held -= self._sizes.pop(key)


def _storages(values: Any) -> Iterator[Any]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield (leaf._local_tensor if isinstance(leaf, DTensor) else leaf).untyped_storage()
