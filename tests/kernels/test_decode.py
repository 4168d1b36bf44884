"""flash_decode against attention written out for one head of one row at a time in float64."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aligngpt_kernels import KernelUnavailable, decode, flash_decode, flash_decode_reference
from aligngpt_kernels.decode import _combine, _launch_decode, decode_tile, split_cost, split_count, table_splits
from aligngpt_kernels.dispatch import A100, B200, H100, tl, triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], starts: list[int], scale: float) -> Tensor:
    rows = []
    for b, (start, end) in enumerate(zip(starts, lengths, strict=True)):
        for h in range(q.shape[1]):
            shared = h // (q.shape[1] // k.shape[1])
            keys, values = k[b, shared, start : max(start, end)], v[b, shared, start : max(start, end)]
            rows.append(((keys @ q[b, h, 0]) * scale).softmax(0) @ values)
    return torch.stack(rows).view(q.shape) if rows else q


def inputs(batch: int, q_heads: int, kv_heads: int, length: int, head_dim: int = 4) -> list[Tensor]:
    shapes = (batch, q_heads, 1, head_dim), *[(batch, kv_heads, length, head_dim)] * 2
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    ("heads", "lengths", "starts"),
    [
        ((2, 2), [8, 8], [0, 0]),  # multi-head, whole cache
        ((6, 2), [3, 8, 1], [0, 5, 0]),  # grouped-query, ragged, left padding, one key
        ((4, 1), [0, 5, 3], [0, 5, 7]),  # one key head; rows that see nothing
        ((2, 1), [], []),  # empty batch
    ],
    ids=["aligned", "ragged", "nothing visible", "no rows"],
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients(heads, lengths, starts, scale):
    args = inputs(len(lengths), *heads, 8)
    index = {"lengths": torch.tensor(lengths, dtype=torch.int32), "starts": torch.tensor(starts, dtype=torch.int32)}
    want = one_by_one(*args, lengths, starts, scale or 0.5)
    got = flash_decode(*args, **index, scale=scale)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    with torch.no_grad():  # a row at a time
        torch.testing.assert_close(flash_decode(*args, **index, scale=scale), want, rtol=1e-13, atol=1e-13)
    up = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, args, up)
    want_grads = torch.autograd.grad(want, args, up, allow_unused=True, materialize_grads=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_unwritten_cache_never_enters(impl):
    q, k, v = (t.detach() for t in inputs(2, 4, 2, 9))
    lengths, starts = torch.tensor([5, 7]), torch.tensor([0, 2])
    want = flash_decode(q, k, v, lengths, starts=starts, impl=impl)
    for poison in (torch.nan, torch.inf):
        outside = torch.ones(2, 9, dtype=torch.bool)
        outside[0, :5] = outside[1, 2:7] = False
        dirty = [t.masked_fill(outside[:, None, :, None], poison) for t in (k, v)]
        assert torch.equal(flash_decode(q, *dirty, lengths, starts=starts, impl=impl), want)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_the_dtype(dtype, impl):
    """Within 2 × the error of torch's own attention in that dtype, over non-contiguous 700-key caches."""
    q, k, v = (t.detach() for t in inputs(3, 8, 2, 700, 64))
    low = [t.transpose(1, 2).contiguous().transpose(1, 2).to(dtype) for t in (q, k, v)]
    exact = flash_decode(*[t.double() for t in low], torch.full((3,), 700))
    got = flash_decode(*low, torch.full((3,), 700), impl=impl)
    plain = torch.nn.functional.scaled_dot_product_attention(*low, enable_gqa=True)
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()


