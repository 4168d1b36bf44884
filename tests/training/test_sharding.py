"""A model built without weights, cut up and filled equals the one that transformers loads; wrong weights are listed."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from aligngpt.model import AlignGPTForConditionalGeneration
from training import sharding
from training.config import ModelConfig, OptimConfig, ShardingConfig, TrainedPart
from training.optim import make_optimizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 321,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# (LLM, its config beyond SIZES, type of the stored weights, tower)
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, str]] = {
    "scaled rope, bf16 files": ("Llama", {"rope_parameters": LLAMA_3_ROPE}, torch.bfloat16, "CLIPVision"),
    "tied": ("Qwen2", {"tie_word_embeddings": True}, torch.float32, "CLIPVision"),
    "tied, scaled embedding": ("Gemma", {"head_dim": 8}, torch.float32, "SiglipVision"),
    "head with a bias": ("Phi", {}, torch.float32, "SiglipVision"),
}


def test_over_four_processes_as_in_one(parts: Any, tmp_path: Path) -> None:
    """Filled from meta as transformers loads; trained in each way of sharding as plainly; and one whole run."""
    cases, runs = tmp_path / "cases", tmp_path / "runs"
    for number, (name, more, dtype, tower) in enumerate(CASES.values()):
        config = getattr(transformers, f"{name}Config")(**SIZES, **more)
        llm = getattr(transformers, f"{name}ForCausalLM")(config)
        llm.to(dtype).save_pretrained(cases / str(number) / "llm")
        small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28}
        small |= {"patch_size": 14, "num_hidden_layers": 3}
        vision = getattr(transformers, f"{tower}Model")(getattr(transformers, f"{tower}Config")(**small))
        vision.save_pretrained(cases / str(number) / "vision")
    flags = ["tiny", "--model.llm", parts.llms["llama"], "--model.vision", parts.vision, "--data.path", parts.chats]
    flags += ["--data.image-folder", parts.images, "--data.workers", 0, "--data.decoder", "pil", "--max-steps", 3]
    flags += ["--data.no-packing", "--per-device-batch-size", 1]  # two micro-batches a process
    runs.mkdir()
    (runs / "flags").write_text("\n".join(map(str, flags)))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharding_checks.py")), str(cases), str(runs)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    four, one = (
        [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()] for name in ("4", "1")
    )
    assert [line["loss"] for line in four] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["grad_norm"] for line in four] == pytest.approx([line["grad_norm"] for line in one], rel=1e-4)
    weights = [load_file(runs / name / "model/model.safetensors") for name in ("4", "1")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        assert torch.allclose(weights[0][name], tensor, rtol=0, atol=2e-4), name  # Adam at its first steps: the rate


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing: model.language_model.norm.weight"),
        (
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}),
            "left over: model.language",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(31)}),
            r"model.language_model.norm.weight is \(31,\), the model's is \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(parts: Any, tmp_path: Path, change: Any, says: str) -> None:
    weights = load_file(parts.llms["llama"] / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((parts.llms["llama"] / "config.json").read_bytes())
    model_config = ModelConfig(llm=str(tmp_path), vision=str(parts.vision))
    config = sharding.starting_config(model_config, image_aspect_ratio="pad")
    stored = sharding.starting_weights(model_config, config, seed=0)
    model = sharding.build(config)
    with pytest.raises(ValueError, match=says), sharding.world() as world:
        sharding.fill(model, stored, world, compute_dtype=torch.float32, source="the folder")
    dist.destroy_process_group()


def test_a_mode_leaves_frozen_what_it_has_no_use_for(parts: Any) -> None:
    for mode, trained in (
        ("adaptive", {"multi_modal_projector", "align_gate", "align_table"}),
        ("local", {"multi_modal_projector", "align_gate", "align_table"}),
        ("global", {"multi_modal_projector", "align_table"}),
        ("average", {"multi_modal_projector", "align_table"}),
        ("none", {"multi_modal_projector"}),
    ):
        model_config = ModelConfig(llm=str(parts.llms["llama"]), vision=str(parts.vision), align_mode=mode)  # type: ignore[arg-type]
        model = sharding.build(sharding.starting_config(model_config, image_aspect_ratio="pad"))
        sharding.freeze(model, ("projector", "gate", "table"))
        assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == trained
    with pytest.raises(ValueError, match=r"model\.train is gate table, which align_mode 'none' has no use for"):
        sharding.freeze(model, ("gate", "table"))


class Executed(TorchDispatchMode):
    """Counts operators, and says how many bytes of what they made are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.operators[func.name()] += 1
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    @property
    def products(self) -> int:
        return sum(number for name, number in self.operators.items() if name in sharding.KEPT_OPERATORS)

    @property
    def held_bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def test_what_a_layer_keeps_for_its_backward_pass(make_llm: Any, make_tower: Any) -> None:
    layers, in_a_layer = 2, 8  # products of matrices: q, k, v, scores with values, o, gate, up, down
    ids = torch.randint(3, 100, (2, 33))
    found = {}
    for kept in ("none", "selective", "full"):
        model = AlignGPTForConditionalGeneration.from_parts(make_llm(), make_tower()).train()
        assert len(model.model.decoder_layers) == layers
        sharding.prepare_layers(model, ShardingConfig(activation_checkpointing=kept))  # type: ignore[arg-type]
        with Executed() as forward:
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        held = forward.held_bytes
        with Executed() as backward:
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[kept] = loss, gradients, held, backward.products
    none, selective, full = found.values()
    for other in (selective, full):
        assert torch.equal(other[0], none[0])
        assert other[1].keys() == none[1].keys()
        assert all(torch.equal(gradient, none[1][name]) for name, gradient in other[1].items())
    assert selective[3] == none[3]
    assert full[3] == none[3] + layers * (in_a_layer - 1)  # down's result is the layer's: nothing needs it again
    assert full[2] < selective[2] < none[2]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_equal_others_and_take_every_length(parts: Any, backend: str) -> None:
    counted = CompileCounterWithBackend(backend)
    found, graphs = [], []
    with sharding.world() as world:
        for compiled in (False, True):
            config = ShardingConfig(compile=compiled, activation_checkpointing="selective")
            model = filled(parts, world, config, ("llm", "projector"), backend=counted)
            for length in (21, 34, 9, 50):
                ids = torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(length))
                sharding.before_micro_batch(model, config, last=True)
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
                loss.backward()
                gradients = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
                found.append((loss.detach(), gradients))
                graphs.append(counted.frame_count)
                model.zero_grad()
    torch._dynamo.reset()
    for (loss, gradients), (wanted, reference) in zip(found[4:], found[:4], strict=True):
        assert torch.allclose(loss, wanted, rtol=1e-5, atol=0)
        for gradient, other in zip(gradients, reference, strict=True):
            assert torch.allclose(gradient, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))
    assert graphs[:4] == [0] * 4
    assert graphs[4] > 0
    assert len(set(graphs[4:])) == 1


