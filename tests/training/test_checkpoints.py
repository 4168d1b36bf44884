"""Checkpoints hold what they say or are found out, and survive what can happen to a disk or a process."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.fsdp import fully_shard

from training import checkpoints, sharding
from training.checkpoints import Checkpoints, Saved, SaveError
from training.config import TrainConfig
from training.run_folder import create_run
from training.sharding import World

ROOT = Path(__file__).parents[2]


class Model(nn.Module):
    """A frozen part, a trained one, and a table, all of which the loss depends on."""

    def __init__(self, width: int = 8, table: bool = True):
        super().__init__()
        self.tower = nn.Linear(4, 4).requires_grad_(False)
        self.layer = nn.Linear(4, width)
        if table:
            self.align_table = nn.Parameter(torch.randn(3, width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(self.tower(x)) @ self.align_table.T).square().sum()


def made(world: World, **sizes: Any) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model(**sizes)
    fully_shard(model, mesh=world.mesh)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.manual_seed(step)
    model(torch.randn(5, 4)).backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    values = {f"state {n} {k}": v for n, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    values |= dict(model.named_parameters())
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in values.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with sharding.world() as everyone:
        yield everyone


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    (tmp_path / "checkpoints").mkdir()
    return TrainConfig(run_dir=str(tmp_path), keep_last=3, seed=5)


def write(config: TrainConfig, world: World, steps: int, **more: Any) -> None:
    """A checkpoint after each step."""
    model, optimizer = made(world)
    with Checkpoints(config, model, optimizer, world, **more) as saves:
        for step in range(steps):
            take_step(model, optimizer, step)
            saves.save(step + 1, {"samples": 8 * (step + 1)})
            saves.wait_staged()


def names(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())


def folder(config: TrainConfig, step: int) -> Path:
    return Path(config.run_dir) / f"checkpoints/step-{step:08d}"


def found(config: TrainConfig, world: World) -> Saved:
    saved = checkpoints.find(config, world)
    assert saved is not None
    return saved


def test_the_weights_of_the_step_are_saved_while_training_goes_on(
    config: TrainConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies are held up, then the disk: neither keeps `save` from returning, and what is saved is of the step."""
    copy, disk = threading.Event(), threading.Event()
    stage, write_data = Checkpoints._stage, checkpoints._Writer.write_data
    monkeypatch.setattr(Checkpoints, "_stage", lambda *args: copy.wait(60) and stage(*args))
    monkeypatch.setattr(checkpoints._Writer, "write_data", lambda *args: disk.wait(60) and write_data(*args))
    model, optimizer = made(world)
    assert checkpoints.find(config, world) is None
    with Checkpoints(config, model, optimizer, world) as saves:
        saves.wait_staged()  # there is none
        take_step(model, optimizer, 0)
        drops = [3]
        saves.save(1, {"drops": drops, "mean": 0.1})
        drops.append(4)
        wanted = contents(model, optimizer)
        assert not saves.staged.is_set()
        copy.set()
        saves.wait_staged()
        take_step(model, optimizer, 1)
        assert names(config) in ([], ["step-00000001.tmp"])
        assert not saves.failed()
        after = contents(model, optimizer)
        disk.set()
    assert names(config) == ["step-00000001"]

    saved = found(config, world)
    assert (saved.step, saved.extra) == (1, {"drops": [3], "mean": 0.1})
    state = json.loads((saved.folder / "state.json").read_text())
    assert (state["step"], state["config"]["seed"], state["processes"]) == (1, 5, 1)
    other, its_optimizer = made(world)
    checkpoints.load(saved, other, its_optimizer)
    assert equal(contents(other, its_optimizer), wanted)
    assert its_optimizer.param_groups[0]["lr"] == 0.1
    take_step(other, its_optimizer, 1)
    assert equal(contents(other, its_optimizer), after)
    stored = checkpoints._read_metadata(saved.folder).state_dict_metadata
    assert not [name for name in stored if "tower" in name]


