"""align_gate: how much of each alignment level a sample's image and text call for.

    dots = mean over the sample's images of ⟨I_p, t̄⟩  (S, P)
    α    = softmax(W2 gelu(W1 dots + b1) + b2)         (S, N - 1)
    H    = α @ table[:-1] + table[-1]                  (S, D), one alignment row per sample

S samples (sequences with an image), t̄ (S, D) the mean of each one's text embeddings (`text_mean`), M images of P rows,
width D, N levels of which the last row of the table is the global one. Sums, dots and softmax run in float32 (float64
for float64 inputs). Source: arXiv 2405.14129, section 3; the modes are its ablations; the mean over several images is
ours.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import (
    DTYPES,
    Chip,
    Impl,
    check_devices,
    check_floats,
    check_ints,
    check_shape,
    chip,
    keep_in_graph,
    launch_options,
    register,
    sum_dtype,
    tl,
    triton,
    use_triton,
)
from .gemm import gelu_cdf

Mode = Literal["adaptive", "local", "global", "average"]


def sample_dots(image_rows: Tensor, text_mean: Tensor, image_sample: Tensor) -> Tensor:  # (M, P, D), (S, D), (M,)
    """⟨I_p, t̄⟩ of each image, averaged over the images of a sample: (S, P)."""
    dtype = sum_dtype(image_rows)
    samples = torch.arange(text_mean.shape[0], device=image_sample.device)
    member = (image_sample == samples[:, None]).to(dtype)  # (S, M)
    mean_of_image = member.T @ text_mean.to(dtype)
    dots = torch.bmm(image_rows.to(dtype), mean_of_image[:, :, None])[:, :, 0]
    return member @ dots / member.sum(1, keepdim=True).clamp(min=1)


def mix_levels(alpha: Tensor, table: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:  # (S, N - 1), (N, D)
    """H (S, D) in alpha's dtype, and the weights its local levels were mixed with, by the table of `align_gate`.

    "average" and "global" read nothing of alpha but its shape.
    """
    local_rows, global_row = table.to(alpha.dtype).split([table.shape[0] - 1, 1])
    if mode == "global":
        return global_row.expand(alpha.shape[0], -1), torch.zeros_like(alpha)
    weights = torch.full_like(alpha, 1 / local_rows.shape[0]) if mode == "average" else alpha
    h = weights @ local_rows
    return (h if mode == "local" else h + global_row), weights


def align_gate_reference(
    image_rows: Tensor,
    text_mean: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    table: Tensor,
    *,
    image_sample: Tensor,
    mode: Mode,
) -> tuple[Tensor, Tensor]:
    """The formulas above in plain PyTorch; arguments as `align_gate`."""
    dtype = sum_dtype(image_rows)
    if mode in ("adaptive", "local"):
        dots = sample_dots(image_rows, text_mean, image_sample)
        hidden = F.gelu(F.linear(dots, w1.to(dtype), b1.to(dtype)))
        alpha = F.linear(hidden, w2.to(dtype), b2.to(dtype)).softmax(-1)
        h, weights = mix_levels(alpha, table, mode)
        return h.to(image_rows.dtype), weights
    h, weights = mix_levels(text_mean.new_empty(text_mean.shape[0], table.shape[0] - 1, dtype=dtype), table, mode)
    return keep_in_graph(h.to(image_rows.dtype), image_rows, text_mean, w1, b1, w2, b2), weights


class GateTile(NamedTuple):
    """Layout of align_gate's programs."""

    block_p: int  # image rows of a program
    block_d: int  # columns of them at a time
    block_h: int  # hidden units at a time, beside block_p
    block_r: int  # programs whose hidden sums are added at once, beside block_h
    block_l: int  # local levels, all
    block_mix: int  # columns of the table at a time, beside block_l
    num_warps: int
    max_registers: int  # a thread; without a limit ptxas aims lower and spills one


