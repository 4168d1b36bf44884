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

from benchmarks.sets import write_scores


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
