"""flash_decode against attention written out for one head of one row at a time in float64."""

import pytest
import torch
from aligngpt_kernels import flash_decode
from torch import Tensor


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
    up = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, args, up)
    want_grads = torch.autograd.grad(want, args, up, allow_unused=True, materialize_grads=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


def test_unwritten_cache_never_enters():
    q, k, v = (t.detach() for t in inputs(2, 4, 2, 9))
    lengths, starts = torch.tensor([5, 7]), torch.tensor([0, 2])
    want = flash_decode(q, k, v, lengths, starts=starts)
    for poison in (torch.nan, torch.inf):
        outside = torch.ones(2, 9, dtype=torch.bool)
        outside[0, :5] = outside[1, 2:7] = False
        dirty = [t.masked_fill(outside[:, None, :, None], poison) for t in (k, v)]
        assert torch.equal(flash_decode(q, *dirty, lengths, starts=starts), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_the_dtype(dtype):
    """Within 2 × the error of torch's own attention in that dtype, over non-contiguous 700-key caches."""
    q, k, v = (t.detach() for t in inputs(3, 8, 2, 700, 64))
    low = [t.transpose(1, 2).contiguous().transpose(1, 2).to(dtype) for t in (q, k, v)]
    exact = flash_decode(*[t.double() for t in low], torch.full((3,), 700))
    got = flash_decode(*low, torch.full((3,), 700))
    plain = torch.nn.functional.scaled_dot_product_attention(*low, enable_gqa=True)
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()


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
