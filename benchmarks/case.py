"""A case: one shape of one op, who contends, and what their answers are held to; and how a case is run.

Nothing is timed before its answer is checked. Whoever is wrong, is not installed or fails, then or later, is named as
such in the result, and the others go on. What is timed is made by `prepare(inputs)`, outside the time: masks of
FlexAttention, rows compacted for Liger, the capture of a CUDA graph.

A contender has a time and, beside the first of ours, the ratio of its time to that one's, by rounds. Where its times
are too noisy a sentence says so instead; where ours are, nobody has a ratio.
"""

import functools
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from aligngpt_kernels import KernelUnavailable
from aligngpt_kernels.dispatch import Impl
from torch import Tensor

from benchmarks.measure import (
    MIN_ROUNDS,
    PATIENCE,
    Ceilings,
    Clock,
    Outputs,
    Run,
    Timing,
    compare,
    count_syncs,
    free_bytes,
    l2_bytes,
    peak_bytes,
    synchronize,
    take_turns,
)

OURS_FACTOR, PEER_FACTOR = 2, 8  # × the plain path's error: ours must be as exact, a peer must not be wrong
MAX_COPIES = 128  # of the inputs
ROOM = 1.2  # bytes that must be free for each byte of the inputs
ENDED = "the process ended while it ran"
WALL_ROUNDS = 20
OFF_DEVICE = ("read + decode", "checkpoint")  # stages that the host or its disk does: no share of the device's ceilings
TOO_SMALL = "it would compile for longer than the rest takes"


class Absent(Exception):
    """A contender can't take part; the message says why."""


class DeviceLost(Exception):
    """After an error the GPU answers no more calls of this process."""


class Contender(NamedTuple):
    prepare: Callable[[Any], Run]  # from the case's inputs, what is timed
    finish: Callable[[Any, Outputs], Outputs] | None = None  # to the results the others have; not timed
    gpu_only: bool = False  # it compiles for a minute on a CPU, or has no path there
    # more to record, from what was timed, the inputs and the seconds of a call
    details: Callable[[Any, Any, float], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[torch.device], Any]  # inputs, other numbers in every call
    contenders: Mapping[str, Contender]  # names of ours start with "ours"
    exact: Callable[[Any], Outputs]  # in float64
    plain: Callable[[Any], Outputs]  # by eager PyTorch in the inputs' dtype: its error is the yardstick
    bytes: int = 0  # that must be read and written; 0 where `details` counts it from the inputs, or nobody does
    flops: int = 0  # that must be done, likewise
    file: str = ""  # of benchmarks, that it is from; whoever collects cases fills it in
    stage: str = ""  # one of benchmarks.stages.TABLE
    items: float = 0  # done by a call, of what `unit` says: images, tokens, samples, answers, …
    unit: str = ""
    group: str = ""  # requirements and tests select cases by it
    sweep: tuple[str, float] | None = None  # what grows from case to case and how much of it this one has
    floors: Sequence[float] = ()  # see measure.compare
    terms: int = 0  # see measure.compare: a peer may add so many numbers one by one; ours may not
    equal: bool = False  # whether results must be exact: rows are copied, nothing is computed
    dispatch: tuple[str, str, tuple[str, ...]] | None = None  # key of measured.json, our contender, what it replaces
    clock: Clock = "device"  # "host" where the host does much of a call: see measure
    host: bool = False  # whether waits are counted and, on a GPU, wall time is measured as well
    memory: bool = False  # whether peak memory is measured as well
    input_bytes: int = 0  # of one copy of the inputs, where that may not fit
    absent: Mapping[str, str] = field(default_factory=dict)  # who can't take this case, and why
    rounds: int = MIN_ROUNDS  # of timing, at least
    trains: bool = False  # whether it runs aligngpt and training, not the kernels alone
    one_copy: bool = False  # of the inputs, which are far larger than any cache

    def copies(self, device: torch.device) -> int:
        """So many copies of the inputs that what is read of them is four times the L2 cache.

        Two at least, since the cache may hold the end of a large one, unless memory has room for only one.
        """
        cache = l2_bytes(device)
        if cache == 0 or self.one_copy:
            return 1
        wanted = min(max(math.ceil(4 * cache / max(self.bytes, 1)), 2), MAX_COPIES)
        room = free_bytes(device) / (ROOM * max(self.input_bytes, 1))
        return min(wanted, max(int(min(room, MAX_COPIES)), 1))


InTurns = Callable[[Case], dict[str, dict[str, Any]]]  # the fixture `in_turns`


def our_impl(x: Tensor) -> Impl:
    """Our contender's path: the kernels on a GPU; on a CPU the reference, never Triton's interpreter."""
    return "triton" if x.device.type == "cuda" else "reference"


def with_grads(out: Tensor, leaves: Sequence[Tensor], upstream: Tensor | None = None) -> Outputs:
    """The output, and its gradients to those leaves that want one."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]


def simple(function: Callable[[Any], Outputs], **options: Any) -> Contender:
    """A contender that needs no preparation."""
    return Contender(lambda inputs: lambda: function(inputs), **options)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for the very shapes it is called with."""
    return torch.compile(function, dynamic=False)


def in_cuda_graph(contender: Contender) -> Contender:
    """The same, captured once and replayed."""

    def capture(inputs: Any) -> Run:
        run = contender.prepare(inputs)
        run()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    return Contender(capture, contender.finish, gpu_only=True)


