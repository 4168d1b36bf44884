"""The end of a run's processes: by SIGTERM, and when one of them is killed.

The two long tests run the real command on two processes as torchrun does, and `with_faults.py` does the harm.
"""

import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils.data import Dataset

from aligngpt.batch import load_in_order
from training import processes
from training.checkpoints import Checkpoints
from training.processes import Stop, Terminated, watch_peers
from training.sharding import _name_of_life

ROOT = Path(__file__).parents[2]
FAULTS = [(0, 1, 2, "nan"), (0, 1, 3, "nan gradient"), (0, 1, 6, "kill"), (1, 0, 7, "terminate")]


def run_with_faults(faults: list[Any], run_dir: Path, parts: Any) -> str:
    """Eight steps of stage 2 on two processes, a checkpoint after every fourth; what was printed."""
    command = [sys.executable, "tests/training/with_faults.py", json.dumps(faults), "finetune", "tiny"]
    flags = ["--run-dir", run_dir, "--model.llm", parts.llms["llama"], "--model.vision", parts.vision]
    flags += ["--data.path", parts.chats, "--data.image-folder", parts.images, "--data.decoder", "pil"]
    flags += ["--data.workers", 1, "--global-batch-size", 4, "--max-steps", 8, "--save-every", 4]
    done = subprocess.run(
        [str(word) for word in (*command, *flags)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def runs(parts: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path, str]:
    """A run whose second and third step are not finite, and one that is killed and terminated besides."""
    root = tmp_path_factory.mktemp("faults")
    calm = run_with_faults(FAULTS[:2], root / "calm", parts)
    wild = run_with_faults(FAULTS, root / "wild", parts)
    return root / "calm", calm, root / "wild", wild


def digests(output: str, *, life: int) -> dict[tuple[int, int], str]:
    """By rank and step: this process's weights and moments before the step changes them."""
    found = re.findall(rf"life {life} rank (\d) step (\d+) weights ([0-9a-f]{{16}})", output)
    return {(int(rank), int(step)): digest for rank, step, digest in found}


def losses(run_dir: Path) -> list[str]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [f"{line['step']} {line['loss']}" for line in lines]


def test_fault_37_38_nan_on_one_process_leaves_weights_and_moments_of_all_as_they_were(runs: Any) -> None:
    folder, output, _, _ = runs
    before = digests(output, life=0)
    assert len(before) == 2 * 8
    for rank in (0, 1):
        of_rank = [before[rank, step] for step in range(1, 9)]
        assert of_rank[1] == of_rank[2] == of_rank[3]  # the loss of step 2 and one gradient of step 3 were NaN
        assert len(set(of_rank)) == 6
    lines = [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"], len(line["ids"])) for line in lines] == [(2, True, 4), (3, True, 4)]
    assert lines[0]["loss"] is None
    assert lines[1]["loss"] > 0


def test_fault_54_55_56_a_run_that_is_killed_and_terminated_ends_like_one_that_is_not(runs: Any) -> None:
    """Killed in step 6, it goes on after step 4; told to stop in step 7, and again while it saves, after step 7."""
    calm, output, wild, said = runs
    assert "stopped by SIGTERM after step 7; the same command goes on from there" in said
    assert re.search(r"failed \(exitcode: 143\) local_rank: [01]", said)
    undisturbed = digests(output, life=0)
    for life, first, last in ((0, 1, 5), (1, 5, 7), (2, 8, 8)):
        found = digests(said, life=life)
        assert found == {(rank, step): undisturbed[rank, step] for rank in (0, 1) for step in range(first, last + 1)}
    assert losses(wild) == losses(calm)
    for name in ("spikes.jsonl", "model/model.safetensors"):
        assert (wild / name).read_bytes() == (calm / name).read_bytes()


def test_fault_55_sigterm_in_the_last_save_ends_the_run_before_its_model_is_written(
    parts: Any, train_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which may take longer than torchrun waits; what it does wait for is said once a save has been timed."""
    flags = ["--model.llm", parts.llms["llama"], "--model.vision", parts.vision, "--data.path", parts.chats]
    flags += ["--data.image-folder", parts.images, "--data.decoder", "pil", "--data.workers", 0]
    flags += ["--global-batch-size", 4, "--max-steps", 2, "--save-every", 1]
    finish, save = Checkpoints._finish, Checkpoints.save

    def terminate_and_finish(self: Checkpoints, temporary: Path, final: Path, *args: Any) -> None:
        if final.name == "step-00000002":
            os.kill(os.getpid(), signal.SIGTERM)
        finish(self, temporary, final, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_finish", terminate_and_finish)
        patch.setenv("TORCHELASTIC_RUN_ID", "run")
        patch.setenv(processes.TIMEOUT_VARIABLE, "0")
        patch.setattr(Checkpoints, "save", lambda self, *args: (save(self, *args), self.thread and self.thread.join()))
        with pytest.raises(Terminated):
            train_here("finetune", tmp_path / "run", *flags)
    assert (tmp_path / "run/LATEST").read_text() == "step-00000002\n"
    assert not (tmp_path / "run/model").exists()
    assert sum("torchrun kills its processes 0 s after a SIGTERM" in message for message in caplog.messages) == 1
    train_here("finetune", tmp_path / "run", *flags)
    assert (tmp_path / "run/model").is_dir()


# ---------------------------------------------------------------------------------------------------- in parts


class Trio:
    """The world as one of three processes sees it, which meet in a folder."""

    def __init__(self, rank: int, folder: Path, meeting: Any):
        self.rank, self.size, self.folder, self.meeting = rank, 3, folder, meeting

    def gather(self, value: Any) -> list[Any]:
        (self.folder / f"value-{self.rank}").write_bytes(pickle.dumps(value))
        self.meeting.wait()
        return [pickle.loads((self.folder / f"value-{rank}").read_bytes()) for rank in range(self.size)]


FORK = multiprocessing.get_context("fork")


def three(
    body: Callable[[Any], None], folder: Path, *, grace: float, once_started: Callable[[], None] = lambda: None
) -> tuple[list[int | None], str]:
    """Exit codes of three processes that watch each other while they run `body`, and what they said."""

    def run(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
        os.dup2(os.open(folder / "said", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")
        world: Any = Trio(rank, folder, meeting)
        with watch_peers(world, grace=grace):
            body(world)

    meeting = FORK.Barrier(3)
    children = [FORK.Process(target=run, args=(rank,)) for rank in range(3)]
    for child in children:
        child.start()
    once_started()
    for child in children:
        child.join(30)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes, (folder / "said").read_text()


def test_lines_that_come_together_are_read_one_by_one() -> None:
    """As a process that is slow to join finds them when the one before it is gone already."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"token\n1\n")
        theirs.shutdown(socket.SHUT_WR)
        assert [processes._line(ours) for _ in range(3)] == ["token", "1", ""]


def test_fault_56_who_waits_for_ever_is_ended_when_another_process_is_killed(tmp_path: Path) -> None:
    """Though a process that the dead one forked lives on, as the processes that load samples do for a while."""
    end, held = os.pipe()  # held by the processes that wait: their forked one lives as long as they do

    def body(world: Any) -> None:
        if world.rank == 1:
            if os.fork() == 0:
                os.close(held)
                os.read(end, 1)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()

    codes, said = three(body, tmp_path, grace=0.1, once_started=lambda: os.close(held))
    os.close(end)
    assert codes == [1, -9, 1]
    assert sorted(said.splitlines()) == [
        f"error: process 1 of 3 is gone, so process {rank} ends too. The same command goes on from the last checkpoint."
        for rank in (0, 2)
    ]


def test_processes_that_end_together_say_nothing(tmp_path: Path) -> None:
    """Each begins to leave when the one before has begun."""
    leaving = [FORK.Event() for _ in range(3)]

    def body(world: Any) -> None:
        if world.rank:
            leaving[world.rank - 1].wait()
        leaving[world.rank].set()

    assert three(body, tmp_path, grace=0.1) == ([0, 0, 0], "")


def test_processes_that_were_terminated_wait_for_each_other(tmp_path: Path) -> None:
    """When the first one's process ends, torchrun terminates the others, whatever they still have to do."""
    ended, looked = FORK.Event(), FORK.Barrier(2)

    def body(world: Any) -> None:
        if world.rank == 0:
            Finalize(None, ended.set, exitpriority=0)
        else:
            assert not ended.wait(0.2)  # it would come at once
            looked.wait()  # one that leaves lets the first one go
        raise Terminated

    assert three(body, tmp_path, grace=60) == ([143, 143, 143], "")


def test_who_hangs_after_an_error_is_gone_to_the_others(tmp_path: Path) -> None:
    def body(world: Any) -> None:
        if world.rank == 1:
            Finalize(None, threading.Event().wait, exitpriority=0)
            raise ValueError("wrong")
        threading.Event().wait()

    codes, said = three(body, tmp_path, grace=0.1)
    assert codes == [1, 1, 1]
    for rank in (0, 2):
        assert f"error: process 1 of 3 is gone, so process {rank} ends too." in said


def test_an_error_of_all_processes_is_all_that_they_say(tmp_path: Path) -> None:
    def body(world: Any) -> None:
        raise ValueError("wrong")

    codes, said = three(body, tmp_path, grace=60)
    assert codes == [1, 1, 1]
    assert said.count("ValueError: wrong\n") == 3
    assert "is gone" not in said


def test_fault_55_sigterm_sets_a_flag_however_often_it_comes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.requested
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before
    assert Terminated().code == 143


def test_two_lives_of_a_job_that_share_a_store_have_different_names() -> None:
    """torchrun keeps its store over restarts; the first life ended while its process 1 waited for process 0."""
    store = dist.HashStore()
    store.set("hello/1", "of one who is dead")
    names = []
    for _ in range(2):
        with ThreadPoolExecutor() as pool:
            first, second = pool.map(lambda rank: _name_of_life(store, rank, 2), (0, 1))
        assert first == second
        names.append(first)
    assert names[0] != names[1]


class Numbers(Dataset[int]):
    def __getitem__(self, key: int) -> int:
        return key


def test_a_loaders_process_is_ended_by_its_own_process_alone() -> None:
    """torchrun sends SIGTERM to all processes; the batches until the next checkpoint are needed still."""
    loader = load_in_order(Numbers(), range(40), workers=1)
    assert next(loader) == 0
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert list(loader) == list(range(1, 40))

    loader = load_in_order(Numbers(), range(40), workers=1)
    assert next(loader) == 0
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


@pytest.mark.parametrize(("variable", "limit"), [(None, 30), ("90", 90)])
def test_a_step_and_a_save_that_torchrun_does_not_wait_for_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str | None, limit: int
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.delenv(processes.TIMEOUT_VARIABLE, raising=False)
    if variable:
        monkeypatch.setenv(processes.TIMEOUT_VARIABLE, variable)
    stop = Stop()
    with caplog.at_level(logging.WARNING):
        stop.must_fit(limit - 2, 1)
        stop.must_fit(limit + 1, 0)  # no save yet, and the first step is slow
        assert not caplog.messages
        stop.must_fit(limit, 1)
        stop.must_fit(limit, 1)
    (said,) = caplog.messages
    assert f"take {limit + 1} s, and torchrun kills its processes {limit} s after a SIGTERM" in said


def test_a_step_and_a_save_are_measured_before_a_signal_comes(
    parts: Any, tmp_path: Path, train_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later would be too late: torchrun has killed the process by then."""
    measured: list[tuple[float, float]] = []
    monkeypatch.setattr(Stop, "must_fit", lambda self, *seconds: measured.append(seconds))
    model = ("--model.llm", parts.llms["llama"], "--model.vision", parts.vision)
    data = ("--data.path", parts.captions, "--data.image-folder", parts.images, "--data.workers", 0)
    run = train_here("pretrain", tmp_path / "run", *model, *data, "--max-steps", 3, "--save-every", 1)
    steps = [json.loads(line)["seconds"] for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in measured] == steps
    assert measured[0][1] == 0 < measured[-1][1]  # the third step follows a finished save
