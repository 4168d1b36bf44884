"""Two pictures of a cut into levels, so that a person sees what "aligned" means in this data.

    draw_histogram       levels.png          how many pairs have which score, and where the cuts lie
    draw_contact_sheet   contact-sheet.png   a row of pairs from each level, the best one on top

Matplotlib draws them, without a display.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from .data.records import Records
from .image import open_image
from .similarity import pair_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 120
_INK = "#333333"
_PICTURE = 256  # pixels of the long side in the sheet
_CAPTION = (30, 4)  # characters in a line, lines


def draw_histogram(
    path: str | os.PathLike[str], scores: np.ndarray, levels: np.ndarray, cuts: np.ndarray, cut: str
) -> None:
    """Write the picture of `histogram`."""
    _save(histogram(scores, levels, cuts, cut), path)


def histogram(scores: np.ndarray, levels: np.ndarray, cuts: np.ndarray, cut: str) -> Figure:
    """The scores (pairs,) of each level (pairs,) in its colour, stacked, with the N-1 cuts as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot()
    num_levels = len(cuts) + 1
    inside = [scores[levels == level] for level in range(num_levels)]
    names = [f"{level}   {len(s):,} pairs, {s.min():.3f} to {s.max():.3f}" for level, s in enumerate(inside)]
    edges = np.histogram_bin_edges([min(s.min() for s in inside), max(s.max() for s in inside)], BINS)
    counts = [np.histogram(s, edges)[0] for s in inside]  # by NumPy, which copies no more than a block of the scores
    bars: Any  # a container for each level
    middles = [(edges[1:] + edges[:-1]) / 2] * num_levels
    _, _, bars = axes.hist(middles, edges.tolist(), weights=counts, stacked=True, color=_colors(num_levels))
    axes.set_xlim(edges[0], edges[-1])
    axes.margins(y=0.12)  # room for the numbers
    for place in cuts:
        axes.axvline(place, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    bounds = [edges[0], *cuts, edges[-1]]
    for level, (low, high) in enumerate(pairwise(bounds)):
        if high - low > 0.02 * (edges[-1] - edges[0]):  # else the number would not fit; the legend has it
            middle = (low + high) / 2
            axes.text(
                middle, 0.97, str(level), transform=axes.get_xaxis_transform(), ha="center", va="top", weight="bold"
            )
    aside = int((levels < 0).sum())
    axes.set_title(
        f"{sum(map(len, inside)):,} pairs in {num_levels} levels of equal {cut}"
        + (f" ({aside:,} without a score set aside)" if aside else ""),
        loc="left",
    )
    axes.set_xlabel("cosine of image and text")
    axes.set_ylabel("pairs")
    axes.spines[["top", "right"]].set_visible(False)
    beside: Any = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False, "alignment": "left"}
    axes.legend(bars[::-1], names[::-1], title="level", **beside)
    return figure


def draw_contact_sheet(
    path: str | os.PathLike[str],
    records: Records,
    places: np.ndarray,
    scores: np.ndarray,
    levels: np.ndarray,
    *,
    columns: int = 6,
) -> None:
    """A row for each level: pairs from its lowest to its highest score, evenly spaced by rank, with their words.

    places: positions in the data of `scores` (pairs,) and `levels` (pairs,). Of a sample's images the first is shown;
    one that cannot be opened is a gray field.
    """
    from matplotlib.figure import Figure

    num_levels = int(levels.max()) + 1
    colors = _colors(num_levels)
    picture, gap, words, label, head = 2.0, 0.14, 0.9, 0.55, 0.5  # inches
    width = label + columns * (picture + gap)
    height = head + num_levels * (picture + words)
    figure = Figure(figsize=(width, height))
    figure.text(label / width, 1 - 0.6 * head / height, "Pairs from each level, by score", size=14, va="center")
    grid = figure.add_gridspec(
        num_levels,
        columns,
        left=label / width,
        right=1 - gap / width,
        top=1 - head / height,
        bottom=words / height,
        wspace=gap / picture,
        hspace=words / picture,
    )
    for row, level in enumerate(reversed(range(num_levels))):
        members = np.flatnonzero(levels == level)
        members = members[np.argsort(scores[members], kind="stable")]
        shown = members[np.unique(np.linspace(0, len(members) - 1, columns).round().astype(int))]
        for column in range(columns):
            axes = figure.add_subplot(grid[row, column])
            axes.set_axis_off()
            if column == 0:
                axes.text(
                    -0.14, 0.5, f"level {level}", rotation=90, ha="center", va="center", size=13, weight="bold",
                    color="white", transform=axes.transAxes,
                    bbox={"boxstyle": "round,pad=0.35", "color": colors[level]},
                )  # fmt: skip
            if column < len(shown):
                _draw_pair(axes, records, int(places[shown[column]]), scores[shown[column]])
    _save(figure, path)


def _draw_pair(axes: Any, records: Records, place: int, score: float) -> None:
    """A picture in a square field, under it its score and the words."""
    sample = records[place]
    try:
        image = open_image(records.image(sample, 0))
        image = ImageOps.contain(image, (_PICTURE, _PICTURE), Image.Resampling.BICUBIC)
    except (ValueError, OSError):
        image = Image.new("RGB", (_PICTURE, _PICTURE), "#dddddd")
    axes.imshow(ImageOps.pad(image, (_PICTURE, _PICTURE), color="#f4f4f4"))
    width, lines = _CAPTION
    words = textwrap.wrap(pair_text(sample), width, max_lines=lines, placeholder=" …")
    below = {"transform": axes.transAxes, "va": "top", "size": 8, "color": _INK, "parse_math": False}
    axes.text(0, -0.03, f"{score:.3f}", weight="bold", **below)
    axes.text(0, -0.11, "\n".join(words), **below)


def _colors(num_levels: int) -> list[Any]:
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, num_levels)))


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is drawn as boxes
        figure.savefig(path, dpi=110, format="png")
