"""The stages of a training step and of an answer, marked where they run, for whoever measures them.

    with stage("projector"): …                     in the code; costs nothing unless somebody listens
    with listening(stopwatch := Stopwatch(device)): …
    stopwatch.seconds()                            {"projector": …}, by the device's own clock

Stages may lie in each other. In code that torch.compile traces a stage is nothing. Any object with `begin(name)` and
`end(name)` listens; it is called by the thread that runs the stage.

    training step   data wait, batch to device, vision tower, projector, gate, injection, LLM forward, loss, backward,
                    gradient norm, optimizer, checkpoint
    engine step     prefill (with the stages of a forward pass in it), decode step, sampling
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

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
    listeners = list(_listeners)  # who hears the begin hears the end
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


class Stopwatch:
    """How long each stage takes: on a GPU between events in its stream, else by the host's clock."""

    def __init__(self, device: torch.device):
        self.device = device
        self.points: list[tuple[str, bool, Any]] = []  # name, whether it begins, when

    def begin(self, name: str) -> None:
        self.points.append((name, True, self._now()))

    def end(self, name: str) -> None:
        self.points.append((name, False, self._now()))

    def seconds(self, *, own: bool = True) -> dict[str, float]:
        """Seconds by stage, in the order in which they first began, added up.

        own: without the stages that lie in it, so that the values of all stages add up to the time of the outermost.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        open_stages: list[tuple[str, Any]] = []
        for name, begins, now in self.points:
            if begins:
                found.setdefault(name, 0.0)
                open_stages.append((name, now))
                continue
            began_name, began = open_stages.pop()
            assert began_name == name, f"{name} ended inside of {began_name}: one thread at a time can be timed"
            spent = self._between(began, now)
            found[name] += spent
            if own and open_stages:
                found[open_stages[-1][0]] -= spent
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
