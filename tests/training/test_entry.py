"""Each bad input ends the command with a nonzero status and a message that names it, and leaves no run behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from training.entry import run
from training.loader import Order

Flags = dict[str, object]


def standard(parts: Any) -> Flags:
    return {
        "--model.llm": parts.llms["llama"],
        "--model.vision": parts.vision,
        "--data.path": parts.captions,
        "--data.image-folder": parts.images,
        "--data.workers": 0,
        "--global-batch-size": 12,
        "--max-steps": 1,
    }


def copied_images(parts: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parts.images, tmp_path / "images"))


def changed_records(parts: Any, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    records = json.loads(parts.captions.read_text())
    change(records)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(records))
    return path


def spoiled_images(parts: Any, tmp_path: Path) -> Flags:
    images = copied_images(parts, tmp_path)
    for number in (2, 5, 9):
        (images / f"{number}.png").unlink()
    (images / "7.png").write_bytes((images / "7.png").read_bytes()[:900])
    (images / "8.png").write_text("<html>not found</html>")
    return {"--data.image-folder": images, "--data.workers": 2}


@pytest.mark.parametrize(("flags", "rate"), [({}, "0.01"), ({"--data.max-drop-rate": 0}, "0")])
def test_fault_14_too_many_bad_samples_stop_the_run(
    parts: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: Flags,
    rate: str,
) -> None:
    """The commonest reason first, each with an example; before the first step nothing is left behind."""
    flags = standard(parts) | {"--run-dir": tmp_path / "run"} | spoiled_images(parts, tmp_path) | flags
    monkeypatch.setattr("sys.argv", ["pretrain.py", "tiny", *(str(word) for flag in flags.items() for word in flag)])
    with pytest.raises(SystemExit) as stop:
        run("pretrain")
    dist.destroy_process_group()
    assert stop.value.code == 1
    first, *lines = capsys.readouterr().err.strip().splitlines()
    assert first == (
        f"error: 5 of the first 12 samples cannot be used; --data.max-drop-rate allows {rate} of the run's 12. "
        "The commonest reasons (`aligngpt doctor` lists all samples):"
    )
    assert " × no such file; for example record " in lines[0]
    assert len(lines) == 3
    assert any("7.png: can't be decoded" in line for line in lines)
    assert not (tmp_path / "run").exists()


def malformed_record(parts: Any, tmp_path: Path) -> Flags:
    return {"--data.path": changed_records(parts, tmp_path, lambda records: records[7].pop("conversations"))}


def broken_json(parts: Any, tmp_path: Path) -> Flags:
    path = tmp_path / "broken.json"
    path.write_text(parts.captions.read_text()[:-1])
    return {"--data.path": path}


def level_out_of_range(parts: Any, tmp_path: Path) -> Flags:
    return {"--data.path": changed_records(parts, tmp_path, lambda records: records[7].update(align_level=8))}


def missing_level(parts: Any, tmp_path: Path) -> Flags:
    return {"--data.path": changed_records(parts, tmp_path, lambda records: records[7].pop("align_level"))}


def wrong_model(parts: Any, tmp_path: Path) -> Flags:
    return {"--model.vision": parts.llms["llama"]}


def weights_of_another_model(parts: Any, tmp_path: Path) -> Flags:
    folder = Path(shutil.copytree(parts.llms["llama"], tmp_path / "llm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    return {"--model.llm": folder}


def an_aligngpt_folder_as_llm(parts: Any, tmp_path: Path) -> Flags:
    (tmp_path / "aligngpt").mkdir()
    (tmp_path / "aligngpt/config.json").write_text('{"model_type": "aligngpt", "text_config": {"model_type": "llama"}}')
    return {"--model.llm": tmp_path / "aligngpt"}


def not_an_aligngpt_folder(parts: Any, tmp_path: Path) -> Flags:
    return {"--model.llm": "", "--model.vision": "", "--model.init": parts.llms["llama"]}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (malformed_record, ["changed.json", "record 7", "conversations"]),
        (broken_json, ["broken.json", "line 1"]),
        (level_out_of_range, ["changed.json", "record 7 (id s7)", "align_level 8", "0..7"]),
        (missing_level, ["changed.json", "record 7 (id s7)", "align_level", "--data.levels random"]),
        (wrong_model, ["vision", "llama"]),
        (weights_of_another_model, ["/llm", "missing", "model.language_model.layers.2.mlp.down_proj.weight"]),
        (not_an_aligngpt_folder, ["--model.init", "/llama", "AlignGPT"]),
        (lambda parts, tmp: {"--run-dir": parts.llms["llama"]}, ["--run-dir", "/llama", "config.json is no run's"]),
        (lambda parts, tmp: {"--run-dir": parts.captions / "run"}, ["--run-dir", "captions.json", "a folder that can"]),
        (an_aligngpt_folder_as_llm, ["--model.llm", "/aligngpt", "give that one to --model.init"]),
        (lambda parts, tmp: {"--model.train": "gate", "--model.align-mode": "none"}, ["--model.train is gate", "none"]),
    ],
)
def test_fault_21_fault_35_bad_file(
    parts: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[..., Flags],
    says: list[str],
) -> None:
    """In this process, to save its imports; the rest of this file runs the commands."""
    flags = standard(parts) | {"--run-dir": tmp_path / "run"} | spoil(parts, tmp_path)
    monkeypatch.setattr("sys.argv", ["pretrain.py", "tiny", *(str(word) for flag in flags.items() for word in flag)])
    with pytest.raises(SystemExit) as stop:
        run("pretrain")
    dist.destroy_process_group()
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    for word in says:
        assert word in said
    assert not (tmp_path / "run").exists()


def test_unknown_flag_under_torchrun_is_answered_once(parts: Any, launch: Any, tmp_path: Path) -> None:
    flags = [word for flag in standard(parts).items() for word in flag]
    done = launch("pretrain", tmp_path / "run", *flags, "--optim.learning-rate", 1e-3, processes=2)
    assert done.status != 0
    answers = [line for line in done.output.splitlines() if "--optim.learning-rate is no option" in line]
    assert len(answers) == 1, done.output
    assert "--optim.lr" in answers[0]
    assert not done.run_dir.exists()


def test_fault_14_a_bad_sample_later_in_a_run_stops_all_processes_and_keeps_the_checkpoint(
    parts: Any, launch: Any, tmp_path: Path
) -> None:
    """One process meets it, both stop; once the picture is mended the same command goes on."""
    images = copied_images(parts, tmp_path)
    victim = images / f"{Order(12, 4, 0).epoch(0)[-1]}.png"  # in the third step, in the second process's half
    whole = victim.read_bytes()
    victim.write_bytes(whole[:500])
    flags = standard(parts) | {
        "--data.image-folder": images,
        "--global-batch-size": 4,
        "--max-steps": 3,
        "--save-every": 1,
    }
    words = [word for flag in flags.items() for word in flag]
    first = launch("pretrain", tmp_path / "run", *words, processes=2)
    assert first.status == 1
    assert first.output.count("error: ") == 1, first.output
    assert f"{victim.name}: can't be decoded" in first.output
    assert (first.run_dir / "LATEST").read_text() == "step-00000002\n"
    assert not (first.run_dir / "model").exists()
    assert not list(first.run_dir.rglob("*.tmp"))

    other = launch("pretrain", first.run_dir, *words, "--seed", 1)
    assert other.status == 1
    assert "seed: 0 there, 1 now" in other.output

    victim.write_bytes(whole)
    again = launch("pretrain", first.run_dir, *words, processes=2)
    assert again.status == 0, again.output
    assert len(again.losses) == 3
    assert again.losses[:2] == first.losses[:2]
    done = launch("pretrain", first.run_dir, *words)
    assert done.status == 0
    assert "is finished" in done.output
