"""fused_projector: gradients by finite differences, and the error of each dtype against float64."""

import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import fused_projector


def inputs(rows: tuple[int, ...], in_dim: int = 5, hidden: int = 7, width: int = 6) -> list[torch.Tensor]:
    shapes = (*rows, in_dim), (hidden, in_dim), (hidden,), (width, hidden), (width,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("rows", [(2, 3), (1,), (0,), (0, 4)], ids=["images", "one row", "no rows", "no images"])
def test_gradients(rows):
    args = inputs(rows)
    assert torch.autograd.gradcheck(fused_projector, args)
    fused_projector(*args).sum().backward()
    assert all(a.grad is not None for a in args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_erf_gelu_and_error_of_the_dtype(dtype):
    """Within 2 × the error of the same layers as modules; and erf, not tanh, whose error is some 1e-3."""
    args = inputs((64, 9), 24, 48, 32)
    x, w1, b1, w2, b2 = args
    exact = F.linear(0.5 * (u := F.linear(x, w1, b1)) * (1 + torch.erf(u / 2**0.5)), w2, b2)
    low = [a.detach().to(dtype) for a in args]
    first, second = torch.nn.Linear(24, 48, dtype=dtype), torch.nn.Linear(48, 32, dtype=dtype)
    first.load_state_dict({"weight": low[1], "bias": low[2]})
    second.load_state_dict({"weight": low[3], "bias": low[4]})
    plain = second(torch.nn.GELU()(first(low[0])))
    got = fused_projector(*low)
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()
    torch.testing.assert_close(fused_projector(*args), exact, rtol=1e-13, atol=1e-13)


def test_non_contiguous_inputs():
    x, w1, b1, w2, b2 = (a.detach() for a in inputs((4, 3)))
    got = fused_projector(x.transpose(0, 1), w1.T.contiguous().T, b1, w2.T.contiguous().T, b2)
    torch.testing.assert_close(got, fused_projector(x, w1, b1, w2, b2).transpose(0, 1), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, lambda t: t[:, :4], r"w1 has shape \(7, 4\); it needs \(hidden, 5\)"),
        (2, lambda t: t[:6], r"b1 has shape \(6,\); it needs \(7,\)"),
        (3, lambda t: t.float(), "w2 is torch.float32; fused_projector needs torch.float64, the dtype of x"),
        (0, lambda t: t.long(), "x is torch.int64; fused_projector needs a floating dtype"),
    ],
)
def test_refusals(index, change, message):
    args = [a.detach() for a in inputs((2,))]
    args[index] = change(args[index])
    with pytest.raises(ValueError, match=message):
        fused_projector(*args)