TRITON_CASES = {  # query heads, key heads, head dim, Lmax, lengths, starts; what they cover
    "aligned": (2, 2, 64, 128, [128, 128], [0, 0]),
    "ragged, left padding, one key": (4, 2, 64, 150, [37, 150, 10], [5, 0, 9]),
    "nothing visible": (4, 2, 64, 70, [0, 5, 3, 70], [0, 5, 70, 0]),
    "one row, many blocks": (1, 1, 128, 640, [620], [3]),
    "eight heads a key": (8, 1, 128, 65, [65], [1]),
    "seven heads a key, a head dim that is padded": (7, 1, 80, 70, [70, 33], [1, 0]),
    "the widest head": (4, 1, 256, 40, [40, 17], [0, 0]),
    "the widest head, multi-head": (2, 2, 256, 40, [40, 17], [0, 0]),
    "two groups of heads, the second not full": (35, 1, 16, 30, [30], [0]),
    "more heads than four warps hold": (20, 1, 256, 20, [18], [2]),
    "tiny heads": (4, 2, 4, 9, [9, 2], [0, 1]),
    "tiny odd heads, multi-head": (3, 3, 5, 9, [9, 2], [0, 1]),
}


def triton_inputs(case: str, device: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    q_heads, kv_heads, head_dim, max_length, lengths, starts = TRITON_CASES[case]
    args = [t.detach() for t in inputs(len(lengths), q_heads, kv_heads, max_length, head_dim)]
    index = {"lengths": torch.tensor(lengths, device=device), "starts": torch.tensor(starts, device=device)}
    return args, index


def in_splits(splits: int) -> Callable[..., Tensor]:
    """flash_decode, its Triton path with this many programs a row."""

    def run(q: Tensor, k: Tensor, v: Tensor, *, impl: str, lengths: Tensor, starts: Tensor | None = None) -> Tensor:
        if impl == "reference":
            return flash_decode_reference(q, k, v, lengths, starts=starts)
        return _launch_decode(q, k, v, lengths, starts, q.shape[3] ** -0.5, splits)

    return run


@pytest.mark.parametrize("case", TRITON_CASES)
def test_fault_41_triton_attends_as_the_reference(case, dtype, device, as_exact_as_torch):
    args, index = triton_inputs(case, device)
    as_exact_as_torch(partial(flash_decode, **index), args, dtype)
    as_exact_as_torch(partial(flash_decode, lengths=index["lengths"], scale=0.3), args, dtype)


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        *[("ragged, left padding, one key", splits) for splits in (1, 2, 3, 7)],
        ("nothing visible", 3),
        ("one row, many blocks", 40),  # more than are combined at a time
    ],
)
def test_fault_41_any_number_of_splits_is_right(case, splits, dtype, device, as_exact_as_torch):
    args, index = triton_inputs(case, device)
    as_exact_as_torch(partial(in_splits(splits), **index), args, dtype)


def low(args: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [t.to(device, dtype) for t in args]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_fault_41_unwritten_cache_never_enters_the_kernel(heads, splits, poison, dtype, device):
    q, k, v = low([t.detach() for t in inputs(2, *heads, 150, 64)], dtype, device)
    lengths, starts = torch.tensor([130, 67], device=device), torch.tensor([0, 35], device=device)
    position = torch.arange(150, device=device)
    outside = (position >= lengths[:, None]) | (position < starts[:, None])
    dirty = [t.masked_fill(outside[:, None, :, None], poison) for t in (k, v)]
    run = partial(in_splits(splits), lengths=lengths, starts=starts, impl="triton")
    assert torch.equal(run(q, *dirty), run(q, k, v))


def test_a_visible_nan_is_not_hidden(dtype, device):
    for heads in ((2, 2), (4, 2)):
        q, k, v = low([t.detach() for t in inputs(1, *heads, 150, 64)], dtype, device)
        k[0, 1, 70, 3] = torch.nan
        out = in_splits(3)(q, k, v, lengths=torch.tensor([150], device=device), impl="triton")
        half = heads[0] // 2
        assert out[0, half:].isnan().all()
        assert not out[0, :half].isnan().any()


@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64])
def test_fault_40_lengths_and_starts_outside_the_cache(int_dtype, dtype, device, as_exact_as_torch):
    args = [t.detach() for t in inputs(5, 4, 2, 70, 16)]
    extreme = torch.iinfo(int_dtype)
    lengths = torch.tensor([71, extreme.max, -1, extreme.min, 70], dtype=int_dtype, device=device)
    starts = torch.tensor([-3, extreme.min, 0, extreme.max, extreme.max], dtype=int_dtype, device=device)
    for splits in (0, 2):
        (out,) = as_exact_as_torch(partial(in_splits(splits), lengths=lengths, starts=starts), args, dtype)
        assert out[2:].eq(0).all()
    args, lengths, starts = [t.cpu() for t in args], lengths.cpu(), starts.cpu()
    on_host = flash_decode(*args, lengths, starts=starts)
    torch.testing.assert_close(on_host, flash_decode_reference(*args, lengths, starts=starts))


