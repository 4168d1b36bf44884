"""Calls of project_and_inject's launchers: 16 images of 576 rows, 128 text tokens each, 1024 → 4096 → 4096."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from aligngpt_kernels import gemm
from aligngpt_kernels.dispatch import Chip
from aligngpt_kernels.project_inject import _launch_project, _launch_project_backward

IN, HIDDEN, WIDTH, VOCABULARY, ROWS, TEXT = 1024, 4096, 4096, 32000, 576, 128


def calls(chip: Chip) -> list[tuple[str, Callable[[], object], bool]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    rows = [
        ("forward for training, 16 images", partial(forward, bf16, 16, True), True),
        ("backward, 16 images", partial(backward, bf16, 16), True),
        ("forward, 1 image", partial(forward, bf16, 1, False), False),
        ("forward, float32", partial(forward, fp32, 16, True), False),
        ("backward, float32", partial(backward, fp32, 16), False),
        ("forward, float16", partial(forward, fp16, 16, True), False),
        ("backward, float16", partial(backward, fp16, 16), False),
    ]
    for dtype in (bf16, fp32):
        for tile in gemm.gemm_tiles(dtype, "ieee", chip):
            for split in {1, 4} & set(gemm.splits(tile, HIDDEN, chip)):
                label = f"place {dtype} {tile.block_m}x{tile.block_n}" + (" split" if split > 1 else "")
                rows.append((label, partial(place, tile._replace(split_k=split), dtype), False))
    return rows


def tensors(dtype: torch.dtype, images: int) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """x, w1, b1, w2, b2; ids; source, image_place, align_place, image_sample."""
    shapes = (images * ROWS, IN), (HIDDEN, IN), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,)
    tokens = images * (ROWS + TEXT)
    indices = [torch.empty(n, dtype=torch.int32) for n in (tokens, images * ROWS, images, images)]
    return [torch.empty(s, dtype=dtype) for s in shapes], torch.empty(tokens, dtype=torch.long), indices


def forward(dtype: torch.dtype, images: int, keep: bool) -> None:
    projector, ids, indices = tensors(dtype, images)
    embed, mean = torch.empty(VOCABULARY, WIDTH, dtype=dtype), torch.empty(images, WIDTH)
    _launch_project(*projector, ids, embed, mean, *indices, ROWS, 1.0, keep)


def backward(dtype: torch.dtype, images: int) -> None:
    projector, ids, indices = tensors(dtype, images)
    grad, pre = torch.empty(ids.shape[0], WIDTH, dtype=dtype), torch.empty(images * ROWS, HIDDEN, dtype=dtype)
    grad_dots, mean = torch.empty(images, ROWS), torch.empty(images, WIDTH)
    needs = [False, True, True, True, True, True, True]
    _launch_project_backward(grad, grad_dots, *projector, ids, mean, *indices, pre, ROWS, 1.0, VOCABULARY, needs)


def place(tile: gemm.GemmTile, dtype: torch.dtype) -> None:
    (_, _, _, w2, b2), ids, (_, image_place, _, image_sample) = tensors(dtype, 16)
    act, out, mean = (torch.empty(n, WIDTH, dtype=dtype) for n in (16 * ROWS, ids.shape[0], 16))
    where = {"out": out, "place": image_place, "owner": image_sample, "rows_per_owner": ROWS, "mean": mean}
    with mock.patch.object(gemm, "gemm_tile", return_value=tile):
        gemm.gemm(act, w2, "place", bias=b2, **where)
