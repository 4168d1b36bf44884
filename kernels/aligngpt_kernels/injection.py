"""inject and project_and_inject: the LLM's input rows, put together from text, image and alignment rows in one pass.

    out[t] = embed_scale * embed_weight[ids[t]]   where plan.source[t] == -1
             image_rows.view(M * P, D)[source]    where source >= 0
             align_rows[-2 - source]              where source <= -2
             NaN                                  where the row asked for does not exist

M images of P rows, S samples, width D, T tokens. Image and align rows already live in the LLM's space and are not
scaled. The sequence layout is AlignGPT's (arXiv 2405.14129): `[BOS, H, text, image rows, text]`.

The public implementation concatenates each sample, pads each, stacks them, and concatenates again to insert H: every
row is copied four times. Here it is written once, to the place that the plan names.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import (
    Chip,
    Impl,
    check_devices,
    check_floats,
    check_ints,
    check_shape,
    chip,
    launch_options,
    register,
    tl,
    triton,
    use_triton,
)
from .embedding import embedding_grad
from .gate import sample_dots
from .gemm import gemm
from .plan import InjectionPlan, check_plan, non_image_positions
from .projector import first_layer, fused_projector, fused_projector_reference, projector_grads


def inject_reference(
    token_ids: Tensor,
    embed_weight: Tensor,
    image_rows: Tensor,
    align_rows: Tensor,
    *,
    plan: InjectionPlan,
    embed_scale: float = 1.0,
) -> Tensor:
    """Index arithmetic, no loop over samples; arguments as `inject`."""
    out = _Inject.apply(token_ids.flatten(), embed_weight, image_rows.flatten(0, 1), align_rows, plan, embed_scale)
    return out.view(*token_ids.shape, embed_weight.shape[1])


class _Inject(torch.autograd.Function):
    """Autograd of indexed writes would clone the gradient at each write; its backward is three gathers."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        embed_weight: Tensor,
        image_rows: Tensor,
        align_rows: Tensor,
        plan: InjectionPlan,
        embed_scale: float,
    ) -> Tensor:
        num_image_rows, num_samples = plan.image_place.shape[0], plan.align_place.shape[0]
        num_image_rows = min(num_image_rows, image_rows.shape[0])
        num_samples = min(num_samples, align_rows.shape[0])
        complete = (num_image_rows, num_samples) == (plan.image_place.shape[0], plan.align_place.shape[0])
        ctx.save_for_backward(ids, *plan[:4])
        ctx.exact, ctx.embed_scale = plan.exact, embed_scale
        ctx.sizes = embed_weight.shape[0], image_rows.shape[0], align_rows.shape[0]

        if not (plan.exact and complete):
            rows = _text_rows(ids, plan.source, embed_weight, embed_scale)
            rows = _overlay(rows, align_rows[:num_samples], -2 - plan.source)
            rows = _overlay(rows, image_rows[:num_image_rows], plan.source)
            missing = (plan.source >= num_image_rows) | (plan.source < -1 - num_samples)
            return rows.masked_fill_(missing[:, None], torch.nan)

        at = non_image_positions(plan)
        out = embed_weight.new_empty(ids.shape[0], embed_weight.shape[1])
        _write(out, at, _text_rows(ids[at], plan.source[at], embed_weight, embed_scale))
        # An alignment row without a place goes where an image row is about to be written.
        align_place = torch.where(plan.align_place < 0, plan.image_place[:1], plan.align_place)
        _write(out, align_place, align_rows[:num_samples])
        _write(out, plan.image_place, image_rows[:num_image_rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        ids, source, token_sample, image_place, align_place = ctx.saved_tensors
        plan = InjectionPlan(source, token_sample, image_place, align_place, ctx.exact)
        vocabulary, num_image_rows, num_align_rows = ctx.sizes
        for_embed, for_image, for_align = ctx.needs_input_grad[1:4]
        grad_embed = None
        if for_embed:
            at = non_image_positions(plan)
            text = plan.source[at] == -1
            rows = torch.where(text[:, None], grad[at] * ctx.embed_scale, 0)
            grad_embed = torch.ops.aten.embedding_dense_backward(
                rows, torch.where(text, ids[at], 0), vocabulary, -1, False
            )
        grad_image = _rows_at(grad, plan.image_place, num_image_rows) if for_image else None
        grad_align = _rows_at(grad, plan.align_place, num_align_rows) if for_align else None
        return None, grad_embed, grad_image, grad_align, None, None


def _text_rows(ids: Tensor, source: Tensor, embed_weight: Tensor, embed_scale: float) -> Tensor:
    """Rows of the table for text; other tokens, whose ids may lie outside it, read row 0 and are overwritten."""
    rows = F.embedding(torch.where(source == -1, ids, 0), embed_weight)
    return rows if embed_scale == 1.0 else rows.mul_(embed_scale)


def _overlay(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """`rows` with `table[index]` wherever the index lies in the table."""
    if table.shape[0] == 0:
        return rows
    inside = (index >= 0) & (index < table.shape[0])
    return torch.where(inside[:, None], table[index.clamp(0, table.shape[0] - 1)], rows)


def _rows_at(grad: Tensor, place: Tensor, num_rows: int) -> Tensor:
    """The gradient of `num_rows` rows written at `place`; zeros for rows that were not."""
    place = place[:num_rows]
    rows = grad[place.clamp(min=0)].masked_fill_((place < 0)[:, None], 0)
    return rows if place.shape[0] == num_rows else F.pad(rows, (0, 0, 0, num_rows - place.shape[0]))


def _write(out: Tensor, at: Tensor, rows: Tensor) -> None:
    """`out[at] = rows`, moved as 64-bit words where both can be read so: twice as fast for 16-bit elements."""
    rows = rows.contiguous()
    if not torch.compiler.is_compiling() and all(
        (t.storage_offset() | t.shape[1]) * t.element_size() % 8 == 0 for t in (out, rows)
    ):
        out, rows = out.view(torch.int64), rows.view(torch.int64)
    out.index_copy_(0, at.long(), rows)


class InjectTile(NamedTuple):
    """Layout of one program: `block_d` columns of one row."""

    block_d: int
    num_warps: int


def inject_tile(width: int, element_bytes: int, chip: Chip) -> InjectTile:
    """A row in as few programs as keep every thread at 64 bytes or less: four 16-byte moves in flight, no spill."""
    block_d = min(triton.next_power_of_2(max(width, 1)), 8192 // element_bytes)
    return InjectTile(block_d, num_warps=max(1, block_d * element_bytes // (32 * 64)))


@triton.jit
def _inject_kernel(
    p_ids,  # (T,)
    p_source,  # (T,)
    p_embed,  # (V, D)
    p_image,  # (M * P, D)
    p_align,  # (S, D)
    p_out,  # (T, D)
    vocabulary,
    num_image_rows,  # that the plan places and the arguments hold
    num_align_rows,
    width,
    embed_scale,
    SCALED: tl.constexpr,
    SKIP_IMAGE_ROWS: tl.constexpr,  # another kernel writes them
    BLOCK_D: tl.constexpr,
):
    # One token a program. All of it takes the same branch, so just one of the three rows is read.
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    source = tl.load(p_source + i_t).to(tl.int64)
    # (BLOCK_D,)
    b_row = tl.full((BLOCK_D,), float("nan"), p_out.dtype.element_ty)
    if source == -1:
        token = tl.load(p_ids + i_t).to(tl.int64)
        if (token >= 0) & (token < vocabulary):
            b_row = tl.load(p_embed + token * width + o_d, mask=m_d)
            if SCALED:
                b_row = (b_row.to(tl.float32) * embed_scale).to(b_row.dtype)
    elif source >= 0:
        if (source < num_image_rows) & (not SKIP_IMAGE_ROWS):
            b_row = tl.load(p_image + source * width + o_d, mask=m_d)
    else:
        if -2 - source < num_align_rows:
            b_row = tl.load(p_align + (-2 - source) * width + o_d, mask=m_d)
    if SKIP_IMAGE_ROWS:
        m_d = o_d < tl.where((source < 0) | (source >= num_image_rows), width, 0)
    tl.store(p_out + i_t * width + o_d, b_row, mask=m_d)


@triton.jit
def _take_rows_kernel(
    p_grad,  # (T, D)
    p_image_place,  # (planned,)
    p_align_place,  # (S,)
    p_grad_image,  # (image_rows, D)
    p_grad_align,  # (align_rows, D)
    image_rows,
    align_rows,
    num_image_places,
    num_align_places,
    width,
    BLOCK_D: tl.constexpr,
):
    # One row of a gradient a program: image rows first, then alignment rows; zeros for a row without a place.
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    place = tl.full((), -1, tl.int32)
    if i_r < image_rows:
        if i_r < num_image_places:
            place = tl.load(p_image_place + i_r)
    else:
        if i_r - image_rows < num_align_places:
            place = tl.load(p_align_place + i_r - image_rows)
    # (BLOCK_D,)
    b_row = tl.zeros((BLOCK_D,), p_grad.dtype.element_ty)
    if place >= 0:
        b_row = tl.load(p_grad + place.to(tl.int64) * width + o_d, mask=m_d)
    if i_r < image_rows:
        tl.store(p_grad_image + i_r * width + o_d, b_row, mask=m_d)
    else:
        tl.store(p_grad_align + (i_r - image_rows) * width + o_d, b_row, mask=m_d)


def _launch_inject(
    ids: Tensor,
    embed_weight: Tensor,
    image_rows: Tensor,
    align_rows: Tensor,
    source: Tensor,
    image_place: Tensor,
    align_place: Tensor,
    embed_scale: float,
) -> Tensor:
    out = embed_weight.new_empty(ids.shape[0], embed_weight.shape[1])
    write_rows(out, ids, embed_weight, image_rows, align_rows, source, image_place, align_place, embed_scale)
    return out


def write_rows(
    out: Tensor,  # (T, D), written in place
    ids: Tensor,
    embed_weight: Tensor,
    image_rows: Tensor | None,  # None: image rows are left as they are
    align_rows: Tensor,
    source: Tensor,
    image_place: Tensor,
    align_place: Tensor,
    embed_scale: float,
) -> None:
    """One launch that writes every row of `out`, or every row that is no image row."""
    num_tokens, width = out.shape
    if num_tokens == 0 or width == 0:
        return
    num_image_rows = image_place.shape[0]
    tile = inject_tile(width, out.element_size(), chip(out.device))
    _inject_kernel[num_tokens, triton.cdiv(width, tile.block_d)](
        ids.contiguous(),
        source.contiguous(),
        embed_weight.contiguous(),
        out if image_rows is None else image_rows.contiguous(),
        align_rows.contiguous(),
        out,
        embed_weight.shape[0],
        num_image_rows if image_rows is None else min(num_image_rows, image_rows.shape[0]),
        min(align_place.shape[0], align_rows.shape[0]),
        width,
        embed_scale,
        SCALED=embed_scale != 1.0,
        SKIP_IMAGE_ROWS=image_rows is None,
        BLOCK_D=tile.block_d,
        **launch_options(tile.num_warps, 1),
    )


def _launch_inject_backward(
    grad: Tensor,
    ids: Tensor,
    source: Tensor,
    image_place: Tensor,
    align_place: Tensor,
    embed_scale: float,
    vocabulary: int,
    image_rows: int,
    align_rows: int,
    needs: list[bool],  # gradient of embed_weight, image_rows, align_rows
) -> list[Tensor]:  # the gradients that are needed, in that order
    grad = grad.contiguous()
    width = grad.shape[1]
    grads = []
    if needs[0]:
        text_ids = torch.where(source == -1, ids, vocabulary)
        row = torch.arange(ids.shape[0], device=ids.device)
        grads.append(embedding_grad(grad, row, text_ids, vocabulary, grad.dtype, embed_scale))
    image_rows, align_rows = image_rows * needs[1], align_rows * needs[2]
    grad_image, grad_align = grad.new_empty(image_rows, width), grad.new_empty(align_rows, width)
    if (image_rows or align_rows) and width:
        tile = inject_tile(width, grad.element_size(), chip(grad.device))
        _take_rows_kernel[image_rows + align_rows, triton.cdiv(width, tile.block_d)](
            grad,
            image_place.contiguous(),
            align_place.contiguous(),
            grad_image,
            grad_align,
            image_rows,
            align_rows,
            image_place.shape[0],
            align_place.shape[0],
            width,
            BLOCK_D=tile.block_d,
            **launch_options(tile.num_warps, 1),
        )
    return grads + [g for g, needed in ((grad_image, needs[1]), (grad_align, needs[2])) if needed]


def _fake_inject(ids: Tensor, embed_weight: Tensor, *_: Any) -> Tensor:
    return embed_weight.new_empty(ids.shape[0], embed_weight.shape[1])


def _fake_inject_backward(
    grad: Tensor,
    ids: Tensor,
    source: Tensor,
    image_place: Tensor,
    align_place: Tensor,
    embed_scale: float,
    vocabulary: int,
    image_rows: int,
    align_rows: int,
    needs: list[bool],
) -> list[Tensor]:
    sizes = zip((vocabulary, image_rows, align_rows), needs, strict=True)
    return [grad.new_empty(size, grad.shape[1]) for size, needed in sizes if needed]


class _TritonInject(torch.autograd.Function):
    """Saves the indices alone; its backward gathers."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _launch_inject(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, embed_weight, image_rows, align_rows, source, image_place, align_place, ctx.embed_scale = inputs
        ctx.save_for_backward(ids, source, image_place, align_place)
        ctx.sizes = embed_weight.shape[0], image_rows.shape[0], align_rows.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[1:4])
        needed = iter(_inject_backward(grads[0], *ctx.saved_tensors, ctx.embed_scale, *ctx.sizes, needs))
        return None, *(next(needed) if need else None for need in needs), None, None, None, None


_inject_backward = register("inject_backward", _launch_inject_backward, _fake_inject_backward)
_inject = register("inject", _launch_inject, _fake_inject, _TritonInject)


def inject(
    token_ids: Tensor,  # (B, L) padded or (T,) packed, the ids the plan was made from
    embed_weight: Tensor,  # (V, D)
    image_rows: Tensor,  # (M, P, D), after the projector
    align_rows: Tensor,  # (S, D)
    *,
    plan: InjectionPlan,
    embed_scale: float = 1.0,  # what the embedding module multiplies its rows by
    impl: Impl = "auto",
) -> Tensor:  # (B, L, D) or (T, D), dtype of embed_weight
    """The LLM's input rows, by the table at the top of this file.

    Ids of image and align tokens are never read from the embedding table. A row that the plan asks for and the
    arguments lack becomes NaN, and so does, in Triton, text whose id lies outside the table, which the reference
    refuses; a row that the plan does not place gets a zero gradient. Gradients go to
    `embed_weight`, `image_rows` and `align_rows`. Raises ValueError for widths, dtypes or token counts that differ, or
    a DTensor; KernelUnavailable for `impl="triton"` where Triton cannot run.
    """
    check_ints("inject", token_ids=token_ids)
    check_floats("inject", embed_weight=embed_weight, image_rows=image_rows, align_rows=align_rows)
    check_shape("embed_weight", embed_weight, ("V", "D"))
    check_shape("image_rows", image_rows, ("images", "rows", embed_weight.shape[1]))
    check_shape("align_rows", align_rows, ("samples", embed_weight.shape[1]))
    check_plan(token_ids, plan)
    check_devices(
        "inject",
        token_ids=token_ids,
        embed_weight=embed_weight,
        image_rows=image_rows,
        align_rows=align_rows,
        plan=plan.source,
    )
    if use_triton("inject", impl, embed_weight.device, embed_weight.dtype):
        indices = plan.source, plan.image_place, plan.align_place
        rows = _inject(
            token_ids.flatten(), embed_weight, image_rows.flatten(0, 1), align_rows, *indices, float(embed_scale)
        )
        return rows.view(*token_ids.shape, embed_weight.shape[1])
    return inject_reference(token_ids, embed_weight, image_rows, align_rows, plan=plan, embed_scale=embed_scale)


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
    image_rows = fused_projector_reference(features, w1, b1, w2, b2)
    unset = embed_weight.new_zeros(plan.align_place.shape[0], embed_weight.shape[1])
    embeddings = inject_reference(token_ids, embed_weight, image_rows, unset, plan=plan, embed_scale=embed_scale)
    image_sample = plan.image_sample(features.shape[1])[: features.shape[0]]
    dots = sample_dots(image_rows[: image_sample.shape[0]], text_mean, image_sample)
    return embeddings, dots


@triton.jit
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


@triton.jit
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


@triton.jit
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
            tile = inject_tile(width, 4, chip(grad.device))
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
        grads += _launch_inject_backward(grad, *indices, embed_scale, vocabulary, 0, 0, needs_embed)
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
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _launch_project(*args)

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
    check_plan(token_ids, plan)
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
        plan=plan.source,
    )
    floats = features, w1, b1, w2, b2, embed_weight, text_mean
    if impl == "reference":
        return project_and_inject_reference(*floats[:5], token_ids, *floats[5:], plan=plan, embed_scale=embed_scale)
    num_images, rows_per_image = features.shape[:2]
    image_sample = plan.image_sample(rows_per_image)[:num_images]
    if use_triton("project_and_inject", impl, features.device, features.dtype):
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in floats)
        place = plan.image_place[: num_images * rows_per_image]
        indices = plan.source, place, plan.align_place, image_sample
        sizes = rows_per_image, float(embed_scale), trained
        rows, dots, _ = _project(
            features.flatten(0, 1), w1, b1, w2, b2, token_ids.flatten(), embed_weight, text_mean, *indices, *sizes
        )
        return rows.view(*token_ids.shape, embed_weight.shape[1]), dots
    image_rows = fused_projector(features, w1, b1, w2, b2)
    unset = embed_weight.new_zeros(plan.align_place.shape[0], embed_weight.shape[1])
    embeddings = inject(token_ids, embed_weight, image_rows, unset, plan=plan, embed_scale=embed_scale)
    return embeddings, sample_dots(image_rows[: image_sample.shape[0]], text_mean, image_sample)
