"""What is predicted of a cluster: bytes as torch.distributed is asked to move them, seconds by hand, refusals."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, LlamaConfig

from aligngpt.config import AlignGPTConfig
from aligngpt.data.llava_json import Sample
from training import calibrate, cluster, forecast, lora, plan, sharding
from training.cluster import Collective, Cost, Network, Unit, Work
from training.config import LoraConfig, OptimConfig, ShardingConfig, TrainedPart, tiny
from training.plan import Lengths

STAGE_1: tuple[TrainedPart, ...] = ("projector", "table")
STAGE_2: tuple[TrainedPart, ...] = ("llm", "projector", "gate")
CALLS = {
    "c10d::_allgather_base_": ("all-gather", 0),  # which of its tensors is the whole
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
}


@pytest.fixture
def no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Called(TorchDispatchMode):
    """Counts collectives by kind and bytes of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, place = CALLS[func.name()]
            self.seen[kind, [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)][place].nbytes] += 1
        return func(*args, **(kwargs or {}))


def small(**other: Any) -> AlignGPTConfig:
    llm: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    return AlignGPTConfig.from_parts(
        LlamaConfig(**llm, vocab_size=321, **other),
        CLIPVisionConfig(**tower, num_attention_heads=2, image_size=28, patch_size=14),
    )


