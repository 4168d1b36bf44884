"""AdamW over the trained weights, and the learning rate as a function of the step.

Trained weights and both moments are fp32; PyTorch's fused AdamW works on the shards where they lie. The rate is
computed from the step, so a checkpoint need not hold it.

Groups: the LLM and the rest, the projector, the gate with the table; each has its own peak rate, and is split into what
decays and what does not. What has one dimension does not decay: biases and the weights of norms are all there is of
that kind, and pulling them to zero shrinks no matrix. Matrices do, embeddings, adapters and the alignment table among
them, as in transformers' Trainer and LLaVA, which leave out biases and norms by name.

apex's FusedAdam does the same arithmetic. It takes no sharded weights, so a run with it is one process whose model is
not cut up.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from training.config import NO_SHARDS_IN_APEX, OptimConfig

PROJECTOR = "model.multi_modal_projector."
ALIGN = ("model.align_gate.", "model.align_table")


def make_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW for every parameter that takes a gradient, in groups that have a `peak_lr`; see above.

    Raises:
        ValueError: apex is to step weights that are sharded.
    """
    kinds: list[tuple[str | tuple[str, ...], float | None]] = [
        (PROJECTOR, config.projector_lr),
        (ALIGN, config.align_lr),
        ("", config.lr),
    ]
    members: list[tuple[list[nn.Parameter], list[nn.Parameter]]] = [([], []) for _ in kinds]
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            kind = next(index for index, (start, _) in enumerate(kinds) if name.startswith(start))
            members[kind][parameter.ndim < 2].append(parameter)
    groups = []
    for index in (2, 0, 1):  # a logged rate is that of the first group
        own_lr = kinds[index][1]
        lr = config.lr if own_lr is None else own_lr
        for parameters, decay in zip(members[index], (config.weight_decay, 0.0), strict=True):
            if parameters:
                groups.append({"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay})
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.kind == "apex":
        return _fused_adam(groups, settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def _fused_adam(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        raise ValueError(f"--optim.kind is 'apex'; {NO_SHARDS_IN_APEX}")
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, **settings, adam_w_mode=True)


def rate(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Share of the peak rate for step 0, 1, …: linear warm-up over ceil(ratio · total) steps, then half a cosine.

    transformers' schedule moved on by one step: the first step has a rate above 0, instead of being spent on none.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group `share` of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]
