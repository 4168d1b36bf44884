"""The pictures of docs/performance.md: roofline, stages of a whole, ours against peers, growth of cost.

SVG files that are the same whenever the numbers are: no date, no random ids, no fonts inside. Their colours change with
the reader's dark or light theme. What is drawn comes from `benchmarks.readings`; nothing is computed here but places.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.fit import FASTER as TOO_FAST
from benchmarks.fit import Sweep
from benchmarks.readings import Breakdown
from benchmarks.stages import TABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PAPER = "#1f2328", "#d0d7de", "#ffffff"
DARK = {INK: "#e6edf3", FAINT: "#3d444d", PAPER: "#0d1117"}  # what these become where the reader's theme is dark
FASTER, SLOWER, OTHER = "#2f81f7", "#d1453b", "#8b949e"
HUES = ("#2f81f7", "#e3742f", "#2da44e", "#a371f7", "#d1453b", "#17a2b8", "#bf8700", "#e85aad", "#6e7fd1", "#7ea04d")
TINTS = ("#9cc6ff", "#f3b98e", "#93d8a4", "#d6bcfa", "#eba39d", "#8fd6e0", "#e6c66f", "#f5b3d9", "#bcc5f2", "#c3d6a4")
ON_HUE, ON_TINT = "#fffffe", "#1f2329"  # of writing there, which stays when the theme changes
WIDTH = 9.0  # inches
MOVES_ONLY = 2.0**-5  # FLOPs a byte at which work without arithmetic is drawn


class Point(NamedTuple):
    stage: str
    flops: float
    bytes: float
    seconds: float


def color(stage: str) -> str:
    """Of a stage, the same in every chart."""
    rows = list(TABLE)
    colors = HUES + TINTS
    return colors[rows.index(stage) % len(colors)] if stage in rows else OTHER


def marker(stage: str) -> str:
    """Another one where colours are lighter."""
    return "s" if color(stage) in TINTS else "o"


def roofline(points: Sequence[Point], bytes_per_second: float, flops_per_second: float, title: str) -> "Figure":
    """Each case's rate against its FLOPs a byte, below what the device was measured to reach."""
    figure, axes = _empty(4.6, title)
    ridge = flops_per_second / bytes_per_second
    intensity = [max(point.flops / point.bytes, MOVES_ONLY) if point.bytes else 64 * ridge for point in points]
    left, right = MOVES_ONLY / 2, 4 * max(ridge, *intensity)
    roof = ([left, ridge, right], [left * bytes_per_second, flops_per_second, flops_per_second])
    axes.loglog(*roof, color=INK, linewidth=1.4)
    axes.fill_between(*roof, min(roof[1]) * 1e-4, color=FAINT, alpha=0.25, linewidth=0)
    shown: dict[str, None] = dict.fromkeys(point.stage for point in points)
    for stage in shown:
        chosen = [(x, p) for x, p in zip(intensity, points, strict=True) if p.stage == stage]
        rates = [max(p.flops, MOVES_ONLY * p.bytes) / p.seconds for _, p in chosen]
        hue, form = color(stage), marker(stage)
        axes.plot([x for x, _ in chosen], rates, form, color=hue, label=stage, alpha=0.85, markersize=6, mew=0)
    low = min(max(p.flops, MOVES_ONLY * p.bytes) / p.seconds for p in points)
    axes.set_ylim(low / 3, flops_per_second * 3)
    axes.set_xlim(left, right)
    axes.text(right / 1.2, flops_per_second * 1.25, "measured matrix rate", ha="right", color=INK)
    axes.text(ridge / 6, ridge / 24 * bytes_per_second, "measured copy bandwidth", color=INK)
    axes.set_xlabel("FLOPs a byte (work without arithmetic at the left edge)")
    axes.set_ylabel("FLOP/s")
    _legend(axes)
    return figure


def stages(wholes: Sequence[Breakdown], title: str) -> "Figure":
    """Of each whole one bar, its stages as shares of it."""
    figure, axes = _empty(1.3 + 0.62 * len(wholes), title)
    labelled: set[str] = set()
    for row, whole in enumerate(wholes):
        left = 0.0
        parts = [(part.name, part.us, color(part.name)) for part in whole.parts]
        rest = sum(part.us for part in whole.rest) or max(whole.whole_us - whole.sum_us, 0)
        for name, us, hue in [*parts, ("the rest", rest, OTHER)]:
            share = 100 * us / whole.whole_us
            label = None if name in labelled else name
            axes.barh(row, share, left=left, color=hue, height=0.6, label=label, edgecolor=PAPER, linewidth=0.5)
            labelled.add(name)
            if share >= 6:
                ink = ON_TINT if hue in TINTS else ON_HUE
                axes.text(left + share / 2, row, f"{share:.0f} %", ha="center", va="center", color=ink)
            left += share
    axes.set_yticks(range(len(wholes)), [_wrapped(whole.case) for whole in wholes])
    axes.invert_yaxis()
    axes.axvline(100, color=INK, linewidth=1)
    axes.set_xlabel("% of the whole's time")
    _legend(axes)
    return figure


