"""`with_faults.py FAULTS STAGE PRESET …` is `training/STAGE.py PRESET …` on two processes in which something happens.

torchrun's own agent runs them, with a restart for every signal in FAULTS, and forks them, which saves their imports.
FAULTS is a JSON list of [life, rank, step, fault]: in its life 0, 1, … process `rank` meets the fault while it computes
the loss of step `step` (from 1).

    kill           SIGKILL to itself, once the save that is under way is on the disk
    terminate      SIGTERM to itself, and again whenever it renames a file after that, which is when a save ends
    nan            the loss is NaN
    nan gradient   one element of this process's part of a gradient is

Each process prints, for every step before it changes the weights, `life … rank … step … weights …` with a digest of
this process's weights and moments.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

from aligngpt.model import AlignGPTForConditionalGeneration
from training import loop  # noqa: F401 - imported before the fork
from training.entry import run
from training.guard import Guard

SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}
faults: dict[int, str] = {}  # of this process, by step
optimizers: list[torch.optim.Optimizer] = []
hooks: list[torch.utils.hooks.RemovableHandle] = []
now = {"step": 0, "met": 0}  # met: the step whose fault has happened
forward, check, make = AlignGPTForConditionalGeneration.forward, Guard.check, torch.optim.Optimizer.__init__


def terminate_again(event: str, _: Any) -> None:
    if event == "os.rename" and faults.get(now["met"]) == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)


def forward_with_faults(self: Any, *args: Any, **inputs: Any) -> Any:
    fault = faults.get(now["step"]) if now["met"] != now["step"] else None
    if fault:
        now["met"] = now["step"]
    if fault == "nan gradient":
        (optimizer,) = optimizers  # it has the parts of the weights that this process keeps
        hooks.append(optimizer.param_groups[0]["params"][0].register_post_accumulate_grad_hook(spoil))
    output = forward(self, *args, **inputs)
    if fault == "nan":
        output.loss = output.loss * torch.nan
    elif fault in SIGNALS:
        for thread in threading.enumerate():
            if fault == "kill" and thread.name == "checkpoint":
                thread.join()
        os.kill(os.getpid(), SIGNALS[fault])
    return output


def spoil(parameter: torch.Tensor) -> None:
    assert isinstance(parameter.grad, DTensor)
    parameter.grad.to_local().view(-1)[5] = torch.nan
    hooks.pop().remove()


def digest() -> str:
    found = hashlib.sha256()
    (optimizer,) = optimizers
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for tensor in (parameter, *optimizer.state[parameter].values()):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found.update(local.detach().numpy().tobytes())
    return found.hexdigest()[:16]


def check_and_say(self: Guard, step: int, *args: Any, **more: Any) -> bool:
    place = f"life {os.environ['TORCHELASTIC_RESTART_COUNT']} rank {os.environ['RANK']}"
    print(f"{place} step {step} weights {digest()}\n", end="", flush=True)
    now["step"] = step + 1
    return check(self, step, *args, **more)


def make_guard(self: Guard, *args: Any, first_step: int, **more: Any) -> None:
    now["step"] = first_step + 1
    init(self, *args, first_step=first_step, **more)


def make_optimizer(self: torch.optim.Optimizer, *args: Any, **more: Any) -> None:
    optimizers.append(self)
    make(self, *args, **more)


def work(stage: Any, all_faults: list[tuple[int, int, int, str]]) -> None:
    place = tuple(int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    faults.update({step: fault for *where, step, fault in all_faults if tuple(where) == place})
    run(stage)


if __name__ == "__main__":
    all_faults, stage = json.loads(sys.argv.pop(1)), sys.argv.pop(1)
    init = Guard.__init__
    for cls, name, function in (
        (AlignGPTForConditionalGeneration, "forward", forward_with_faults),
        (Guard, "check", check_and_say),
        (Guard, "__init__", make_guard),
        (torch.optim.Optimizer, "__init__", make_optimizer),
    ):
        setattr(cls, name, function)
    sys.addaudithook(terminate_again)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=sum(fault in SIGNALS for *_, fault in all_faults),
        start_method="fork",
    )
    elastic_launch(settings, work)(stage, all_faults)
