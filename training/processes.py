"""How a run's processes end together: when they are told to, and when one of them is gone.

SIGTERM. Inside `Stop` it sets a flag and does no more, however often it comes: a save is never cut short. The loop adds
the flags up over all processes with the numbers of a step, so that all stop after the same one, write its checkpoint
and end by `Terminated`, with status 143. What a process waits for when the signal comes, data or another process, it
still waits for: the signal counts from the end of the step. Outside of `Stop` (while the run is set up, while the model
is written) SIGTERM ends a process at once, and Ctrl-C does so always.

torchrun passes a SIGTERM on to its processes, kills them after 30 s and ends with status 1. From torch 2.12 the time is
`--shutdown-timeout` or TORCH_ELASTIC_SHUTDOWN_TIMEOUT; `Stop.must_fit` says when a run needs more.

A dead process. The others may wait for it without end: an NCCL collective never returns. So every process is connected
with the next one in a ring, and a thread in it waits for what the one before says: that it has come to its end, or
which process is gone. When that one's connection closes or breaks instead, it is gone; this goes round the ring, and
who has not ended by an error of its own `GRACE` seconds later is ended with status 1. A machine that vanishes without
closing its connections is found by the kernel's keep-alive probes.
"""

import contextlib
import dataclasses
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from training.sharding import World

logger = logging.getLogger(__name__)

GRACE = 20.0  # seconds in which a process may end by an error of its own after another is gone
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}  # gone after 35 s without an answer
CONNECT = 60.0  # seconds until the ring is closed
END = "end"
TIMEOUT_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


class Terminated(SystemExit):
    """SIGTERM ended the run after a step whose checkpoint is there."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Stop:
    """A context of the main thread in which SIGTERM only makes `requested` true."""

    def __init__(self) -> None:
        self.requested = False
        self._told = False
        self._before: Any = None

    def __enter__(self) -> "Stop":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True

    def must_fit(self, step: float, save: float) -> None:
        """Say, once, if torchrun would kill this process before a step and a save are over.

        step, save: the seconds that the last ones took; 0: there has been none.
        """
        seconds = step + save
        if self._told or not save or not dist.is_torchelastic_launched():
            return
        from torch.distributed.launcher.api import LaunchConfig

        adjustable = "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}
        limit = int(os.environ.get(TIMEOUT_VARIABLE, "30")) if adjustable else 30
        if seconds > limit:
            self._told = True
            remedy = (
                f"set {TIMEOUT_VARIABLE} to more than that"
                if adjustable
                else "this torch cannot change that: send SIGTERM to one of the training processes, not to torchrun"
            )
            logger.warning(
                "a step and a save take %.0f s, and torchrun kills its processes %d s after a SIGTERM; %s",
                seconds,
                limit,
                remedy,
            )


@contextmanager
def watch_peers(world: World, *, grace: float = GRACE) -> Iterator[None]:
    """End this process, whatever it is at, when another one is gone; all processes enter and leave it together.

    Who leaves by an error is gone to the others, even if its process hangs before it ends. By `Terminated` all leave
    together: torchrun would terminate those that are not ready yet.
    """
    if world.size == 1:
        yield
        return
    previous, following = _ring(world)
    thread = threading.Thread(target=_watch, args=(previous, following, world, grace), name="peers", daemon=True)
    thread.start()
    stopped: Terminated | None = None
    try:
        yield
    except Terminated as error:
        stopped = error
    except BaseException:
        with contextlib.suppress(OSError):
            following.shutdown(socket.SHUT_WR)
        raise
    with contextlib.suppress(OSError):  # if it is gone, so is this process in a moment
        following.sendall(f"{END}\n".encode())
    thread.join()
    previous.close()
    following.close()
    if stopped:
        raise stopped


def _watch(previous: socket.socket, following: socket.socket, world: World, grace: float) -> None:
    said = ""
    with contextlib.suppress(OSError):
        said = _line(previous)
    if said == END:
        return
    gone = said or str((world.rank - 1) % world.size)
    with contextlib.suppress(OSError):
        following.sendall(f"{gone}\n".encode())
    time.sleep(grace)
    message = f"error: process {gone} of {world.size} is gone, so process {world.rank} ends too. "
    print(message + "The same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
    os._exit(1)


def _ring(world: World) -> tuple[socket.socket, socket.socket]:
    """Connections from the process before and to the next one, which hold for as long as both processes live."""
    family, host = _reached_at()
    with socket.create_server(("", 0), family=family) as server:
        server.settimeout(CONNECT)
        token = secrets.token_hex(16)
        places = world.gather((host, server.getsockname()[1], token))
        next_host, next_port, next_token = places[(world.rank + 1) % world.size]
        following = socket.create_connection((next_host, next_port), timeout=CONNECT)
        following.sendall(f"{next_token}\n".encode())
        while True:  # until it is no stranger who found the port
            previous, _ = server.accept()
            previous.settimeout(CONNECT)
            with contextlib.suppress(OSError):
                if secrets.compare_digest(_line(previous), token):
                    break
            previous.close()
    for connection in (previous, following):
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        # A loader's process must not hold open what tells that this one is gone.
        os.register_at_fork(after_in_child=connection.close)
    return previous, following


def _reached_at() -> tuple[socket.AddressFamily, str]:
    """Where other machines reach this one: the address from which it reaches torchrun's master."""
    name = os.environ["MASTER_ADDR"]
    family, kind, _, _, address = socket.getaddrinfo(name, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        host = probe.getsockname()[0]
    # The master's machine may know itself by a loopback address; its name means the right one everywhere.
    return family, name if ipaddress.ip_address(host.split("%")[0]).is_loopback else host


def _line(connection: socket.socket) -> str:
    """What comes until the end of a line; "" if the connection ends before."""
    line = b""
    while not line.endswith(b"\n"):
        got = connection.recv(1)  # what follows the line may be there already
        if not got:
            return ""
        line += got
    return line.decode().strip()
