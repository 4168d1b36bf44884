"""linear_cross_entropy: the LLM's head and its loss, on the supervised rows only.

    loss_r = -log softmax(hidden_r @ weightᵀ)[label_r]

Image and prompt tokens carry no label, so most rows need no logits at all. Labels are already shifted: `labels[r]` is
what `hidden[r]` predicts.
"""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, check_floats, check_ints, check_shape, sum_dtype, use_triton

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


def linear_cross_entropy(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (R,) int, shifted; ignore_index: no loss
    *,
    rows: Tensor | None = None,  # int64 indices of the supervised rows, from the collator; None: all rows
    ignore_index: int = -100,
    reduction: Reduction = "sum",
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # loss float32, () or with "none" (R,); token losses (R,) float32, detached
    """Cross entropy of `hidden @ weightᵀ` against the labels, and the loss of each token for logging.

    `rows` limits the work to the rows named; the others count as ignored. "mean" divides by the number of labels that
    are not ignored, at least 1: without any, the loss and all gradients are 0. `label_smoothing` as in
    `torch.nn.functional.cross_entropy`. Softmax runs in float32 (float64 for float64 inputs). Raises ValueError for
    shapes or dtypes that differ, an unknown reduction, or a DTensor; KernelUnavailable for `impl="triton"` where
    Triton cannot run.
    """
    check_floats("linear_cross_entropy", hidden=hidden, weight=weight)
    check_ints("linear_cross_entropy", labels=labels)
    check_shape("hidden", hidden, ("R", "D"))
    check_shape("weight", weight, ("V", hidden.shape[1]))
    check_shape("labels", labels, (hidden.shape[0],))
    if rows is not None:
        check_ints("linear_cross_entropy", rows=rows)
        check_shape("rows", rows, ("supervised",))
        rows = rows.long()
    if reduction not in get_args(Reduction):
        raise ValueError(f'reduction is {reduction!r}; linear_cross_entropy needs "sum", "mean" or "none"')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; linear_cross_entropy needs 0 to 1")
    use_triton("linear_cross_entropy", impl, hidden.device)
    return linear_cross_entropy_reference(
        hidden,
        weight,
        labels,
        rows=rows,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
