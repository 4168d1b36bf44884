"""Time, error, waits and memory of a call.

GPU time is the time between two CUDA events. Before the first event the GPU is given idle work for longer than the host
needs to queue the calls, so that the time between the events is the GPU's alone; a sample for which that failed (the
call waits for the device, say) is counted as host-bound. Calls of a few microseconds are queued several times between
the events. Contenders take turns, and each call goes to the next copy of the inputs: all copies together are at least
four times the L2 cache, so that no call finds its inputs there, unless memory has no room for so many or a case wants
one. By the host's clock, as always on a CPU, a sample is one call, from an idle device until its work is done: that is
for calls that do most of their work on the host, which CUDA events do not see.

A round has one sample of each contender, so times are compared by pairs of the same round. Where the middle half of a
contender's samples (all, if they are few) spreads over more than NOISY of their median, even after PATIENCE times the
rounds, its time is `noisy`.
"""

import ctypes
import functools
import itertools
import math
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Outputs = Sequence[Tensor]
Run = Callable[[], Outputs]
Clock = Literal["device", "host"]

MIN_ROUNDS, MAX_ROUNDS = 9, 200
SAMPLE_SECONDS, MAX_QUEUED = 100e-6, 32  # a sample queues calls until it is this long, but never more than so many
CYCLES_PER_SECOND = 2e9  # no less than any GPU's clock, for a head start of at least the seconds asked for
MAX_HEAD_START = 50e-3
NOISY, PATIENCE = 0.25, 3
FEW_ROUNDS = 5  # of fewer the middle half is no more than half of the range
FEW = 64


class Timing(NamedTuple):
    seconds: float  # median
    quartiles: tuple[float, float]
    rounds: int
    host_bound: float  # part of the samples in which the GPU did not have all calls queued in time
    samples: tuple[float, ...]  # seconds, one of each round

    @property
    def noise(self) -> str | None:
        """None, or a sentence saying that its samples spread too much."""
        few = self.rounds < FEW_ROUNDS
        low, high = (min(self.samples), max(self.samples)) if few else self.quartiles
        spread = (high - low) / self.seconds if self.seconds else 0.0
        if spread <= NOISY:
            return None
        of = f"{self.rounds} samples spread" if few else "middle half spreads"
        return f"its {of} over {spread:.0%} of its median; {NOISY:.0%} is allowed"

    def ratio(self, ours: "Timing") -> dict[str, float]:
        """Its time divided by that of `ours`, taken in the same rounds."""
        pairs = [theirs / own for theirs, own in zip(self.samples, ours.samples, strict=True)]
        return dict(zip(("low", "median", "high"), (round(q, 4) for q in quartiles(pairs)), strict=True))


class _Contender:
    def __init__(self, calls: Sequence[Run], device: torch.device, clock: Clock) -> None:
        self.calls, self.device = calls, device  # one call for each copy of the inputs
        self.by_events = device.type == "cuda" and clock == "device"
        self.samples: list[float] = []
        self.late = 0
        calls[0]()  # new memory, if it needs any
        synchronize(device)
        started = time.perf_counter()
        calls[0]()
        host = time.perf_counter() - started
        synchronize(device)
        self.queued, self.head_start = 1, min(2 * host, MAX_HEAD_START)
        if self.by_events:
            seconds, _ = self._sample(0)
            self.queued = min(max(math.ceil(SAMPLE_SECONDS / max(seconds, 1e-7)), 1), MAX_QUEUED)
            self.head_start = min(2 * host * self.queued, MAX_HEAD_START)

    def sample(self, turn: int) -> None:
        seconds, late = self._sample(turn)
        self.samples.append(seconds)
        self.late += late

    def _sample(self, turn: int) -> tuple[float, bool]:
        """Seconds of a call, and whether the GPU had to wait for the host."""
        calls = [self.calls[(turn + i) % len(self.calls)] for i in range(self.queued)]
        if not self.by_events:
            synchronize(self.device)
            started = time.perf_counter()
            calls[0]()
            synchronize(self.device)
            return time.perf_counter() - started, False
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self.head_start * CYCLES_PER_SECOND))
        start.record()
        for call in calls:
            call()
        end.record()
        late = start.query()  # idle work and first event are over, though queueing just ended
        if late:
            self.head_start = min(2 * self.head_start + 1e-4, MAX_HEAD_START)
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls), late


