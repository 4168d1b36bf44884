"""Which run a folder holds, as far as it can be asked without training one."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from training.config import DataConfig, TrainConfig
from training.run_folder import create_run, is_finished


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    """Its config decides; values that say where and how fast may differ."""

    def config(workers: int = 4, **data: str) -> TrainConfig:
        return TrainConfig(run_dir=str(tmp_path / "run"), data=DataConfig(workers=workers, **data))  # type: ignore[arg-type]

    assert not is_finished(config())
    create_run(config(decoder="pil"), "pretrain").close()
    assert not is_finished(config(decoder="pil", workers=1))
    with pytest.raises(ValueError, match=r"What differs: data\.decoder: 'pil' there, 'dali' now$"):
        is_finished(config(decoder="dali"))
    (tmp_path / "run/model").mkdir()
    assert is_finished(config(decoder="pil"))


def test_fault_49_a_folder_in_which_a_run_is_at_work_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=str(tmp_path))
    with create_run(config, "pretrain"):
        for enter in (lambda: is_finished(config), lambda: create_run(config, "pretrain")):
            with pytest.raises(ValueError, match="in which another run is at work"):
                enter()
    assert not is_finished(config)
    create_run(config, "pretrain").close()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match=r"needs a file system on which files can be locked \(flock\): No locks"):
        create_run(TrainConfig(run_dir=str(tmp_path)), "pretrain")


@pytest.mark.parametrize("content", ["[", "{}", "[]", '{"config": null}'])
def test_a_config_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"whose config\.json is no run's"):
        is_finished(TrainConfig(run_dir=str(tmp_path)))


def test_what_a_killed_start_left_is_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "config.json.7.tmp").write_text("{")
    (tmp_path / "checkpoints").mkdir()
    assert not is_finished(TrainConfig(run_dir=str(tmp_path)))
    create_run(TrainConfig(run_dir=str(tmp_path)), "pretrain").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.json", "lock"]
    assert json.loads((tmp_path / "config.json").read_text())["stage"] == "pretrain"
