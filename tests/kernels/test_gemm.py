"""Products and their epilogues, by pointers and by tensor descriptors, whole and split along K."""

import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import gemm as gemm_module
from aligngpt_kernels.dispatch import A100, B200, H100, Chip, assume_chip
from aligngpt_kernels.gemm import GemmTile, dot_precision, gemm, gemm_tile, gemm_tiles, weight_grad

SHAPES = {  # rows, grad's columns, x's columns; what it covers
    "aligned": (128, 128, 64),
    "ragged, no descriptors": (70, 37, 131),
    "ragged, descriptors": (70, 40, 136),
    "one row": (1, 16, 16),
    "one column each": (9, 1, 1),
    "no rows": (0, 24, 8),
}


def skip_without_descriptors(chip: Chip) -> None:
    if chip.has_tma and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no tensor descriptors")


@pytest.mark.parametrize("chip", [A100, H100], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fault_41_weight_grad_against_float64(shape, chip, dtype, device, allowed_error):
    rows, n, k = shape
    grad, x = torch.randn(rows, n, dtype=dtype, device=device), torch.randn(rows, k, dtype=dtype, device=device)
    exact, exact_bias = grad.double().T @ x.double(), grad.double().sum(0)
    skip_without_descriptors(chip)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills `empty` with NaN
    try:
        with assume_chip(chip):
            got, got_bias = weight_grad(grad, x, with_bias=True)
            again, again_bias = weight_grad(grad, x, with_bias=True)
            total = torch.ones(n, k, device=device)
            same, none = weight_grad(grad, x, with_bias=False, into=total)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, again)
    assert torch.equal(got_bias, again_bias)
    assert same is total
    assert none.shape == (0,)
    assert (got.dtype, got_bias.dtype) == (dtype, dtype)
    for g, plain, e in ((got, grad.T @ x, exact), (got_bias, grad.sum(0), exact_bias)):
        assert (g.double() - e).abs().max() <= allowed_error(plain, e)
    exact += 1
    twice_rounded = torch.finfo(torch.float32).eps / 2 * exact.abs().max()  # the product, then the sum
    assert (total.double() - exact).abs().max() <= allowed_error(1 + grad.float().T @ x.float(), exact) + twice_rounded


def test_fault_40_weight_grad_of_strided_rows(dtype, device, allowed_error):
    """Columns of a wider matrix are read where they are, a transposed matrix is copied.

    The product is the same, bit by bit. The bias is added up in the order of the threads that read it, and how many
    numbers a thread reads at once follows from the stride: it is compared with float64, and with itself.
    """
    wide, tall = torch.randn(33, 48, dtype=dtype, device=device), torch.randn(20, 33, dtype=dtype, device=device)
    for chip in (A100, H100):
        skip_without_descriptors(chip)
        with assume_chip(chip):
            got, bias = weight_grad(wide[:, 8:32], tall.T, with_bias=True)
            again, again_bias = weight_grad(wide[:, 8:32], tall.T, with_bias=True)
            want, _ = weight_grad(wide[:, 8:32].contiguous(), tall.T.contiguous(), with_bias=True)
        assert torch.equal(got, want)
        assert torch.equal(got, again)
        assert torch.equal(bias, again_bias)
        plain, exact = wide[:, 8:32].sum(0), wide[:, 8:32].double().sum(0)
        assert (bias.double() - exact).abs().max() <= allowed_error(plain, exact)


@pytest.mark.parametrize(
    "by_triton",
    [lambda a, b: a.half().float() @ b, lambda a, b: a[1:] @ b[1:]],
    ids=["operands of 11 bits", "a term too few"],
)
def test_the_bound_is_narrow_for_one_number_too(by_triton, device, as_exact_as_torch):
    """PyTorch's own error may be none by chance; what is allowed then is still its error, not any."""

    def op(a, b, impl):
        return (by_triton(a, b) if impl == "triton" else a @ b).reshape(1)

    for _ in range(3):
        inputs = [torch.randn(64, device=device) for _ in range(2)]
        with pytest.raises(AssertionError, match="result 0 is off by"):
            as_exact_as_torch(op, inputs, torch.float32)


