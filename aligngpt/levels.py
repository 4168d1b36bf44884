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

The file's metadata holds the hash of the data that the levels belong to, N, the cuts, and what the scores' manifest
says. Levels are a function of the scores alone, so the same scores give the same file.

SCORES is a folder that `aligngpt score` filled. Only the scores, their order and the levels are in memory for all pairs
at once, some 22 bytes a pair; everything else is copied part by part.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data.records import NO_LEVEL, Records, in_shards, open_records
from .data.tables import (
    described,
    prepare_outputs,
    read_manifest,
    read_part,
    read_table,
    whole_file,
    write_json,
)

SET_ASIDE = -1  # among levels in memory; null in the file
MOST_LEVELS = 127
CUTS = ("count", "range")
_BLOCK = 1 << 20


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
    scores = np.asarray(scores)
    if scores.dtype != np.float32:
        scores = scores.astype(np.float64)
    finite = np.isfinite(scores)
    num_finite = int(finite.sum())
    if num_finite < num_levels:
        raise ValueError(f"{num_finite} of {len(scores)} pairs have a score; {num_levels} levels need one pair each")
    cut_by = _cut_by_count if cut == "count" else _cut_by_range
    return cut_by(np.where(finite, scores, np.nan), num_finite, num_levels)


def _cut_by_count(scores: np.ndarray, num_finite: int, num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    """The two results of `cut_levels`; what is not finite is NaN."""
    order = np.argsort(scores, kind="stable")  # NaN comes last
    first = -(-np.arange(num_levels + 1) * num_finite // num_levels)  # rank of the first pair of each level
    levels = np.full(len(scores), SET_ASIDE, dtype=np.int8)
    for level in range(num_levels):
        levels[order[first[level] : first[level + 1]]] = level
    return levels, scores[order[first[1:-1]]].astype(np.float64)


def _cut_by_range(scores: np.ndarray, num_finite: int, num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = (float(end) for end in (np.nanmin(scores), np.nanmax(scores)))
    cuts = np.linspace(low, high, num_levels + 1)[1:-1]
    levels = np.empty(len(scores), dtype=np.int8)
    for start in range(0, len(scores), _BLOCK):  # the search makes float64 and int64 of what it gets
        block = scores[start : start + _BLOCK].astype(np.float64)
        levels[start : start + _BLOCK] = np.searchsorted(cuts, block, side="right")
    levels[np.isnan(scores)] = SET_ASIDE
    empty = [level for level in range(num_levels) if not (levels == level).any()]
    if empty:
        raise ValueError(
            f"{num_levels} equal ranges leave level {', '.join(map(str, empty))} without a pair; "
            "every level needs one: fewer levels, or equal counts"
        )
    return levels, cuts


def read_levels(path: str | os.PathLike[str]) -> Levels:
    """A file that `aligngpt levels` wrote. ValueError: it is something else."""
    table, metadata = read_table(path, "levels", ["record", "level"])
    return Levels(
        path=str(path),
        data_hash=metadata["data"]["sha256"],
        num_levels=metadata["num_levels"],
        records=table["record"].to_numpy(),
        levels=table["level"].fill_null(SET_ASIDE).to_numpy(),
    )


def with_levels(records: Records, levels: Levels) -> tuple[np.ndarray, np.ndarray]:
    """Which samples have a level or need none, and all samples' levels.

    Returns positions (kept,) int64, in order: samples without an image and those whose level is not null; and levels
    (records,) int8, `NO_LEVEL` where there is none.

    ValueError: the levels are of other data, or a level is missing or outside 0..N-1; the latter names the sample.
    """
    check_data(levels.path, levels.data_hash, records)
    with_image = records.num_images > 0
    outside = (levels.records < 0) | (levels.records >= len(records))
    if outside.any():
        raise ValueError(
            f"{levels.path} has a level for record {levels.records[outside][0]}; {records.path} has {len(records)}"
        )
    found = np.full(len(records), NO_LEVEL, dtype=np.int8)
    has_row = np.zeros(len(records), dtype=bool)
    found[levels.records] = levels.levels
    has_row[levels.records] = True
    wrong = with_image & (~has_row | (found < SET_ASIDE) | (found >= levels.num_levels))
    if wrong.any():
        place = int(wrong.argmax())
        got = f"level {found[place]}" if has_row[place] else "no level"
        name = records[place].name
        raise ValueError(f"{levels.path}: {name} has {got}; it needs one in 0..{levels.num_levels - 1}")
    found[~with_image] = NO_LEVEL
    return np.flatnonzero(~with_image | (found != SET_ASIDE)), found


def check_data(path: str | os.PathLike[str], found: str, records: Records) -> None:
    """ValueError where scores or levels, of data with the hash `found`, do not belong to the records."""
    if found != records.sha256:
        raise ValueError(
            f"{path} belongs to other data: it was made for samples with the hash {found[:12]}…, these have "
            f"{records.sha256[:12]}…; it needs the same samples in the same order"
        )


# ---------------------------------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt levels`."""
    parser.add_argument("scores", metavar="SCORES", help="a folder that `aligngpt score` filled")
    parser.add_argument("--data", metavar="DATA", help="the data that was scored; --report and --json need it")
    parser.add_argument("--out", required=True, metavar="FILE", help="the Parquet file to write")
    parser.add_argument("--num-levels", type=int, default=8, metavar="N", help="levels (default 8, as in the paper)")
    parser.add_argument("--cut", choices=CUTS, default="count", help="parts of equal count (default) or equal range")
    parser.add_argument("--report", metavar="DIR", help="draw levels.png and contact-sheet.png there")
    parser.add_argument(
        "--image-folder", metavar="DIR", help="what image names start from; --report needs it, but for shards"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the data too, a LLaVA JSON file, with an align_level in each record"
    )


def run(args: argparse.Namespace) -> int:
    """`aligngpt levels`: writes what was asked for and prints the levels, a line each."""
    for flag, value in (("--report", args.report), ("--json", args.json)):
        if value and not args.data:
            raise ValueError(f"{flag} is {value}, but there is no --data; it needs the data that was scored")
    shards = bool(args.data) and in_shards(args.data)
    if args.report and not shards and not (args.image_folder and Path(args.image_folder).is_dir()):
        raise ValueError(f"--image-folder is {args.image_folder}; --report needs a folder that exists")
    if args.json and (shards or args.data.endswith(".jsonl")):
        raise ValueError(
            f"--json is {args.json}, but --data is {args.data}; it needs a LLaVA JSON file. "
            "Training takes the levels of other data from --out"
        )
    outputs = [("--out", args.out), *([("--json", args.json)] if args.json else [])]
    if args.report:
        outputs += [("--report", os.path.join(args.report, name)) for name in ("levels.png", "contact-sheet.png")]
    for flag, path in outputs:
        if Path(args.scores).resolve() in Path(path).resolve().parents:
            raise ValueError(
                f"{flag} would write {path} into {args.scores}, which is read here; it needs another place"
            )
    manifest = read_manifest(args.scores)
    prepare_outputs(outputs, read=[args.data] if args.data else [])
    records = open_records(args.data, args.image_folder) if args.data else None
    if records is not None:
        check_data(args.scores, manifest["data"]["sha256"], records)

    scores = _read_scores(args.scores, manifest)
    levels, cuts = cut_levels(scores, args.num_levels, args.cut)
    _write_levels(args.out, args.scores, manifest, levels, cuts, args.cut)
    print(format_levels(scores, levels))
    print(f"levels written to {args.out}")
    if records is None:
        return 0
    places = np.flatnonzero(records.num_images)  # of the pairs
    if args.json:
        left_out = _write_data(args.json, args.data, places, levels)
        print(f"data with levels written to {args.json}" + (f", without {left_out} set aside" if left_out else ""))
    if args.report:
        from .levels_report import draw_contact_sheet, draw_histogram

        folder = Path(args.report)
        draw_histogram(folder / "levels.png", scores, levels, cuts, args.cut)
        draw_contact_sheet(folder / "contact-sheet.png", records, places, scores, levels)
        print(f"levels.png and contact-sheet.png drawn in {folder}")
    return 0


def _read_scores(folder: str, manifest: dict[str, Any]) -> np.ndarray:
    """(pairs,) float32."""
    rows = [part["rows"] for part in manifest["parts"]]
    scores = np.empty(sum(rows), dtype=np.float32)
    start = 0
    for number, count in enumerate(rows):
        scores[start : start + count] = read_part(folder, manifest, number, ["score"])["score"].to_numpy()
        start += count
    return scores


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


def _write_data(path: str, data: str, places: np.ndarray, levels: np.ndarray) -> int:
    """The LLaVA JSON file `data` with an "align_level" in each record that has an image; returns how many are left out.

    Pairs set aside are left out, as training with the levels file leaves them out.
    """
    content = json.loads(Path(data).read_text(encoding="utf-8"))
    level_of = dict(zip(places.tolist(), levels.tolist(), strict=True))
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
    out: str, folder: str, manifest: dict[str, Any], levels: np.ndarray, cuts: np.ndarray, cut: str
) -> None:
    """The levels file, a part of the scores at a time."""
    import pyarrow
    import pyarrow.parquet

    about = {
        "kind": "levels",
        "data": manifest["data"],
        "num_levels": len(cuts) + 1,
        "cut": cut,
        "cuts": cuts.tolist(),
        "scores": {name: value for name, value in manifest.items() if name != "parts"},
    }
    kept = {"record": pyarrow.int64(), "id": pyarrow.string(), "score": pyarrow.float32()}
    schema = described(pyarrow.schema({**kept, "level": pyarrow.int8()}), about)
    start = 0
    with (
        whole_file(out) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema, write_page_checksum=True) as writer,
    ):
        for number in range(len(manifest["parts"])):
            table = read_part(folder, manifest, number, list(kept))
            inside = levels[start : start + len(table)]
            start += len(table)
            column = pyarrow.array(inside, pyarrow.int8(), mask=inside == SET_ASIDE)
            writer.write_table(table.append_column("level", column).cast(schema))
