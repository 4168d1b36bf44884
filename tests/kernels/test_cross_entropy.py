"""linear_cross_entropy: the formula in float64, torch's own reductions, rows without labels; Triton against both.

The Triton path's products are counted, so that no gradient is computed which nobody asked for, and its tensors are
measured, so that all logits never exist at once.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import LinearCrossEntropy, cross_entropy, linear_cross_entropy
from aligngpt_kernels.cross_entropy import chunk_rows, row_tile, sums_apart
from aligngpt_kernels.dispatch import Impl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def inputs(rows: int, supervised: int, ignore_index: int = -100, vocabulary: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[labels == ignore_index] = (ignore_index + 1) % vocabulary
    labels[torch.randperm(rows)[supervised:]] = ignore_index
    return hidden, weight, labels


def by_formula(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, smoothing: float) -> Tensor:
    log_p = (hidden @ weight.T).log_softmax(-1)
    chosen = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels == ignore_index, 0.0, -(1 - smoothing) * chosen - smoothing * log_p.mean(-1))


@pytest.mark.parametrize(("rows", "supervised"), [(8, 8), (13, 4), (1, 1), (5, 0), (0, 0)])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("with_rows", [False, True], ids=["all rows", "rows"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients(rows, supervised, reduction, with_rows, ignore_index, smoothing):
    hidden, weight, labels = inputs(rows, supervised, ignore_index)
    index = (labels != ignore_index).nonzero()[:, 0] if with_rows else None
    loss, each = linear_cross_entropy(
        hidden, weight, labels,
        rows=index, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing,
    )  # fmt: skip
    want_each = by_formula(hidden, weight, labels, ignore_index, smoothing)
    want = {"sum": want_each.sum(), "mean": want_each.sum() / max(supervised, 1), "none": want_each}[reduction]
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(each, want_each.detach(), rtol=1e-13, atol=1e-13)
    assert not each.requires_grad
    up = torch.randn_like(loss)
    got_grads = torch.autograd.grad(loss, (hidden, weight), up)
    want_grads = torch.autograd.grad(want, (hidden, weight), up)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


def test_fault_36_all_labels_ignored_is_a_zero_and_not_a_nan():
    hidden, weight, labels = inputs(5, 0)
    loss, _ = linear_cross_entropy(hidden, weight, labels, reduction="mean")
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_mean_is_torchs():
    hidden, weight, labels = inputs(13, 4)
    for smoothing in (0.0, 0.2):
        loss, _ = linear_cross_entropy(hidden, weight, labels, reduction="mean", label_smoothing=smoothing)
        torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels, label_smoothing=smoothing))


def test_bfloat16_takes_its_softmax_in_float32():
    """Within 2 × the error of bfloat16 logits, far below that of a bfloat16 softmax; non-contiguous weight."""
    hidden, weight, labels = inputs(64, 40, vocabulary=5000)
    low_hidden, low_weight = hidden.detach().bfloat16(), weight.detach().T.contiguous().T.bfloat16()
    loss, each = linear_cross_entropy(low_hidden, low_weight, labels)
    exact = by_formula(low_hidden.double(), low_weight.double(), labels, -100, 0.0)
    plain = F.cross_entropy((low_hidden @ low_weight.T).float(), labels, reduction="none")
    assert (loss.dtype, each.dtype) == (torch.float32, torch.float32)
    assert (each - exact).abs().max() <= 2 * (plain - exact).abs().max()


TRITON_SHAPES = {  # rows, supervised, vocabulary, width; what they cover
    "aligned": (16, 8, 128, 64),
    "ragged": (13, 5, 37, 5),
    "one row": (1, 1, 33, 8),
    "one word": (3, 2, 1, 4),
    "nothing supervised": (7, 0, 37, 8),
    "no rows": (0, 0, 37, 8),
}
WAYS = {  # reduction, with rows, ignore_index, label_smoothing
    "sum of rows": ("sum", True, -100, 0.0),
    "sum of rows, smoothed": ("sum", True, 3, 0.1),
    "sum": ("sum", False, -100, 0.1),
    "mean of rows": ("mean", True, -100, 0.1),
    "mean": ("mean", False, 3, 0.0),
    "each of rows": ("none", True, -100, 0.0),
    "each of rows, smoothed": ("none", True, 3, 0.1),
    "each": ("none", False, 3, 0.3),
}


def problem(
    shape: tuple[int, int, int, int], device: str, with_rows: bool = True, ignore_index: int = -100
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """hidden and weight with gradients, the rest of the call; logits of variance 1, rows named in no order."""
    num_rows, supervised, vocabulary, width = shape
    hidden = torch.randn(num_rows, width, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).requires_grad_()
    labels = torch.randint(0, vocabulary, (num_rows,))
    rows = torch.randperm(num_rows)[:supervised]
    if vocabulary > ignore_index + 1:
        labels[labels == ignore_index] = ignore_index + 1
    others = torch.ones(num_rows, dtype=torch.bool).index_fill(0, rows, False)
    labels[others] = ignore_index
    rest = {"labels": labels.to(device), "rows": rows.to(device) if with_rows else None, "ignore_index": ignore_index}
    return hidden, weight, rest


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda rows: monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: rows)


def run(hidden: Tensor, weight: Tensor, *, needs: tuple[bool, bool] = (True, True), **call: Any) -> list[Tensor]:
    """Loss, token losses, and the gradients that are needed, by Triton."""
    inputs = [t.detach().requires_grad_(need) for t, need in zip((hidden, weight), needs, strict=True)]
    loss, each = linear_cross_entropy(*inputs, **call, impl="triton")
    trained = [t for t in inputs if t.requires_grad]
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view_as(loss)
    return [loss.detach(), each, *torch.autograd.grad(loss, trained, upstream)]


@pytest.fixture
def compare(device: str, as_exact_as_torch: Callable[..., list[Tensor]]) -> Callable[..., None]:
    """`as_exact_as_torch` on the worst of eight calls: a loss is one number, and torch's own may be exact by luck."""

    def run(shape: tuple[int, int, int, int], way: str, dtype: torch.dtype, *, weight_trains: bool = True) -> None:
        reduction, with_rows, ignore_index, smoothing = WAYS[way]
        problems = [problem(shape, device, with_rows, ignore_index) for _ in range(8)]

        def calls(hidden: Tensor, weight: Tensor, impl: Impl) -> tuple[Tensor, Tensor]:
            results = [
                linear_cross_entropy(h, weight, **rest, reduction=reduction, label_smoothing=smoothing, impl=impl)
                for h, (_, _, rest) in zip(hidden, problems, strict=True)
            ]
            return torch.stack([loss for loss, _ in results]), torch.stack([each for _, each in results])

        hidden = torch.stack([hidden for hidden, _, _ in problems]).detach().requires_grad_()
        as_exact_as_torch(calls, [hidden, problems[0][1].detach().requires_grad_(weight_trains)], dtype)

    return run


