"""The model over many processes: built without weights, cut up by FSDP2, filled from files a slice at a time.

Order matters, and each step below is one function:

    starting_config, starting_weights   what a run starts from
    build            the model with its parameters on the meta device; buffers are real (RoPE tables and the like)
    freeze           what the run does not train
    shard            `fully_shard` on each decoder layer, then on the root: embedding, head, projector, gate and table
                     are in the root group, which is gathered while the root's forward runs; the tower is replicated
    fill             each process reads its own rows of each parameter, so none ever holds the model whole

Trained weights are fp32 whatever the arithmetic; frozen ones are kept in the arithmetic's type, since a frozen weight
needs no better copy than the one that is used. Tied weights are one parameter throughout. One process is sharded over a
mesh of one: the same code runs everywhere.
"""

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig

from aligngpt.checkpoint import check_names, read_config, set_align_sizes, stored_parts, stored_weights
from aligngpt.config import AlignGPTConfig, is_public
from aligngpt.model import AlignGPTForConditionalGeneration, fresh_align_weights
from training.config import ModelConfig, TrainedPart

TABLE = "model.align_table"
GATED_MODES = ("adaptive", "local")  # the modes in which the gate's weights matter


class Stored(Protocol):
    """A tensor that is read a slice of rows at a time: from a file (`StoredTensor`), or from memory (`Fresh`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int = 0, stop: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Fresh:
    """A newly drawn tensor, the same in every process."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensor[start:stop]


# ---------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    def add(self, *values: float) -> list[float]:
        """Sums over all processes of numbers that are on the host; all wait for each other, no GPU does."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def world() -> Iterator[World]:
    """Join the other processes of torchrun, or be a world of one without it: NCCL on GPUs, gloo on CPUs."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > gpus:
            raise ValueError(
                f"--nproc-per-node is {processes}; this machine has {gpus} GPUs, and each process needs one"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    rank, size = dist.get_rank(), dist.get_world_size()
    yield World(rank, size, device, init_device_mesh(device.type, (size,)))
    # Gloo's threads live on in torch's caches, and one that frees the last collective's tensor while the interpreter
    # ends aborts the process. Collecting garbage first gives them a tenth of a second.
    gc.collect()
    dist.destroy_process_group()  # not after an error: others may be waiting in a collective for this process


# ---------------------------------------------------------------------------------------------------- the model


def starting_config(model: ModelConfig, *, image_aspect_ratio: str) -> AlignGPTConfig:
    """The model's config: of `--model.init`, or new from the LLM's and the tower's.

    Raises:
        ValueError: a folder that holds no such model.
    """
    if model.init:
        raw = read_config(model.init)
        if raw.get("model_type") != AlignGPTConfig.model_type:
            raise ValueError(
                f"--model.init {model.init} holds a {raw.get('model_type')!r} model; it needs an AlignGPT folder"
            )
        try:
            config = AlignGPTConfig.from_dict(raw)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"--model.init {model.init}: its config.json cannot be used ({error}); "
                "for a public folder set mm_vision_tower there to a local folder of its tower"
            ) from error
        if is_public(raw):
            set_align_sizes(config, stored_weights(model.init))
    else:
        llm, vision = (_part_config(flag, folder) for flag, folder in (("llm", model.llm), ("vision", model.vision)))
        config = AlignGPTConfig.from_parts(llm, vision, num_align_levels=model.num_levels or 8)
    config.align_mode = model.align_mode or config.align_mode
    config.gate_text = model.gate_text or config.gate_text
    config.image_aspect_ratio = image_aspect_ratio
    return config


def starting_weights(model: ModelConfig, config: AlignGPTConfig, *, seed: int) -> dict[str, Stored]:
    """Every weight by state-dict name, unread. Sets `config.lm_head_bias` from the LLM's head.

    Raises:
        ValueError: a folder without weights, or with names that belong to no such model.
    """
    weights: dict[str, Stored] = {}
    if model.init:
        weights.update(stored_weights(model.init))
        if model.random_table:  # not the one that this seed gave the first stage to start from
            other_seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
            weights[TABLE] = Fresh(fresh_align_weights(config, other_seed)[TABLE])
    else:
        weights.update(stored_parts(model.llm, model.vision))
        config.lm_head_bias = "lm_head.bias" in weights
        weights.update({name: Fresh(tensor) for name, tensor in fresh_align_weights(config, seed).items()})
    return weights


