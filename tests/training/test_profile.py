"""`--profile`: every stage of a training step is in the trace, and the rows add up. (That it changes nothing, and that
one process writes: test_loop.py, where a run is resumed with it.)"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from aligngpt.stages import OF_TRAINING, TRAINING_STEP

FILES = ["summary.txt", "trace.json.gz"]


@pytest.fixture
def flags(parts) -> list[Any]:
    """Of a run that saves at every step."""
    words = ["--model.llm", parts.llms["llama"], "--model.vision", parts.vision, "--data.path", parts.captions]
    return [*words, "--data.image-folder", parts.images, "--data.workers", 0, "--save-every", 1, "--profile"]


def ranges(run_dir: Path) -> list[dict[str, Any]]:
    with gzip.open(run_dir / "profile/trace.json.gz") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]


def test_every_stage_of_three_steps_is_there_and_adds_up(train_here, flags, tmp_path, capsys):
    run = train_here("pretrain", tmp_path / "run", *flags, "--max-steps", 6)
    assert sorted(file.name for file in (run.run_dir / "profile").iterdir()) == FILES
    assert len(run.losses) == 6

    found = ranges(run.run_dir)
    names = [event["name"] for event in found]
    assert names.count("optimizer") == 3
    assert all(names.count(stage) >= 3 for stage in OF_TRAINING), names

    text = (run.run_dir / "profile/summary.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("3 training steps on a CPU, ")
    assert "2 before were not recorded" in lines[0]
    assert len(lines) <= 40
    table = [(line[:42].strip(), float(line[42:52])) for line in text.split("\n\n")[1].splitlines()[1:-1]]
    assert {name for name, _ in table} == {*OF_TRAINING, TRAINING_STEP, "in no stage"}
    steps = sorted((event for event in found if event["name"] == TRAINING_STEP), key=lambda event: event["ts"])[:3]
    whole = sum(event["dur"] for event in steps) / 3e3
    assert sum(milliseconds for _, milliseconds in table[1:]) == pytest.approx(whole, rel=0.1)
    assert float(re.findall(r"host's clock a step took (\S+) ms", text)[0]) == pytest.approx(whole, rel=0.1)


def test_a_short_run_records_what_there_is_and_a_finished_one_nothing(train_here, flags, tmp_path, capsys):
    for _ in range(2):
        train_here("pretrain", tmp_path / "run", *flags, "--max-steps", 2)
    said = capsys.readouterr().out
    assert said.count("1 training step on a CPU") == 1
    assert "it ended before there were the 3 that were to be recorded" in said
    assert "is finished" in said
    assert sorted(file.name for file in (tmp_path / "run/profile").iterdir()) == FILES


def test_other_files_in_its_place_are_refused_before_anything_runs(train_here, flags, tmp_path):
    run_dir = tmp_path / "run"
    train_here("pretrain", run_dir, *flags[:-1], "--max-steps", 1)
    for path in (run_dir / "model").iterdir():
        path.unlink()
    (run_dir / "model").rmdir()
    before = (run_dir / "metrics.jsonl").read_bytes()
    (run_dir / "profile").mkdir()
    (run_dir / "profile/mine.txt").touch()
    with pytest.raises(ValueError, match=r"profile, which holds other files \(mine\.txt\)"):
        train_here("pretrain", run_dir, *flags, "--max-steps", 1)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    (run_dir / "profile/mine.txt").unlink()

    train_here("pretrain", run_dir, *flags, "--max-steps", 1)  # goes on with it; no step is left
    assert (run_dir / "model").is_dir()
    assert list((run_dir / "profile").iterdir()) == []
