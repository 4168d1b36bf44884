"""project_and_inject on Triton: its rows, dots and gradients against float64, whatever the batch."""

from functools import partial

import pytest
import torch
from aligngpt_kernels import injection_plan, project_and_inject, project_inject

IMAGE, ALIGN, VOCABULARY = 40, 41, 40
CASES = {  # sequences as `conftest.sequence` writes them, rows of an image, (in_dim, hidden, width); what it covers
    "aligned": ([(4, "i", 2), (3, "i", 3)], 16, (16, 32, 64)),
    "ragged, several images, text only": ([(1, "i"), (9,), ("i", 2, "i", 4), ("i", "i", "i")], 3, (7, 19, 37)),
    "rows of whole descriptors, ragged": ([(2, "i", "i"), ("i", 1)], 5, (24, 40, 72)),
    "larger than a block": ([("i", 3), (1, "i", "i")], 45, (16, 24, 136)),
    "one row": ([("i",)], 1, (8, 16, 8)),
    "no image": ([(5,), (2,)], 4, (8, 16, 24)),
}


def case_of(name: str, sequence, device: str = "cpu", spare_images: int | None = None):
    """Ids, plan, and inputs in the order of the op's floating arguments."""
    parts, rows, (in_dim, hidden, width) = CASES[name]
    sequences = [sequence(*p, rows=rows) for p in parts]
    ids = torch.cat(sequences).to(device)
    spans = torch.tensor([0, *map(len, sequences)], device=device).cumsum(0)
    images, samples = sum(p.count("i") for p in parts), sum("i" in p for p in parts)
    sizes = {}
    if spare_images is not None:
        sizes = {"num_image_rows": (images + spare_images) * rows, "num_samples": samples}
    plan = injection_plan(ids, image_token_id=IMAGE, align_token_id=ALIGN, cu_seqlens=spans, **sizes)
    shapes = (images, rows, in_dim), (hidden, in_dim), (hidden,), (width, hidden), (width,)
    shapes = (*shapes, (VOCABULARY, width), (samples, width))
    scales = 1, in_dim**-0.5, 1, hidden**-0.5, 1, 1, 1
    inputs = [(torch.randn(s) * scale).requires_grad_() for s, scale in zip(shapes, scales, strict=True)]
    return ids, plan, inputs


def op(features, w1, b1, w2, b2, embed, mean, *, ids, **options):
    return project_and_inject(features, w1, b1, w2, b2, ids, embed, mean, **options)


@pytest.mark.parametrize("case", CASES)
def test_fault_41_triton_against_float64(case, dtype, device, laid_out, sequence, as_exact_as_torch):
    ids, plan, inputs = case_of(case, sequence, device)
    as_exact_as_torch(partial(op, ids=ids, plan=plan, embed_scale=1.5), inputs, dtype)


