"""project_and_inject: projector, injection and the gate's dots as one stage.

    y       = gelu(x W1ᵀ + b1) W2ᵀ + b2                               the image rows, (M, P, D)
    out[t]  = the row of `inject`, its image rows taken from y, its align rows zero
    dots[s] = mean over the sample's images of ⟨y_p, t̄_s⟩, (S, P)

The second product's epilogue writes each row of y straight to its place in the sequence and leaves what the dots need
of it, so y never exists by itself: it is neither written, nor read to be copied, nor read for the dots.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import (
    Impl,
    check_devices,
    check_floats,
    check_ints,
    check_shape,
    launch_options,
    measured_dtype,
    register,
    tl,
    triton,
    use_triton,
)
from .gate import sample_dots
from .gemm import gemm
from .injection import inject, inject_tile, launch_inject_backward, write_rows
from .plan import InjectionPlan, check_plan
from .projector import first_layer, fused_projector, projector_grads


def project_and_inject_reference(
    features: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    token_ids: Tensor,
    embed_weight: Tensor,
    text_mean: Tensor,
    *,
    plan: InjectionPlan,
    embed_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The parts one after another; arguments as `project_and_inject`."""
    projector = features, w1, b1, w2, b2
    return _by_parts(*projector, token_ids, embed_weight, text_mean, plan, embed_scale, impl="reference")


