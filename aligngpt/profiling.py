"""Where the time of a training run or of answers goes: torch.profiler's trace of a few steps, and a screen of text.

    with Profile("runs/profile", device): model.generate(…)                             all that runs in the context
    with Profile(folder, engine.device, unit=ENGINE_STEP, skip=16, record=32): …        steps that an engine takes
    with Profile(folder, device, unit=TRAINING_STEP, skip=2, record=3) as profile:      steps that end by `step()`
        for …: …; profile.step()

    FOLDER/trace.json.gz    Chrome's trace format, for Perfetto or chrome://tracing; stages are named ranges in it
    FOLDER/summary.txt      milliseconds by stage, what waits for what, the longest operators or kernels; also printed

Stages are those of `aligngpt.stages`. They are NVTX ranges, too, for as long as the context lasts. All threads are in
the trace; the summary is of the thread that takes the steps, and of all kernels. On a GPU a stage's milliseconds lie
between events in its stream, and "kernels" are the kernels that were launched in it, whenever they ran.

Both files are written when the steps are recorded, or else at the end of the context with what there is by then; after
an error nothing is. They are written in the thread that takes the steps, which goes on some seconds later: an engine's
users wait so long. What goes wrong in a profiler is said, and ends nothing. A folder with other files is refused.
"""

import gzip
import json
import os
import resource
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile, record_function

from .data.tables import whole_file
from .stages import ENGINE_STEP, Spent, Stopwatch, listening

TRACE, SUMMARY = "trace.json.gz", "summary.txt"
_CODE = "profiled code"  # a unit where nobody says what one is
_NONE = "in no stage"
_STAGE_ROWS, _TOP_ROWS, _HINTS = 18, 8, 3
_COLUMNS = 100
_CALLS, _KERNELS = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")  # kinds of events
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
_READ = "aten::_local_scalar_dense"  # what `item` does

Event = Mapping[str, Any]  # of a Chrome trace


