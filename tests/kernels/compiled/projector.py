"""Calls of projector.py's and gemm.py's launchers: 576 rows an image, 1024 → 4096 → 4096."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from aligngpt_kernels import gemm
from aligngpt_kernels.dispatch import Chip
from aligngpt_kernels.projector import _launch_projector, _launch_projector_backward

IN, HIDDEN, WIDTH = 1024, 4096, 4096
IMAGES_16, IMAGES_2, IMAGE, ROWS_16 = 9216, 1152, 576, 16


def calls(chip: Chip) -> list[tuple[str, Callable[[], object], bool]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    rows = [
        (f"forward for training, {IMAGES_16} rows", partial(forward, bf16, IMAGES_16, True), True),
        (f"backward, {IMAGES_16} rows", partial(backward, bf16, IMAGES_16), True),
        (f"forward, {IMAGE} rows", partial(forward, bf16, IMAGE, False), False),
        (f"second product, {IMAGE} rows", partial(second, bf16, IMAGE), False),
        (f"forward for training, {ROWS_16} rows", partial(forward, bf16, ROWS_16, True), False),
        (f"second product, {ROWS_16} rows", partial(second, bf16, ROWS_16), False),
        ("backward, tf32", partial(tf32, partial(backward, fp32, IMAGES_16)), False),
        ("backward, float32", partial(backward, fp32, IMAGES_16), False),
        ("forward, float16", partial(forward, fp16, IMAGES_16, True), False),
        ("backward, float16", partial(backward, fp16, IMAGES_2), False),
        ("forward, tf32", partial(tf32, partial(forward, fp32, IMAGES_16, True)), False),
        ("forward, float32", partial(forward, fp32, IMAGES_16, True), False),
        ("weight gradient added to float32", partial(weight, bf16), False),
    ]
    for name, dtype, precision in (("bfloat16", bf16, "ieee"), ("float32", fp32, "ieee"), ("tf32", fp32, "tf32")):
        for epilogue in ("bias", "gelu", "gelu, keep", "dgelu"):
            for tile in gemm.gemm_tiles(dtype, precision, chip):
                for split in {1, 4} & set(gemm.splits(tile, HIDDEN, chip)):
                    call = partial(with_tile, tile._replace(split_k=split), epilogue, dtype)
                    label = f"{epilogue} {name} {tile.block_m}x{tile.block_n}" + (" split" if split > 1 else "")
                    rows.append((label, partial(tf32, call) if precision == "tf32" else call, False))
    return rows


def weights(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype) for shape in ((HIDDEN, IN), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,))]


def forward(dtype: torch.dtype, num_rows: int, keep: bool) -> None:
    _launch_projector(torch.empty(num_rows, IN, dtype=dtype), *weights(dtype), keep)


def second(dtype: torch.dtype, num_rows: int) -> None:
    *_, w2, b2 = weights(dtype)
    gemm.gemm(torch.empty(num_rows, HIDDEN, dtype=dtype), w2, "bias", bias=b2)


def backward(dtype: torch.dtype, num_rows: int) -> None:
    grad, x, pre = (torch.empty(num_rows, width, dtype=dtype) for width in (WIDTH, IN, HIDDEN))
    _launch_projector_backward(grad, x, *weights(dtype)[:3], pre, [False, True, True, True, True])


def weight(dtype: torch.dtype) -> None:
    grad, x = torch.empty(IMAGES_2, WIDTH, dtype=dtype), torch.empty(IMAGES_2, HIDDEN, dtype=dtype)
    gemm.weight_grad(grad, x, with_bias=False, into=torch.empty(WIDTH, HIDDEN))


def with_tile(tile: gemm.GemmTile, epilogue: str, dtype: torch.dtype) -> None:
    w1, bias, w2, _ = weights(dtype)
    with mock.patch.object(gemm, "gemm_tile", return_value=tile):
        if epilogue == "dgelu":
            grad, pre = (torch.empty(IMAGES_16, width, dtype=dtype) for width in (WIDTH, HIDDEN))
            gemm.gemm(grad, w2, epilogue, pre=pre)
        else:
            gemm.gemm(torch.empty(IMAGES_16, IN, dtype=dtype), w1, epilogue, bias=bias)


def tf32(call: Callable[[], object]) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        call()
    finally:
        torch.set_float32_matmul_precision("highest")
