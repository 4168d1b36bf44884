"""Processes beside this one: a group that does the same work on request, and a fresh one to measure memory in.

    with Group(2, make_work) as group:
        group()         what each process's work returned, in the order of their ranks

`make_work()` is called once in each process, with torchrun's variables in the environment, and gives what each request
calls. All come from a server process (multiprocessing's forkserver) that has imported what they need, so that a group
starts in a moment and no thread or memory of this process is in it. Each has one thread.

A process that dies, raises, or says nothing for `timeout` seconds is an error that names it. The others may wait in a
collective for it, so all are killed then; the group is closed and can't be used again.
"""

import contextlib
import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple

from training.calibrate import free_port

PRELOADED = ("benchmarks.bench_step", "aligngpt.data.shards")
TIMEOUT = 120.0  # seconds; the first of all processes imports what is preloaded
LEAVE = 10.0  # seconds in which processes end by themselves

Work = Callable[[], Any]
_context = multiprocessing.get_context("forkserver")


class _Process(NamedTuple):
    process: Any
    pipe: Connection


class Group:
    """`size` processes; a context, or closed by hand."""

    def __init__(self, size: int, make_work: Callable[[], Work], *, timeout: float = TIMEOUT):
        self.size, self.timeout = size, timeout
        self._processes: list[_Process] = []
        _context.set_forkserver_preload(list(PRELOADED))
        port = str(free_port())
        for rank in range(size):
            ours, theirs = _context.Pipe()
            places = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
            }
            environment = places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = _context.Process(target=_serve, args=(theirs, make_work, environment), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(_Process(process, ours))
        self._replies("to come together")

    def __call__(self) -> list[Any]:
        """Have each do its work once; what they return."""
        if not self._processes:
            raise RuntimeError("the group is closed")
        for one in self._processes:
            with contextlib.suppress(OSError):  # it is dead, which waiting tells
                one.pipe.send(True)
        return self._replies("to do its work")

    def _replies(self, what: str) -> list[Any]:
        replies: dict[int, Any] = {}
        ranks = {one.pipe: rank for rank, one in enumerate(self._processes)}
        while len(replies) < self.size:
            waiting = [pipe for pipe, rank in ranks.items() if rank not in replies]
            ready = wait(waiting, self.timeout)
            if not ready:
                silent = ", ".join(str(ranks[pipe]) for pipe in waiting)
                self._fail(f"process {silent} of {self.size} had {self.timeout:g} s {what}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = ranks[pipe]
                try:
                    ok, replies[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    self._processes[rank].process.join(LEAVE)
                    self._fail(self._ended(rank, what))
                if not ok:  # perhaps because it missed one that is dead
                    gone = [other for other in ranks.values() if self._processes[other].process.exitcode]
                    ended = "".join(f"{self._ended(other, what)}\n" for other in gone)
                    self._fail(f"{ended}process {rank} of {self.size} failed; it was {what}:\n{replies[rank]}")
        return [replies[rank] for rank in range(self.size)]

    def _ended(self, rank: int, what: str) -> str:
        return (
            f"process {rank} of {self.size} ended with status {self._processes[rank].process.exitcode}; it was {what}"
        )

    def _fail(self, sentence: str) -> None:
        for one in self._processes:
            one.process.kill()
        self.close()
        raise RuntimeError(sentence)

    @property
    def is_open(self) -> bool:
        return bool(self._processes)

    def close(self) -> None:
        """End the processes, those that do not end by themselves too."""
        for one in self._processes:
            one.pipe.close()  # for which they end
        for one in self._processes:
            one.process.join(LEAVE)
            if one.process.exitcode is None:
                one.process.kill()
                one.process.join()
            one.process.close()
        self._processes = []

    def __enter__(self) -> "Group":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def alone(work: Work, *, timeout: float = TIMEOUT) -> Any:
    """What `work()` returns in a process of its own."""
    with Group(1, _Always(work), timeout=timeout) as group:
        return group()[0]


class _Always:
    """A function that gives what it was made of; it can be pickled."""

    def __init__(self, work: Work):
        self.work = work

    def __call__(self) -> Work:
        return self.work


def _serve(pipe: Connection, make_work: Callable[[], Work], environment: dict[str, str]) -> None:
    import torch

    gc.freeze()  # what the server has imported: no collection touches its pages
    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        work = make_work()
        pipe.send((True, None))
        while pipe.recv():
            pipe.send((True, work()))
    except (EOFError, ConnectionError):  # nobody asks any more
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))