def check_folder(flag: str, folder: str | os.PathLike[str]) -> None:
    """ValueError: `folder`, which `flag` asks for, is a file, holds other files than a profile's, or cannot be made."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag} is {path}, a file; it needs a folder of its own")
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"{flag} is {path}; {existing} needs to be a folder that can be written to")
    names = (item.name for item in path.iterdir() if item.suffix != ".tmp") if path.is_dir() else ()
    if others := sorted(set(names) - {TRACE, SUMMARY}):
        raise ValueError(f"{flag} is {path}, which holds other files ({others[0]}); it needs an empty or a new folder")


class Profile:
    """Records the steps that are taken in its context, of any thread, from the first after `skip` on.

    Args:
        folder: receives trace.json.gz and summary.txt.
        unit: what a step is called: ENGINE_STEP for those of an engine, which need no `step()`.
        record: steps that are recorded. None: all until the context ends.
        say: prints the summary, or why there is none.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        device: torch.device | str,
        *,
        unit: str = _CODE,
        skip: int = 0,
        record: int | None = None,
        say: Callable[[str], None] = print,
    ):
        if skip < 0 or (record is not None and record < 1):
            raise ValueError(f"skip is {skip}, record is {record}; they need at least 0 and 1 steps")
        check_folder("folder", folder)
        self.folder, self.device, self.unit = Path(folder), torch.device(device), unit
        self.skip, self.record, self.say = skip, record, say
        self._is_cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
        # Of all threads: an engine that serves runs in one of its own, and may be gone before the context ends.
        config = _ExperimentalConfig(profile_all_threads=True)
        self._profile = profile(activities=activities, experimental_config=config)
        self._watch = Stopwatch(self.device)
        self._num_points = 0  # of the watch, in whole steps
        self._num_seen = self._num_recorded = 0
        self._host_seconds = 0.0
        self._began = 0.0
        self._state = "waiting"  # then "ready", "recording", "ended"
        self._thread: int | None = None  # which takes the step
        self._open = threading.local()  # .ranges: those of this thread; None where it was not recorded
        self._held = ExitStack()
        self._ends = threading.Lock()  # the thread that takes the steps may end it, and the context

    def __enter__(self) -> "Profile":
        self._held.enter_context(listening(self))
        self._prepare()
        if self.unit != ENGINE_STEP:
            self.begin(self.unit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()
        if self.unit != ENGINE_STEP:  # what comes after the last step is none, but all of it where there are no steps
            self.end(self.unit, counts=self.unit == _CODE and not isinstance(error, Exception))
        self._finish(writes=not isinstance(error, Exception))

    def step(self) -> None:
        """A step has ended; what comes is of the next."""
        try:
            self.end(self.unit)
        finally:
            self.begin(self.unit)

    # ------------------------------------------------------------------------------------------------ a listener

    def begin(self, name: str) -> None:
        if name == self.unit:
            self._before_step()
        if self._is_cuda:
            torch.cuda.nvtx.range_push(name)
        if not hasattr(self._open, "ranges"):
            self._open.ranges = []
        named: record_function | None = None
        if self._state == "recording":
            named = record_function(name)
            named.__enter__()
            if threading.get_ident() == self._thread:
                self._watch.begin(name)
        self._open.ranges.append(named)

    def end(self, name: str, *, counts: bool = True) -> None:
        named = self._open.ranges.pop()
        if named is not None:
            if self._state == "recording" and threading.get_ident() == self._thread:
                self._watch.end(name)
            named.__exit__(None, None, None)
        if self._is_cuda:
            torch.cuda.nvtx.range_pop()
        if name == self.unit and counts:
            self._after_step()

    # ------------------------------------------------------------------------------------------------ its states

    def _prepare(self) -> None:
        """A step ahead: it takes its time."""
        if self._state == "waiting" and self._num_seen >= self.skip - 1:
            self._reach("ready", self._profile.prepare_trace)

    def _before_step(self) -> None:
        self._prepare()
        if self._state == "ready" and self._num_seen >= self.skip:
            self._reach("recording", self._profile.start_trace)
        self._thread, self._began = threading.get_ident(), time.perf_counter()

    def _reach(self, state: str, how: Callable[[], None]) -> None:
        try:
            how()
        except Exception as error:  # a profiler's: what runs goes on without
            self._state = "ended"
            self.say(f"nothing is profiled: {error or type(error).__name__}")
        else:
            self._state = state

    def _after_step(self) -> None:
        self._num_seen += 1
        if self._state != "recording":
            return
        self._host_seconds += time.perf_counter() - self._began
        self._num_recorded += 1
        self._num_points = len(self._watch.points)
        if self._num_recorded == self.record:
            self._finish()

    def _stop(self) -> None:
        """The state is then "ended", whatever it was."""
        before, self._state = self._state, "ended"
        if before == "ready":  # cannot be left before it has started
            self._profile.start_trace()
        if before in ("ready", "recording"):
            self._profile.stop_trace()

    def _finish(self, *, writes: bool = True) -> None:
        with self._ends:
            if self._state == "ended":
                return
            try:
                self._stop()
                text = self._write() if writes and self._num_recorded else None
            except (
                Exception
            ) as error:  # a profiler's, a disk's, or of a GPU that is unusable: what runs goes on without
                if writes:
                    self.say(f"the profile could not be written into {self.folder}: {error or type(error).__name__}")
                return
        if not writes:
            return
        left_out = f", and the first {self.skip} are not recorded" if self.skip else ""
        self.say(text or f"nothing was profiled: there were {_count(self._num_seen, self.unit)}{left_out}")

    def _write(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix=".tmp", dir=self.folder) as scratch:
            plain = Path(scratch) / "trace.json"
            self._profile.export_chrome_trace(str(plain))
            events = json.loads(plain.read_bytes())["traceEvents"]
            with whole_file(self.folder / TRACE) as temporary:
                temporary.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=5))
        del self._watch.points[self._num_points :]
        recorded = Recorded(
            unit=self.unit,
            count=self._num_recorded,
            skipped=self.skip,
            wanted=self.record,
            paths=self._watch.by_path(),
            host_seconds=self._host_seconds,
            events=events,
            device=_name(self.device),
            peak_bytes=peak_memory_bytes(self.device),
        )
        text = f"{summary(recorded)}\ntrace: {self.folder / TRACE}\n"
        with whole_file(self.folder / SUMMARY) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return text.rstrip()


# ---------------------------------------------------------------------------------------------------- the summary


@dataclass(frozen=True)
class Recorded:
    """What a summary is made of."""

    unit: str
    count: int  # steps
    skipped: int
    wanted: int | None  # steps that were to be recorded
    paths: Mapping[tuple[str, ...], Spent]  # of the stopwatch
    host_seconds: float  # of all steps, by the host's clock
    events: Sequence[Event]
    device: str
    peak_bytes: int


def summary(recorded: Recorded) -> str:
    """At most 40 lines of 100 columns."""
    trace = Trace(recorded)
    lines = [*_head(recorded), "", *_stage_table(recorded, trace), ""]
    lines += [f"peak memory {recorded.peak_bytes / 1e9:.2f} GB", *_waits(recorded, trace), ""]
    lines += [*_longest(recorded, trace), *_hints(recorded, trace)]
    return "\n".join(line[:_COLUMNS].rstrip() for line in lines)


