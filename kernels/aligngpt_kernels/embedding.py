"""embedding_grad: the gradient of an embedding table, the same sum in every run.

    grad_weight[v] = scale * Σ grad_rows[row[t]]   over the tokens t with token_ids[t] == v

T tokens, V rows of the table, width D. `torch.nn.functional.embedding`'s own gradient needs one gradient row per token;
here several tokens may share a row (all text of a sample shares the gradient of its mean), and a token may have none.

Tokens are sorted by id, stably, and each run of equal ids is added up in order, in float32, by the program that finds
itself at the run's first token. No atomics, so the order of the sum never changes; no count is read back. It moves each
gradient row once and the table once.
"""

import torch
from torch import Tensor

from .dispatch import launch_options, tl, triton

BLOCK_T, BLOCK_D = 16, 256  # tokens of a run added at once; columns of a program


@triton.jit
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
    """The formula above by Triton. Sums in float32; nothing waits for the device."""
    num_tokens, width = token_ids.shape[0], grad_rows.shape[1]
    out = grad_rows.new_zeros(vocabulary, width, dtype=dtype)
    if num_tokens and vocabulary and width and grad_rows.shape[0]:
        ascending, order = torch.sort(token_ids, stable=True)
        grid = (num_tokens, triton.cdiv(width, BLOCK_D))
        _run_sum_kernel[grid](
            ascending,
            row[order],
            grad_rows.contiguous(),
            out,
            num_tokens,
            vocabulary,
            width,
            scale,
            BLOCK_T=BLOCK_T,
            BLOCK_D=BLOCK_D,
            **launch_options(4, 2),
        )
    return out
