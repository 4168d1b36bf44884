"""The model over many processes: built without weights, cut up by FSDP2, filled from files a slice at a time.

Order matters, and each step below is one function:

    starting_config, starting_weights   what a run starts from
    build            the model with its parameters on the meta device; buffers are real (RoPE tables and the like)
    freeze           what the run does not train
    shard            `fully_shard` on each decoder layer, then on the root: embedding, head, projector, gate and table
                     are in the root group, which is gathered while the root's forward runs; the tower is replicated
    fill             each process reads its own rows of each parameter, so none ever holds the model whole
    prepare_layers   what a decoder layer keeps for its backward pass, and whether it is compiled

and `before_micro_batch` says, before each forward, what becomes of gathered weights and of gradients.

Trained weights are fp32 whatever the arithmetic; frozen ones are kept in the arithmetic's type, since a frozen weight
needs no better copy than the one that is used. Tied weights are one parameter throughout. One process is sharded over a
mesh of one: the same code runs everywhere. Gathering ahead is left to FSDP2: on a GPU it starts the next layer's
gather while a layer is at work, in both directions.
"""

import functools
import gc
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import AutoConfig

from aligngpt.checkpoint import Fresh, Stored, check_names, read_config, set_align_sizes, stored_parts, stored_weights
from aligngpt.config import AlignGPTConfig, is_public
from aligngpt.model import AlignGPTForConditionalGeneration, fresh_align_weights
from training.config import ModelConfig, ShardingConfig, TrainedPart

TABLE = "model.align_table"
TOGETHER = timedelta(minutes=10)  # in which the processes come together
LONGEST_WAIT = timedelta(hours=1)  # of a collective: for one that hashes or writes a large file. Death is known at once
GATED_MODES = ("adaptive", "local")  # the modes in which the gate's weights matter
# Operators whose results "selective" keeps: products of matrices, and attention in all its implementations.
KEPT_OPERATORS = frozenset(
    (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::linear",
        "aten::_scaled_mm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "aligngpt::attention_by_blocks",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "xformers_flash::flash_fwd",
        "flex_attention",
    )
)


# ---------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # (processes,), or (copies, processes that share one)

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
def world(shard_size: int = 0, *, deterministic: bool = False) -> Iterator[World]:
    """Join the other processes of torchrun, or be a world of one without it: NCCL on GPUs, gloo on CPUs.

    `shard_size` is `--sharding.size`, how many processes share one copy of the weights; 0: all. With `deterministic`
    PyTorch's operations give the same bits each time; one that cannot warns.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # helps debugging, slowly
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
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
        store, rank, size = next(rendezvous("env://", timeout=TOGETHER))
        store = dist.PrefixStore(_name_of_life(store, rank, size), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    rank, size = dist.get_rank(), dist.get_world_size()
    stopped: SystemExit | None = None
    try:
        yield World(rank, size, device, make_mesh(device, size, shard_size))
    except SystemExit as error:  # all leave together
        stopped = error
    # Gloo's threads live on in torch's caches, and one that frees the last collective's tensor while the interpreter
    # ends aborts the process. Collecting garbage first gives them a tenth of a second.
    gc.collect()
    dist.destroy_process_group()  # not after an error: others may be waiting in a collective for this process
    if stopped:
        raise stopped


def make_mesh(device: torch.device, size: int, shard_size: int = 0) -> DeviceMesh:
    """All processes in one row, or in rows of `shard_size` neighbours, each of which holds a copy of the weights."""
    if shard_size in (0, size):
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def _name_of_life(store: dist.Store, rank: int, size: int) -> str:
    """A new name that all processes of one life of the job agree on.

    torchrun keeps one store when it starts the processes anew, so keys of an earlier life are still there, and gloo
    would wait at addresses of the dead. Nor can its count of restarts tell lives apart: machines count differently. So
    every key that is waited for here has a name drawn in this life.
    """
    mine = secrets.token_hex(16)
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        name = store.get(f"welcome/{mine}").decode()
        store.set(f"joined/{name}/{rank}", "")
        return name
    missing, deadline = set(range(1, size)), time.monotonic() + TOGETHER.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):  # perhaps of an earlier life: then the true one comes yet
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", mine)
            if store.check([f"joined/{mine}/{other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise TimeoutError(f"of {size} processes these did not come within {TOGETHER}: {sorted(missing)}")
        time.sleep(0.02)
    return mine


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


def shard(
    model: AlignGPTForConditionalGeneration,
    mesh: DeviceMesh,
    config: ShardingConfig,
    *,
    compute_dtype: torch.dtype,
) -> None:
    """FSDP2: each decoder layer is gathered when it runs, the root group for the whole step, the tower never cut.

    Raises:
        ValueError: `--sharding.offload` without a GPU.
    """
    offload = OffloadPolicy()
    if config.offload:
        if mesh.device_type == "cpu":
            raise ValueError("--sharding.offload is True; it needs a GPU, since without one all lies in host memory")
        offload = CPUOffloadPolicy()
    policy = MixedPrecisionPolicy()
    if compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.model.decoder_layers:
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=config.gather == "layer",
            mp_policy=policy,
            offload_policy=offload,
        )
    tower = set(model.model.vision_tower.parameters())
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=tower)


def fill(
    model: AlignGPTForConditionalGeneration,
    weights: Mapping[str, Stored],
    world: World,
    *,
    compute_dtype: torch.dtype,
    source: str,
    offload: bool = False,
) -> None:
    """Give every parameter its values: this process's rows of a sharded one, all of a replicated one.

    With `offload` the rows lie in the host's memory.

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
        device = torch.device("cpu") if offload and isinstance(parameter, DTensor) else world.device
        filled = nn.Parameter(_read(parameter, weights[held[parameter]], dtype, device), parameter.requires_grad)
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


