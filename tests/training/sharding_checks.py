"""Run by test_sharding.py: `sharding_checks.py FOLDER RUNS`, over four processes that are forked from this one.

Each model in FOLDER/<name>/llm and FOLDER/<name>/vision is built without weights, cut over the processes and filled;
then compared with the same model as transformers loads it: every buffer, every weight, the logits, and what each
process read from the files. The first one is also trained in each way of sharding and compared with a plain loop in
one process. Last comes a whole run in two copies of two processes, and the same in this process alone, into RUNS/4 and
RUNS/1; its flags are read from RUNS/flags.
"""

import dataclasses
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from aligngpt.config import AlignGPTConfig
from aligngpt.model import AlignGPTForConditionalGeneration
from training import sharding
from training.config import ModelConfig, OptimConfig, ShardingConfig, TrainedPart, read_command_line
from training.loop import train
from training.optim import make_optimizer

PROCESSES = 4
SEED = 7
STEPS, MICRO_BATCHES = 2, 2
ALL: tuple[TrainedPart, ...] = ("llm", "projector", "gate", "table")
OPTIM = OptimConfig(lr=1e-2, eps=1e-3)  # at a small eps a weight whose gradient is rounding error moves as far as any


class Counted:
    """A stored tensor that counts the elements it hands out."""

    read_elements = 0

    def __init__(self, stored: sharding.Stored):
        self.stored, self.shape, self.dtype = stored, stored.shape, stored.dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        rows = self.stored.read(start, stop)
        Counted.read_elements += rows.numel()
        return rows


def plain(folder: Path) -> AlignGPTForConditionalGeneration:
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32)
    return AlignGPTForConditionalGeneration.from_parts(llm, folder / "vision", seed=SEED)


def sharded(
    folder: Path,
    world: sharding.World,
    config: ShardingConfig,
    trained: tuple[TrainedPart, ...],
    dtype: torch.dtype = torch.float32,
) -> AlignGPTForConditionalGeneration:
    parts = ModelConfig(llm=str(folder / "llm"), vision=str(folder / "vision"))
    model_config = sharding.starting_config(parts, image_aspect_ratio="pad")
    stored = sharding.starting_weights(parts, model_config, seed=SEED)
    weights = {name: Counted(tensor) for name, tensor in stored.items()}
    model = sharding.build(model_config)
    assert all(parameter.is_meta for parameter in model.parameters())
    sharding.freeze(model, trained)
    sharding.shard(model, world.mesh, config, compute_dtype=dtype)
    Counted.read_elements = 0
    sharding.fill(model, weights, world, compute_dtype=dtype, source=str(folder))
    sharding.prepare_layers(model, config)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_filled(folder: Path, world: sharding.World) -> None:
    reference = plain(folder)
    model = sharded(folder, world, ShardingConfig(), ("llm", "projector", "gate")).eval()
    buffers, wanted = dict(model.named_buffers()), dict(reference.named_buffers())
    assert buffers.keys() == wanted.keys()
    for name, buffer in wanted.items():
        assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(buffers[name], buffer), name

    tied = sharding.tied_names(model)
    assert sorted(map(sorted, tied.values())) == sorted(map(sorted, sharding.tied_names(reference).values()))
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in tied)
    assert Counted.read_elements == held
    cut = sum(parameter.numel() for parameter in tied if isinstance(parameter, DTensor))
    rounding = sum(parameter[0].numel() for parameter in tied if isinstance(parameter, DTensor))
    tower = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    assert held - tower <= cut / world.mesh.size(world.mesh.ndim - 1) + rounding
    state = dict(reference.named_parameters())
    for parameter, (name, *_) in tied.items():
        assert torch.equal(whole(parameter), state[name]), name

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (2, 9), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)


