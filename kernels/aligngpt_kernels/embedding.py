"""text_mean, the mean text embedding of each sample, and the gradient of an embedding table.

    t̄           = embed_scale * Σ embed_weight[id] / (count + 1e-8)     over a sample's chosen tokens, (S, D)
    grad_weight[v] = scale * Σ grad_rows[row[t]]   over the tokens t with token_ids[t] == v, (V, D)

S samples (sequences with an image), T tokens, V rows of the table, width D. Sums run in float32 (float64 for float64
inputs). Source of t̄: arXiv 2405.14129, section 3.

The gradient of `torch.nn.functional.embedding` needs one gradient row per token; here several tokens may share a row
(all text of a sample shares the gradient of its mean), and a token may have none. Tokens are sorted by id, stably, and
each run of equal ids is added up in order, by the program that finds itself at the run's first token. No atomics, so
the order of the sum never changes; no count is read back. It moves each gradient row once and the table once.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import (
    Chip,
    Impl,
    check_devices,
    check_floats,
    check_ints,
    check_plain,
    check_shape,
    chip,
    launch_options,
    register,
    sum_dtype,
    tl,
    triton,
    use_triton,
)
from .plan import InjectionPlan, check_plan, non_image_positions

RUN_T, RUN_D = 16, 256  # tokens of a run added at once; columns of a program


@triton.jit(do_not_specialize=["num_tokens"])
def _run_sum_kernel(
    p_sorted,  # (T,) ids in ascending order, V for tokens that have no gradient
    p_row,  # (T,) int64, row of grad_rows of each sorted token
    p_grad,  # (rows, D)
    p_out,  # (V, D), zeros
    num_tokens,
    vocabulary,
    width,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    key = tl.load(p_sorted + i_t)
    before = tl.load(p_sorted + tl.maximum(i_t - 1, 0))
    first = (i_t == 0) | (before != key)
    if first & (key >= 0) & (key < vocabulary):
        b_sum = tl.zeros((BLOCK_D,), tl.float32)
        start = i_t
        in_run = BLOCK_T
        while in_run == BLOCK_T:
            o_t = start + tl.arange(0, BLOCK_T)
            # (BLOCK_T,)
            m_t = (o_t < num_tokens) & (tl.load(p_sorted + o_t, mask=o_t < num_tokens, other=-1) == key)
            b_row = tl.load(p_row + o_t, mask=m_t, other=0)
            # (BLOCK_T, BLOCK_D)
            b_grad = tl.load(p_grad + b_row[:, None] * width + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0)
            b_sum += tl.sum(b_grad.to(tl.float32), 0)
            in_run = tl.sum(m_t.to(tl.int32), 0)
            start += BLOCK_T
        tl.store(p_out + key.to(tl.int64) * width + o_d, (b_sum * scale).to(p_out.dtype.element_ty), mask=m_d)


def embedding_grad(
    grad_rows: Tensor,  # (rows, D)
    row: Tensor,  # (T,) int64, row of grad_rows that each token's gradient is
    token_ids: Tensor,  # (T,) int; outside 0..V-1: the token has no gradient
    vocabulary: int,
    dtype: torch.dtype,
    scale: float = 1.0,
) -> Tensor:  # (V, D)
    """`grad_weight` by Triton. Sums in float32; nothing waits for the device."""
    num_tokens, width = token_ids.shape[0], grad_rows.shape[1]
    out = grad_rows.new_zeros(vocabulary, width, dtype=dtype)
    if num_tokens and vocabulary and width and grad_rows.shape[0]:
        ascending, order = torch.sort(token_ids, stable=True)
        grid = (num_tokens, triton.cdiv(width, RUN_D))
        _run_sum_kernel[grid](
            ascending,
            row[order],
            grad_rows.contiguous(),
            out,
            num_tokens,
            vocabulary,
            width,
            scale,
            BLOCK_T=RUN_T,
            BLOCK_D=RUN_D,
            **launch_options(4, 2),
        )
    return out


def text_mean_reference(
    token_ids: Tensor, embed_weight: Tensor, gate_mask: Tensor | None, plan: InjectionPlan, *, embed_scale: float = 1.0
) -> Tensor:
    """t̄ as a product with a (samples, tokens) membership matrix: unlike `index_add`, the same sum in every run."""
    dtype = sum_dtype(embed_weight)
    sample = plan.token_sample
    chosen = _chosen_tokens(gate_mask, plan.source, sample)
    at = non_image_positions(plan)
    samples = torch.arange(plan.align_place.shape[0], device=sample.device)
    member = ((sample[at] == samples[:, None]) & chosen[at]).to(dtype)  # (S, tokens)
    ids = torch.where(chosen, token_ids.flatten(), 0)[at]
    total = member @ F.embedding(ids, embed_weight).to(dtype)
    return total * embed_scale / (member.sum(1, keepdim=True) + 1e-8)


def _chosen_tokens(gate_mask: Tensor | None, source: Tensor, sample: Tensor) -> Tensor:  # (T,) bool
    """The tokens that enter the mean of their sample."""
    if gate_mask is not None:
        return (source == -1) & gate_mask.flatten()
    starts = torch.ones_like(sample, dtype=torch.bool)  # neighbours of different samples are different sequences
    starts[1:] = sample[1:] != sample[:-1]
    return (source == -1) & ~starts


class TextMeanTile(NamedTuple):
    """Layout of one program: `block_d` columns of a sample's mean."""

    block_scan: int  # tokens looked at together while the sample is searched for
    block_t: int  # tokens whose rows are added together
    block_d: int
    num_warps: int


