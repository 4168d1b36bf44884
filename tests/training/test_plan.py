"""The plan is what a run then holds: bytes to the byte, FLOPs as torch counts them, a table without a trace."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from training import cluster, lora, optim, plan, sharding
from training.config import LoraConfig, ModelConfig, OptimConfig, ShardingConfig, TrainedPart
from training.entry import run
from training.plan import MicroBatch

STAGE_1: tuple[TrainedPart, ...] = ("projector", "table")
STAGE_2: tuple[TrainedPart, ...] = ("llm", "projector", "gate")


@pytest.fixture(scope="module")
def spread() -> Iterator[Callable[..., sharding.World]]:
    """`spread(rank, size, shards)`: this process as one of several whose collectives do nothing; sizes need none."""

    def world(rank: int, size: int, shards: int) -> sharding.World:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        device = torch.device("cpu")
        return sharding.World(rank, size, device, sharding.make_mesh(device, size, shards))

    yield world
    if dist.is_initialized():
        dist.destroy_process_group()


def held(tensors: Any) -> int:
    """Bytes of the storages behind tensors, each once: padding included, which views leave out."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in local}
    return sum(storages.values())


@pytest.mark.parametrize(
    ("llm", "train", "rank", "size", "shards", "adapters", "compute"),
    [
        ("llama", STAGE_1, 0, 1, 0, 0, torch.bfloat16),
        ("llama", STAGE_2, 0, 1, 0, 0, torch.float32),
        ("llama", STAGE_2, 1, 2, 0, 0, torch.float32),  # the odd vocabulary's smaller part, padded
        ("gemma", STAGE_2, 4, 5, 0, 0, torch.float32),  # tied; five divides nothing, the last part of some is empty
        ("gemma", STAGE_2, 3, 4, 2, 0, torch.float32),  # two copies
        ("llama", STAGE_2, 2, 3, 0, 3, torch.bfloat16),
    ],
)
def test_parameters_gradients_and_optimizer_are_planned_to_the_byte(
    parts: Any,
    spread: Callable[..., sharding.World],
    llm: str,
    train: tuple[TrainedPart, ...],
    rank: int,
    size: int,
    shards: int,
    adapters: int,
    compute: torch.dtype,
) -> None:
    model_config = ModelConfig(llm=str(parts.llms[llm]), vision=str(parts.vision))
    config = sharding.starting_config(model_config, image_aspect_ratio="pad")
    stored = sharding.starting_weights(model_config, config, seed=0)

    def prepared() -> tuple[Any, Any]:
        model = sharding.build(config)
        sharding.freeze(model, train)
        return model, lora.add(model, stored, LoraConfig(rank=adapters), seed=0) if adapters else stored

    planned = prepared()[0].to("meta")
    weights, flops = plan.weights_of(planned), plan.count_flops(planned)
    place, ways = (rank % shards, shards) if shards else (rank, size)

    model, named = prepared()
    world = spread(rank, size, shards)
    sharding.shard(model, world.mesh, ShardingConfig(), compute_dtype=compute)
    sharding.fill(model, named, world, compute_dtype=compute, source="test")
    optimizer = optim.make_optimizer(model.named_parameters(), OptimConfig())
    ids = torch.arange(3, 20)[None]
    sharding.before_micro_batch(model, ShardingConfig(), last=True)
    model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss.backward()
    optimizer.step()

    assert (plan.weights_of(model), plan.count_flops(model)) == (weights, flops)
    assert held(model.parameters()) == plan.parameter_bytes(weights, ways, compute_bytes=compute.itemsize)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert held(gradients) == plan.gradient_bytes(weights, ways)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert held(states) == plan.optimizer_bytes(weights, ways, place)


def on_meta(parts: Any, train: tuple[TrainedPart, ...], checkpointing: Any = "none") -> Any:
    model_config = ModelConfig(llm=str(parts.llms["llama"]), vision=str(parts.vision))
    model = sharding.build(sharding.starting_config(model_config, image_aspect_ratio="pad")).to("meta")
    sharding.freeze(model, train)
    sharding.prepare_layers(model, ShardingConfig(activation_checkpointing=checkpointing))
    return model


