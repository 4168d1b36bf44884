"""training/plot.py: what it reads, how it smooths, what stands in the picture, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import plot

ROOT = Path(__file__).parents[2]
STEPS = 40


def write_run(folder: Path, *, levels: bool = False, gate: bool = False, tail: str = "") -> Path:
    """A run of 40 steps, of which the tenth was skipped. `levels`: of 3, where level 2 comes each second step."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, STEPS + 1):
        line = {"step": step, "loss": 3 - step / 20, "lr": 1e-3 / step, "grad_norm": 1.5, "tokens_per_second": 1e4}
        if step == 10:
            line |= {"loss": None, "grad_norm": None}
        if levels:
            line["loss_by_level"] = [1.0 + step, 2.0, 3.0 if step % 2 else None]
            line["tokens_by_level"] = [step, 10, 5 if step % 2 else 0]
        if gate:
            line["gate_weights"] = rng.dirichlet([1, 2]).tolist() if step > 1 else None
        lines.append(json.dumps(line))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
    return folder


def test_smoothing_is_the_weighted_mean_of_the_window():
    rng = np.random.default_rng(1)
    values, weights = rng.normal(size=(30, 3)), rng.integers(0, 4, (30, 3)).astype(float)
    values[rng.random((30, 3)) < 0.3] = np.nan
    values[7] = 1e12  # must leave no trace outside of its windows
    values[10:20, 2] = np.nan  # a whole window without a value
    for window in (1, 4, 5, 1000):  # each for itself, even, odd, all at once
        got = plot.smooth(values, window, weights)
        for step in range(30):
            inside = slice(max(0, step - window // 2), step + (window - 1) // 2 + 1)
            v, w = values[inside], np.where(np.isnan(values[inside]), 0, weights[inside])
            with np.errstate(invalid="ignore"):
                expected = np.nansum(v * w, axis=0) / w.sum(0)
            np.testing.assert_allclose(got[step], expected, rtol=1e-12, atol=1e-12)


def test_a_picture_holds_the_curves_of_all_runs(tmp_path):
    folders = [
        write_run(tmp_path / "a/run", levels=True),
        write_run(tmp_path / "b/run", gate=True, tail='{"step": 41, "loss": 0.1'),  # still at work
        write_run(
            tmp_path / "$x$_1", tail='\0\0\0\n[1]\n{"loss": 1}\n'
        ),  # garbled by a crash; a name that is no formula
    ]
    names = plot.names_of([str(folder) for folder in folders])
    assert names == [str(folders[0]), str(folders[1]), "$x$_1"]
    runs = dict(zip(names, (plot.read_run(str(folder)) for folder in folders), strict=True))
    assert [len(steps) for steps in runs.values()] == [STEPS] * 3
    figure = plot.draw(runs, 4)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}
    by_level = panels.pop(f"Loss by alignment level · {names[0]}")
    gate = panels.pop(f"Gate: weights of the local levels · {names[1]}")
    assert list(panels) == ["Loss", "Learning rate", "Gradient norm", "Speed"]

    loss = panels["Loss"].get_lines()
    assert len(loss) == 3 * 3  # steps, means and skipped steps of each
    assert np.isnan(loss[0].get_ydata()[9])
    assert np.isnan(loss[1].get_ydata()[9])
    np.testing.assert_allclose(loss[1].get_ydata()[20], np.mean([3 - step / 20 for step in (19, 20, 21, 22)]))
    assert loss[2].get_xdata().tolist() == [10]

    level_0, level_1, level_2 = (line.get_ydata() for line in by_level.get_lines())
    steps = np.array([19, 20, 21, 22])
    np.testing.assert_allclose(level_0[20], (steps * (1 + steps)).sum() / steps.sum())  # by tokens, not by steps
    np.testing.assert_allclose(level_1, 2)
    np.testing.assert_allclose(level_2, 3)
    assert [text.get_text() for text in by_level.get_legend().get_texts()] == ["2", "1", "0"]
    assert len(gate.collections) == 2
    tops = gate.collections[-1].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose(tops.max(), 1)


def test_the_command_writes_a_picture_without_torch(tmp_path):
    """It starts in a second: neither PyTorch nor transformers is imported, nor the packages that do."""
    run = write_run(tmp_path / "run", levels=True, gate=True)
    code = (
        "import runpy, sys; sys.argv[1:] = sys.argv[2:]\n"
        "runpy.run_path('training/plot.py', run_name='__main__')\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & sys.modules.keys()"
    )
    out = tmp_path / "curves.png"
    command = [sys.executable, "-W", "error", "-c", code, "plot.py", str(run), "--out", str(out), "--smooth", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: run (40 steps)\n"
    pixels = np.asarray(Image.open(out).convert("L"))
    assert pixels.shape[1] > 1000
    assert 0.01 < (pixels < 250).mean() < 0.5  # drawn, on white


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys):
    run = str(write_run(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "started").mkdir()
    (tmp_path / "started/metrics.jsonl").write_text('{"step": 1, "lo')
    cases = [
        ([str(tmp_path / "no")], f"RUN is {tmp_path}/no; it needs a run's folder"),
        ([run, str(tmp_path / "empty")], f"RUN is {tmp_path}/empty; it needs a run's folder"),
        ([str(tmp_path / "started")], "holds no step yet"),
        ([run, "--smooth", "0"], "--smooth is 0; it needs a whole number of at least 1"),
        ([run, "--out", str(tmp_path / "curves.jsonl")], "it needs a picture that can be written: Format 'jsonl'"),
        ([run, "--out", str(tmp_path / "no/curves.png")], "it needs a picture that can be written"),
    ]
    for args, message in cases:
        with pytest.raises(ValueError, match=r"needs|yet") as error:
            plot.main(args)
        assert message in str(error.value)
    with pytest.raises(SystemExit, match="2"):
        plot.main([])
    assert "RUN" in capsys.readouterr().err
