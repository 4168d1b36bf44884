"""fused_projector: gradients by finite differences, and the error of each dtype against float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import KernelUnavailable, fused_projector
from aligngpt_kernels import projector as projector_module


def inputs(rows: tuple[int, ...], in_dim: int = 5, hidden: int = 7, width: int = 6) -> list[torch.Tensor]:
    """x, w1, b1, w2, b2; weights of the size that keeps sums near 1, as those of layers do."""
    shapes = (*rows, in_dim), (hidden, in_dim), (hidden,), (width, hidden), (width,)
    scales = 1, in_dim**-0.5, 1, hidden**-0.5, 1
    pairs = zip(shapes, scales, strict=True)
    return [(torch.randn(shape, dtype=torch.float64) * scale).requires_grad_() for shape, scale in pairs]


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


TRITON_SHAPES = {  # rows, in_dim, hidden, width; what it covers
    "aligned": ((2, 64), 64, 128, 64),
    "ragged widths": ((3, 5), 7, 37, 19),
    "rows of whole descriptors, ragged": ((2, 3, 11), 24, 40, 72),
    "one row": ((1,), 64, 96, 128),
    "larger than a block": ((150,), 40, 144, 72),
    "no rows": ((0, 4), 16, 8, 24),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("shape", TRITON_SHAPES.values(), ids=TRITON_SHAPES)
def test_fault_41_triton_against_float64(shape, recompute, dtype, laid_out, as_exact_as_torch):
    op = partial(fused_projector, recompute=recompute)
    got = as_exact_as_torch(op, inputs(*shape), dtype)
    if 0 in shape[0]:
        assert all((g == 0).all() for g in got[1:])


def test_fault_41_second_product_by_our_kernel(dtype, laid_out, as_exact_as_torch, monkeypatch):
    monkeypatch.setattr(projector_module, "SECOND_BY_CUBLAS_FROM", 1000)
    as_exact_as_torch(fused_projector, inputs((70,), 24, 40, 72), dtype)


@pytest.mark.parametrize("trained", [[0], [1], [2], [3], [4], [1, 2, 3, 4], [0, 4]])
def test_fault_41_only_the_gradients_that_are_needed(trained, laid_out, as_exact_as_torch):
    args = [a.requires_grad_(i in trained) for i, a in enumerate(inputs((9,), 8, 16, 12))]
    as_exact_as_torch(fused_projector, args, torch.float32)


def test_what_is_saved_for_the_backward(device):
    """The sum before the GELU beside the arguments; nothing with `recompute`, by kernels and by reference alike."""
    for impl, recompute, most in (("triton", False, 1), ("triton", True, 0), ("reference", True, 0)):
        args = [a.detach().float().to(device).requires_grad_() for a in inputs((9,), 8, 16, 12)]
        known = {a.untyped_storage().data_ptr() for a in args}
        saved = []

        def keep(tensor, known=known, saved=saved):
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in known:
                saved.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            fused_projector(*args, recompute=recompute, impl=impl)
        assert saved == [(9, 16)][:most], (impl, recompute)


def test_fault_40_odd_inputs(dtype, laid_out, as_exact_as_torch):
    """Transposed and strided arguments."""

    def of_odd(x, w1, b1, w2, b2, **options):
        odd = x.transpose(0, 1), w1.T.contiguous().T, b1.repeat_interleave(2)[::2], w2.T.contiguous().T
        return fused_projector(*odd, b2.repeat_interleave(3)[::3], **options)

    as_exact_as_torch(of_odd, inputs((4, 3)), dtype)


def test_fault_40_rows_far_into_a_tensor(device, dtype):
    """Past 2^31 elements, in memory that costs nothing as long as it is not touched."""
    x, *weights = (a.detach().to(device, dtype) for a in inputs((2,)))
    far = torch.empty(2**29 + 2, 5, dtype=dtype, device=device)[-2:]
    far.copy_(x)
    assert torch.equal(fused_projector(far, *weights, impl="triton"), fused_projector(x, *weights, impl="triton"))


def test_fault_41_bit_equal_and_without_waiting(device, dtype, laid_out, no_sync):
    args = [a.detach().to(device, dtype).requires_grad_() for a in inputs((70,), 24, 40, 72)]
    runs = []
    for _ in range(2):
        with no_sync():
            out = fused_projector(*args, impl="triton")
            runs.append([out, *torch.autograd.grad(out, args, torch.ones_like(out))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_fault_41_operator_and_compiled(device):
    args = [a.detach().float().to(device).requires_grad_() for a in inputs((2, 3), 8, 16, 12)]
    for keep in (True, False):
        torch.library.opcheck(torch.ops.aligngpt.projector.default, (args[0].flatten(0, 1).detach(), *args[1:], keep))
    for impl, recompute in (("triton", False), ("triton", True), ("auto", False), ("auto", True)):
        op = partial(fused_projector, impl=impl, recompute=recompute)
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        out, want = compiled(*args), op(*args)
        assert torch.equal(out, want)
        up = torch.randn_like(out)
        grads = zip(torch.autograd.grad(out, args, up), torch.autograd.grad(want, args, up), strict=True)
        assert all(torch.equal(got, expected) for got, expected in grads)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_autocast_takes_dtypes_that_differ(impl, device):
    """Features of a 16-bit tower beside float32 weights."""
    x, *weights = (a.detach().float().to(device) for a in inputs((9,), 8, 16, 12))
    with torch.autocast(device, torch.float16):
        got = fused_projector(x.half(), *weights, impl=impl)
        assert torch.equal(got, fused_projector(x.half(), *(w.half() for w in weights), impl=impl))
    with pytest.raises(ValueError, match=r"w1 is torch\.float32; fused_projector needs torch\.float16"):
        fused_projector(x.half(), *weights, impl=impl)


def test_autocast_as_linear_layers(device):
    """float32 parameters, as FSDP-free training has them: cast as `F.linear` casts, gradients back in float32."""
    dtype = torch.float16
    args = [a.detach().float().to(device).requires_grad_() for a in inputs((9,), 8, 16, 12)]
    with torch.autocast(device, dtype):
        got, want = (fused_projector(*args, impl=impl) for impl in ("triton", "reference"))
    assert got.dtype == want.dtype == dtype
    exact = fused_projector(*(a.to(dtype).double() for a in args))
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()
    up = torch.randn_like(got)
    for g, w in zip(torch.autograd.grad(got, args, up), torch.autograd.grad(want, args, up), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)


def test_triton_refuses_float64():
    with pytest.raises(KernelUnavailable, match=r"its inputs are torch\.float64, and the kernels take float16"):
        fused_projector(*inputs((2,)), impl="triton")


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
