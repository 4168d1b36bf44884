"""The GPU benchmark's machinery, on a CPU: who is timed, what is recorded, how a stopped run goes on, what it says."""

import dataclasses
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aligngpt_kernels.__main__ import OPS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_loss, dispatch, measure, readings, requirements
from benchmarks import case as case_module
from benchmarks import run as runner
from benchmarks.case import ENDED, Absent, Case, Contender, DeviceLost, run_case, simple
from benchmarks.conftest import assert_ours
from benchmarks.measure import Ceilings, compare, take_turns
from benchmarks.results import Results, code_hash, commit, is_noisy, versions, write_json
from benchmarks.run import all_cases, run_cases, supervise

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, 1e9)
RATIO = ("low", "median", "high")


def double_it(x: Tensor) -> list[Tensor]:
    return [2 * x]


def make_case(name: str = "a case", **more: Any) -> Case:
    contenders = {"ours": simple(double_it), **more.pop("contenders", {})}
    return Case(
        name=name,
        make=lambda device: torch.randn(5, device=device),
        contenders=contenders,
        exact=lambda x: [2 * x.double()],
        plain=double_it,
        bytes=40,
        flops=5,
        **more,
    )


def missing_package(x: Tensor) -> list[Tensor]:
    import a_package_that_nobody_has  # type: ignore[import-not-found]

    return a_package_that_nobody_has.double(x)


def refuse(x: Tensor) -> list[Tensor]:
    raise Absent("not on a Tuesday")


# ------------------------------------------------------------------------------------------------------ a case


def test_only_who_is_right_is_timed():
    calls = {"wrong": 0}

    def off_by_a_little(x: Tensor) -> list[Tensor]:
        calls["wrong"] += 1
        return [2 * x + 1e-3]

    contenders = {
        "wrong": simple(off_by_a_little),
        "NaN": simple(lambda x: [2 * x * torch.nan]),
        "another shape": simple(lambda x: [2 * x[:4]]),
        "another number of results": simple(lambda x: [2 * x, x]),
        "broken": simple(lambda x: [x @ x @ x]),
        "not installed": simple(missing_package),
        "refusing": simple(refuse),
        "for GPUs": simple(double_it, gpu_only=True),
    }
    case = make_case(contenders=contenders, absent={"unfit": "it takes no mask"})
    results = run_case(case, CPU, CEILINGS, seconds=0)
    assert results["ours"]["rounds"] >= measure.MIN_ROUNDS
    assert results["ours"]["quartiles_us"][0] <= results["ours"]["us"] <= results["ours"]["quartiles_us"][1]
    assert results["ours"]["share_of_ceiling"] == pytest.approx(4e-8 / results["ours"]["us"] * 1e6, rel=0.1, abs=1e-4)
    assert calls["wrong"] == 1
    assert results["wrong"]["wrong"].startswith("result 0 is off by 0.001")
    assert results["another shape"]["wrong"] == "result 0 has shape (4,) instead of (5,)"
    assert results["another number of results"]["wrong"] == "2 results instead of 1"
    assert results["broken"]["failed"].startswith("RuntimeError: ")
    assert results["not installed"] == {"absent": "a_package_that_nobody_has is not installed"}
    assert results["refusing"] == {"absent": "not on a Tuesday"}
    assert results["for GPUs"] == {"absent": "timed on a GPU only"}
    assert results["unfit"] == {"absent": "it takes no mask"}
    assert [name for name, found in results.items() if "us" in found] == ["ours"]


