"""Kill processes that save checkpoints, at random moments, and see that nothing is lost: faults 43 and 44.

    python tests/training/kill_saves.py --times 200 --processes 1 2

A small sharded model trains and saves all the time, through the same classes as a run. It is killed (SIGKILL; of two
processes one or both), started again, killed again, so many times for each number of processes. Each start checks
what it goes on from: the checkpoint is whole, at most one interval older than the last step that was to be saved, and
equal to the bit to what was in memory at that step; steps taken again give the same bits again; no .tmp is left from
before. Where one of two is killed, the other has to end by itself within a minute. Ends with status 1 at the first
thing that is wrong.

Processes are forked from one that has imported everything, so that a kill takes a fraction of a second.
"""

import argparse
import hashlib
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from training import checkpoints, sharding
from training.checkpoints import Checkpoints
from training.config import TrainConfig
from training.run_folder import create_run

INTERVAL = 2  # steps between two saves
KILL_WITHIN_SECONDS = 0.25  # after the first save has begun: several saves
ENDS_WITHIN_SECONDS = 60  # a process whose neighbour is dead


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200, help="kills, for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process that has threads cannot be forked
    logging.disable()  # what a process says whose neighbour is gone
    for size in args.processes:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            within = kill_often(Path(folder), size, args.times, random.Random(f"{args.seed} {size}"))
            last = (Path(folder) / "run/LATEST").read_text().strip()
        print(
            f"{size} process{'es' if size > 1 else ''}: {args.times} kills, {within} of them while a checkpoint was "
            f"being written; nothing was lost up to {last}; {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    return 0


def kill_often(folder: Path, size: int, times: int, rng: random.Random) -> int:
    """Returns how many kills left a half-written checkpoint."""
    within = 0
    for _ in range(times):
        begun, told = os.pipe()
        processes = start(size, partial(train, folder, told))
        os.close(told)
        if not os.read(begun, 1):
            raise SystemExit(f"a process ended before its first save: {[os.waitpid(pid, 0) for pid in processes]}")
        os.close(begun)
        time.sleep(rng.uniform(0, KILL_WITHIN_SECONDS))
        victims = rng.choice([processes, *([pid] for pid in processes)])
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for pid in processes:
            status = ended(pid)
            if pid in victims and status != -signal.SIGKILL:
                raise SystemExit(f"a process ended by itself with status {status}")
        within += any((folder / "run/checkpoints").glob("*.tmp"))
    for pid in start(size, partial(train, folder, None)):
        if ended(pid) != 0:
            raise SystemExit("the last start was no success")
    return within


def start(size: int, body: Callable[[sharding.World], None]) -> list[int]:
    """Fork processes that do `body` together; they end with status 1 where it raises an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            be_a_process(rank, size, port, body)
        processes.append(pid)
    return processes


def ended(pid: int) -> int:
    """The exit status of a process that has to end."""
    deadline = time.monotonic() + ENDS_WITHIN_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise SystemExit(f"a process went on for {ENDS_WITHIN_SECONDS} s after another one was killed")


def be_a_process(rank: int, size: int, port: int, body: Callable[[sharding.World], None]) -> NoReturn:
    """A child's whole life."""
    status = 1
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all on the CPU
        if size > 1:
            place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in place.items()}
        with sharding.world() as world:
            body(world)
        status = 0
    except Exception as error:
        if not isinstance(error, RuntimeError):  # its neighbour was killed
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def train(folder: Path, told: int | None, world: sharding.World) -> None:
    """A run that goes on from its checkpoint and saves for ever, or once if there is nobody to be told."""
    config = TrainConfig(run_dir=str(folder / "run"), keep_last=2)
    model, optimizer = make_model(world)
    log = Log(folder / f"log-{world.rank}")
    saved = checkpoints.find(config, world)
    step = saved.step if saved else 0
    if saved:
        checkpoints.load(saved, model, optimizer)
        log.check(step, digest(model, optimizer))
        assert saved.extra == {"twice": 2 * step}, f"step {step} has {saved.extra}"
    assert step >= log.asked - INTERVAL, f"step {log.asked} was to be saved, the checkpoint is of step {step}"
    lock = create_run(config, "pretrain") if world.rank == 0 else None
    world.add(0)
    left = list((folder / "run").rglob("*.tmp"))
    assert not left, f"left from before: {left}"
    with Checkpoints(config, model, optimizer, world, after=saved) as saves:
        while True:
            take_step(model, optimizer, step, saves)
            step += 1
            if step % INTERVAL == 0:
                log.check(step, digest(model, optimizer))
                saves.save(step, {"twice": 2 * step})
                log.write(f"asked {step}")
                if told is None:
                    break
                os.write(told, b".")
    if lock is not None:
        lock.close()
        folders = {path.name for path in (folder / "run/checkpoints").iterdir()}
        assert folders == {f"step-{step - back:08d}" for back in (0, INTERVAL)}, folders


def make_model(world: sharding.World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A few sharded layers; the last bias has one element, so that a second process holds nothing of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 1))
    for layer in model:
        fully_shard(layer, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, saves: Checkpoints) -> None:
    torch.manual_seed(step)
    model(torch.randn(4, 64)).square().sum().backward()
    saves.wait_staged()
    optimizer.step()
    optimizer.zero_grad()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A hash of this process's weights and moments."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        held: list[Any] = [parameter, *optimizer.state[parameter].values()]
        for tensor in held:
            part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            found.update(part.detach().numpy().tobytes())
    return found.hexdigest()


class Log:
    """What one process of all starts has done: a hash for each step, and which step was to be saved last."""

    def __init__(self, path: Path):
        self.file = path.open("a+")
        self.file.seek(0)
        lines = [line.split() for line in self.file]
        self.digests = {int(line[1]): line[2] for line in lines if line[0] == "step"}
        self.asked = max((int(line[1]) for line in lines if line[0] == "asked"), default=0)

    def check(self, step: int, found: str) -> None:
        """Take down the hash of a step; it has to be the one that it had before, if it had one."""
        assert self.digests.setdefault(step, found) == found, f"step {step} is not what it was"
        self.write(f"step {step} {found}")

    def write(self, line: str) -> None:
        self.file.write(line + "\n")
        self.file.flush()


if __name__ == "__main__":
    sys.exit(main())
