"""text_mean and align_gate: how much of each alignment level a sample's image and text call for.

    t̄   = Σ T / (count + 1e-8)                       mean of the text embeddings, (S, D)
    dots = mean over the sample's images of ⟨I_p, t̄⟩  (S, P)
    α    = softmax(W2 gelu(W1 dots + b1) + b2)         (S, N - 1)
    H    = α @ table[:-1] + table[-1]                  (S, D), one alignment row per sample

S samples (sequences with an image), M images of P rows, width D, N levels of which the last row of the table is the
global one. Sums, dots and softmax run in float32 (float64 for float64 inputs). Source: arXiv 2405.14129, section 3;
the modes are its ablations; the mean over several images is ours.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, check_floats, check_ints, check_plain, check_shape, keep_in_graph, sum_dtype, use_triton
from .plan import InjectionPlan, check_plan, non_image_positions

Mode = Literal["adaptive", "local", "global", "average"]


def text_mean_reference(
    token_ids: Tensor, embed_weight: Tensor, gate_mask: Tensor | None, plan: InjectionPlan, *, embed_scale: float = 1.0
) -> Tensor:
    """t̄ as a product with a (samples, tokens) membership matrix: unlike `index_add`, the same sum in every run."""
    dtype = sum_dtype(embed_weight)
    sample, source = plan.token_sample, plan.source
    if gate_mask is None:
        starts = torch.ones_like(sample, dtype=torch.bool)  # neighbours of different samples are different sequences
        starts[1:] = sample[1:] != sample[:-1]
        chosen = (source == -1) & ~starts
    else:
        chosen = (source == -1) & gate_mask.flatten()
    at = non_image_positions(plan)
    samples = torch.arange(plan.align_place.shape[0], device=sample.device)
    member = ((sample[at] == samples[:, None]) & chosen[at]).to(dtype)  # (S, tokens)
    ids = torch.where(chosen, token_ids.flatten(), 0)[at]
    total = member @ F.embedding(ids, embed_weight).to(dtype)
    return total * embed_scale / (member.sum(1, keepdim=True) + 1e-8)


def text_mean(
    token_ids: Tensor,  # (B, L) or (T,), the ids the plan was made from
    embed_weight: Tensor,  # (V, D)
    gate_mask: Tensor | None,  # bool, shape of the ids; None: all text but the first token of each sequence
    plan: InjectionPlan,
    *,
    embed_scale: float = 1.0,  # what the embedding module multiplies its rows by
    impl: Impl = "auto",
) -> Tensor:  # (S, D) float32
    """Mean text embedding of each sample, `embed_scale * Σ embed_weight[id] / (count + 1e-8)`; 0 without text.

    Image and align tokens never enter, whatever the mask says, and their ids are never read. Padding enters unless
    `gate_mask` leaves it out. The gradient goes to `embed_weight`, zeros where there are no samples. Raises ValueError
    for shapes that differ from the plan's, a mask that is not bool, or a DTensor; KernelUnavailable for
    `impl="triton"` where Triton cannot run.
    """
    check_ints("text_mean", token_ids=token_ids)
    check_floats("text_mean", embed_weight=embed_weight)
    check_shape("embed_weight", embed_weight, ("V", "D"))
    check_plan(token_ids, plan)
    if gate_mask is not None:
        check_plain("text_mean", gate_mask=gate_mask)
        check_shape("gate_mask", gate_mask, token_ids.shape)
        if gate_mask.dtype != torch.bool:
            raise ValueError(f"gate_mask is {gate_mask.dtype}; text_mean needs torch.bool")
    use_triton("text_mean", impl, embed_weight.device)
    return text_mean_reference(token_ids, embed_weight, gate_mask, plan, embed_scale=embed_scale)


def sample_dots(image_rows: Tensor, text_mean: Tensor, image_sample: Tensor) -> Tensor:  # (M, P, D), (S, D), (M,)
    """⟨I_p, t̄⟩ of each image, averaged over the images of a sample: (S, P)."""
    dtype = sum_dtype(image_rows)
    samples = torch.arange(text_mean.shape[0], device=image_sample.device)
    member = (image_sample == samples[:, None]).to(dtype)  # (S, M)
    mean_of_image = member.T @ text_mean.to(dtype)
    dots = torch.bmm(image_rows.to(dtype), mean_of_image[:, :, None])[:, :, 0]
    return member @ dots / member.sum(1, keepdim=True).clamp(min=1)


def mix_levels(alpha: Tensor, table: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:  # (S, N - 1), (N, D)
    """H (S, D) in alpha's dtype, and the weights its local levels were mixed with, by the table of `align_gate`.

    "average" and "global" read nothing of alpha but its shape.
    """
    local_rows, global_row = table.to(alpha.dtype).split([table.shape[0] - 1, 1])
    if mode == "global":
        return global_row.expand(alpha.shape[0], -1), torch.zeros_like(alpha)
    weights = torch.full_like(alpha, 1 / local_rows.shape[0]) if mode == "average" else alpha
    h = weights @ local_rows
    return (h if mode == "local" else h + global_row), weights


def align_gate_reference(
    image_rows: Tensor,
    text_mean: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    table: Tensor,
    *,
    image_sample: Tensor,
    mode: Mode,
) -> tuple[Tensor, Tensor]:
    """The formulas above in plain PyTorch; arguments as `align_gate`."""
    dtype = sum_dtype(image_rows)
    if mode in ("adaptive", "local"):
        dots = sample_dots(image_rows, text_mean, image_sample)
        hidden = F.gelu(F.linear(dots, w1.to(dtype), b1.to(dtype)))
        alpha = F.linear(hidden, w2.to(dtype), b2.to(dtype)).softmax(-1)
        h, weights = mix_levels(alpha, table, mode)
        return h.to(image_rows.dtype), weights
    h, weights = mix_levels(text_mean.new_empty(text_mean.shape[0], table.shape[0] - 1, dtype=dtype), table, mode)
    return keep_in_graph(h.to(image_rows.dtype), image_rows, text_mean, w1, b1, w2, b2), weights


def align_gate(
    image_rows: Tensor,  # (M, P, D), after the projector
    text_mean: Tensor,  # (S, D)
    w1: Tensor,  # (hidden, P)
    b1: Tensor,  # (hidden,)
    w2: Tensor,  # (N - 1, hidden)
    b2: Tensor,  # (N - 1,)
    table: Tensor,  # (N, D)
    *,
    image_sample: Tensor,  # (M,) int, from InjectionPlan.image_sample; -1: an unused image
    mode: Mode,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # (S, D) in image_rows' dtype, (S, N - 1) float32
    """The alignment row H of each sample, and the weights its local levels were mixed with.

    | mode       | H                                  | weights            |
    |------------|------------------------------------|--------------------|
    | "adaptive" | `α @ table[:-1] + table[-1]`       | α                  |
    | "local"    | `α @ table[:-1]`                   | α                  |
    | "global"   | `table[-1]`                        | 0                  |
    | "average"  | `mean(table[:-1]) + table[-1]`     | `1 / (N - 1)`      |

    Every argument gets a gradient in every mode, zeros where the mode does not use it or there are no samples. The
    text mean may be float32 beside 16-bit weights. Raises ValueError for shapes that do not fit (an image of 575 rows,
    a gate built for 576), dtypes that differ, an unknown mode, or a DTensor; KernelUnavailable for `impl="triton"`
    where Triton cannot run.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; align_gate needs one of {', '.join(map(repr, get_args(Mode)))}")
    check_floats("align_gate", image_rows=image_rows, w1=w1, b1=b1, w2=w2, b2=b2, table=table)
    check_floats("align_gate", text_mean=text_mean)
    check_ints("align_gate", image_sample=image_sample)
    check_shape("image_rows", image_rows, ("images", "rows", "D"))
    num_images, rows_per_image, width = image_rows.shape
    check_shape("w1", w1, ("hidden", "rows"))
    if w1.shape[1] != rows_per_image:
        raise ValueError(f"image_rows has {rows_per_image} rows per image; the gate was built for {w1.shape[1]}")
    check_shape("b1", b1, (w1.shape[0],))
    check_shape("table", table, ("levels", width))
    if table.shape[0] < 2:
        raise ValueError(f"table has {table.shape[0]} levels; align_gate needs 2 or more, the last of them global")
    check_shape("w2", w2, (table.shape[0] - 1, w1.shape[0]))
    check_shape("b2", b2, (table.shape[0] - 1,))
    check_shape("text_mean", text_mean, ("samples", width))
    check_shape("image_sample", image_sample, (num_images,))
    use_triton("align_gate", impl, image_rows.device)
    return align_gate_reference(image_rows, text_mean, w1, b1, w2, b2, table, image_sample=image_sample, mode=mode)
