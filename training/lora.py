"""Low-rank adapters (LoRA) on the LLM: PEFT puts them in, they alone train of the LLM, the export has them merged.

    y = W x + (alpha / rank) · B (A dropout(x))      W (out, in) frozen, A (rank, in), B (out, rank)

The adapters stand beside the linear layers of the decoder layers, so FSDP2 cuts them with their layer. A is drawn as
PEFT draws it (Kaiming-uniform) and B is zero, but from the run's seed and layer by layer: the same in every process,
whatever their number, and never whole in memory. Embedding and head get none: the fused ops read their raw weights.

W lies in the arithmetic's type, A and B in fp32. A merged weight is W as the starting folder has it, not as it was
rounded for training, plus (alpha / rank)·B·A in fp32, then cast once.

Refused: names in `--lora.targets` that belong to no linear layer, an LLM whose decoder layers have none.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aligngpt.model import AlignGPTForConditionalGeneration
from training.config import LoraConfig
from training.sharding import Fresh, Stored, tied_names, whole

ADAPTER = "default"  # PEFT's name for the one adapter of a model
LLM = "model.language_model."
Entry = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]  # as `write_weights` takes them


@dataclass(frozen=True)
class Drawn:
    """A new A, made when it is read: the same rows in every process."""

    shape: tuple[int, ...]
    seed: int
    dtype: torch.dtype = torch.float32

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        matrix = torch.empty(self.shape, dtype=self.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        return nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)[start:stop]


def add(
    model: AlignGPTForConditionalGeneration, weights: Mapping[str, Stored], config: LoraConfig, *, seed: int
) -> dict[str, Stored]:
    """Put adapters into a model on the meta device and freeze the rest of its LLM, embedding and head too.

    Returns:
        The starting weights under the names that the model has now, with those of the adapters.

    Raises:
        ValueError: `config.targets` names what is no linear layer of a decoder layer.
    """
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=find_targets(model, config.targets),
    )
    peft.inject_adapter_in_model(settings, model.model.language_model, ADAPTER, low_cpu_mem_usage=True)
    model.lm_head.requires_grad_(False)

    renamed = dict(weights)
    for index, (name, layer) in enumerate(_adapted(model)):
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in renamed:
                renamed[f"{name}.base_layer.{leaf}"] = renamed.pop(f"{name}.{leaf}")
        own_seed = int(np.random.SeedSequence([seed, 2, index]).generate_state(1)[0])
        down, up = (tuple(side[ADAPTER].weight.shape) for side in (layer.lora_A, layer.lora_B))
        renamed[f"{name}.lora_A.{ADAPTER}.weight"] = Drawn(down, own_seed)
        renamed[f"{name}.lora_B.{ADAPTER}.weight"] = Fresh(torch.zeros(()).expand(up))
    return renamed


def find_targets(model: AlignGPTForConditionalGeneration, targets: Sequence[str]) -> list[str]:
    """The names that are to get adapters: those asked for, or the last part of every linear layer's name."""
    linear = {
        name
        for layer in model.model.decoder_layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    known = sorted({name.rpartition(".")[2] for name in linear})
    if not known:
        raise ValueError("--lora.rank asks for adapters; the LLM's decoder layers have no linear layers to adapt")
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown:
        raise ValueError(
            f"--lora.targets is {' '.join(targets)}; {', '.join(unknown)} is no linear layer of the LLM's "
            f"decoder layers, which are {', '.join(known)}"
        )
    return list(targets) or known


def merged(
    model: AlignGPTForConditionalGeneration, entries: Sequence[Entry], dtype: torch.dtype, *, write: bool
) -> list[Entry]:
    """What a model with adapters is to be written as: the entries of one without, its adapted weights of type `dtype`.

    Args:
        entries: all of the model's, each under its own name.
        write: False in processes that only take part in gathering; a frozen weight is empty there.
    """
    found = {entry[0]: entry for entry in entries}
    new: dict[str, Entry | None] = {}
    for name, layer in _adapted(model):
        adapters = [f"{name}.lora_{side}.{ADAPTER}.weight" for side in "AB"]
        new |= dict.fromkeys(adapters)
        _, shape, _, read = found[f"{name}.base_layer.weight"]
        down, up = (found[adapter][3] for adapter in adapters)
        make = functools.partial(_merge, read, down, up, layer.scaling[ADAPTER], write)
        new[f"{name}.base_layer.weight"] = (f"{name}.weight", shape, dtype, make)
        if f"{name}.base_layer.bias" in found:
            new[f"{name}.base_layer.bias"] = (f"{name}.bias", *found[f"{name}.base_layer.bias"][1:])
    return [entry for entry in (new.get(entry[0], entry) for entry in entries) if entry is not None]


def _merge(
    read: Callable[[], Tensor], down: Callable[[], Tensor], up: Callable[[], Tensor], scale: float, write: bool
) -> Tensor:
    weight, a, b = read(), down(), up()  # every process gathers
    return torch.addmm(weight.to(a.device, torch.float32), b, a, alpha=scale) if write else weight


def save_adapters(model: AlignGPTForConditionalGeneration, folder: Path, *, base: str, write: bool) -> None:
    """Write the adapters in PEFT's format: `PeftModel.from_pretrained(starting_model.model.language_model, folder)`.

    Args:
        base: the folder that the run started from, for PEFT's record.
        write: False in processes that only take part in gathering.
    """
    tensors = {}
    for name, layer in _adapted(model):
        for side in ("lora_A", "lora_B"):
            tensor = whole(getattr(layer, side)[ADAPTER].weight)
            if write:
                tensors[f"base_model.model.{name.removeprefix(LLM)}.{side}.weight"] = tensor.cpu().contiguous()
    if write:
        settings: Any = model.model.language_model.peft_config[ADAPTER]
        settings.base_model_name_or_path, settings.inference_mode = base, True
        settings.target_modules = sorted(settings.target_modules)  # a set, of which each process has its own order
        settings.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted(model: AlignGPTForConditionalGeneration) -> Iterator[tuple[str, Any]]:
    """The layers with adapters and their names in the model without them.

    The name is taken from a parameter: wrappers around a layer change the modules' names, not those of parameters.
    """
    from peft.tuners.lora import LoraLayer

    names = tied_names(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight: Any = module.base_layer.weight
            (name,) = names[weight]
            yield name.removesuffix(".base_layer.weight"), module
