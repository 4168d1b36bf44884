"""A checkpoint of trained weights and AdamW's moments: until it is on the disk, and how long it holds a step up.

Ours is `Checkpoints.save`, which copies to host memory in a thread, writes, hashes and renames there. Against it:
`torch.save` of the same tensors, synced to the disk; torch.distributed.checkpoint (DCP) as it comes, which syncs too;
and its `async_save`. The weights are sharded over a world of one, as in training. `us` is the time until everything is
on the disk, `held_us` until the next step may change the weights. Each must give back the same bits when it is read.
A checkpoint is read from the device once and written to the disk once; ours is read once more, to hash it. All keep the
last one alone, and the time has the removal of the one before in it.
"""

import dataclasses
import itertools
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.bench_optimizer import Shapes, weights_of
from benchmarks.bench_step import Folder, world_of_one
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs, count_syncs, synchronize
from training import checkpoints, optim
from training.checkpoints import Checkpoints
from training.config import OptimConfig, TrainConfig

HELD_ROUNDS = 3


class State(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer  # after a step
    folder: Folder

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name; DTensors but for the counts of steps."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.detach()
            found |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return found

    def of(self, contender: str) -> Path:
        return self.folder.path / contender


def make(device: torch.device, of: Shapes) -> State:
    model = nn.Module()
    for number, shape in enumerate(of.values()):
        model.register_parameter(f"weight_{number}", nn.Parameter(torch.randn(shape, device=device)))
    fully_shard(model, mesh=world_of_one().mesh)
    optimizer = optim.make_optimizer(model.named_parameters(), OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        local(parameter.grad).normal_()
    optimizer.step()
    optimizer.zero_grad()
    return State(model, optimizer, Folder())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: dict[str, Tensor]) -> Outputs:
    return [local(tensor) for tensor in tensors.values()]


class Saving:
    def __init__(self, hold: Callable[[], Any], finish: Callable[[], Any] = lambda: None):
        self.hold = hold  # returns when the next step may go on
        self.finish = finish  # returns when all is on the disk

    def __call__(self) -> Outputs:
        self.hold()
        self.finish()
        return []

    def details(self, state: State, seconds: float) -> dict[str, Any]:
        device, held = world_of_one().device, []
        for _ in range(HELD_ROUNDS):
            synchronize(device)
            started = time.perf_counter()
            self.hold()
            synchronize(device)
            held.append(time.perf_counter() - started)
            self.finish()
        return {"held_us": round(1e6 * statistics.median(held), 1), "syncs": count_syncs(self, device)}


# ------------------------------------------------------------------------------------------------ who saves, and reads


def config_of(state: State) -> TrainConfig:
    return TrainConfig(run_dir=str(state.of("ours")), keep_last=1)


def ours(state: State) -> Saving:
    saves = Checkpoints(config_of(state), state.model, state.optimizer, world_of_one())
    numbers = itertools.count(1)

    def hold() -> None:
        saves.save(next(numbers), {})
        saves.wait_staged()

    return Saving(hold, saves.wait)


def read_ours(state: State, outputs: Outputs) -> Outputs:
    saved = checkpoints.find(config_of(state), world_of_one())
    assert saved is not None
    device = world_of_one().device
    other = make(device, {name: tuple(weight.shape) for name, weight in state.model.named_parameters()})
    checkpoints.load(saved, other.model, other.optimizer)
    return locals_of(other.tensors())


def torch_save(state: State) -> Saving:
    path, tensors = state.of("torch.save"), state.tensors()

    def hold() -> None:
        with path.open("wb") as file:
            torch.save({name: local(tensor) for name, tensor in tensors.items()}, file)
            file.flush()
            os.fsync(file.fileno())

    return Saving(hold)


def read_torch_save(state: State, outputs: Outputs) -> Outputs:
    return list(torch.load(state.of("torch.save"), weights_only=True).values())


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def dcp_save(state: State) -> Saving:
    tensors = state.tensors()
    return Saving(lambda: dcp.save(dict(tensors), checkpoint_id=emptied(state.of("DCP"))))


def dcp_async(state: State) -> Saving:
    tensors, pending = state.tensors(), []

    def hold() -> None:
        pending.append(dcp.async_save(dict(tensors), checkpoint_id=emptied(state.of("DCP, async"))))

    def finish() -> None:
        saved: Any = pending.pop()
        saved.result()

    return Saving(hold, finish)


def read_dcp(name: str) -> Callable[[State, Outputs], Outputs]:
    def read(state: State, outputs: Outputs) -> Outputs:
        tensors = {key: torch.zeros_like(tensor) for key, tensor in state.tensors().items()}
        dcp.load(tensors, checkpoint_id=state.of(name))
        return locals_of(tensors)

    return read


def contender(prepare: Callable[[State], Saving], read: Callable[[State, Outputs], Outputs]) -> Contender:
    return Contender(prepare, read, details=lambda saving, *found: saving.details(*found))


def case(of: Shapes) -> Case:
    weights = sum(torch.Size(shape).numel() for shape in of.values())
    saved = 12 * weights + 4 * len(of)  # weight and two moments in fp32, and a count of steps
    return Case(
        name=f"checkpoint, {saved / 1e6:.3g} MB",
        make=lambda device: make(device, of),
        contenders={
            "ours": contender(ours, read_ours),
            "torch.save": contender(torch_save, read_torch_save),
            "DCP": contender(dcp_save, read_dcp("DCP")),
            "DCP, async": contender(dcp_async, read_dcp("DCP, async")),
        },
        exact=lambda state: locals_of(state.tensors()),
        plain=lambda state: locals_of(state.tensors()),
        bytes=2 * saved,
        stage="checkpoint",
        clock="host",
        items=saved,
        unit="bytes",
        group="checkpoint",
        memory=True,
        equal=True,
        one_copy=True,
        rounds=5,
        trains=True,
    )


def cases() -> list[Case]:
    return [case(weights_of(2048, 5504, 1024))]


def cpu_cases() -> list[Case]:
    return [case(weights_of(512, 1376, 256))]


def small_cases() -> list[Case]:
    return [dataclasses.replace(case(weights_of(32, 64, 16)), rounds=2)]


def test_checkpoint(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
