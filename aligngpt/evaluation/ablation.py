"""One checkpoint with the alignment token made in each way: the paper's Table 4 and Fig. 7.

    conditions(num_levels)              adaptive, local, global, average, level-0 … level-(N-1), none
    write_ablation(out, about, found)   ablation.md, ablation.json and ablation.png in `out`
    console(found)                      the table in a few lines

A task is one column, by its headline. Where a server or a judge has yet to give that under every condition, the first
metric called "accuracy" that covers any questions stands in for it, and the table says so; else its cells read "server"
or "judge". The picture has a panel for each task that has numbers, and there is none if no task has.

The last level's row of the table is what "global" means, so `global` and the last level must agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ALIGN_MODES, AlignMode
from ..data.tables import whole_file, write_json
from . import report
from .report import NOTHING, one_decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = {  # what the alignment token is made of
    "adaptive": "the gate's mean of the local levels + the global one",
    "local": "the gate's mean of the local levels",
    "global": "the global level, which is the last one",
    "average": "the plain mean of the local levels + the global one",
    "level-k": "the k-th level, from 0 for the worst aligned pairs; the last one is what global takes",
    "none": "no alignment token at all",
}
_LINES = {  # colours of Okabe and Ito, and dashes, so that either tells them apart
    "adaptive": ("#D55E00", "solid"),
    "average": ("#009E73", "dashed"),
    "none": ("#777777", "dotted"),
}
_LEVELS = "#0072B2"
_INK = "#333333"


@dataclass(frozen=True, slots=True)
class Condition:
    """How the alignment token is made.

    Fields:
        name: of its folder and row.
        align_mode: what the model's config says.
        level: a fixed level, which comes before the mode; None: by the mode.
    """

    name: str
    align_mode: AlignMode
    level: int | None = None


@dataclass(frozen=True, slots=True)
class _Column:
    """A task under all conditions.

    Fields:
        unit: what the numbers are.
        stand_in: the metric that they are; None: the headline.
        numbers: by condition; None: yet to be given.
        results: by condition.
    """

    title: str
    unit: str
    stand_in: str | None
    numbers: Mapping[str, float | None]
    results: Mapping[str, Mapping[str, Any]]

    @property
    def result(self) -> Mapping[str, Any]:
        """One of the results, for what is the same in all; one that needs something, if any does."""
        return max(self.results.values(), key=lambda result: bool(result["needs"]))

    @property
    def given(self) -> list[float]:
        return [value for value in self.numbers.values() if value is not None]

    @property
    def differences(self) -> dict[str, float | None]:
        """To adaptive."""
        base = self.numbers["adaptive"]
        return {
            name: None if value is None or base is None else value - base
            for name, value in self.numbers.items()
            if name != "adaptive"
        }

    def shown(self, name: str) -> str:
        return report.shown({**self.results[name], "headline": self.numbers[name]})

    def cell(self, name: str) -> str:
        """A condition's number as in the report, in bold where none reads better."""
        value, text = self.numbers[name], self.shown(name)
        best = value is not None and one_decimal(value) == one_decimal(max(self.given))
        return f"**{text}**" if best else text


def conditions(num_levels: int) -> list[Condition]:
    """All of them, for a model of so many levels, in the order of the table."""
    modes: list[AlignMode] = ["adaptive", "local", "global", "average"]
    levels = [Condition(f"level-{level}", "adaptive", level) for level in range(num_levels)]
    return [*[Condition(mode, mode) for mode in modes], *levels, Condition("none", "none")]