def test_preparing_is_not_timed_and_finishing_is_neither():
    def prepare(x: Tensor) -> Callable[[], list[Tensor]]:
        time.sleep(0.01)
        return lambda: [x]

    def finish(x: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        time.sleep(0.01)
        return [2 * outputs[0]]

    results = run_case(make_case(contenders={"slow to start": Contender(prepare, finish)}), CPU, seconds=0)
    assert results["slow to start"]["us"] < 5000


def out_of_memory() -> None:
    raise MemoryError("no room for 3 copies")


def test_who_fails_later_is_named_and_the_others_go_on(monkeypatch):
    """In a round, before the first round, or while its details are read: of a peer or of ours."""

    monkeypatch.setattr(case_module, "free", lambda device: None)  # it takes half a second each time

    def until(last: int) -> Contender:
        calls = iter(range(10**6))
        return simple(lambda x: double_it(x) if next(calls) < last else out_of_memory())

    contenders = {
        "before": until(1),  # it is right, and then it is called to be timed
        "in a round": until(8),
        "its details": simple(double_it, details=lambda *_: out_of_memory()),
        "ours, its details": simple(double_it, details=lambda *_: out_of_memory()),
        "its details need what is missing": simple(double_it, details=lambda run, x, seconds: missing_package(x)),
        "fine": simple(double_it, details=lambda *_: {"more": 1}),
    }
    saved: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    timings: dict[str, measure.Timing] = {}
    case = make_case(contenders=contenders)
    run_case(case, CPU, None, results, lambda: saved.append(dict(results)), 0, timings)
    failed = {"failed": "MemoryError: no room for 3 copies"}
    for name in ("before", "in a round", "its details", "ours, its details"):
        assert results[name] == failed, name
        assert any(before.get(name) == failed for before in saved), name
    assert results["its details need what is missing"] == {"absent": "a_package_that_nobody_has is not installed"}
    assert timings.keys() == {"ours", "fine"}
    assert results["fine"]["more"] == 1
    assert results["fine"]["rounds"] == results["ours"]["rounds"] >= measure.MIN_ROUNDS
    with pytest.raises(AssertionError, match="no room for 3 copies"):
        assert_ours(results)


def test_all_of_ours_must_be_right_that_are_there():
    time, absent, wrong = {"us": 1.0}, {"absent": "no TMA"}, {"wrong": "result 0 is off"}
    assert_ours({"ours": time, "ours, another": {"noisy": "why"}, "ours, a third": absent, "peer": wrong})
    for results in ({"ours": time, "ours, another": wrong}, {"ours": absent}, {"peer": time}):
        with pytest.raises(AssertionError):
            assert_ours(results)


def test_work_of_the_host_has_no_share_of_the_devices_ceilings(monkeypatch):
    monkeypatch.setattr(case_module, "free", lambda device: None)
    for stage in case_module.OFF_DEVICE:
        case = make_case(stage=stage)
        found = run_case(case, CPU, CEILINGS, seconds=0)["ours"]
        assert "us" in found
        assert "share_of_ceiling" not in found
        record = {"stage": stage, "bytes": 40, "flops": 5, "ceilings": CEILINGS._asdict()}
        assert readings.share(record, found) is None
        assert readings.share({"ceilings": CEILINGS._asdict()}, record | {"us": 1.0}) is None  # a row of a whole
    assert readings.share({"ceilings": CEILINGS._asdict()}, {"stage": "gate", "bytes": 500, "us": 1.0}) == 0.5


def test_a_process_that_dies_leaves_its_name():
    saved: list[dict[str, Any]] = []
    results: dict[str, Any] = {"deadly": {"failed": ENDED}}  # from a run before

    def never(x: Tensor) -> list[Tensor]:
        raise AssertionError("it ended a process already")

    case = make_case(contenders={"deadly": simple(never)})
    run_case(case, CPU, None, results, lambda: saved.append(json.loads(json.dumps(results))), 0)
    assert results["deadly"] == {"failed": ENDED}
    assert saved[0]["ours"] == {"failed": ENDED}  # in the file while it runs for the first time
    assert "us" in results["ours"]


def test_an_interruption_is_nobodys_failure():
    def interrupted(x: Tensor) -> list[Tensor]:
        raise KeyboardInterrupt

    results: dict[str, Any] = {}
    with pytest.raises(KeyboardInterrupt):
        run_case(make_case(contenders={"peer": simple(interrupted)}), CPU, None, results, seconds=0)
    assert "peer" not in results


def test_a_lost_device_ends_the_run_after_naming_the_cause(monkeypatch, tmp_path):
    def gone(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def illegal(x: Tensor) -> list[Tensor]:
        monkeypatch.setattr(case_module, "synchronize", gone)
        raise RuntimeError("an illegal memory access was encountered")

    results: dict[str, Any] = {}
    file, case = tmp_path / "x.json", make_case(contenders={"peer": simple(illegal)})
    with pytest.raises(DeviceLost, match="peer"):
        run_case(case, CPU, None, results, lambda: write_json(file, results), 0)
    saved = json.loads(file.read_text())
    assert saved["peer"]["failed"] == "RuntimeError: an illegal memory access was encountered"


@pytest.mark.parametrize("missing", [(bench_loss.F, "linear_cross_entropy"), (torch.nn, "LinearCrossEntropyOptions")])
def test_a_torch_without_the_loss_or_its_options_is_absent(monkeypatch, missing: tuple[Any, str]):
    monkeypatch.setattr(bench_loss.F, "linear_cross_entropy", None, raising=False)
    monkeypatch.delattr(*missing, raising=False)
    (case,) = (case for case in bench_loss.small_cases() if "frozen" in case.name)
    with pytest.raises(Absent, match="linear_cross_entropy"):
        case.contenders["torch linear_cross_entropy"].prepare(case.make(CPU))()


@pytest.mark.parametrize(
    ("got", "allowed"),
    [(1.0, True), (1.02, True), (1.021, False), (float("nan"), False), (float("inf"), False)],
    ids=str,
)
def test_twice_the_plain_error_is_allowed(got: float, allowed: bool):
    exact, plain = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 1.01))
    _, wrong = compare([torch.tensor([got]).double()], [plain], [exact], factor=2.00001)
    assert (wrong is None) == allowed


def test_equal_means_every_bit():
    x = torch.randn(4)
    assert compare([x.clone()], [x], [x], 2, equal=True)[1] is None
    assert compare([x + 1e-7], [x], [x], 2, equal=True)[1] == "result 0 is not equal, bit by bit"


def test_few_numbers_are_held_to_the_plain_paths_worst_output():
    exact = [torch.ones(100).double(), torch.ones(7).double(), torch.ones(measure.FEW).double()]
    plain = [exact[0] + 1e-3, exact[1], exact[2]]
    for index, right in ((1, True), (2, False)):
        got = [exact[0], exact[1].clone(), exact[2].clone()]
        got[index] += 1.9e-3
        assert (compare(got, plain, exact, 2)[1] is None) == right


def test_a_lucky_plain_path_does_not_raise_the_bar():
    exact = torch.tensor(1000.0, dtype=torch.float64)
    got = [torch.tensor(1000.01)]
    assert compare(got, [torch.tensor(1000.0)], [exact], 2)[1] is not None
    assert compare(got, [torch.tensor(1000.0)], [exact], 2, floors=(1e-4,))[1] is None


# ------------------------------------------------------------------------------------------------------ time


def test_turns_go_through_all_copies_and_all_contenders():
    seen: list[tuple[str, int]] = []

    def call(name: str, copy: int) -> Callable[[], list[Tensor]]:
        return lambda: [seen.append((name, copy)) or torch.empty(0)]

    timings = take_turns({name: [call(name, copy) for copy in range(3)] for name in "ab"}, CPU, 0)
    timed = seen[4:]  # after two calls of each to warm up
    turns = "".join(name for name, _ in timed)
    assert {turns[i : i + 2] for i in range(0, len(turns), 2)} == {"ab", "ba"}  # nobody always follows the same one
    assert [copy for _, copy in timed[:6]] == [0, 1, 2, 0, 1, 2]
    assert {timing.rounds for timing in timings.values()} == {measure.MIN_ROUNDS}


