"""The benchmark of a training step, on models of a few thousand weights: everybody is right, and what is recorded."""

import json
from pathlib import Path

import pytest
import torch

from aligngpt.stages import OF_TRAINING
from aligngpt.text import Tokenized
from benchmarks import bench_step, lengths, requirements
from benchmarks.bench_step import (
    MICRO,
    STEPS,
    layers_that_fit,
    leave_world,
    lengths_case,
    make_shaped,
    plain_case,
    planned_bytes,
    shaped_case,
    stages_case,
)
from benchmarks.case import check
from benchmarks.measure import Ceilings
from benchmarks.results import Results
from benchmarks.run import run_cases
from benchmarks.work import of_training
from training.flops import count_flops

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _world():
    yield
    leave_world()


def texts(num_samples: int, scale: int) -> list[Tokenized]:
    reader = lengths.processor(1000, scale=scale, image_size=16, template="chat")
    return [reader.text(sample) for sample in lengths.conversations(num_samples, vocabulary=1000, scale=scale)]


def test_samples_are_as_long_as_those_of_the_665k():
    samples = lengths.conversations(664, vocabulary=1000)
    assert sum(not sample.images for sample in samples) == 40
    assert samples == lengths.conversations(664, vocabulary=1000)
    large, small = texts(300, 1), texts(300, 9)
    for scale, found in ((1, large), (9, small)):
        tokens = torch.tensor([len(text.input_ids) for text in found])
        assert tokens.max() == 2048 // scale
        assert 0.38 < tokens.float().mean() / tokens.max() < 0.46
        assert 0.12 < sum(text.num_supervised for text in found) / tokens.sum() < 0.22


@pytest.mark.parametrize(
    "case",
    [
        lengths_case(MICRO, torch.float32),
        plain_case(MICRO, "pretrain", torch.float32),
        plain_case(MICRO, "finetune", torch.float32),
    ],
    ids=lambda case: case.name,
)
def test_all_contenders_do_the_same(case):
    """The benchmark holds them to the plain loop's loss and weights, or to the loss of samples one by one."""
    inputs = case.make(CPU)
    exact, plain = case.exact(inputs), case.plain(inputs)
    for name, contender in case.contenders.items():
        found = check(case, name, inputs, contender.prepare(inputs), plain, exact)
        assert "wrong" not in found, (name, found)


def test_a_peer_of_another_loss_is_named(monkeypatch: pytest.MonkeyPatch):
    """Also where all else is held to that peer."""
    right = bench_step.plain_step

    def off(*args, **kwargs):
        loss, norm = right(*args, **kwargs)
        return torch.stack([1.001 * loss, norm])

    monkeypatch.setattr(bench_step, "plain_step", off)
    case = plain_case(MICRO, "finetune", torch.float32)
    inputs = case.make(CPU)
    exact, plain = case.exact(inputs), case.plain(inputs)
    found = {
        name: check(case, name, inputs, contender.prepare(inputs), plain, exact)
        for name, contender in case.contenders.items()
    }
    assert "wrong" not in found["ours"]
    assert "result 0 is off" in found["plain loop"]["wrong"]


def test_a_results_file_has_share_and_stages(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench_step, "peak_tflops", lambda device: 1e-6)
    case = shaped_case(MICRO, "finetune", torch.float32, "none")
    results = Results(tmp_path, "a CPU", "sm_90")
    assert run_cases([case], results, CPU, Ceilings(1e9, 1e9), float("inf"), seconds=0) == 0
    content = json.loads(results.path.read_text())
    (record,) = content["cases"].values()
    found = record["contenders"]["ours"]
    assert found["mfu"] == pytest.approx(found["flops"] / (found["us"] * 1e-6) / 1e6, abs=1e-4)
    assert found["tokens"] <= MICRO.token_budget
    assert [row["stage"] for row in found["stages"]] == [
        name for name in OF_TRAINING if name not in ("data wait", "batch to device", "gradient norm", "checkpoint")
    ]
    assert set(found["rest"]) == {"batch to device", "gradient norm", "unmarked"}
    assert "step at 7B shapes, finetune: MFU" in requirements.summary(content)
    other = json.loads(json.dumps(content)) | {"training_code": "other"}
    assert requirements.finished(content)
    assert not requirements.finished(other), "training changed since"


def test_layers_are_as_many_as_fit():
    shaped = make_shaped(CPU, MICRO, "finetune", torch.float32, "full")
    many = MICRO._replace(layers=12)

    def needed(layers: int) -> int:
        return planned_bytes(many._replace(layers=layers), shaped.config, shaped.step)

    for room, layers in ((needed(5), 5), (needed(5) - 1, 4), (needed(12), 12), (10**12, 12), (0, 1)):
        assert layers_that_fit(many, shaped.config, shaped.step, room) == layers


@pytest.mark.parametrize("stage", STEPS)
def test_stages_in_place_do_what_count_flops_counts(stage):
    """FLOPs of the stages are training's own, which leave out gate and optimizer and count a gradient to the tower that
    nobody wants; every stage of training is marked."""
    case = stages_case(MICRO, stage, torch.float32, workers=0)
    inputs = case.make(CPU)
    run = case.contenders["ours"].prepare(inputs)
    step = bench_step.step_of(next(run.loader))
    counted = count_flops(run.model).of(
        tokens=step.tokens, supervised_tokens=step.supervised_tokens, images=step.images
    )
    rows = step.images * run.model.config.image_seq_length
    to_tower = 2 * rows * run.model.model.multi_modal_projector.linear_1.weight.numel()
    for fused_loss in (False, True):
        work = of_training(run.model, step.batches, compute_bytes=4, fused_loss=fused_loss)
        assert sum(of.flops for name, of in work.items() if name not in ("gate", "optimizer")) == counted - to_tower
    assert work["loss"].flops > of_training(run.model, step.batches, compute_bytes=4, fused_loss=False)["loss"].flops

    found = run.details(inputs, 1.0)
    rows = {row["stage"]: row for row in found["stages"]}
    assert [*rows, *found["rest"]] == [
        *(name for name in OF_TRAINING if name in rows),
        "data wait",
        "batch to device",
        "gradient norm",
        "unmarked",
    ]
    assert set(OF_TRAINING) == {*rows, *found["rest"]} - {"unmarked"}
    assert all(row["us"] > 0 and row["items"] > 0 and row["bytes"] > 0 for row in rows.values())
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    saved = sum(path.stat().st_size for path in inputs.folder.path.glob("checkpoints/*/*.distcp"))
    assert trained * 12 < rows["checkpoint"]["items"] <= saved
    # What the LLM keeps for the backward pass is at least its layers' inputs, and the backward pass lets it go.
    assert rows["LLM forward"]["peak_bytes"] > MICRO.layers * 4 * MICRO.width * max(b.num_tokens for b in step.batches)
