"""Curves of one or several runs, from the metrics.jsonl in their folders, finished or still at work.

    python training/plot.py runs/a runs/b --out curves.png --smooth 20

One picture: loss, learning rate, gradient norm and tokens per second of all runs; then, for each run that has them, the
loss of each alignment level (stage 1) and the mean weights of the gate over the local levels (stage 2). Faint lines are
the steps, strong ones the mean of the --smooth steps around each (20, in a run of less than 200 a tenth of it), which
for a level is taken over its tokens. A cross below the loss is a step that was skipped. The learning rate is the LLM's
or, where that does not train, the projector's.

It refuses a folder without a metrics.jsonl and a file without a step. What a run at work has not yet written to the end
of its line, and what a crash garbled, is left out. Exit status: 0 done, 1 not possible, 2 a command line that is not
understood.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#333333"
_PANELS = (  # field, title, unit
    ("loss", "Loss", "mean over supervised tokens"),
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping, log scale"),
    ("tokens_per_second", "Speed", "tokens/s of all processes"),
)


def read_run(folder: str) -> list[dict[str, Any]]:
    """The steps of a run, in the file's order.

    Raises:
        ValueError: no such file, or no whole line in it.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"RUN is {folder}; it needs a run's folder, with a metrics.jsonl in it")
    steps = []
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            steps.append(value)
    if not steps:
        raise ValueError(f"{path} holds no step yet; a line comes with each step that the run has done")
    return steps


def column(steps: list[dict[str, Any]], name: str) -> np.ndarray:  # (steps,)
    """A field over the steps, NaN where it is null or missing."""
    return np.array([np.nan if step.get(name) is None else step[name] for step in steps], dtype=float)


def columns(steps: list[dict[str, Any]], name: str) -> np.ndarray:  # (steps, width)
    """A field that is a list, likewise; (steps, 0) where no step has it."""
    lists = [step.get(name) or [] for step in steps]
    width = max(map(len, lists))
    rows = [[np.nan if value is None else value for value in values] or [np.nan] * width for values in lists]
    return np.array(rows, dtype=float).reshape(len(steps), width)


