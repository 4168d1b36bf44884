"""flash_decode: attention of one new token per row to that row's part of a key-value cache.

    out[b, h] = Σ_j softmax_j(scale ⟨q[b, h], k[b, h // G, j]⟩) v[b, h // G, j],   starts[b] <= j < lengths[b]

G = Hq / Hkv query heads share a key head (G = 1: multi-head attention; grouped-query attention: arXiv 2305.13245).

Each key and value is read once and used for a handful of multiplications, so the op is as fast as the cache streams in,
and it streams at full speed only if every multiprocessor takes part. One program a row and key head leaves most of them
idle at small batches, so a row's keys are divided over several programs ("split-KV"). Each keeps a softmax of its own
part; the last of a row to arrive puts the parts together, in one launch, in an order that does not depend on who is
last. The number of programs follows from the shapes alone, so a CUDA graph may be replayed while the rows grow.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import (
    Chip,
    Impl,
    check_devices,
    check_floats,
    check_ints,
    check_shape,
    chip,
    launch_options,
    register,
    sum_dtype,
    tl,
    triton,
    use_triton,
)


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


def _decode_on_host(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None, scale: float | None
) -> Tensor:
    """The same on a CPU by PyTorch's attention, which reads no key that no row sees.

    All rows go together, with a mask. Where something that is not finite came out, it may have come from behind the
    mask, where a product with a weight of 0 is no 0: then each row goes alone, with its visible keys.
    """
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    max_length = k.shape[2]
    ends = [min(max(end, 0), max_length) for end in lengths.tolist()]
    begins = [0] * len(ends) if starts is None else [min(max(start, 0), max_length) for start in starts.tolist()]
    seen = list(zip(begins, ends, strict=True))
    if all(begin < end for begin, end in seen) and len(seen) > 1:
        first, last = min(begins), max(ends)
        mask = None
        if seen != [(first, last)] * len(seen):
            place = torch.arange(first, last)
            mask = (place < torch.tensor(ends)[:, None]) & (place >= torch.tensor(begins)[:, None])
            mask = mask[:, None, None]
        out = attend(q, k[:, :, first:last], v[:, :, first:last], mask)
        if mask is None or out.isfinite().all():
            return out
    out = torch.zeros_like(q)
    for row, (begin, end) in enumerate(seen):
        if begin < end:
            keys = slice(row, row + 1), slice(None), slice(begin, end)
            out[row] = attend(q[row : row + 1], k[keys], v[keys])[0]
    return out


MAX_HEAD_DIM = 256  # that the kernel takes


class DecodeTile(NamedTuple):
    """Layout of one program: `heads` query heads of one key head, `block_n` keys at a time."""

    dot: bool  # tensor cores; else multiplications in float32, one query head a program
    heads: int
    head_groups: int  # programs that share a key head because its query heads do not fit one
    block_h: int  # `heads`, padded
    block_d: int  # the head dim, padded
    block_n: int
    block_s: int  # partial results on their way at a time
    num_stages: int
    num_warps: int
    programs_per_multiprocessor: int


THREADS, REGISTERS = 512, 128  # of a multiprocessor, and of a thread if so many run


@functools.cache
def decode_tile(heads_per_kv: int, head_dim: int, element_bytes: int, chip: Chip) -> DecodeTile:
    """16 KiB of keys and values a block, one or two blocks on their way, four programs a multiprocessor: 64 KiB or more
    in flight, where a latency of a microsecond at an H100's bandwidth asks for 25.

    A key that one query head uses, or in float32, is multiplied without tensor cores: they would be fed 15 rows of
    padding, and the other units have time to spare. 32 query heads a program at most, for the sake of registers.
    """
    dot = heads_per_kv > 1 and element_bytes == 2
    head_groups = triton.cdiv(heads_per_kv, 32) if dot else heads_per_kv
    heads = triton.cdiv(heads_per_kv, head_groups)
    block_h = max(16, triton.next_power_of_2(heads)) if dot else 1
    block_d = max(16, triton.next_power_of_2(head_dim))
    num_stages, num_warps = 3, 8 if block_h * block_d > 4096 else 4
    # A dot sums over 16 keys at least; 8 warps take twice the block. Narrow heads, whose numbers are not moved 16 bytes
    # at a time, and many heads need more registers a key.
    block_n = max(8192 // (block_d * element_bytes), 4 * num_warps if dot else 8)
    block_n = min(block_n, 64, 2 * block_d, 1024 // block_h)
    # 64 registers of a thread's 128 for them, and no more than was tried.
    block_s = min(max(64 * 32 * num_warps // (triton.next_power_of_2(heads) * block_d), 1), 8)
    in_flight = (num_stages - 1) * 2 * block_n * block_d * element_bytes
    scratch = block_h * (block_d + block_n) * element_bytes  # queries and weights, on their way to the tensor cores
    programs = max(min(chip.shared_bytes // (in_flight + scratch + 1024), THREADS // (32 * num_warps)), 1)
    return DecodeTile(dot, heads, head_groups, block_h, block_d, block_n, block_s, num_stages, num_warps, programs)


# In bytes that a program's share of the bandwidth moves meanwhile, 8 KiB a microsecond on an H200. Fitted to 24 shapes
# there, each in up to 20 ways to split it: MHA and GQA, 1 to 64 rows of 704 to 32768 keys, bfloat16.
START_BYTES = 10240  # until a program has its first keys
SPLIT_BYTES = 2048  # until the last program of a row knows that it is
BATCH_BYTES, SINGLE_BYTES = 16384, 4096  # `at_once` partial results together; one of the rest, which are read in turn
# Times its share of the bandwidth, what a program draws where few others run: from the start; after whole waves.
ALONE, TAIL = 3.6, 2.3


def split_cost(
    splits: int, rows: int, num_blocks: int, block_bytes: int, partial_bytes: int, at_once: int, slots: int
) -> float:
    """Bytes that a program's share of the bandwidth could move meanwhile: the model that `split_count` minimises.

    `slots` programs run at a time. A wave of them takes as long as the blocks of one, its start, and its partial result
    written and read; after the last wave one program reads the partial results of a row.
    """
    blocks = -(-max(num_blocks, 1) // splits)
    splits = -(-max(num_blocks, 1) // blocks)
    split = splits > 1
    waves, rest = divmod(rows * splits, slots)
    last = math.hypot(rest / slots, 1 / (TAIL if waves else ALONE)) if rest else 0
    combine = SPLIT_BYTES + splits // at_once * BATCH_BYTES + splits % at_once * SINGLE_BYTES
    return (waves + last) * (blocks * block_bytes + START_BYTES + 2 * partial_bytes * split) + combine * split


@functools.cache
def split_count(rows: int, num_blocks: int, block_bytes: int, partial_bytes: int, at_once: int, slots: int) -> int:
    """How many programs share the `num_blocks` blocks of a row; `rows` counts programs without splitting.

    The cheapest count by `split_cost`, and no threshold on the batch: a batch just above what fills the chip is split
    too, so that no second wave runs nearly empty. Up to 8 where that costs next to nothing: rows differ in length, and
    the longest should not be left to one program.
    """
    longest = max(num_blocks, 1)
    first_wave = -(-rows // slots)
    whole_waves = {wave * slots // rows for wave in range(first_wave, first_wave + 16)}
    parts_of_a_wave = {max(slots // (rows * part), 1) for part in range(1, 9)}
    counts = sorted({min(count, longest) for count in {*range(1, 65), *whole_waves, *parts_of_a_wave}})
    cost = {count: split_cost(count, rows, num_blocks, block_bytes, partial_bytes, at_once, slots) for count in counts}
    cheapest = min(counts, key=lambda count: cost[count])
    return max(count for count in counts if count <= max(cheapest, 8) and cost[count] <= 1.02 * cost[cheapest])


@triton.jit
def _add_keys_one_head(
    b_q,  # (BLOCK_D,) float32, times scale and log2(e)
    b_k,  # (BLOCK_N, BLOCK_D)
    b_v,  # (BLOCK_N, BLOCK_D)
    m_n,  # (BLOCK_N,)
    b_max,  # (BLOCK_N,) of the scores so far: each place in the block has a softmax of its own
    b_sum,  # (BLOCK_N,) of the weights, relative to the maximum
    b_acc,  # (BLOCK_N, BLOCK_D) of the values times weights
):
    # No thread waits for another warp's: places are put together after the last block.
    b_score = tl.where(m_n, tl.sum(b_k.to(tl.float32) * b_q[None, :], 1), float("-inf"))
    b_new = tl.maximum(b_max, b_score)
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_weight = tl.exp2(b_score - b_base)
    b_fade = tl.exp2(b_max - b_base)
    b_acc = b_acc * b_fade[:, None] + b_weight[:, None] * b_v.to(tl.float32)
    return b_new, b_sum * b_fade + b_weight, b_acc


@triton.jit
def _add_keys(
    b_q,  # (BLOCK_H, BLOCK_D)
    b_k,  # (BLOCK_N, BLOCK_D)
    b_v,  # (BLOCK_N, BLOCK_D)
    m_n,  # (BLOCK_N,)
    b_max,  # (BLOCK_H,)
    b_sum,  # (BLOCK_H, BLOCK_N), added up after the last block
    b_acc,  # (BLOCK_H, BLOCK_D)
    scale_log2,
):
    b_score = tl.where(m_n[None, :], tl.dot(b_q, tl.trans(b_k)) * scale_log2, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_score, 1))
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_weight = tl.exp2(b_score - b_base[:, None])
    b_fade = tl.exp2(b_max - b_base)
    b_acc = tl.dot(b_weight.to(b_v.dtype), b_v, b_acc * b_fade[:, None])
    return b_new, b_sum * b_fade[:, None] + b_weight, b_acc


@triton.jit
def _combine(
    p_acc,  # (splits, heads, HEAD_DIM) float32, this row's
    p_max_sum,  # (splits, heads, 2) float32
    splits,  # that hold keys
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,  # HEADS, padded
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # The sum of weights (BLOCK_G,) and of values times weights (BLOCK_G, BLOCK_D) over all splits, in their order.
    # Other multiprocessors wrote what is read: the atomic that acquired it dropped what the L1 cache held, and `.cg`
    # loads pass by that cache. The row's maximum comes first, so that no sum waits for another's: a tile of several
    # splits at once, or a running maximum, costs barriers for each tile and took twice as long.
    o_h = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    m_h = o_h < HEADS
    m_acc = m_h[:, None] & (o_d < HEAD_DIM)[None, :]
    b_max = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    for i_s in tl.range(0, splits, loop_unroll_factor=BLOCK_S):
        p_part = p_max_sum + (i_s * HEADS + o_h) * 2
        b_max = tl.maximum(b_max, tl.load(p_part, mask=m_h, other=float("-inf"), cache_modifier=".cg"))
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros((BLOCK_G,), tl.float32)
    b_acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for i_s in tl.range(0, splits, loop_unroll_factor=BLOCK_S):
        p_part = p_max_sum + (i_s * HEADS + o_h) * 2
        b_weight = tl.exp2(tl.load(p_part, mask=m_h, other=float("-inf"), cache_modifier=".cg") - b_base)
        b_sum += b_weight * tl.load(p_part + 1, mask=m_h, other=0.0, cache_modifier=".cg")
        o_acc = (i_s * HEADS + o_h)[:, None] * HEAD_DIM + o_d[None, :]
        b_acc += b_weight[:, None] * tl.load(p_acc + o_acc, mask=m_acc, other=0.0, cache_modifier=".cg")
    return b_sum, b_acc


@triton.jit
def _decode_kernel(
    p_q,  # (B, Hq, Dh)
    p_k,  # (B, Hkv, Lmax, Dh)
    p_v,  # (B, Hkv, Lmax, Dh)
    p_lengths,  # (B,)
    p_starts,  # (B,)
    p_out,  # (B, Hq, Dh)
    p_partial,  # (B, Hkv * GROUPS, splits, HEADS, Dh) accumulators, then (…, HEADS, 2) maxima and sums; float32
    p_counter,  # (B, Hkv * GROUPS) int32, zeros before and after
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    max_length,
    scale_log2,  # scale times log2(e)
    HAS_STARTS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_split = tl.program_id(0)
    i_kv = tl.program_id(1) // GROUPS
    i_group = tl.program_id(1) % GROUPS
    i_b = tl.program_id(2).to(tl.int64)
    i_row = i_b * tl.num_programs(1) + tl.program_id(1)
    splits = tl.num_programs(0)

    # The row's keys in whole blocks, as many to each split as it takes; splits that get none leave.
    end = tl.minimum(tl.maximum(tl.load(p_lengths + i_b).to(tl.int64), 0), max_length)
    start = tl.full((), 0, tl.int64)
    if HAS_STARTS:
        start = tl.maximum(tl.load(p_starts + i_b).to(tl.int64), 0)
    num_keys = tl.maximum(end - start, 0)
    num_blocks = tl.cdiv(num_keys, BLOCK_N).to(tl.int32)
    blocks = tl.cdiv(num_blocks, splits)
    active = tl.maximum(tl.cdiv(num_blocks, tl.maximum(blocks, 1)), 1)  # a row without keys: one that writes zeros
    if i_split >= active:
        return

    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_h = tl.arange(0, BLOCK_H)
    m_d = o_d < HEAD_DIM
    first_head = i_kv * HEADS_PER_KV + i_group * HEADS
    m_h = (o_h < HEADS) & (i_group * HEADS + o_h < HEADS_PER_KV)
    p_q += i_b * stride_qb
    if DOT:
        # (BLOCK_H, BLOCK_D)
        o_q = (first_head + o_h).to(tl.int64)[:, None] * stride_qh + o_d[None, :]
        b_q = tl.load(p_q + o_q, mask=m_h[:, None] & m_d[None, :], other=0)
        b_max = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
        b_acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    else:
        # (BLOCK_D,)
        b_q = tl.load(p_q + first_head.to(tl.int64) * stride_qh + o_d, mask=m_d, other=0).to(tl.float32) * scale_log2
        b_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_N,), tl.float32)
        b_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    p_k += i_b * stride_kb + i_kv.to(tl.int64) * stride_kh + start * stride_kn
    p_v += i_b * stride_vb + i_kv.to(tl.int64) * stride_vh + start * stride_vn
    o_k = o_n.to(tl.int64)[:, None] * stride_kn + o_d[None, :]
    o_v = o_n.to(tl.int64)[:, None] * stride_vn + o_d[None, :]
    for i_n in tl.range(i_split * blocks, tl.minimum((i_split + 1) * blocks, num_blocks), num_stages=STAGES):
        place = tl.cast(i_n, tl.int64) * BLOCK_N
        m_n = o_n < num_keys - place
        m_kv = m_n[:, None] & m_d[None, :]
        # (BLOCK_N, BLOCK_D)
        b_k = tl.load(p_k + place * stride_kn + o_k, mask=m_kv, other=0)
        b_v = tl.load(p_v + place * stride_vn + o_v, mask=m_kv, other=0)
        if DOT:
            b_max, b_sum, b_acc = _add_keys(b_q, b_k, b_v, m_n, b_max, b_sum, b_acc, scale_log2)
        else:
            b_max, b_sum, b_acc = _add_keys_one_head(b_q, b_k, b_v, m_n, b_max, b_sum, b_acc)
    # To b_max (BLOCK_H,), b_sum (BLOCK_H,), b_acc (BLOCK_H, BLOCK_D)
    if DOT:
        b_sum = tl.sum(b_sum, 1)
    else:
        b_all = tl.max(b_max, 0, keep_dims=True)
        b_fade = tl.exp2(b_max - tl.where(b_all == float("-inf"), 0.0, b_all))
        b_max = b_all
        b_sum = tl.sum(b_sum * b_fade, 0, keep_dims=True)
        b_acc = tl.sum(b_acc * b_fade[:, None], 0, keep_dims=True)

    q_heads = tl.num_programs(1) // GROUPS * HEADS_PER_KV
    p_out += (i_b * q_heads + first_head) * HEAD_DIM
    if active == 1:
        b_out = b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
        tl.store(p_out + o_h[:, None] * HEAD_DIM + o_d[None, :], b_out, mask=m_h[:, None] & m_d[None, :])
        return

    rows = tl.num_programs(2).to(tl.int64) * tl.num_programs(1)
    p_acc = p_partial + i_row * splits * HEADS * HEAD_DIM
    p_max_sum = p_partial + rows * splits * HEADS * HEAD_DIM + i_row * splits * HEADS * 2
    o_part = i_split * HEADS + o_h
    tl.store(p_max_sum + o_part * 2, b_max, mask=m_h)
    tl.store(p_max_sum + o_part * 2 + 1, b_sum, mask=m_h)
    tl.store(p_acc + o_part[:, None] * HEAD_DIM + o_d[None, :], b_acc, mask=m_h[:, None] & m_d[None, :])
    tl.debug_barrier()  # every thread's stores, before one thread counts this program in
    arrived = tl.atomic_add(p_counter + i_row, 1, sem="acq_rel")
    if arrived == active - 1:
        tl.store(p_counter + i_row, 0)
        # (BLOCK_G,), (BLOCK_G, BLOCK_D)
        b_row_sum, b_row_acc = _combine(p_acc, p_max_sum, active, HEADS, HEAD_DIM, BLOCK_G, BLOCK_D, BLOCK_S)
        o_g = tl.arange(0, BLOCK_G)
        m_g = (o_g < HEADS) & (i_group * HEADS + o_g < HEADS_PER_KV)
        b_row = b_row_acc / tl.where(b_row_sum == 0, 1.0, b_row_sum)[:, None]
        tl.store(p_out + o_g[:, None] * HEAD_DIM + o_d[None, :], b_row, mask=m_g[:, None] & m_d[None, :])


_counters_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_counters_for_graphs: dict[torch.device, Tensor] = {}  # what no graph has taken yet
_pools_of_counters: list[Tensor] = []  # graphs do not hold on to what they use, so these are never freed; 2 MB each


def _counters(device: torch.device, count: int, fresh: bool) -> Tensor:
    """`count` zeros, int32. A kernel leaves them zero, so kernels that cannot run at the same time share them.

    Those of one stream cannot. A graph may be replayed next to any stream and to any other graph, so a captured call
    gets counters of its own, set to zero before the capture; where there are none yet, zeroing becomes part of the
    graph. `fresh`: an allocation that does not outlive the call, as graphs that torch.compile records need.
    """
    if fresh or device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    count = triton.cdiv(count, 64) * 64  # a slice is aligned as an allocation is
    if torch.cuda.is_current_stream_capturing():
        spare = _counters_for_graphs.get(device)
        if spare is None or spare.shape[0] < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _counters_for_graphs[device] = spare[count:]
        return spare[:count]
    spare = _counters_for_graphs.get(device)
    if spare is None or spare.shape[0] < 2**17:
        _counters_for_graphs[device] = torch.zeros(2**19, dtype=torch.int32, device=device)
        _pools_of_counters.append(_counters_for_graphs[device])
    key = device, torch.cuda.current_stream(device).cuda_stream
    counters = _counters_of_stream.get(key)
    if counters is None or counters.shape[0] < count:
        counters = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _counters_of_stream[key] = counters
    return counters


def table_splits(
    batch: int, kv_heads: int, max_length: int, head_dim: int, element_bytes: int, tile: DecodeTile, chip: Chip
) -> int:
    """`split_count` of these shapes."""
    return split_count(
        batch * kv_heads * tile.head_groups,
        triton.cdiv(max_length, tile.block_n),
        2 * tile.block_n * head_dim * element_bytes,
        4 * tile.heads * (head_dim + 2),
        tile.block_s,
        chip.multiprocessors * tile.programs_per_multiprocessor,
    )


def _launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    scale: float,
    splits: int = 0,  # 0: as many as `table_splits` says
    fresh_counters: bool = True,
) -> Tensor:
    batch, q_heads, _, head_dim = q.shape
    kv_heads, max_length = k.shape[1:3]
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    tile = decode_tile(q_heads // kv_heads, head_dim, q.element_size(), chip(q.device))
    splits = splits or table_splits(batch, kv_heads, max_length, head_dim, q.element_size(), tile, chip(q.device))
    rows = batch * kv_heads * tile.head_groups
    shared = splits > 1
    _decode_kernel[splits, kv_heads * tile.head_groups, batch](
        q,
        k,
        v,
        lengths.contiguous(),
        lengths if starts is None else starts.contiguous(),
        out,
        q.new_empty(rows * splits * tile.heads * (head_dim + 2) * shared, dtype=torch.float32),
        _counters(q.device, rows * shared, fresh_counters),
        *(q.stride(0), q.stride(1)),
        *k.stride()[:3],
        *v.stride()[:3],
        max_length,
        scale * math.log2(math.e),
        HAS_STARTS=starts is not None,
        HEADS_PER_KV=q_heads // kv_heads,
        HEAD_DIM=head_dim,
        DOT=tile.dot,
        HEADS=tile.heads,
        GROUPS=tile.head_groups,
        BLOCK_H=tile.block_h,
        BLOCK_G=triton.next_power_of_2(tile.heads),
        BLOCK_D=tile.block_d,
        BLOCK_N=tile.block_n,
        BLOCK_S=tile.block_s,
        STAGES=tile.num_stages,
        maxnreg=REGISTERS,
        **launch_options(tile.num_warps, tile.num_stages),
    )
    return out


def _fake_decode(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_decode = register("flash_decode", _launch_decode, _fake_decode)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.shape[3] > MAX_HEAD_DIM:
        return f"its head dim is {q.shape[3]}, and the kernel takes {MAX_HEAD_DIM} at most"
    if _needs_gradient(q, k, v):
        return "an input requires a gradient, and the kernel has no backward"
    return None


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

    A row that sees no key gets zeros; what lies outside the visible keys is never used, NaN included. The cache is read
    where it lies, transposed storage included, as long as a head's numbers are adjacent. On a CPU "auto" is PyTorch's
    attention over each row's visible keys. Neither has a backward: where a gradient is needed the reference runs.
    Raises ValueError for shapes or dtypes that differ, Hq that is no multiple of Hkv, or a DTensor; KernelUnavailable
    for `impl="triton"` where Triton cannot run.
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
    check_devices("flash_decode", q=q, k=k, v=v, lengths=lengths, **({} if starts is None else {"starts": starts}))
    if use_triton("flash_decode", impl, q.device, q.dtype, why_not=_why_not(q, k, v)):
        scale = 1 / math.sqrt(max(q.shape[3], 1)) if scale is None else float(scale)
        return _decode(q, k, v, lengths, starts, scale, 0, torch.compiler.is_compiling())
    eager = not torch.compiler.is_compiling()
    if impl == "auto" and q.device.type == "cpu" and eager and not _needs_gradient(q, k, v):
        return _decode_on_host(q, k, v, lengths, starts, scale)
    return flash_decode_reference(q, k, v, lengths, starts=starts, scale=scale)
