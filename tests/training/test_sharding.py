"""A model built without weights, cut up and filled equals the one that transformers loads; wrong weights are listed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from aligngpt.model import AlignGPTForConditionalGeneration
from training import sharding
from training.config import ModelConfig

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


def test_filled_from_meta_over_two_processes_equals_from_pretrained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for number, (name, more, dtype, tower) in enumerate(CASES.values()):
        config = getattr(transformers, f"{name}Config")(**SIZES, **more)
        llm = getattr(transformers, f"{name}ForCausalLM")(config)
        llm.to(dtype).save_pretrained(tmp_path / str(number) / "llm")
        small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28}
        small |= {"patch_size": 14, "num_hidden_layers": 3}
        vision = getattr(transformers, f"{tower}Model")(getattr(transformers, f"{tower}Config")(**small))
        vision.save_pretrained(tmp_path / str(number) / "vision")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, str(Path(__file__).with_name("sharding_checks.py")), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["0", "ok", "1", "ok", "2", "ok", "3", "ok"]


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


def test_recomputed_layers_run_again_in_the_backward_pass(make_llm: Any, make_tower: Any) -> None:
    model = AlignGPTForConditionalGeneration.from_parts(make_llm(), make_tower()).train()
    sharding.recompute_layers(model)
    runs = []
    for layer in model.model.decoder_layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    ids = torch.arange(3, 20)[None]
    loss = model(input_ids=ids, labels=ids).loss
    assert len(runs) == len(model.model.decoder_layers)
    loss.backward()
    assert len(runs) == 2 * len(model.model.decoder_layers)
