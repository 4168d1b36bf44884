"""Calls of cross_entropy.py's launchers: the supervised rows of a 7B batch in one chunk, and in two."""

from collections.abc import Callable
from functools import partial

import torch
from aligngpt_kernels.cross_entropy import _launch_each, _launch_each_backward, _launch_sum, _launch_sum_backward
from aligngpt_kernels.dispatch import Chip

ROWS, ONE_CHUNK, TWO_CHUNKS, WIDTH, VOCABULARY = 16384, 2458, 4096, 4096, 32000
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def calls(chip: Chip) -> list[tuple[str, Callable[[], object], bool]]:
    return [
        ("sum", partial(total, BF16), True),
        ("sum, two chunks", partial(total, BF16, supervised=TWO_CHUNKS), True),
        ("backward of sum", partial(total_backward, BF16), False),
        ("backward of none", partial(each_backward, BF16), False),
        ("sum, smoothed", partial(total, BF16, smoothing=0.1), False),
        ("sum fp16", partial(total, FP16), False),
        ("sum fp32", partial(total, FP32), False),
        ("none", partial(each, BF16), False),
        ("backward of sum, two chunks", partial(total_backward, BF16, kept=FP32), False),
        ("backward of sum fp32", partial(total_backward, FP32), False),
        ("backward of none, smoothed", partial(each_backward, BF16, smoothing=0.1), False),
        ("backward of none fp32", partial(each_backward, FP32), False),
        ("sum, smoothed fp32", partial(total, FP32, smoothing=0.1), False),
    ]


def inputs(dtype: torch.dtype, supervised: int = ONE_CHUNK) -> tuple[torch.Tensor, ...]:
    """hidden, weight, labels, rows."""
    labels, rows = (torch.empty(supervised, dtype=torch.long) for _ in range(2))
    return torch.empty(ROWS, WIDTH, dtype=dtype), torch.empty(VOCABULARY, WIDTH, dtype=dtype), labels, rows


def total(dtype: torch.dtype, supervised: int = ONE_CHUNK, smoothing: float = 0.0) -> None:
    _launch_sum(*inputs(dtype, supervised), -100, smoothing, True, True)


def total_backward(dtype: torch.dtype, kept: torch.dtype | None = None) -> None:
    _, weight, _, rows = inputs(dtype)
    grad_hidden = torch.empty(ONE_CHUNK, WIDTH, dtype=dtype)
    _launch_sum_backward(torch.empty(()), grad_hidden, weight.to(kept or dtype), rows, ROWS, [True, True])


def each(dtype: torch.dtype) -> None:
    _launch_each(*inputs(dtype), -100, 0.0)


def each_backward(dtype: torch.dtype, smoothing: float = 0.0) -> None:
    _launch_each_backward(torch.empty(ROWS), *inputs(dtype), -100, smoothing, [True, True])
