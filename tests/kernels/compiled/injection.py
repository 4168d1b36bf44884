"""Calls of injection.py's and embedding.py's launchers: 16 images, 128 text tokens each, width 4096."""

from collections.abc import Callable
from functools import partial

import torch
from aligngpt_kernels.dispatch import Chip
from aligngpt_kernels.injection import _launch_inject, launch_inject_backward

TOKENS, ROWS, SAMPLES, WIDTH, VOCABULARY = 11264, 9216, 16, 4096, 32000


def calls(chip: Chip) -> list[tuple[str, Callable[[], object], bool]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        rows += [
            (f"forward {dtype}", partial(forward, dtype, 1.0), True),
            (f"backward {dtype}", partial(backward, dtype), True),
            (f"forward, scaled {dtype}", partial(forward, dtype, 64.0), False),
        ]
    return rows


def indices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.empty(n, dtype=torch.int32) for n in (TOKENS, ROWS, SAMPLES))


def forward(dtype: torch.dtype, scale: float) -> None:
    rows = (torch.empty(n, WIDTH, dtype=dtype) for n in (VOCABULARY, ROWS, SAMPLES))
    _launch_inject(torch.empty(TOKENS, dtype=torch.long), *rows, *indices(), scale)


def backward(dtype: torch.dtype) -> None:
    grad, ids = torch.empty(TOKENS, WIDTH, dtype=dtype), torch.empty(TOKENS, dtype=torch.long)
    launch_inject_backward(grad, ids, *indices(), 1.0, VOCABULARY, ROWS, SAMPLES, [True, True, True])
