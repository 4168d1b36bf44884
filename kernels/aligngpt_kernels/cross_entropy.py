"""linear_cross_entropy: the LLM's head and its loss, on the supervised rows only and never on all logits at once.

    loss_r = -log softmax(hidden_r @ weightᵀ)[label_r]

Image and prompt tokens carry no label, so most rows need no logits at all. Labels are already shifted: `labels[r]` is
what `hidden[r]` predicts. R rows, S of them supervised, V words, width D.

The supervised rows are gathered and taken in chunks. A chunk's logits are one product; one kernel reads each row of
them twice (softmax, then the gradient, written over the logits); two more products give the gradients of hidden rows
and weight. "sum" and "mean" do all of this in the forward, for the gradient of a sum is known but for one factor, by
which the backward multiplies what was kept. So logits are computed once and none are kept. The price: gradients of the
supervised rows and the weight are kept until the backward, and are wasted where none follows. "none" has a factor for
each row, so its backward computes each chunk's logits again.

Products run in the dtype of the inputs, softmax and loss in float32. The weight's gradient adds up in float32: within
the product where there is one chunk, in a float32 matrix where there are several, or in float16, whose range the sum
may leave before the backward's factor brings it back.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import (
    Impl,
    as_autocast,
    check_devices,
    check_floats,
    check_ints,
    check_shape,
    launch_options,
    register,
    sum_dtype,
    tl,
    triton,
    use_triton,
)
from .gemm import weight_grad

Reduction = Literal["sum", "mean", "none"]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "sum",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Full logits of the rows, then torch's cross entropy; arguments as `linear_cross_entropy`."""
    num_rows = hidden.shape[0]
    if rows is not None:
        hidden, labels = hidden[rows], labels[rows]
    logits = F.linear(hidden, weight).to(sum_dtype(hidden))
    losses = F.cross_entropy(
        logits, labels.long(), ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    each = losses if rows is None else losses.new_zeros(num_rows).index_copy(0, rows, losses)
    if reduction == "none":
        return each, each.detach()
    loss = losses.sum()
    if reduction == "mean":
        loss = loss / (labels != ignore_index).sum().clamp(min=1)
    return loss, each.detach()


LOGITS_BYTES = 163_840_000  # 2,560 rows of 32,000 words in 16 bits


def chunk_rows(num_rows: int, vocabulary: int, width: int, element_bytes: int) -> int:
    """Rows whose logits are held at once: chunks of about equal size, as few as the limit on the logits allows.

    The limit is LOGITS_BYTES, or half of the weight where that is more: every chunk after the first reads and writes
    the weight's float32 gradient, which only pays with about a thousand rows to add to it. Chunks start at multiples of
    128, so that what belongs to a chunk is aligned as the whole is.
    """
    limit = max(1, max(LOGITS_BYTES // element_bytes, vocabulary * width // 2) // max(vocabulary, 1))
    limit = limit // 128 * 128 or limit
    chunks = max(1, (num_rows + limit - 1) // limit)
    equal = (num_rows + chunks - 1) // chunks
    return max(1, min(limit, (equal + 127) // 128 * 128))


def sums_apart(num_rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the weight's gradient adds up in a float32 matrix of its own."""
    return dtype == torch.float16 or num_rows > chunk_rows(num_rows, vocabulary, width, dtype.itemsize)


class RowTile(NamedTuple):
    """Layout of the program that owns a row of logits: the columns it looks at together."""

    block_v: int
    num_warps: int


def row_tile(vocabulary: int) -> RowTile:
    """16 columns a thread: in 16 bits two 16-byte loads. 32 leave half as many blocks on a multiprocessor, or spill."""
    block_v = min(triton.next_power_of_2(max(vocabulary, 1)), 4096)
    return RowTile(block_v, num_warps=max(1, block_v // (32 * 16)))


@triton.jit
def _row_loss_kernel(
    p_logits,  # (rows, stride), of which V columns are logits; overwritten with their gradient if WITH_GRAD
    p_labels,  # (rows,)
    p_factor,  # (rows,) float32, gradient of each row's loss, if WITH_FACTOR
    p_loss,  # (rows,) float32
    vocabulary,
    stride,  # a multiple of 16, so that whole vectors are moved whatever the vocabulary
    ignore_index,
    on_label,  # what the target gives the label, and every word: 1 and 0 without smoothing
    on_word,
    SMOOTH: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    WITH_FACTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One row a program.
    i_r = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + i_r).to(tl.int64)
    p_row = p_logits + i_r * stride
    if label == ignore_index:
        tl.store(p_loss + i_r, 0.0)
        if WITH_GRAD:
            for i_v in range(0, vocabulary, BLOCK_V):
                o_v = i_v + tl.arange(0, BLOCK_V)
                b_zero = tl.zeros((BLOCK_V,), p_logits.dtype.element_ty)
                tl.store(p_row + o_v, b_zero, mask=o_v < stride)
    else:
        inside = (label >= 0) & (label < vocabulary)
        chosen = tl.load(p_row + label, mask=inside, other=float("nan")).to(tl.float32)
        maximum = -float("inf")
        # (BLOCK_V,)
        b_sum = tl.zeros((BLOCK_V,), tl.float32)
        b_above = tl.zeros((BLOCK_V,), tl.float32)  # sums of logits, counted from the label's
        for i_v in range(0, vocabulary, BLOCK_V):
            o_v = i_v + tl.arange(0, BLOCK_V)
            # (BLOCK_V,)
            b_x = tl.load(p_row + o_v, mask=o_v < stride, other=0).to(tl.float32)
            b_x = tl.where(o_v < vocabulary, b_x, -float("inf"))
            before = maximum
            maximum = tl.maximum(before, tl.max(b_x, 0))
            b_sum = b_sum * tl.exp(before - maximum) + tl.exp(b_x - maximum)
            if SMOOTH:
                b_above += tl.where(o_v < vocabulary, b_x - chosen, 0.0)
        log_sum = tl.log(tl.sum(b_sum, 0))
        loss = log_sum + (maximum - chosen)
        if SMOOTH:
            loss -= on_word * tl.sum(b_above, 0)
        tl.store(p_loss + i_r, loss)

        if WITH_GRAD:
            factor = tl.where(inside, 1.0, float("nan"))
            if WITH_FACTOR:
                factor *= tl.load(p_factor + i_r)
            for i_v in range(0, vocabulary, BLOCK_V):
                o_v = i_v + tl.arange(0, BLOCK_V)
                # (BLOCK_V,)
                b_x = tl.load(p_row + o_v, mask=o_v < stride, other=0).to(tl.float32)
                b_x = tl.where(o_v < vocabulary, b_x, -float("inf"))
                b_grad = tl.exp(b_x - maximum - log_sum)  # for a probability near 1 more exact than a quotient
                if SMOOTH:
                    b_grad -= on_word
                b_grad -= tl.where(o_v == label, on_label, 0.0)
                tl.store(p_row + o_v, (b_grad * factor).to(p_logits.dtype.element_ty), mask=o_v < stride)


@triton.jit
def _scale_kernel(
    p_x,  # (n,)
    p_factor,  # (1,) float32
    p_out,  # (n,)
    num_elements,
    BLOCK: tl.constexpr,
):
    # torch's product with a tensor of no dimension would round that factor to a 16-bit dtype first.
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # (BLOCK,)
    b_x = tl.load(p_x + o_x, mask=o_x < num_elements, other=0).to(tl.float32)
    tl.store(p_out + o_x, (b_x * tl.load(p_factor)).to(p_out.dtype.element_ty), mask=o_x < num_elements)


def _by_chunks(
    hidden: Tensor,  # (S, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (S,)
    factor: Tensor | None,  # (S,) float32, gradient of each loss; None: 1
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (S,) losses; (S, D), (V, D), the latter float32 by `sums_apart`; or without rows
    (num_rows, width), vocabulary, dtype = hidden.shape, weight.shape[0], hidden.dtype
    apart = sums_apart(num_rows, vocabulary, width, dtype)
    chunk = chunk_rows(num_rows, vocabulary, width, dtype.itemsize)
    tile = row_tile(vocabulary)

    losses = hidden.new_empty(num_rows, dtype=torch.float32)
    grad_hidden = hidden.new_empty(num_rows if need_hidden else 0, width)
    grad_weight = weight.new_empty(vocabulary if need_weight else 0, width, dtype=torch.float32 if apart else dtype)
    if apart or num_rows == 0:
        grad_weight.zero_()
    stride = (vocabulary + 15) // 16 * 16
    buffer = hidden.new_empty(min(chunk, num_rows), stride)
    labels = labels.contiguous()
    for start in range(0, num_rows, chunk):
        h = hidden[start : start + chunk]
        logits = torch.mm(h, weight.t(), out=buffer[: h.shape[0], :vocabulary])
        _row_loss_kernel[(h.shape[0],)](
            logits,
            labels[start : start + chunk],
            losses if factor is None else factor[start : start + chunk],
            losses[start : start + chunk],
            vocabulary,
            stride,
            ignore_index,
            1.0 - label_smoothing,
            label_smoothing / max(vocabulary, 1),
            SMOOTH=label_smoothing > 0,
            WITH_GRAD=need_hidden or need_weight,
            WITH_FACTOR=factor is not None,
            BLOCK_V=tile.block_v,
            **launch_options(tile.num_warps, 1),
        )
        if need_hidden:
            torch.mm(logits, weight, out=grad_hidden[start : start + chunk])
        if need_weight and not apart:
            torch.mm(logits.t(), h, out=grad_weight)
        elif need_weight and dtype == torch.float32:
            grad_weight.addmm_(logits.t(), h)
        elif need_weight:
            weight_grad(logits, h, with_bias=False, into=grad_weight)
    return losses, grad_hidden, grad_weight


def _gather(hidden: Tensor, rows: Tensor | None) -> Tensor:
    return hidden if rows is None else hidden.index_select(0, rows)


def _scatter(values: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """Sums: a row may be named twice."""
    return values if rows is None else values.new_zeros(num_rows, *values.shape[1:]).index_add_(0, rows, values)


def _token_losses(losses: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    return losses if rows is None else losses.new_zeros(num_rows).index_copy_(0, rows, losses)


def _launch_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,  # (S,)
    rows: Tensor | None,  # (S,)
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss; token losses (R,); gradients of the S rows and the weight, or empty
    losses, grad_hidden, grad_weight = _by_chunks(
        _gather(hidden, rows), weight, labels, None, ignore_index, label_smoothing, need_hidden, need_weight
    )
    return losses.sum(), _token_losses(losses, rows, hidden.shape[0]), grad_hidden, grad_weight


def _launch_sum_backward(
    factor: Tensor,  # () float32
    grad_hidden: Tensor,  # (S, D)
    grad_weight: Tensor,  # (V, D)
    rows: Tensor | None,  # (S,)
    num_rows: int,
    needs: list[bool],  # gradient of hidden, weight
) -> list[Tensor]:  # the gradients that are needed, in that order
    grads = []
    if needs[0]:
        grads.append(_scatter(_scaled(grad_hidden, factor, grad_hidden.dtype), rows, num_rows))
    if needs[1]:
        grads.append(_scaled(grad_weight, factor, grad_hidden.dtype))
    return grads


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        block = 4096
        _scale_kernel[(triton.cdiv(x.numel(), block),)](x, factor, out, x.numel(), BLOCK=block, **launch_options(8, 1))
    return out


def _launch_each(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,  # (S,)
    rows: Tensor | None,  # (S,)
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:  # (R,)
    losses, _, _ = _by_chunks(_gather(hidden, rows), weight, labels, None, ignore_index, label_smoothing, False, False)
    return _token_losses(losses, rows, hidden.shape[0])


def _launch_each_backward(
    grad: Tensor,  # (R,) float32
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,  # (S,)
    rows: Tensor | None,  # (S,)
    ignore_index: int,
    label_smoothing: float,
    needs: list[bool],  # gradient of hidden, weight
) -> list[Tensor]:  # the gradients that are needed, in that order
    _, grad_hidden, grad_weight = _by_chunks(
        _gather(hidden, rows), weight, labels, _gather(grad, rows).contiguous(), ignore_index, label_smoothing, *needs
    )
    grads = []
    if needs[0]:
        grads.append(_scatter(grad_hidden, rows, hidden.shape[0]))
    if needs[1]:
        grads.append(grad_weight.to(weight.dtype))
    return grads


def _fake_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (vocabulary, width), num_rows = weight.shape, labels.shape[0]
    dtype = torch.float32 if sums_apart(num_rows, vocabulary, width, hidden.dtype) else hidden.dtype
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty(num_rows if need_hidden else 0, width),
        weight.new_empty(vocabulary if need_weight else 0, width, dtype=dtype),
    )


def _fake_sum_backward(
    factor: Tensor, grad_hidden: Tensor, grad_weight: Tensor, rows: Tensor | None, num_rows: int, needs: list[bool]
) -> list[Tensor]:
    shapes = zip(((num_rows, grad_hidden.shape[1]), grad_weight.shape), needs, strict=True)
    return [grad_hidden.new_empty(shape) for shape, needed in shapes if needed]


def _fake_each(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _fake_each_backward(grad: Tensor, hidden: Tensor, weight: Tensor, *more: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, needed in zip((hidden, weight), more[-1], strict=True) if needed]


class _Sum(torch.autograd.Function):
    """Keeps the gradients themselves, of the supervised rows and the weight."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, _, _, rows, _, _, *ctx.needs = inputs
        ctx.save_for_backward(*output[2:], rows)
        ctx.num_rows = hidden.shape[0]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # for the kept gradients they would be zeros of the weight's size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = iter(_sum_backward(grads[0], *ctx.saved_tensors, ctx.num_rows, ctx.needs))
        return *(next(needed) if need else None for need in ctx.needs), *[None] * 6


class _Each(torch.autograd.Function):
    """Keeps its arguments alone."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.ignore_index, ctx.label_smoothing = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:2])
        needed = iter(_each_backward(grads[0], *ctx.saved_tensors, ctx.ignore_index, ctx.label_smoothing, needs))
        return *(next(needed) if need else None for need in needs), *[None] * 4


_sum_backward = register("linear_cross_entropy_sum_backward", _launch_sum_backward, _fake_sum_backward)
_sum = register("linear_cross_entropy_sum", _launch_sum, _fake_sum, _Sum)
_each_backward = register("linear_cross_entropy_each_backward", _launch_each_backward, _fake_each_backward)
_each = register("linear_cross_entropy_each", _launch_each, _fake_each, _Each)


def linear_cross_entropy(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (R,) int, shifted; ignore_index: no loss
    *,
    rows: Tensor | None = None,  # int indices of the supervised rows, from the collator; None: all rows
    ignore_index: int = -100,
    reduction: Reduction = "sum",
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # loss float32, () or with "none" (R,); token losses (R,) float32, detached
    """Cross entropy of `hidden @ weightᵀ` against the labels, and the loss of each token for logging.

    `rows` limits the work to the rows named; the others count as ignored. "mean" divides by the number of labels that
    are not ignored, at least 1: without any, the loss and all gradients are 0. `label_smoothing` as in
    `torch.nn.functional.cross_entropy`. Softmax runs in float32 (float64 for float64 inputs). A label that is neither a
    word nor `ignore_index` makes the loss NaN on Triton, and is an error of torch's in the reference. Raises ValueError
    for shapes, dtypes or devices that differ, an unknown reduction, or a DTensor; KernelUnavailable for
    `impl="triton"` where Triton cannot run.
    """
    hidden, weight = as_autocast(hidden, weight)
    check_floats("linear_cross_entropy", hidden=hidden, weight=weight)
    check_ints("linear_cross_entropy", labels=labels)
    check_shape("hidden", hidden, ("R", "D"))
    check_shape("weight", weight, ("V", hidden.shape[1]))
    check_shape("labels", labels, (hidden.shape[0],))
    check_devices("linear_cross_entropy", hidden=hidden, weight=weight, labels=labels)
    if rows is not None:
        check_ints("linear_cross_entropy", rows=rows)
        check_shape("rows", rows, ("supervised",))
        check_devices("linear_cross_entropy", hidden=hidden, rows=rows)
        rows = rows.long()
    if reduction not in get_args(Reduction):
        raise ValueError(f'reduction is {reduction!r}; linear_cross_entropy needs "sum", "mean" or "none"')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; linear_cross_entropy needs 0 to 1")
    if not use_triton("linear_cross_entropy", impl, hidden.device, hidden.dtype):
        return linear_cross_entropy_reference(
            hidden,
            weight,
            labels,
            rows=rows,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if rows is not None:
        labels = labels.index_select(0, rows)
    options = ignore_index, float(label_smoothing)
    if reduction == "none":
        each = _each(hidden, weight, labels, rows, *options)
        return each, each.detach()
    needs = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    loss, each, *_ = _sum(hidden, weight, labels, rows, *options, *needs)
    if reduction == "mean":
        loss = loss / (labels != ignore_index).sum().clamp(min=1)
    return loss, each


class LinearCrossEntropy(torch.nn.Module):
    """`linear_cross_entropy` with the weight of an LLM's head as its parameter.

    The weight is read in `forward`, so that `fully_shard(module)` gathers it around the call.
    """

    def __init__(
        self,
        weight: torch.nn.Parameter,  # (V, D)
        *,
        ignore_index: int = -100,
        reduction: Reduction = "sum",
        label_smoothing: float = 0.0,
        impl: Impl = "auto",
    ):
        super().__init__()
        self.weight = weight
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.impl = impl

    def forward(self, hidden: Tensor, labels: Tensor, *, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Arguments and results as those of `linear_cross_entropy`."""
        return linear_cross_entropy(
            hidden,
            self.weight,
            labels,
            rows=rows,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            impl=self.impl,
        )