class FakeCuda:
    """Events on a clock that the queued calls move: a call takes `seconds`, the host is late if `late`."""

    def __init__(self, seconds: float, late: bool = False) -> None:
        self.now, self.seconds, self.late, self.sleeps = 0.0, seconds, late, []

    def call(self) -> list[Tensor]:
        self.now += self.seconds
        return []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def query(self) -> bool:
                return fake.late

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleeps.append)
        return SimpleNamespace(type="cuda")


@pytest.mark.parametrize(("seconds", "queued"), [(6e-6, 17), (1e-3, 1), (1e-7, measure.MAX_QUEUED)])
def test_short_calls_are_queued_and_long_ones_are_not(monkeypatch, seconds: float, queued: int):
    fake = FakeCuda(seconds)
    device: Any = fake.install(monkeypatch)
    timing = take_turns({"x": [fake.call]}, device, 0)["x"]
    assert timing.seconds == pytest.approx(seconds)
    assert timing.host_bound == 0
    assert round(fake.now / seconds) == 3 + queued * measure.MIN_ROUNDS


def test_a_host_that_is_late_is_told_of_and_given_more_time(monkeypatch):
    fake = FakeCuda(1e-5, late=True)
    device: Any = fake.install(monkeypatch)
    assert take_turns({"x": [fake.call]}, device, 0)["x"].host_bound == 1
    assert fake.sleeps == sorted(fake.sleeps)
    assert fake.sleeps[-1] <= measure.MAX_HEAD_START * measure.CYCLES_PER_SECOND


def test_work_of_the_host_is_timed_from_an_idle_device_to_its_end(monkeypatch):
    """Events would see none of it: the head start covers it. Each call queues work, which the device does later."""
    fake = FakeCuda(0.0)
    device: Any = fake.install(monkeypatch)
    queued = [7.0]  # that somebody left

    def call() -> list[Tensor]:
        fake.now += 2.0
        queued.append(0.5)
        return []

    def synchronize(*_: Any) -> None:
        fake.now += sum(queued)
        queued.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: fake.now)
    for name, value in (("l2_bytes", 0), ("free", None), ("synchronize", None)):
        monkeypatch.setattr(case_module, name, lambda device, value=value: value)
    case = make_case(clock="host", contenders={"ours": simple(lambda x: [*call(), 2 * x])})
    found = run_case(dataclasses.replace(case, make=lambda device: torch.ones(5)), device)["ours"]
    assert found["us"] == 2.5e6
    assert found["host_bound"] == 0
    assert not fake.sleeps
    assert take_turns({"x": [call]}, device, 0)["x"].seconds != 2.5


def test_the_clocks_time_has_quartiles_or_a_sentence(monkeypatch):
    monkeypatch.setattr(measure, "NOISY", 0.25)
    quiet, loud = measure.timing([1.0] * 4 + [1.2] * 4), measure.timing([1.0, 2.0] * 4)
    assert case_module.by_the_clock(quiet) == {"wall_us": 1.1e6, "wall_quartiles_us": [1e6, 1.2e6]}
    found = case_module.by_the_clock(loud)
    assert found.keys() == {"noisy_wall"}
    assert is_noisy({"contenders": {"ours": {"us": 1.0} | found}})


def test_of_few_rounds_all_samples_must_be_near(monkeypatch):
    """The middle half of three numbers is half of their range."""
    monkeypatch.setattr(measure, "NOISY", 0.25)
    few = measure.timing([1.0, 1.1, 1.4])
    assert few.noise == "its 3 samples spread over 36% of its median; 25% is allowed"
    assert measure.timing([1.0, 1.1, 1.2]).noise is None
    assert measure.timing([1.0, 1.1, 1.1, 1.1, 1.4]).noise is None