@pytest.mark.parametrize("shape", TRITON_SHAPES.values(), ids=TRITON_SHAPES)
@pytest.mark.parametrize("way", ["sum of rows, smoothed", "each of rows"])
def test_fault_41_triton_is_as_exact_as_torch(shape, way, dtype, compare):
    compare(shape, way, dtype)


@pytest.mark.parametrize("chunk", [100, 4], ids=["one chunk", "two chunks"])  # the second of one row or two
@pytest.mark.parametrize("way", WAYS)
def test_fault_41_every_way_and_chunk(way, chunk, dtype, compare, chunks_of):
    chunks_of(chunk)
    compare((6, 5, 37, 8), way, dtype)


@pytest.mark.parametrize("way", WAYS)
def test_fault_41_in_bfloat16(way, compare):
    """One chunk: none of its kernels has a dot, so that Triton's interpreter is right too."""
    compare((6, 5, 300, 16), way, torch.bfloat16)


@pytest.mark.parametrize("way", ["sum of rows", "each of rows, smoothed"])
def test_fault_41_a_row_larger_than_a_programs_block(way, dtype, compare):
    vocabulary = 2 * row_tile(10**6).block_v + 37
    compare((3, 2, vocabulary, 4), way, dtype, weight_trains=False)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("case", ["all ignored", "no rows named", "no rows"])