def write_ablation(out: Path, about: Mapping[str, Any], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """Write the table and the picture, each file whole or not at all; returns their paths.

    found: the results under every condition, by its name.
    """
    rows = conditions(len(found) - len(ALIGN_MODES))
    about = {name: value for name, value in about.items() if name not in ("align_mode", "level")}
    columns = _columns({row.name: found[row.name] for row in rows})
    content = {
        "about": about,
        "conditions": [{"name": row.name, "align_mode": row.align_mode, "level": row.level} for row in rows],
        "tasks": [
            {
                "task": column.result["task"],
                "title": column.result["title"],
                "column": column.result["column"],
                "measure": column.stand_in or "headline",
                "needs": column.result["needs"],
                "questions": column.result["questions"],
                "partly": column.result["partly"],
                "numbers": column.numbers,
                "difference": column.differences,
                "gain": {name: result["gain"] for name, result in column.results.items()},
            }
            for column in columns
        ],
    }
    paths = [out / "ablation.md", out / "ablation.json"]
    write_json(paths[1], content, indent=1)
    drawn = [column for column in columns if column.given]
    if drawn:
        paths.append(out / "ablation.png")
        picture = _figure(drawn, rows, about["model"])
        with whole_file(paths[-1]) as temporary:
            picture.savefig(temporary, dpi=110, format="png")
    report.write_text(paths[0], _text(about, rows, columns, bool(drawn)))
    return paths


def console(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line for each condition, then what must be known of the numbers."""
    columns = _columns(found)
    rows = [["", *[column.title for column in columns]]]
    rows += [[name, *[column.shown(name) for column in columns]] for name in found]
    first, *widths = (max(map(len, cells)) for cells in zip(*rows, strict=True))
    lines = [
        row[0].ljust(first) + "".join(cell.rjust(width + 3) for cell, width in zip(row[1:], widths, strict=True))
        for row in rows
    ]
    return "\n".join([*lines, *_errors(columns), *report.notes([column.result for column in columns])])


def _columns(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[_Column]:
    columns = []
    for task in report.in_order(found["adaptive"]):
        results = {
            name: next(result for result in several if result["task"] == task["task"])
            for name, several in found.items()
        }
        numbers = {name: result["headline"] for name, result in results.items()}
        unit, stand_in = report.COLUMNS.get(task["column"], report.ELSE), None
        if all(value is None for value in numbers.values()) and (path := _stand_in(task["metrics"])):
            numbers = {name: _metric(result["metrics"], path) for name, result in results.items()}
            stand_in = "/".join(path)
            unit = f"{stand_in}, %"
        columns.append(_Column(task["column"] or task["title"], unit, stand_in, numbers, results))
    return columns


def _stand_in(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    for path, values in report.leaves(metrics):
        if isinstance(values.get("accuracy"), int | float) and values.get("questions") != 0:
            return (*path, "accuracy")
    return ()


def _metric(metrics: Any, path: tuple[str, ...]) -> float:
    for name in path:
        metrics = metrics[name]
    return metrics


def _signed(value: float | None) -> str:
    return NOTHING if value is None else f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: no -0.0


def _text(about: Mapping[str, Any], rows: Sequence[Condition], columns: Sequence[_Column], drawn: bool) -> str:
    header = ["", *[column.title for column in columns]]
    differences = [column.differences for column in columns]
    asked = ", ".join(f"{column.title} {column.result['questions']:,}" for column in columns)
    stand_ins = [
        f"{column.title}: `{column.stand_in}` of its metrics stands in for the headline"
        for column in columns
        if column.stand_in
    ]
    parts = [
        f"# {about['model']}: what the alignment token is made of",
        report.table(header, [[row.name, *[column.cell(row.name) for column in columns]] for row in rows]),
        f"Bold: the best of a column. Questions: {asked}.",
        *report.bullets([*_errors(columns), *stand_ins, *report.notes([column.result for column in columns])]),
        "## Difference to adaptive, before rounding",
        report.table(
            header,
            [
                [row.name, *[_signed(difference[row.name]) for difference in differences]]
                for row in rows
                if row.name != "adaptive"
            ],
        ),
        *_gains(columns, rows),
        *(["## By fixed level", "![Numbers by fixed level](ablation.png)"] if drawn else []),
        "## What the rows are",
        report.table(["", "the alignment token is"], list(_ROWS.items()), align=":--"),
        "## How it was run",
        report.settings(about),
    ]
    return "\n\n".join(parts) + "\n"


def _gains(columns: Sequence[_Column], rows: Sequence[Condition]) -> list[str]:
    """What can be told from chance: all rows are asked the same questions."""
    known = [column for column in columns if column.results["adaptive"]["credit"]]
    if not known:
        return []
    cells = [
        [row.name, *[_gain(column.results[row.name]["gain"]) for column in known]]
        for row in rows
        if row.name != "adaptive"
    ]
    return [
        "## More right answers than adaptive, in points, and the standard error of that",
        report.table(["", *[column.title for column in known]], cells),
        "Bold: more than two standard errors.",
    ]


def _gain(gain: Mapping[str, float]) -> str:
    mean, error = gain["mean"], gain["standard_error"]
    text = f"{mean + 0.0:+.2f} ± {error:.2f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def _errors(columns: Sequence[_Column]) -> list[str]:
    """How far chance alone moves the share of right answers."""
    known = [(column.title, credit) for column in columns if (credit := column.results["adaptive"]["credit"])]
    if not known:
        return []
    errors = ", ".join(f"{title} {credit['standard_error']:.1f}" for title, credit in known)
    return [
        f"Standard error of the share of right answers, in points: {errors}. "
        "All rows are asked the same questions, so that their differences vary less."
    ]


def _figure(columns: Sequence[_Column], rows: Sequence[Condition], model: str) -> "Figure":
    """A panel for each task: its number over the fixed level, and lines across for the ways without one."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    wide = min(len(columns), 2 if len(columns) in (2, 4) else 3)
    high = -(-len(columns) // wide)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(max(4.2 * wide, 7), 3 * high + 1.2), layout=layout)
    grid = figure.subplots(high, wide, squeeze=False).flatten()
    for axes in grid[len(columns) :]:
        axes.set_axis_off()
    levels = [row.name for row in rows if row.level is not None]
    for axes, column in zip(grid, columns, strict=False):
        _panel(axes, column, levels)
    lines = {line.get_label(): line for axes in grid[: len(columns)] for line in axes.get_lines()}
    legend = figure.legend(
        lines.values(),
        lines.keys(),
        title=f"{model}: one fixed alignment level for all pictures,\n"
        f"from 0 (worst aligned) to {len(levels) - 1} (best aligned, the global one)",
        loc="outside upper left",
        ncols=len(lines),
        frameon=False,
        handlelength=3,
        alignment="left",
    )
    legend.get_title().set(color=_INK, size=11, parse_math=False)
    return figure


def _panel(axes: "Axes", column: _Column, levels: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, (color, dashes) in _LINES.items():
        value = column.numbers[name]
        if value is not None:
            axes.axhline(value, color=color, linestyle=dashes, linewidth=1.8, label=name)
    values = np.array([column.numbers[name] for name in levels], dtype=float)  # None is NaN
    axes.plot(range(len(levels)), values, "o-", color=_LEVELS, markersize=5, label="fixed level")
    title = f"{column.title} (a part of the questions)" if column.result["partly"] else column.title
    axes.set_title(title, loc="left", size=11, weight="bold", color=_INK, parse_math=False)
    axes.set_xlabel("fixed level", size=9, color=_INK)
    axes.set_ylabel(column.unit, size=9, color=_INK)
    axes.tick_params(labelsize=9, color=_INK, labelcolor=_INK)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
