"""Calls of gate.py's launchers and text_mean's: 16 samples of one image of 576 rows and 128 text tokens, width 4096."""

from collections.abc import Callable
from functools import partial

import torch
from aligngpt_kernels.dispatch import Chip
from aligngpt_kernels.embedding import _launch_text_mean, _launch_text_mean_backward
from aligngpt_kernels.gate import _launch_align_gate, _launch_align_gate_backward

TOKENS, SAMPLES, ROWS, WIDTH, VOCABULARY, HIDDEN, LEVELS = 11280, 16, 576, 4096, 32000, 256, 8


def calls(chip: Chip) -> list[tuple[str, Callable[[], object], bool]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        rows += [
            (f"gate {dtype}", partial(gate, dtype, "adaptive"), True),
            (f"gate backward {dtype}", partial(gate_backward, dtype, "adaptive", table=False), True),
            (f"text mean {dtype}", partial(mean, dtype, masked=True), False),
            (f"gate backward with table {dtype}", partial(gate_backward, dtype, "adaptive", table=True), False),
            (f"text mean backward {dtype}", partial(mean_backward, dtype), False),
            (f"text mean, no mask {dtype}", partial(mean, dtype, masked=False), False),
            (f"gate, one sample {dtype}", partial(gate, dtype, "adaptive", 1), False),
            (f"gate, average {dtype}", partial(gate, dtype, "average"), False),
            (f"gate, global {dtype}", partial(gate, dtype, "global"), False),
            (f"gate, local {dtype}", partial(gate, dtype, "local"), False),
            (f"gate backward, average {dtype}", partial(gate_backward, dtype, "average", table=True), False),
        ]
    return rows


def tokens(masked: bool) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    source, sample = (torch.empty(TOKENS, dtype=torch.int32) for _ in range(2))
    return torch.empty(TOKENS, dtype=torch.bool) if masked else None, source, sample


def mean(dtype: torch.dtype, *, masked: bool) -> None:
    ids, embed = torch.empty(TOKENS, dtype=torch.long), torch.empty(VOCABULARY, WIDTH, dtype=dtype)
    _launch_text_mean(ids, embed, *tokens(masked), SAMPLES, 1.0)


def mean_backward(dtype: torch.dtype) -> None:
    grad, ids, count = torch.empty(SAMPLES, WIDTH), torch.empty(TOKENS, dtype=torch.long), torch.empty(SAMPLES)
    _launch_text_mean_backward(grad, ids, *tokens(True), count.int(), 1.0, VOCABULARY, dtype)


def gate_inputs(dtype: torch.dtype, samples: int) -> list[torch.Tensor]:
    weights = (HIDDEN, ROWS), (HIDDEN,), (LEVELS - 1, HIDDEN), (LEVELS - 1,), (LEVELS, WIDTH)
    image_rows, text_mean = torch.empty(samples, ROWS, WIDTH, dtype=dtype), torch.empty(samples, WIDTH)
    return [image_rows, text_mean, *(torch.empty(shape, dtype=dtype) for shape in weights)]


def gate(dtype: torch.dtype, mode: str, samples: int = SAMPLES) -> None:
    _launch_align_gate(*gate_inputs(dtype, samples), torch.empty(samples, dtype=torch.int32), mode)


def gate_backward(dtype: torch.dtype, mode: str, *, table: bool) -> None:
    image_rows, text_mean, w1, _, w2, _, levels = gate_inputs(dtype, SAMPLES)
    image_sample = torch.empty(SAMPLES, dtype=torch.int32)
    saved = (torch.empty(SAMPLES, n) for n in (LEVELS - 1, ROWS, HIDDEN))
    grad = torch.empty(SAMPLES, WIDTH, dtype=dtype)
    inputs = image_rows, text_mean, w1, w2, levels, image_sample
    _launch_align_gate_backward(grad, None, *inputs, *saved, mode, [True] * 6 + [table])
