"""Sweeps: exponents are found again, what grows too fast is said, points are right, and no process is left behind."""

import gc
import math
import multiprocessing
import os
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import bench_scaling
from benchmarks.bench_step import leave_world, world_of_one
from benchmarks.case import check
from benchmarks.fit import AS_IT_MUST, FASTER, NOISY, UNLIMITED, judge, sweeps
from benchmarks.worlds import Group

CPU = torch.device("cpu")
DECADES = [1e3, 1e4, 1e5, 1e6]
DOUBLED = [4, 8, 16, 32, 64]


@pytest.fixture(scope="module", autouse=True)
def _world():
    gc.freeze()  # each case collects garbage
    yield
    gc.unfreeze()
    bench_scaling.close_groups()
    leave_world()


def content(xs, cost, *, at_most, noise=0.0, field="us"):
    """A results file in which cost(x) is measured, each time off by as much noise."""
    random, cases = np.random.default_rng(1), {}
    for x in xs:
        value = cost(x) * math.exp(random.normal(0, noise))
        quartiles = [value * math.exp(-noise), value * math.exp(noise)]
        name = "quartiles_us" if field == "us" else f"quartiles_{field}"
        ours = {field: value, name: quartiles, "rounds": 9, "grows": {field: [at_most, "because"]}}
        cases[f"scaling: work, {x}"] = {"sweep": ["things", x], "contenders": {"ours": ours}}
    return {"cases": cases}


@pytest.mark.parametrize("xs", [DOUBLED, DECADES], ids=["doubled", "decades"])
@pytest.mark.parametrize("exponent", [0, 1, 1.5, 2])
@pytest.mark.parametrize("fixed", [0.0, 3.0], ids=["nothing fixed", "fixed"])  # times the part that grows, at the start
@pytest.mark.parametrize("noise", [0.0, 0.03], ids=["exact", "noise"])
def test_an_exponent_is_found_again(xs, exponent, fixed, noise):
    start = xs[0] ** exponent
    found = content(xs, lambda x: 1e6 * (fixed * start + x**exponent), at_most=exponent, noise=noise)
    (sweep,) = sweeps(found)
    assert sweep.low <= sweep.exponent <= sweep.high
    assert abs(sweep.exponent - exponent) <= (0.3 if noise else 0.06)
    assert sweep.low - 0.05 <= exponent <= sweep.high + 0.05
    assert sweep.verdict == AS_IT_MUST
    assert sweep.what == "things"
    assert sweep.prefix == "scaling: work"
    assert sweep.unit == "s"
    if not noise:
        assert [point.seconds for point in sweep.points] == pytest.approx([fixed * start + x**exponent for x in xs])
        if exponent:
            assert sweep.fixed == pytest.approx(fixed * start, rel=0.1, abs=0.02 * start)


@pytest.mark.parametrize(("at_most", "exponent"), [(1, 2), (0, 1), (2, 3)])
def test_what_grows_too_fast_is_said(at_most, exponent):
    """Even where most of the cost is fixed, at first."""
    found = content(DECADES, lambda x: 30 * 1e3**exponent + x**exponent, at_most=at_most, noise=0.03)
    assert [sweep.verdict for sweep in sweeps(found)] == [FASTER]
    other = content(DOUBLED, lambda x: x**exponent, at_most=at_most, noise=0.03, field="resident_bytes")
    assert [(sweep.unit, sweep.verdict) for sweep in sweeps(other)] == [("bytes resident", FASTER)]


@pytest.mark.parametrize(
    ("exponent", "low", "high", "verdict"),
    [
        (1.1, 1.0, 1.2, AS_IT_MUST),
        (1.3, 1.2, 1.4, FASTER),
        (1.3, 1.1, 1.5, NOISY),  # the estimate lies above what is allowed, the interval not wholly
        (1.1, 0.9, 1.3, AS_IT_MUST),
        (1.1, 0.5, 1.7, NOISY),
        (1.9, 1.2, 2.4, NOISY),
    ],
)
def test_a_sweep_is_judged_by_exponent_and_interval(exponent, low, high, verdict):
    assert judge(exponent, low, high, 1) == verdict
    assert judge(exponent, low, high, math.nan) == UNLIMITED