def micro_batch(config: AlignGPTConfig, step: int, number: int, rank: int) -> dict[str, Any]:
    """Two samples of a length of their own; now and then a process has text alone."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * number + rank)
    ids = torch.randint(3, 300, (2, 12 + 3 * rank + number), generator=generator)
    images = 0 if (rank + number) % 4 == 3 else 2
    ids[:, 0] = 1
    if images:
        ids[:, 1] = config.align_token_id
        ids[:, 3 : 3 + config.image_seq_length] = config.image_token_id
    size = config.vision_config.image_size
    pixels = torch.randn(images, 3, size, size, generator=generator)
    labels = torch.where(torch.arange(ids.shape[1]) < 8, -100, ids)
    return {"input_ids": ids, "pixel_values": pixels, "labels": labels, "attention_mask": torch.ones_like(ids)}


def tokens(step: int, config: AlignGPTConfig, ranks: Iterable[int]) -> int:
    batches = (micro_batch(config, step, number, rank) for rank in ranks for number in range(MICRO_BATCHES))
    return sum(int((batch["labels"] != -100).sum()) for batch in batches)


@dataclasses.dataclass
class Trained:
    losses: list[float]
    gradients: list[dict[str, Tensor]]  # of each step
    weights: dict[str, Tensor]


def steps(
    model: Any,
    config: ShardingConfig | None,
    ranks: list[int],
    world: sharding.World,
    *,
    number_of_steps: int = STEPS,
) -> Trained:
    """The micro-batches of `ranks`, one after the other; with a config as the loop does it, else plainly."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(named.items(), OPTIM)
    losses, gradients = [], []
    for step in range(number_of_steps):
        total = torch.zeros(())
        count = tokens(step, model.config, range(world.size))
        for rank in ranks:
            for number in range(MICRO_BATCHES):
                if config:
                    sharding.before_micro_batch(model, config, last=number == MICRO_BATCHES - 1)
                batch = micro_batch(model.config, step, number, rank)
                items = count / world.size if config else count
                loss = model(**batch, num_items_in_batch=items, use_cache=False).loss
                loss.backward()
                total += loss.detach()
        if config:
            assert all(isinstance(getattr(*_place(model, name)), DTensor) for name in named), "weights were not freed"
            assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
            (summed,) = world.add(total.item())
            total = torch.tensor(summed / world.size)
        losses.append(total.item())
        gradients.append({name: whole(parameter.grad).clone() for name, parameter in named.items()})
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, gradients, {name: whole(parameter.detach()).clone() for name, parameter in named.items()})


def _place(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance of two tensors, as a share of the second."""
    assert ours.keys() == theirs.keys()
    return max(
        (torch.linalg.norm(ours[n] - theirs[n]) / torch.linalg.norm(theirs[n]).clamp(min=1e-8)).item() for n in ours
    )


def check_trained(folder: Path, world: sharding.World, copies: sharding.World) -> None:
    model = plain(folder).train()
    sharding.freeze(model, ALL)
    reference = steps(model, None, list(range(world.size)), world)
    for where, gather, kept in (
        (copies, "layer", "full"),
        (world, "step", "selective"),
        (copies, "step", "none"),
    ):
        config = ShardingConfig(gather=gather, activation_checkpointing=kept)  # type: ignore[arg-type]
        ours = steps(sharded(folder, where, config, ALL), config, [world.rank], world)
        for step in range(STEPS):
            assert abs(ours.losses[step] / reference.losses[step] - 1) <= 1e-6
            assert apart(ours.gradients[step], reference.gradients[step]) <= 1e-6
        assert apart(ours.weights, reference.weights) <= 1e-6

    # bf16: gradients of micro-batches are summed in fp32, however long they stay; a sum in bf16 would be 1e-3 off.
    stage_1: tuple[TrainedPart, ...] = ("projector", "table")
    for trained in (ALL, stage_1):
        first = None
        for where, gather in ((world, "layer"), (copies, "step")):
            config = ShardingConfig(gather=gather)  # type: ignore[arg-type]
            model = sharded(folder, where, config, trained, torch.bfloat16)
            assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
            (gradients,) = steps(model, config, [world.rank], world, number_of_steps=1).gradients
            assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
            first = first or gradients
            assert apart(gradients, first) <= 1e-6


def in_process(rank: int, ports: list[int], folder: Path, flags: list[str]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    with sharding.world() as world:
        copies = dataclasses.replace(world, mesh=sharding.make_mesh(world.device, world.size, 2))
        for case in sorted(folder.iterdir()):
            check_filled(case, world)
        check_filled(folder / "0", copies)
        check_trained(folder / "0", world, copies)
    os.environ["MASTER_PORT"] = str(ports[1])
    train(read_command_line("finetune", flags), "finetune")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    cases, runs = map(Path, sys.argv[1:])
    flags = (runs / "flags").read_text().splitlines()
    copies = [*flags, "--sharding.size", "2", "--sharding.gather", "step", "--run-dir", str(runs / "4")]
    ports = [free_port(), free_port()]
    mp.start_processes(in_process, (ports, cases, copies), nprocs=PROCESSES, start_method="fork")
    train(read_command_line("finetune", [*flags, "--run-dir", str(runs / "1")]), "finetune")
