"""text_mean and align_gate: a loop over samples in float64, the oracle's arrays, and gradients in every mode."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import (
    KernelUnavailable,
    align_gate,
    embedding,
    gate,
    inject,
    injection_plan,
    project_and_inject,
    text_mean,
)
from aligngpt_kernels.dispatch import Chip, assume_chip
from safetensors.torch import load_file
from torch import Tensor

IMAGE, ALIGN, VOCABULARY, ROWS, WIDTH, LEVELS = 40, 41, 40, 3, 6, 5
ORACLE = Path(__file__).parents[1] / "data/oracle"
MODES = ["adaptive", "local", "global", "average"]
plan_of = partial(injection_plan, image_token_id=IMAGE, align_token_id=ALIGN)


def packed(sequence, *samples: tuple) -> tuple[list[Tensor], Tensor, dict]:
    sequences = [sequence(*parts, rows=ROWS) for parts in samples]
    return sequences, torch.cat(sequences), {"cu_seqlens": torch.tensor([0, *map(len, sequences)]).cumsum(0)}


def means_one_by_one(sequences: list[Tensor], embed: Tensor, masks: list[Tensor], scale: float) -> Tensor:
    means = []
    for ids, mask in zip(sequences, masks, strict=True):
        if IMAGE in ids:
            chosen = ids[mask & (ids < VOCABULARY)]
            means.append(embed[chosen].sum(0) * scale / (len(chosen) + 1e-8))
    return torch.stack(means) if means else embed[:0]


@pytest.mark.parametrize("masked", [False, True], ids=["all text", "gate_mask"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "upper bound"])
@pytest.mark.parametrize(
    "samples",
    [((4, "i", 2), (9,), ("i", 1, "i", 3), ("i",)), ((3,), (2,)), (("i", 2), ("i", 3))],
    ids=["ragged, text only, no text", "no image", "neighbours"],
)
def test_text_mean(samples, counted, masked, sequence, no_sync):
    sequences, ids, spans = packed(sequence, *samples)
    masks = [torch.rand(len(s)) < 0.5 if masked else torch.arange(len(s)) > 0 for s in sequences]
    embed = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    want = means_one_by_one(sequences, embed, masks, 1.5)
    sizes = {} if counted else {"num_image_rows": len(ids), "num_samples": len(want) + 1}
    plan = plan_of(ids, **spans, **sizes)
    with no_sync():
        got = text_mean(ids, embed, torch.cat(masks) if masked else None, plan, embed_scale=1.5)
        (got_grad,) = torch.autograd.grad(got.square().sum(), embed)
    torch.testing.assert_close(got[: len(want)], want, rtol=1e-13, atol=1e-13)
    assert not got[len(want) :].any()
    want_grad = torch.autograd.grad(want.square().sum(), embed, allow_unused=True, materialize_grads=True)[0]
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_mean_of_padded_rows_is_that_of_packed_ones(side, sequence):
    sequences, ids, spans = packed(sequence, (4, "i", 2), (9,), ("i", 1))
    embed = torch.randn(VOCABULARY, WIDTH)
    want = text_mean(ids, embed, None, plan_of(ids, **spans))
    rows, masks = [], []
    for s in sequences:
        pad = torch.zeros(20 - len(s), dtype=torch.long)
        mask = torch.arange(len(s)) > 0
        rows.append(torch.cat([pad, s] if side == "left" else [s, pad]))
        masks.append(torch.cat([pad.bool(), mask] if side == "left" else [mask, pad.bool()]))
    got = text_mean(torch.stack(rows), embed, torch.stack(masks), plan_of(torch.stack(rows)))
    torch.testing.assert_close(got, want)


def test_text_mean_sums_16_bit_rows_in_float32(sequence):
    """2000 equal rows: a bfloat16 sum would stop growing at 256."""
    ids = torch.cat([torch.tensor([1, ALIGN]), torch.full((2000,), 7), torch.full((ROWS,), IMAGE)])
    embed = torch.full((VOCABULARY, WIDTH), 1 / 3, dtype=torch.bfloat16)
    got = text_mean(ids, embed, None, plan_of(ids))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, embed[:1].float(), rtol=1e-6, atol=0)


def gate_inputs(images: int, samples: int) -> list[Tensor]:
    shapes = ((images, ROWS, WIDTH), (samples, WIDTH), (8, ROWS), (8,), (LEVELS - 1, 8), (LEVELS - 1,), (LEVELS, WIDTH))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def gate_one_by_one(args: list[Tensor], owner: list[int], mode: str) -> tuple[Tensor, Tensor]:
    image_rows, mean, w1, b1, w2, b2, table = args
    h, mixes = [table[:0]], [w2.T[:0]]  # empty, yet in the graph
    for s in range(mean.shape[0]):
        mine = [rows @ mean[s] for rows, of in zip(image_rows, owner, strict=True) if of == s]
        alpha = F.softmax(F.gelu(w1 @ torch.stack(mine).mean(0) + b1) @ w2.T + b2, 0)
        mix = {"global": 0 * alpha.detach(), "average": torch.full_like(alpha, 1 / (LEVELS - 1)).detach()}.get(
            mode, alpha
        )
        h.append((mix @ table[:-1] + (0 if mode == "local" else table[-1]))[None])
        mixes.append(mix[None])
    return torch.cat(h), torch.cat(mixes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("owner", [[0, 1], [0, 0, 1, 2, 2, 2], [0], [], [0, 1, -1]], ids=str)
def test_align_gate(mode, owner, no_sync):
    """Aligned; several images per sample; one sample; none; an image that belongs to no sample."""
    args = gate_inputs(len(owner), max(owner, default=-1) + 1)
    want, want_mix = gate_one_by_one(args, owner, mode)
    image_sample = torch.tensor(owner, dtype=torch.int32)
    with no_sync():
        h, mix = align_gate(*args, image_sample=image_sample, mode=mode)
    torch.testing.assert_close(h, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mix, want_mix, rtol=1e-12, atol=1e-12)
    up, up_mix = torch.randn_like(h), torch.randn_like(mix)
    got_grads = torch.autograd.grad((h * up).sum() + (mix * up_mix).sum(), args)
    want_loss = (want * up).sum() + (want_mix * up_mix).sum()
    want_grads = torch.autograd.grad(want_loss, args, allow_unused=True, materialize_grads=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-11, atol=1e-11)


def test_a_frozen_table_and_an_infinite_unused_weight():
    args = gate_inputs(1, 1)
    frozen, infinite = args[6].detach(), torch.full_like(args[2], torch.inf).requires_grad_()
    args = [*args[:2], infinite, *args[3:6], frozen]
    h, _ = align_gate(*args, image_sample=torch.tensor([0]), mode="average")
    h.sum().backward()
    torch.testing.assert_close(h, frozen[:-1].mean(0, keepdim=True) + frozen[-1:])
    assert all(torch.equal(a.grad, torch.zeros_like(a)) for a in args[:6])
    assert frozen.grad is None


def test_half_precision_rows_are_dotted_in_float32():
    """Within twice the rounding of the stored rows: products and sums of 4096 terms add nothing to it."""
    image_rows, mean = torch.randn(1, ROWS, 4096).bfloat16(), torch.randn(1, 4096) / 64
    args = [a.detach().bfloat16() for a in gate_inputs(1, 1)[2:6]]
    table = torch.randn(LEVELS, 4096).bfloat16()
    h, mix = align_gate(image_rows, mean, *args, table, image_sample=torch.tensor([0]), mode="adaptive")
    exact_h, exact_mix = align_gate(
        image_rows.double(), mean.double(), *[a.double() for a in args], table.double(),
        image_sample=torch.tensor([0]), mode="adaptive",
    )  # fmt: skip
    assert (h.dtype, mix.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(mix.double(), exact_mix, rtol=1e-4, atol=1e-6)
    assert (h - exact_h).abs().max() <= 2 * (exact_h.bfloat16() - exact_h).abs().max()


def test_oracle(device):
    """t̄, dots, α, H and the LLM's input rows as the public implementation computed them from CLIP features."""
    stored = np.load(ORACLE / "ft_single_mid.npz")
    arrays = {name: torch.from_numpy(a).to(device) for name, a in stored.items() if a.dtype == "f4"}
    public = stored["input_ids"][0].tolist()  # -200 stands for the image
    weights = load_file(ORACLE / "p16_model.safetensors", device)
    embed, table = weights["model.embed_tokens.weight"], weights["align_indicators.indicator_embs"]
    gate = [weights[f"gated_weight_layer.mlp.{i}.{name}"] for i in (0, 2) for name in ("weight", "bias")]
    projector = [weights[f"mm_projector.{i}.{name}"] for i in (0, 2) for name in ("weight", "bias")]
    features, image_rows = arrays["out_clip_features"], arrays["out_image_embeds"]
    rows, image_id, align_id, cut = features.shape[1], len(embed), len(embed) + 1, public.index(-200)
    ids = torch.tensor([public[0], align_id, *public[1:cut], *[image_id] * rows, *public[cut + 1 :]])
    plan = injection_plan(ids, image_token_id=image_id, align_token_id=align_id)

    mean = text_mean(ids, embed, None, plan)
    unset, dots = project_and_inject(features, *projector, ids, embed, mean, plan=plan)
    h, alpha = align_gate(image_rows, mean, *gate, table, image_sample=plan.image_sample(rows), mode="adaptive")
    embeddings = unset.clone()
    embeddings[1] = h[0]
    for name, got in {
        "out_gate_avg_text": mean,
        "out_gate_dots": dots,
        "out_gate_alpha": alpha,
        "out_h_align": h,
        "out_inputs_embeds": inject(ids, embed, image_rows, h, plan=plan)[None],
        "out_image_embeds": embeddings[2 + cut - 1 :][:rows][None],
    }.items():
        assert (got - arrays[name]).norm() <= 1e-5 * arrays[name].norm(), name
    torch.testing.assert_close(embeddings[None], arrays["out_inputs_embeds"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_rows": torch.zeros(1, 2, 6)}, "image_rows has 2 rows per image; the gate was built for 3"),
        ({"mode": "both"}, "mode is 'both'; align_gate needs one of 'adaptive', 'local', 'global', 'average'"),
        ({"table": torch.zeros(4, 6)}, r"w2 has shape \(4, 8\); it needs \(3, 8\)"),
        ({"table": torch.zeros(1, 6)}, "table has 1 levels; align_gate needs 2 or more"),
        ({"image_sample": torch.tensor([0, 0])}, r"image_sample has shape \(2,\); it needs \(1,\)"),
        ({"w1": torch.zeros(8, 3).half()}, "w1 is torch.float16; align_gate needs torch.float32"),
    ],
)
def test_gate_refusals(change, message):
    names = ("image_rows", "text_mean", "w1", "b1", "w2", "b2", "table")
    call = dict(zip(names, (a.detach().float() for a in gate_inputs(1, 1)), strict=True))
    with pytest.raises(ValueError, match=message):
        align_gate(**{**call, "image_sample": torch.tensor([0]), "mode": "adaptive", **change})