@pytest.mark.parametrize(
    ("train", "processes", "shards", "gather", "adapters", "compute", "tied"),
    [
        (STAGE_1, 5, 0, "layer", 0, torch.bfloat16, False),  # five divides nothing; frozen layers are gathered alone
        (STAGE_2, 2, 0, "layer", 0, torch.float32, True),
        (STAGE_2, 8, 4, "layer", 0, torch.bfloat16, False),  # two copies: summed over them in the last micro-batch
        (STAGE_2, 6, 3, "step", 0, torch.bfloat16, False),
        (STAGE_2, 2, 1, "layer", 0, torch.float32, False),  # each a copy: nothing is cut
        (STAGE_2, 3, 0, "step", 2, torch.bfloat16, False),
        (STAGE_2, 1, 0, "layer", 0, torch.float32, False),
    ],
)
def test_what_moves_in_a_step_is_counted_to_the_byte(
    no_group: None,
    train: tuple[TrainedPart, ...],
    processes: int,
    shards: int,
    gather: Any,
    adapters: int,
    compute: torch.dtype,
    tied: bool,
) -> None:
    """A process among others whose collectives do nothing is asked for them all the same."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    device = torch.device("cpu")
    world = sharding.World(0, processes, device, sharding.make_mesh(device, processes, shards))
    config, micro_batches = ShardingConfig(size=shards, gather=gather), 3
    model = sharding.build(small(tie_word_embeddings=tied))
    sharding.freeze(model, train)
    stored: dict[str, Any] = {
        name: calibrate.DrawnWeight(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()
    }
    if adapters:
        stored = lora.add(model, stored, LoraConfig(rank=adapters), seed=0)
    weights = plan.weights_of(model)
    sharding.shard(model, world.mesh, config, compute_dtype=compute)
    sharding.fill(model, stored, world, compute_dtype=compute, source="test")
    sharding.prepare_layers(model, config)
    ids = torch.arange(3, 20)[None]
    for _ in range(2):  # the first step is as the others
        called = Called()
        with called:
            for number in range(micro_batches):
                sharding.before_micro_batch(model, config, last=number == micro_batches - 1)
                model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss.backward()
        moved = cluster.traffic(
            weights, processes=processes, compute_bytes=compute.itemsize, micro_batches=micro_batches, config=config
        )
        counted: Counter[tuple[str, int]] = Counter()
        for collective, times in moved.counted().items():
            counted[collective.kind, collective.bytes] += times
        assert counted == called.seen
    assert bool(counted) == (processes > 1)


def test_what_crosses_from_machine_to_machine() -> None:
    """By hand: 4 machines of 4 GPUs."""
    net = Network(gpus_per_node=4, links=1e9, network=2e9)
    everywhere = Collective("all-gather", 16_000_000_000, members=16, apart=1)
    assert everywhere.sent == 15e9
    assert net.crossing(everywhere) == 15e9  # one ring enters a machine once
    assert net.seconds(everywhere) == pytest.approx(max(15 / 1, 15 / 2) / 0.8, rel=1e-3)
    inside = Collective("all-gather", 4_000_000_000, members=4, apart=1)
    assert net.crossing(inside) == 0
    assert net.seconds(inside) == pytest.approx(3 / 0.8, rel=1e-3)
    copies = Collective("all-reduce", 1_000_000_000, members=4, apart=4)
    assert copies.sent == 1.5e9
    assert net.crossing(copies) == 4 * 1.5e9  # each GPU of a machine has a ring of its own
    assert net.seconds(copies) == pytest.approx(6 / 2 / 0.8, rel=1e-3)
    pairs = Collective("all-reduce", 1_000_000_000, members=8, apart=2)
    assert net.crossing(pairs) == 2 * 1.75e9  # two of a group in a machine


def test_a_step_waits_for_what_compute_does_not_hide() -> None:
    """Two layers, two micro-batches, frozen layers of 8 GB over links of 1 GB/s at their share: 8 × ¾ ÷ 0.8 s each."""
    net = Network(gpus_per_node=4, links=1e9, network=1e9)
    layer = Unit(Collective("all-gather", 8_000_000_000, 4, 1), None, None)
    moved = cluster.Traffic(Unit(None, None, None), (layer, layer), 2, 2, 2, 1)
    gather = 7.5
    work = Work(micro_batches=2, tokens=10, supervised_tokens=0, images=3)

    def of(token_seconds: float) -> cluster.Prediction:
        cost = Cost(step=0.5, micro_batch=0.25, token=token_seconds, supervised_token=9, image=1, forward=0.5)
        return cluster.predict(work, cost, moved, net, [], tokens=40)

    slow = of(
        12.0
    )  # 60 s a micro-batch, half of them forward, 15 a layer: only the first gather of a pass is waited for
    assert slow.exposed == pytest.approx(2 * 2 * gather, rel=1e-4)
    assert (slow.compute, slow.between) == (120 + 3, 1.0)
    assert slow.seconds == pytest.approx(124 + slow.exposed)
    assert slow.communication == pytest.approx(8 * gather, rel=1e-4)
    fast = of(0.8)  # a layer takes 1 s
    assert fast.exposed == pytest.approx(2 * 2 * (gather + gather - 1), rel=1e-4)
    together = cluster.predict(work, Cost(1, 1, 1, 1, 1, communicates=True), moved, net, [], tokens=40)
    assert together.exposed == 0


def test_rates_of_a_device_that_was_not_measured_are_said_to_be_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {
        "NVIDIA H200": {
            "measured": "one day",
            "tower": 4e14,
            "optimizer": 2e12,
            "optimizer_seconds": 0.125,
            "micro_batch_seconds": 0.25,
            "llm": {"pretrain": {"none": {"flops_per_second": 5e14, "forward": 0.4}}},
        }
    }
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    found = cluster.known_rates(tmp_path / "rates.json")
    monkeypatch.setattr(cluster, "known_rates", lambda: found)
    flops = plan.Flops(token=1e12, supervised_token=2e12, image=4e14)

    def on(device: str, *how: Any) -> tuple[Cost, str]:
        cost, said = cluster.cost_on(device, *how, flops, 1e9) or (None, [])
        assert cost is not None
        return cost, "\n".join(said)

    cost, said = on("NVIDIA H200", "pretrain", "none")
    assert cost == Cost(pytest.approx(0.125 + 28e9 / 2e12), 0.25, 0.002, 0.004, 1.0, 0.4)
    assert "assumed" not in said
    again, said = on("NVIDIA H200", "finetune", "full")
    assert again.token == pytest.approx(0.002 * 1.4)
    assert again.forward == pytest.approx(0.4 / 1.4)
    assert "finetune: not measured" in said
    assert "checkpointing full: measured with none; assumed" in said
    other, said = on("NVIDIA A100-SXM4-80GB", "pretrain", "none")
    assert other.token == pytest.approx(0.002 * 989 / 312)
    assert other.step == pytest.approx(0.125 + 28e9 / 2e12 * 4.8 / 2.039)
    assert "not measured; assumed" in said
    assert cluster.cost_on("a potato", "pretrain", "none", flops, 1.0) is None


def test_times_are_taken_apart_into_what_they_were_made_of() -> None:
    true = Cost(0.5, 0.125, 0.001, 0.0, 0.03, communicates=True)
    works = [Work(*sizes) for sizes in ((1, 1000, 90, 8), (1, 500, 45, 4), (2, 1000, 90, 8), (1, 1000, 90, 0))]
    works.append(Work(1, 1000, 998, 0))
    found = calibrate.fit(works, [true.of(work) for work in works])
    assert found[:5] == pytest.approx(true[:5], abs=1e-9)
    other = Work(5, 7000, 300, 20)
    assert found.of(other) == pytest.approx(true.of(other))
    # A time that falls with more work is no reason for less than nothing.
    assert min(calibrate.fit(works, [1.0, 1.2, 1.0, 0.9, 0.8])[:5]) >= 0


def test_calibration_runs_the_loop_on_what_was_planned(
    tmp_path: Path, no_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: kinds differ as they should, and a kind's work is what the run's own metrics count."""
    monkeypatch.setattr(calibrate, "WARM_UP", 1)
    monkeypatch.setattr(calibrate, "TIMED", 2)
    config = tiny("finetune")
    config = dataclasses.replace(
        config,
        token_budget=60,
        optim=OptimConfig(lr=0.0),
        data=dataclasses.replace(config.data, workers=0, decoder="pil", max_length=32),
    )
    lengths = Lengths(np.array([12, 20, 8, 9]), np.array([1, 2, 0, 0]), 4, 0.5, 4, 0)
    kinds = calibrate.kinds(config, lengths, 1)
    works = {kind.name: calibrate.work_of(kind, config, 1) for kind in kinds}
    planned, texts = works["as planned"], works["texts alone"]
    assert planned.images == 2 * (1 + 2)  # each of the four stands for two of the eight
    assert planned.tokens == texts.tokens == 2 * (12 + 20 + 8 + 9)
    assert (texts.images, works["half of it"].tokens) == (0, planned.tokens / 2)
    assert works["in more micro-batches"].micro_batches > planned.micro_batches
    assert works["all supervised"].supervised_tokens == texts.tokens - 2 * 8
    picture = calibrate.draw_photo(tmp_path)
    with sharding.world() as world:
        for kind in (kinds[0], kinds[-1]):
            request = calibrate.Request(config, "finetune", small(), [kind], [picture], 1, 0)
            calibrate.run_kinds(request, tmp_path, world)
            lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
            work = works[kind.name]
            assert [(line["tokens"], line["micro_batches"]) for line in lines] == [
                (work.tokens, work.micro_batches)
            ] * 3
            assert {line["supervised_tokens"] for line in lines} == {work.supervised_tokens}
            assert len(json.loads((tmp_path / "times.json").read_text())["seconds"][0]) == 2
    # Of two processes the busiest counts in each micro-batch.
    two = calibrate.work_of(kinds[0]._replace(tokens=(30, 20, 5), images=(1, 0, 0), supervised=(3, 2, 1)), config, 2)
    assert two == Work(1, 30, 3, 1)


