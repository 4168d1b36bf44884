"""LoRA from the command line to RUN/model and RUN/adapter: like PEFT's own loop, over two processes, after a stop."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from aligngpt.batch import Batch, Example, collate
from aligngpt.data.records import open_records
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.processor import AlignGPTProcessor
from training import lora, optim, sharding
from training.config import LoraConfig, ModelConfig

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 3


@dataclass(frozen=True)
class Adapted:
    one: Any  # the run of one process
    two: Any  # the same with two
    flags: list[object]


@pytest.fixture(scope="module")
def adapted(
    parts: Any, launch: Callable[..., Any], train_here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Adapted:
    """Each step takes all 13 records."""
    root = tmp_path_factory.mktemp("lora")
    flags: list[object] = ["--model.llm", parts.llms["llama"], "--model.vision", parts.vision]
    flags += ["--data.path", parts.chats, "--data.image-folder", parts.images, "--data.workers", 0]
    flags += ["--data.decoder", "pil", "--global-batch-size", 13, "--max-steps", STEPS, "--save-every", 2]
    flags += ["--optim.lr", 3e-3, "--lora.rank", 4, "--lora.alpha", 6]
    one, two = train_here("finetune", root / "1", *flags), launch("finetune", root / "2", *flags, processes=2)
    assert two.status == 0, two.output
    return Adapted(one, two, flags)


def whole_batch(folder: Path, parts: Any) -> Batch:
    """All records of the chats, padded, as a run's processor makes them."""
    processor = AlignGPTProcessor.from_pretrained(folder)
    records = open_records(str(parts.chats), str(parts.images))
    examples = []
    for sample in (records[index] for index in range(len(records))):
        pictures = [processor.image_processor.read(parts.images / name, name) for name in sample.images]
        pixels = processor.image_processor.normalised(pictures)
        examples.append(Example(sample.id, processor.text(sample), pixels))
    size = processor.image_processor.size
    return collate(examples, token_ids=processor.token_ids, rows_per_image=processor.rows_per_image, image_size=size)


def fresh(parts: Any, config: LoraConfig) -> tuple[AlignGPTForConditionalGeneration, dict[str, sharding.Stored]]:
    """A model on meta with adapters, and their starting weights alone."""
    model_config = ModelConfig(llm=str(parts.llms["llama"]), vision=str(parts.vision))
    model = sharding.build(sharding.starting_config(model_config, image_aspect_ratio="pad"))
    return model, lora.add(model, {}, config, seed=0)