def _by_parts(
    features: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    token_ids: Tensor,
    embed_weight: Tensor,
    text_mean: Tensor,
    plan: InjectionPlan,
    embed_scale: float,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    image_rows = fused_projector(features, w1, b1, w2, b2, impl=impl)
    unset = embed_weight.new_zeros(plan.align_place.shape[0], embed_weight.shape[1])
    embeddings = inject(token_ids, embed_weight, image_rows, unset, plan=plan, embed_scale=embed_scale, impl=impl)
    image_sample = plan.image_sample(features.shape[1])[: features.shape[0]]
    return embeddings, sample_dots(image_rows[: image_sample.shape[0]], text_mean, image_sample)


@triton.jit(do_not_specialize=["num_images"])
def _sample_dots_kernel(
    p_sums,  # (images * P, parts) float32
    p_owner,  # (images,)
    p_dots,  # (S, P) float32
    num_images,
    rows_per_image,
    parts,
    BLOCK_P: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    # A sample's dots: the parts of a row, then the sample's images, in order.
    i_s = tl.program_id(0)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_parts = tl.arange(0, BLOCK_PARTS)
    m_p = o_p < rows_per_image
    mask = m_p[:, None] & (o_parts < parts)[None, :]
    b_dots = tl.zeros((BLOCK_P,), tl.float32)
    count = 0
    for i_m in range(num_images):
        if tl.load(p_owner + i_m) == i_s:
            row = (i_m * rows_per_image + o_p).to(tl.int64)
            # (BLOCK_P, BLOCK_PARTS)
            b_dots += tl.sum(tl.load(p_sums + row[:, None] * parts + o_parts[None, :], mask=mask, other=0), 1)
            count += 1
    tl.store(p_dots + i_s.to(tl.int64) * rows_per_image + o_p, b_dots / tl.maximum(count, 1).to(tl.float32), mask=m_p)


@triton.jit(do_not_specialize=["num_places"])
def _projected_grad_kernel(
    p_grad,  # (T, D)
    p_place,  # (places,)
    p_owner,  # (images,)
    p_weight,  # (images * P,) float32
    p_mean,  # (S, D)
    p_out,  # (M * P, D)
    num_places,
    rows_per_image,
    width,
    BLOCK_D: tl.constexpr,
):
    # The gradient of one projected row a program: that of its place, and its weight in the dots times the text mean.
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    # (BLOCK_D,)
    b_row = tl.zeros((BLOCK_D,), tl.float32)
    if i_r < num_places:
        place = tl.load(p_place + i_r).to(tl.int64)
        owner = tl.load(p_owner + i_r // rows_per_image).to(tl.int64)
        if place >= 0:
            b_row += tl.load(p_grad + place * width + o_d, mask=m_d, other=0).to(tl.float32)
        if owner >= 0:
            b_row += tl.load(p_weight + i_r) * tl.load(p_mean + owner * width + o_d, mask=m_d, other=0).to(tl.float32)
    tl.store(p_out + i_r * width + o_d, b_row.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["num_images"])
def _weighted_rows_kernel(
    p_rows,  # (M * P, D)
    p_weight,  # (images * P,) float32
    p_owner,  # (images,)
    p_out,  # (S, D) float32
    num_images,
    rows_per_image,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Σ weight * row over a sample's images, in order.
    i_s = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    for i_m in range(num_images):
        if tl.load(p_owner + i_m) == i_s:
            for i_p in range(0, rows_per_image, BLOCK_P):
                o_p = i_p + tl.arange(0, BLOCK_P)
                m_p = o_p < rows_per_image
                row = (i_m * rows_per_image + o_p).to(tl.int64)
                # (BLOCK_P,)
                b_weight = tl.load(p_weight + row, mask=m_p, other=0)
                # (BLOCK_P, BLOCK_D)
                mask = m_p[:, None] & m_d[None, :]
                b_rows = tl.load(p_rows + row[:, None] * width + o_d[None, :], mask=mask, other=0)
                b_sum += tl.sum(b_weight[:, None] * b_rows.to(tl.float32), 0)
    tl.store(p_out + i_s.to(tl.int64) * width + o_d, b_sum, mask=m_d)


def _launch_project(
    x: Tensor,  # (M * P, in_dim)
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    ids: Tensor,
    embed_weight: Tensor,
    text_mean: Tensor,
    source: Tensor,
    image_place: Tensor,  # (places,), at most M * P
    align_place: Tensor,
    image_sample: Tensor,  # (places / P,)
    rows_per_image: int,
    embed_scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (T, D); (S, P); (M * P, hidden) before the GELU with `keep`, else empty
    num_samples, width = text_mean.shape
    out = embed_weight.new_empty(ids.shape[0], width)
    unset = embed_weight.new_zeros(num_samples, width)
    write_rows(out, ids, embed_weight, None, unset, source, image_place, align_place, embed_scale)
    act, *pre = first_layer(x, w1, b1, keep)
    (sums,) = gemm(
        act,
        w2,
        "place",
        bias=b2,
        out=out,
        place=image_place,
        owner=image_sample,
        rows_per_owner=rows_per_image,
        mean=text_mean,
    )
    dots = x.new_empty(num_samples, rows_per_image, dtype=torch.float32)
    if dots.numel():
        parts, block_p = sums.shape[1], 32
        _sample_dots_kernel[num_samples, triton.cdiv(rows_per_image, block_p)](
            sums,
            image_sample.contiguous(),
            dots,
            image_sample.shape[0],
            rows_per_image,
            parts,
            BLOCK_P=block_p,
            BLOCK_PARTS=triton.next_power_of_2(parts),
            **launch_options(4, 1),
        )
    return out, dots, pre[0] if keep else x.new_empty(0)


def _launch_project_backward(
    grad: Tensor,  # (T, D)
    grad_dots: Tensor,  # (S, P)
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    ids: Tensor,
    text_mean: Tensor,
    source: Tensor,
    image_place: Tensor,
    align_place: Tensor,
    image_sample: Tensor,
    pre: Tensor,
    rows_per_image: int,
    embed_scale: float,
    vocabulary: int,
    needs: list[bool],  # gradient of x, w1, b1, w2, b2, embed_weight, text_mean
) -> list[Tensor]:  # the gradients that are needed, in that order
    *for_projector, for_embed, for_mean = needs
    (num_samples, width), hidden = text_mean.shape, w2.shape[1]
    grad = grad.contiguous()
    # What each projected row weighs in its sample's dots: that sample's gradient, over the sample's images.
    member = image_sample == torch.arange(num_samples, device=image_sample.device)[:, None]
    each = grad_dots.float() / member.sum(1, keepdim=True).clamp(min=1)
    each = torch.cat([each, each.new_zeros(1, rows_per_image)])  # the last row is that of images without a sample
    weight = each[torch.where(image_sample < 0, num_samples, image_sample)]

    grads: list[Tensor] = []
    act = x
    if any(for_projector) or for_mean:
        rows = grad.new_empty(x.shape[0], width)
        if rows.numel() and any(for_projector):
            tile = inject_tile(width, 4)
            _projected_grad_kernel[x.shape[0], triton.cdiv(width, tile.block_d)](
                grad,
                image_place.contiguous(),
                image_sample.contiguous(),
                weight,
                text_mean.contiguous(),
                rows,
                image_place.shape[0],
                rows_per_image,
                width,
                BLOCK_D=tile.block_d,
                **launch_options(tile.num_warps, 1),
            )
        grads, act = projector_grads(rows, x, w1, b1, w2, pre, for_projector, needs_act=for_mean)
    if for_embed:
        needs_embed = [True, False, False]
        indices = ids, source, image_place, align_place
        grads += launch_inject_backward(grad, *indices, embed_scale, vocabulary, 0, 0, needs_embed)
    if for_mean:
        # Σ weight * (act W2ᵀ + b2) is (Σ weight * act) W2ᵀ + Σ weight * b2, which needs no projected row.
        total = act.new_empty(num_samples, hidden, dtype=torch.float32)
        if total.numel():
            block_d = 128
            _weighted_rows_kernel[num_samples, triton.cdiv(hidden, block_d)](
                act,
                weight,
                image_sample.contiguous(),
                total,
                image_sample.shape[0],
                rows_per_image,
                hidden,
                BLOCK_P=32,
                BLOCK_D=block_d,
                **launch_options(4, 3),
            )
        count = torch.where(member, weight.sum(1), 0).sum(1, keepdim=True)
        grads.append((total @ w2.float().T + count * b2.float()).to(text_mean.dtype))
    return grads


def _fake_project(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, w1, _, _, _, ids, embed_weight, text_mean, *_, rows_per_image, _, keep = args
    out = embed_weight.new_empty(ids.shape[0], embed_weight.shape[1])
    dots = x.new_empty(text_mean.shape[0], rows_per_image, dtype=torch.float32)
    return out, dots, x.new_empty(x.shape[0], w1.shape[0]) if keep else x.new_empty(0)


def _fake_project_backward(*args: Any) -> list[Tensor]:
    grad, _, x, w1, b1, w2, b2, _, text_mean, *_, vocabulary, needs = args
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w1, b1, w2, b2)]
    made += [grad.new_empty(vocabulary, grad.shape[1]), torch.empty_like(text_mean)]
    return [gradient for gradient, need in zip(made, needs, strict=True) if need]


class _TritonProject(torch.autograd.Function):
    """Saves its arguments, but for the embedding table, and the sum before the GELU; no row of its output."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *projector, ids, embed_weight, text_mean, source, image_place, align_place, image_sample = inputs[:12]
        ctx.rows_per_image, ctx.embed_scale, _ = inputs[12:]
        indices = source, image_place, align_place, image_sample
        ctx.save_for_backward(*projector, ids, text_mean, *indices, output[2])
        ctx.vocabulary = embed_weight.shape[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, pre = ctx.saved_tensors
        x, ids, text_mean = tensors[0], tensors[5], tensors[6]
        grad, grad_dots, _ = grads
        if grad is None:
            grad = x.new_zeros(ids.shape[0], text_mean.shape[1])
        if grad_dots is None:
            grad_dots = x.new_zeros(text_mean.shape[0], ctx.rows_per_image, dtype=torch.float32)
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 4, 6, 7)]
        rest = ctx.rows_per_image, ctx.embed_scale, ctx.vocabulary, needs
        needed = iter(_project_backward(grad, grad_dots, *tensors, pre, *rest))
        got = [next(needed) if need else None for need in needs]
        return *got[:5], None, *got[5:], *[None] * 7


_project_backward = register("project_and_inject_backward", _launch_project_backward, _fake_project_backward)
_project = register("project_and_inject", _launch_project, _fake_project, _TritonProject)


def project_and_inject(
    features: Tensor,  # (M, P, in_dim), from the vision tower
    w1: Tensor,  # (hidden, in_dim)
    b1: Tensor,  # (hidden,)
    w2: Tensor,  # (D, hidden)
    b2: Tensor,  # (D,)
    token_ids: Tensor,  # (B, L) or (T,)
    embed_weight: Tensor,  # (V, D)
    text_mean: Tensor,  # (S, D)
    *,
    plan: InjectionPlan,
    embed_scale: float = 1.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # (..., D), (S, P) float32
    """`fused_projector` written straight to the rows' places, and the dots the gate needs, in one stage.

    The align rows of the embeddings are left zero (H follows from the dots); `dots[s]` is the mean over the sample's
    images of `⟨I_p, text_mean[s]⟩`. Gradients go to every floating argument; the embeddings may be written to in place
    before the backward. Where "auto" does not take the kernels, the parts run one after another, each by its own
    "auto". Raises ValueError for shapes, dtypes or devices that do not fit, or a DTensor; KernelUnavailable for
    `impl="triton"` where Triton cannot run.
    """
    check_ints("project_and_inject", token_ids=token_ids)
    check_floats("project_and_inject", features=features, w1=w1, b1=b1, w2=w2, b2=b2, embed_weight=embed_weight)
    check_floats("project_and_inject", text_mean=text_mean)
    check_shape("features", features, ("images", "rows", "in_dim"))
    check_shape("w1", w1, ("hidden", features.shape[2]))
    check_shape("b1", b1, (w1.shape[0],))
    check_shape("w2", w2, ("D", w1.shape[0]))
    check_shape("b2", b2, (w2.shape[0],))
    check_shape("embed_weight", embed_weight, ("V", w2.shape[0]))
    check_shape("text_mean", text_mean, (plan.align_place.shape[0], w2.shape[0]))
    check_devices(
        "project_and_inject",
        features=features,
        w1=w1,
        b1=b1,
        w2=w2,
        b2=b2,
        token_ids=token_ids,
        embed_weight=embed_weight,
        text_mean=text_mean,
    )
    check_plan("project_and_inject", token_ids, plan)
    bucket = measured_dtype(features.dtype)
    if not use_triton("project_and_inject", impl, features.device, features.dtype, bucket=bucket):
        projector = features, w1, b1, w2, b2
        return _by_parts(*projector, token_ids, embed_weight, text_mean, plan, embed_scale, impl)
    num_images, rows_per_image = features.shape[:2]
    image_sample = plan.image_sample(rows_per_image)[:num_images]
    floats = features, w1, b1, w2, b2, embed_weight, text_mean
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in floats)
    place = plan.image_place[: num_images * rows_per_image]
    indices = plan.source, place, plan.align_place, image_sample
    sizes = rows_per_image, float(embed_scale), trained
    rows, dots, _ = _project(
        features.flatten(0, 1), w1, b1, w2, b2, token_ids.flatten(), embed_weight, text_mean, *indices, *sizes
    )
    return rows.view(*token_ids.shape, embed_weight.shape[1]), dots
