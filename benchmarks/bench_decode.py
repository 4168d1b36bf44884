"""flash_decode against SDPA's back-ends, FlexAttention, xformers and flash-attn: one layer of one decoding step.

All read a bfloat16 cache in flash_decode's layout (B, heads, L, 128); flash-attn and xformers by transposed views. The
cache is full and peers get no mask, except in the cases called "ragged", whose rows are L/8 to L long.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from aligngpt_kernels import flash_decode, flash_decode_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Case, Contender, InTurns, compiled, in_cuda_graph, our_impl, simple
from benchmarks.measure import Outputs, Run
from benchmarks.shapes import HEAD_DIM, HEADS, KV_HEADS_GQA

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}

NOT_ON_A_CPU = {"SDPA cuDNN", "SDPA efficient"}


class Cache(NamedTuple):
    q: Tensor  # (B, Hq, 1, Dh)
    k: Tensor  # (B, Hkv, L, Dh)
    v: Tensor
    lengths: Tensor  # (B,) int32
    host_lengths: list[int]
    mask: Tensor | None  # (B, 1, 1, L) bool for SDPA; None: the cache is full


def make(
    batch: int, length: int, kv_heads: int, heads: int, head_dim: int, dtype: torch.dtype, ragged: bool,
    device: torch.device,
) -> Cache:  # fmt: skip
    host_lengths = lengths_of(batch, length, ragged)
    lengths = torch.tensor(host_lengths, device=device, dtype=torch.int32)
    mask = (torch.arange(length, device=device) < lengths[:, None])[:, None, None] if ragged else None
    q = torch.randn(batch, heads, 1, head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, length, head_dim, device=device, dtype=dtype) for _ in range(2))
    return Cache(q, k, v, lengths, host_lengths, mask)


def lengths_of(batch: int, length: int, ragged: bool) -> list[int]:
    """From an eighth of the length to all of it."""
    if not ragged:
        return [length] * batch
    return [length - (length - length // 8) * row // max(batch - 1, 1) for row in range(batch)]


def ours(c: Cache) -> Outputs:
    return [flash_decode(c.q, c.k, c.v, c.lengths, impl=our_impl(c.q))]


def reference(c: Cache) -> Outputs:
    return [flash_decode_reference(c.q, c.k, c.v, c.lengths)]


def sdpa(c: Cache, backend: SDPBackend) -> Outputs:
    with sdpa_kernel(backend):
        grouped = c.q.shape[1] != c.k.shape[1]
        return [F.scaled_dot_product_attention(c.q, c.k, c.v, attn_mask=c.mask, enable_gqa=grouped)]


def flex_attention() -> Contender:
    def prepare(c: Cache) -> Run:
        from torch.nn.attention import flex_attention as flex

        block_mask = None
        if c.mask is not None:
            lengths = c.lengths

            def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
                return kv < lengths[b]

            block_mask = flex.create_block_mask(visible, c.q.shape[0], None, 1, c.k.shape[2], device=c.q.device)
        grouped = c.q.shape[1] != c.k.shape[1]
        return lambda: [compiled(flex.flex_attention)(c.q, c.k, c.v, block_mask=block_mask, enable_gqa=grouped)]

    return Contender(prepare, gpu_only=True)


def flash_attn(c: Cache, version: int) -> Outputs:
    if version == 2:
        from flash_attn import flash_attn_with_kvcache
    else:
        from flash_attn_interface import flash_attn_with_kvcache
    q, k, v = (t.transpose(1, 2) for t in (c.q, c.k, c.v))
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=c.lengths)
    return [(out[0] if isinstance(out, tuple) else out).transpose(1, 2)]


def xformers(c: Cache) -> Outputs:
    from xformers.ops import fmha

    batch, kv_heads, length, head_dim = c.k.shape
    group = c.q.shape[1] // kv_heads
    q = c.q.view(batch, 1, kv_heads, group, head_dim)
    k, v = (t.transpose(1, 2)[:, :, :, None].expand(batch, length, kv_heads, group, head_dim) for t in (c.k, c.v))
    if group == 1:
        q, k, v = q[:, :, :, 0], k[:, :, :, 0], v[:, :, :, 0]
    out = fmha.memory_efficient_attention_forward(q, k, v, op=fmha.triton_splitk.FwOp)
    return [out.reshape(c.q.shape)]


def row_by_row(c: Cache, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Outputs:
    """`attend(q, k, v)` of each row's own keys, (heads, 1, Dh) and (heads, length, Dh): a whole cache need not fit."""
    group = c.q.shape[1] // c.k.shape[1]
    rows = []
    for q, k, v, length in zip(c.q, c.k, c.v, c.host_lengths, strict=True):
        keys, values = (t[:, :length].repeat_interleave(group, 0) for t in (k, v))
        rows.append(attend(q, keys, values))
    return [torch.stack(rows)]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(1, 2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def in_double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q.double(), k.double(), v.double())


def case(
    batch: int,
    length: int,
    kv_heads: int,
    *,
    ragged: bool = False,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    keys = sum(lengths_of(batch, length, ragged))
    contenders: dict[str, Contender] = {
        "ours": simple(ours),
        "ours, in a CUDA graph": in_cuda_graph(simple(ours)),
        "reference": simple(reference),
        **{
            name: simple(partial(sdpa, backend=backend), gpu_only=name in NOT_ON_A_CPU)
            for name, backend in BACKENDS.items()
        },
        "FlexAttention": flex_attention(),
        "flash-attn 2": simple(partial(flash_attn, version=2), gpu_only=True),
        "flash-attn 3": simple(partial(flash_attn, version=3), gpu_only=True),
        "xformers split-K": simple(xformers, gpu_only=True),
    }
    absent = {}
    if ragged:
        absent = {"SDPA flash": "it takes no mask", "xformers split-K": "only compared on full caches"}
        contenders = {name: contender for name, contender in contenders.items() if name not in absent}
    kind = "MHA" if kv_heads == heads else "GQA"
    return Case(
        name=f"decode {kind} {heads}/{kv_heads}×{head_dim} B={batch} L={length}{' ragged' if ragged else ''}",
        make=partial(make, batch, length, kv_heads, heads, head_dim, dtype, ragged),
        contenders=contenders,
        exact=lambda c: row_by_row(c, in_double),
        plain=lambda c: row_by_row(c, plain),
        bytes=2 * (keys * kv_heads + batch * heads) * head_dim * dtype.itemsize,
        flops=4 * keys * heads * head_dim,
        stage="decode step",
        items=batch,
        unit="tokens of a layer",
        group="decode",
        dispatch=("flash_decode", "ours", ("reference",)),  # what "auto" falls back to; peers are for the report
        host=True,
        memory=True,
        input_bytes=2 * batch * length * kv_heads * head_dim * dtype.itemsize,
        absent=absent,
    )


def cases() -> list[Case]:
    found = []
    for kv_heads in (HEADS, KV_HEADS_GQA):
        found.append(case(16, 8192, kv_heads, ragged=True))
        found += [case(b, length, kv_heads) for b in (1, 4, 16, 64) for length in (704, 2048, 8192, 32768)]
    return found


def cpu_cases() -> list[Case]:
    here = partial(case, 4, heads=16, dtype=torch.float32)
    return [*(here(length, heads) for length in (704, 2048) for heads in (16, 4)), here(2048, 16, ragged=True)]


def small_cases() -> list[Case]:
    small = partial(case, 3, 100, heads=4, head_dim=64, dtype=torch.float32)
    return [small(4), small(2, ragged=True)]


def test_decode(in_turns: InTurns, case: Case) -> None:
    in_turns(case)
