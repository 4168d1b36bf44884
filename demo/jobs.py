"""Commands run side by side: two at a time, each with a bar, its output in a file, and a line for what went wrong.

A job whose result is there is not done again, so the same list of jobs goes on after an interruption. All commands run
in the project's folder, with this Python, on the CPU unless a GPU is allowed. On Linux they end when this process does,
however it ends: a command that outlived it would write what the next run makes again.
"""

import ctypes
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
POLL_SECONDS = 0.2
TOKEN_BUDGET = 8192  # a step's samples in one micro-batch


@dataclass(frozen=True)
class Job:
    """A command whose progress is the number of lines in `metrics`."""

    name: str
    command: tuple[str, ...]
    result: Path  # there when the command has succeeded
    metrics: Path | None = None
    steps: int = 1
    needs: tuple[Path, ...] = ()  # results of other jobs, without which it can't begin


def miniature(
    name: str,
    module: str,
    folder: Path,
    options: Sequence[str] = (),
    *,
    steps: int,
    seed: int,
    needs: tuple[Path, ...] = (),
) -> Job:
    """The training of one of the parts that a real run downloads."""
    command = ("python", "-m", f"demo.{module}", str(folder), "--steps", str(steps), "--seed", str(seed), *options)
    return Job(name, command, folder, Path(f"{folder}.tmp/metrics.jsonl"), steps, needs)


def training(
    name: str,
    script: str,
    folder: Path,
    options: Sequence[str],
    *,
    budget: tuple[int, float, int],
    image_folder: Path,
    seed: int,
    processes: int = 1,
    needs: tuple[Path, ...] = (),
) -> Job:
    """A run of one of the entry points in `folder`. budget: samples a step, rate, steps."""
    global_batch, lr, steps = budget
    command = ["torchrun", "--standalone", "--nproc-per-node", str(processes), f"training/{script}.py", "tiny"]
    command += [*options, "--data.image-folder", str(image_folder), "--optim.lr", str(lr)]
    command += ["--global-batch-size", str(global_batch), "--token-budget", str(TOKEN_BUDGET)]
    command += ["--max-steps", str(steps), "--seed", str(seed), "--run-dir", str(folder)]
    return Job(name, tuple(command), folder / "model", folder / "metrics.jsonl", steps, needs)


class RunError(Exception):
    """Why a run ends early."""


def run_whole(run: Callable[[], None], folder: Path) -> None:
    """Call `run`, say how long it took; a failed job, Ctrl-C and SIGTERM end the process and the commands it runs."""
    started = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that commands that are running are ended too
    try:
        run()
    except RunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes in all; everything is in {folder}")


@contextmanager
def locked(folder: Path, user: str) -> Iterator[None]:
    """Keep a second run of the same kind out of a folder."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"--run-dir {folder} is in use by another {user}; it needs its own folder") from error
        yield


def call(command: Sequence[str]) -> None:
    """Run a command in the foreground, as typed."""
    print(f"$ {shlex.join(command)}", flush=True)
    if subprocess.run(command, env=environment(), preexec_fn=END_WITH_PARENT).returncode:
        raise RunError(f"this command failed: {shlex.join(command)}")


def side_by_side(
    jobs: Sequence[Job],
    logs: Path,
    finished: Callable[[Job, float], None] = lambda job, seconds: None,
    *,
    gpu: bool = False,
) -> None:
    """Run jobs, two at a time, each as soon as what it needs is there; their output goes to the folder `logs`.

    finished: called with a job that has succeeded and the seconds that it took. gpu: whether jobs may use one.

    Raises:
        RunError: one failed; the others are stopped. Or none of those left can begin.
    """
    waiting = [job for job in jobs if not job.result.exists()]
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    bars: dict[Job, tqdm] = {}
    try:
        while waiting or running:
            unfinished = {job.result for job in running}
            ready = [job for job in waiting if all(n.exists() and n not in unfinished for n in job.needs)]
            if not (ready or running):
                missing = [str(need) for need in waiting[0].needs if not need.exists()]
                raise RunError(f"{waiting[0].name} needs {', '.join(missing)}, which nothing makes")
            for job in ready[: 2 - len(running)]:
                waiting.remove(job)
                tqdm.write(f"$ {shlex.join(job.command)}")
                sys.stdout.flush()
                bars[job] = progress(job.steps, job.name)
                with log_file(logs, job).open("wb") as log:
                    process = subprocess.Popen(
                        job.command, stdout=log, stderr=log, env=environment(gpu=gpu), preexec_fn=END_WITH_PARENT
                    )
                running[job] = process, time.perf_counter()
            time.sleep(POLL_SECONDS)
            for job, (process, started) in list(running.items()):
                ended = process.poll() is not None
                show(bars[job], job, ended=ended)
                if ended:
                    del running[job]
                    bars.pop(job).close()
                    if process.returncode or not job.result.exists():
                        raise RunError(f"{job.name} failed ({process.returncode}): {last_words(logs, job)}")
                    finished(job, time.perf_counter() - started)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
        for bar in bars.values():
            bar.close()


def last_words(logs: Path, job: Job) -> str:
    """The error lines of a job's log, or its end, and where the rest is."""
    text = log_file(logs, job).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return "\n".join([*(errors or lines[-12:]), f"(all of it is in {log_file(logs, job)})"])


def log_file(logs: Path, job: Job) -> Path:
    return logs / f"{slug(job.name)}.log"


def slug(name: str) -> str:
    """A name as a file's: "stage 1: 8 levels" is stage-1-8-levels."""
    return re.sub(r"[^\w.]+", "-", name)


def environment(*, gpu: bool = False) -> dict[str, str]:
    """This Python's commands first; a thread for each process, since two processes run on two cores."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return found if gpu else found | {"CUDA_VISIBLE_DEVICES": ""}


def _end_with_parent() -> None:
    """SIGTERM when the parent is gone, at which torchrun ends its processes and training itself."""
    pr_set_pdeathsig = 1  # <sys/prctl.h>
    _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM)


_LIBC = ctypes.CDLL(None)  # loaded before a fork: after one, another thread's lock may be held for ever
END_WITH_PARENT = _end_with_parent if sys.platform == "linux" else None


def as_typed(folder: Path) -> Path:
    """A folder as the printed commands name it: from the project's folder if it lies there, else whole."""
    folder = folder.resolve()
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder


def progress(total: int, name: str, unit: str = "step") -> tqdm:
    return tqdm(total=total, desc=f"{name:22}", unit=unit, dynamic_ncols=True, disable=None)  # none in a file


def show(bar: tqdm, job: Job, *, ended: bool) -> None:
    """Move a job's bar to the last whole line of its metrics; a result that is there makes it full."""
    lines = []
    if job.metrics and job.metrics.exists():
        lines = job.metrics.read_text(encoding="utf-8").split("\n")[:-1]
    if lines:
        bar.set_postfix_str(f"loss {json.loads(lines[-1])['loss']:.3f}", refresh=False)
    steps = job.steps if ended and job.result.exists() else len(lines)
    bar.update(max(0, steps - bar.n))
