"""`--data.levels FILE`: a file that `aligngpt levels` made is what the run trains on, or the run is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch.distributed as dist

from aligngpt.cli import main
from aligngpt.data.llava_json import read_llava_json
from aligngpt.data.tables import data_hash, part_name, write_manifest, write_table
from training.config import read_command_line
from training.entry import run

ASIDE = 4  # a pair without a score, whose picture is missing


def make_levels(data: Path, folder: Path, name: str = "levels", *, seed: int = 0, num_levels: int = 8) -> Path:
    """FOLDER/NAME.parquet and FOLDER/NAME.json of random scores, NaN for one pair."""
    samples = read_llava_json(data)
    records = [sample.record for sample in samples if sample.images]
    scores = np.random.default_rng(seed).random(len(records), dtype=np.float32)
    scores[ASIDE] = np.nan
    missing = pyarrow.array([None if np.isfinite(score) else "lost" for score in scores], pyarrow.string())
    table = pyarrow.table(
        {
            "record": records,
            "id": [samples[record].id for record in records],
            "score": scores,
            "truncated": [False] * len(records),
            "problem": missing,
        }
    )
    about = {"kind": "scores", "data": {"sha256": data_hash(samples)}}
    (folder / "scores").mkdir(exist_ok=True)
    write_table(folder / "scores" / part_name(0), table, about)
    write_manifest(folder / "scores", about, 1, {})
    out = folder / f"{name}.parquet"
    words = ["levels", folder / "scores", "--data", data, "--out", out, "--num-levels", num_levels]
    assert main([str(word) for word in [*words, "--json", folder / f"{name}.json"]]) == 0
    return out


@pytest.fixture
def images(parts: Any, tmp_path: Path) -> Path:
    """The pictures without the one of the pair that is set aside."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in parts.images.iterdir():
        if path.name != f"{ASIDE}.png":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def flags(parts: Any, images: Path) -> list[object]:
    words: list[object] = ["--model.llm", parts.llms["llama"], "--model.vision", parts.vision, "--data.workers", 0]
    return [*words, "--data.image-folder", images, "--global-batch-size", 4]


def test_a_run_with_a_levels_file_is_the_run_with_these_levels_in_the_records(
    parts: Any, launch: Callable[..., Any], images: Path, tmp_path: Path
) -> None:
    levels = make_levels(parts.captions, tmp_path)
    common = flags(parts, images)
    by_file = [
        launch(
            "pretrain",
            tmp_path / f"file-{n}",
            *common,
            "--data.path",
            parts.captions,
            "--data.levels",
            levels,
            processes=n,
        )
        for n in (0, 2)
    ]
    by_record = launch("pretrain", tmp_path / "record", *common, "--data.path", levels.with_suffix(".json"))
    for done in (*by_file, by_record):
        assert done.status == 0, done.output
    for done in by_file:
        assert done.output.count("1 of 12 samples are left out") == 1, done.output
    assert by_file[0].losses == by_record.losses
    assert by_file[0].losses == pytest.approx(by_file[1].losses, abs=1e-5)

    other = launch(
        "pretrain", tmp_path / "random", *common, "--data.path", levels.with_suffix(".json"), "--data.levels", "random"
    )
    assert other.losses != by_record.losses  # levels make a difference here


def test_a_run_is_not_resumed_with_other_levels_in_the_file(
    parts: Any, launch: Callable[..., Any], images: Path, tmp_path: Path
) -> None:
    levels = make_levels(parts.captions, tmp_path)
    common = [*flags(parts, images), "--data.path", parts.captions, "--data.levels", levels, "--max-steps", 1]
    first = launch("pretrain", tmp_path / "run", *common)
    assert first.status == 0, first.output
    assert launch("pretrain", tmp_path / "run", *common).status == 0
    make_levels(parts.captions, tmp_path, seed=1)
    second = launch("pretrain", tmp_path / "run", *common)
    assert second.status == 1
    assert "which holds a run with another config" in second.output
    assert "data.levels_hash" in second.output


def of_other_data(parts: Any, tmp_path: Path) -> Path:
    records = json.loads(parts.captions.read_text())
    (tmp_path / "other.json").write_text(json.dumps([*records[1:], records[0]]))
    return make_levels(tmp_path / "other.json", tmp_path)


def scores_file(parts: Any, tmp_path: Path) -> Path:
    return make_levels(parts.captions, tmp_path).with_name("scores") / part_name(0)


def without_a_pair(parts: Any, tmp_path: Path) -> Path:
    path = make_levels(parts.captions, tmp_path)
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(pyarrow.concat_tables([table[:7], table[8:]]), path)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (of_other_data, ["levels.parquet belongs to other data"]),  # fault 34
        (without_a_pair, ["levels.parquet", "record 7 (id s7) has no level", "0..7"]),  # fault 35
        (lambda parts, tmp: make_levels(parts.captions, tmp, num_levels=4), ["--data.levels", "4 levels", "model's 8"]),
        (scores_file, ["part-000000.parquet holds scores", "it needs levels, made by `aligngpt levels`"]),
        (lambda parts, tmp: parts.captions, ["captions.json is no Parquet file"]),
        (lambda parts, tmp: "recrod", ["--data.levels", "recrod", "it needs record, random, none, or a file"]),
    ],
)
def test_fault_34_fault_35_levels_that_do_not_fit_are_refused(
    parts: Any,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Any, Path], object],
    says: list[str],
) -> None:
    words = [*flags(parts, images), "--data.path", parts.captions, "--data.levels", make(parts, tmp_path)]
    words += ["--run-dir", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", ["pretrain.py", "tiny", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run("pretrain")
    if dist.is_initialized():
        dist.destroy_process_group()
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    for word in says:
        assert word in said
    assert not (tmp_path / "run").exists()


def test_a_path_becomes_absolute_and_words_stay(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").write_text("a file whose name is one of the words")
    common = [*flags(parts, parts.images), "--data.path", parts.captions, "--run-dir", "run", "--data.levels"]
    for given, kept in (("random", "random"), ("./random", str(tmp_path / "random"))):
        config = read_command_line("pretrain", ["tiny", *map(str, common), given])
        assert config.data.levels == kept
        assert (config.data.levels_hash != "") == (given != "random")
    with pytest.raises(ValueError, match=r"--data\.levels-hash is 12"):
        read_command_line("pretrain", ["tiny", *map(str, common), "./random", "--data.levels-hash", "12"])
