"""`aligngpt doctor DATA`: every sample that training would drop and why, before it is trained on.

A sample is taken as training takes it, by the same functions: its record is read, each image's file is found, opened
and decoded whole, and with `--model` its text becomes tokens and its images are made to fit the tower. What one of
these steps refuses is listed; an over-long sample is cut as in training and dropped only where the cut leaves no
answer. Without a model nothing is known about tokens, and the output says so. What is wrong with the data set as a
whole, such as malformed JSON, is an error as it is in training.

    --out DIR   bad_samples.jsonl   a line for each drop: record, id, reason, kind
                summary.png         the drops by kind, and what images and texts are like

`--workers` processes do this; results come in order, so they do not depend on how many there are. Beside the records
themselves some 50 bytes are kept for each sample, and the list of drops. The exit status is 0 if the share of drops is
within `--max-drop-rate`, 1 if training would stop, 2 if the data cannot be read.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from .batch import load_in_order
from .data.llava_json import Sample, printable
from .data.records import NO_LEVEL, Records, in_shards, open_records
from .data.tables import prepare_outputs, whole_file
from .drops import Drop, commonest, use_or_drop
from .image import MAX_PIXELS, open_image
from .text import Tokenized

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .processor import AlignGPTProcessor

MAX_DROP_RATE = 0.01  # the default of training's --data.max-drop-rate
SAMPLES_A_PART = 32  # what a worker hands over at a time
ALL_SHOWN = 20  # up to this many drops are shown one by one, more by their kinds
FILES = ("bad_samples.jsonl", "summary.png")
_UNLIMITED = sys.maxsize  # tokens


class Part(NamedTuple):
    """What was found out about some S samples in a row, which have M images that could be opened."""

    drops: list[Drop]
    ids: np.ndarray  # (S,) uint64, a hash of each id; 0 where the record cannot be read
    sizes: np.ndarray  # (M, 2) int32, width and height
    lengths: np.ndarray  # (S,) int32, tokens before any cut; 0 where they are not known


@dataclass(frozen=True, eq=False)
class Findings:
    """What a scan found; the arrays as in `Part`, for all records."""

    records: Records
    drops: list[Drop]
    ids: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray
    max_length: int | None  # tokens; None: texts were not checked

    @property
    def share(self) -> float:
        """Drops for each sample, 0 to 1."""
        return len(self.drops) / len(self.records)


# ---- the scan ------------------------------------------------------------------------------------------------------


class Parts(Dataset[Part]):
    """Positions in the records to what becomes of these samples. Without a processor, texts are not looked at."""

    def __init__(self, records: Records, processor: AlignGPTProcessor | None):
        self.records = records
        self.processor = processor
        self.uncut = copy.copy(processor)
        if self.uncut is not None:
            self.uncut.max_length = _UNLIMITED

    def __getitem__(self, positions: range) -> Part:
        sizes: list[tuple[int, int]] = []
        lengths = np.zeros(len(positions), dtype=np.int32)
        ids = np.zeros(len(positions), dtype=np.uint64)
        drops: list[Drop] = []

        def use(sample: Sample) -> str:
            num_images = len(sample.images)
            if self.processor is not None:
                uncut = self._uncut_text(sample)
                lengths[place] = length = 0 if uncut is None else uncut.input_ids.shape[0]
                # Where there is a cut or an error, training's own call decides and has the word for it.
                fits = 0 < length <= self.processor.max_length
                text = uncut if uncut is not None and fits else self.processor.text(sample)
                num_images = text.num_images
            for number, name in enumerate(sample.images[:num_images]):
                file = self.records.image(sample, number)
                image = open_image(file, name=name)
                sizes.append(image.size)
                if self.processor is not None and _may_be_too_long(image.size, self.processor.image_processor.size):
                    self.processor.image_processor.read(file, name)
            return sample.id

        for place, record in enumerate(positions):
            found = use_or_drop(self.records, record, use)
            if isinstance(found, Drop):
                drops.append(found)
            if id := found.id if isinstance(found, Drop) else found:
                ids[place] = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")
        return Part(drops, ids, np.array(sizes, dtype=np.int32).reshape(-1, 2), lengths)

    def _uncut_text(self, sample: Sample) -> Tokenized | None:
        assert self.uncut is not None
        with suppress(ValueError):
            return self.uncut.text(sample)
        return None


def _may_be_too_long(size: tuple[int, int], side: int) -> bool:
    """Whether `preprocess` might refuse an image of this width and height. No other needs to be resized to find out."""
    short, long = sorted(size)
    return max(long * long, side * side * long / short) > MAX_PIXELS


def scan(records: Records, processor: AlignGPTProcessor | None = None, *, workers: int = 0) -> Findings:
    """Take every sample as training would.

    processor: of the model to be trained; without one no text is looked at. workers: processes; with 0 it is done here.
    """
    from tqdm import tqdm

    total = len(records)
    parts = [range(start, min(start + SAMPLES_A_PART, total)) for start in range(0, total, SAMPLES_A_PART)]
    loader = load_in_order(Parts(records, processor), parts, workers=min(workers, len(parts)))
    drops: list[Drop] = []
    kept: list[Part] = []
    with tqdm(total=total, unit="sample", unit_scale=True, disable=None) as progress:
        for part in loader:
            drops += part.drops
            kept.append(part._replace(drops=[]))
            progress.set_postfix_str(f"{len(drops)} dropped", refresh=False)
            progress.update(len(part.ids))
    ids, sizes, lengths = (np.concatenate([part[column] for part in kept]) for column in (1, 2, 3))
    return Findings(records, drops, ids, sizes, lengths, processor.max_length if processor else None)


# ---- text ----------------------------------------------------------------------------------------------------------


def facts(findings: Findings, max_drop_rate: float) -> dict[str, Any]:
    """What there is to say beside the drops themselves, as plain JSON values."""
    records, num_images = findings.records, findings.records.num_images
    values, counts = np.unique(records.levels[num_images > 0], return_counts=True)
    levels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    kinds = Counter(drop.kind for drop in findings.drops)
    checked = findings.max_length is not None
    return {
        "ok": findings.share <= max_drop_rate,
        "data": records.path,
        "samples": len(records),
        "text_only": int((num_images == 0).sum()),
        "one_image": int((num_images == 1).sum()),
        "several_images": int((num_images > 1).sum()),
        "without_level": levels.pop(NO_LEVEL, 0),  # of those with an image
        "levels": {str(level): count for level, count in levels.items()},
        "duplicate_ids": _duplicates(findings),
        "images_decoded": len(findings.sizes),
        "smallest_image": _size(findings.sizes, np.argmin),
        "largest_image": _size(findings.sizes, np.argmax),
        "max_length": findings.max_length,  # None: texts were not checked
        "longest_text": int(findings.lengths.max()) if checked else None,
        "longer_than_max_length": int((findings.lengths > findings.max_length).sum()) if checked else None,
        "dropped": len(findings.drops),
        "share": findings.share,
        "max_drop_rate": max_drop_rate,
        "kinds": [{"kind": kind, "count": count} for kind, count in kinds.most_common()],
    }


def _duplicates(findings: Findings) -> dict[str, Any] | None:
    """How many ids stand at more than one sample, how many samples these are, and one of the ids; None: no id does."""
    known = np.flatnonzero(findings.ids)
    _, first, counts = np.unique(findings.ids[known], return_index=True, return_counts=True)
    first, counts = first[counts > 1], counts[counts > 1]
    if not len(first):
        return None
    example = findings.records[int(known[first.min()])].id
    return {"ids": len(first), "samples": int(counts.sum()), "example": example}


def _size(sizes: np.ndarray, choose: Callable[[np.ndarray], np.intp]) -> list[int] | None:
    """Width and height of the image that is chosen by its pixels."""
    return sizes[choose(sizes.prod(axis=1))].tolist() if len(sizes) else None


def report(found: dict[str, Any], drops: list[Drop], listed: str | None) -> str:
    """The facts as text, with the drops themselves or, if they are many, their kinds.

    listed: the file that holds all of them.
    """
    dropped, limit = found["dropped"], _percent(found["max_drop_rate"])
    lines = [f"{found['data']}: {found['samples']:,} samples"]
    lines += [
        _row("one image", found["one_image"]),
        _row("several images", found["several_images"]),
        _row("text only", found["text_only"]),
    ]
    if found["levels"]:
        lines += [_row(f"level {level}", count) for level, count in found["levels"].items()]
        if found["without_level"]:
            lines.append(_row("no level", found["without_level"], "they have an image; `align_level` is missing"))
    if repeated := found["duplicate_ids"]:
        what = f"at {repeated['samples']:,} samples, such as {repeated['example']}; allowed, all of them are used"
        lines.append(_row("repeated ids", repeated["ids"], what))
    if found["images_decoded"]:
        small, large = ("×".join(map(str, found[key])) for key in ("smallest_image", "largest_image"))
        lines.append(_row("images decoded", found["images_decoded"], f"{small} the smallest, {large} the largest"))
    if found["max_length"] is None:
        lines.append("  Lengths in tokens and cut answers were not checked: they need --model.")
    else:
        what = f"longer than max_length, {found['max_length']:,} tokens; the longest has {found['longest_text']:,}"
        lines.append(_row("cut", found["longer_than_max_length"], what))

    lines += ["", f"Training would drop {dropped:,} of {found['samples']:,} samples ({_percent(found['share'])})"]
    lines[-1] += ":" if dropped else "."
    if dropped <= ALL_SHOWN:
        lines += [f"  {drop}" for drop in drops]
    else:
        lines += [f"  {line}" for line in commonest(drops)]
        if len(found["kinds"]) > 10:
            lines.append(f"  … and {len(found['kinds']) - 10} other kinds")
        lines.append(f"All of them: {listed}" if listed else "--out DIR or --json lists all of them.")
    verdict = (
        f"It would go on: the limit is {limit}" if found["ok"] else f"It would stop: more than {limit} are dropped"
    )
    lines += ["", f"{verdict} (--data.max-drop-rate)."]
    return "\n".join(map(printable, lines))


def _row(what: str, count: int, remark: str = "") -> str:
    return f"  {what:16}{count:11,}  {remark}".rstrip()


def _percent(share: float) -> str:
    """A share of 0..1 in percent with two digits that count; what is not 0 never looks so, nor what is not all."""
    percent = 100 * share
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.1f} %"


# ---- the picture ---------------------------------------------------------------------------------------------------

_INK, _FAINT = "#333333", "#8a8a8a"
_GOOD, _CUT, _BAD, _LEVEL = "#4477aa", "#ee9933", "#cc3311", "#66aa99"
_KINDS_DRAWN = 7
_LEVELS_DRAWN = 16  # more have no room


def summary(findings: Findings, found: dict[str, Any]) -> Figure:
    """One figure: drops by kind, sizes of images, lengths of texts, and how many samples have which images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9))
    name = printable(Path(found["data"]).name)
    verdict = "within" if found["ok"] else "ABOVE"
    figure.suptitle(
        f"{name}: {found['dropped']:,} of {found['samples']:,} samples would be dropped "
        f"({_percent(found['share'])}, {verdict} the limit of {_percent(found['max_drop_rate'])})",
        x=0.055, ha="left", size=16, weight="bold", color=_INK if found["ok"] else _BAD, parse_math=False,
    )  # fmt: skip
    margins = {"left": 0.055, "right": 0.985, "top": 0.88, "bottom": 0.07, "wspace": 0.2, "hspace": 0.3}
    grid = figure.subplots(2, 2, gridspec_kw=margins)
    _draw_kinds(grid[0, 0], found)
    _draw_sizes(grid[0, 1], findings)
    _draw_lengths(grid[1, 0], findings)
    _draw_counts(grid[1, 1], found)
    return figure


