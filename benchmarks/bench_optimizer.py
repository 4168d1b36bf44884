"""A step of AdamW on fp32 weights: `optim.make_optimizer` against torch's other forms, compiled, and apex's FusedAdam.

Weights are those of one decoder layer and the projector at 7B, the norms and biases among them without decay. What is
compared are the weights after three steps with different gradients, the third of which is timed when it is repeated.
Exact is AdamW as in its paper (arXiv 1711.05101, algorithm 2), written out here in float64. It must move 28 bytes a
weight: read it, its gradient and two moments, write all but the gradient.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import shapes
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs, peak_bytes
from benchmarks.work import ADAMW_BYTES, ADAMW_FLOPS
from training import optim
from training.config import OptimConfig

SETTINGS = OptimConfig(lr=1e-3, weight_decay=0.1)
STEPS = 3  # until weights are compared

Shapes = Mapping[str, tuple[int, ...]]


def weights_of(width: int, mlp: int, features: int) -> Shapes:
    """A decoder layer's and the projector's."""
    layer = "model.language_model.layers.0."
    return (
        {f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        | {f"{layer}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        | {f"{layer}mlp.down_proj.weight": (width, mlp)}
        | {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        | {f"{optim.PROJECTOR}linear_1.weight": (width, features), f"{optim.PROJECTOR}linear_1.bias": (width,)}
        | {f"{optim.PROJECTOR}linear_2.weight": (width, width), f"{optim.PROJECTOR}linear_2.bias": (width,)}
    )


class Trained(NamedTuple):
    weights: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]  # of each of two steps; the third has the first's


def make(device: torch.device, of: Shapes) -> Trained:
    def drawn(scale: float) -> dict[str, Tensor]:
        return {name: scale * torch.randn(shape, device=device) for name, shape in of.items()}

    return Trained(drawn(0.02), [drawn(1e-3), drawn(1e-2)])


Make = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


class Updates:
    def __init__(self, trained: Trained, make_optimizer: Make, *, compiled: bool = False):
        self.parameters = {name: nn.Parameter(weight.clone()) for name, weight in trained.weights.items()}
        optimizer = make_optimizer(list(self.parameters.items()))
        self.step: Callable[[], Any] = torch.compile(optimizer.step, dynamic=False) if compiled else optimizer.step
        for number in range(STEPS):
            for name, parameter in self.parameters.items():
                parameter.grad = trained.gradients[number % len(trained.gradients)][name]
            if number < STEPS - 1:
                self.step()

    def __call__(self) -> Outputs:
        self.step()
        return [parameter.detach() for parameter in self.parameters.values()]

    def details(self, trained: Trained, seconds: float) -> dict[str, Any]:
        """What a step needs beside the weights, which were there before."""

        def step() -> Outputs:
            self.step()
            return []

        return {"peak_bytes": peak_bytes(step, next(iter(self.parameters.values())).device)}


def ours(parameters: list[tuple[str, nn.Parameter]], kind: Any = "torch") -> torch.optim.Optimizer:
    return optim.make_optimizer(parameters, OptimConfig(kind=kind, lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay))


def torchs(parameters: list[tuple[str, nn.Parameter]], *, foreach: bool, on_device: bool = False) -> Any:
    """on_device: rate and step count are tensors, so that compiled code takes them as they change."""
    decay, no_decay = ([p for _, p in parameters if (p.ndim < 2) is small] for small in (False, True))
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": SETTINGS.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    rate: Any = torch.tensor(SETTINGS.lr, device=decay[0].device) if on_device else SETTINGS.lr
    return torch.optim.AdamW(
        groups, lr=rate, betas=SETTINGS.betas, eps=SETTINGS.eps, foreach=foreach, capturable=on_device
    )


def contender(make_optimizer: Make, **options: Any) -> Contender:
    compiled = options.pop("compiled", False)
    return Contender(
        lambda trained: Updates(trained, make_optimizer, compiled=compiled),
        details=lambda updates, *found: updates.details(*found),
        **options,
    )


def exact(trained: Trained) -> Outputs:
    (beta_1, beta_2), found = SETTINGS.betas, []
    for name, start in trained.weights.items():
        weight = start.double()
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        decay = SETTINGS.weight_decay if weight.ndim > 1 else 0.0
        for step in range(1, STEPS + 1):
            gradient = trained.gradients[(step - 1) % len(trained.gradients)][name].double()
            mean = beta_1 * mean + (1 - beta_1) * gradient
            square = beta_2 * square + (1 - beta_2) * gradient**2
            update = mean / (1 - beta_1**step) / ((square / (1 - beta_2**step)).sqrt() + SETTINGS.eps)
            weight = weight - SETTINGS.lr * (update + decay * weight)
        found.append(weight)
    return found


def case(of: Shapes, name: str) -> Case:
    weights = sum(torch.Size(shape).numel() for shape in of.values())
    for_loop = functools.partial(torchs, foreach=False)
    return Case(
        name=f"optimizer, {name}",
        make=lambda device: make(device, of),
        contenders={
            "ours": contender(ours),
            "AdamW, for-loop": contender(for_loop),
            "AdamW, foreach": contender(functools.partial(torchs, foreach=True)),
            "AdamW, torch.compile": contender(
                functools.partial(torchs, foreach=True, on_device=True), compiled=True, gpu_only=True
            ),
            "apex FusedAdam": contender(functools.partial(ours, kind="apex"), gpu_only=True),
        },
        exact=exact,
        plain=lambda trained: Updates(trained, for_loop)(),
        bytes=ADAMW_BYTES * weights,
        flops=ADAMW_FLOPS * weights,
        stage="optimizer",
        items=weights,
        unit="weights",
        group="optimizer",
        host=True,
        one_copy=True,
        trains=True,
    )


def cases() -> list[Case]:
    return [case(weights_of(shapes.WIDTH, 11008, shapes.FEATURES), "a decoder layer and the projector at 7B")]


def cpu_cases() -> list[Case]:
    return [case(weights_of(1024, 2752, 256), "a decoder layer and the projector, a quarter as wide")]


def small_cases() -> list[Case]:
    return [case(weights_of(32, 64, 16), "a decoder layer and the projector, 32 wide")]


def test_optimizer(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