def test_fault_40_no_rows_no_keys_no_heads(dtype, device):
    for batch, q_heads, length, head_dim in ((0, 4, 9, 8), (2, 4, 0, 8), (2, 0, 9, 8), (2, 4, 9, 0)):
        q = torch.randn(batch, q_heads, 1, head_dim, dtype=dtype, device=device)
        k = torch.randn(batch, 2, length, head_dim, dtype=dtype, device=device)
        lengths = torch.full((batch,), 5, device=device)
        for impl in ("triton", "auto"):
            out = flash_decode(q, k, k, lengths, scale=1.0, impl=impl)
            assert (out.shape, out.dtype) == (q.shape, dtype)
            assert out.eq(0).all() or length > 0


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["multi-head", "grouped"])
def test_fault_40_caches_are_read_where_they_lie(heads, dtype, device, as_exact_as_torch):
    """Storage by position, part of a longer cache, keys beside values, q beside them, numbers that are not adjacent."""
    q, k, v = (t.detach() for t in inputs(2, *heads, 70, 16))
    lengths = torch.tensor([70, 33], device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, *, impl: str) -> Tensor:
        outs = [
            flash_decode(q, view(k), view(v), lengths, impl=impl)
            for view in (
                lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
                lambda t: torch.cat([t, torch.full_like(t, torch.nan)], 2)[:, :, :70],
                lambda t: torch.stack([t, t], 3).flatten(3)[..., :16],
                lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
            )
        ]
        beside = torch.cat([q, q, q], 3).transpose(1, 2).contiguous().transpose(1, 2)[..., 16:32]
        outs.append(flash_decode(beside, k, v, lengths[None].expand(3, 2)[1], impl=impl))
        outs.append(flash_decode(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, lengths, impl=impl))
        return torch.stack(outs)

    (outs,) = as_exact_as_torch(run, [q, k, v], dtype)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)], ids=["multi-head", "grouped"])
def test_fault_40_far_offsets(heads, dtype, device, as_exact_as_torch):
    """Past 2^31 elements by position, by key head and by row, in memory that is touched at the keys alone."""
    q, k, _ = (t.detach() for t in inputs(1, *heads, 40, 8))
    far = torch.empty(2**31 + 2048, dtype=dtype, device=device)
    positions = far[: 2**31].view(1, 1, 2**28, 8)
    heads_apart = far.as_strided((1, 3, 40, 8), (1, 2**30, 8, 1))  # a stride that 32 bits hold, a product they do not
    rows_apart = far.as_strided((3, 1, 40, 8), (2**30, 1, 8, 1))
    first = torch.zeros(1, dtype=torch.long, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, *, impl: str) -> Tensor:
        if impl == "reference":
            return torch.stack([flash_decode_reference(q, k, v, first + 40)] * 3)
        positions[:, :, -40:] = k
        by_position = flash_decode(q, positions, positions, first + 2**28, starts=first + 2**28 - 40, impl=impl)
        heads_apart[0] = k[0, 0]  # rows_apart as well: the same storage
        by_head = flash_decode(q.repeat(1, 3, 1, 1), heads_apart, heads_apart, first + 40, impl=impl)
        by_row = flash_decode(q.repeat(3, 1, 1, 1), rows_apart, rows_apart, (first + 40).repeat(3), impl=impl)
        return torch.stack([by_position, by_head[:, -heads[0] :], by_row[2:]])

    as_exact_as_torch(lambda q, k, *, impl: run(q, k, k, impl=impl), [q, k], dtype)