@pytest.mark.parametrize("spare_images", [1, -1], ids=["plan with room", "plan too small"])
def test_fault_41_plan_of_another_size(spare_images, device, laid_out, sequence):
    """Rows the plan has no place for are not written, and NaN stands where it has no row."""
    case = "ragged, several images, text only"
    ids, plan, inputs = case_of(case, sequence, device, spare_images)
    inputs = [t.detach().to(device).requires_grad_() for t in inputs]
    runs = []
    for impl in ("triton", "reference"):
        out, dots = op(*inputs, ids=ids, plan=plan, impl=impl)
        torch.manual_seed(0)
        loss = (out.nan_to_num() * torch.randn_like(out)).sum() + (dots * torch.randn_like(dots)).sum()
        runs.append([out, dots, *torch.autograd.grad(loss, inputs)])
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_fault_40_fewer_features_than_planned(device, laid_out, sequence):
    ids, plan, inputs = case_of("ragged, several images, text only", sequence, device)
    inputs = [t.detach().to(device) for t in inputs]
    whole, _ = op(*inputs, ids=ids, plan=plan, impl="triton")
    inputs[0] = inputs[0][:-1]
    got, dots = op(*inputs, ids=ids, plan=plan, impl="triton")
    want, want_dots = op(*inputs, ids=ids, plan=plan, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(dots, want_dots, rtol=1e-4, atol=1e-4)
    assert got.isnan().any()
    assert not whole.isnan().any()


def test_fault_40_embedding_rows_past_two_to_the_31_elements(dtype, device, laid_out):
    """Text from the last rows of a table that nobody else touches."""
    width, near = 64, 8
    vocabulary = (1 << 31) // width + near
    embed = torch.empty(vocabulary, width, dtype=dtype, device=device)
    embed[-near:] = torch.randn(near, width)
    shapes = (1, 3, 16), (32, 16), (32,), (width, 32), (width,), (1, width)
    *projector, mean = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    ids = torch.tensor([1, near + 1, 5, *[near] * 3, 7], device=device)
    results = []
    for table, first in ((embed[-near:], 0), (embed, vocabulary - near)):
        plan = injection_plan(ids + first, image_token_id=near + first, align_token_id=near + 1 + first)
        results.append(op(*projector, table, mean, ids=ids + first, plan=plan, impl="triton"))
    assert all(map(torch.equal, *results))


def test_fault_40_odd_inputs(dtype, device, laid_out, sequence, as_exact_as_torch):
    """Transposed and strided arguments."""
    ids, plan, inputs = case_of("rows of whole descriptors, ragged", sequence, device)

    def of_odd(features, w1, b1, w2, b2, embed, mean, **options):
        odd = [
            features.transpose(0, 1).contiguous().transpose(0, 1),
            w1.T.contiguous().T,
            b1.repeat_interleave(2)[::2],
            w2.T.contiguous().T,
            b2.repeat_interleave(3)[::3],
            embed.T.contiguous().T,
            mean.repeat(1, 2)[:, :72],
        ]
        return op(*odd, ids=torch.stack([ids, ids], 1)[:, 0], plan=plan, **options)

    as_exact_as_torch(of_odd, inputs, dtype)


def test_float32_text_mean_beside_16_bit_weights(device, laid_out, sequence):
    ids, plan, inputs = case_of("aligned", sequence, device)
    args = [t.detach().to(device, torch.float16).requires_grad_() for t in inputs[:-1]]
    args.append(inputs[-1].detach().to(device).requires_grad_())
    results = []
    for impl in ("triton", "reference"):
        out, dots = op(*args, ids=ids, plan=plan, impl=impl)
        results.append([out, dots, *torch.autograd.grad(out.float().sum() + dots.sum(), args)])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


def test_fault_41_bit_equal_and_without_waiting(device, dtype, laid_out, sequence, no_sync):
    ids, plan, inputs = case_of("ragged, several images, text only", sequence, device)
    inputs = [t.detach().to(device, dtype).requires_grad_() for t in inputs]
    runs = []
    for _ in range(2):
        with no_sync():
            out, dots = op(*inputs, ids=ids, plan=plan, impl="triton")
            upstream = [torch.ones_like(out), torch.ones_like(dots)]
            runs.append([out, dots, *torch.autograd.grad([out, dots], inputs, upstream)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_align_rows_may_be_written_in_place(device, sequence):
    """H is put into the embeddings after the dots are known; the backward reads none of them."""
    ids, plan, inputs = case_of("rows of whole descriptors, ragged", sequence, device)
    grads = []
    for impl in ("triton", "reference"):
        args = [t.detach().to(device).requires_grad_() for t in inputs]
        out, dots = op(*args, ids=ids, plan=plan, impl=impl)
        out.index_copy_(0, plan.align_place.long(), dots.sum(1, keepdim=True).expand(-1, out.shape[1]))
        grads.append(torch.autograd.grad(out.square().sum(), args))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("trained", [[0], [5], [5, 6], [1, 2, 3, 4], [4, 6], [3, 5]])
def test_fault_41_only_the_gradients_that_are_needed(trained, device, sequence, as_exact_as_torch):
    ids, plan, inputs = case_of("aligned", sequence, device)
    inputs = [t.requires_grad_(i in trained) for i, t in enumerate(inputs)]
    as_exact_as_torch(partial(op, ids=ids, plan=plan), inputs, torch.float32)


@pytest.mark.parametrize("case", ["rows of whole descriptors, ragged", "no image"])
def test_fault_41_operator_and_compiled(case, device, sequence):
    ids, plan, inputs = case_of(case, sequence, device)
    args = [t.detach().to(device).requires_grad_() for t in inputs]
    rows = args[0].shape[1]
    features, *rest = args
    sample = plan.image_sample(rows)
    indices = plan.source, plan.image_place, plan.align_place, sample
    call = (features.detach().flatten(0, 1), *rest[:4], ids, *rest[4:], *indices, rows, 1.5, True)
    torch.library.opcheck(torch.ops.aligngpt.project_and_inject.default, call)
    for impl in ("triton", "auto"):
        f = partial(op, ids=ids, plan=plan, impl=impl)
        got, want = torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        up = [torch.randn_like(t) for t in want]
        grads = zip(torch.autograd.grad(got, args, up), torch.autograd.grad(want, args, up), strict=True)
        assert all(torch.equal(g, w) for g, w in grads)


def test_auto_runs_the_parts_by_their_own_choice(device, sequence, monkeypatch):
    """Where the fused stage is not taken, its parts still may be; "reference" means the reference of each."""
    ids, plan, inputs = case_of("aligned", sequence, device)
    called = []
    for name in ("fused_projector", "inject"):
        part = getattr(project_inject, name)
        monkeypatch.setattr(
            project_inject, name, lambda *a, n=name, f=part, **k: called.append((n, k["impl"])) or f(*a, **k)
        )
    args = [t.detach().to(device) for t in inputs]
    monkeypatch.setattr(project_inject, "use_triton", lambda *_, **__: False)
    got = op(*args, ids=ids, plan=plan)
    want = op(*args, ids=ids, plan=plan, impl="reference")
    assert called == [(name, impl) for impl in ("auto", "reference") for name in ("fused_projector", "inject")]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