def build(config: AlignGPTConfig) -> AlignGPTForConditionalGeneration:
    """The model in training mode with its parameters on the meta device and its buffers computed, in fp32."""
    set_dtype(config, torch.float32)  # transformers builds the parts in their config's type

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None  # leaves it as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        model = AlignGPTForConditionalGeneration(config)
    finally:
        hook.remove()
    return model.train()


def set_dtype(config: AlignGPTConfig, dtype: torch.dtype) -> None:
    """Say in a config and its parts which type the weights have."""
    parts: tuple[Any, ...] = (config, config.text_config, config.vision_config)
    for part in parts:
        part.dtype = dtype


def freeze(model: AlignGPTForConditionalGeneration, train: tuple[TrainedPart, ...]) -> None:
    """Leave only the named parts trainable, and of those only what the config's `align_mode` uses.

    Raises:
        ValueError: that is nothing.
    """
    mode = model.config.align_mode
    parts: dict[TrainedPart, list[nn.Parameter]] = {
        "llm": [*model.model.language_model.parameters(), *model.lm_head.parameters()],
        "projector": list(model.model.multi_modal_projector.parameters()),
        "gate": list(model.model.align_gate.parameters()) if mode in GATED_MODES else [],
        "table": [model.model.align_table] if mode != "none" else [],
    }
    model.requires_grad_(False)
    for part in train:
        for parameter in parts[part]:
            parameter.requires_grad_(True)
    if not any(parts[part] for part in train):
        raise ValueError(
            f"--model.train is {' '.join(train)}, which align_mode {mode!r} has no use for; name another part"
        )


def recompute_layers(model: AlignGPTForConditionalGeneration) -> None:
    """Gradient checkpointing: a decoder layer keeps its input and computes the rest again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.17
    enable({"use_reentrant": False})
    # Only re-entrant checkpointing needs that hook on the embedding; with it, the fused injection could not be used.
    model.disable_input_require_grads()


def shard(model: AlignGPTForConditionalGeneration, mesh: DeviceMesh, *, compute_dtype: torch.dtype) -> None:
    """FSDP2: each decoder layer is gathered when it runs, the root group for the whole step, the tower never cut."""
    policy = MixedPrecisionPolicy()
    if compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.model.decoder_layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=set(model.model.vision_tower.parameters()))


def fill(
    model: AlignGPTForConditionalGeneration,
    weights: Mapping[str, Stored],
    world: World,
    *,
    compute_dtype: torch.dtype,
    source: str,
) -> None:
    """Give every parameter its values: this process's rows of a sharded one, all of a replicated one.

    Raises:
        ValueError: names that are missing or left over, or a shape that is not the model's; all are listed.
    """
    slots = tied_names(model)
    names = [name for tied in slots.values() for name in tied]
    held = {parameter: next((name for name in tied if name in weights), tied[0]) for parameter, tied in slots.items()}
    check_names(weights, names, source=source, tied=[name for name in names if name not in held.values()])
    wrong = [
        f"{name} is {weights[name].shape}, the model's is {tuple(parameter.shape)}"
        for parameter, name in held.items()
        if weights[name].shape != tuple(parameter.shape)
    ]
    if wrong:
        raise ValueError(f"{source} does not fit its config; {'; '.join(wrong[:12])}{' …' if len(wrong) > 12 else ''}")

    for parameter, tied in slots.items():
        dtype = torch.float32 if parameter.requires_grad else compute_dtype
        filled = nn.Parameter(_read(parameter, weights[held[parameter]], dtype, world), parameter.requires_grad)
        for name in tied:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, filled)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(world.device))


def tied_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Each parameter once, with all names it goes by."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _read(parameter: nn.Parameter, stored: Stored, dtype: torch.dtype, world: World) -> Tensor:
    if not isinstance(parameter, DTensor):
        return stored.read().to(world.device, dtype, copy=True)
    rows_per_rank = -(-parameter.shape[0] // world.size)  # how FSDP2 cuts: torch.chunk along dimension 0
    start, stop = (min(rank * rows_per_rank, parameter.shape[0]) for rank in (world.rank, world.rank + 1))
    rows = stored.read(start, stop).to(world.device, dtype, copy=True).contiguous()
    assert rows.shape == parameter.to_local().shape, (rows.shape, parameter.to_local().shape)
    return DTensor.from_local(
        rows, world.mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _part_config(flag: str, folder: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model.{flag} {folder} holds no model that transformers knows: {error}") from error
    if config.model_type == AlignGPTConfig.model_type:
        raise ValueError(f"--model.{flag} {folder} holds an AlignGPT model; give that one to --model.init")
    return config