def check(case: Case, name: str, inputs: Any, run: Run, plain: Outputs, exact: Outputs) -> dict[str, Any]:
    """{"wrong": why} or the error in units of the plain path's."""
    outputs, finish = run(), case.contenders[name].finish
    if finish is not None:
        outputs = finish(inputs, outputs)
    factor, terms = (OURS_FACTOR, 0) if name.startswith("ours") else (PEER_FACTOR, case.terms)
    error, wrong = compare(outputs, plain, exact, factor, case.floors, case.equal, terms)
    return {"error_in_plain_errors": round(error, 3)} if wrong is None else {"wrong": wrong}


def run_case(
    case: Case,
    device: torch.device,
    top: Ceilings | None = None,  # for the share of it that each contender reaches
    results: dict[str, Any] | None = None,  # of each contender, filled in
    save: Callable[[], None] = lambda: None,  # called whenever `results` changed
    seconds: float = 1.0,  # of timing
    timings: dict[str, Timing] | None = None,  # of those that have a time, filled in
) -> dict[str, Any]:
    """Check every contender, time those that are right in turns, and return a record of each.

    `results` may hold what an earlier run found before its process ended: who failed then is not run again. While a
    contender runs for the first time its record says that the process ended, which it is if nobody writes it anew.
    Raises DeviceLost when the GPU can't be used any more.
    """
    results = {} if results is None else results
    if device.type == "cuda":
        torch.compiler.reset()  # so that no case finds the limit of recompilations used up
    results |= {name: {"absent": reason} for name, reason in case.absent.items()}
    inputs = [case.make(device) for _ in range(case.copies(device))]
    exact, plain = case.exact(inputs[0]), case.plain(inputs[0])
    runs: dict[str, list[Run]] = {}

    def fail(name: str, error: Exception) -> None:
        runs.pop(name, None)
        results[name] = why(error)
        save()  # before the device may turn out to be lost
        if "failed" in results[name]:
            check_device(device, name)

    for name, contender in case.contenders.items():
        if "failed" in results.get(name, {}):
            continue
        if contender.gpu_only and device.type != "cuda":
            results[name] = {"absent": "timed on a GPU only"}
            continue
        results[name] = {"failed": ENDED}
        save()
        try:
            first = contender.prepare(inputs[0])
            found = check(case, name, inputs[0], first, plain, exact)
            if "wrong" not in found:
                calls = [first, *(contender.prepare(more) for more in inputs[1:])]
                for call in calls[1:]:
                    call()
                synchronize(device)
                if case.host:
                    found["syncs"] = count_syncs(first, device)
                if case.memory:
                    found["peak_bytes"] = peak_bytes(first, device)
                runs[name] = calls
            results[name] = found
        except Exception as error:  # whatever a peer does, the others are still measured
            fail(name, error)
        except BaseException:  # interrupted: not its fault
            del results[name]
            save()
            raise
        save()
        free(device)
    del exact, plain

    taken = take_turns(runs, device, seconds, case.rounds, patience=PATIENCE, clock=case.clock, fail=fail)
    walls: dict[str, Timing] = {}
    if case.host and device.type == "cuda":
        walls = take_turns(runs, device, 0, WALL_ROUNDS, patience=PATIENCE, clock="host", fail=fail)
    ours = taken.get(next((name for name in case.contenders if name.startswith("ours")), ""))
    for name in list(runs):
        timing = taken[name]
        try:
            found = timed(case, name, timing, ours, top)
            details = case.contenders[name].details
            if "us" in found and details is not None:
                found |= details(runs[name][0], inputs[0], timing.seconds)
                counted = found.get("bytes", 0), found.get("flops", 0)
                if top is not None and any(counted) and case.stage not in OFF_DEVICE:
                    found["share_of_ceiling"] = round(top.seconds(*counted) / timing.seconds, 4)
        except Exception as error:
            fail(name, error)
            continue
        if name in walls:
            found |= by_the_clock(walls[name])
        results[name] |= found
        if timings is not None and "us" in found:
            timings[name] = timing
    return results


def timed(case: Case, name: str, timing: Timing, ours: Timing | None, top: Ceilings | None) -> dict[str, Any]:
    """What a record says of a contender's times. `ours`: those of the first of ours, if it has any."""
    found: dict[str, Any] = {"quartiles_us": [microseconds(q) for q in timing.quartiles], "rounds": timing.rounds}
    if timing.noise is not None:
        return found | {"noisy": timing.noise}
    found |= {"us": microseconds(timing.seconds), "host_bound": round(timing.host_bound, 2)}
    if ours is not None and timing is not ours and ours.noise is None:
        found["ratio"] = timing.ratio(ours)
    if top is not None and case.bytes + case.flops and case.stage not in OFF_DEVICE:
        found["share_of_ceiling"] = round(top.seconds(case.bytes, case.flops) / timing.seconds, 4)
    return found


def by_the_clock(timing: Timing) -> dict[str, Any]:
    if timing.noise is not None:
        return {"noisy_wall": timing.noise}
    return {
        "wall_us": microseconds(timing.seconds),
        "wall_quartiles_us": [microseconds(q) for q in timing.quartiles],
    }


def microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def why(error: Exception) -> dict[str, str]:
    """Why a contender has no time, as its record says it."""
    if isinstance(error, Absent | KernelUnavailable):
        return {"absent": str(error)}
    if isinstance(error, ModuleNotFoundError):
        return {"absent": f"{error.name} is not installed"}
    return {"failed": f"{type(error).__name__}: {error}"[:300]}


def check_device(device: torch.device, name: str) -> None:
    """Raises DeviceLost if the GPU no longer answers, after `name` failed."""
    try:
        synchronize(device)
    except Exception as error:
        raise DeviceLost(name) from error


def free(device: torch.device) -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
