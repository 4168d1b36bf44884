"""`aligngpt levels SCORES`: scores cut into N alignment levels, 0 for the worst aligned pairs, N-1 for the best.

    --cut count   the pairs in order of their score, cut into N parts of equal count; counts differ by one at most.
                  Pairs of equal score are ordered by their place in the data, so a tie may lie on both sides of a cut
                  and no level is ever empty.
    --cut range   the span from the lowest to the highest score, cut into N equal ranges; a score on a cut belongs to
                  the level above. A range without any pair is an error: its row of the table would never be trained.

A pair whose score is NaN or infinite is set aside: its level is null, and training leaves it out.

    record   int64    position of the sample in the data, from 0
    id       string
    score    float32
    level    int8     null: set aside

The file's metadata holds the hash of the data that the levels belong to, N, the cuts, and the scores file's metadata.
Levels are a function of the scores alone, so the same scores give the same file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .data.llava_json import Sample, read_llava_json
from .data.tables import data_hash, prepare_outputs, read_table, write_json, write_table

SET_ASIDE = -1  # among levels in memory; null in the file
MOST_LEVELS = 127
CUTS = ("count", "range")


@dataclass(frozen=True, eq=False)
class Levels:
    """What a levels file says."""

    path: str
    data_hash: str
    num_levels: int
    records: np.ndarray  # (pairs,) int64
    levels: np.ndarray  # (pairs,) int8, SET_ASIDE where there is none


def cut_levels(scores: np.ndarray, num_levels: int, cut: str = "count") -> tuple[np.ndarray, np.ndarray]:
    """Levels (pairs,) int8 of scores (pairs,), SET_ASIDE where a score is not finite, and the N-1 cuts, float64.

    cuts: entry k-1 is where level k begins: the lowest score in it ("count"), the lower end of its range ("range").
    ValueError: fewer finite scores than levels, ranges without any pair, N outside 2..127.
    """
    if not 2 <= num_levels <= MOST_LEVELS:
        raise ValueError(f"num_levels is {num_levels}; it must lie in 2..{MOST_LEVELS}")
    if cut not in CUTS:
        raise ValueError(f"cut is {cut!r}; it must be one of {', '.join(CUTS)}")
    scores = np.asarray(scores, dtype=np.float64)
    usable = np.flatnonzero(np.isfinite(scores))
    if len(usable) < num_levels:
        raise ValueError(f"{len(usable)} of {len(scores)} pairs have a score; {num_levels} levels need one pair each")
    values = scores[usable]
    if cut == "count":
        order = np.argsort(values, kind="stable")
        found = np.empty(len(values), dtype=np.int64)
        found[order] = np.arange(len(values)) * num_levels // len(values)
        first = -(-np.arange(1, num_levels) * len(values) // num_levels)  # rank of the first pair of each level
        cuts = values[order[first]]
    else:
        cuts = np.linspace(values.min(), values.max(), num_levels + 1)[1:-1]
        found = np.searchsorted(cuts, values, side="right")
        empty = np.flatnonzero(np.bincount(found, minlength=num_levels) == 0)
        if len(empty):
            raise ValueError(
                f"{num_levels} equal ranges leave level {', '.join(map(str, empty))} without a pair; "
                "every level needs one: fewer levels, or equal counts"
            )
    levels = np.full(len(scores), SET_ASIDE, dtype=np.int8)
    levels[usable] = found
    return levels, cuts


def read_levels(path: str | os.PathLike[str]) -> Levels:
    """A file that `aligngpt levels` wrote. ValueError: it is something else."""
    table, metadata = read_table(path, "levels")
    return Levels(
        path=str(path),
        data_hash=metadata["data"]["sha256"],
        num_levels=metadata["num_levels"],
        records=table["record"].to_numpy(),
        levels=table["level"].fill_null(SET_ASIDE).to_numpy(),
    )


def with_levels(samples: Sequence[Sample], levels: Levels) -> tuple[list[Sample], int]:
    """The samples with their levels, and how many were set aside, which are left out. Those without an image stay.

    ValueError: the levels are of other data, or a level is missing or outside 0..N-1; the latter names the sample.
    """
    check_data(levels.path, levels.data_hash, samples)
    level_of = dict(zip(levels.records.tolist(), levels.levels.tolist(), strict=True))
    kept = []
    for place, sample in enumerate(samples):
        if not sample.images:
            kept.append(sample)
            continue
        level = level_of.get(place)
        if level is None or not SET_ASIDE <= level < levels.num_levels:
            got = "no level" if level is None else f"level {level}"
            raise ValueError(f"{levels.path}: {sample.name} has {got}; it needs one in 0..{levels.num_levels - 1}")
        if level != SET_ASIDE:
            kept.append(replace(sample, level=level))
    return kept, len(samples) - len(kept)


def check_data(path: str | os.PathLike[str], found: str, samples: Sequence[Sample]) -> None:
    """ValueError where a scores or levels file, of data with the hash `found`, does not belong to the samples."""
    needed = data_hash(samples)
    if found != needed:
        raise ValueError(
            f"{path} belongs to other data: it was made for samples with the hash {found[:12]}…, these have "
            f"{needed[:12]}…; it needs the same samples in the same order"
        )


# ---------------------------------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt levels`."""
    parser.add_argument("scores", metavar="SCORES", help="a file that `aligngpt score` made")
    parser.add_argument("--data", required=True, metavar="DATA", help="the LLaVA JSON file that was scored")
    parser.add_argument("--out", required=True, metavar="FILE", help="the Parquet file to write")
    parser.add_argument("--num-levels", type=int, default=8, metavar="N", help="levels (default 8, as in the paper)")
    parser.add_argument("--cut", choices=CUTS, default="count", help="parts of equal count (default) or equal range")
    parser.add_argument("--report", metavar="DIR", help="draw levels.png and contact-sheet.png there")
    parser.add_argument("--image-folder", metavar="DIR", help="what image names start from; --report needs it")
    parser.add_argument("--json", metavar="FILE", help="write the data too, with an align_level in each record")