def text_mean_tile(width: int, num_samples: int, chip: Chip) -> TextMeanTile:
    """4096 elements at a time, 16 a thread: four programs fit on a multiprocessor. Narrower for few samples.

    Nothing depends on the number of tokens, which differs from batch to batch.
    """
    block_d = min(triton.next_power_of_2(max(width, 1)), 128)
    while block_d > 64 and num_samples * triton.cdiv(width, block_d) < chip.multiprocessors:
        block_d //= 2
    return TextMeanTile(2048, min(4096 // block_d, 256), block_d, num_warps=8)


@triton.jit
def _text_at(p_ids, p_source, p_sample, p_gate_mask, i_s, o_t, num_tokens, MASKED: tl.constexpr):
    """(BLOCK_T,) ids, and which of them sample i_s chooses, as `_chosen_tokens`. No load waits for another."""
    m_t = o_t < num_tokens
    b_sample = tl.load(p_sample + o_t, mask=m_t, other=-1)
    m_chosen = (b_sample == i_s) & (tl.load(p_source + o_t, mask=m_t, other=0) == -1)
    if MASKED:
        m_chosen = m_chosen & (tl.load(p_gate_mask + o_t, mask=m_t, other=0) != 0)
    else:
        m_chosen = m_chosen & (tl.load(p_sample + o_t - 1, mask=m_t & (o_t > 0), other=-1) == b_sample)
    return tl.load(p_ids + o_t, mask=m_t, other=0).to(tl.int64), m_chosen


@triton.jit(do_not_specialize=["num_tokens"])
def _text_mean_kernel(
    p_ids,  # (T,)
    p_embed,  # (V, D)
    p_source,  # (T,)
    p_sample,  # (T,)
    p_gate_mask,  # (T,) bytes
    p_mean,  # (S, D)
    p_count,  # (S,)
    num_tokens,
    vocabulary,
    width,
    embed_scale,
    MASKED: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_s = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    # A sample's tokens are neighbours: their first and their last place. One reduction, after the scan.
    b_first = tl.zeros((BLOCK_SCAN,), tl.int32) + num_tokens
    b_end = tl.zeros((BLOCK_SCAN,), tl.int32)
    for start in range(0, num_tokens, BLOCK_SCAN):
        o_t = start + tl.arange(0, BLOCK_SCAN)
        # (BLOCK_SCAN,)
        m_mine = tl.load(p_sample + o_t, mask=o_t < num_tokens, other=-1) == i_s
        b_first = tl.minimum(b_first, tl.where(m_mine, o_t, num_tokens))
        b_end = tl.maximum(b_end, tl.where(m_mine, o_t + 1, 0))
    first = tl.min(b_first, 0)
    end = tl.max(b_end, 0)

    b_sum = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    b_count = tl.zeros((BLOCK_T,), tl.int32)
    b_outside = tl.zeros((BLOCK_T,), tl.int32)
    b_ids, m_chosen = _text_at(
        p_ids, p_source, p_sample, p_gate_mask, i_s, first + tl.arange(0, BLOCK_T), num_tokens, MASKED
    )
    for start in range(first, end, BLOCK_T):
        m_inside = m_chosen & (b_ids >= 0) & (b_ids < vocabulary)
        # (BLOCK_T, BLOCK_D); nothing is read for image tokens
        b_rows = tl.load(
            p_embed + b_ids[:, None] * width + o_d[None, :], mask=m_inside[:, None] & m_d[None, :], other=0
        )
        b_count += m_chosen.to(tl.int32)
        b_outside += (m_chosen & (m_inside == 0)).to(tl.int32)
        # The next ids are on their way while these rows are.
        o_next = start + BLOCK_T + tl.arange(0, BLOCK_T)
        b_ids, m_chosen = _text_at(p_ids, p_source, p_sample, p_gate_mask, i_s, o_next, num_tokens, MASKED)
        b_sum += b_rows.to(tl.float32)
    count = tl.sum(b_count, 0)
    b_mean = tl.div_rn(tl.sum(b_sum, 0) * embed_scale, tl.zeros((BLOCK_D,), tl.float32) + (count + 1e-8))
    b_mean = tl.where(tl.sum(b_outside, 0) > 0, float("nan"), b_mean)
    tl.store(p_mean + i_s.to(tl.int64) * width + o_d, b_mean, mask=m_d)
    if tl.program_id(1) == 0:
        tl.store(p_count + i_s, count)


def _launch_text_mean(
    ids: Tensor,
    embed_weight: Tensor,
    gate_mask: Tensor | None,
    source: Tensor,
    sample: Tensor,
    num_samples: int,
    embed_scale: float,
) -> tuple[Tensor, Tensor]:  # (S, D) float32, (S,) int32: how many tokens each sample chose
    num_tokens, width = ids.shape[0], embed_weight.shape[1]
    mean = embed_weight.new_empty(num_samples, width, dtype=torch.float32)
    count = source.new_empty(num_samples, dtype=torch.int32)
    if num_samples:
        tile = text_mean_tile(width, num_samples, chip(ids.device))
        source, sample = source.contiguous(), sample.contiguous()
        _text_mean_kernel[num_samples, max(triton.cdiv(width, tile.block_d), 1)](
            ids.contiguous(),
            embed_weight.contiguous(),
            source,
            sample,
            source if gate_mask is None else gate_mask.contiguous().view(torch.uint8),
            mean,
            count,
            num_tokens,
            embed_weight.shape[0],
            width,
            embed_scale,
            MASKED=gate_mask is not None,
            BLOCK_SCAN=tile.block_scan,
            BLOCK_T=tile.block_t,
            BLOCK_D=tile.block_d,
            **launch_options(tile.num_warps, 1),
        )
    return mean, count


def _launch_text_mean_backward(
    grad: Tensor,
    ids: Tensor,
    gate_mask: Tensor | None,
    source: Tensor,
    sample: Tensor,
    count: Tensor,
    embed_scale: float,
    vocabulary: int,
    dtype: torch.dtype,
) -> Tensor:  # (V, D)
    """Every chosen token's gradient is its sample's, divided by the count: (S, D) numbers, whatever the tokens."""
    chosen = _chosen_tokens(gate_mask, source, sample) & (sample >= 0) & (sample < grad.shape[0])
    share = grad.float() * (embed_scale / (count[:, None] + 1e-8))
    text_ids = torch.where(chosen, ids, vocabulary)
    return embedding_grad(share, torch.where(chosen, sample, 0).long(), text_ids, vocabulary, dtype)


def _fake_text_mean(
    ids: Tensor,
    embed_weight: Tensor,
    gate_mask: Tensor | None,
    source: Tensor,
    sample: Tensor,
    num_samples: int,
    embed_scale: float,
) -> tuple[Tensor, Tensor]:
    mean = embed_weight.new_empty(num_samples, embed_weight.shape[1], dtype=torch.float32)
    return mean, source.new_empty(num_samples, dtype=torch.int32)


def _fake_text_mean_backward(
    grad: Tensor,
    ids: Tensor,
    gate_mask: Tensor | None,
    source: Tensor,
    sample: Tensor,
    count: Tensor,
    embed_scale: float,
    vocabulary: int,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty(vocabulary, grad.shape[1], dtype=dtype)


class _TritonTextMean(torch.autograd.Function):
    """Saves indices and counts alone."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ids, embed_weight, gate_mask, source, sample, _, ctx.embed_scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(ids, gate_mask, source, sample, output[1])
        ctx.vocabulary, ctx.dtype = embed_weight.shape[0], embed_weight.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_embed = None
        if ctx.needs_input_grad[1]:
            grad_embed = _text_mean_backward(grads[0], *ctx.saved_tensors, ctx.embed_scale, ctx.vocabulary, ctx.dtype)
        return None, grad_embed, None, None, None, None, None


_text_mean_backward = register("text_mean_backward", _launch_text_mean_backward, _fake_text_mean_backward)
_text_mean = register("text_mean", _launch_text_mean, _fake_text_mean, _TritonTextMean)


def text_mean(
    token_ids: Tensor,  # (B, L) or (T,), the ids the plan was made from
    embed_weight: Tensor,  # (V, D)
    gate_mask: Tensor | None,  # bool, shape of the ids; None: all text but the first token of each sequence
    plan: InjectionPlan,
    *,
    embed_scale: float = 1.0,  # what the embedding module multiplies its rows by
    impl: Impl = "auto",
) -> Tensor:  # (S, D) float32
    """Mean text embedding of each sample, `embed_scale * Σ embed_weight[id] / (count + 1e-8)`; 0 without text.

    Image and align tokens never enter, whatever the mask says, and their ids are never read. Padding enters unless
    `gate_mask` leaves it out. A chosen id outside the table makes its sample's mean NaN on Triton, and is an error of
    the reference. The gradient goes to `embed_weight`, zeros where there are no samples. Raises ValueError for shapes
    that differ from the plan's, a mask that is not bool, or a DTensor; KernelUnavailable for `impl="triton"` where
    Triton cannot run.
    """
    check_ints("text_mean", token_ids=token_ids)
    check_floats("text_mean", embed_weight=embed_weight)
    check_shape("embed_weight", embed_weight, ("V", "D"))
    check_plan("text_mean", token_ids, plan)
    if gate_mask is not None:
        check_plain("text_mean", gate_mask=gate_mask)
        check_shape("gate_mask", gate_mask, token_ids.shape)
        if gate_mask.dtype != torch.bool:
            raise ValueError(f"gate_mask is {gate_mask.dtype}; text_mean needs torch.bool")
    mask = {} if gate_mask is None else {"gate_mask": gate_mask}
    check_devices("text_mean", token_ids=token_ids, embed_weight=embed_weight, **mask)
    if use_triton("text_mean", impl, embed_weight.device, embed_weight.dtype):
        flat_mask = None if gate_mask is None else gate_mask.flatten()
        num_samples = plan.align_place.shape[0]
        mean, _ = _text_mean(
            token_ids.flatten(),
            embed_weight,
            flat_mask,
            plan.source,
            plan.token_sample,
            num_samples,
            float(embed_scale),
        )
        return mean
    return text_mean_reference(token_ids, embed_weight, gate_mask, plan, embed_scale=embed_scale)
