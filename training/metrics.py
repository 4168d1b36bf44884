"""What a run says about itself: one JSON line a step in RUN/metrics.jsonl, and a progress bar, both from rank 0.

A line holds: step (from 1), epoch, loss (sum over supervised tokens / their number, over the global batch), lr,
grad_norm (before clipping), tokens (all but padding), supervised_tokens, tokens_per_second, seconds, data_seconds
(waiting for the loader, on rank 0), dropped_samples (so far), peak_memory_bytes (of rank 0's device, or of its process
on a CPU).
"""

import json
import resource
import sys
from pathlib import Path
from typing import IO, Any

import torch

from aligngpt.data.tables import whole_file

FILE = "metrics.jsonl"


class Metrics:
    """Writes a line and moves the bar for every step, as a context. On ranks other than 0 it does nothing."""

    def __init__(self, run_dir: Path, *, first_step: int, total_steps: int, enabled: bool):
        self.file: IO[str] | None = None
        self.bar: Any = None
        if not enabled:
            return
        from tqdm import tqdm

        rewrite(run_dir / FILE, lines_until(run_dir / FILE, first_step))
        self.file = (run_dir / FILE).open("a", encoding="utf-8")
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def step(self, **values: Any) -> None:
        """One optimizer step's values."""
        if self.file is None:
            return
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_second']:.0f} tok/s", refresh=False)
        self.bar.update()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()
            self.bar.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes_or_bytes if sys.platform == "darwin" else kibibytes_or_bytes * 1024


def lines_until(path: Path, step: int) -> list[str]:
    """The lines of the steps up to `step` (from 1), which a run that goes on after it keeps; [] without a file."""
    kept: list[str] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
                kept.append(line)
    return kept


def rewrite(path: Path, lines: list[str]) -> None:
    """Put these lines in the file's place."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