def take_turns(
    contenders: Mapping[str, Sequence[Run]],
    device: torch.device,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    patience: float = 1,
    clock: Clock = "device",
    fail: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time all contenders in rounds of one sample each, for about `seconds` and at least so many rounds.

    While any of them is noisy, they go on to `patience` times as many rounds. Who raises an error is told to `fail`,
    and the others go on without it; there must be one or the error is raised.
    """
    ready: dict[str, _Contender] = {}
    turn, rounds = 0, 0

    def guarded(name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            ready.pop(name, None)
            if fail is None:
                raise
            fail(name, error)

    def start(name: str) -> None:
        ready[name] = _Contender(contenders[name], device, clock)

    for name in list(contenders):
        guarded(name, functools.partial(start, name))
    started = time.perf_counter()

    def times() -> dict[str, Timing]:
        return {name: timing(contender.samples, contender.late) for name, contender in ready.items()}

    def enough() -> bool:
        return rounds >= min_rounds and (time.perf_counter() - started >= seconds or rounds >= max_rounds)

    most = math.inf
    shuffle = random.Random(0).shuffle
    order = list(ready)
    while ready and rounds < most:
        shuffle(order)  # who goes before may leave caches or clocks in another state
        for name in [name for name in order if name in ready]:
            contender = ready[name]
            guarded(name, functools.partial(contender.sample, turn))
            turn += contender.queued
        rounds += 1
        if most == math.inf and enough():
            most = patience * rounds
        if most != math.inf and all(found.noise is None for found in times().values()):
            break
    return times()


def timing(samples: Sequence[float], late: int = 0) -> Timing:
    low, median, high = quartiles(samples)
    return Timing(median, (low, high), len(samples), late / len(samples), tuple(samples))


def quartiles(numbers: Sequence[float]) -> list[float]:
    """Lower one, median, upper one; of one number that number."""
    return statistics.quantiles([*numbers, *numbers[: len(numbers) == 1]], n=4, method="inclusive")


def count_syncs(run: Run, device: torch.device) -> int:
    """How often a call waits for the GPU in ways that `syncs_counted` sees, or on a CPU would wait for one."""
    with syncs_counted(device) as count:
        run()
        return count()


@contextmanager
def syncs_counted(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that says how often the host waited so far.

    On a GPU by its debug mode for synchronization, which sees neither `Event.synchronize` (by which the engine waits
    for its tokens), nor `Stream.synchronize`, nor `torch.cuda.synchronize`.

    On a CPU: how often it asks for numbers (`item`, `bool`, `tolist`, `numpy`, `cpu`) or for a shape that depends on
    them (`nonzero`, `unique`, indexing by booleans, …). Copies by `to` can't be told from copies to a device and are
    not counted. What is compiled is called without its compilation, whose code would not be seen.
    """
    if device.type != "cuda":
        with torch.compiler.set_stance("force_eager"), _AskedFunctions() as functions, _AskedOperators() as operators:
            yield lambda: functions.count + operators.count
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode(before)


ASKING = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "unique_dim", "unique_dim_consecutive",
    "_unique", "_unique2", "equal", "bincount",
}  # fmt: skip
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _AskedOperators(TorchDispatchMode):
    """Counts operators that a GPU's host would have to wait for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        asks = name in ASKING or (name == "repeat_interleave" and not (kwargs or {}).get("output_size"))
        if name in BY_INDEX:
            asks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        self.count += asks
        return func(*args, **(kwargs or {}))


class _AskedFunctions(TorchFunctionMode):
    """Counts functions that read a tensor without an operator where it is on the host already."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (Tensor.tolist, Tensor.numpy, Tensor.cpu)
        return func(*args, **(kwargs or {}))


def peak_bytes(run: Run, device: torch.device) -> int:
    """Memory a call needs at its peak, beyond what was there before and what of its results is new.

    On a CPU from the profiler, which hears of every allocation, by compiled code too.
    """
    outputs: Outputs = []

    def called() -> None:
        nonlocal outputs
        outputs = run()

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        called()
        torch.cuda.synchronize()
        peak, kept = (f() - before for f in (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated))
    else:
        held = list(itertools.accumulate((size for size in allocations(called) if isinstance(size, int)), initial=0))
        peak, kept = max(held), held[-1]
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, map(local, outputs))}
    return peak - max(min(sum(storages.values()), kept), 0)  # what was there before is not kept by this call


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return getattr(tensor, "to_local", lambda: tensor)()