def test_steps_that_were_skipped_leave_a_checkpoint_without_moments(config: TrainConfig, world: World) -> None:
    """SIGTERM may come before the optimizer has taken its first step, or before each weight has had a gradient."""
    for taken in range(3):
        model, optimizer = made(world)
        if taken:
            model(torch.randn(5, 4)).backward()
            model.align_table.grad = None if taken == 1 else model.align_table.grad
            optimizer.step()
            optimizer.zero_grad()
        with Checkpoints(config, model, optimizer, world) as saves:
            saves.save(taken + 1, {})
        other, its_optimizer = made(world)
        checkpoints.load(found(config, world), other, its_optimizer)
        assert equal(contents(other, its_optimizer), contents(model, optimizer))
        assert len(its_optimizer.state) == (0, 2, 3)[taken]
        for of in ((model, optimizer), (other, its_optimizer)):
            take_step(*of, 5)
        assert equal(contents(other, its_optimizer), contents(model, optimizer))


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    config: TrainConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file was synced when it had all of its bytes."""
    synced: dict[int, int] = {}  # bytes by inode
    sync, replace_name = os.fsync, os.replace

    def sync_and_note(descriptor: int) -> None:
        sync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def replace_and_check(old: Any, new: Any) -> None:
        if Path(new) == folder(config, 1):
            files = [path.stat() for path in [Path(old), *Path(old).iterdir()]]
            assert {file.st_ino: file.st_size for file in files}.items() <= synced.items()
        replace_name(old, new)

    monkeypatch.setattr(os, "fsync", sync_and_note)
    monkeypatch.setattr(os, "replace", replace_and_check)
    write(config, world, 1)
    assert names(config) == ["step-00000001"]


def test_old_checkpoints_go_when_a_new_one_is_there(config: TrainConfig, world: World) -> None:
    write(replace(config, keep_last=2), world, 4)
    assert names(config) == ["step-00000003", "step-00000004"]
    assert found(config, world).earlier == ["step-00000003"]


def test_latest_says_where_to_look(config: TrainConfig, world: World) -> None:
    """It names the newest to be used; where it cannot be read all count. Those passed over go with the next save."""
    write(config, world, 3)
    latest = Path(config.run_dir) / "LATEST"
    for content, step in ((b"step-00000002\n", 2), (b"\xff", 3), (b"step-2", 3), (b"", 3), (b"step-00000009", 3)):
        latest.write_bytes(content)
        assert found(config, world).step == step
    latest.unlink()
    assert found(config, world).step == 3
    latest.write_text("step-00000000")
    with pytest.raises(ValueError, match="which has no whole checkpoint to go on from"):
        checkpoints.find(config, world)

    latest.write_text("step-00000003")
    (folder(config, 3) / "state.json").unlink()
    (folder(config, 1) / "state.json").unlink()  # nobody has looked at that one
    write(replace(config, keep_last=2), world, 1, after=(saved := found(config, world)))
    assert saved.earlier == ["step-00000001"]
    assert (names(config), latest.read_text()) == (["step-00000001", "step-00000002"], "step-00000001\n")


def delete(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_fault_46_47_48_a_damaged_file_sends_the_run_to_the_checkpoint_before(
    config: TrainConfig, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    write(config, world, 2)
    files = {path: path.read_bytes() for path in folder(config, 2).iterdir()}
    assert {path.name for path in files} == {"__0_0.distcp", ".metadata", "state.json", "manifest.json"}
    for path, content in files.items():
        for damage in (delete, flip, cut, empty):
            damage(path)
            caplog.clear()
            if path.name == "manifest.json" and damage is cut:
                assert found(config, world).step == 2  # all that it lost is the end of the last line
            else:
                assert found(config, world).step == 1, (path, damage)
                (said,) = caplog.messages
                assert f"step-00000002 is passed over: {'' if path.name == 'manifest.json' else path.name}" in said
            path.write_bytes(content)
    assert found(config, world).step == 2
    flip(folder(config, 2) / "__0_0.distcp")
    delete(folder(config, 1) / "manifest.json")
    with pytest.raises(ValueError, match=r"2: __0_0\.distcp has been changed.*1: manifest\.json is missing"):
        checkpoints.find(config, world)


def test_every_byte_of_a_manifest_counts(config: TrainConfig, world: World) -> None:
    """Whatever bit flips in it: it's found, or it is a blank's and the files are the same."""
    write(config, world, 1)
    path = folder(config, 1) / "manifest.json"
    content = path.read_bytes()
    wanted = json.loads(content)
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 7
        path.write_bytes(changed)
        problem = checkpoints._damage(folder(config, 1), 0, 1)
        assert problem is not None or json.loads(changed)["files"] == wanted["files"], position


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, file: str) -> Iterator[None]:
    """A file with this in its name takes 1000 bytes and no more."""
    create = filesystem.FileSystem.create_stream

    class Full:
        def __init__(self, stream: Any):
            self.stream, self.left = stream, 1000

        def write(self, data: Any) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    @contextmanager
    def create_stream(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as stream:
            yield Full(stream) if file in str(path) and mode == "wb" else stream

    with monkeypatch.context() as patch:
        patch.setattr(filesystem.FileSystem, "create_stream", create_stream)
        yield


@pytest.mark.parametrize("file", ["distcp", ".metadata"])
def test_fault_45_a_full_disk_is_told_and_costs_no_checkpoint(
    config: TrainConfig, world: World, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    write(config, world, 1)
    model, optimizer = made(world)
    checkpoints.load(found(config, world), model, optimizer)
    with full_disk(monkeypatch, file):
        saves = Checkpoints(config, model, optimizer, world, after=found(config, world))
        saves.save(2, {})
        saves.wait_staged()
        assert saves.thread is not None
        saves.thread.join()
        assert saves.failed()
        for ask in (saves.wait, lambda: saves.save(3, {})):
            with pytest.raises(SaveError) as error:
                ask()
    said = str(error.value)
    assert f"the checkpoint of step 2 could not be written to --run-dir {config.run_dir}, whose disk is full" in said
    assert "it needs 7.8e-07 GB; " in said  # 64 weights, two moments of each, 3 counts
    assert "the one before, step-00000001, is whole, and the same command goes on from it" in said
    assert names(config) == ["step-00000001"]
    write(config, world, 1, after=found(config, world))


def test_fault_50_what_killed_saves_left_goes_at_the_start(config: TrainConfig, world: World) -> None:
    run = Path(config.run_dir)
    write(config, world, 1)
    for stale in ("checkpoints/step-00000002.tmp", "checkpoints/step-00000000.old.tmp", "model.tmp"):
        (run / stale).mkdir()
        (run / stale / "part").write_text("x")
    (run / "LATEST.77.tmp").write_text("x")
    assert found(config, world).step == 1
    create_run(config, "pretrain").close()
    assert not list(run.rglob("*.tmp"))
    assert found(config, world).step == 1


class Evil:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


def rehash(where: Path) -> None:
    """As somebody does who knows the format."""
    manifest = json.loads((where / "manifest.json").read_text())
    for name, fingerprint in manifest["files"].items():
        content = (where / name).read_bytes()
        fingerprint |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (where / "manifest.json").write_text(json.dumps(manifest))


def pose_as_metadata(where: Path, victim: Path) -> None:
    (where / ".metadata").write_bytes(pickle.dumps(Evil(victim)))


def pose_as_shard(where: Path, victim: Path) -> None:
    metadata = checkpoints._read_metadata(where)
    content = pickle.dumps(Evil(victim), protocol=2)
    for entry in metadata.storage_data.values():
        entry.offset, entry.length = 0, len(content)
    (where / ".metadata").write_bytes(pickle.dumps(metadata))
    (where / "__0_0.distcp").write_bytes(content)


def point_outside(where: Path, victim: Path) -> None:
    metadata = checkpoints._read_metadata(where)
    for entry in metadata.storage_data.values():
        entry.relative_path = "../../elsewhere"
    (where / ".metadata").write_bytes(pickle.dumps(metadata))


def hold_an_object(where: Path, victim: Path) -> None:
    content = (where / ".metadata").read_bytes()
    metadata = checkpoints._read_metadata(where)
    metadata.state_dict_metadata = {"model.layer.weight": "no tensor"}  # type: ignore[dict-item]
    (where / ".metadata").write_bytes(pickle.dumps(metadata))
    assert (where / ".metadata").read_bytes() != content


@pytest.mark.parametrize("pose", [pose_as_metadata, pose_as_shard, point_outside, hold_an_object])
def test_fault_51_a_pickle_posing_as_a_checkpoint_is_not_run(
    config: TrainConfig, world: World, tmp_path: Path, pose: Callable[[Path, Path], None]
) -> None:
    write(config, world, 1)
    pose(folder(config, 1), tmp_path / "victim")
    rehash(folder(config, 1))
    model, optimizer = made(world)
    with pytest.raises(ValueError, match=r"step-00000001(/\.metadata is refused| cannot be loaded)"):
        checkpoints.load(found(config, world), model, optimizer)
    assert not (tmp_path / "victim").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "victim")))
    assert (tmp_path / "victim").exists()  # so it would have been seen


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (
            {"width": 9},
            r"; align_table is \(3, 8\), the model's is \(3, 9\); layer.weight is \(8, 4\), .*; layer.bias is [^;]*$",
        ),
        ({"table": False}, "left over: align_table"),
    ],
)
def test_fault_53_another_models_checkpoint_is_refused_with_its_keys(
    config: TrainConfig, world: World, sizes: dict[str, Any], says: str
) -> None:
    write(config, world, 1)
    with pytest.raises(ValueError, match=says):
        checkpoints.load(found(config, world), *made(world, **sizes))


def test_fault_53_a_checkpoint_without_the_alignment_table_is_refused(config: TrainConfig, world: World) -> None:
    model, optimizer = made(world)
    model.align_table.requires_grad_(False)
    with Checkpoints(config, model, optimizer, world) as saves:
        saves.save(1, {})
    model, optimizer = made(world)
    with pytest.raises(ValueError, match="does not hold this model's weights; 1 missing: align_table"):
        checkpoints.load(found(config, world), model, optimizer)


def test_another_runs_checkpoint_is_refused(config: TrainConfig, world: World) -> None:
    write(config, world, 1)
    with pytest.raises(ValueError, match=r"another run's.*seed: 5 there, 6 now"):
        checkpoints.find(replace(config, seed=6), world)
    folder(config, 1).rename(folder(config, 4))
    (Path(config.run_dir) / "LATEST").write_text("step-00000004\n")
    with pytest.raises(ValueError, match="another step's checkpoint: step 1"):
        checkpoints.find(config, world)


def test_an_error_of_the_run_lets_its_save_end(config: TrainConfig, world: World) -> None:
    def run() -> None:
        with Checkpoints(config, *made(world), world) as saves:
            saves.save(1, {})
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        run()
    assert found(config, world).step == 1


def test_a_run_whose_steps_were_all_skipped_goes_on(config: TrainConfig, world: World) -> None:
    """The optimizer has no moments then; what is learned from there on is what a run learns that never stopped."""
    model, optimizer = made(world)
    with Checkpoints(config, model, optimizer, world) as saves:
        saves.save(1, {})
    resumed, its_optimizer = made(world)
    checkpoints.load(found(config, world), resumed, its_optimizer)
    for pair in ((model, optimizer), (resumed, its_optimizer)):
        take_step(*pair, 1)
    assert equal(contents(model, optimizer), contents(resumed, its_optimizer))


def run_script(*command: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_several_processes_write_read_and_fail_together(tmp_path: Path) -> None:
    lines = run_script("tests/training/checkpoint_checks.py", tmp_path)
    assert [line.split()[-1] for line in lines].count("read") == 5
    assert {"one_disk_is_full", "fall_back", "write_copies"} <= {line.split()[-1] for line in lines}


def test_fault_43_44_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    lines = run_script("tests/training/kill_saves.py", "--times", 10)
    assert [line.split(":")[0] for line in lines] == ["1 process", "2 processes"]