def test_fault_36_without_labels_triton_gives_zeros(case, reduction, dtype, device):
    hidden, weight, rest = problem((0 if case == "no rows" else 5, 0, 37, 8), device, case == "no rows named")
    for result in run(hidden.to(dtype), weight.to(dtype), **rest, reduction=reduction, label_smoothing=0.1):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("chunk", [100, 2], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_fault_40_views_and_far_rows(reduction, chunk, dtype, device, chunks_of):
    """Strided, transposed and expanded arguments, and rows at the end of 2^31 elements, give what plain ones give."""
    hidden, weight, rest = problem((9, 5, 37, 5), device)
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    chunks_of(chunk)
    call = {**rest, "reduction": reduction, "label_smoothing": 0.1}
    want = run(hidden, weight, **call)

    def far(plain: Tensor) -> Tensor:
        untouched = torch.empty(2**31, dtype=dtype, device=device)
        return untouched[-plain.numel() :].view(plain.shape).copy_(plain)

    def far_apart(plain: Tensor) -> Tensor:
        stride = 2**31 // plain.shape[0]
        rows = torch.empty(2**31, dtype=dtype, device=device).as_strided(plain.shape, (stride, 1))
        return rows.copy_(plain)

    views = {
        "transposed": lambda t: t.T.contiguous().T,
        "strided": lambda t: t.repeat(1, 2)[:, : t.shape[1]],
        "no adjacent elements": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "far": far,
        "far apart": far_apart,
    }
    for name, view in views.items():
        for got, expected in zip(run(view(hidden), view(weight), **call), want, strict=True):
            torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")
    strided = {name: t.repeat_interleave(2)[::2].int() for name, t in rest.items() if isinstance(t, Tensor)}
    for got, expected in zip(run(hidden, weight, **{**call, **strided}), want, strict=True):
        assert torch.equal(got, expected)
    same = run(hidden[:1].expand(9, 5), weight, **call)
    for got, expected in zip(same, run(hidden[:1].repeat(9, 1), weight, **call), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_a_row_named_twice_counts_twice(reduction, device, as_exact_as_torch):
    hidden, weight, rest = problem((29, 25, 37, 8), device)
    rest["rows"] = rest["rows"].repeat(2)
    as_exact_as_torch(partial(linear_cross_entropy, **rest, reduction=reduction), [hidden, weight], torch.float32)


@pytest.mark.parametrize("label", [-1, 37, 2**40])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_fault_40_a_label_that_is_no_word_is_a_nan(label, reduction, device):
    """And no read out of bounds; other rows keep their losses and gradients."""
    hidden, weight, rest = problem((6, 4, 37, 5), device)
    _, plain, plain_grad, _ = run(hidden, weight, **rest, reduction=reduction)
    bad, good = rest["rows"][0], rest["rows"][1:]
    rest["labels"][bad] = label
    loss, each, grad, grad_weight = run(hidden, weight, **rest, reduction=reduction)
    assert loss.isnan().any()
    assert each.isnan().nonzero().tolist() == [[bad]]
    assert torch.equal(each[good], plain[good])
    assert grad[bad].isnan().all()
    assert torch.equal(grad[good], plain_grad[good])
    assert grad_weight.isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy speaks of them
def test_numbers_that_overflow_are_torchs(device):
    """Large logits are exact, an infinite or absent one gives NaN or infinity where torch does."""
    weight = torch.eye(4, device=device)
    inf, nan = float("inf"), float("nan")
    hidden = torch.tensor([[1e4, 0, -1e4, 9990], [0, inf, 0, 0], [nan, 0, 0, 0], [-3e38, 3e38, 0, 0]], device=device)
    logits, labels = hidden.clone(), torch.tensor([3, 0, 1, 0], device=device)
    logits[1] = torch.tensor([nan, inf, nan, nan])  # 0 × inf
    logits[2] = nan
    each = linear_cross_entropy(hidden, weight, labels, reduction="none", impl="triton")[1]
    torch.testing.assert_close(each, F.cross_entropy(logits, labels, reduction="none"), equal_nan=True)


class _Recorded(TorchDispatchMode):
    """Counts matrix products, and remembers the most numbers that a tensor of any operator holds."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[torch.Size] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append(result.shape)
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() // t.element_size() for t in tensors)])
        return result


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Recorded]:
    """The products by torch and those by `weight_grad`, as the shapes of their results."""
    mode = _Recorded()
    plain = cross_entropy.weight_grad

    def counted(grad: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        result = plain(grad, x, **options)
        mode.products.append(result[0].shape)
        return result

    monkeypatch.setattr(cross_entropy, "weight_grad", counted)
    with mode:
        yield mode


@pytest.mark.parametrize("chunk", [100, 4], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_required_are_computed(
    needs, reduction, chunk, dtype, device, chunks_of, monkeypatch
):
    """Counted: one product of logits a chunk (two for "none" with a backward), and one a chunk for each gradient."""
    hidden, weight, rest = problem((13, 8, 37, 5), device)
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    want = dict(zip((True, True, "hidden", "weight"), run(hidden, weight, **rest, reduction=reduction), strict=True))
    chunks_of(chunk)
    sizes = [min(chunk, 8 - start) for start in range(0, 8, chunk)]
    logits = [(size, 37) for size in sizes]
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    with recorded(monkeypatch) as mode:
        loss, _ = linear_cross_entropy(hidden, weight, **rest, reduction=reduction, impl="triton")
        if reduction == "none" or not any(needs):
            assert sorted(mode.products) == sorted(logits)
        if any(needs):
            loss.backward(torch.linspace(0.5, 1.5, loss.numel(), device=device).view_as(loss))
    grads = [(size, 5) for size in sizes] * needs[0] + [(37, 5) for _ in sizes] * needs[1]
    again = logits if reduction == "none" and any(needs) else []
    assert sorted(mode.products) == sorted(logits + again + grads)
    for tensor, name, need in ((hidden, "hidden", needs[0]), (weight, "weight", needs[1])):
        assert (tensor.grad is not None) == need
        if need:
            torch.testing.assert_close(tensor.grad, want[name])


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_without_grad_nothing_but_logits_is_computed(reduction, device, chunks_of, monkeypatch):
    hidden, weight, rest = problem((13, 8, 37, 5), device)
    chunks_of(4)
    for context in (torch.no_grad, torch.inference_mode):
        with recorded(monkeypatch) as mode, context():
            loss, _ = linear_cross_entropy(hidden, weight, **rest, reduction=reduction, impl="triton")
        assert mode.products == [(4, 37), (4, 37)]
        assert not loss.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_all_logits_never_exist_at_once(reduction, dtype, device, chunks_of, monkeypatch):
    """No tensor, forward or backward, is larger than the hidden rows, a quarter of the logits."""
    hidden, weight, rest = problem((128, 128, 64, 16), device, with_rows=False)
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    chunks_of(16)
    with recorded(monkeypatch) as mode:
        loss, _ = linear_cross_entropy(hidden, weight, **rest, reduction=reduction, impl="triton")
        loss.sum().backward()
    assert mode.largest == hidden.numel() == 128 * 64 // 4


def test_chunks_are_few_equal_and_bounded():
    assert chunk_rows(2458, 32_000, 4096, 2) >= 2458  # 15 % of 16,384 rows: one product for all
    for num_rows in (0, 1, 100, 2560, 2561, 16_384, 1_000_000):
        for vocabulary, width in ((32_000, 4096), (128_256, 4096), (151_936, 896), (11, 6), (2_000_000, 1)):
            for element_bytes in (2, 4):
                rows = chunk_rows(num_rows, vocabulary, width, element_bytes)
                limit = max(163_840_000, vocabulary * width * element_bytes // 2) // (vocabulary * element_bytes)
                assert 1 <= rows <= limit
                assert -(-num_rows // rows) == -(-num_rows // (limit // 128 * 128 or limit))
                assert rows >= num_rows or rows % 128 == 0 or limit < 128
    assert not sums_apart(2458, 32_000, 4096, torch.bfloat16)
    assert sums_apart(2561, 32_000, 4096, torch.bfloat16)
    assert sums_apart(1, 32_000, 4096, torch.float16)


@pytest.mark.parametrize("vocabulary", [1, 37, 4096, 4097, 128_256])
def test_a_thread_of_the_row_kernel_holds_at_most_16_columns(vocabulary):
    tile = row_tile(vocabulary)
    assert tile.block_v >= min(vocabulary, 4096)
    assert tile.block_v <= 16 * 32 * tile.num_warps
    assert tile.num_warps in (1, 2, 4, 8)


def test_a_second_backward_gives_the_same(device):
    hidden, weight, rest = problem((13, 8, 37, 5), device)
    for reduction in ("sum", "mean", "none"):
        loss, _ = linear_cross_entropy(hidden, weight, **rest, reduction=reduction, impl="triton")
        loss = loss.sum()
        first = torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, 3), retain_graph=True)
        for scale in (3, 0):
            again = torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, scale), retain_graph=True)
            for one, other in zip(first, again, strict=True):
                assert torch.equal(other, one if scale else torch.zeros_like(one))


def test_float16_gradients_survive_a_large_sum_and_a_loss_scale(device):
    """A sum above 65,504 that "mean" brings back into range, and probabilities that are 0 once divided by the rows."""
    hidden = torch.full((64, 4), 3000.0, dtype=torch.float16, device=device)
    weight = torch.zeros(16, 4, dtype=torch.float16, device=device, requires_grad=True)
    labels = torch.zeros(64, dtype=torch.long, device=device)
    loss, _ = linear_cross_entropy(hidden, weight, labels, reduction="mean", impl="triton")
    (grad,) = torch.autograd.grad(loss, weight)
    want = torch.full_like(weight, 3000 / 16)
    want[0] = -3000 * 15 / 16
    torch.testing.assert_close(grad, want)

    weight.data[0] = 3.5  # times the four columns: the other words have a probability of e^-14, 8e-7
    loss, _ = linear_cross_entropy(torch.ones_like(hidden), weight, labels, reduction="mean", impl="triton")
    (grad,) = torch.autograd.grad(65_536 * loss, weight)
    want = weight.new_full((15, 4), 65_536 / (math.exp(14) + 15))
    torch.testing.assert_close(grad[1:], want, rtol=2**-24 / 2 / 8e-7 + 2**-10, atol=0)  # the least float16 is 2^-24


@pytest.mark.parametrize("chunk", [100, 3], ids=["one chunk", "chunks"])
def test_two_calls_give_the_same_bits(chunk, dtype, device, chunks_of):
    hidden, weight, rest = problem((29, 13, 37, 24), device)
    chunks_of(chunk)
    for reduction in ("sum", "mean", "none"):
        call = partial(run, hidden.to(dtype), weight.to(dtype), **rest, reduction=reduction, label_smoothing=0.1)
        for one, other in zip(call(), call(), strict=True):
            assert torch.equal(one, other)


def test_triton_never_waits_for_the_device(no_sync, device, chunks_of):
    hidden, weight, rest = problem((13, 8, 37, 5), device)
    chunks_of(3)
    with no_sync():
        for reduction in ("sum", "mean", "none"):
            loss, _ = linear_cross_entropy(hidden, weight, **rest, reduction=reduction, impl="triton")
            loss.sum().backward()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_a_linear_layer(low, reduction, device):
    """Equal to a call in the low dtype; gradients come back in the dtype of the parameters."""
    hidden, weight, rest = problem((13, 8, 37, 16), device)
    with torch.autocast(device, low):
        got = run(hidden, weight, **rest, reduction=reduction)
    want = run(hidden.to(low), weight.to(low), **rest, reduction=reduction)
    for one, other, dtype in zip(got, want, [torch.float32] * 4, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize(
    ("chunk", "with_rows", "needs"),
    [(100, True, (True, True)), (3, True, (True, True)), (3, False, (False, True)), (100, False, (True, False))],
)
def test_operators_are_registered_right(chunk, with_rows, needs, device, chunks_of):
    hidden, weight, rest = problem((7, 5, 37, 5), device, with_rows)
    labels, rows = rest["labels"], rest["rows"]
    rest = (labels if rows is None else labels[rows], rows, -100, 0.1)
    plain = [t.detach() for t in (hidden, weight)]
    inputs = [t.detach().requires_grad_(need) for t, need in zip(plain, needs, strict=True)]
    chunks_of(chunk)
    ops, check = torch.ops.aligngpt, torch.library.opcheck
    check(ops.linear_cross_entropy_sum.default, (*inputs, *rest, *needs))
    _, _, *kept = cross_entropy._launch_sum(*plain, *rest, *needs)
    factor, grad = torch.tensor(2.0, device=device), torch.randn(7, device=device)
    check(ops.linear_cross_entropy_sum_backward.default, (factor, *kept, rows, 7, list(needs)))
    check(ops.linear_cross_entropy_each.default, (*inputs, *rest))
    check(ops.linear_cross_entropy_each_backward.default, (grad, *plain, *rest, list(needs)))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_whole_equals_eager(reduction, dynamic, device):
    """Then again with other numbers of rows, and under autocast."""

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden, weight, labels, rows=rows, reduction=reduction, impl="triton")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape, autocast in (((13, 8, 37, 5), False), ((17, 6, 37, 5), False), ((17, 6, 37, 5), True)):
        hidden, weight, rest = problem(shape, device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            results = [f(hidden, weight, rest["labels"], rest["rows"]) for f in (step, compiled)]
        grads = [torch.autograd.grad(loss.sum(), (hidden, weight)) for loss, _ in results]
        for one, other in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
            assert torch.equal(one, other)
    torch._dynamo.reset()


def test_module_is_the_function_with_its_weight(device):
    hidden, weight, rest = problem((13, 8, 37, 5), device)
    parameter = torch.nn.Parameter(weight.detach())
    ignore_index = rest.pop("ignore_index")
    for reduction in ("sum", "mean", "none"):
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": 0.1, "impl": "triton"}
        module = LinearCrossEntropy(parameter, **options)
        assert dict(module.named_parameters()) == {"weight": parameter}
        for got, want in zip(
            module(hidden, **rest), linear_cross_entropy(hidden, weight, **rest, **options), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 4)}, r"hidden has shape \(1, 3, 4\); it needs \(R, D\)"),
        ({"labels": torch.zeros(2).long()}, r"labels has shape \(2,\); it needs \(3,\)"),
        ({"weight": torch.zeros(5, 4).half()}, "weight is torch.float16; linear_cross_entropy needs torch.float32"),
        ({"rows": torch.ones(3).bool()}, "rows is torch.bool; linear_cross_entropy needs int32 or int64"),
        ({"reduction": "avg"}, "reduction is 'avg'; linear_cross_entropy needs"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; linear_cross_entropy needs 0 to 1"),
    ],
)
def test_refusals(change, message):
    call = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**call, **change})