def test_counters_are_left_zero_and_lengths_may_change_in_place(dtype, device, monkeypatch, as_exact_as_torch):
    """As a replayed graph does: one buffer of counters, the same tensors, other lengths."""
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    monkeypatch.setattr(decode, "_counters", lambda *_: counters)
    args = [t.detach() for t in inputs(2, 4, 2, 200, 64)]
    lengths = torch.tensor([200, 20], device=device)
    for new in ([200, 20], [1, 199], [0, 64], [130, 130]):
        lengths.copy_(torch.tensor(new))
        as_exact_as_torch(partial(in_splits(3), lengths=lengths), args, dtype)
        assert not counters.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs programs in a given order")
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["multi-head", "grouped"])
def test_whoever_is_last_the_result_is_the_same(heads, dtype, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    q, k, v = low([t.detach() for t in inputs(2, *heads, 200, 64)], dtype, "cpu")
    run = partial(in_splits(4), q, k, v, lengths=torch.tensor([200, 130]), impl="triton")
    want, set_place = run(), interpreter_builder.set_grid_idx
    for turn in (1, 2, 3):
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, t=turn: set_place((x + t) % 4, y, z))
        assert torch.equal(run(), want)


def test_kernels_that_may_run_at_the_same_time_share_no_counters(monkeypatch):
    capturing, stream, zeros = False, 1, torch.zeros
    monkeypatch.setattr(decode, "_counters_of_stream", {})
    monkeypatch.setattr(decode, "_counters_for_graphs", {})
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream))
    gpu = torch.device("cuda", 0)

    def used(count: int, fresh: bool = False) -> set[int]:
        counters = decode._counters(gpu, count, fresh)
        kept.append(counters)
        assert counters.dtype == torch.int32
        assert counters.shape[0] >= count
        assert not counters.any()
        return {counters.data_ptr() + 4 * i for i in range(count)}

    kept: list[Tensor] = []
    capturing = True  # nothing allocated before: zeroing is part of the graph
    sets = [used(100), used(100)]
    capturing = False
    sets += [used(100), used(100, fresh=True), used(100, fresh=True)]
    assert used(80) < sets[2]  # of the same stream
    stream = 2
    sets.append(used(5000))
    capturing = True
    sets += [used(100), used(3), used(100), used(2**20), used(100)]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert all(counters.data_ptr() % 16 == 0 for counters in kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")
@pytest.mark.parametrize("warm", [True, False], ids=["counters there", "counters made in the graph"])
def test_a_graph_is_replayed_with_other_lengths(warm, monkeypatch):
    monkeypatch.setattr(decode, "_counters_for_graphs", {})
    q, k, v = low([t.detach() for t in inputs(2, 8, 2, 5000, 64)], torch.bfloat16, "cuda")
    lengths = torch.tensor([5000, 20], device="cuda")
    flash_decode(q, k, v, lengths, impl="triton")
    if not warm:
        decode._counters_for_graphs.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [flash_decode(q, k, v, lengths, impl="triton") for _ in range(3)]
    for new in ([5000, 20], [1, 4999], [0, 64]):
        lengths.copy_(torch.tensor(new))
        graph.replay()
        want = flash_decode(q, k, v, lengths, impl="triton")
        assert all(torch.equal(out, want) for out in outs)


def test_triton_path_is_traceable_never_waits_and_repeats_itself(dtype, device, no_sync):
    for case in ("tiny heads", "tiny odd heads, multi-head"):
        args, index = triton_inputs(case, device)
        args = low(args, dtype, device)
        run = partial(flash_decode, **index, impl="triton")
        with no_sync():
            want = run(*args)
        assert torch.equal(run(*args), want)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*args), want)
        op = torch.ops.aligngpt.flash_decode.default
        torch.library.opcheck(op, (*args, index["lengths"], index["starts"], 0.125, 3, True))
    torch.library.opcheck(op, (*args, index["lengths"], None, 0.125, 0, True))