def allocations(call: Callable[[], Any], marks: str | None = None) -> list[int | str]:
    """Sizes of what a call allocates on a CPU, negative where it is freed, in order; among them the names of those
    ranges of `torch.profiler.record_function` that begin with `marks`, where they begin."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no lines about its start and end
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return [
        event.nbytes() if event.name() == "[memory]" else event.name()
        for event in events
        if event.name() == "[memory]" or (marks is not None and event.name().startswith(marks))
    ]


def compare(
    got: Outputs,
    plain: Outputs,
    exact: Outputs,
    factor: float,
    floors: Sequence[float] = (),
    equal: bool = False,
    terms: int = 0,
) -> tuple[float, str | None]:
    """The largest error in units of the plain path's, and None or a sentence saying which output is wrong.

    An output may be `factor` times as far from `exact` (float64) as `plain` is, and never has to be nearer than half a
    unit in the last place of the largest number, or `floors[i]` times that number. Where an output is FEW numbers, that
    the plain path is near all of them may be luck: it counts as no nearer, relatively, than in its worst output. Where
    a result is the sum of `terms` numbers, they may have been added one by one in float32, whose roundings make about
    half a unit in the last place times the root of their number. With `equal` every output must be `exact`.
    """
    if len(got) != len(exact):
        return math.inf, f"{len(got)} results instead of {len(exact)}"
    for index, (g, e) in enumerate(zip(got, exact, strict=True)):
        if g.shape != e.shape:
            return math.inf, f"result {index} has shape {tuple(g.shape)} instead of {tuple(e.shape)}"
        if equal and not torch.equal(g.to(e.dtype), e):
            return math.inf, f"result {index} is not equal, bit by bit"
    if equal:
        return 0.0, None

    largest = [_largest(e) for e in exact]
    plain_errors = [_largest(p.to(e.dtype) - e) for p, e in zip(plain, exact, strict=True)]
    relative = max((error / size for error, size in zip(plain_errors, largest, strict=True) if size), default=0.0)
    worst = 0.0
    for index, (g, e, size, plain_error) in enumerate(zip(got, exact, largest, plain_errors, strict=True)):
        error, floor = _largest(g.to(e.dtype) - e), torch.finfo(g.dtype).eps / 2 * size
        if index < len(floors):
            floor = max(floor, floors[index] * size)
        elif e.numel() < FEW:
            plain_error = max(plain_error, relative * size)
        one_by_one = torch.finfo(torch.float32).eps / 2 * terms**0.5 * size
        if not error <= factor * plain_error + max(floor, one_by_one):  # NaN too
            return math.inf, (
                f"result {index} is off by {error:.3g}; {factor:g} × the plain path's {plain_error:.3g} is allowed"
            )
        worst = max(worst, error / max(plain_error, floor, 1e-300))
    return worst, None


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


class Ceilings(NamedTuple):
    """The most that the device reached in this run, of several streams and several sizes of matrices: their best
    samples, so that what runs later may come near, but is not above by chance."""

    bytes_per_second: float  # of a large copy (read + write), a change in place or a sum, whichever has most
    flops_per_second: float  # of bfloat16 on a GPU, of float32 on a CPU
    copied_bytes_per_second: float | None = None  # of the copy
    noisy: str | None = None  # a sentence, where the samples that they are of spread too much

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time for this work."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


class _Probe(NamedTuple):
    work: float  # bytes or floating-point operations
    run: Run


def ceilings(device: torch.device, seconds: float = 20.0) -> Ceilings:
    """Measure them in about `seconds`, a half for each."""
    rates, noisy = zip(*(_rates(probes, device, seconds / 2) for probes in (_streams, _products)), strict=True)
    streams, products = rates
    said = "; ".join(filter(None, noisy)) or None
    return Ceilings(max(streams.values()), max(products.values()), streams["copy"], said)


def _streams(device: torch.device) -> dict[str, _Probe]:
    """A copy alone is no ceiling: on a CPU its target is read too before it is written."""
    count = 2**28 if device.type == "cuda" else 2**26  # far beyond the caches
    source, target = torch.ones(count, device=device), torch.ones(count, device=device)
    return {
        "copy": _Probe(2 * source.nbytes, lambda: [target.copy_(source)]),
        "change in place": _Probe(2 * source.nbytes, lambda: [source.neg_()]),
        "sum": _Probe(source.nbytes, lambda: [source.sum()]),
    }


def _products(device: torch.device) -> dict[str, _Probe]:
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32

    def probe(n: int) -> _Probe:
        left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(left)
        return _Probe(2 * n**3, lambda: [torch.mm(left, right, out=product)])

    sizes = (4096, 8192, 16384) if gpu else (1024, 1536, 2048)
    return {f"product of {n}": probe(n) for n in sizes}


def _rates(
    make: Callable[[torch.device], dict[str, _Probe]], device: torch.device, seconds: float
) -> tuple[dict[str, float], str | None]:
    """The best of each probe, and None or why the highest of them is no sure number."""
    probes = make(device)
    calls = {name: [probe.run] for name, probe in probes.items()}
    timings = take_turns(calls, device, seconds, min_rounds=FEW_ROUNDS, max_rounds=10**6)
    rates = {name: probe.work / min(timings[name].samples) for name, probe in probes.items()}
    best = max(rates, key=lambda name: rates[name])
    noise = timings[best].noise
    return rates, noise and f"{best}: {noise}"


def keep_freed_memory() -> None:
    """Otherwise every large array on a CPU is new from the system, whose page faults cost several times the work that
    is timed, and whether a contender pays them is chance."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        m_mmap_max, m_trim_threshold = -4, -1  # <malloc.h>
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