TILES = {  # what it covers
    "whole": GemmTile(64, 64, 32, 4, 2, 1, 1),
    "in quarters": GemmTile(32, 64, 16, 4, 2, 4, 1),
    "split along K": GemmTile(16, 64, 32, 4, 2, 4, 1, split_k=3),
    "split further than K goes": GemmTile(32, 32, 64, 4, 2, 1, 1, split_k=4),
}
PRODUCTS = {  # rows, columns, K, chip; what it covers
    "aligned, pointers": (64, 64, 64, A100),
    "aligned, descriptors": (64, 64, 64, H100),
    "ragged, pointers": (70, 37, 131, A100),
    "ragged, descriptors": (33, 72, 136, H100),
    "one row, pointers for want of alignment": (1, 75, 51, H100),
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("shape", PRODUCTS.values(), ids=PRODUCTS)
def test_fault_41_every_epilogue_against_float64(shape, tile, dtype, device, monkeypatch, allowed_error):
    rows, n, k, chip = shape
    skip_without_descriptors(chip)
    monkeypatch.setattr(gemm_module, "gemm_tile", lambda *_: tile)
    made = {"dtype": dtype, "device": device}
    a, b, bias = torch.randn(rows, k, **made), torch.randn(n, k, **made), torch.randn(n, **made)
    back, pre = torch.randn(rows, k, **made), torch.randn(rows, n, **made)
    places = (torch.randperm(rows, device=device) + 2).int()
    places[::5] = -1
    owner = torch.arange(-1, rows // 3 + 1, device=device, dtype=torch.int32) % 2
    owner[0] = -1
    mean = torch.randn(2, n, device=device)
    out = torch.full((rows + 2, n), 7.0, **made)

    def run() -> list[torch.Tensor]:
        with assume_chip(chip):
            return [
                *gemm(a, b, "bias", bias=bias),
                *gemm(a, b, "gelu", bias=bias),
                *gemm(a, b, "gelu, keep", bias=bias),
                *gemm(back, b.T.contiguous(), "dgelu", pre=pre),
                *gemm(a, b, "place", bias=bias, out=out, place=places, owner=owner, rows_per_owner=3, mean=mean),
            ]

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills `empty` with NaN
    try:
        got = run()
        if tile.split_k > 1:
            assert all(torch.equal(g, w) for g, w in zip(got, run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)

    def expected(convert) -> list[torch.Tensor]:
        u = F.linear(convert(a), convert(b), convert(bias))
        p = convert(pre).requires_grad_()
        act = F.gelu(p)
        (grad,) = torch.autograd.grad(act, p, convert(back) @ convert(b).T)
        dots = u.to(torch.promote_types(u.dtype, torch.float32)) * convert(mean)[owner[torch.arange(rows) // 3]]
        dots = torch.where((owner[torch.arange(rows) // 3] >= 0)[:, None], dots, 0).sum(1)
        return [u, F.gelu(u), F.gelu(u), u, grad, act.detach(), grad.sum(0), dots]

    got[6], got[7] = got[6].sum(0), got[7].sum(1)
    for index, (g, plain, exact) in enumerate(
        zip(got, expected(lambda t: t.to(dtype)), expected(lambda t: t.double()), strict=True)
    ):
        assert (g.double() - exact).abs().max() <= allowed_error(plain, exact), index
    want = torch.full_like(out, 7.0)
    want[places[places >= 0].long()] = got[0][places >= 0]
    assert torch.equal(out, want)


def test_tile_tables_split_only_small_products():
    """One row leaves most of the chip idle unless K is split; 16 images fill it many times over."""
    for chip in (A100, H100, B200):
        kind = torch.bfloat16, "ieee"
        small, large = (gemm_tile(m, 4096, 4096, *kind, "gelu", chip) for m in (1, 9216))
        assert (small.block_m, small.split_k > 1) == (16, True)
        assert (large.block_m, large.block_n, large.split_k) == (128, 128, 1)
        assert large in gemm_tiles(*kind, chip)


def test_float32_products_follow_pytorchs_switches_old_and_new():
    """After the new switch was used, reading the old one raises."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, expected in (("highest", "ieee"), ("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(precision)
            assert dot_precision(torch.float32) == expected
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert dot_precision(torch.float32) == precision
            assert dot_precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