def test_what_the_kernel_does_not_take(device):
    q, k, v = (t.float().to(device).detach() for t in inputs(1, 2, 2, 9))
    lengths = torch.tensor([9], device=device)
    for name in ("q", "k", "v"):
        call: dict[str, Any] = {"q": q, "k": k, "v": v, "lengths": lengths}
        call[name] = call[name].clone().requires_grad_()
        with pytest.raises(KernelUnavailable, match="requires a gradient, and the kernel has no backward"):
            flash_decode(**call, impl="triton")
        assert flash_decode(**call).requires_grad
        with torch.no_grad():
            flash_decode(**call, impl="triton")
    wide = torch.zeros(1, 2, 1, 257, device=device)
    with pytest.raises(KernelUnavailable, match="its head dim is 257, and the kernel takes 256 at most"):
        flash_decode(wide, wide, wide, lengths, impl="triton")
    with pytest.raises(KernelUnavailable, match="its inputs are torch"):
        flash_decode(q.double(), k.double(), v.double(), lengths, impl="triton")


@triton.jit
def _combine_kernel(p_acc, p_max_sum, p_out, splits, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    b_sum, b_acc = _combine(p_acc, p_max_sum, splits, HEADS, HEAD_DIM, 4, 4, 8)
    o_h = tl.arange(0, 4)
    o_d = tl.arange(0, 4)
    b_out = b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    mask = (o_h < HEADS)[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_out + o_h[:, None] * HEAD_DIM + o_d[None, :], b_out, mask=mask)


# Scores are whole sixty-fourths of a power of two, so that float32 holds them and their differences exactly.
SCORE = st.one_of(st.just(-torch.inf), st.integers(-(2**12), 2**12).map(lambda n: n / 64))


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.tuples(SCORE, SCORE, SCORE), max_size=4), min_size=1, max_size=20),
    seed=st.integers(0, 2**16),
)
def test_partial_softmaxes_combine_to_the_softmax_of_the_whole(parts, seed):
    """Any partition of any scores, base 2: parts without keys, parts of scores that are all -inf, equal scores."""
    device, heads, head_dim = "cuda" if torch.cuda.is_available() else "cpu", 3, 4
    scores = [torch.tensor(part, dtype=torch.float64).view(-1, heads).T for part in parts]  # (heads, keys) each
    torch.manual_seed(seed)
    values = [torch.randn(part.shape[1], head_dim, dtype=torch.float64) for part in scores]
    acc, max_sum = torch.zeros(len(parts), heads, head_dim), torch.zeros(len(parts), heads, 2)
    for i, (part, value) in enumerate(zip(scores, values, strict=True)):
        top = part.max(1).values if part.shape[1] else torch.full((heads,), -torch.inf, dtype=torch.float64)
        weights = torch.exp2(part - top.nan_to_num(neginf=0)[:, None])
        acc[i], max_sum[i] = weights @ value, torch.stack([top, weights.sum(1)], 1)
    out = torch.full((heads, head_dim), torch.nan, device=device)
    _combine_kernel[(1,)](acc.to(device), max_sum.to(device), out, len(parts), heads, head_dim)

    whole, value = torch.cat(scores, 1), torch.cat(values)
    want = ((whole * math.log(2)).softmax(1) @ value).nan_to_num(nan=0)  # NaN: no score above -inf
    # Of the largest value: a handful of roundings in exp2, two products, sums of sums and a quotient.
    allowed = 16 * torch.finfo(torch.float32).eps * (value.abs().max() if value.numel() else 0)
    assert (out - want).abs().max() <= allowed


