"""The learning rate's schedule and the groups of AdamW. The steps themselves are compared in test_loop.py."""

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from training.config import OptimConfig
from training.optim import make_optimizer, rate, set_rate


@pytest.mark.parametrize(("total", "ratio"), [(100, 0.03), (20, 0.03), (7, 0.5), (5, 0.0), (1, 0.03)])
def test_rate_is_transformers_cosine_one_step_on_while_it_rises(total: int, ratio: float) -> None:
    warmup = -(-total * ratio // 1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(warmup), total)
    theirs = [schedule.lr_lambdas[0](step) for step in range(total + 1)]
    ours = [rate(step, total, ratio) for step in range(total)]
    assert ours == pytest.approx([theirs[step + 1] if step < warmup else theirs[step] for step in range(total)])
    assert min(ours) > 0
    assert max(ours) == 1


def test_projector_has_its_own_rate_and_frozen_weights_have_none() -> None:
    model = nn.ModuleDict({"multi_modal_projector": nn.Linear(2, 2), "language_model": nn.Linear(2, 2)})
    model["language_model"].bias.requires_grad_(False)
    named = [(f"model.{name}", parameter) for name, parameter in model.named_parameters()]
    optimizer = make_optimizer(named, OptimConfig(lr=1e-2, projector_lr=1e-3))
    set_rate(optimizer, 0.5)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates == {
        model["multi_modal_projector"].weight: 5e-4,
        model["multi_modal_projector"].bias: 5e-4,
        model["language_model"].weight: 5e-3,
    }