def _draw_kinds(axes: Any, found: dict[str, Any]) -> None:
    """A bar for each of the commonest kinds, its words above it."""
    counts: Counter[str] = Counter()
    for entry in found["kinds"]:
        counts[entry["kind"].split("; ")[0]] += entry["count"]  # what it needs comes after the semicolon
    kinds = counts.most_common()
    drawn, rest = kinds[:_KINDS_DRAWN], kinds[_KINDS_DRAWN:]
    if rest:
        drawn.append((f"{len(rest)} other reasons", sum(count for _, count in rest)))
    axes.set_title("What would be dropped, and why", loc="left", weight="bold")
    if not drawn:
        _say(axes, "no sample would be dropped")
        return
    places = np.arange(len(drawn))
    colors = [_BAD] * min(len(kinds), _KINDS_DRAWN) + [_FAINT] * bool(rest)
    axes.barh(places, [count for _, count in drawn], height=0.3, color=colors)
    most = max(count for _, count in drawn)
    for place, (kind, count) in enumerate(drawn):
        words = textwrap.shorten(printable(kind), 92, placeholder=" …")
        axes.text(0, place - 0.24, words, va="bottom", size=9, color=_INK, parse_math=False)
        axes.text(count + 0.01 * most, place, f"{count:,}", va="center", size=10, weight="bold", color=_INK)
    axes.set_ylim(_KINDS_DRAWN + 0.5, -0.8)  # bars as thick for one kind as for many
    axes.set_xlim(0, 1.12 * most)
    axes.set_axis_off()


