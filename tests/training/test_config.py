"""Presets hold the paper's numbers; wrong values are refused before anything heavy is imported."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training.config import (
    NOT_LEARNED,
    PRESETS,
    TrainConfig,
    aligngpt_7b,
    check,
    differences,
    flat,
    read_command_line,
    to_json,
    unknown_names,
    with_absolute_paths,
)


def test_presets_hold_the_papers_hyper_parameters() -> None:
    one, two = aligngpt_7b("pretrain"), aligngpt_7b("finetune")
    assert (one.global_batch_size, one.optim.lr, one.data.image_aspect_ratio, one.data.template) == (
        (256, 1e-3, "square", "plain")
    )
    assert (two.global_batch_size, two.optim.lr, two.data.image_aspect_ratio, two.data.template) == (
        (128, 2e-5, "pad", "v1")
    )
    assert one.model.train == ("projector", "table")
    assert two.model.train == ("llm", "projector", "gate")
    assert (one.data.levels, one.data.order, two.data.levels, two.data.order) == (
        "record",
        "shuffle",
        "none",
        "shuffle",
    )
    for preset in (one, two):
        assert (preset.epochs, preset.precision, preset.sharding.activation_checkpointing) == (1, "bf16", "full")
        assert (preset.optim.betas, preset.optim.eps, preset.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
        assert (preset.optim.clip_norm, preset.optim.warmup_ratio, preset.data.max_length) == (1.0, 0.03, 2048)
        assert preset.optim.projector_lr is None
    larger = PRESETS["aligngpt-13b"]("finetune")
    assert dataclasses.replace(larger, token_budget=16384, per_device_batch_size=16) == two


def usable(parts: Any, tmp_path: Path) -> TrainConfig:
    config = PRESETS["tiny"]("pretrain")
    return dataclasses.replace(
        config,
        run_dir=str(tmp_path / "run"),
        model=dataclasses.replace(config.model, llm=str(parts.llms["llama"]), vision=str(parts.vision)),
        data=dataclasses.replace(config.data, path=str(parts.captions), image_folder=str(parts.images)),
    )


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("optim.lr", -1e-3, "--optim.lr is -0.001; it needs a rate"),
        ("optim.lr", float("nan"), "--optim.lr is nan"),
        ("optim.projector_lr", 0.0, "--optim.projector-lr is 0.0"),
        ("optim.betas", (0.9, 1.0), r"--optim.betas is \(0.9, 1.0\)"),
        ("model.num_levels", 1, "--model.num-levels is 1; it needs a whole number of at least 2"),
        ("model.train", (), "--model.train"),
        ("model.llm", "nowhere", "--model.llm is 'nowhere'; it needs a folder that exists"),
        ("model.vision", "", "--model.vision is ''; it needs a model folder"),
        ("model.random_table", True, "--model.random-table"),
        ("data.path", "nowhere.json", "--data.path is 'nowhere.json'"),
        ("max_steps", 0, "--max-steps is 0"),
        ("run_dir", "", "--run-dir is ''"),
        ("global_batch_size", 3, "--global-batch-size is 3; it needs a sample for each of the 4 processes"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_needs(
    parts: Any, tmp_path: Path, field: str, value: Any, says: str
) -> None:
    config = usable(parts, tmp_path)
    check(config, world_size=4)
    group, _, name = field.rpartition(".")
    target: Any = config
    changed = dataclasses.replace(getattr(target, group) if group else target, **{name: value})
    config = dataclasses.replace(target, **{group: changed}) if group else changed
    with pytest.raises(ValueError, match=says):
        check(config, world_size=4)


def test_a_folder_without_config_is_no_model(parts: Any, tmp_path: Path) -> None:
    config = usable(parts, tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, llm=str(parts.images)))
    with pytest.raises(ValueError, match=r"--model.llm is .*; it needs a folder that holds config.json"):
        check(config)


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--run-dri", "--run-dir"), ("--optim.learning-rate", "--optim.lr"), ("--model.vison=x", "--model.vision")],
)
def test_an_unknown_flag_is_answered_with_the_nearest_name(
    flag: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        read_command_line("pretrain", ["tiny", "--data.path", "x", flag, "1"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"{flag.split('=')[0]} is no option" in said
    assert nearest in said.replace(",", "").replace(";", "").split()


def test_an_unknown_preset_is_answered_with_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_command_line("pretrain", ["tinny", "--run-dir", "x"])
    assert stop.value.code == 2
    assert "tinny is no preset; it needs to be one of aligngpt-7b, aligngpt-13b, tiny;" in capsys.readouterr().err


def test_every_flag_that_help_lists_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_command_line("finetune", ["tiny", "--help"])
    flags = [flag.rstrip(".") for flag in re.findall(r"--[a-z][a-z.-]+", capsys.readouterr().out)]
    assert len(flags) > 35
    assert unknown_names([*flags, "--optim.clip_norm", "-1"], PRESETS["tiny"]("finetune")) is None


def test_differences_leave_out_what_is_not_learned() -> None:
    ours = PRESETS["tiny"]("pretrain")
    theirs = dataclasses.replace(ours, run_dir="elsewhere", save_every=7, seed=3)
    assert differences(to_json(ours), to_json(theirs)) == ["seed: 3 there, 0 now"]


def test_every_name_in_not_learned_is_a_field() -> None:
    assert flat(to_json(PRESETS["tiny"]("pretrain"))).keys() >= NOT_LEARNED


def test_paths_become_absolute_and_empty_ones_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(TrainConfig(run_dir="runs/x"))
    assert (config.run_dir, config.model.llm) == (str(tmp_path / "runs/x"), "")


def test_config_imports_no_heavy_library() -> None:
    heavy = "import sys, training.config; print([m for m in ('torch', 'transformers', 'tyro') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "[]\n"