def test_stage_1_keeps_nothing_for_frozen_weights(parts: Any) -> None:
    """Beside a weight itself: no gradient, no moment; bytes are counted over all tensors that parameters hold."""
    with sharding.world() as world:
        config = ShardingConfig(gather="step")
        model = filled(parts, world, config, ("projector", "table"), dtype=torch.bfloat16)
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        assert trained.keys() == {
            name for name in dict(model.named_parameters()) if "projector" in name or "table" in name
        }
        optimizer = make_optimizer(model.named_parameters(), OptimConfig())
        ids = torch.arange(3, 20)[None]
        inside = []
        for last in (False, True):
            sharding.before_micro_batch(model, config, last=last)
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
            inside.append({name for name, p in model.named_parameters() if p.requires_grad})
            assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
        assert inside == [trained.keys(), trained.keys()]
        optimizer.step()
        size = sum(trained.values())
        gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
        assert sum(gradient.nbytes for gradient in gradients) == 4 * size
        moments = [value.to_local() for state in optimizer.state.values() for value in state.values() if value.ndim]
        assert sum(moment.nbytes for moment in moments) == 2 * 4 * size
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert sum(p.numel() for p in frozen) > 5 * size
        assert {p.dtype for p in frozen} == {torch.bfloat16}


def test_offload_needs_a_gpu(parts: Any) -> None:
    with pytest.raises(ValueError, match=r"--sharding\.offload is True; it needs a GPU"), sharding.world() as world:
        filled(parts, world, ShardingConfig(offload=True), ("projector",))
    dist.destroy_process_group()


def filled(
    parts: Any,
    world: sharding.World,
    config: ShardingConfig,
    trained: tuple[TrainedPart, ...],
    *,
    dtype: torch.dtype = torch.float32,
    backend: Any = "inductor",
) -> AlignGPTForConditionalGeneration:
    model_config = ModelConfig(llm=str(parts.llms["llama"]), vision=str(parts.vision))
    start = sharding.starting_config(model_config, image_aspect_ratio="pad")
    weights = sharding.starting_weights(model_config, start, seed=0)
    model = sharding.build(start)
    sharding.freeze(model, trained)
    sharding.shard(model, world.mesh, config, compute_dtype=dtype)
    sharding.fill(model, weights, world, compute_dtype=dtype, source="the parts")
    sharding.prepare_layers(model, config, backend=backend)
    return model


def test_a_run_is_deterministic_where_it_is_asked_to_be() -> None:
    for asked in (True, False):
        with sharding.world(deterministic=asked):
            assert torch.are_deterministic_algorithms_enabled() == asked