def test_text_mean_refusals():
    ids, embed = torch.ones(2, 3, dtype=torch.long), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"gate_mask is torch.int64; text_mean needs torch.bool"):
        text_mean(ids, embed, ids, plan_of(ids))
    with pytest.raises(ValueError, match=r"gate_mask has shape \(6,\); it needs \(2, 3\)"):
        text_mean(ids, embed, ids.bool().flatten(), plan_of(ids))
    with pytest.raises(ValueError, match="token_ids has 5 tokens; the plan was made for 6"):
        text_mean(ids.flatten()[:5], embed, None, plan_of(ids))


TEXTS = {  # (the samples of a packed batch as `conftest.sequence` writes them, width); what it covers
    "aligned": ([(4, "i", 2), (3, "i", 3)], 64),
    "ragged, text only, no text": ([(4, "i", 2), (9,), ("i", 1, "i", 3), ("i",)], 37),
    "no image": ([(3,), (2,)], 8),
    "one token, one column": ([("i", 1)], 1),
    "more than a block of tokens and of columns": ([(70, "i", 100, "i", 1), (5,), (30, "i")], 200),
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("masked", [False, True], ids=["all text", "gate_mask"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "upper bound"])
def test_fault_41_text_mean_by_triton(case, masked, counted, dtype, device, sequence, as_exact_as_torch):
    samples, width = TEXTS[case]
    _, ids, spans = packed(sequence, *samples)
    ids, spans = ids.to(device), {name: span.to(device) for name, span in spans.items()}
    sizes = {} if counted else {"num_image_rows": len(ids), "num_samples": len(samples) + 1}
    plan = plan_of(ids, **spans, **sizes)
    mask = torch.rand(len(ids), device=device) < 0.5 if masked else None

    def op(embed: Tensor, impl: str) -> Tensor:
        return text_mean(ids, embed, mask, plan, embed_scale=1.5, impl=impl)

    as_exact_as_torch(op, [torch.randn(VOCABULARY, width, requires_grad=True)], dtype)


def test_fault_41_text_mean_of_more_tokens_than_are_searched_at_once(device, sequence, as_exact_as_torch):
    _, ids, spans = packed(sequence, (2100,), (3, "i", 2), (40,), ("i", 90))
    ids, spans = ids.to(device), {name: span.to(device) for name, span in spans.items()}
    plan = plan_of(ids, **spans)
    op = lambda embed, impl: text_mean(ids, embed, None, plan, impl=impl)  # noqa: E731
    as_exact_as_torch(op, [torch.randn(VOCABULARY, 16)], torch.float32)


GATES = {  # sample of each image, samples, rows, width, hidden units, levels; what it covers
    "aligned": ([0, 1], 2, 16, 128, 32, 9),
    "ragged; out of order, unused, samples without images": ([2, 0, 2, -1, 3], 5, 11, 37, 19, 4),
    "one of everything": ([0], 1, 1, 1, 1, 2),
    "more than a block of everything": ([0, 0, 1], 2, 70, 600, 300, 20),
    "no rows in an image": ([0, 1], 2, 0, 8, 4, 5),
    "no image": ([], 2, 3, 8, 4, 5),
    "no sample": ([-1], 0, 3, 8, 4, 5),
    "nothing": ([], 0, 3, 8, 4, 5),
}


def gate_args(case: str) -> tuple[list[Tensor], Tensor]:
    """Weights small enough that the softmax is not one-hot, and its gradient not 0."""
    owner, samples, rows, width, hidden, levels = GATES[case]
    shapes = (len(owner), rows, width), (samples, width), (hidden, rows), (hidden,), (levels - 1, hidden)
    args = [torch.randn(shape) for shape in (*shapes, (levels - 1,), (levels, width))]
    for index, terms in ((1, width), (2, rows), (4, hidden)):
        args[index] *= max(terms, 1) ** -0.5
    return [arg.requires_grad_() for arg in args], torch.tensor(owner, dtype=torch.int32)


@pytest.mark.parametrize(
    ("mode", "case"),
    [(mode, case) for mode in MODES for case in GATES if mode != "local" or case != "more than a block of everything"],
)
def test_fault_41_gate_by_triton(case, mode, dtype, device, as_exact_as_torch):
    """The text mean in float32, as `text_mean` gives it; the aligned shape also has it in the others' dtype."""
    args, owner = gate_args(case)
    owner = owner.to(device)

    def op(*args: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        image_rows, mean, *weights = args
        mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
        return align_gate(image_rows, mean, *weights, image_sample=owner, mode=mode, impl=impl)

    as_exact_as_torch(op, args, dtype)
    if case == "aligned":
        as_exact_as_torch(partial(align_gate, image_sample=owner.long(), mode=mode), args, dtype)


def test_fault_41_gate_by_triton_with_wide_tiles(dtype, device, as_exact_as_torch):
    """A chip of one multiprocessor: 32 image rows a program, where the large chips of these tests have 8."""
    args, owner = gate_args("more than a block of everything")
    with assume_chip(Chip(80, 1, 166_912)):
        as_exact_as_torch(partial(align_gate, image_sample=owner.to(device), mode="adaptive"), args, dtype)


def by_triton(args: list[Tensor], owner: Tensor, mode: str = "adaptive") -> list[Tensor]:
    """H, weights, and the gradients of the arguments that need one."""
    outputs = align_gate(*args, image_sample=owner, mode=mode, impl="triton")
    loss = sum((out * torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out)).sum() for out in outputs)
    needed = [arg for arg in args if arg.requires_grad]
    return [*outputs, *(torch.autograd.grad(loss, needed) if needed else ())]


def test_only_needed_gradients_are_computed_and_are_the_same(device):
    """Every argument trained alone, among them image rows without the mean that reads them, and a frozen table."""
    args, owner = gate_args("ragged; out of order, unused, samples without images")
    args, owner = [a.detach().to(device) for a in args], owner.to(device)
    h, weights, *grads = by_triton([a.requires_grad_() for a in args], owner)
    for index, grad in enumerate(grads):
        alone = [a.detach().requires_grad_(i == index) for i, a in enumerate(args)]
        for got, want in zip(by_triton(alone, owner), (h, weights, grad), strict=True):
            assert torch.equal(got, want), index
    got_h, got_weights = by_triton([a.detach() for a in args], owner)
    assert torch.equal(got_h, h)
    assert torch.equal(got_weights, weights)


@pytest.mark.parametrize("which", [0, 1], ids=["H", "weights"])
def test_fault_41_gradient_of_one_output_only(which, dtype, device, as_exact_as_torch):
    """Nothing that a table's gradient could come from, where only the weights are used."""
    args, owner = gate_args("aligned")
    args[6].requires_grad_(which == 0)
    owner = owner.to(device)

    def op(*args: Tensor, impl: str) -> Tensor:
        return align_gate(*args, image_sample=owner, mode="adaptive", impl=impl)[which]

    as_exact_as_torch(op, args, dtype)


def test_two_calls_are_equal_bit_for_bit(device, sequence):
    args, owner = gate_args("more than a block of everything")
    args, owner = [a.detach().to(device).requires_grad_() for a in args], owner.to(device)
    for first, second in zip(by_triton(args, owner), by_triton(args, owner), strict=True):
        assert torch.equal(first, second)
    samples, width = TEXTS["more than a block of tokens and of columns"]
    _, ids, spans = packed(sequence, *samples)
    ids, spans = ids.to(device), {name: span.to(device) for name, span in spans.items()}
    embed = torch.randn(VOCABULARY, width, device=device, requires_grad=True)
    results = []
    for _ in range(2):
        mean = text_mean(ids, embed, None, plan_of(ids, **spans), impl="triton")
        results.append((mean, *torch.autograd.grad(mean.square().sum(), embed)))
    assert all(map(torch.equal, *results))


def test_launches_and_no_wait_for_the_device(device, sequence, no_sync, count_launches):
    """One kernel each forward, the gate's after a fill of its counters; two backward of the gate, one of the mean."""
    _, ids, spans = packed(sequence, (4, "i", 2), (3, "i", 3))
    plan = plan_of(ids.to(device), **{name: span.to(device) for name, span in spans.items()})
    args, owner = gate_args("aligned")
    args = [a.detach().to(device).requires_grad_() for a in args]
    embed = torch.randn(VOCABULARY, args[1].shape[1], device=device, requires_grad=True)
    owner, ids = owner.to(device), ids.to(device)
    with no_sync(), count_launches(embedding, gate) as launched:
        mean = text_mean(ids, embed, None, plan, impl="triton")
        assert launched == ["_text_mean_kernel"]
        h, _ = align_gate(args[0], mean, *args[2:], image_sample=owner, mode="adaptive", impl="triton")
        assert launched[1:] == ["fill", "_align_gate_kernel"]
        h.sum().backward()
    assert launched[3:5] == ["_align_gate_backward_kernel", "_align_gate_grads_kernel"]
    assert [name for name in launched[5:] if name != "fill"] == ["_run_sum_kernel"]
    assert embed.grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_operators_and_compiled_graph(mode, device, sequence):
    _, ids, spans = packed(sequence, (4, "i", 2), (9,), (3, "i", 3))
    ids, spans = ids.to(device), {name: span.to(device) for name, span in spans.items()}
    plan = plan_of(ids, **spans)
    args, owner = gate_args("aligned")
    args, owner = [a.detach().to(device).requires_grad_() for a in args], owner.to(device)
    embed = torch.randn(VOCABULARY, args[1].shape[1], device=device, requires_grad=True)
    mask = torch.rand(len(ids), device=device) < 0.5

    operators = torch.ops.aligngpt
    torch.library.opcheck(operators.align_gate.default, (*args, owner, mode))
    for gate_mask in (mask, None):
        call = ids, embed, gate_mask, plan.source, plan.token_sample, 2, 1.5
        torch.library.opcheck(operators.text_mean.default, call)

    def both(embed: Tensor, image_rows: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        mean = text_mean(ids, embed, mask, plan, embed_scale=1.5, impl="triton")
        return align_gate(image_rows, mean, *weights, image_sample=owner, mode=mode, impl="triton")

    trained = [embed, args[0], *args[2:]]
    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        h, weights = function(*trained)
        results.append((h, weights, *torch.autograd.grad(h.square().sum(), trained)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_fault_40_non_contiguous_inputs(device):
    args, owner = gate_args("ragged; out of order, unused, samples without images")
    args, owner = [a.detach().to(device) for a in args], owner.to(device)
    want = by_triton([a.requires_grad_() for a in args], owner)
    views = [a.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for a in args]
    got = by_triton(views, torch.stack([owner, owner], 1)[:, 0])
    assert all(map(torch.equal, got, want))

    ids = torch.randint(2, VOCABULARY, (3, 9), device=device)
    ids[:, 1], ids[:, 2:8] = ALIGN, IMAGE
    mask, embed = torch.rand(3, 9, device=device) < 0.7, torch.randn(VOCABULARY, 37, device=device)
    want = text_mean(ids, embed, mask, plan_of(ids), impl="triton")
    views = [t.T.contiguous().T for t in (ids, embed, mask)]
    assert torch.equal(text_mean(*views, plan_of(ids), impl="triton"), want)
    ids, embed = ids.int(), torch.stack([embed, embed], 2)[:, :, 0]
    assert torch.equal(text_mean(ids, embed, mask, plan_of(ids), impl="triton"), want)


def test_fault_40_an_id_outside_the_table_is_nan_and_is_not_read(device):
    """Of a chosen token; those of image tokens and of tokens that the mask leaves out are never looked at."""
    ids = torch.tensor([[1, ALIGN, 5, IMAGE, IMAGE, IMAGE, 7], [1, ALIGN, 5, IMAGE, IMAGE, IMAGE, 1 << 40]])
    ids = torch.cat([ids, ids[1:].clamp(max=6), torch.tensor([[1, ALIGN, -1, IMAGE, IMAGE, IMAGE, 3]])]).to(device)
    ids[2, 3:6], ids[2, 1] = IMAGE, ALIGN
    plan, embed = plan_of(ids), torch.randn(VOCABULARY, 8, device=device, requires_grad=True)
    mean = text_mean(ids, embed, None, plan, impl="triton")
    assert mean.isnan().all(1).tolist() == [False, True, False, True]
    torch.testing.assert_close(mean[0], (embed[5] + embed[7]) / 2)
    (grad,) = torch.autograd.grad(mean[:3:2].sum(), embed)
    assert grad.isfinite().all()
    mask = (ids >= 0) & (ids < VOCABULARY)
    assert text_mean(ids, embed, mask, plan, impl="triton").isfinite().all()


def test_fault_40_embedding_rows_past_two_to_the_31_elements(device):
    """Memory that nobody touches costs nothing on a CPU."""
    width = 64
    rows = (1 << 31) // width + 8
    embed = torch.empty(rows, width, dtype=torch.float16, device=device)
    embed[-8:] = torch.randn(8, width)
    ids = torch.tensor([1, rows + 1, rows - 3, *[rows] * ROWS, rows - 1], device=device)
    plan = injection_plan(ids, image_token_id=rows, align_token_id=rows + 1)
    got = text_mean(ids, embed, None, plan, impl="triton")
    torch.testing.assert_close(got, (embed[-3:-2].float() + embed[-1:].float()) / 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one program an image: minutes in Triton's interpreter")
def test_fault_40_image_rows_past_two_to_the_31_elements(device):
    """Only the last image belongs to a sample; unused ones get zeros."""
    rows, width = 8, 8192
    shapes = (1, width), (4, rows), (4,), (2, 4), (2,), (3, width)
    mean, *weights = (torch.randn(shape, device=device).half().requires_grad_() for shape in shapes)
    image_rows = torch.empty((1 << 31) // (rows * width) + 1, rows, width, dtype=torch.float16, device=device)
    image_rows[-1] = torch.randn(rows, width) / width
    owner = torch.full((image_rows.shape[0],), -1, device=device)
    owner[-1] = 0
    got = by_triton([image_rows.requires_grad_(), mean, *weights], owner)
    want = by_triton([image_rows.detach()[-1:].requires_grad_(), mean, *weights], owner[-1:])
    assert not got[2][:-1].any()
    got[2] = got[2][-1:]
    for mine, of_one_image in zip(got, want, strict=True):  # with so many images the tiles differ
        torch.testing.assert_close(mine, of_one_image)


def test_triton_refuses_float64_by_name():
    args = [a.detach() for a in gate_inputs(1, 1)]
    call = partial(align_gate, image_sample=torch.tensor([0]), mode="adaptive", impl="triton")
    with pytest.raises(KernelUnavailable, match=r"align_gate cannot run on Triton: .*float64"):
        call(*args)
    with pytest.raises(KernelUnavailable, match=r"align_gate cannot run on Triton: text_mean is torch\.float64"):
        call(args[0].float(), args[1], *(a.float() for a in args[2:]))
