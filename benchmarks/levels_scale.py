"""`aligngpt levels` at the size of web data: its peak resident memory and its time, for scores drawn at random.

    python -m benchmarks.levels_scale [--pairs 100000000] [--folder DIR]

Writes scores in parts of 8192, as `aligngpt score` does, cuts them into 8 levels in a fresh process, and deletes
everything. 100 M pairs need 5 GB below DIR. The time is a CPU timing of the machine it runs on.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow

from aligngpt.data.tables import part_name, write_manifest, write_table

ROWS_PER_PART = 8192


def write_scores(folder: Path, pairs: int) -> None:
    """A finished scoring of `pairs` rows; one in a thousand has no score, most scores are shared by several."""
    about = {"kind": "scores", "data": {"sha256": "0" * 64, "samples": pairs}}
    rng = np.random.default_rng(0)
    starts = range(0, pairs, ROWS_PER_PART)
    for number, start in enumerate(starts):
        records = np.arange(start, min(pairs, start + ROWS_PER_PART))
        scores = rng.normal(0.25, 0.06, len(records)).astype(np.float32)
        lost = rng.random(len(records)) < 1e-3
        scores[lost] = np.nan
        column = pyarrow.array(records, pyarrow.int64())
        table = {
            "record": column,
            "id": column.cast(pyarrow.string()),
            "score": pyarrow.array(scores, pyarrow.float32()),
            "truncated": pyarrow.array(np.zeros(len(records), bool)),
            "problem": pyarrow.array(np.full(len(records), "no such file"), pyarrow.string(), mask=~lost),
        }
        write_table(folder / part_name(number), pyarrow.table(table), about)
    write_manifest(folder, about, len(starts), {})


def measure(*command: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command. RuntimeError: it fails."""
    started = time.perf_counter()
    process = os.spawnv(os.P_NOWAIT, command[0], command)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.levels_scale", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000_000, metavar="N", help="how many (default 100 M)")
    parser.add_argument("--folder", metavar="DIR", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--cut", choices=("count", "range"), default="count")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        scores, out = Path(folder) / "scores", Path(folder) / "levels.parquet"
        scores.mkdir()
        write_scores(scores, args.pairs)
        written = sum(path.stat().st_size for path in scores.iterdir())
        _, before = measure(sys.executable, "-c", "import aligngpt.levels, pyarrow.parquet")
        seconds, peak = measure(
            sys.executable, "-m", "aligngpt", "levels", str(scores), "--out", str(out), "--cut", args.cut
        )
        print(f"{args.pairs:,} pairs, {written / 1e9:.2f} GB of scores, {out.stat().st_size / 1e9:.2f} GB of levels")
        print(f"{seconds:.1f} s; at most {peak / 1e9:.2f} GB resident, of which the start takes {before / 1e9:.2f}")
        print(f"{(peak - before) / args.pairs:.1f} bytes a pair")


if __name__ == "__main__":
    main()