def peers(ratios: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> "Figure":
    """By group and contender: its time divided by ours in every case, around 1."""
    rows = [(group, name, values) for group, of in ratios.items() for name, values in of.items()]
    figure, axes = _empty(1.2 + 0.24 * len(rows), title)
    axes.set_xscale("log", base=2)
    previous = ""
    for row, (group, _, values) in enumerate(rows):
        axes.plot([min(values), max(values)], [row, row], color=OTHER, linewidth=1.2, zorder=2)
        hues = [FASTER if value >= 1 else SLOWER for value in values]
        axes.scatter(values, [row] * len(values), c=hues, s=26, zorder=3, linewidths=0, alpha=0.85)
        if group != previous and row:
            axes.axhline(row - 0.5, color=FAINT, linewidth=0.8)
        previous = group
    axes.axvline(1, color=INK, linewidth=1.2)
    firsts = dict.fromkeys(group for group, _, _ in rows)
    labels = []
    for group, name, _ in rows:
        labels.append(f"{group} · {name}" if group in firsts else name)
        firsts.pop(group, None)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    everything = [value for _, _, values in rows for value in values]
    axes.set_xlim(min(0.5, min(everything) / 1.2), max(2, max(everything) * 1.2))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("their time ÷ ours: right of 1 ours is faster")
    return figure


def scaling(sweeps: Sequence[Sweep], title: str) -> "Figure":
    """Of each sweep its points, and a line of what it may grow to from the first of them."""
    from matplotlib.ticker import NullFormatter

    sweeps = [sweep for sweep in sweeps if len({point.x for point in sweep.points}) > 1]
    columns = 3
    rows = -(-len(sweeps) // columns)
    figure, first = _empty(0.8 + 2.1 * rows, "")
    first.remove()
    figure.suptitle(title, x=0.02, ha="left", color=INK, weight="bold", size=11)
    for place, sweep in enumerate(sweeps):
        axes = figure.add_subplot(rows, columns, place + 1, facecolor=PAPER)
        _plain(axes)
        name = f"{sweep.prefix.removeprefix('scaling: ')}: {sweep.what}"
        axes.set_title(_wrapped(f"{name}, {sweep.unit}", 40), color=INK, loc="left", size=8)
        xs, costs = [point.x for point in sweep.points], [point.seconds for point in sweep.points]
        axes.loglog(xs, [costs[0] * (x / xs[0]) ** sweep.at_most for x in xs], "--", color=OTHER, linewidth=1)
        axes.vlines(xs, [point.low for point in sweep.points], [point.high for point in sweep.points], color=OTHER)
        axes.loglog(xs, costs, "o-", color=SLOWER if sweep.verdict == TOO_FAST else FASTER, markersize=4)
        axes.set_xticks([xs[0], xs[-1]], [f"{x:g}" for x in (xs[0], xs[-1])])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_minor_formatter(NullFormatter())
        said = f"power {sweep.exponent:.2f}, at most {sweep.at_most:g}"
        axes.text(0.04, 0.9, said, transform=axes.transAxes, size=8, color=INK)
    return figure


def marked(mark: str) -> str:
    """How a file says what it draws."""
    return f"<!-- of {mark} -->"


def save(figure: "Figure", path: Path, mark: str) -> None:
    """As SVG, whose colours follow the reader's theme."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "aligngpt", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    head, tag, rest = buffer.getvalue().partition(" <defs>")
    lines = [line.rstrip() for line in f"{head}{marked(mark)}{style}\n{tag}{rest}".splitlines()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _empty(height: float, title: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), facecolor=PAPER, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12))
    axes = figure.add_subplot(facecolor=PAPER)
    axes.set_title(title, color=INK, loc="left", fontproperties=FontProperties(weight="bold", size=11))
    _plain(axes)
    return figure, axes


def _plain(axes: "Axes") -> None:
    axes.tick_params(colors=INK, labelsize=9, which="both", length=2)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for side, spine in axes.spines.items():
        spine.set_color(FAINT)
        spine.set_visible(side in ("left", "bottom"))
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(axes: "Axes") -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=INK, fontsize=9)


def _wrapped(text: str, width: int = 34) -> str:
    import textwrap

    return textwrap.fill(text, width)