def run(args: argparse.Namespace) -> int:
    """`aligngpt levels`: writes what was asked for and prints the levels, a line each."""
    if args.report and not (args.image_folder and Path(args.image_folder).is_dir()):
        raise ValueError(f"--image-folder is {args.image_folder}; --report needs a folder that exists")
    outputs = [("--out", args.out)]
    if args.json:
        outputs.append(("--json", args.json))
    if args.report:
        outputs += [("--report", os.path.join(args.report, name)) for name in ("levels.png", "contact-sheet.png")]
    prepare_outputs(outputs, read=(args.data, args.scores))
    table, metadata = read_table(args.scores, "scores")
    samples = read_llava_json(args.data)
    check_data(args.scores, metadata["data"]["sha256"], samples)
    if table["record"].to_pylist() != [place for place, sample in enumerate(samples) if sample.images]:
        raise ValueError(
            f"{args.scores} has {table.num_rows} rows; it needs one for each sample with an image, in order"
        )

    scores = table["score"].to_numpy()
    levels, cuts = cut_levels(scores, args.num_levels, args.cut)
    _write_levels(args.out, table, levels, cuts, args.cut, metadata)
    print(format_levels(scores, levels))
    print(f"levels written to {args.out}")
    if args.json:
        left_out = _write_data(args.json, args.data, table["record"].to_numpy(), levels)
        print(f"data with levels written to {args.json}" + (f", without {left_out} set aside" if left_out else ""))
    if args.report:
        from .levels_report import draw_contact_sheet, draw_histogram

        folder = Path(args.report)
        draw_histogram(folder / "levels.png", scores, levels, cuts, args.cut)
        pairs = [samples[record] for record in table["record"].to_pylist()]
        draw_contact_sheet(folder / "contact-sheet.png", pairs, scores, levels, args.image_folder)
        print(f"levels.png and contact-sheet.png drawn in {folder}")
    return 0


def format_levels(scores: np.ndarray, levels: np.ndarray) -> str:
    """A line for each level, its count and its lowest and highest score, then the pairs set aside."""
    lines = ["level     pairs   lowest  highest score"]
    for level in range(levels.max() + 1):
        inside = scores[levels == level]
        lines.append(f"{level:5} {len(inside):9} {inside.min():8.4f} {inside.max():8.4f}")
    aside = int((levels == SET_ASIDE).sum())
    if aside:
        lines.append(f"    – {aside:9}  set aside: no finite score")
    return "\n".join(lines)


def _write_data(path: str, data: str, records: np.ndarray, levels: np.ndarray) -> int:
    """The LLaVA JSON file `data` with an "align_level" in each record that has an image; returns how many are left out.

    Pairs set aside are left out, as training with the levels file leaves them out.
    """
    content = json.loads(Path(data).read_text(encoding="utf-8"))
    level_of = dict(zip(records.tolist(), levels.tolist(), strict=True))
    kept = []
    for place, record in enumerate(content):
        level = level_of.get(place)
        if level is None:
            kept.append({key: value for key, value in record.items() if key != "align_level"})
        elif level != SET_ASIDE:
            kept.append(record | {"align_level": level})
    write_json(path, kept, indent=1)
    return len(content) - len(kept)


def _write_levels(
    out: str, scores: Any, levels: np.ndarray, cuts: np.ndarray, cut: str, metadata: dict[str, Any]
) -> None:
    import pyarrow

    table = scores.select(["record", "id", "score"]).append_column(
        "level", pyarrow.array(levels, pyarrow.int8(), mask=levels == SET_ASIDE)
    )
    about = {
        "kind": "levels",
        "data": metadata["data"],
        "num_levels": len(cuts) + 1,
        "cut": cut,
        "cuts": cuts.tolist(),
        "scores": metadata,
    }
    write_table(out, table, about)
