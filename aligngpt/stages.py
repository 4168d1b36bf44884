"""The stages of a training step and of an answer, marked where they run, for whoever measures them.

    with stage("projector"): …                     in the code; costs nothing unless somebody listens
    with listening(stopwatch := Stopwatch(device)): …
    stopwatch.seconds()                            {"projector": …}, by the device's own clock

Stages may lie in each other. In code that torch.compile traces, and while a CUDA graph is captured, a stage is
nothing. Any object with `begin(name)` and `end(name)` listens; it is called by the thread that runs the stage.

    training step   data wait, batch to device, vision tower, projector, gate, injection, LLM forward, loss, backward,
                    gradient norm, optimizer, checkpoint
    engine step     prefill (with the stages of a forward pass in it), decode step, sampling
"""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

TRAINING_STEP = "training step"
ENGINE_STEP = "engine step"
OF_TRAINING = (
    "data wait",
    "batch to device",
    "vision tower",
    "projector",
    "gate",
    "injection",
    "LLM forward",
    "loss",
    "backward",
    "gradient norm",
    "optimizer",
    "checkpoint",
)
OF_ANSWERING = ("prefill", "decode step", "sampling")


class Listener(Protocol):
    def begin(self, name: str) -> None: ...

    def end(self, name: str) -> None: ...


_listeners: list[Listener] = []
_NOTHING: AbstractContextManager[None] = nullcontext()


def stage(name: str) -> AbstractContextManager[None]:
    """What runs in this context is the stage of that name."""
    if torch.compiler.is_compiling() or not _listeners:
        return _NOTHING
    return _told(name)


@contextmanager
def _told(name: str) -> Iterator[None]:
    captures = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    listeners = [] if captures else list(_listeners)  # who hears the begin hears the end
    for listener in listeners:
        listener.begin(name)
    try:
        yield
    finally:
        for listener in reversed(listeners):
            listener.end(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """The listener hears of every stage that begins in this context, of any thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Spent(NamedTuple):
    """What a stage took, all its calls together."""

    seconds: float
    calls: int


class Stopwatch:
    """How long each stage takes: on a GPU between events in its stream, else by the host's clock.

    Threads may have stages at the same time, each of its own.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.points: list[tuple[int, str, bool, Any]] = []  # thread, name, whether it begins, when

    def begin(self, name: str) -> None:
        self.points.append((threading.get_ident(), name, True, self._now()))

    def end(self, name: str) -> None:
        self.points.append((threading.get_ident(), name, False, self._now()))

    def seconds(self, *, own: bool = True) -> dict[str, float]:
        """Seconds by stage, in the order in which they first began, added up.

        own: without the stages that lie in it, so that the values of all stages add up to the time of the outermost.
        """
        found: dict[str, float] = {}
        paths = self.by_path()
        for path, spent in paths.items():
            inner = [] if own else [other for place, other in paths.items() if place[: len(path)] == path != place]
            found[path[-1]] = found.get(path[-1], 0.0) + spent.seconds + sum(other.seconds for other in inner)
        return found

    def by_path(self) -> dict[tuple[str, ...], Spent]:
        """Each stage by the names of those that it lies in and its own, in the order in which they first began.

        Seconds are without those of the stages in it. Of a stage that has not ended, those that ended in it count.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[tuple[str, ...], Spent] = {}
        open_stages: dict[int, list[tuple[tuple[str, ...], Any, float]]] = {}  # by thread: path, begin, seconds inside
        for thread, name, begins, now in self.points:
            stack = open_stages.setdefault(thread, [])
            if begins:
                path = (*(stack[-1][0] if stack else ()), name)
                found.setdefault(path, Spent(0.0, 0))
                stack.append((path, now, 0.0))
                continue
            path, began, inside = stack.pop()
            assert path[-1] == name, f"{name} ended inside of {path[-1]}"
            spent = self._between(began, now)
            found[path] = Spent(found[path].seconds + spent - inside, found[path].calls + 1)
            if stack:
                above, since, before = stack[-1]
                stack[-1] = (above, since, before + spent)
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
