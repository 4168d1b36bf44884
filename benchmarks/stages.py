"""The rows of the table of stages, in the order of the work, and which file measures each by itself; and the table of
one step as it runs.

`measure` takes a step whose stages are marked (aligngpt.stages) and says for each what it takes in its place: time by
the device's own clock, memory beyond what was held when it began, and waits of the host for the device. A stage's time
and waits are without those of the stages that lie in it; its peak is with theirs. On a GPU a stage begins and ends
where its work does in the stream, so that a wait of the host which the device does not notice takes no time.

What is measured disturbs: steps are timed with and without marks in turns, and memory and waits are counted in steps
of their own. The rows and `rest` are the marked steps'; whoever shows them compares their sum with `whole_us`.
"""

import contextlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from aligngpt.stages import Stopwatch, listening
from benchmarks.measure import allocations, synchronize, syncs_counted, timing

TABLE = {
    "data set": "bench_data",
    "read + decode": "bench_images",
    "vision tower": "bench_tower",
    "projector": "bench_projector",
    "gate": "bench_gate",
    "injection": "bench_injection",
    "projector + gate + injection": "bench_chain",
    "tower to injection": "bench_scaling",
    "LLM forward": "bench_llm",
    "loss": "bench_loss",
    "LLM forward + backward": "bench_llm",
    "backward": "bench_step",
    "optimizer": "bench_optimizer",
    "checkpoint": "bench_checkpoint",
    "prefill": "bench_prefill",
    "decode step": "bench_decode",
    "sampling": "bench_sampling",
    "training step": "bench_step",
    "time to first token": "bench_generate",
    "answering": "bench_generate",
    "evaluation": "bench_evaluation",
    "plan": "bench_plan",
}
UNMARKED = "unmarked"  # what of a step no mark covers
MARK = "boundary of a stage: "


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
    """The table of a step: {"whole_us", "whole_quartiles_us", "whole_peak_bytes", "whole_syncs", "stages": a row for
    each of `work` in its order, "rest": microseconds of all else by name}, and "whole_noisy", a sentence, where it is.
    It runs 3 + 2 · rounds steps, which must do the same.

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
    highest = peaks(step, device)
    before()
    waited = waits(step, device)
    missing = [name for name in work if name not in marked[0]]
    if missing:
        raise ValueError(f"work has {missing}; it needs stages that the step runs, which are {list(marked[0])[1:]}")
    us = {name: round(1e6 * statistics.median(of[name] for of in marked), 3) for name in marked[0]}
    total = timing(whole)
    return ({} if total.noise is None else {"whole_noisy": total.noise}) | {
        "whole_us": round(1e6 * total.seconds, 3),
        "whole_quartiles_us": [round(1e6 * q, 3) for q in total.quartiles],
        "whole_peak_bytes": highest[UNMARKED],
        "whole_syncs": sum(waited.values()),
        "stages": [
            {"stage": name, "us": us[name]} | of_stage._asdict() | {"peak_bytes": highest[name], "syncs": waited[name]}
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


class _AtBoundaries:
    """A listener that calls a function wherever a stage begins (True) or ends."""

    def __init__(self, call: Callable[[str, bool], None]):
        self.begin: Callable[[str], None] = lambda name: call(name, True)
        self.end: Callable[[str], None] = lambda name: call(name, False)


def _listened(step: Callable[[], Any], at_boundary: Callable[[str, bool], None]) -> None:
    with listening(_AtBoundaries(at_boundary)):
        at_boundary(UNMARKED, True)
        step()
        at_boundary(UNMARKED, False)


def peaks(step: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Most bytes that a stage held beyond those that were held when it began; UNMARKED is the whole step.

    On a CPU of what PyTorch allocates in this thread.
    """
    open_stages: list[tuple[int, int]] = []  # bytes held when each began, and most since
    found: dict[str, int] = {}

    def boundary(name: str, begins: bool, highest: int, held: int) -> None:
        """highest: since the last boundary."""
        open_stages[:] = [(began, max(top, highest)) for began, top in open_stages]
        if begins:
            open_stages.append((held, held))
        else:
            began, top = open_stages.pop()
            found[name] = max(found.get(name, 0), top - began)

    if device.type == "cuda":

        def read(name: str, begins: bool) -> None:
            boundary(name, begins, torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)

        synchronize(device)
        _listened(step, read)
        return found

    def mark(name: str, begins: bool) -> None:
        with record_function(f"{MARK}{int(begins)}{name}"):
            pass

    held = highest = 0
    for what in allocations(lambda: _listened(step, mark), MARK):
        if isinstance(what, int):
            held += what
            highest = max(highest, held)
        else:
            begins, name = what[len(MARK)], what[len(MARK) + 1 :]
            boundary(name, begins == "1", highest, held)
            highest = held
    return found


def waits(step: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """How often a stage waits for the device, without the stages that lie in it; UNMARKED is what none covers.

    On a GPU a wait of another thread counts to the stage that is at work.
    """
    open_stages: list[str] = []
    found: dict[str, int] = {}
    seen = 0

    with syncs_counted(device) as count:

        def boundary(name: str, begins: bool) -> None:
            nonlocal seen
            now = count()
            if open_stages:
                found[open_stages[-1]] += now - seen
            seen = now
            found.setdefault(name, 0)
            if begins:
                open_stages.append(name)
            else:
                open_stages.pop()

        _listened(step, boundary)
    return found