def _draw_sizes(axes: Any, findings: Findings) -> None:
    """Width against height, with lines of equal shape."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, NullLocator

    sizes = findings.sizes
    axes.set_title(f"Sizes of the {len(sizes):,} images that decode", loc="left", weight="bold")
    if not len(sizes):
        _say(axes, "no image")
        return
    low, high = sizes.min() / 1.5, sizes.max() * 1.5
    bins = np.geomspace(low, high, 80)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for shape, words in ((1, "1:1"), (3, "3:1"), (1 / 3, "1:3")):
        axes.plot(
            [low, high], [low / shape, high / shape], color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0
        )
        along = high / 1.15 if shape >= 1 else high / 1.15 * shape
        axes.text(along, along / shape, words, size=9, color=_FAINT, ha="right", va="bottom")
    counts, _, _ = np.histogram2d(sizes[:, 0], sizes[:, 1], bins=(bins, bins))
    norm = LogNorm(1, max(10, counts.max()))
    image = axes.pcolormesh(bins, bins, np.ma.masked_equal(counts.T, 0), cmap="viridis", norm=norm)
    axes.figure.colorbar(image, ax=axes, label="images", format="{x:,.0f}", pad=0.02)
    axes.set(xlim=(low, high), ylim=(low, high), xlabel="width (pixels)", ylabel="height (pixels)")
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [step * 10**power for power in range(6) for step in steps if low <= step * 10**power <= high]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:,.0f}")
    _trim(axes)


def _draw_lengths(axes: Any, findings: Findings) -> None:
    """Tokens before any cut, or characters where no model says what a token is."""
    from matplotlib.ticker import LogLocator

    limit = findings.max_length
    lengths = findings.records.num_characters if limit is None else findings.lengths
    lengths = lengths[lengths > 0]
    longer = lengths > (limit or _UNLIMITED)
    what = "characters" if limit is None else f"tokens: {longer.sum():,} are cut at max_length {limit:,}"
    axes.set_title(f"Lengths in {what}", loc="left", weight="bold")
    if not len(lengths):
        _say(axes, "no text")
        return
    bins = np.geomspace(lengths.min() / 1.1, max(lengths.max(), limit or 0) * 1.1, 60)
    axes.set_xscale("log")
    axes.hist([lengths[~longer], lengths[longer]], bins=bins, stacked=True, color=[_GOOD, _CUT])
    if limit is None:
        axes.set_xlabel("characters in all turns (with --model: tokens)")
    else:
        axes.axvline(limit, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("tokens, images included, before any cut")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("samples")
    _trim(axes)


def _draw_counts(axes: Any, found: dict[str, Any]) -> None:
    """How many samples have no image, one, several; and which levels those with an image state."""
    axes.set_title("What the samples are", loc="left", weight="bold")
    bars = [(name, found[name.replace(" ", "_")], _GOOD) for name in ("text only", "one image", "several images")]
    if 0 < len(found["levels"]) <= _LEVELS_DRAWN:
        bars += [(f"level {level}", count, _LEVEL) for level, count in found["levels"].items()]
        if found["without_level"]:
            bars.append(("no level", found["without_level"], _FAINT))
    places = [place + 0.5 * (place > 2) for place in range(len(bars))]  # a gap before the levels
    names, counts, colors = zip(*bars, strict=True)
    axes.barh(places, counts, height=0.7, color=colors)
    for place, count in zip(places, counts, strict=True):
        share = f"{count:,}  ({_percent(count / found['samples'])})"
        axes.text(count + 0.01 * max(counts), place, share, va="center", size=10, color=_INK)
    axes.set_yticks(places, names)
    axes.set_ylim(max(places[-1], 4) + 0.6, -0.6)
    axes.set_xlim(0, 1.25 * max(counts))
    axes.xaxis.set_visible(False)
    axes.tick_params("y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _say(axes: Any, words: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", size=13, color=_FAINT)


def _trim(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


# ---- the command ---------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """`aligngpt doctor DATA`: writes what was asked for, prints the report; 0 if training would go on, else 1."""
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    max_drop_rate = MAX_DROP_RATE if args.max_drop_rate is None else args.max_drop_rate
    if workers < 0:
        raise ValueError(f"--workers is {workers}; it needs a whole number of at least 0")
    if not 0 <= max_drop_rate <= 1:
        raise ValueError(f"--max-drop-rate is {max_drop_rate}; it needs a share of 0 to 1")
    if args.image_folder is not None and not Path(args.image_folder).is_dir():
        raise ValueError(f"--image-folder is {args.image_folder}; it needs a folder that exists")
    outputs = [os.path.join(args.out, name) for name in FILES] if args.out else []
    prepare_outputs([("--out", path) for path in outputs], read=[args.data])
    processor = _processor(args)
    try:
        records = open_records(args.data, args.image_folder)
        if not len(records):
            raise ValueError(f"{args.data} holds no samples; it needs at least one")
        if args.image_folder is None and not in_shards(args.data) and records.num_images.any():
            raise ValueError(f"--image-folder is missing; {args.data} has samples with images, whose files need it")
        findings = scan(records, processor, workers=workers)
        found = facts(findings, max_drop_rate)
        if outputs:
            with whole_file(outputs[0]) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(drop)) + "\n" for drop in findings.drops)
            with whole_file(outputs[1]) as temporary, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is drawn as boxes
                summary(findings, found).savefig(temporary, dpi=110, format="png")
    except KeyboardInterrupt:
        print("aligngpt doctor: interrupted; there is no result before the end", file=sys.stderr)
        return 130
    if args.json:
        text = json.dumps(found | {"drops": [asdict(drop) for drop in findings.drops]}, indent=2)
    else:
        text = report(found, findings.drops, outputs[0] if outputs else None)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
    return 0 if found["ok"] else 1


def _processor(args: argparse.Namespace) -> AlignGPTProcessor | None:
    """That of --model, with what the flags change of it."""
    changes = {"template": args.template, "max_length": args.max_length}
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.model is None:
        for name, value in changes.items():
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it needs --model, whose tokenizer counts")
        return None
    if args.max_length is not None and args.max_length < 1:
        raise ValueError(f"--max-length is {args.max_length}; it needs a whole number of at least 1")
    from .processor import AlignGPTProcessor  # loads transformers

    return AlignGPTProcessor.from_pretrained(args.model, **changes)
