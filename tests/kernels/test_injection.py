"""inject and project_and_inject against a loop over tokens in float64, values and every gradient; each implementation.

`inject` moves rows: whatever the implementation and the dtype, its values are equal bit for bit.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import embedding, fused_projector, inject, injection, injection_plan, project_and_inject
from aligngpt_kernels.embedding import embedding_grad
from torch import Tensor

IMAGE, ALIGN, VOCABULARY, ROWS, WIDTH = 40, 41, 40, 3, 8
plan_of = partial(injection_plan, image_token_id=IMAGE, align_token_id=ALIGN)

CASES = {  # sequences as `conftest.sequence` writes them
    "aligned": [(4, "i", 2), (3, "i", 3)],
    "ragged, several images, text only": [(1, "i"), (9,), ("i", 2, "i", 4), ("i", "i", "i")],
    "no image": [(5,), (2,)],
    "one row": [(0,)],
}


def one_by_one(ids: Tensor, embed: Tensor, image_rows: Tensor, align_rows: Tensor, scale: float) -> Tensor:
    """The meaning of inject, for ids given as a list of sequences: a row at a time."""
    images, aligns = iter(image_rows.flatten(0, 1)), iter(align_rows)
    rows = [
        next(images) if token == IMAGE else next(aligns) if token == ALIGN else embed[token] * scale
        for token in ids.flatten().tolist()
    ]
    return torch.stack(rows).view(*ids.shape, -1)


def batch(case: str, layout: str, sequence) -> tuple[Tensor, dict, int, int]:
    parts = CASES[case]
    sequences = [sequence(*p, rows=ROWS) for p in parts]
    images, samples = sum(p.count("i") for p in parts), sum("i" in p for p in parts)
    if layout == "packed":
        lengths = torch.tensor([0, *map(len, sequences)])
        return torch.cat(sequences), {"cu_seqlens": lengths.cumsum(0)}, images, samples
    longest = max(map(len, sequences))
    pads = [torch.zeros(longest - len(s), dtype=torch.long) for s in sequences]
    pairs = [(p, s) if layout == "padded left" else (s, p) for s, p in zip(sequences, pads, strict=True)]
    return torch.stack([torch.cat(pair) for pair in pairs]), {}, images, samples


both = pytest.mark.parametrize("impl", ["reference", "triton"])


def weights(images: int, samples: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (VOCABULARY, WIDTH), (images, ROWS, WIDTH), (samples, WIDTH)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["packed", "padded right", "padded left"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "upper bound"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_values_and_gradients(case, layout, counted, scale, sequence):
    ids, spans, images, samples = batch(case, layout, sequence)
    sizes = {} if counted else {"num_image_rows": (images + 1) * ROWS, "num_samples": samples + 1}
    plan = plan_of(ids, **spans, **sizes)
    assert plan.exact is counted
    inputs = weights(images, samples, torch.float64)
    got = inject(ids, *inputs, plan=plan, embed_scale=scale)
    want = one_by_one(ids, *inputs, scale)
    assert torch.equal(got, want)
    upstream = torch.randn_like(want)
    got_grads = torch.autograd.grad(got, inputs, upstream)
    want_grads = torch.autograd.grad(want, inputs, upstream, allow_unused=True, materialize_grads=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 8])  # 7: rows that are no whole number of 64-bit words
def test_rows_are_moved_bit_for_bit(dtype, width, sequence):
    ids, spans, images, samples = batch("ragged, several images, text only", "packed", sequence)
    embed, image_rows, align_rows = (t.detach()[..., :width].to(dtype) for t in weights(images, samples))
    got = inject(ids, embed, image_rows, align_rows, plan=plan_of(ids, **spans))
    assert got.dtype == dtype
    assert torch.equal(got, one_by_one(ids, embed, image_rows, align_rows, 1.0))


def test_large_array_is_written_whole():
    """Above the size from which huge pages are asked for; the output is compared in full."""
    ids = torch.randint(0, VOCABULARY, (4, 600))
    ids[:, 1], ids[:, 10:586] = ALIGN, IMAGE
    image_rows, align_rows = torch.randn(4, 576, 4096), torch.randn(4, 4096)
    embed = torch.randn(VOCABULARY, 4096)
    got = inject(ids, embed, image_rows, align_rows, plan=plan_of(ids))
    assert torch.equal(got, one_by_one(ids, embed, image_rows, align_rows, 1.0))


@both
def test_non_contiguous_inputs(impl, sequence):
    ids, _, images, samples = batch("aligned", "padded right", sequence)
    embed, image_rows, align_rows = weights(images, samples)
    views = (
        embed.detach().T.contiguous().T,
        image_rows.detach().transpose(0, 1).contiguous().transpose(0, 1),
        align_rows.detach().repeat(1, 2)[:, ::2],
    )
    ids_view = ids.T.contiguous().T
    want = one_by_one(ids, views[0], views[1], views[2], 1.0)
    assert torch.equal(inject(ids_view, *views, plan=plan_of(ids_view), impl=impl), want)


@both
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "given"])
def test_missing_rows_are_nan_and_the_rest_is_right(impl, counted, sequence):
    """One image and one align row given of the two planned; then more than planned: the surplus has zero gradients."""
    ids, _, images, samples = batch("aligned", "padded right", sequence)
    plan = plan_of(ids, **({} if counted else {"num_image_rows": images * ROWS, "num_samples": samples}))
    embed, image_rows, align_rows = weights(images, samples)
    out = inject(ids, embed, image_rows[:1], align_rows[:1], plan=plan, impl=impl)
    whole = one_by_one(ids, embed, image_rows, align_rows, 1.0)
    missing = (plan.source >= ROWS) | (plan.source == -3)
    assert missing.sum() == ROWS + 1
    assert torch.equal(out.isnan().all(-1).flatten(), missing)
    assert torch.equal(out.flatten(0, 1)[~missing], whole.flatten(0, 1)[~missing])

    surplus = torch.cat([image_rows, image_rows]).detach().requires_grad_()
    inject(ids, embed, surplus, align_rows, plan=plan, impl=impl).sum().backward()
    assert surplus.grad is not None
    assert torch.equal(surplus.grad[images:], torch.zeros_like(image_rows))
    assert torch.equal(surplus.grad[:images], torch.ones_like(image_rows))


@both
def test_a_second_align_and_one_without_an_image_are_nan(impl):
    ids = torch.tensor([[1, ALIGN, ALIGN, IMAGE, IMAGE, IMAGE], [1, ALIGN, 2, 3, 4, 5]])
    out = inject(ids, *weights(1, 1), plan=plan_of(ids), impl=impl)
    assert out.isnan().all(-1).nonzero().tolist() == [[0, 2], [1, 1]]


@both
def test_fewer_planned_rows_than_image_tokens_are_nan_not_garbage(impl):
    ids = torch.tensor([1, ALIGN, *[IMAGE] * 6, 3])
    out = inject(ids, *weights(2, 1), plan=plan_of(ids, num_image_rows=ROWS, num_samples=1), impl=impl)
    assert out.isnan().all(-1).tolist() == [False] * 5 + [True] * 3 + [False]


@both
def test_no_sample_gives_zero_gradients_and_no_tokens_is_fine(impl):
    ids = torch.randint(2, VOCABULARY, (2, 5))
    embed, image_rows, align_rows = weights(2, 2)
    inject(ids, embed, image_rows, align_rows, plan=plan_of(ids), impl=impl).sum().backward()
    assert torch.equal(image_rows.grad, torch.zeros_like(image_rows))
    assert torch.equal(align_rows.grad, torch.zeros_like(align_rows))
    nothing = torch.empty(0, dtype=torch.long)
    out = inject(nothing, embed, image_rows, align_rows, plan=plan_of(nothing), impl=impl)
    out.sum().backward()
    assert out.shape == (0, WIDTH)


@both
def test_result_may_be_changed_in_place(impl, sequence):
    """Decoders do (`hidden *= scale`); a view out of a custom Function would refuse."""
    ids, _, images, samples = batch("aligned", "padded right", sequence)
    embed, image_rows, align_rows = weights(images, samples)
    inject(ids, embed, image_rows, align_rows, plan=plan_of(ids), impl=impl).mul_(2).sum().backward()
    assert torch.equal(image_rows.grad, torch.full_like(image_rows, 2))


@both
def test_no_wait_for_the_device(impl, sequence, no_sync):
    ids, spans, images, samples = batch("ragged, several images, text only", "packed", sequence)
    counted = plan_of(ids, **spans)
    inputs = weights(images, samples)
    with no_sync():
        given = plan_of(ids, **spans, num_image_rows=images * ROWS, num_samples=samples)
        for plan in (counted, given):
            inject(ids, *inputs, plan=plan, impl=impl).sum().backward()


@pytest.mark.parametrize("layout", ["packed", "padded right", "padded left"])
def test_one_launch_forward_and_one_backward(layout, sequence, count_launches):
    """A gradient of the table is another launch, over a table filled with zeros."""
    ids, spans, images, samples = batch("ragged, several images, text only", layout, sequence)
    plan = plan_of(ids, **spans)
    for trained in (False, True):
        embed, image_rows, align_rows = weights(images, samples)
        embed.requires_grad_(trained)
        with count_launches(injection, embedding) as launched:
            out = inject(ids, embed, image_rows, align_rows, plan=plan, impl="triton")
            assert launched == ["_inject_kernel"]
            out.sum().backward()
        assert launched[1:] == ["fill", "_run_sum_kernel"] * trained + ["_take_rows_kernel"]
        assert image_rows.grad is not None
        assert align_rows.grad is not None


def project_inputs(images: int, samples: int, in_dim: int = 5) -> list[Tensor]:
    shapes = (images, ROWS, in_dim), (6, in_dim), (6,), (WIDTH, 6), (WIDTH,), (VOCABULARY, WIDTH), (samples, WIDTH)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "upper bound"])
def test_project_and_inject_equals_its_parts(case, counted, sequence):
    ids, spans, images, samples = batch(case, "packed", sequence)
    sizes = {} if counted else {"num_image_rows": (images + 1) * ROWS, "num_samples": samples}
    plan = plan_of(ids, **spans, **sizes)
    inputs = project_inputs(images, samples)
    features, w1, b1, w2, b2, embed, mean = inputs
    out, dots = project_and_inject(features, w1, b1, w2, b2, ids, embed, mean, plan=plan, embed_scale=1.5)

    rows = fused_projector(features, w1, b1, w2, b2)
    want = one_by_one(ids, embed, rows, torch.zeros(samples, WIDTH, dtype=torch.float64), 1.5)
    owner = plan.image_sample(ROWS).tolist()[:images]
    each = [[rows[m] @ mean[s] for m in range(images) if owner[m] == s] for s in range(samples)]
    want_dots = torch.stack([sum(d) / len(d) for d in each]) if samples else rows.new_zeros(0, ROWS)
    torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dots, want_dots, rtol=1e-13, atol=1e-13)

    up, up_dots = torch.randn_like(out), torch.randn_like(dots)
    got_grads = torch.autograd.grad((out * up).sum() + (dots * up_dots).sum(), inputs)
    want_loss = (want * up).sum() + (want_dots * up_dots).sum()
    want_grads = torch.autograd.grad(want_loss, inputs, allow_unused=True, materialize_grads=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


def test_embedding_gradient_is_that_of_an_embedding():
    ids = torch.randint(0, VOCABULARY, (3, 11))
    embed, image_rows, align_rows = weights(0, 0, torch.float64)
    up = torch.randn(3, 11, WIDTH, dtype=torch.float64)
    (got,) = torch.autograd.grad(inject(ids, embed, image_rows, align_rows, plan=plan_of(ids)), embed, up)
    (want,) = torch.autograd.grad(F.embedding(ids, embed), embed, up)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


TRITON_WIDTHS = {"aligned": 64, "ragged": 37, "one column": 1, "wider than a program": 4100}


@pytest.mark.parametrize("width", TRITON_WIDTHS.values(), ids=TRITON_WIDTHS)
@pytest.mark.parametrize("layout", ["packed", "padded left"])
@pytest.mark.parametrize("case", CASES)
def test_fault_41_triton_moves_every_row_and_gradient(case, layout, width, dtype, device, sequence, as_exact_as_torch):
    ids, spans, images, samples = batch(case, layout, sequence)
    plan = plan_of(ids, **spans)
    shapes = (VOCABULARY, width), (images, ROWS, width), (samples, width)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    scale = 2.5 if layout == "packed" else 1.0
    got, *_ = as_exact_as_torch(partial(inject, ids, plan=plan, embed_scale=scale), inputs, dtype)
    want = inject(ids, *(t.detach().to(dtype) for t in inputs), plan=plan, embed_scale=scale, impl="reference")
    assert torch.equal(got, want)


def test_fault_40_a_token_outside_the_vocabulary_is_nan_and_leaves_the_table_alone():
    """An id that the reference would refuse, or read out of bounds on a GPU."""
    embed = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    ids = torch.tensor([1, VOCABULARY + 7, 2, -3, 2])
    out = inject(ids, embed, torch.randn(0, ROWS, WIDTH), torch.randn(0, WIDTH), plan=plan_of(ids), impl="triton")
    assert out.isnan().all(-1).tolist() == [False, True, False, True, False]
    (grad,) = torch.autograd.grad(out, embed, torch.ones_like(out))
    assert grad[:, 0].tolist() == [0, 1, 2] + [0] * (VOCABULARY - 3)


def test_fault_40_rows_far_beyond_2_to_the_31_elements():
    """The last rows of a table and of a gradient that nobody has touched: 32-bit offsets would fault or wrap."""
    vocabulary, width = 2**16 + 3, 2**15
    embed = torch.empty(vocabulary, width, dtype=torch.float16)
    embed[-1], embed[-2] = 1, 2
    ids = torch.tensor([vocabulary - 1, vocabulary - 2, vocabulary - 1])
    nothing = torch.empty(0, 1, width, dtype=torch.float16), torch.empty(0, width, dtype=torch.float16)
    out = inject(ids, embed, *nothing, plan=plan_of(ids), impl="triton")
    assert out[:, [0, -1]].tolist() == [[1, 1], [2, 2], [1, 1]]


def test_the_operator_is_registered_and_compiles(sequence):
    """Under `torch.compile`, with symbolic shapes and fake tensors: the same numbers as in eager mode, bit for bit."""
    ids, spans, images, samples = batch("ragged, several images, text only", "packed", sequence)
    plan, inputs = plan_of(ids, **spans), weights(images, samples)
    embed, image_rows, align_rows = inputs
    indices = plan.source, plan.image_place, plan.align_place
    torch.library.opcheck(
        torch.ops.aligngpt.inject.default, (ids, embed, image_rows.flatten(0, 1), align_rows, *indices, 1.5)
    )
    for impl in ("triton", "reference"):
        eager = partial(inject, ids, plan=plan, embed_scale=1.5, impl=impl)
        want, got = eager(*inputs), torch.compile(eager, fullgraph=True, backend="aot_eager")(*inputs)
        assert torch.equal(got, want)
        up = torch.randn_like(want)
        for got_grad, want_grad in zip(
            torch.autograd.grad(got, inputs, up), torch.autograd.grad(want, inputs, up), strict=True
        ):
            torch.testing.assert_close(got_grad, want_grad, rtol=1e-6, atol=1e-6)


def test_the_embedding_gradient_is_a_fixed_sum_whatever_the_order_of_tokens():
    """A run of equal ids longer than a block, ids without a gradient, and gradient rows that several tokens share."""
    token_ids = torch.tensor([3] * 40 + [7, -1, 9, 3, 0, 9])
    row = torch.arange(46) % 5
    grad_rows = torch.randn(5, 300)
    got = embedding_grad(grad_rows, row, token_ids, 8, torch.float32, scale=0.5)
    want = torch.zeros(10, 300, dtype=torch.float64)
    want.index_add_(0, token_ids % 10, grad_rows.double()[row] * 0.5)
    torch.testing.assert_close(got.double(), want[:8], rtol=1e-5, atol=1e-5)
    assert torch.equal(got, embedding_grad(grad_rows, row, token_ids, 8, torch.float32, scale=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_rows": torch.zeros(2, 3, 9)}, r"image_rows has shape \(2, 3, 9\); it needs \(images, rows, 8\)"),
        ({"align_rows": torch.zeros(2, 9)}, r"align_rows has shape \(2, 9\); it needs \(samples, 8\)"),
        ({"image_rows": torch.zeros(2, 3, 8).half()}, "image_rows is torch.float16; inject needs torch.float32"),
        ({"token_ids": torch.ones(2, 5, dtype=torch.long)}, "token_ids has 10 tokens; the plan was made for 8"),
        ({"token_ids": torch.ones(2, 4)}, "token_ids is torch.float32; inject needs int32 or int64"),
    ],
)
def test_refusals(change, message, device):
    ids = torch.ones(2, 4, dtype=torch.long)
    call = {"token_ids": ids, "embed_weight": torch.zeros(5, 8), "image_rows": torch.zeros(0, 3, 8)}
    call |= {"align_rows": torch.zeros(0, 8), **{name: tensor.to(device) for name, tensor in change.items()}}
    with pytest.raises(ValueError, match=message):
        inject(**call, plan=plan_of(ids))
