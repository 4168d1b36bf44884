"""Calls of decode.py's launcher: caches of the LLMs that AlignGPT is built on, and every padding of the tile table."""

from collections.abc import Callable
from functools import partial

import torch
from aligngpt_kernels.decode import _launch_decode
from aligngpt_kernels.dispatch import Chip

CASES = {  # batch, query heads, key heads, head dim, Lmax
    "MHA 32x128, 1 x 704": (1, 32, 32, 128, 704),
    "GQA 32/8x128, 16 x 2048": (16, 32, 8, 128, 2048),
    "GQA 8/1x256": (4, 8, 1, 256, 8192),
    "MHA 16x256": (4, 16, 16, 256, 8192),
    "GQA 28/4x128": (4, 28, 4, 128, 2048),
    "GQA 32/8x64": (4, 32, 8, 64, 2048),
    "GQA 71/1x64, three groups of heads": (2, 71, 1, 64, 2048),
    "MHA 32x80": (4, 32, 32, 80, 2048),
    "GQA 32/1x256": (2, 32, 1, 256, 2048),
    "MHA 32x64": (4, 32, 32, 64, 2048),
    "GQA 32/8x96": (4, 32, 8, 96, 2048),
    "MHA 4x4": (4, 4, 4, 4, 64),
    "GQA 4/2x4": (4, 4, 2, 4, 64),
}
IN_FLOAT32 = ("MHA 32x128, 1 x 704", "GQA 32/8x128, 16 x 2048", "MHA 16x256", "MHA 32x64")


def calls(chip: Chip) -> list[tuple[str, Callable[[], object], bool]]:
    names = list(CASES)
    rows = [(f"{name} {torch.bfloat16}", partial(decode, torch.bfloat16, name), name in names[:2]) for name in names]
    rows[6:6] = [(f"{names[0]} {torch.float32}", partial(decode, torch.float32, names[0]), False)]
    rows += [(f"{name} {torch.float16}", partial(decode, torch.float16, name), False) for name in names[:3]]
    rows += [(f"{name} {torch.float32}", partial(decode, torch.float32, name), False) for name in IN_FLOAT32[1:]]
    return rows


def decode(dtype: torch.dtype, name: str) -> None:
    batch, q_heads, kv_heads, head_dim, max_length = CASES[name]
    q = torch.empty(batch, q_heads, 1, head_dim, dtype=dtype)
    k, v = (torch.empty(batch, kv_heads, max_length, head_dim, dtype=dtype) for _ in range(2))
    lengths, starts = (torch.empty(batch, dtype=torch.int32) for _ in range(2))
    _launch_decode(q, k, v, lengths, starts, head_dim**-0.5)
