"""inject: the LLM's input rows, put together from text, image and alignment rows in one pass.

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
    Impl,
    check_devices,
    check_floats,
    check_ints,
    check_shape,
    launch_options,
    register,
    tl,
    triton,
    use_triton,
)
from .embedding import embedding_grad
from .plan import InjectionPlan, check_plan, non_image_positions


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
            return rows.masked_fill(missing[:, None], torch.nan)

        at = non_image_positions(plan)
        out = embed_weight.new_empty(ids.shape[0], embed_weight.shape[1])
        _write(out, at, _text_rows(ids[at], plan.source[at], embed_weight, embed_scale))
        # An alignment row without a place goes where an image row is about to be written.
        align_place = torch.where(plan.align_place < 0, plan.image_place[:1], plan.align_place)
        _write(out, align_place, align_rows[:num_samples])
        _write(out, plan.image_place, image_rows[:num_image_rows])
        # torch 2.11 compiles a Function whose result was written in place into one without a gradient.
        return out.clone() if torch.compiler.is_compiling() else out

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


def inject_tile(width: int, element_bytes: int) -> InjectTile:
    """A row in as few programs as keep every thread at 64 bytes or less: four 16-byte moves in flight, no spill."""
    block_d = min(triton.next_power_of_2(max(width, 1)), 8192 // element_bytes)
    return InjectTile(block_d, num_warps=max(1, block_d * element_bytes // (32 * 64)))


@triton.jit(do_not_specialize=["num_image_rows", "num_align_rows"])
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


@triton.jit(do_not_specialize=["image_rows", "align_rows", "num_image_places", "num_align_places"])
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
    tile = inject_tile(width, out.element_size())
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


def launch_inject_backward(
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
        tile = inject_tile(width, grad.element_size())
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


_inject_backward = register("inject_backward", launch_inject_backward, _fake_inject_backward)
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
    check_plan("inject", token_ids, plan)
    check_devices(
        "inject",
        token_ids=token_ids,
        embed_weight=embed_weight,
        image_rows=image_rows,
        align_rows=align_rows,
    )
    if use_triton("inject", impl, embed_weight.device, embed_weight.dtype):
        indices = plan.source, plan.image_place, plan.align_place
        rows = _inject(
            token_ids.flatten(), embed_weight, image_rows.flatten(0, 1), align_rows, *indices, float(embed_scale)
        )
        return rows.view(*token_ids.shape, embed_weight.shape[1])
    return inject_reference(token_ids, embed_weight, image_rows, align_rows, plan=plan, embed_scale=embed_scale)
