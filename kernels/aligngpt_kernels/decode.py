"""flash_decode: attention of one new token per row to that row's part of a key-value cache.

    out[b, h] = Σ_j softmax_j(scale ⟨q[b, h], k[b, h // G, j]⟩) v[b, h // G, j],   starts[b] <= j < lengths[b]

G = Hq / Hkv query heads share a key head (G = 1: multi-head attention; grouped-query attention: arXiv 2305.13245).
"""

import math

import torch
from torch import Tensor

from .dispatch import Impl, check_floats, check_ints, check_shape, sum_dtype, use_triton


def flash_decode_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, starts: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The formula above in plain PyTorch; arguments as `flash_decode`."""
    dtype = sum_dtype(q)
    batch, q_heads, _, head_dim = q.shape
    kv_heads, max_length = k.shape[1:3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    position = torch.arange(max_length, device=q.device)
    visible = position < lengths[:, None]
    if starts is not None:
        visible = visible & (position >= starts[:, None])
    visible = visible[:, None, None]  # (B, 1, 1, Lmax)

    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads, head_dim).to(dtype)
    scores = (grouped @ k.to(dtype).transpose(2, 3)) * scale
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)  # finite, so that a row without keys has no NaN
    weights = scores.softmax(-1).masked_fill(~visible, 0)
    values = v.to(dtype).masked_fill(~visible.transpose(2, 3), 0)  # unwritten cache may hold NaN, and 0 * NaN is NaN
    return (weights @ values).to(q.dtype).reshape(q.shape)


def flash_decode(
    q: Tensor,  # (B, Hq, 1, Dh)
    k: Tensor,  # (B, Hkv, Lmax, Dh)
    v: Tensor,  # (B, Hkv, Lmax, Dh)
    lengths: Tensor,  # (B,) int, keys in use, the new token's included
    *,
    starts: Tensor | None = None,  # (B,) int, first visible key (left padding); None: 0
    scale: float | None = None,  # None: 1 / sqrt(Dh)
    impl: Impl = "auto",
) -> Tensor:  # (B, Hq, 1, Dh), dtype of q
    """Attend from one query per row to keys `starts[b] <= j < lengths[b]` of its cache, softmax in float32.

    A row that sees no key gets zeros; what lies outside the visible keys is never used, NaN included. Raises
    ValueError for shapes or dtypes that differ, Hq that is no multiple of Hkv, or a DTensor; KernelUnavailable for
    `impl="triton"` where Triton cannot run.
    """
    check_floats("flash_decode", q=q, k=k, v=v)
    check_ints("flash_decode", lengths=lengths)
    check_shape("q", q, ("B", "Hq", 1, "Dh"))
    check_shape("k", k, (q.shape[0], "Hkv", "Lmax", q.shape[3]))
    check_shape("v", v, k.shape)
    check_shape("lengths", lengths, (q.shape[0],))
    if starts is not None:
        check_ints("flash_decode", starts=starts)
        check_shape("starts", starts, (q.shape[0],))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads; it needs a multiple of the {k.shape[1]} heads of k")
    use_triton("flash_decode", impl, q.device)
    return flash_decode_reference(q, k, v, lengths, starts=starts, scale=scale)
