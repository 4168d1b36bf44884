"""AdamW over the trained weights, and the learning rate as a function of the step.

Trained weights and both moments are fp32; PyTorch's fused AdamW works on the shards where they lie. The rate is
computed from the step, so a checkpoint need not hold it.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from training.config import OptimConfig

PROJECTOR = "model.multi_modal_projector."


def make_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW for every parameter that takes a gradient; the projector's group has its own peak rate if one is given."""
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    projector = [parameter for name, parameter in trained if name.startswith(PROJECTOR)]
    others = [parameter for name, parameter in trained if not name.startswith(PROJECTOR)]
    projector_lr = config.lr if config.projector_lr is None else config.projector_lr
    groups = [
        {"params": parameters, "lr": lr, "peak_lr": lr}
        for parameters, lr in ((others, config.lr), (projector, projector_lr))
        if parameters
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


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