def prepare_layers(
    model: AlignGPTForConditionalGeneration, config: ShardingConfig, *, backend: Any = "inductor"
) -> None:
    """Wrap the forward of each decoder layer: activation checkpointing, and torch.compile around that.

    transformers' own checkpointing wraps `forward` in some versions and `__call__` in others; from there a compiled
    layer could not choose what it keeps. Only `forward` is wrapped here, so FSDP's hooks stay outside of both. A layer
    that cannot be compiled whole is an error. The lengths of a packed batch are symbols to the compiler.
    """
    wrap = {"full": _recomputed, "selective": _recomputed_but_products}.get(config.activation_checkpointing)
    for layer in model.model.decoder_layers:
        forward = layer.forward
        if wrap:
            forward = wrap(forward)
        if config.compile:
            forward = torch.compile(forward, backend=backend, dynamic=True, fullgraph=True)
        layer.forward = forward


def before_micro_batch(model: nn.Module, config: ShardingConfig, *, last: bool) -> None:
    """Say what follows this micro-batch's backward pass; `last` in its optimizer step or not.

    gather="layer": weights are freed, and gradients are summed over the processes that share a copy at once, over the
    copies in the last. gather="step": weights and whole gradients stay, the latter in fp32, until the last. After the
    last one weights are always freed, so the next forward gathers what the optimizer made of them. A model that is not
    sharded has nothing to be told.
    """
    if not isinstance(model, FSDPModule):
        return
    at_once = last or config.gather == "layer"
    model.set_requires_gradient_sync(at_once)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(at_once)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed


def _recomputed_but_products(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy)  # here, or the compiler refuses it
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return recomputed


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator.name().partition(".")[0] in KEPT_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, gathered if it is sharded; every process takes part."""
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()


def _read(parameter: nn.Parameter, stored: Stored, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(parameter, DTensor):
        return stored.read().to(device, dtype, copy=True)
    dimension = parameter.device_mesh.ndim - 1  # copies come first, the processes that share one last
    processes, place = parameter.device_mesh.size(dimension), parameter.device_mesh.get_local_rank(dimension)
    rows_per_process = -(-parameter.shape[0] // processes)  # how FSDP2 cuts: torch.chunk along dimension 0
    start, stop = (min(number * rows_per_process, parameter.shape[0]) for number in (place, place + 1))
    filled = torch.empty_like(parameter, dtype=dtype, device=device, requires_grad=False)
    assert isinstance(filled, DTensor)
    filled.to_local().copy_(stored.read(start, stop))
    return filled


def _part_config(flag: str, folder: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model.{flag} {folder} holds no model that transformers knows: {error}") from error
    if config.model_type == AlignGPTConfig.model_type:
        raise ValueError(f"--model.{flag} {folder} holds an AlignGPT model; give that one to --model.init")
    return config