class FakeClock:
    """Calls that take as long as they are told, call by call, the last number again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure, "NOISY", 0.25)

    def contender(self, seconds: Callable[[int], float]) -> Contender:
        calls = iter(range(10**6))

        def call(x: Tensor) -> list[Tensor]:
            self.now += seconds(next(calls))
            return double_it(x)

        return simple(call)


def test_ratios_are_of_the_same_round(monkeypatch):
    """While the machine slows down."""
    clock = FakeClock(monkeypatch)
    contenders = {
        "peer": clock.contender(lambda call: 1.5 * (1 + 0.02 * call)),
        "ours": clock.contender(lambda call: 1 + 0.02 * call),
        "ours, another": clock.contender(lambda call: (1 + 0.02 * call) * (0.5 if call % 4 else 0.55)),
    }
    results = run_case(make_case(contenders=contenders), CPU, seconds=20)
    assert results["peer"]["ratio"] == {"low": 1.5, "median": 1.5, "high": 1.5}
    assert results["ours, another"]["ratio"] == {"low": 0.5, "median": 0.5, "high": pytest.approx(0.5, abs=0.03)}
    assert "ratio" not in results["ours"]
    assert results["peer"]["us"] / results["ours"]["us"] == pytest.approx(1.5)


def test_who_is_noisy_has_a_sentence_and_no_number(monkeypatch):
    clock = FakeClock(monkeypatch)
    steady, jumping = clock.contender(lambda call: 1.0), clock.contender(lambda call: 1 + 2 * (call % 2))
    asked: list[str] = []
    jumping = jumping._replace(details=lambda *_: asked.append("details") or {})
    results = run_case(
        make_case(contenders={"ours": steady, "peer": steady, "noisy": jumping}, rounds=3), CPU, seconds=0
    )
    noisy = results["noisy"]
    assert noisy["noisy"] == "its middle half spreads over 67% of its median; 25% is allowed"
    assert noisy.keys() == {"error_in_plain_errors", "quartiles_us", "rounds", "noisy"}
    assert not asked
    assert noisy["rounds"] == results["peer"]["rounds"] == 3 * measure.PATIENCE
    assert results["peer"]["ratio"]["median"] == 1
    shown = {"bytes": 0, "contenders": results | {"fast": results["peer"] | {"ratio": dict.fromkeys(RATIO, 0.5)}}}
    assert "spreads over 67%" in requirements.describe("x", shown)
    assert requirements.exceptions({"x": shown, "y": {**shown, "contenders": {"noisy": {"absent": "why"}}}}) == [
        "1 of 2 contenders of 2 cases are faster than ours",
        "  x: fast, 0.50 × ours (0.50 to 0.50)",
        "without a time:",
        "  noisy: too noisy (x)",
        "  noisy: absent: why (y)",
    ]

    results = run_case(make_case(contenders={"ours": jumping, "peer": steady}), CPU, seconds=0)
    assert "us" not in results["ours"]
    assert "us" in results["peer"]
    assert "ratio" not in results["peer"]


def test_who_becomes_steady_has_a_time(monkeypatch):
    """Two calls are not timed, then nine are noisy; with more rounds the middle half is steady."""
    clock = FakeClock(monkeypatch)
    settling = clock.contender(lambda call: 1 + call % 3 if call < 9 else 1.0)
    found = run_case(make_case(contenders={"ours": settling}), CPU, seconds=0)["ours"]
    assert measure.MIN_ROUNDS < found["rounds"] < measure.PATIENCE * measure.MIN_ROUNDS
    assert found["us"] == 1e6


def test_one_round_is_enough_where_no_more_are_asked_for(monkeypatch):
    clock = FakeClock(monkeypatch)
    contenders = {"ours": clock.contender(lambda call: 1.0), "peer": clock.contender(lambda call: 2.0)}
    results = run_case(make_case(contenders=contenders, rounds=1), CPU, seconds=0)
    assert results["peer"]["ratio"] == {"low": 2, "median": 2, "high": 2}
    assert results["ours"]["rounds"] == 1


def test_without_ours_there_are_no_ratios(monkeypatch):
    clock = FakeClock(monkeypatch)
    contenders = {
        "ours": simple(lambda x: [3 * x]),
        "ours, another": clock.contender(lambda call: 1.0),
        "peer": clock.contender(lambda call: 1.0),
    }
    results = run_case(make_case(contenders=contenders), CPU, seconds=0)
    assert not any("ratio" in found for found in results.values())


def test_waits_are_counted(monkeypatch):
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits_twice() -> list[Tensor]:
        for text in ("called a synchronizing CUDA operation", "something else"):
            warnings.warn(text, stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return []

    assert measure.count_syncs(waits_twice, torch.device("cuda")) == 2
    assert modes == ["warn", 0]


def test_waits_are_counted_without_a_gpu():
    x, mask = torch.randn(50), torch.arange(50) % 2 == 0
    waiting: list[Callable[[], Any]] = [
        lambda: x[0].item(), lambda: bool(x[0] > 0), lambda: x.tolist(), lambda: x.numpy(), lambda: x.cpu(),
        lambda: x.nonzero(), lambda: torch.where(mask), lambda: x[mask], lambda: x.masked_select(mask),
        lambda: x.unique(), lambda: x.clone().index_put_((mask,), x[:25]), lambda: torch.equal(x, x),
        lambda: x.repeat_interleave(mask.int()),
    ]  # fmt: skip
    for number, call in enumerate(waiting):
        assert measure.count_syncs(lambda call=call: [call(), x + 1], CPU) == 1, number
    weight = torch.randn(50, requires_grad=True)

    def free() -> list[Tensor]:
        loss = (x[x.argsort()] * weight).where(mask, 0).masked_fill(mask, 1).sum()
        lengths = torch.repeat_interleave(x, torch.full((50,), 2), output_size=100)
        return [*torch.autograd.grad(loss, [weight]), lengths, torch.zeros(3).index_add_(0, torch.tensor([1]), x[:1])]

    assert measure.count_syncs(free, CPU) == 0
    in_backward = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * t[0].item())

    def waits_in_backward() -> list[Tensor]:
        with in_backward:
            loss = (weight * x).sum()
        return list(torch.autograd.grad(loss, [weight]))

    assert measure.count_syncs(waits_in_backward, CPU) == 1


def test_memory_is_what_a_call_needs_beside_what_it_returns_and_was_given():
    x, megabyte = torch.randn(250, 1000, requires_grad=True), 1_000_000
    with torch.no_grad():
        calls: dict[Callable[[], list[Tensor]], int] = {
            lambda: [x + 1]: 0,
            lambda: [(x.exp() + 1).sum()]: 2 * megabyte,
            lambda: [torch.cat([x, x]).T @ torch.ones(500, 10)]: 2 * megabyte + 500 * 10 * 4,
        }
        for number, (call, needed) in enumerate(calls.items()):
            assert measure.peak_bytes(call, CPU) == pytest.approx(needed, abs=200), number

    def backward() -> list[Tensor]:  # keeps two results of exp; then there are two gradients at a time, one returned
        return list(torch.autograd.grad(x.exp().exp().sum(), [x]))

    assert measure.peak_bytes(backward, CPU) == pytest.approx(3 * megabyte - megabyte, abs=200)


def test_results_that_were_there_before_are_no_part_of_the_peak():
    """A step that returns its weights needs its temporary memory; so does one that returns parts or the same twice."""
    x, megabyte = torch.randn(250, 1000), 1_000_000

    def step() -> list[Tensor]:
        return [(x.exp() + 1).sum(), x, x.detach(), x[:10]]

    def views() -> list[Tensor]:  # the whole of what is new remains
        fresh = x.exp() + 1
        return [fresh[:5], fresh.T, fresh]

    assert measure.peak_bytes(step, CPU) == pytest.approx(2 * megabyte, abs=200)
    assert measure.peak_bytes(views, CPU) == pytest.approx(megabyte, abs=200)


def test_no_stream_and_no_product_is_far_above_the_ceilings(monkeypatch):
    """By the rates of the best samples; of a call that takes no time there would be no ceiling."""
    clock = FakeClock(monkeypatch)
    seconds = {
        "copy": (2.0, 4.0),
        "change in place": (1.0, 2.0),
        "sum": (3.0, 3.0),
        "small": (1.0, 1.0),
        "large": (4.0, 4.0),
    }

    def probes(names: Sequence[str]) -> Callable[[torch.device], dict[str, Any]]:
        def of(name: str) -> measure._Probe:
            call = clock.contender(lambda number: seconds[name][number % 2]).prepare(torch.ones(1))
            return measure._Probe({"sum": 6.0, "large": 12.0}.get(name, 8.0), call)

        return lambda device: {name: of(name) for name in names}

    monkeypatch.setattr(measure, "_streams", probes(("copy", "change in place", "sum")))
    monkeypatch.setattr(measure, "_products", probes(("small", "large")))
    top = measure.ceilings(CPU, 1.0)
    assert top[:3] == (8.0, 8.0, 4.0)
    assert top.noisy == "change in place: its middle half spreads over 100% of its median; 25% is allowed"
    assert top.noisy in requirements.described(top, CPU)
    found = {"us": 1.0, "quartiles_us": [1, 1], "error_in_plain_errors": 0, "host_bound": 0, "share_of_ceiling": 1.5}
    shown = {"bytes": 8, "flops": 0, "contenders": {"ours": found}}
    assert "150.0% of the ceiling, ABOVE it" in requirements.describe("x", shown)
    assert "ABOVE" not in requirements.describe("x", {**shown, "contenders": {"ours": found | {"share_of_ceiling": 1}}})


def test_the_probes_do_the_work_that_they_are_counted_for():
    """Operations by PyTorch's counter; the streams go over 256 MB, each twice but for the sum."""
    with FlopCounterMode(display=False) as counter:
        probes = measure._products(CPU)
        for probe in probes.values():
            before = counter.get_total_flops()
            probe.run()
            assert counter.get_total_flops() - before == probe.work
    streams = measure._streams(CPU)
    assert streams["copy"].work == streams["change in place"].work == 2 * streams["sum"].work == 2**29
    for expected in (-(2**26), 2**26):  # every number is gone over
        streams["change in place"].run()
        assert streams["sum"].run()[0] == streams["copy"].run()[0].sum() == expected