@pytest.mark.parametrize("train", [STAGE_1, STAGE_2])
def test_flops_are_those_that_torch_counts(parts: Any, train: tuple[TrainedPart, ...]) -> None:
    """Products of weights alone. The projector's first layer passes no gradient on: fewer than 6 FLOPs a weight."""
    model = on_meta(parts, train)
    flops, inner = plan.count_flops(model), model.model
    for part in (inner.language_model, inner.vision_tower):
        part.config._attn_implementation = "aligngpt_plan"
    tokens, images, supervised, width = 24, 3, 5, model.config.text_config.hidden_size
    products = [
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.convolution,
    ]  # no bmm: some versions make RoPE by it

    def counted(work: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return sum(counter.get_flop_counts()["Global"].get(product, 0) for product in products)

    rows = torch.empty(1, tokens, width, device="meta", requires_grad=True)
    positions = torch.arange(tokens, device="meta")[None]
    llm = counted(
        lambda: inner.language_model(inputs_embeds=rows, position_ids=positions).last_hidden_state.sum().backward()
    )
    assert llm == flops.token * tokens
    hidden = torch.empty(supervised, width, device="meta", requires_grad=True)
    assert counted(lambda: model.lm_head(hidden).sum().backward()) == flops.supervised_token * supervised
    pixels = torch.empty(images, 3, 28, 28, device="meta")
    vision = counted(lambda: inner.multi_modal_projector(inner.image_features(pixels)).sum().backward())
    not_passed = 2 * images * 4 * inner.multi_modal_projector.linear_1.weight.numel()
    assert vision + not_passed == flops.image * images
    assert flops.of(tokens=2, supervised_tokens=3, images=4) == 2 * flops.token + 3 * flops[1] + 4 * flops.image


def test_activations_are_what_layers_keep(parts: Any) -> None:
    """Kept are, recomputing, a layer's input; without, all that a frozen Llama layer's gradient needs; in between, its
    products and attention. Longer, wider, and with a layer more by what that adds."""
    tokens, width, middle, kv = 64, 32, 64, 16
    batch = MicroBatch((1, tokens), images=2, supervised_tokens=8)
    full, some, none = (
        plan.activations(on_meta(parts, STAGE_2, how), batch, torch.bfloat16) for how in ("full", "selective", "none")
    )
    inputs = tokens * width * 2
    # q, o, down, attention (its row sums fp32), k, v, gate, up of each of the two layers
    products = 2 * tokens * (2 * (4 * width + 2 * kv + 2 * middle) + 4 * 4)
    assert full.loss + products <= some.loss <= full.loss + products + 4 * inputs
    assert none.loss > some.loss
    assert full.backward < some.backward < none.backward

    deeper = on_meta(parts, STAGE_2, "full")
    deeper.model.decoder_layers.extend(list(on_meta(parts, STAGE_2, "full").model.decoder_layers))
    deeper.model.language_model.config.num_hidden_layers = 4
    four = plan.activations(deeper, batch, torch.bfloat16)
    assert four.loss - full.loss == four.backward - full.backward == 2 * inputs
    assert full.loss > 2 * inputs
    assert plan.activations(on_meta(parts, STAGE_1, "full"), batch, torch.bfloat16).loss < full.loss


def test_live_bytes_are_those_of_living_storages() -> None:
    live = plan.Live()
    known = torch.empty(10)
    live.add(known, 0)
    with live:
        a = known + 1
        b = a.view(2, 5)  # the same storage
        assert live.now == 40
        c = b * 2
        assert live.now == 80
        del a, b
        assert live.now == 40
        del c
    assert (live.now, live.peak) == (0, 80)


def test_memory_takes_the_heaviest_moment_and_what_flags_change() -> None:
    layer = plan.Weight((10, 10), True, "LLM layers", "layer 0")
    weights = [
        layer,
        dataclasses.replace(layer, unit="layer 1"),
        plan.Weight((7, 10), True, "head", "root"),
        plan.Weight((5, 10), False, "vision tower", "tower"),
    ]
    acts = plan.Activations(tower=1, loss=2, backward=10_000)

    def need(micro_batches: int = 1, **flags: Any) -> plan.Memory:
        return plan.memory(
            weights,
            acts,
            shards=4,
            compute_bytes=2,
            micro_batches=micro_batches,
            pixels=3,
            config=ShardingConfig(**flags),
        )

    one = need()
    # 3 of 10 rows, 2 of 7: what is whole is padded to 12 and 8 rows
    assert (one.tower, one.parameters, one.gradients, one.optimizer) == (100, 320, 320, 640 + 12)
    assert one.moment == "at the start of the backward pass"
    assert (one.gradients_then, one.gathered, one.activations) == (0, 160 + 2 * 240, 10_000)
    assert one.reducing == (200 + 480) + 140
    assert one.device == 100 + 320 + 652 + 640 + 820 + 10_000 + 3
    assert need(micro_batches=2).device == one.device + 320
    whole = need(micro_batches=2, gather="step")
    assert (whole.gradients_then, whole.gathered) == (270 * 4, 160 + 2 * 240)
    away = need(micro_batches=2, offload=True)
    assert (away.host, away.device) == (320 + 320 + 652, one.device - 320 - 652)


def flags(parts: Any, tmp_path: Path, *more: object) -> list[str]:
    given = {
        "--model.llm": parts.llms["llama"],
        "--model.vision": parts.vision,
        "--data.path": parts.captions,
        "--data.image-folder": parts.images,
        "--run-dir": tmp_path / "run",
    }
    return [str(word) for word in ("pretrain.py", "tiny", *(w for pair in given.items() for w in pair), *more)]


def test_dry_run_prints_a_plan_and_leaves_nothing_behind(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights need not be there, the records are counted, and only the first of torchrun's processes speaks."""
    bare = tmp_path / "llm"
    bare.mkdir()
    for file in parts.llms["llama"].iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    more = ("--dry-run", "--processes", 2, "--model.llm", bare, "--tokens-per-second", 10, "--epochs", 3)
    monkeypatch.setattr("sys.argv", flags(parts, tmp_path, *more))
    run("pretrain")
    said = capsys.readouterr().out
    assert said.startswith("plan of pretrain: 2 processes, ")
    assert "12 records, 0 left out; 2 steps an epoch, 6 steps, 36 samples" in said
    assert f"{bare}: no weights yet; the run needs them" in said
    assert re.search(r"\n  projector +1,600 +-\n", said)
    tokens, supervised, images = map(
        float,
        re.search(r"a step: (\S+) tokens, (\S+) of them supervised, (\S+) images \(counted\)", said).groups(),  # type: ignore[union-attr]
    )
    assert re.search(r"\n  all-gather of 2 +\d+ ", said)
    assert images == round(11 * 3 / 6)
    assert images * 4 < tokens
    assert supervised < tokens
    minutes = float(re.search(r"time: (\S+) minutes, at 10 tokens/s", said).group(1))  # type: ignore[union-attr]
    assert minutes == pytest.approx(tokens * 6 / 10 / 60, abs=0.1)
    assert not (tmp_path / "run").exists()

    monkeypatch.setenv("RANK", "1")
    run("pretrain")
    assert capsys.readouterr().out == ""


def test_a_dry_run_is_refused_what_the_run_would_be(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unlevelled = tmp_path / "records.json"
    records = json.loads(parts.captions.read_text())
    records[7].pop("align_level")
    unlevelled.write_text(json.dumps(records))
    for more, says in (
        (("--dry-run", "--data.path", unlevelled), "record 7"),
        (("--dry-run", "--model.vision", parts.llms["llama"]), "model_type 'llama'"),
        (("--dry-run", "--processes", 9), "--global-batch-size is 8"),
        (("--processes", 2), "--processes is 2; it needs --dry-run"),
    ):
        monkeypatch.setattr("sys.argv", flags(parts, tmp_path, *more))
        with pytest.raises(SystemExit) as stop:
            run("pretrain")
        assert stop.value.code == 1
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_said_with_numbers(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cluster.MEMORY, "H100", (400_000.0, 3.35e12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    more = ("--dry-run", "--model.train", "llm", "projector", "--data.no-packing", "--precision", "bf16")
    monkeypatch.setattr("sys.argv", flags(parts, tmp_path, *more))
    run("pretrain")
    said = capsys.readouterr().out
    assert "note: it does not fit: it takes " in said
    assert "by measured rates: " in said
    assert "NVIDIA H100 80GB HBM3: not measured; assumed to reach the NVIDIA H200's share" in said
    assert "communication: none, with one process" in said
    assert "weights, gradients and optimizer alone take " in said
    for way in ("--lora.rank 16", "--sharding.offload", "--per-device-batch-size 2", "2 processes", "8 processes"):
        assert f"note: with {way}: " in said


def test_micro_batches_of_a_plan(parts: Any) -> None:
    """Four samples of 10, 20, 30 and 40 tokens: packed into 50 + 50, padded to 2 × 40 and 2 × 20 or the like."""
    lengths = plan.Lengths(np.array([10, 20, 30, 40]), np.array([0, 1, 1, 2]), 4, 0.5, 4, 0)

    class OneStep:
        def steps(self, first: int, stop: int) -> Iterator[np.ndarray]:
            assert (first, stop) == (0, 1)
            yield np.arange(4)

    config = plan.TrainConfig(token_budget=50, per_device_batch_size=1)
    packed = plan.make_batches(config, lengths, OneStep(), processes=2, total_steps=1)  # type: ignore[arg-type]
    assert packed == plan.Batches(MicroBatch((1, 50), 2, 21), 1, 1.0, 1.0, 100 / (2 * 20 + 2 * 40))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=False))
    padded = plan.make_batches(config, lengths, OneStep(), processes=2, total_steps=1)  # type: ignore[arg-type]
    assert padded == plan.Batches(MicroBatch((1, 40), 2, 16), 2, 2.0, 1.0, 100 / 120)

    class TwoSteps:
        def steps(self, first: int, stop: int) -> Iterator[np.ndarray]:
            yield np.arange(4)
            yield np.array([3, 3, 3, 3])  # none fits beside another

    config = plan.TrainConfig(token_budget=50)
    uneven = plan.make_batches(config, lengths, TwoSteps(), processes=2, total_steps=2)  # type: ignore[arg-type]
    assert (uneven.micro_batches, uneven.micro_batches_mean) == (2, 1.5)  # memory takes the most, time the mean
    assert uneven.packed == (100 + 160) / (2 * 50 + 2 * 2 * 40)