def test_it_equals_pefts_own_loop_and_itself_over_two_processes(adapted: Adapted, parts: Any) -> None:
    assert adapted.one.losses == pytest.approx(adapted.two.losses, abs=1e-5)
    model = AlignGPTForConditionalGeneration.from_parts(parts.llms["llama"], parts.vision)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR)
    peft.inject_adapter_in_model(config, model.model.language_model)
    state = model.state_dict()
    _, drawn = fresh(parts, LoraConfig(rank=4, alpha=6))
    assert len(drawn) == 2 * 2 * len(LINEAR)
    firsts = set()
    for name, stored in drawn.items():
        values = stored.read()
        if ".lora_A." in name:  # as PEFT draws it, though not the same numbers
            assert 0.8 / values.shape[1] ** 0.5 < values.abs().max() <= state[name].shape[1] ** -0.5
            firsts.add(values[0, 0].item())
        else:
            assert not values.any()
        state[name].copy_(values)
    assert len(firsts) == 2 * len(LINEAR)

    model.lm_head.requires_grad_(False)
    model.model.align_table.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0, foreach=False)
    inputs = whole_batch(adapted.one.run_dir / "model", parts).model_inputs()
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * optim.rate(step, STEPS, 0.03)
        optimizer.zero_grad()
        loss = model.train()(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert adapted.one.losses == pytest.approx(losses, abs=1e-5)
    assert losses[0] - losses[-1] > 0.01  # it learns


def test_the_merged_model_answers_as_the_starting_llm_with_the_adapters_does(adapted: Adapted, parts: Any) -> None:
    """RUN/model is read without PEFT; RUN/adapter is PEFT's own format. Only adapters are in a checkpoint."""
    run_dir = adapted.two.run_dir
    merged = AlignGPTForConditionalGeneration.from_pretrained(run_dir / "model").eval()
    start = AlignGPTForConditionalGeneration.from_parts(parts.llms["llama"], parts.vision)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    after = merged.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {name for name in before if any(f".{linear}.weight" in name for linear in LINEAR) and "tower" not in name}
    assert changed == layers | {name for name in before if "projector" in name or "gate." in name}

    batch = whole_batch(run_dir / "model", parts)
    start.load_state_dict({name: after[name] for name in changed - layers}, strict=False)
    inputs = {name: value for name, value in batch.model_inputs().items() if name not in ("labels", "rows")}
    with torch.no_grad():
        unadapted = start(**inputs).logits
        start.model.language_model = peft.PeftModel.from_pretrained(start.model.language_model, run_dir / "adapter")
        expected, logits = start(**inputs).logits, merged(**inputs).logits
    real = batch.attention_mask.bool()
    assert (logits - expected)[real].abs().max() <= 1e-5
    assert (logits - unadapted)[real].abs().max() > 1e-2
    config = json.loads((run_dir / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(parts.llms["llama"])
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, sorted(LINEAR))

    saved = dcp.FileSystemReader(run_dir / "checkpoints/step-00000003").read_metadata().state_dict_metadata
    weights = {name for name in saved if name.startswith("model.model.")}
    assert sum("lora_" in name for name in weights) == 2 * len(layers)
    assert all("lora_" in name or "projector" in name or "align_gate" in name for name in weights)


def test_bf16_and_some_layers_with_dropout_and_a_stop(
    adapted: Adapted, parts: Any, train_here: Callable[..., Any], tmp_path: Path
) -> None:
    """Half-precision base, fp32 adapters: a stop after step 2 changes no bit, what has no adapter is the file's."""
    flags = [*adapted.flags, "--lora.targets", "q_proj", "mlp.up_proj", "--lora.dropout", 0.2, "--precision", "bf16"]
    flags += ["--sharding.activation-checkpointing", "full"]
    whole = train_here("finetune", tmp_path / "whole", *flags)
    assert whole.losses[0] == pytest.approx(adapted.one.losses[0], rel=2e-3)  # B is zero
    assert abs(whole.losses[0] - adapted.one.losses[0]) > 1e-6
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.run_dir, stopped, ignore=shutil.ignore_patterns("model", "adapter", "step-00000003"))
    (stopped / "LATEST").write_text("step-00000002\n")
    resumed = train_here("finetune", stopped, *flags)
    assert resumed.losses == whole.losses
    file = "model/model.safetensors"
    assert (stopped / file).read_bytes() == (whole.run_dir / file).read_bytes()
    adapter = "adapter/adapter_model.safetensors"
    assert (stopped / adapter).read_bytes() == (whole.run_dir / adapter).read_bytes()

    llm: dict[str, Tensor] = load_file(parts.llms["llama"] / "model.safetensors")
    found = load_file(whole.run_dir / file)
    changed = {
        name
        for name, tensor in llm.items()
        if not torch.equal(tensor, found[name.replace("model.", "model.language_model.", 1)])
    }
    assert changed == {
        f"model.layers.{n}.{name}.weight" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    factors = load_file(whole.run_dir / adapter)
    prefix = "base_model.model.layers.1.mlp.up_proj"
    a, b = (factors[f"{prefix}.lora_{side}.weight"] for side in "AB")
    assert a.dtype == torch.float32
    assert not torch.equal(a, a.bfloat16().float())
    exact = llm["model.layers.1.mlp.up_proj.weight"].double() + 6 / 4 * (b.double() @ a.double())
    assert (found["model.language_model.layers.1.mlp.up_proj.weight"] - exact).abs().max() <= 1e-7


def test_targets_that_are_no_linear_layers_are_named(parts: Any) -> None:
    says = r"--lora\.targets is q_proj qkv; qkv is no linear layer .*, which are down_proj, gate_proj, k_proj, o_proj"
    with pytest.raises(ValueError, match=says):
        fresh(parts, LoraConfig(rank=2, targets=("q_proj", "qkv")))