@pytest.mark.parametrize("chip", [A100, H100, B200], ids=["A100", "H100", "B200"])
@pytest.mark.parametrize("heads_per_kv", [1, 4])
@pytest.mark.parametrize("max_length", [704, 2048, 8192, 32768])
def test_no_batch_is_a_cliff(max_length, heads_per_kv, chip):
    """By the model of `split_cost`: near bytes, start, block and combination; a row more costs little more."""
    tile = decode_tile(heads_per_kv, 128, 2, chip)
    slots = chip.multiprocessors * tile.programs_per_multiprocessor
    num_blocks = -(-max_length // tile.block_n)
    block_bytes, partial_bytes = 2 * tile.block_n * 128 * 2, 4 * tile.heads * 130
    for kv_heads in (1, 4, 8, 32):
        previous = None
        for batch in range(1, 65):
            splits = table_splits(batch, kv_heads, max_length, 128, 2, tile, chip)
            assert 1 <= splits <= num_blocks
            rows = batch * kv_heads
            cost = split_cost(splits, rows, num_blocks, block_bytes, partial_bytes, tile.block_s, slots)
            streaming = rows * num_blocks * block_bytes / slots
            if rows * num_blocks * block_bytes >= 250e6:
                combining = decode.SPLIT_BYTES + decode.BATCH_BYTES
                assert cost <= 1.15 * (streaming + decode.START_BYTES + block_bytes + combining)
            if previous is not None:
                assert cost <= 1.35 * previous * batch / (batch - 1)
            previous = cost


MEASURED = {  # query heads, key heads, batch, length; the counts within 5 % of the fastest on an H200, bfloat16
    (28, 4, 1, 704): [8],
    (32, 8, 1, 704): [8],
    (32, 8, 1, 2048): [8, 11, 16],
    (32, 8, 1, 32768): [32],
    (32, 8, 4, 704): [4, 8],
    (32, 8, 4, 2048): [8],
    (32, 8, 4, 32768): [8, 11, 16],
    (32, 8, 16, 704): [2, 3],
    (32, 8, 16, 8192): [2, 3, 4],
    (32, 8, 64, 704): [1],
    (32, 32, 1, 704): [4, 8],
    (32, 32, 1, 2048): [8],
    (32, 32, 4, 704): [1, 2],
    (32, 32, 16, 704): [1],
    (32, 32, 16, 2048): [1, 2, 4],
}


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_the_chosen_number_of_splits_was_among_the_fastest(shape):
    heads, kv_heads, batch, length = shape
    tile = decode_tile(heads // kv_heads, 128, 2, H100)
    assert table_splits(batch, kv_heads, length, 128, 2, tile, H100) in MEASURED[shape]


def test_the_chosen_number_of_splits_is_the_cheapest_or_nearly_so():
    for rows in (1, 7, 32, 132, 527, 528, 529, 1000, 4096):
        for num_blocks in (0, 1, 5, 22, 64, 500):
            shape = rows, num_blocks, 16384, 1040, 8, 528
            best = min(split_cost(splits, *shape) for splits in range(1, max(num_blocks, 1) + 1))
            assert split_cost(split_count(*shape), *shape) <= 1.05 * best


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 2, 4)}, r"q has shape \(2, 4, 2, 4\); it needs \(B, Hq, 1, Dh\)"),
        ({"q": torch.zeros(2, 3, 1, 4)}, "q has 3 heads; it needs a multiple of the 2 heads of k"),
        ({"v": torch.zeros(2, 2, 7, 4)}, r"v has shape \(2, 2, 7, 4\); it needs \(2, 2, 8, 4\)"),
        ({"lengths": torch.zeros(2)}, "lengths is torch.float32; flash_decode needs int32 or int64"),
        ({"starts": torch.zeros(3).long()}, r"starts has shape \(3,\); it needs \(2,\)"),
    ],
)
def test_refusals(change, message):
    cache = torch.zeros(2, 2, 8, 4)
    call = {"q": torch.zeros(2, 4, 1, 4), "k": cache, "v": cache, "lengths": torch.tensor([8, 8])}
    with pytest.raises(ValueError, match=message):
        flash_decode(**{**call, **change})


def test_counters_that_a_graph_has_taken_are_never_freed(monkeypatch):
    """A captured launch goes on using its slice after nobody in Python holds it."""
    zeros = torch.zeros
    monkeypatch.setattr(decode, "_counters_for_graphs", {})
    monkeypatch.setattr(decode, "_pools_of_counters", [])
    monkeypatch.setattr(decode, "_counters_of_stream", {})
    monkeypatch.setattr(torch, "zeros", lambda *a, device, **k: zeros(*a, **k, device="cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    gpu, taken = torch.device("cuda", 0), []
    for _ in range(3):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        decode._counters(gpu, 64, fresh=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(100):
            counters = decode._counters(gpu, 4096, fresh=False)
            taken.append((counters.data_ptr(), StorageWeakRef(counters.untyped_storage())))
            del counters
    assert not any(storage.expired() for _, storage in taken)
    assert len({place for place, _ in taken}) == len(taken)