@pytest.mark.slow
def test_the_command_measures_the_machine_and_plans_with_it() -> None:
    """In two processes of their own."""
    flags = "--gpus 2 --model tiny --samples 100 --global-batch-size 4 --token-budget 512 --images-per-sample 0.5"
    command = [sys.executable, "-m", "training.plan", *flags.split(), "--calibrate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "tok/s" not in done.stderr  # no bar of what is measured
    said = " ".join(done.stdout.split())
    assert "plan of pretrain: tiny on 2 × this machine's " in said
    assert f"measured here in {5 * calibrate.TIMED} steps of 2 process(es)" in said
    assert "waiting for communication in the above together" in said
    seconds, fixed, together = (
        float(re.search(rf"{name} ([\d.]+)", said.partition("seconds of a step")[2]).group(1))  # type: ignore[union-attr]
        for name in ("forward and backward", "optimizer and what is fixed", "together")
    )
    assert together == pytest.approx(seconds + fixed, abs=0.0021)
    measured = float(re.search(r"([\d.]+) s as planned", said).group(1))  # type: ignore[union-attr]
    assert measured / 2 < together < measured * 2


def test_words_that_are_drawn_are_no_images() -> None:
    """Of an LLM whose few words have those of the images and of the level among them."""
    model = small()
    model.image_token_id, model.align_token_id, model.text_config.vocab_size = 3, 5, 7
    kind = calibrate.Kind("texts", (200,), (1,), (150,), 200, 1)
    text = calibrate.Texts(kind, model, "pad").text(Sample("", (), (), None, 0))
    rows = model.image_seq_length
    assert text.input_ids[: 2 + rows].tolist() == [1, 5] + [3] * rows
    assert set(text.input_ids[2 + rows :].tolist()) == {4, 6}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--gpus 64 --samples 12.5", "is '12.5'; it needs a whole number"),
        ("--gpus 12 --gpus-per-node 8", "--gpus is 12; it needs whole machines of --gpus-per-node, 8"),
        ("--gpus 64 --shard-over 7", "--shard-over is 7; it needs a number that divides --gpus, 64"),
        ("--gpus 24 --shard-over 12", "--shard-over is 12; it needs a number that divides --gpus-per-node, 8, or is a"),
        ("--gpus 8 --samples 1,2M", "is '1,2M'; it needs a whole number"),
        ("--gpus 8 --images-per-sample nan", "is 'nan'; it needs a number of at least 0"),
        ("--gpus 8 --images-per-sample -1", "it needs a number of at least 0"),
        ("--gpus 8 --tokens-per-sample 2049", "--tokens-per-sample is 2049; it needs at most the preset's longest"),
        ("--gpus 8 --device H100-MIG", "--device is 'H100-MIG'; it needs one of"),
        ("--gpus 8 --vision clip", "--vision is 'clip'; --model 7b has its tower"),
        ("--gpus 1 --model tiny --calibrate --links 400GB/s", "--links is given; --calibrate needs it left out"),
        (
            "--gpus 1 --calibrate",
            "--model is 7b, of which a process takes 26.48 GB; --calibrate needs it",
        ),
        ("--gpus 512", "--global-batch-size is 256; it needs a sample for each of the 512 GPUs"),
        ("--gpus 8 --model 7c", "--model is '7c'; it needs one of 7b, 13b, tiny, or a folder"),
        ("--gpus 8 --device Abacus", "--device is 'Abacus'; it needs one of"),
        ("--gpus 8 --tokens-per-sample 500", "--tokens-per-sample is 500; it needs more than the 576 rows"),
        ("--gpus 8 --network fast", "is 'fast'; it needs a bandwidth"),
        ("--gpus 8 --lora-rank 8", "--lora-rank is 8; it needs --stage finetune"),
        ("--gpus 1024 --global-batch-size 1024 --model tiny --calibrate", "--gpus is 1024; --calibrate needs as many"),
    ],
)
def test_wrong_values_are_refused_with_what_is_needed(
    flags: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sysconf", lambda name: 100_000)  # 10 GB
    try:
        status = forecast.main(flags.split())
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    assert says in " ".join(capsys.readouterr().err.split())


def test_the_printed_plan_adds_up(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = "--gpus 16 --gpus-per-node 4 --shard-over 4 --model tiny --stage finetune --samples 1.6k"
    flags += " --global-batch-size 32 --preset aligngpt-7b"
    assert forecast.main([*flags.split(), "--device", "NVIDIA H200"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("plan of finetune: tiny on 16 × NVIDIA H200, 4 machines of 4")
    number = r"([\d,.]+)"
    seconds = [
        float(re.search(rf"\n  {name} +{number}", said).group(1))  # type: ignore[union-attr]
        for name in ("forward and backward", "optimizer and what is fixed", "waiting for communication")
    ]
    assert "all-gather of 4 " in said
    assert "all-reduce of 4 " in said
    assert ", 50 steps; " in said
    whole = [float(found) for found in re.findall(rf"\n  together +{number}(?=\n)", said)]
    assert whole[-1] == pytest.approx(sum(seconds), abs=0.0021)
    assert said.index("what this rests on") < said.index("measured on an NVIDIA H200")
    assert said.count("assumed") >= 2
    assert "a machine sends " in said
    assert "preset aligngpt-7b, bf16, weights cut over 4, gather layer, activation checkpointing full" in said

    # No rates tell of fp32: what is counted is printed, and no hours are.
    assert forecast.main([*flags.split()[:-2], "--preset", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3, 4 machines of 4 (assumed, since this machine has no GPU)" in said
    assert "all-gather of 4 " in said
    assert "time: not predicted: known rates are of bf16" in said
    assert "seconds of a step" not in said


def test_a_gpu_of_this_machine_without_rates_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace(total_memory=10**10))
    for name in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA Abacus"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert forecast.main(["--gpus", "8"]) == 1
        assert f"--device is {name!r}; it needs one of " in capsys.readouterr().err


def test_numbers_and_devices_are_read_as_they_are_written() -> None:
    written = {"1.005k": 1005, "1.2M": 1_200_000, "1,200": 1200, "665_000": 665_000, "64": 64, "0.5k": 500}
    assert {text: forecast.count(text) for text in written} == written
    memory = {
        "NVIDIA A100-SXM4-40GB": 40e9,
        "NVIDIA A100-PCIE-40GB": 40e9,
        "NVIDIA A100-SXM4-80GB": 80e9,
        "NVIDIA A100 80GB PCIe": 80e9,
        "NVIDIA H100 NVL": 94e9,
    }
    assert {name: cluster.memory_of(name)[0] for name in memory} == memory  # type: ignore[index]
    assert cluster.memory_of("NVIDIA H100 PCIe") == (80e9, 2.0e12)
    assert cluster.memory_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
