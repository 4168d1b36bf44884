"""The benchmark of a training step, on models of a few thousand weights: everybody is right, and what is recorded."""

import json
from pathlib import Path

import pytest
import torch

from aligngpt.text import Tokenized
from benchmarks import bench_step, lengths, requirements
from benchmarks.bench_step import (
    STAGES,
    Size,
    layers_that_fit,
    leave_world,
    lengths_case,
    make_shaped,
    plain_case,
    planned_bytes,
    shaped_case,
)
from benchmarks.case import run_case
from benchmarks.measure import Ceilings
from benchmarks.results import Results
from benchmarks.run import run_cases

CPU = torch.device("cpu")
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MICRO = Size(
    scale=36,
    vocabulary=64,
    width=32,
    mlp=64,
    layers=2,
    heads=2,
    tower=TOWER,
    global_batch=8,
    samples=20,  # the last global batch is smaller
    per_device=3,
    token_budget=112,
    patch=8,
)


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
    for name, found in run_case(case, CPU, seconds=0).items():
        assert "us" in found, (name, found)


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
    assert set(found["stages_ms"]) == set(STAGES)
    assert all(ms > 0 for stage, ms in found["stages_ms"].items() if stage != "data wait")
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
