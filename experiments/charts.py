"""The pictures of docs/evidence.md: lines over levels or noise rates, and scenes.

Each file holds a mark, the hash of what it draws, by which a test tells whether it is of the numbers that are there:
bytes may differ between versions of matplotlib and PIL. SVG files carry no date and no random ids, and their colours
follow the reader's dark or light theme.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL.PngImagePlugin import PngInfo

from aligngpt.data.scenes import Scene, draw_scene, render

INK, FAINT, PAPER = "#1f2328", "#d0d7de", "#ffffff"
DARK = {INK: "#e6edf3", FAINT: "#3d444d", PAPER: "#0d1117"}  # what these become where the reader's theme is dark
HUES = ("#2f81f7", "#d1453b", "#2da44e", "#a371f7", "#e3742f", "#bf8700", "#8b949e")
PICTURE_PIXELS = 144


class Drawing(NamedTuple):
    """A picture, not drawn yet."""

    draw: Callable[..., bytes]
    arguments: tuple[Any, ...]

    @property
    def mark(self) -> str:
        """Tells this picture from one of other numbers. It stands in the file."""
        return "mark " + hashlib.sha256(f"{self.draw.__name__} {rounded(self.arguments)}".encode()).hexdigest()[:16]

    def content(self) -> bytes:
        return self.draw(*self.arguments, self.mark)


def rounded(value: object) -> str:
    """Numbers to six digits: the last ones may differ from machine to machine."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return rounded(tuple(value.items()))
    return "(" + ", ".join(map(rounded, value)) + ")" if isinstance(value, tuple | list) else repr(value)


class Line(NamedTuple):
    """Means over seeds with their standard deviations. One without xs has a single mean, drawn across."""

    name: str
    xs: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]


def lines(panels: Mapping[str, Sequence[Line]], names: Sequence[str], xlabel: str, ylabel: str, mark: str) -> bytes:
    """A panel for each key. A line has the colour of its name's place in `names`."""
    figure = Figure(figsize=(8, 3.6), facecolor=PAPER, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, drawn) in zip(axes, panels.items(), strict=True):
        for line in drawn:
            style: dict[str, Any] = {"color": HUES[names.index(line.name)], "label": line.name, "linewidth": 1.4}
            if line.xs:
                axis.errorbar(line.xs, line.means, line.deviations, marker="o", markersize=3.5, capsize=2, **style)
            else:
                axis.axhline(line.means[0], linestyle="--", **style)
        axis.set_title(title, color=INK, size=10)
        axis.set_xlabel(xlabel, color=INK)
        axis.set_xticks(sorted({x for line in drawn for x in line.xs}))
        axis.set_facecolor(PAPER)
        axis.tick_params(colors=INK, labelsize=9, length=2)
        axis.grid(color=FAINT, linewidth=0.6)
        for spine in axis.spines.values():
            spine.set_color(FAINT)
    axes[0].set_ylabel(ylabel, color=INK)
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    legend: dict[str, Any] = {"ncols": 4, "frameon": False, "labelcolor": INK, "fontsize": 9}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", **legend)
    return svg(figure, mark)


def svg(figure: Figure, mark: str) -> bytes:
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "aligngpt", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    head, tag, rest = buffer.getvalue().partition(" <defs>")
    style = f"<!-- {mark} --><style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    return ("\n".join(line.rstrip() for line in f"{head}{style}\n{tag}{rest}".splitlines()) + "\n").encode()


def picture(scene: Scene, seed: str, mark: str) -> bytes:
    """A scene's picture as `write_scenes` draws it, which takes the scene itself from the same random numbers first."""
    random = Random(seed)
    draw_scene(random)
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("mark", mark)
    render(scene, random).resize((PICTURE_PIXELS, PICTURE_PIXELS)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