class Trace:
    """The events of the recorded steps, and in which stage each began or was launched."""

    def __init__(self, recorded: Recorded):
        complete = [event for event in recorded.events if event.get("ph") == "X"]
        ranges = [event for event in complete if event["cat"] == "user_annotation"]
        steps = sorted((event for event in ranges if event["name"] == recorded.unit), key=_order)[: recorded.count]
        threads = {event["tid"] for event in steps}
        names = {name for path in recorded.paths for name in path}
        self._starts, self._paths = _flat(
            event for event in ranges if event["tid"] in threads and event["name"] in names
        )
        self._windows = [(event["ts"], event["ts"] + event["dur"]) for event in steps]
        self.operators = [
            event for event in complete if event["cat"] == "cpu_op" and event["tid"] in threads and self._is_in(event)
        ]
        self.calls = [event for event in complete if event["cat"] in _CALLS and self._is_in(event)]  # of CUDA
        launches = {event["args"].get("correlation"): event for event in self.calls}
        self.kernels: list[tuple[Event, tuple[str, ...]]] = []  # and the stages that launched it
        for event in complete:
            if event["cat"] in _KERNELS and (launch := launches.get(event["args"].get("correlation"))) is not None:
                self.kernels.append((event, self.path(launch)))

    def path(self, event: Event) -> tuple[str, ...]:
        """The stages that an event began in, outermost first; () outside of the steps."""
        return self._paths[bisect_right(self._starts, event["ts"]) - 1]

    def busy(self) -> float:
        """Microseconds in which at least one kernel ran."""
        total, until = 0.0, float("-inf")
        for event, _ in sorted(self.kernels, key=lambda item: item[0]["ts"]):
            end = event["ts"] + event["dur"]
            total += max(0.0, end - max(event["ts"], until))
            until = max(until, end)
        return total

    def own_times(self) -> list[float]:
        """Microseconds of each operator without the operators that it calls."""
        own = [event["dur"] for event in self.operators]
        open_ops: list[tuple[float, int]] = []  # end, place
        for place in sorted(range(len(own)), key=lambda place: _order(self.operators[place])):
            event = self.operators[place]
            while open_ops and open_ops[-1][0] <= event["ts"]:
                open_ops.pop()
            if open_ops:
                own[open_ops[-1][1]] -= event["dur"]
            open_ops.append((event["ts"] + event["dur"], place))
        return own

    def _is_in(self, event: Event) -> bool:
        place = bisect_right(self._windows, (event["ts"], float("inf"))) - 1
        return place >= 0 and event["ts"] < self._windows[place][1]


def _order(event: Event) -> tuple[float, float]:
    """By which what encloses comes before what lies in it."""
    return event["ts"], -event["dur"]


def _flat(ranges: Iterable[Event]) -> tuple[list[float], list[tuple[str, ...]]]:
    """Times in order, and the names of the ranges that are open from each of them on."""
    times, paths = [float("-inf")], [tuple[str, ...]()]
    open_ranges: list[float] = []  # their ends

    def close(until: float) -> None:
        while open_ranges and open_ranges[-1] <= until:
            times.append(open_ranges.pop())
            paths.append(paths[-1][:-1])

    for event in sorted(ranges, key=_order):
        close(event["ts"])
        times.append(event["ts"])
        paths.append((*paths[-1], event["name"]))
        open_ranges.append(event["ts"] + event["dur"])
    close(float("inf"))
    return times, paths


def _head(recorded: Recorded) -> list[str]:
    text = f"{_count(recorded.count, recorded.unit)} on {recorded.device}, torch {torch.__version__}"
    if recorded.skipped:
        text += f"; {recorded.skipped} before were not recorded"
    if recorded.wanted is not None and recorded.count < recorded.wanted:
        return [text, f"it ended before there were the {recorded.wanted} that were to be recorded"]
    return [text]


def _stage_table(recorded: Recorded, trace: Trace) -> list[str]:
    """Milliseconds of a step, by stage."""
    count, paths = recorded.count, recorded.paths
    whole = _whole(recorded)
    kernels: dict[tuple[str, ...], float] = defaultdict(float)
    for event, path in trace.kernels:
        kernels[path] += event["dur"]
    outer = (recorded.unit,)
    inner = [path for path in paths if path != outer]
    shown = sorted(inner, key=lambda path: -paths[path].seconds)[:_STAGE_ROWS]
    rows: list[tuple[str, float, float | None, float]] = [(recorded.unit, whole, None, sum(kernels.values()))]
    for path in inner:
        if path in shown:
            name = "  " * (len(path) - 1) + path[-1]
            rows.append((name, paths[path].seconds, paths[path].calls, kernels[path]))
    if others := [path for path in inner if path not in shown]:
        seconds = sum(paths[path].seconds for path in others)
        rows.append((f"  {len(others)} other stages", seconds, None, sum(kernels[path] for path in others)))
    rows.append((f"  {_NONE}", paths[outer].seconds, None, kernels[outer]))

    last = "  kernels" if trace.kernels else ""
    lines = [f"{'milliseconds a step, without inner stages':42}{'ms':>10}{'share':>9}{'calls':>9}{last}"]
    for name, seconds, calls, device in rows:
        times = "" if calls is None else f"{calls / count:.4g}"
        share = f"{seconds / whole * 100:.1f} %"
        last = f"{device / count / 1e3:9.3f}" if trace.kernels else ""
        lines.append(f"{name:42}{seconds / count * 1e3:10.3f}{share:>9}{times:>9}{last}")
    clock = recorded.host_seconds / count * 1e3
    lines.append(f"these add up to {whole / count * 1e3:.3f} ms; by the host's clock a step took {clock:.3f} ms")
    return lines