def test_enough_copies_to_leave_the_cache(monkeypatch):
    monkeypatch.setattr(case_module, "l2_bytes", lambda device: 50_000_000)
    assert make_case().copies(CPU) == case_module.MAX_COPIES  # 40 bytes
    large = Case("large", lambda d: None, {}, lambda x: [], lambda x: [], bytes=90_000_000, flops=0)
    assert large.copies(CPU) == 3
    huge = Case("huge", lambda d: None, {}, lambda x: [], lambda x: [], bytes=10**9, flops=0, input_bytes=10**9)
    assert huge.copies(CPU) == 2  # the cache holds the end of one
    monkeypatch.setattr(case_module, "free_bytes", lambda device: 2.3e9)
    assert huge.copies(CPU) == 1


# ------------------------------------------------------------------------------------------------------ going on


@pytest.fixture
def results(tmp_path: Path) -> Callable[[], Results]:
    return lambda: Results(tmp_path, "NVIDIA H100 80GB HBM3", "sm_90")


def names(cases: Sequence[Case]) -> list[str]:
    return [case.name for case in cases]


def run(cases: Sequence[Case], results: Results, seconds_left: float = 1000) -> int:
    return run_cases(cases, results, CPU, CEILINGS, time.monotonic() + seconds_left, seconds=0)


def test_a_finished_case_is_not_run_again(results):
    cases = [make_case(name) for name in "ab"]
    assert run(cases[:1], results()) == 0
    assert names(results().left(cases)) == ["b"]
    assert run(cases, results()) == 0
    again = results()
    assert again.left(cases) == []
    assert again.path.name == "nvidia-h100-80gb-hbm3.json"
    assert again.content["versions"]["torch"] == torch.__version__
    assert again.content["cases"]["a"]["finished"]


def test_a_noisy_case_is_run_again_last_but_those_of_other_runs_are_not(results, monkeypatch):
    clock = FakeClock(monkeypatch)
    jumping = clock.contender(lambda call: 1 + 2 * (call % 2) if call < 40 else 1.0)
    steady = clock.contender(lambda call: 1.0)
    cases = [make_case(name, contenders={"ours": steady}) for name in "bc"]
    cases.insert(0, make_case("a", contenders={"ours": steady, "peer": jumping}))
    assert run(cases[:2], results()) == 0
    assert "noisy" in results().content["cases"]["a"]["contenders"]["peer"]
    assert names(results().left(cases)) == ["c", "a"]
    assert run(cases, results()) == 0
    found = results().content["cases"]["a"]
    assert found["finished"]
    assert "us" in found["contenders"]["peer"]
    assert results().left(cases) == []