def smooth(values: np.ndarray, window: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Means of the `window` values around each (steps, …), by weight; of fewer at the ends. NaN counts as no value.

    Each window is summed for itself: the difference of two running sums would not be exact.
    """
    window = min(window, 2 * len(values))
    weights = np.ones_like(values) if weights is None else weights
    weights = np.where(np.isnan(values) | np.isnan(weights), 0, weights)
    padding = [(window // 2, (window - 1) // 2), *[(0, 0)] * (values.ndim - 1)]

    def sums(array: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(np.pad(array, padding), window, axis=0).sum(-1)

    total, count = sums(np.where(weights > 0, values, 0) * weights), sums(weights)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def draw(runs: dict[str, list[dict[str, Any]]], smoothed: int | None) -> Figure:
    """The picture of `runs`, each under its name; smoothed: steps of a mean, None for what suits the run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    levelled = [name for name, steps in runs.items() if columns(steps, "loss_by_level").size]
    gated = [name for name, steps in runs.items() if columns(steps, "gate_weights").size]
    panels = len(_PANELS) + len(levelled) + len(gated)
    rows = (panels + 1) // 2
    figure = Figure(figsize=(13, 0.8 + 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes in grid[panels:]:
        axes.set_axis_off()

    windows = {name: smoothed or min(20, max(1, len(steps) // 10)) for name, steps in runs.items()}
    colors = _colors("tab10", len(runs))
    for axes, (field, title, unit) in zip(grid, _PANELS, strict=False):
        for color, (name, steps) in zip(colors, runs.items(), strict=True):
            _curve(axes, column(steps, "step"), column(steps, field), color, windows[name] if field != "lr" else 1)
            if field == "loss":
                _mark_skipped(axes, steps, color)
        _finish(axes, title, unit)
    grid[2].set_yscale("log")
    grid[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    grid[2].yaxis.set_minor_formatter(NullFormatter())
    for axes in grid[1:3]:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    grid[3].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    grid[3].set_ylim(bottom=0)

    rest = iter(grid[len(_PANELS) :])
    of_run = (lambda name: f" · {name}") if len(runs) > 1 else (lambda name: "")
    for name in levelled:
        _draw_levels(next(rest), runs[name], windows[name], of_run(name))
    for name in gated:
        _draw_gate(next(rest), runs[name], windows[name], of_run(name))

    names = [f"{name}  ({steps[-1]['step']:,} steps)" for name, steps in runs.items()]
    if len(runs) == 1:
        figure.suptitle(names[0], x=0.01, ha="left", color=_INK, parse_math=False)
    else:
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color=color, linewidth=2.5) for color in colors]
        legend = figure.legend(lines, names, loc="outside upper left", ncols=min(len(names), 4), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _curve(axes: Axes, x: np.ndarray, values: np.ndarray, color: Any, window: int) -> None:
    if window > 1:
        axes.plot(x, values, color=color, alpha=0.25, linewidth=0.8)
        values = np.where(np.isnan(values), np.nan, smooth(values, window))
    axes.plot(x, values, color=color, linewidth=1.6)


def _mark_skipped(axes: Axes, steps: list[dict[str, Any]], color: Any) -> None:
    skipped = column(steps, "step")[np.isnan(column(steps, "loss"))]
    at_bottom = axes.get_xaxis_transform()
    axes.plot(skipped, np.full(len(skipped), 0.02), "x", color=color, markersize=5, transform=at_bottom)


def _draw_levels(axes: Axes, steps: list[dict[str, Any]], window: int, of_run: str) -> None:
    losses, tokens = columns(steps, "loss_by_level"), columns(steps, "tokens_by_level")
    means = smooth(losses, window, tokens)
    num_levels = losses.shape[1]
    for level, color in enumerate(_colors("viridis", num_levels)):
        seen = ~np.isnan(means[:, level])  # few steps have samples of all levels
        axes.plot(column(steps, "step")[seen], means[seen, level], color=color, linewidth=1.4, label=str(level))
    _finish(axes, f"Loss by alignment level{of_run}", "mean over the level's tokens")
    _beside(axes, "level")


def _draw_gate(axes: Axes, steps: list[dict[str, Any]], window: int, of_run: str) -> None:
    weights = columns(steps, "gate_weights")
    means = smooth(weights, window)
    num_local = weights.shape[1]
    colors = _colors("viridis", num_local + 1)[:-1]  # the last level is the global one, which has no weight
    x = column(steps, "step")
    axes.stackplot(x, means.T, colors=colors, labels=[str(level) for level in range(num_local)], linewidth=0)
    for edge in np.cumsum(means, axis=1).T[:-1]:
        axes.plot(x, edge, color="white", linewidth=0.6)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    _finish(axes, f"Gate: weights of the local levels{of_run}", "mean over samples with an image")
    _beside(axes, "level")


def _finish(axes: Axes, title: str, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", size=11, weight="bold", color=_INK, parse_math=False)
    axes.set_ylabel(unit, size=9, color=_INK)
    axes.set_xlabel("step", size=9, color=_INK)
    axes.tick_params(labelsize=9, color=_INK, labelcolor=_INK)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _beside(axes: Axes, title: str) -> None:
    """A legend to the right of the axes, in the order in which the picture has its lines: the highest on top."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        title=title,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
    )


def _colors(name: str, number: int) -> list[Any]:
    import matplotlib

    colormap = matplotlib.colormaps[name]
    places: Any = np.arange(number) % colormap.N if name == "tab10" else np.linspace(0, 0.92, number)
    return list(colormap(places))


def names_of(folders: Sequence[str]) -> list[str]:
    """Folders by their last name; by the whole path where two share it."""
    last = [Path(folder).resolve().name for folder in folders]
    return [name if last.count(name) == 1 else folder for name, folder in zip(last, folders, strict=True)]


def main(args: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        ValueError: a run that cannot be drawn, or a picture that cannot be written there.
    """
    parser = argparse.ArgumentParser(prog="training/plot.py", description="Draw the curves of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, which holds metrics.jsonl")
    parser.add_argument("--out", default="curves.png", metavar="FILE", help="PNG, SVG or PDF (default: %(default)s)")
    parser.add_argument(
        "--smooth", type=int, metavar="STEPS", help="window of means (default: 20, or a tenth of a shorter run)"
    )
    options = parser.parse_args(args)
    if options.smooth is not None and options.smooth < 1:
        raise ValueError(f"--smooth is {options.smooth}; it needs a whole number of at least 1")
    folders = list(dict.fromkeys(options.runs))
    runs = dict(zip(names_of(folders), map(read_run, folders), strict=True))
    figure = draw(runs, options.smooth)
    try:
        figure.savefig(options.out, dpi=120)
    except (ValueError, OSError) as error:
        raise ValueError(f"--out is {options.out}; it needs a picture that can be written: {error}") from error
    print(f"{options.out}: {', '.join(f'{name} ({len(steps):,} steps)' for name, steps in runs.items())}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
