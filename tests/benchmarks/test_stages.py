"""The table of a step by stage: what is measured goes to the stage that did it, nothing is lost or counted twice."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama import modeling_llama

from aligngpt.stages import stage
from benchmarks import bench_checkpoint, bench_llm, bench_optimizer, bench_tower
from benchmarks.bench_step import leave_world
from benchmarks.case import Absent, Case, check
from benchmarks.stages import TABLE, UNMARKED, StageWork, measure, peaks, waits
from benchmarks.work import per_row

CPU = torch.device("cpu")
KILOBYTE = 1024


@pytest.fixture(scope="module", autouse=True)
def _world():
    yield
    leave_world()


def made(kilobytes: int) -> torch.Tensor:
    return torch.zeros(kilobytes * KILOBYTE, dtype=torch.uint8)


@pytest.fixture
def by_hand(monkeypatch):
    """A clock that a step moves on by itself, in seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    return spend


def test_times_go_to_their_stages_and_add_up(by_hand):
    counted = iter(range(100))

    def step() -> None:
        by_hand(1)
        with stage("outer"):
            by_hand(2)
            with stage("inner"):
                by_hand(4)
            by_hand(8 + next(counted) % 2)  # steps differ
        with stage("other"):
            by_hand(16)
        with stage("inner"):
            by_hand(32)

    work = {"other": StageWork(1, "things", 2, 3), "outer": StageWork(4, "things", 5, 6)}
    found = measure(step, CPU, work, rounds=3, before=lambda: by_hand(1000))
    outer, other = found["stages"][1], found["stages"][0]
    assert (other["stage"], other["us"], other["items"], other["unit"]) == ("other", 16e6, 1, "things")
    assert (other["bytes"], other["flops"]) == (2, 3)
    assert outer["us"] in (10e6, 11e6)
    assert found["rest"] == {"inner": 36e6, "unmarked": 1e6}
    assert found["whole_us"] - 53e6 in (10e6, 11e6)
    assert found["whole_quartiles_us"][0] <= found["whole_us"] <= found["whole_quartiles_us"][1]
    assert "whole_noisy" not in found


def test_a_whole_whose_steps_differ_too_much_says_so(by_hand, monkeypatch):
    monkeypatch.setattr("benchmarks.measure.NOISY", 0.25)
    counted = iter([1, 1, 1, 2, 1, 3, 1, 1, 1])  # one first, then without marks and with, in turns

    def step() -> None:
        by_hand(next(counted))

    assert measure(step, CPU, {}, rounds=3)["whole_noisy"].startswith("its 3 samples spread over 100% of its median")


def test_a_stage_that_did_not_run_is_refused():
    with pytest.raises(ValueError, match=r"work has \['gate'\]; it needs stages that the step runs"):
        measure(lambda: None, CPU, {"gate": StageWork(1, "samples", 1, 1)}, rounds=1)


def test_peaks_and_waits_go_to_their_stages():
    kept = []

    def step() -> None:
        kept.append(made(1))
        with stage("outer"):
            kept.append(made(10))
            with stage("inner"):
                first = made(100)
                del first
                second = made(50)
                second[0].item()
                del second
            third = made(30)
            third.nonzero()
            del third
        kept[0].view(2, 512).add_(1)[0, 0].item()  # neither a view nor what is done in place is new memory
        with stage("inner"):
            made(70)

    # Inner's first peak is outer's too, which holds 10 by then; what outer kept is no part of inner's second one.
    assert {name: peak // KILOBYTE for name, peak in peaks(step, CPU).items()} == {
        "inner": 100,
        "outer": 110,
        UNMARKED: 111,
    }
    assert waits(step, CPU) == {UNMARKED: 1, "outer": 1, "inner": 1}


def test_gradients_are_seen_in_the_stage_of_the_backward_pass():
    weight = torch.ones(256, 256, requires_grad=True)

    def step() -> None:
        with stage("forward"):
            loss = (weight * weight).sum()
        with stage("backward"):
            loss.backward()

    found = peaks(step, CPU)
    assert found["forward"] >= weight.nbytes
    assert found["backward"] >= weight.nbytes


# ------------------------------------------------------------------------------------------------ stages by themselves


@pytest.mark.parametrize(
    "case",
    [case for file in (bench_tower, bench_llm, bench_optimizer, bench_checkpoint) for case in file.small_cases()],
    ids=lambda case: case.name,
)
def test_everyone_who_contends_for_a_stage_is_right(case: Case):
    inputs = case.make(CPU)
    exact, plain = case.exact(inputs), case.plain(inputs)
    right = []
    for name, contender in case.contenders.items():
        try:
            run = None if contender.gpu_only else contender.prepare(inputs)
        except Absent:
            continue
        if run is not None:
            assert "wrong" not in (found := check(case, name, inputs, run, plain, exact)), (name, found)
            right.append(name)
    assert right[0] == "ours"
    assert len(right) >= 3
    assert case.stage in TABLE


def test_work_of_tower_and_llm_is_that_of_the_step():
    """What the files of the stages state is what the step's table says of the same shapes."""
    (case,) = bench_tower.small_cases()
    model = case.make(CPU).model
    images = int(case.items)
    rows = model.config.image_seq_length
    tower = per_row(model.model.vision_tower, torch.nn.Linear) * images * (rows + 1)
    assert case.flops == 2 * (tower + per_row(model.model.vision_tower, torch.nn.Conv2d) * images * rows)
    forward, both = bench_llm.small_cases()
    llm = forward.make(CPU)
    assert sum(llm.lengths) == forward.items == both.items
    assert 3 * forward.flops == both.flops == 6 * forward.items * per_row(llm.model, torch.nn.Linear)


def test_what_liger_replaces_is_replaced_for_its_calls_alone(monkeypatch):
    before = modeling_llama.apply_rotary_pos_emb
    calls = []

    def theirs(*args, **kwargs):
        calls.append(args)
        return before(*args, **kwargs)

    def apply_liger_kernel_to_llama(*, rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu, model):
        modeling_llama.apply_rotary_pos_emb = theirs

    module = SimpleNamespace(apply_liger_kernel_to_llama=apply_liger_kernel_to_llama)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=module))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    (_, case) = bench_llm.small_cases()
    inputs = case.make(CPU)
    exact, plain = case.exact(inputs), case.plain(inputs)
    name = "padded, SDPA, Liger"
    found = check(case, name, inputs, case.contenders[name].prepare(inputs), plain, exact)
    assert "wrong" not in found
    assert len(calls) == bench_llm.SMALL.layers
    check(case, "ours", inputs, case.contenders["ours"].prepare(inputs), plain, exact)
    assert len(calls) == bench_llm.SMALL.layers
    assert modeling_llama.apply_rotary_pos_emb is before