def test_other_code_makes_a_case_stale(results):
    case = make_case()
    run([case], results())
    changed = results()
    changed.codes[case.file] = "other"
    assert changed.left([case]) == [case]
    assert requirements.finished(changed.content) == {}
    assert list(requirements.finished(results().content)) == ["a case"]
    assert changed.record(case)["contenders"] == {}


def test_other_code_of_one_file_leaves_the_others_cases(results):
    cases = [make_case("a", file="bench_gate"), make_case("b", file="bench_loss")]
    run(cases, results())
    changed = results()
    changed.codes["bench_gate"] = "other"
    assert names(changed.left(cases)) == ["a"]
    assert list(requirements.finished(changed.content)) == ["b"]
    assert run(cases, changed) == 0
    assert names(changed.left(cases)) == []


def test_records_from_before_files_were_told_apart_remain_and_are_older_than_those_that_name_one(results):
    old, older = ({**record("gate", {"ours": 1}), "code": code} for code in ("then", "before"))
    write_json(results().path, {"code": "then", "cases": {"a": old, "b": older}})
    assert list(requirements.finished(results().content)) == ["a"]
    assert run([make_case("c")], results()) == 0
    assert list(results().content["cases"]) == ["a", "b", "c"]
    assert list(requirements.finished(results().content)) == ["c"]
    assert names(results().left([make_case("a"), make_case("c")])) == ["a"]


def test_the_recorded_results_are_read():
    for file in (Path(__file__).parents[2] / "benchmarks/results").glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if "cases" not in content:
            continue
        assert requirements.finished(content), file
        assert all(name in requirements.summary(content) for name in requirements.finished(content))


def test_the_code_is_that_of_kernels_and_what_the_cases_import(tmp_path):
    (tmp_path / "kernels/aligngpt_kernels").mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    texts = dict.fromkeys(("measure", "shapes", "requirements", "bench_other", "conftest"), "")
    texts["bench_gate"] = "from benchmarks import bench_injection\nfrom benchmarks.case import Case"
    texts["bench_injection"] = "def later():\n    import benchmarks.lengths"
    texts["case"] = "from benchmarks.measure import Run\nfrom benchmarks.conftest import x"
    texts["lengths"] = "import json\nfrom benchmarks.bench_gate import x\nfrom json import loads"
    for name, text in texts.items():
        (tmp_path / f"benchmarks/{name}.py").write_text(text)
    (tmp_path / "kernels/aligngpt_kernels/gate.py").write_text("1")
    hashes = [code_hash(tmp_path, "bench_gate")]
    for name in ("bench_gate", "bench_injection", "case", "measure", "lengths"):
        with (tmp_path / f"benchmarks/{name}.py").open("a") as file:
            file.write("\n")
        hashes.append(code_hash(tmp_path, "bench_gate"))
    (tmp_path / "kernels/aligngpt_kernels/gate.py").write_text("2")
    hashes.append(code_hash(tmp_path, "bench_gate"))
    assert len(set(hashes)) == len(hashes)
    for name in ("requirements", "conftest", "bench_other"):
        (tmp_path / f"benchmarks/{name}.py").write_text("2")
    assert code_hash(tmp_path, "bench_gate") == hashes[-1]


def test_every_file_of_benchmarks_is_asked(monkeypatch, capsys):
    """Those that have no cases for a CPU, or whose package is missing, are named."""
    monkeypatch.setitem(sys.modules, "benchmarks.bench_gate", None)
    with pytest.raises(ModuleNotFoundError):
        all_cases(CPU)  # ours

    def import_module(name: str) -> Any:
        if name.endswith("bench_step"):
            raise ModuleNotFoundError(name="transformers")
        return SimpleNamespace(**({} if name.endswith("loss") else {"cpu_cases": lambda: [make_case(name)]}))

    monkeypatch.setattr(runner.importlib, "import_module", import_module)
    capsys.readouterr()
    cases = all_cases(CPU)
    files = {file.stem for file in Path(runner.__file__).parent.glob("bench_*.py")}
    assert {case.file for case in cases} == files - {"bench_step", "bench_loss"}
    assert all(case.name == f"benchmarks.{case.file}" for case in cases)
    said = capsys.readouterr().out
    assert "left out: bench_step, the package transformers is not installed" in said
    assert "left out: bench_loss has no cpu_cases" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="`make bench-gpu` does so")
def test_a_machine_without_a_gpu_is_recorded_by_its_own_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "all_cases", lambda device, full: [make_case("a"), make_case("b", file="bench_gate")])
    monkeypatch.setattr(runner, "ceilings", lambda device, seconds: CEILINGS)
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: None)  # this process's
    assert runner.work(tmp_path, "b", 1000, 0) == 0
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-") == file.stem
    assert content["capability"] == platform.machine()
    assert list(content["cases"]) == ["b"]
    assert content["cases"]["b"]["code"] == content["codes"]["bench_gate"] == code_hash(file="bench_gate")
    said = capsys.readouterr().out
    assert "multiplies float32 matrices" in said
    assert requirements.LINES[0].text not in said  # those are a GPU's


def test_it_stops_while_there_is_time_for_no_more_cases(results):
    cases = [make_case(name) for name in "ab"]
    assert run(cases, results(), seconds_left=runner.RESERVE_SECONDS - 1) == 2
    assert not results().path.exists() or not results().content["cases"]


def test_the_longest_case_is_remembered(results):
    first = results()
    first.content["longest_seconds"] = 150
    first.save()
    assert run([make_case()], results(), seconds_left=140) == 1
    assert run([make_case()], results(), seconds_left=160) == 0
    assert results().content["longest_seconds"] == 150


