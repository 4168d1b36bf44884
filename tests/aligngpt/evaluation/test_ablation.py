"""Ablations read back: numbers, the best, differences, stand-ins; and what the picture's lines are drawn from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from aligngpt.config import ALIGN_MODES
from aligngpt.evaluation import ablation, report

NAMES = ["adaptive", "local", "global", "average", "level-0", "level-1", "level-2", "none"]
ABOUT = {"model": "$tiny$", "align_mode": "all", "level": None, "dtype": "float32", "limit": None}
HEADLINES = {
    "pope": [85.94, 85.0, 84.0, 85.96, 80.0, 82.0, 84.0, 79.5],
    "mme": [1500.0, 1400.0, None, 1510.7, 1300.0, None, 1350.0, 1200.0],  # judged in part, as it were
    "vizwiz": [None] * 8,  # "val/accuracy" stands in
    "vqav2": [None] * 8,
    "seed": [66.0, 65.97, 60.0, 61.0, 62.0, 63.0, 64.0, 65.0],
}
VIZWIZ = [54.0, 53.0, 52.0, 51.0, 50.0, 51.5, 52.0, 49.0]
COLUMNS = {"pope": "POPE", "mme": "MME", "vizwiz": "VizWiz", "vqav2": "VQAv2", "seed": "SEED"}


def result(task: str, place: int) -> dict[str, Any]:
    needs = "a judge: name one" if HEADLINES[task][place] is None else ""
    waits = {"vizwiz": "its server: upload", "vqav2": "its server: upload"}
    metrics: dict[str, Any] = {"answers": 3}
    if task == "vizwiz":
        metrics |= {
            "none": {"questions": 0, "accuracy": 0.0},
            "val": {"questions": 9, "accuracy": VIZWIZ[place]},
        }
    made = {"task": task, "title": f"The {task}", "column": COLUMNS[task], "headline": HEADLINES[task][place]}
    made |= {"metrics": metrics, "needs": waits.get(task, needs), "partly": task == "seed"}
    credit = {"mean": 50.0, "standard_error": 1.58} if task == "pope" else None
    gain = {"mean": -0.25 * place, "standard_error": 0.5} if credit else None
    return {**made, "questions": 1000, "credit": credit, "gain": gain, "seconds": 1.0, "files": []}


def found(*tasks: str) -> dict[str, list[dict[str, Any]]]:
    return {name: [result(task, place) for task in tasks] for place, name in enumerate(NAMES)}


def rows(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The cells of the table after a heading, by row and column."""
    lines = [line for line in text.partition(heading)[2].split("\n\n")[1].splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in body}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What would be saved as pictures."""
    saved: list[Figure] = []

    def keep(figure: Figure, path: Path, **_: Any) -> None:
        saved.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def test_conditions_in_order() -> None:
    conditions = ablation.conditions(3)
    assert [condition.name for condition in conditions] == NAMES
    assert [condition.level for condition in conditions] == [None] * 4 + [0, 1, 2, None]
    modes = [condition.align_mode for condition in conditions if condition.level is None]
    assert modes == list(ALIGN_MODES)
    assert all(condition.align_mode != "none" for condition in conditions if condition.level is not None)


def test_table_and_json(tmp_path: Path) -> None:
    written = ablation.write_ablation(tmp_path, ABOUT, found("seed", "pope", "mme", "vizwiz", "vqav2"))
    assert [path.name for path in written] == ["ablation.md", "ablation.json", "ablation.png"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    text = written[0].read_text()
    table = rows(text, "# $tiny$")
    assert list(table) == NAMES
    assert list(table["none"]) == ["VQAv2", "VizWiz", "POPE", "MME", "SEED"]  # the paper's order
    numbers = {**HEADLINES, "vizwiz": VIZWIZ}
    for task, column in COLUMNS.items():
        for name, number in zip(NAMES, numbers[task], strict=True):
            cell = table[name][column].replace("*", "").removesuffix(" †")
            assert cell == ({"vqav2": "server", "mme": "judge"}[task] if number is None else f"{number:.1f}")
    assert "\n- Standard error of the share of right answers, in points: POPE 1.6. All rows" in text
    gains = rows(text, "## More right answers than adaptive, in points, and the standard error of that")
    assert [(name, list(cells)) for name, cells in gains.items()] == [(name, ["POPE"]) for name in NAMES[1:]]
    assert gains["local"]["POPE"] == "-0.25 ± 0.50"
    assert gains["level-0"]["POPE"] == "-1.00 ± 0.50"
    assert gains["level-1"]["POPE"] == "**-1.25 ± 0.50**"
    assert all(table[name]["SEED"].replace("*", "").endswith(" †") for name in NAMES)
    bold = {(name, column) for name, cells in table.items() for column, cell in cells.items() if "**" in cell}
    assert bold == {
        *[("adaptive", "VizWiz"), ("average", "POPE"), ("average", "MME")],
        *[("adaptive", "SEED"), ("local", "SEED")],  # both read 66.0
    }
    difference = rows(text, "## Difference to adaptive")
    assert list(difference) == NAMES[1:]
    assert [difference[name]["POPE"] for name in ("global", "average", "none")] == ["-1.9", "+0.0", "-6.4"]
    assert difference["local"]["SEED"] == "+0.0"  # -0.03
    assert (difference["global"]["MME"], difference["none"]["VQAv2"]) == ("–", "–")
    assert "- VizWiz: `val/accuracy` of its metrics stands in for the headline\n" in text
    assert "- † a part of the questions (The seed 1,000), which must not be compared" in text
    assert "- The mme needs a judge: name one" in text
    assert "| dtype | float32 |" in text
    assert "align mode" not in text

    content = json.loads(written[1].read_text())
    assert [row["name"] for row in content["conditions"]] == NAMES
    assert content["conditions"][5] == {"name": "level-1", "align_mode": "adaptive", "level": 1}
    tasks = {task["task"]: task for task in content["tasks"]}
    for task, wanted in numbers.items():
        assert tasks[task]["numbers"] == dict(zip(NAMES, wanted, strict=True))
    assert tasks["pope"]["difference"]["none"] == pytest.approx(79.5 - 85.94)
    assert tasks["mme"]["difference"]["global"] is None
    assert (tasks["vizwiz"]["measure"], tasks["mme"]["measure"]) == ("val/accuracy", "headline")

    picture = Image.open(written[2]).convert("RGB")
    assert picture.width > 800
    assert picture.height > 600
    colors = {color for _, color in picture.getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} <= colors  # fixed, adaptive, average


def test_lines_for_the_terminal() -> None:
    text = ablation.console(found("pope", "vqav2"))
    header, *lines = text.splitlines()
    assert header.split() == ["VQAv2", "POPE"]
    assert [line.split() for line in lines[:8]] == [
        [name, "server", f"{number:.1f}"] for name, number in zip(NAMES, HEADLINES["pope"], strict=True)
    ]
    assert len({len(line) for line in [header, *lines[:8]]}) == 1
    assert "POPE 1.6" in text
    assert "needs its server: upload" in text


def test_picture(tmp_path: Path, figures: list[Figure]) -> None:
    ablation.write_ablation(tmp_path, ABOUT, found("seed", "pope", "mme", "vizwiz", "vqav2"))
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes if axes.axison}
    assert list(panels) == ["VizWiz", "POPE", "MME", "SEED (a part of the questions)"]  # VQAv2 has no numbers
    labels = [axes.get_ylabel() for axes in panels.values()]
    assert labels == ["val/accuracy, %", "F1, %", "points of 2,000", "accuracy, %"]
    for axes, task in zip(panels.values(), ["vizwiz", "pope", "mme", "seed"], strict=True):
        assert axes.get_xlabel() == "fixed level"
        lines = {line.get_label(): line for line in axes.get_lines()}
        wanted = {**HEADLINES, "vizwiz": VIZWIZ}[task]
        assert sorted(lines) == ["adaptive", "average", "fixed level", "none"]
        np.testing.assert_array_equal(lines["fixed level"].get_xdata(), [0, 1, 2])
        np.testing.assert_array_equal(lines["fixed level"].get_ydata(), np.array(wanted[4:7], dtype=float))
        for name, number in zip(NAMES, wanted, strict=True):
            if name in lines:
                assert set(lines[name].get_ydata()) == {number}
        looks = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in lines.values()}
        assert len({color for color, _, _ in looks}) == len({(style, marker) for _, style, marker in looks}) == 4
    assert "$tiny$" in figures[0].legends[0].get_title().get_text()


def test_one_task_and_twelve(tmp_path: Path, figures: list[Figure]) -> None:
    assert len(ablation.write_ablation(tmp_path, ABOUT, found("pope"))) == 3
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["POPE"]
    twelve = {
        name: [
            {**results[0], "task": column, "title": column, "column": column if column != "GQA" else ""}
            for column in report.COLUMNS
        ]
        for name, results in found("pope").items()
    }
    ablation.write_ablation(tmp_path, ABOUT, twelve)
    titles = [axes.get_title(loc="left") for axes in figures[1].axes]
    assert titles == [column for column in report.COLUMNS if column != "GQA"] + ["GQA"]  # what has no column comes last
    assert figures[1].axes[-1].get_ylabel() == "accuracy, %"


def test_nothing_to_draw(tmp_path: Path, figures: list[Figure]) -> None:
    written = ablation.write_ablation(tmp_path, ABOUT, found("vqav2"))
    assert [path.name for path in written] == ["ablation.md", "ablation.json"]
    assert not figures
    text = (tmp_path / "ablation.md").read_text()
    assert "png" not in text
    assert {cells["VQAv2"] for cells in rows(text, "# $tiny$").values()} == {"server"}