def test_points_without_a_number_are_named():
    found = content(DOUBLED, lambda x: x, at_most=1)
    names = list(found["cases"])
    ours = [found["cases"][name]["contenders"]["ours"] for name in names]
    del ours[1]["us"]
    ours[1]["noisy"] = "quartiles are 40 % apart"
    found["cases"][names[3]]["contenders"] = {"ours": {"failed": "OutOfMemoryError"}}
    found["cases"]["loss"] = {"sweep": None, "contenders": {"ours": {"us": 1.0}}}
    (sweep,) = sweeps(found)
    assert sweep.left_out == {names[1]: "quartiles are 40 % apart", names[3]: "OutOfMemoryError"}
    assert [point.x for point in sweep.points] == [4, 16, 64]
    assert sweep.exponent == pytest.approx(1)
    for name in names[1:]:
        found["cases"][name]["contenders"] = {}
    (sweep,) = sweeps(found)
    assert (sweep.verdict, len(sweep.points), len(sweep.left_out)) == (NOISY, 1, 4)
    assert math.isnan(sweep.exponent)
    (sweep,) = sweeps(content(DOUBLED, lambda x: x, at_most=1, noise=3.0))
    assert sweep.verdict == NOISY
    for name in names:
        found["cases"][name]["contenders"]["ours"] = {"grows": {"us": [1, ""]}, "noisy": "very"}
    (sweep,) = sweeps(found)
    assert (sweep.verdict, len(sweep.points), len(sweep.left_out)) == (NOISY, 0, 5)
    assert sweeps({"cases": {}}) == []
    for name in names:
        del found["cases"][name]["contenders"]["ours"]["grows"]
    assert [sweep.verdict for sweep in sweeps(found)] == [NOISY]
    for place, name in enumerate(names):
        found["cases"][name]["contenders"]["ours"] = {"us": 2.0**place}
    assert [(round(sweep.exponent, 3), sweep.verdict) for sweep in sweeps(found)] == [(1, UNLIMITED)]


def one_of_each():
    """Of the small cases, one of each sweep, the last: the others are of another size."""
    return list({case.name.rpartition(", ")[0]: case for case in bench_scaling.small_cases()}.values())


@pytest.mark.parametrize("case", one_of_each(), ids=lambda case: case.name)
def test_each_point_is_right_before_it_is_timed(case):
    inputs = case.make(CPU)
    ((name, contender),) = case.contenders.items()
    run = contender.prepare(inputs)
    found = check(case, name, inputs, run, case.plain(inputs), case.exact(inputs))
    assert "wrong" not in found, found
    if case.sweep[0] == "processes":  # the first step is not counted
        run()
        run()
    found = contender.details(run, inputs, 1.0)
    grows = found["grows"]
    assert all(field == "us" or found[field] > 0 for field in grows)


def test_all_sweeps_have_points():
    for cases in (bench_scaling.cases(), bench_scaling.cpu_cases()):
        points = Counter(case.name.rpartition(", ")[0] for case in cases)
        assert min(count for name, count in points.items() if "processes" not in name) >= 4, points
        assert len({case.name for case in cases}) == len(cases)


# ---- processes


class Behaves:
    """Work that does something in process 1, while process 0 waits for it, if it dies, in a collective of gloo."""

    def __init__(self, what):
        self.what = what

    def __call__(self):
        if self.what == "die":
            world_of_one()
        return self.work

    def work(self):
        if os.environ["RANK"] == "1" and self.what == "die":
            os._exit(7)
        if os.environ["RANK"] == "1" and self.what == "raise":
            raise ValueError("the answer is 42")
        if self.what == "die":
            torch.distributed.barrier()
        threading.Event().wait()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("die", "process 1 of 2 ended with status 7; it was to do its work"),
        ("raise", "process 1 of 2 failed(.|\n)*the answer is 42"),
        ("wait", "process 0, 1 of 2 had 0.1 s to do its work"),
    ],
)
def test_a_group_ends_with_its_first_process(what, sentence):
    before = set(multiprocessing.active_children())
    group = Group(2, Behaves(what))
    group.timeout = 0.1 if what == "wait" else 60
    processes = [one.process for one in group._processes]
    assert len(set(multiprocessing.active_children()) - before) == 2
    with pytest.raises(RuntimeError, match=sentence):
        group()
    assert set(multiprocessing.active_children()) <= before
    assert not group.is_open
    with pytest.raises(RuntimeError, match="the group is closed"):
        group()
    for process in processes:
        with pytest.raises(ValueError, match="closed"):
            process.is_alive()