def test_a_time_keeps_the_ceilings_it_was_taken_under(results):
    first, second = make_case("a"), make_case("b")
    run([first], results())
    run_cases([first, second], results(), CPU, Ceilings(2e9, 2e9), time.monotonic() + 1000, seconds=0)
    records = results().content["cases"]
    assert [records[name]["ceilings"]["bytes_per_second"] for name in "ab"] == [1e9, 2e9]
    assert records["a"]["copies"] == 1
    assert "one copy of the inputs" in requirements.describe("a", records["a"])


def test_versions_are_of_all_that_times_depend_on():
    found = versions()
    for name in ("transformers", "numpy", "pillow"):
        assert found[name] == importlib.metadata.version(name)
    assert {"torch", "triton", "nvidia_dali_cuda130"} <= found.keys()


def test_results_do_not_make_the_tree_dirty(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    (tmp_path / "a.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    write_json(tmp_path / "benchmarks/results/gpu.json", {})
    assert len(commit(tmp_path)) == 40
    (tmp_path / "a.py").write_text("2")
    assert commit(tmp_path).endswith("+")
    assert commit(tmp_path / "a.py") == "unknown"


def test_a_case_that_ended_a_run_goes_last(results):
    cases = [make_case(name) for name in "abc"]
    first = results()
    first.record(cases[0])["contenders"]["peer"] = {"failed": ENDED}
    first.save()
    assert names(results().left(cases)) == ["b", "c", "a"]


def test_a_case_that_cannot_be_made_is_recorded_and_the_next_one_runs(results):
    broken = Case("broken", lambda device: 1 / 0, {}, lambda x: [], lambda x: [], bytes=1, flops=1)
    now = results()
    assert run([broken, make_case()], now) == 0
    assert now.content["cases"]["broken"]["failed"].startswith("ZeroDivisionError")
    assert "us" in now.content["cases"]["a case"]["contenders"]["ours"]


def test_a_case_whose_process_always_ends_is_given_up(results):
    now, case = results(), make_case()
    now.record(case)["tries"] = len(case.contenders) + 2
    assert run([case], now) == 0
    assert now.content["cases"]["a case"]["failed"] == "its process ended 3 times"


def test_a_case_whose_inputs_do_not_fit_is_skipped(results, monkeypatch):
    monkeypatch.setattr(runner, "free_bytes", lambda device: 10e9)
    now = results()
    run([make_case(input_bytes=9_000_000_000)], now)
    assert now.content["cases"]["a case"]["skipped"] == "its inputs need 10.8 GB; 10.0 GB are free"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "sub/x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(file.parent.iterdir()) == [file]


def test_a_lost_process_is_followed_by_a_new_one(tmp_path):
    script = f"""
import os, pathlib, signal, sys
runs = pathlib.Path({str(tmp_path / "runs")!r})
runs.write_text((runs.read_text() if runs.exists() else "") + sys.argv[-1] + "\\n")
number = len(runs.read_text().splitlines())
if number == 1: os.kill(os.getpid(), signal.SIGSEGV)
sys.exit({runner.LOST} if number == 2 else {runner.NOT_FINISHED})
"""
    assert supervise([sys.executable, "-c", script], 100, tmp_path) == runner.NOT_FINISHED
    seconds = [float(line) for line in (tmp_path / "runs").read_text().splitlines()]
    assert len(seconds) == 3
    assert 100 >= seconds[0] > seconds[1] > seconds[2]


def test_who_runs_when_the_time_is_over_gets_a_second_try(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "RESERVE_SECONDS", 0)
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.1)
    file = tmp_path / "gpu.json"
    ended = {"failed": ENDED}
    write_json(file, {"cases": {"a": {"code": "x", "tries": 1, "contenders": {"crashed": ended}}}})
    script = f"""
import json, pathlib, time
file = pathlib.Path({str(file)!r})
content = json.loads(file.read_text())
content["cases"]["a"]["contenders"]["slow"] = {ended!r}
file.write_text(json.dumps(content))
time.sleep(60)
"""
    left = []
    for _ in range(2):
        assert supervise([sys.executable, "-c", script], 2, tmp_path) == runner.NOT_FINISHED
        left.append(json.loads(file.read_text())["cases"]["a"]["contenders"])
    assert left == [{"crashed": ended}, {"crashed": ended, "slow": ended}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("target", ["bench-gpu", "test-gpu"])
def test_without_a_gpu_one_sentence_says_so(target: str):
    root = Path(__file__).parents[2]
    command = ["make", "--silent", target, f"PYTHON={sys.executable}"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode != 0
    sentence = result.stderr.splitlines()[0]
    assert sentence.startswith(f"make {target} needs a CUDA device: torch {torch.__version__} of ")
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------------ what it says


def record(group: str, microseconds: dict[str, float], **more: Any) -> dict[str, Any]:
    about = {"quartiles_us": [1, 3], "error_in_plain_errors": 1, "host_bound": 0}
    contenders = {name: {"us": us, **about} for name, us in microseconds.items()}
    empty = {"group": group, "bytes": 1, "flops": 1, "finished": True, "dispatch": None, "code": "now"}
    empty["ceilings"] = {"bytes_per_second": 3e12}
    return {**empty, "contenders": contenders, **more}


def stand(text: str, cases: dict[str, Any]) -> requirements.Standing:
    (line,) = (line for line in requirements.LINES if line.text == text)
    content = {"code": "now", "cases": cases}
    return requirements.standing(line, requirements.finished(content))


def test_a_requirement_is_held_to_its_worst_case():
    text = "projector forward, M >= 4608, vs eager"
    cases = {
        "projector forward M=1152": record("projector forward", {"ours": 100, "eager": 50}),
        "projector forward M=4608": record("projector forward", {"ours": 100, "eager": 109}),
        "projector forward M=9216": record("projector forward", {"ours": 100, "eager": 106}),
    }
    found = stand(text, cases)
    assert (found.value, found.case, found.verdict) == (1.06, "projector forward M=9216", "met")
    cases["projector forward M=9216"]["contenders"]["ours"]["us"] = 90
    assert stand(text, cases).verdict == "aim met"
    cases["projector forward M=9216"]["contenders"]["ours"]["us"] = 106
    assert stand(text, cases).verdict == "not met"
    cases["projector forward M=9216"]["code"] = "before"
    assert stand(text, cases).value == 1.09
    cases["projector forward M=4608"]["finished"] = False
    assert stand(text, cases).verdict == "unmeasured"


def test_what_is_missing_is_unmeasured_and_what_is_wrong_is_not_met():
    text = "loss V 32000 vs Liger"
    found = stand(text, {"loss": record("loss V=32000", {"ours": 1})})
    assert (found.verdict, found.value) == ("unmeasured", None)
    cases = {"loss": record("loss V=32000", {"Liger": 1})}
    cases["loss"]["contenders"]["ours"] = {"wrong": "result 0 is off"}
    assert stand(text, cases).verdict == "not met"
    assert "result 0 is off" in stand(text, cases).case
    assert stand(text, {}).verdict == "unmeasured"


def test_shares_and_at_most():
    found = stand(
        "decode, cache >= 250 MB: share of copy bandwidth",
        {
            "decode B=16": record("decode", {"ours": 100}, bytes=270e6),
            "decode B=1": record("decode", {"ours": 100}, bytes=1e6),
            "decode too large": record("decode", {}, bytes=1e12, skipped="no room"),
        },
    )
    assert found.value == pytest.approx(0.9)
    cases = {"injection forward, equal": record("injection forward", {})}
    for waits, verdict in ((0, "met"), (1, "not met")):
        cases["injection forward, equal"]["contenders"]["ours"] = {"syncs": waits}
        assert stand("injection: syncs", cases).verdict == verdict


def test_every_requirement_has_its_cases_and_contenders():
    """With a result for every contender of every case, each line has a value; no two cases share a name."""
    numbers = {"us": 2.0, "wall_us": 2.0, "syncs": 0, "peak_bytes": 2, "quartiles_us": [1.0, 3.0], "host_bound": 0}
    numbers["error_in_plain_errors"] = 0.5
    numbers |= {"mfu": 0.5, "flops": 1e12, "layers": 2, "tokens": 100, "images": 1, "planned_bytes": 2}
    numbers |= {"first_tokens_ms": 1.0, "ms_per_token": 2.0, "new_tokens": 3, "new_tokens_per_second": 500.0}
    numbers |= {"answers_per_second": 4.0, "first_call_seconds": 5.0, "syncs_per_token": 0.0}
    cases = all_cases()
    records = {
        case.name: {
            "group": case.group, "bytes": case.bytes, "flops": case.flops, "finished": True, "dispatch": case.dispatch,
            "code": "now", "ceilings": CEILINGS._asdict(),
            "contenders": {name: dict(numbers) for name in case.contenders},
        }
        for case in cases
    }  # fmt: skip
    assert len(records) == len(cases)
    content = {"code": "now", "cases": records}
    for line in requirements.LINES:
        assert requirements.standing(line, requirements.finished(content)).value is not None, line.text
    text = requirements.summary(content)
    assert all(line.text in text for line in requirements.LINES)
    assert "2.0 µs (1.0 to 3.0)" in text
    keys = dispatch.ratios(content)
    assert set(keys) == {f"{op} {bucket}".strip() for op, buckets in OPS.items() for bucket in buckets}
    assert set(keys.values()) == {1.0}


# ------------------------------------------------------------------------------------------------------ dispatch


def dispatched(ours: dict[str, Any], other: dict[str, Any], key: str = "inject") -> dict[str, Any]:
    contenders = {"ours": ours, "reference": other, "slower": {"us": 1e6}, "wrong": {"wrong": "result 0"}}
    if "us" not in other:
        del contenders["slower"]
    return record("x", {}, dispatch=[key, "ours", ["slower", "reference", "wrong"]]) | {"contenders": contenders}


def test_the_dispatch_table_holds_the_worst_ratio_rounded_down(tmp_path, monkeypatch, capsys):
    cases = {
        "a": dispatched({"us": 100}, {"us": 250}),
        "b": dispatched({"us": 100}, {"us": 99.9}),
        "the other had no memory": dispatched({"us": 100}, {"failed": "out of memory"}),
        "ours is not there": dispatched({"absent": "no TMA"}, {"us": 1}),
        "wrong": dispatched({"wrong": "result 0"}, {"us": 1}, "flash_decode"),
        "unfinished": dispatched({"us": 1}, {"us": 0.1}) | {"finished": False},
        "stale": dispatched({"us": 1}, {"us": 0.1}) | {"code": "before"},
    }
    assert dispatch.ratios({"code": "now", "cases": cases}) == {"inject": 0.99, "flash_decode": 0.0}

    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps({"sm_90": {"inject": 2.0, "align_gate": 1.5}, "sm_80": {"inject": 3.0}}))
    for name, ours in (("h100", 50), ("h200", 40)):
        content = {"capability": "sm_90", "code": "now", "cases": {"a": dispatched({"us": ours}, {"us": 100})}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [str(tmp_path / f"{name}.json") for name in ("h100", "h200")]
    monkeypatch.setattr(sys, "argv", ["dispatch", *files, "--measured", str(measured)])
    dispatch.main()
    table = {"sm_80": {"inject": 3.0}, "sm_90": {"align_gate": 1.5, "inject": 2.0}}
    assert json.loads(measured.read_text()) == json.loads(capsys.readouterr().out) == table
