"""text_mean and align_gate: a loop over samples in float64, the oracle's arrays, and gradients in every mode."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import align_gate, inject, injection_plan, project_and_inject, text_mean
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
    with no_sync():
        h, mix = align_gate(*args, image_sample=torch.tensor(owner, dtype=torch.int32), mode=mode)
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


def test_oracle():
    """t̄, dots, α, H and the LLM's input rows as the public implementation computed them from CLIP features."""
    arrays = {name: torch.from_numpy(a) for name, a in np.load(ORACLE / "ft_single_mid.npz").items() if a.dtype == "f4"}
    public = np.load(ORACLE / "ft_single_mid.npz")["input_ids"][0].tolist()  # -200 stands for the image
    weights = load_file(ORACLE / "p16_model.safetensors")
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