def gate_tile(num_images: int, rows: int, width: int, hidden: int, num_local: int, chip: Chip) -> GateTile:
    """2048 elements at a time, 16 a thread, and as many on their way: five programs fit on a multiprocessor.

    All of them should run at once, so that none starts reading when the others are done: 8 rows each, or 16, or 32.
    """
    block_p = 8
    while block_p < 32 and num_images * (triton.cdiv(rows, block_p) + 1) > 5 * chip.multiprocessors:
        block_p *= 2
    block_d = min(triton.next_power_of_2(max(width, 1)), 2048 // block_p)
    block_h = min(triton.next_power_of_2(max(hidden, 1)), 2048 // block_p, 128)
    block_l = triton.next_power_of_2(num_local)
    block_mix = min(triton.next_power_of_2(max(width, 1)), max(4096 // block_l, 16))
    return GateTile(block_p, block_d, block_h, min(2048 // block_h, 64), block_l, block_mix, 4, max_registers=96)


class GateBackwardTile(NamedTuple):
    """Layout of the programs that give the gradient of a sample's dots."""

    block_p: int  # dots of a program
    block_h: int  # hidden units at a time, beside block_p
    block_l: int  # local levels, all
    block_mix: int  # columns of the table at a time, beside block_l
    num_warps: int


def gate_backward_tile(width: int, hidden: int, num_local: int) -> GateBackwardTile:
    """8192 elements at a time: one program a multiprocessor or two, so its waits count and not its registers."""
    block_h = min(triton.next_power_of_2(max(hidden, 1)), 128)
    block_l = triton.next_power_of_2(num_local)
    block_mix = min(triton.next_power_of_2(max(width, 1)), max(8192 // block_l, 16))
    return GateBackwardTile(64, block_h, block_l, block_mix, num_warps=8)


class GateGradsTile(NamedTuple):
    """Layout of the programs that write the gradients of the arguments, three kinds of them in one launch."""

    block_p: int  # of W1's gradient
    block_h: int
    block_l: int  # of the table's gradient
    block_mix: int
    block_r: int  # image rows at a time
    block_d: int  # columns of a program that goes through a sample's image rows
    num_warps: int


def gate_grads_tile(num_samples: int, width: int, hidden: int, num_local: int, chip: Chip) -> GateGradsTile:
    """2048 elements at a time, 16 a thread; 128 columns of image rows, or 64 where that leaves multiprocessors idle."""
    block_d = min(triton.next_power_of_2(max(width, 1)), 128)
    while block_d > 64 and num_samples * triton.cdiv(width, block_d) < 2 * chip.multiprocessors:
        block_d //= 2
    block_h = min(triton.next_power_of_2(max(hidden, 1)), 32)
    block_l = triton.next_power_of_2(num_local)
    block_mix = min(triton.next_power_of_2(max(width, 1)), max(2048 // block_l, 16))
    return GateGradsTile(64, block_h, block_l, block_mix, 2048 // block_d, block_d, num_warps=4)


@triton.jit
def _images_of(p_image_sample, i_s, num_images, num_samples, BLOCK: tl.constexpr = 128):
    """How many images sample i_s has, the first of them and the one past the last; num_samples stands for no sample."""
    b_count = tl.zeros((BLOCK,), tl.int32)
    b_first = tl.zeros((BLOCK,), tl.int32) + num_images
    b_end = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_images, BLOCK):
        o_m = start + tl.arange(0, BLOCK)
        # (BLOCK,)
        b_sample = tl.load(p_image_sample + o_m, mask=o_m < num_images, other=0)
        b_sample = tl.where((b_sample >= 0) & (b_sample < num_samples), b_sample, num_samples)
        m_mine = (b_sample == i_s) & (o_m < num_images)
        b_count += m_mine.to(tl.int32)
        b_first = tl.minimum(b_first, tl.where(m_mine, o_m, num_images))
        b_end = tl.maximum(b_end, tl.where(m_mine, o_m + 1, 0))
    return tl.sum(b_count, 0), tl.min(b_first, 0), tl.max(b_end, 0)


@triton.jit(do_not_specialize=["num_images", "num_samples"])
def _align_gate_kernel(
    p_image,  # (M, P, D)
    p_mean,  # (S, D)
    p_w1,  # (hidden, P)
    p_b1,  # (hidden,)
    p_w2,  # (N - 1, hidden)
    p_b2,  # (N - 1,)
    p_table,  # (N, D)
    p_image_sample,  # (M,)
    p_image_dots,  # (M, P)
    p_image_hidden,  # (M * row_blocks, hidden): W1's product with the dots of each program
    p_arrived,  # (S,) zeros
    p_h,  # (S, D)
    p_weights,  # (S, N - 1)
    p_dots,  # (S, P)
    p_hidden,  # (S, hidden) before GELU
    num_images,
    num_samples,
    rows,
    width,
    hidden,
    num_local,
    row_blocks,
    MODE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_MIX: tl.constexpr,
):
    # M * row_blocks programs of image rows, of which a sample's last to arrive finishes it; then S programs that
    # finish the samples without an image, or all of them in the modes that need no dots.
    DOTS: tl.constexpr = MODE == "adaptive" or MODE == "local"
    i_program = tl.program_id(0)
    num_row_programs = tl.num_programs(0) - num_samples
    i_s = i_program - num_row_programs
    num_mine, first, end = 0, 0, 0
    finish = i_program >= num_row_programs
    if DOTS:
        i_m = i_program // row_blocks
        if i_program < num_row_programs:
            i_s = tl.load(p_image_sample + i_m).to(tl.int32)
        num_mine, first, end = _images_of(p_image_sample, i_s, num_images, num_samples)
        finish = (i_program >= num_row_programs) & (num_mine == 0)
        if (i_program < num_row_programs) & (i_s >= 0) & (i_s < num_samples):
            o_p = (i_program - i_m * row_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
            m_p = o_p < rows
            # (BLOCK_P, 1)
            p_rows = p_image + (i_m.to(tl.int64) * rows + o_p)[:, None] * width
            p_means = p_mean + (i_s.to(tl.int64) + tl.zeros((BLOCK_P,), tl.int64))[:, None] * width
            b_sum = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
            o_d = tl.arange(0, BLOCK_D)
            # (BLOCK_P, BLOCK_D), always one block ahead
            b_next = tl.load(p_rows + o_d[None, :], mask=m_p[:, None] & (o_d < width)[None, :], other=0)
            for start in range(0, width, BLOCK_D):
                o_d = start + tl.arange(0, BLOCK_D)
                o_next = o_d + BLOCK_D
                b_rows = b_next
                b_next = tl.load(p_rows + o_next[None, :], mask=m_p[:, None] & (o_next < width)[None, :], other=0)
                # (BLOCK_P, BLOCK_D): each thread reads the mean beside its elements and waits for no other thread
                b_mean = tl.load(p_means + o_d[None, :], mask=m_p[:, None] & (o_d < width)[None, :], other=0)
                b_sum += b_rows.to(tl.float32) * b_mean.to(tl.float32)
            b_dots = tl.sum(b_sum, 1)
            tl.store(p_image_dots + i_m.to(tl.int64) * rows + o_p, b_dots, mask=m_p)
            for start in range(0, hidden, BLOCK_H):
                o_h = start + tl.arange(0, BLOCK_H)
                m_h = o_h < hidden
                # (BLOCK_H, BLOCK_P)
                b_w1 = tl.load(p_w1 + o_h[:, None] * rows + o_p[None, :], mask=m_h[:, None] & m_p[None, :], other=0).to(
                    tl.float32
                )
                b_part = tl.sum(b_w1 * b_dots[None, :], 1)
                tl.store(p_image_hidden + i_program.to(tl.int64) * hidden + o_h, b_part, mask=m_h)
            # All threads have stored before one of them says so.
            tl.debug_barrier()
            arrived = tl.atomic_add(p_arrived + i_s, 1, sem="acq_rel")
            finish = arrived == num_mine * row_blocks - 1

    if finish:
        o_l = tl.arange(0, BLOCK_L)
        m_l = o_l < num_local
        b_weights = tl.zeros((BLOCK_L,), tl.float32)
        if DOTS:
            share = 1.0 / tl.maximum(num_mine, 1).to(tl.float32)
            # What others stored is read past the L1 cache, and added in the order of images and of their programs.
            for start in range(0, rows, BLOCK_H):
                o_p = start + tl.arange(0, BLOCK_H)
                b_dots = tl.zeros((BLOCK_H,), tl.float32)
                for i_image in range(first, end):
                    mine = tl.load(p_image_sample + i_image) == i_s
                    # (BLOCK_H,)
                    b_dots += tl.load(
                        p_image_dots + tl.cast(i_image, tl.int64) * rows + o_p,
                        mask=o_p < tl.where(mine, rows, 0),
                        other=0,
                        cache_modifier=".cg",
                    )
                tl.store(p_dots + i_s.to(tl.int64) * rows + o_p, b_dots * share, mask=o_p < rows)
            b_logits = tl.load(p_b2 + o_l, mask=m_l, other=float("-inf")).to(tl.float32)
            for start in range(0, hidden, BLOCK_H):
                o_h = start + tl.arange(0, BLOCK_H)
                m_h = o_h < hidden
                b_sum = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
                for start_r in range(first * row_blocks, end * row_blocks, BLOCK_R):
                    o_r = start_r + tl.arange(0, BLOCK_R)
                    m_r = o_r < end * row_blocks
                    m_r = m_r & (tl.load(p_image_sample + o_r // row_blocks, mask=m_r, other=-1) == i_s)
                    # (BLOCK_R, BLOCK_H)
                    b_sum += tl.load(
                        p_image_hidden + o_r[:, None].to(tl.int64) * hidden + o_h[None, :],
                        mask=m_r[:, None] & m_h[None, :],
                        other=0,
                        cache_modifier=".cg",
                    )
                b_hidden = tl.sum(b_sum, 0) * share + tl.load(p_b1 + o_h, mask=m_h, other=0).to(tl.float32)
                tl.store(p_hidden + i_s.to(tl.int64) * hidden + o_h, b_hidden, mask=m_h)
                # (BLOCK_L, BLOCK_H)
                b_w2 = tl.load(
                    p_w2 + o_l[:, None] * hidden + o_h[None, :], mask=m_l[:, None] & m_h[None, :], other=0
                ).to(tl.float32)
                b_logits += tl.sum(b_w2 * (b_hidden * gelu_cdf(b_hidden))[None, :], 1)
            b_weights = tl.exp(b_logits - tl.max(b_logits, 0))
            b_weights = b_weights / tl.sum(b_weights, 0)
        if MODE == "average":
            b_weights = tl.where(m_l, 1.0, 0.0) / num_local
        tl.store(p_weights + i_s * num_local + o_l, b_weights, mask=m_l)
        for start in range(0, width, BLOCK_MIX):
            o_d = start + tl.arange(0, BLOCK_MIX)
            m_d = o_d < width
            b_h = tl.zeros((BLOCK_MIX,), tl.float32)
            if MODE != "global":
                # (BLOCK_L, BLOCK_MIX)
                b_local = tl.load(
                    p_table + o_l[:, None].to(tl.int64) * width + o_d[None, :],
                    mask=m_l[:, None] & m_d[None, :],
                    other=0,
                ).to(tl.float32)
                b_h = tl.sum(b_weights[:, None] * b_local, 0)
            if MODE != "local":
                p_global = p_table + tl.cast(num_local, tl.int64) * width
                b_h += tl.load(p_global + o_d, mask=m_d, other=0).to(tl.float32)
            tl.store(p_h + i_s.to(tl.int64) * width + o_d, b_h.to(p_h.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["num_images", "num_samples"])
def _align_gate_backward_kernel(
    p_grad_h,  # (S, D)
    p_grad_weights,  # (S, N - 1)
    p_w1,
    p_w2,
    p_table,
    p_image_sample,
    p_weights,  # (S, N - 1)
    p_hidden,  # (S, hidden) before GELU
    p_grad_logits,  # (S, N - 1)
    p_grad_hidden,  # (S, hidden) before GELU
    p_grad_dots,  # (S, P), divided by the number of images
    num_images,
    num_samples,
    rows,
    width,
    hidden,
    num_local,
    WITH_GRAD_WEIGHTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_MIX: tl.constexpr,
):
    # BLOCK_P dots of one sample a program. All of a sample's programs go through its softmax and hidden units: a few
    # reads from L2, where waiting for one of them would take another launch.
    i_s = tl.program_id(0).to(tl.int64)
    i_p = tl.program_id(1)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < rows
    o_l = tl.arange(0, BLOCK_L)
    m_l = o_l < num_local
    num_mine, _, _ = _images_of(p_image_sample, i_s, num_images, num_samples)

    b_sum = tl.zeros((BLOCK_L, BLOCK_MIX), tl.float32)
    for start in range(0, width, BLOCK_MIX):
        o_d = start + tl.arange(0, BLOCK_MIX)
        m_d = o_d < width
        # (BLOCK_MIX,), (BLOCK_L, BLOCK_MIX)
        b_grad = tl.load(p_grad_h + i_s * width + o_d, mask=m_d, other=0).to(tl.float32)
        b_local = tl.load(
            p_table + o_l[:, None].to(tl.int64) * width + o_d[None, :], mask=m_l[:, None] & m_d[None, :], other=0
        )
        b_sum += b_local.to(tl.float32) * b_grad[None, :]
    b_grad_weights = tl.sum(b_sum, 1)
    if WITH_GRAD_WEIGHTS:
        b_grad_weights += tl.load(p_grad_weights + i_s * num_local + o_l, mask=m_l, other=0)
    b_weights = tl.load(p_weights + i_s * num_local + o_l, mask=m_l, other=0)
    b_grad_logits = b_weights * (b_grad_weights - tl.sum(b_weights * b_grad_weights, 0))
    if i_p == 0:
        tl.store(p_grad_logits + i_s * num_local + o_l, b_grad_logits, mask=m_l)

    b_dots = tl.zeros((BLOCK_H, BLOCK_P), tl.float32)
    for start in range(0, hidden, BLOCK_H):
        o_h = start + tl.arange(0, BLOCK_H)
        m_h = o_h < hidden
        # (BLOCK_H, BLOCK_P)
        b_w1 = tl.load(p_w1 + o_h[:, None] * rows + o_p[None, :], mask=m_h[:, None] & m_p[None, :], other=0)
        # (BLOCK_L, BLOCK_H), (BLOCK_H,)
        b_w2 = tl.load(p_w2 + o_l[:, None] * hidden + o_h[None, :], mask=m_l[:, None] & m_h[None, :], other=0)
        b_hidden = tl.load(p_hidden + i_s * hidden + o_h, mask=m_h, other=0)
        b_slope = gelu_cdf(b_hidden) + b_hidden * tl.exp(-0.5 * b_hidden * b_hidden) * 0.3989422804014327
        b_grad_hidden = tl.sum(b_w2.to(tl.float32) * b_grad_logits[:, None], 0) * b_slope
        if i_p == 0:
            tl.store(p_grad_hidden + i_s * hidden + o_h, b_grad_hidden, mask=m_h)
        b_dots += b_w1.to(tl.float32) * b_grad_hidden[:, None]
    b_grad_dots = tl.sum(b_dots, 0) / tl.maximum(num_mine, 1).to(tl.float32)
    tl.store(p_grad_dots + i_s * rows + o_p, b_grad_dots, mask=m_p)


@triton.jit
def _gate_grads(
    i_program,
    p_grad_logits,
    p_grad_hidden,
    p_dots,
    p_hidden,
    p_grad_w1,
    p_grad_b1,
    p_grad_w2,
    p_grad_b2,
    num_samples,
    rows,
    hidden,
    num_local,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """(BLOCK_H, BLOCK_P) of W1's gradient. The programs of its first rows add b1's and W2's, the first of all b2's."""
    num_blocks = tl.maximum(tl.cdiv(rows, BLOCK_P), 1)
    i_h = i_program // num_blocks
    i_p = i_program - i_h * num_blocks
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_l = tl.arange(0, BLOCK_L)
    m_h, m_p, m_l = o_h < hidden, o_p < rows, o_l < num_local
    b_grad_w1 = tl.zeros((BLOCK_H, BLOCK_P), tl.float32)
    for i_s in range(num_samples):
        # (BLOCK_H,), (BLOCK_P,)
        b_grad_hidden = tl.load(p_grad_hidden + i_s * hidden + o_h, mask=m_h, other=0)
        b_dots = tl.load(p_dots + i_s * rows + o_p, mask=m_p, other=0)
        b_grad_w1 += b_grad_hidden[:, None] * b_dots[None, :]
    tl.store(
        p_grad_w1 + o_h[:, None] * rows + o_p[None, :],
        b_grad_w1.to(p_grad_w1.dtype.element_ty),
        mask=m_h[:, None] & m_p[None, :],
    )
    if i_p == 0:
        b_grad_b1 = tl.zeros((BLOCK_H,), tl.float32)
        b_grad_b2 = tl.zeros((BLOCK_L,), tl.float32)
        b_grad_w2 = tl.zeros((BLOCK_L, BLOCK_H), tl.float32)
        for i_s in range(num_samples):
            # (BLOCK_H,), (BLOCK_L,)
            b_hidden = tl.load(p_hidden + i_s * hidden + o_h, mask=m_h, other=0)
            b_grad_logits = tl.load(p_grad_logits + i_s * num_local + o_l, mask=m_l, other=0)
            b_grad_b1 += tl.load(p_grad_hidden + i_s * hidden + o_h, mask=m_h, other=0)
            b_grad_b2 += b_grad_logits
            b_grad_w2 += b_grad_logits[:, None] * (b_hidden * gelu_cdf(b_hidden))[None, :]
        tl.store(p_grad_b1 + o_h, b_grad_b1.to(p_grad_b1.dtype.element_ty), mask=m_h)
        tl.store(
            p_grad_w2 + o_l[:, None] * hidden + o_h[None, :],
            b_grad_w2.to(p_grad_w2.dtype.element_ty),
            mask=m_l[:, None] & m_h[None, :],
        )
        if i_h == 0:
            tl.store(p_grad_b2 + o_l, b_grad_b2.to(p_grad_b2.dtype.element_ty), mask=m_l)


@triton.jit
def _table_grad(
    i_program,
    p_grad_h,
    p_weights,
    p_grad_table,
    num_samples,
    width,
    num_local,
    MODE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_MIX: tl.constexpr,
):
    """BLOCK_MIX columns of the gradient of every level."""
    o_d = i_program * BLOCK_MIX + tl.arange(0, BLOCK_MIX)
    o_l = tl.arange(0, BLOCK_L)
    m_d, m_l = o_d < width, o_l < num_local
    b_local = tl.zeros((BLOCK_L, BLOCK_MIX), tl.float32)
    b_global = tl.zeros((BLOCK_MIX,), tl.float32)
    for i_s in range(num_samples):
        # (BLOCK_MIX,), (BLOCK_L,)
        b_grad = tl.load(p_grad_h + tl.cast(i_s, tl.int64) * width + o_d, mask=m_d, other=0).to(tl.float32)
        if MODE != "global":
            b_weights = tl.load(p_weights + i_s * num_local + o_l, mask=m_l, other=0)
            b_local += b_weights[:, None] * b_grad[None, :]
        if MODE != "local":
            b_global += b_grad
    tl.store(
        p_grad_table + o_l[:, None].to(tl.int64) * width + o_d[None, :],
        b_local.to(p_grad_table.dtype.element_ty),
        mask=m_l[:, None] & m_d[None, :],
    )
    p_global = p_grad_table + tl.cast(num_local, tl.int64) * width
    tl.store(p_global + o_d, b_global.to(p_grad_table.dtype.element_ty), mask=m_d)


@triton.jit
def _row_grads(
    i_s,
    i_d,
    p_image,
    p_mean,
    p_image_sample,
    p_grad_dots,
    p_grad_image,
    p_grad_mean,
    num_images,
    num_samples,
    rows,
    width,
    NEEDS_IMAGE: tl.constexpr,
    NEEDS_MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of the gradients of a sample's text mean and of its image rows.

    Each element of a row is read once, for the sum over rows, and of its gradient written once. Sample num_samples
    stands for the images that no sample owns: zeros.
    """
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    _, first, end = _images_of(p_image_sample, i_s, num_images, num_samples)
    owned = i_s < num_samples
    # (BLOCK_D,)
    b_mean = tl.load(p_mean + i_s.to(tl.int64) * width + o_d, mask=o_d < tl.where(owned, width, 0), other=0).to(
        tl.float32
    )
    b_sum = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for i_mine in range(end - first):  # from 0: a start that only the device knows costs the 16-byte loads
        i_m = first + i_mine
        owner = tl.load(p_image_sample + i_m)
        mine = tl.where((owner >= 0) & (owner < num_samples), owner, num_samples) == i_s
        first_row = tl.cast(i_m, tl.int64) * rows
        mine_rows = tl.where(mine, rows, 0)
        dot_rows = tl.where(owned, mine_rows, 0)
        p_rows = p_image + (first_row + tl.arange(0, BLOCK_R))[:, None] * width + o_d[None, :]
        if NEEDS_MEAN:
            # (BLOCK_R, BLOCK_D), always one block ahead
            m_next = (tl.arange(0, BLOCK_R) < dot_rows)[:, None] & m_d[None, :]
            b_next = tl.load(p_rows, mask=m_next, other=0)
        for start in range(0, mine_rows, BLOCK_R):
            o_p = start + tl.arange(0, BLOCK_R)
            # (BLOCK_R,)
            b_grad_dots = tl.load(p_grad_dots + i_s.to(tl.int64) * rows + o_p, mask=o_p < dot_rows, other=0)
            if NEEDS_MEAN:
                b_rows = b_next
                p_rows += BLOCK_R * tl.cast(width, tl.int64)
                b_next = tl.load(p_rows, mask=(o_p + BLOCK_R < dot_rows)[:, None] & m_d[None, :], other=0)
                b_sum += b_rows.to(tl.float32) * b_grad_dots[:, None]
            if NEEDS_IMAGE:
                b_grad = b_grad_dots[:, None] * b_mean[None, :]
                p_grads = p_grad_image + (first_row + o_p)[:, None] * width + o_d[None, :]
                m_rows = (o_p < rows)[:, None] & m_d[None, :]
                tl.store(p_grads, b_grad.to(p_grad_image.dtype.element_ty), mask=m_rows)
    if NEEDS_MEAN:
        b_grad_mean = tl.sum(b_sum, 0).to(p_grad_mean.dtype.element_ty)
        tl.store(p_grad_mean + i_s.to(tl.int64) * width + o_d, b_grad_mean, mask=o_d < tl.where(owned, width, 0))


@triton.jit(do_not_specialize=["num_images", "num_samples", "gate_programs", "table_programs"])
def _align_gate_grads_kernel(
    p_image,
    p_mean,
    p_grad_h,
    p_image_sample,
    p_weights,
    p_dots,
    p_hidden,
    p_grad_logits,
    p_grad_hidden,
    p_grad_dots,
    p_grad_image,
    p_grad_mean,
    p_grad_w1,
    p_grad_b1,
    p_grad_w2,
    p_grad_b2,
    p_grad_table,
    num_images,
    num_samples,
    rows,
    width,
    hidden,
    num_local,
    gate_programs,
    table_programs,
    MODE: tl.constexpr,
    NEEDS_IMAGE: tl.constexpr,
    NEEDS_MEAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_MIX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The small gradients come first, beside the long stream of image rows. Sums over samples run in their order.
    i_program = tl.program_id(0)
    if i_program < gate_programs:
        _gate_grads(
            i_program,
            p_grad_logits,
            p_grad_hidden,
            p_dots,
            p_hidden,
            p_grad_w1,
            p_grad_b1,
            p_grad_w2,
            p_grad_b2,
            num_samples,
            rows,
            hidden,
            num_local,
            BLOCK_P,
            BLOCK_H,
            BLOCK_L,
        )
    elif i_program < gate_programs + table_programs:
        i_table = i_program - gate_programs
        _table_grad(i_table, p_grad_h, p_weights, p_grad_table, num_samples, width, num_local, MODE, BLOCK_L, BLOCK_MIX)
    elif NEEDS_IMAGE or NEEDS_MEAN:
        i_row = i_program - gate_programs - table_programs
        num_blocks = tl.cdiv(width, BLOCK_D)
        i_s = i_row // num_blocks
        i_d = i_row - i_s * num_blocks
        _row_grads(
            i_s,
            i_d,
            p_image,
            p_mean,
            p_image_sample,
            p_grad_dots,
            p_grad_image,
            p_grad_mean,
            num_images,
            num_samples,
            rows,
            width,
            NEEDS_IMAGE,
            NEEDS_MEAN,
            BLOCK_R,
            BLOCK_D,
        )


def _needs_dots(mode: str) -> bool:
    return mode in ("adaptive", "local")


def _align_gate_outputs(
    image_rows: Tensor,
    text_mean: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    table: Tensor,
    image_sample: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten: H, weights, dots (S, P), W1 dots + b1 (S, hidden); the last two empty where the mode has no dots."""
    num_samples = text_mean.shape[0]
    num_with_dots = num_samples if _needs_dots(mode) else 0
    return (
        table.new_empty(num_samples, table.shape[1]),
        table.new_empty(num_samples, table.shape[0] - 1, dtype=torch.float32),
        table.new_empty(num_with_dots, w1.shape[1], dtype=torch.float32),
        table.new_empty(num_with_dots, w1.shape[0], dtype=torch.float32),
    )


def _launch_align_gate(
    image_rows: Tensor,
    text_mean: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    table: Tensor,
    image_sample: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, weights, dots, pre_activation = _align_gate_outputs(
        image_rows, text_mean, w1, b1, w2, b2, table, image_sample, mode
    )
    (num_images, rows, width), hidden, num_samples = image_rows.shape, w1.shape[0], text_mean.shape[0]
    if num_samples == 0:
        return h, weights, dots, pre_activation
    num_local = table.shape[0] - 1
    tile = gate_tile(num_images, rows, width, hidden, num_local, chip(table.device))
    row_blocks = max(triton.cdiv(rows, tile.block_p), 1)
    row_programs = num_images * row_blocks * _needs_dots(mode)
    image_dots = dots.new_empty(num_images, rows) if row_programs else dots
    image_hidden = dots.new_empty(row_programs, hidden)
    arrived = image_sample.new_zeros(num_samples, dtype=torch.int32) if row_programs else image_sample
    _align_gate_kernel[(row_programs + num_samples,)](
        image_rows.contiguous(),
        text_mean.contiguous(),
        w1.contiguous(),
        b1.contiguous(),
        w2.contiguous(),
        b2.contiguous(),
        table.contiguous(),
        image_sample.contiguous(),
        image_dots,
        image_hidden,
        arrived,
        h,
        weights,
        dots,
        pre_activation,
        num_images,
        num_samples,
        rows,
        width,
        hidden,
        num_local,
        row_blocks,
        MODE=mode,
        BLOCK_P=tile.block_p,
        BLOCK_D=tile.block_d,
        BLOCK_H=tile.block_h,
        BLOCK_R=tile.block_r,
        BLOCK_L=tile.block_l,
        BLOCK_MIX=tile.block_mix,
        maxnreg=tile.max_registers,
        **launch_options(tile.num_warps, 1),
    )
    return h, weights, dots, pre_activation


def _launch_align_gate_backward(
    grad_h: Tensor,
    grad_weights: Tensor | None,
    image_rows: Tensor,  # not read unless text_mean needs a gradient
    text_mean: Tensor,
    w1: Tensor,
    w2: Tensor,
    table: Tensor,
    image_sample: Tensor,
    weights: Tensor,
    dots: Tensor,
    pre_activation: Tensor,
    mode: str,
    needs: list[bool],  # gradient of image_rows, text_mean, w1, b1, w2, b2, table
) -> list[Tensor]:  # the gradients that are needed, in that order
    num_samples, width = text_mean.shape
    num_images, (hidden, rows), num_local = image_sample.shape[0], w1.shape, table.shape[0] - 1
    needs_image, needs_mean, *_, needs_table = needs
    needs_gate = any(needs[2:6])
    with_dots = _needs_dots(mode) and num_samples > 0

    def new(*shape: int, written: bool = with_dots, dtype: torch.dtype = table.dtype) -> Tensor:
        return (torch.empty if written else torch.zeros)(shape, dtype=dtype, device=table.device)

    grads = [
        new(num_images * needs_image, rows, width),
        new(num_samples * needs_mean, width, dtype=text_mean.dtype),
        new(hidden * needs_gate, rows),
        new(hidden * needs_gate),
        new(num_local * needs_gate, hidden),
        new(num_local * needs_gate),
        new((num_local + 1) * needs_table, width, written=num_samples > 0),
    ]
    image_sample, text_mean, grad_h = image_sample.contiguous(), text_mean.contiguous(), grad_h.contiguous()
    grad_logits, grad_hidden, grad_dots = (torch.empty_like(t) for t in (weights, pre_activation, dots))
    if with_dots and any(needs[:6]):
        tile = gate_backward_tile(width, hidden, num_local)
        _align_gate_backward_kernel[num_samples, max(triton.cdiv(rows, tile.block_p), 1)](
            grad_h,
            weights if grad_weights is None else grad_weights.contiguous(),
            w1.contiguous(),
            w2.contiguous(),
            table.contiguous(),
            image_sample,
            weights,
            pre_activation,
            grad_logits,
            grad_hidden,
            grad_dots,
            num_images,
            num_samples,
            rows,
            width,
            hidden,
            num_local,
            WITH_GRAD_WEIGHTS=grad_weights is not None,
            BLOCK_P=tile.block_p,
            BLOCK_H=tile.block_h,
            BLOCK_L=tile.block_l,
            BLOCK_MIX=tile.block_mix,
            **launch_options(tile.num_warps, 1),
        )
    grads_tile = gate_grads_tile(num_samples, width, hidden, num_local, chip(table.device))
    gate_blocks = max(triton.cdiv(hidden, grads_tile.block_h), 1) * max(triton.cdiv(rows, grads_tile.block_p), 1)
    row_blocks = (num_samples + 1) * triton.cdiv(width, grads_tile.block_d)
    gate_programs = gate_blocks * (with_dots and needs_gate)
    table_programs = triton.cdiv(width, grads_tile.block_mix) * (num_samples > 0 and needs_table)
    row_programs = row_blocks * (with_dots and (needs_image or needs_mean))
    if gate_programs + table_programs + row_programs:
        _align_gate_grads_kernel[(gate_programs + table_programs + row_programs,)](
            image_rows.contiguous(),
            text_mean,
            grad_h,
            image_sample,
            weights,
            dots,
            pre_activation,
            grad_logits,
            grad_hidden,
            grad_dots,
            *grads,
            num_images,
            num_samples,
            rows,
            width,
            hidden,
            num_local,
            gate_programs,
            table_programs,
            MODE=mode,
            NEEDS_IMAGE=with_dots and needs_image,
            NEEDS_MEAN=with_dots and needs_mean,
            BLOCK_P=grads_tile.block_p,
            BLOCK_H=grads_tile.block_h,
            BLOCK_L=grads_tile.block_l,
            BLOCK_MIX=grads_tile.block_mix,
            BLOCK_R=grads_tile.block_r,
            BLOCK_D=grads_tile.block_d,
            **launch_options(grads_tile.num_warps, 1),
        )
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _fake_align_gate_backward(
    grad_h: Tensor,
    grad_weights: Tensor | None,
    image_rows: Tensor,
    text_mean: Tensor,
    w1: Tensor,
    w2: Tensor,
    table: Tensor,
    image_sample: Tensor,
    weights: Tensor,
    dots: Tensor,
    pre_activation: Tensor,
    mode: str,
    needs: list[bool],
) -> list[Tensor]:
    hidden, rows = w1.shape
    grads = [
        table.new_empty(image_sample.shape[0], rows, table.shape[1]),
        text_mean.new_empty(text_mean.shape),
        table.new_empty(hidden, rows),
        table.new_empty(hidden),
        table.new_empty(w2.shape),
        table.new_empty(w2.shape[0]),
        table.new_empty(table.shape),
    ]
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


class _TritonAlignGate(torch.autograd.Function):
    """Saves the weights, the dots and what enters GELU; image rows only if the text mean needs a gradient."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        image_rows, text_mean, w1, _, w2, _, table, image_sample, ctx.mode = inputs
        _, weights, dots, pre_activation = output
        constant = () if _needs_dots(ctx.mode) else (weights,)
        ctx.mark_non_differentiable(*constant, dots, pre_activation)
        ctx.set_materialize_grads(False)
        if not (_needs_dots(ctx.mode) and ctx.needs_input_grad[1]):
            image_rows = image_rows.new_empty(0, *image_rows.shape[1:])
        ctx.save_for_backward(image_rows, text_mean, w1, w2, table, image_sample, weights, dots, pre_activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_h, grad_weights = grads[:2]
        if grad_h is None:
            text_mean, table = ctx.saved_tensors[1], ctx.saved_tensors[4]
            grad_h = table.new_zeros(text_mean.shape)
        needs = list(ctx.needs_input_grad[:7])
        needed = iter(_align_gate_backward(grad_h, grad_weights, *ctx.saved_tensors, ctx.mode, needs))
        return *(next(needed) if need else None for need in needs), None, None


_align_gate_backward = register("align_gate_backward", _launch_align_gate_backward, _fake_align_gate_backward)
_align_gate = register("align_gate", _launch_align_gate, _align_gate_outputs, _TritonAlignGate)


def align_gate(
    image_rows: Tensor,  # (M, P, D), after the projector
    text_mean: Tensor,  # (S, D)
    w1: Tensor,  # (hidden, P)
    b1: Tensor,  # (hidden,)
    w2: Tensor,  # (N - 1, hidden)
    b2: Tensor,  # (N - 1,)
    table: Tensor,  # (N, D)
    *,
    image_sample: Tensor,  # (M,) int, from InjectionPlan.image_sample; -1: an unused image
    mode: Mode,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # (S, D) in image_rows' dtype, (S, N - 1) float32
    """The alignment row H of each sample, and the weights its local levels were mixed with.

    | mode       | H                                  | weights            |
    |------------|------------------------------------|--------------------|
    | "adaptive" | `α @ table[:-1] + table[-1]`       | α                  |
    | "local"    | `α @ table[:-1]`                   | α                  |
    | "global"   | `table[-1]`                        | 0                  |
    | "average"  | `mean(table[:-1]) + table[-1]`     | `1 / (N - 1)`      |

    Every argument gets a gradient in every mode, zeros where the mode does not use it or there are no samples. The
    text mean may be float32 beside 16-bit weights. Raises ValueError for shapes that do not fit (an image of 575 rows,
    a gate built for 576), dtypes that differ, an unknown mode, or a DTensor; KernelUnavailable for `impl="triton"`
    where Triton cannot run.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; align_gate needs one of {', '.join(map(repr, get_args(Mode)))}")
    check_floats("align_gate", image_rows=image_rows, w1=w1, b1=b1, w2=w2, b2=b2, table=table)
    check_floats("align_gate", text_mean=text_mean)
    check_ints("align_gate", image_sample=image_sample)
    check_shape("image_rows", image_rows, ("images", "rows", "D"))
    num_images, rows_per_image, width = image_rows.shape
    check_shape("w1", w1, ("hidden", "rows"))
    if w1.shape[1] != rows_per_image:
        raise ValueError(f"image_rows has {rows_per_image} rows per image; the gate was built for {w1.shape[1]}")
    check_shape("b1", b1, (w1.shape[0],))
    check_shape("table", table, ("levels", width))
    if table.shape[0] < 2:
        raise ValueError(f"table has {table.shape[0]} levels; align_gate needs 2 or more, the last of them global")
    check_shape("w2", w2, (table.shape[0] - 1, w1.shape[0]))
    check_shape("b2", b2, (table.shape[0] - 1,))
    check_shape("text_mean", text_mean, ("samples", width))
    check_shape("image_sample", image_sample, (num_images,))
    check_devices(
        "align_gate",
        image_rows=image_rows,
        text_mean=text_mean,
        w1=w1,
        b1=b1,
        w2=w2,
        b2=b2,
        table=table,
        image_sample=image_sample,
    )
    why_not = None
    if text_mean.dtype not in DTYPES:
        why_not = f"text_mean is {text_mean.dtype}, and the kernels take float16, bfloat16 and float32"
    if use_triton("align_gate", impl, image_rows.device, image_rows.dtype, why_not=why_not):
        h, weights, _, _ = _align_gate(image_rows, text_mean, w1, b1, w2, b2, table, image_sample, mode)
        return h, weights
    return align_gate_reference(image_rows, text_mean, w1, b1, w2, b2, table, image_sample=image_sample, mode=mode)
