"""`on_triton.py STAGE PRESET …` is `training/STAGE.py PRESET …` with every op on Triton's kernels, wherever it runs.

Prints the names of the ops that ran so.
"""

import sys

import torch
from aligngpt_kernels import dispatch

from training.entry import run


def take_kernels(op: str, device: torch.device, bucket: str = "") -> None:
    ran.add(op)


if __name__ == "__main__":
    ran: set[str] = set()
    dispatch.why_not_auto = take_kernels
    try:
        run(sys.argv.pop(1))
    finally:
        sys.stdout.write(f"on Triton: {' '.join(sorted(ran))}\n")  # at once: other processes write too
        sys.stdout.flush()
