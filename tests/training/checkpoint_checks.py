"""Run by test_checkpoints.py: `checkpoint_checks.py FOLDER`, what needs several processes, forked as in kill_saves.py.

Each check is a function of the world that all processes run; its name is printed when all have passed it.
"""

import errno
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kill_saves import ended, make_model, start, take_step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from training import checkpoints
from training.checkpoints import Checkpoints, SaveError
from training.config import TrainConfig
from training.sharding import World


def write(config: TrainConfig, world: World) -> None:
    """Checkpoints of the steps 1 to 3, and beside them what the third holds, gathered."""
    model, optimizer = make_model(world)
    with Checkpoints(config, model, optimizer, world) as saves:
        for step in range(3):
            take_step(model, optimizer, step, saves)
            saves.save(step + 1, {})
    gathered = whole(model, optimizer)
    if world.rank == 0:
        torch.save(gathered, Path(config.run_dir) / "whole.pt")


def read(config: TrainConfig, world: World) -> None:
    """By any number of processes, whatever number wrote it."""
    model, optimizer = make_model(world)
    saved = checkpoints.find(config, world)
    assert saved is not None
    assert saved.step == 3
    checkpoints.load(saved, model, optimizer)
    found, wanted = whole(model, optimizer), torch.load(Path(config.run_dir) / "whole.pt")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    num_bytes = sum(path.stat().st_size for path in saved.folder.glob("*.distcp"))
    held = sum(tensor.nbytes for tensor in wanted.values())
    assert held < num_bytes < 1.5 * held, f"{num_bytes} bytes for {held}: copies are written once"


def write_copies(config: TrainConfig, world: World) -> None:
    """HSDP: two copies of the model, each cut in two."""
    write(config, with_copies(world))


def read_copies(config: TrainConfig, world: World) -> None:
    read(config, with_copies(world))


def one_disk_is_full(config: TrainConfig, world: World) -> None:
    """That of the second process; the first one, which had no problem, raises the same and goes on from step 3."""
    model, optimizer = make_model(world)
    saved = checkpoints.find(config, world)
    assert saved is not None
    checkpoints.load(saved, model, optimizer)
    if world.rank == 1:
        checkpoints._Writer.write_data = no_space  # type: ignore[method-assign]
    said = None
    try:
        with Checkpoints(config, model, optimizer, world, after=saved) as saves:
            saves.save(4, {})
    except SaveError as error:
        said = str(error)
    first, second = world.gather(said)
    assert first == second
    assert "whose disk is full" in first
    assert "the one before, step-00000003, is whole" in first
    assert sorted(path.name for path in saved.folder.parent.iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoints.find(config, world) == saved


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fall_back(config: TrainConfig, world: World) -> None:
    """A byte that one of the processes finds wrong sends both to the checkpoint before."""
    run = Path(config.run_dir)
    if world.rank == 0:
        shard = run / "checkpoints/step-00000003/__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    world.add(0)
    saved = checkpoints.find(config, world)
    assert saved is not None
    assert saved.step == 2


def with_copies(world: World) -> World:
    return replace(world, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = checkpoints._tensors(model, optimizer)
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def main() -> None:
    torch.set_num_threads(1)
    logging.disable()
    checks: tuple[tuple[str, int, Callable[[TrainConfig, World], None]], ...] = (
        ("one", 1, write),
        ("one", 1, read),
        ("one", 2, read),
        ("two", 2, write),
        ("two", 2, read),
        ("two", 1, read),
        ("two", 2, one_disk_is_full),
        ("two", 2, fall_back),
        ("copies", 4, write_copies),
        ("copies", 4, read_copies),
        ("copies", 2, read),
    )
    for folder, processes, check in checks:
        config = TrainConfig(run_dir=str(Path(sys.argv[1]) / folder))
        (Path(config.run_dir) / "checkpoints").mkdir(parents=True, exist_ok=True)
        assert [ended(pid) for pid in start(processes, partial(check, config))] == [0] * processes, check.__name__
        print(folder, processes, check.__name__, flush=True)


if __name__ == "__main__":
    main()
