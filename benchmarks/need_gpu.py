"""`python -m benchmarks.need_gpu WHAT`: ends with one sentence and status 2 where WHAT can't use a CUDA device."""

import os
import sys


def why_no_gpu() -> str | None:
    """None, or why nothing can be measured on a GPU here."""
    try:
        import torch
    except ModuleNotFoundError as error:
        return f"{sys.executable} has no package {error.name}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} sees none"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, and the interpreter runs on the CPU"
    return None


def main(what: str) -> None:
    reason = why_no_gpu()
    if reason is not None:
        print(f"{what} needs a CUDA device: {reason}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1])