def _waits(recorded: Recorded, trace: Trace) -> list[str]:
    """How often the host waits for the GPU, or would if there were one."""
    if trace.kernels:
        what, events = "the host waits for the GPU", [event for event in trace.calls if event["name"] in _WAITS]
    else:
        what = "numbers that the host reads, waiting for them on a GPU:"
        events = [event for event in trace.operators if event["name"] == _READ]
    times, spent = defaultdict[str, int](int), defaultdict[str, float](float)
    for event in events:
        stage = _innermost(trace.path(event))
        times[stage] += 1
        spent[stage] += event["dur"]

    def said(number: int, microseconds: float) -> str:
        long = f", {microseconds / recorded.count / 1e3:.3f} ms" if trace.kernels else ""
        return f"{number / recorded.count:.4g}{long}"

    most = sorted(times, key=lambda stage: -spent[stage] if trace.kernels else -times[stage])[:3]
    where = "; ".join(f"{stage} {said(times[stage], spent[stage])}" for stage in most)
    text = f"{what} {said(sum(times.values()), sum(spent.values()))} a step"
    return [f"{text}: {where}" if where else text]


def _longest(recorded: Recorded, trace: Trace) -> list[str]:
    """Kernels, or operators where there are none, by their time and where they run."""
    times, spent = defaultdict[tuple[str, str], int](int), defaultdict[tuple[str, str], float](float)
    found: Iterable[tuple[Event, tuple[str, ...], float]]
    if trace.kernels:
        found = ((event, path, event["dur"]) for event, path in trace.kernels)
    else:
        own = trace.own_times()
        found = ((event, trace.path(event), own[place]) for place, event in enumerate(trace.operators))
    for event, path, microseconds in found:
        key = event["name"], _innermost(path)
        spent[key] += microseconds
        times[key] += 1
    what = "kernels" if trace.kernels else "operators, without those that they call"
    lines = [f"{'longest ' + what:56}{'ms':>10}{'calls':>9}  stage"]
    for (name, stage), microseconds in sorted(spent.items(), key=lambda item: -item[1])[:_TOP_ROWS]:
        calls = f"{times[name, stage] / recorded.count:.4g}"
        lines.append(f"{_short(name):56}{microseconds / recorded.count / 1e3:10.3f}{calls:>9}  {stage}")
    return lines


def _hints(recorded: Recorded, trace: Trace) -> list[str]:
    """What the numbers alone say."""
    whole = _whole(recorded)
    share: dict[str, float] = defaultdict(float)
    for path, spent in recorded.paths.items():
        share[path[-1]] += spent.seconds / whole
    hints = []
    if share["data wait"] > 0.05:
        hints.append(f"{share['data wait']:.0%} of a step is spent waiting for data: more --data.workers, or DALI")
    idle = 1 - trace.busy() / 1e6 / whole
    if trace.kernels and idle - share["data wait"] > 0.2:
        hints.append(f"the GPU idles {idle:.0%} of a step: the host is the limit")
    saves = sum(spent.calls for path, spent in recorded.paths.items() if path[-1] == "checkpoint")
    if saves >= recorded.count and share["checkpoint"] > 0.1:
        hints.append(f"{share['checkpoint']:.0%} of a step goes into checkpoints: a larger --save-every")
    if (rest := share[recorded.unit]) > 0.2 and len(recorded.paths) > 1:
        hints.append(f"{rest:.0%} of a step lies in no stage: the trace shows what it is")
    return ["", *(f"hint: {hint}" for hint in hints[:_HINTS])] if hints else []


def _whole(recorded: Recorded) -> float:
    return sum(spent.seconds for spent in recorded.paths.values()) or float("inf")


def _innermost(path: tuple[str, ...]) -> str:
    return path[-1] if len(path) > 1 else _NONE


def _short(name: str) -> str:
    name = name.removeprefix("void ")
    return name if len(name) < 56 else f"{name[:54]}…"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 or unit == _CODE else 's'}"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU, {_count(torch.get_num_threads(), 'thread')}"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
