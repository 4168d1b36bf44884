"""Where every row of a multimodal sequence comes from, as int32 index tensors.

The ids hold P placeholder tokens per image and one `<align>` token per sequence that has an image. The plan turns them
into indices once per batch (on the host by the collator, or on the device in `generate`); the ops and their backward
then only gather and scatter. All of it is comparisons, cumulative sums and scatters: no loop over samples, and no
device-to-host copy when the sizes are given.

A *sequence* is a row of (B, L) ids, or a span of packed (T,) ids. A *sample* is a sequence that has an image token; the
S samples are numbered in order. Packed or padded, positions are flat: token (b, l) has position b * L + l.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import check_devices, check_ints, check_shape, to_device

NO_ALIGN_ROW = torch.iinfo(torch.int32).min  # source of an <align> that no sample owns: reads as a missing row


class InjectionPlan(NamedTuple):
    """Source row of each token, and the place of each image and align row. R image rows, S samples, T tokens."""

    source: Tensor  # (T,) int32: -1 text; r >= 0 image row r; <= -2 align row (-2 - source)
    token_sample: Tensor  # (T,) int32: sample of the token's sequence; -1: its sequence has no image
    image_place: Tensor  # (R,) int32: position of each image row; -1: the row is unused
    align_place: Tensor  # (S,) int32: position of each sample's <align>; -1: it has none
    exact: bool  # made by counting: R is the number of image tokens, S of samples, and every <align> has its row

    def to(self, device: torch.device | str) -> "InjectionPlan":
        """The plan on another device, without waiting for what runs there."""
        source, token_sample, image_place, align_place = (to_device(index, device) for index in self[:4])
        return InjectionPlan(source, token_sample, image_place, align_place, self.exact)

    def image_sample(self, rows_per_image: int) -> Tensor:  # (M,)
        """The sample each image belongs to, -1 for an unused image.

        Raises ValueError if the R image rows are not a whole number of images.
        """
        num_rows = self.image_place.shape[0]
        if num_rows % rows_per_image:
            raise ValueError(
                f"rows_per_image is {rows_per_image}; the plan has {num_rows} image rows and needs a divisor of that"
            )
        first = self.image_place[::rows_per_image]
        return torch.where(first < 0, -1, self.token_sample[first.clamp(min=0)])


def injection_plan(
    token_ids: Tensor,  # (B, L) padded or (T,) packed, int32 or int64
    *,
    image_token_id: int,
    align_token_id: int,
    cu_seqlens: Tensor | None = None,  # (num_sequences + 1,), only with (T,) ids; without it they are one sequence
    num_image_rows: int | None = None,
    num_samples: int | None = None,
) -> InjectionPlan:
    """Make the plan of a batch.

    Without `num_image_rows` and `num_samples` they are counted, which on a GPU waits for the device. Given, they fix
    the shapes and nothing waits; they may be upper bounds, and entries that do not exist are -1. An image token past
    `num_image_rows`, and an `<align>` that is its sequence's second or stands in a sequence without an image, have no
    row: `inject` makes them NaN.

    Raises ValueError for ids that are not integers of one or two dimensions, or `cu_seqlens` with two.
    """
    check_ints("injection_plan", token_ids=token_ids)
    if token_ids.dim() not in (1, 2):
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}; it needs (batch, length) or (tokens,)")
    if cu_seqlens is not None:
        check_ints("injection_plan", cu_seqlens=cu_seqlens)
        check_shape("cu_seqlens", cu_seqlens, ("sequences + 1",))
        check_shape("token_ids with cu_seqlens", token_ids, ("tokens",))
        check_devices("injection_plan", token_ids=token_ids, cu_seqlens=cu_seqlens)

    ids = token_ids.flatten()
    is_image, is_align = ids == image_token_id, ids == align_token_id
    position = torch.arange(ids.numel(), device=ids.device)
    if cu_seqlens is not None:
        sequence = torch.bucketize(position, cu_seqlens[1:].contiguous(), right=True)
        num_sequences = cu_seqlens.shape[0]  # one more, for tokens past the last span
    else:
        sequence = position // max(token_ids.shape[-1], 1)
        num_sequences = token_ids.shape[0] if token_ids.dim() == 2 else 1

    images_in = position.new_zeros(num_sequences).scatter_add_(0, sequence, is_image.long())
    sample_of_sequence = torch.where(images_in > 0, (images_in > 0).cumsum(0) - 1, -1)
    token_sample = sample_of_sequence[sequence]

    exact = num_image_rows is None and num_samples is None
    if num_image_rows is None:
        num_image_rows = int(is_image.sum())
    if num_samples is None:
        num_samples = int((images_in > 0).sum())

    first_align = position.new_full((num_sequences,), ids.numel())
    first_align = first_align.scatter_reduce_(0, sequence, torch.where(is_align, position, ids.numel()), "amin")
    owns_row = is_align & (position == first_align[sequence]) & (token_sample >= 0)
    align_place = position.new_full((num_samples + 1,), -1)  # the last entry takes what has no sample
    align_place.scatter_(0, torch.where(owns_row, token_sample, num_samples).clamp(max=num_samples), position)
    exact = exact and bool((owns_row == is_align).all())

    source = torch.where(is_image, is_image.cumsum(0) - 1, -1)
    source = torch.where(is_align, torch.where(owns_row, -2 - token_sample, NO_ALIGN_ROW), source)
    return InjectionPlan(
        source.int(),
        token_sample.int(),
        positions(is_image, num_image_rows).int(),
        align_place[:num_samples].int(),
        exact,
    )


def positions(mask: Tensor, size: int) -> Tensor:  # (T,) bool -> (size,) int64
    """The first `size` positions where `mask` holds, in order, then -1: `nonzero` without its wait for the device."""
    rank = mask.cumsum(0) - 1
    slot = torch.where(mask & (rank < size), rank, size)  # slot `size` takes what is not wanted
    return rank.new_full((size + 1,), -1).scatter_(0, slot, torch.arange(mask.numel(), device=mask.device))[:size]


def non_image_positions(plan: InjectionPlan) -> Tensor:  # (T - R,) int64, or (T,)
    """Positions of the tokens that are no image row; of an inexact plan, whose count is unknown, all positions."""
    num_tokens = plan.source.shape[0]
    if not plan.exact:
        return torch.arange(num_tokens, device=plan.source.device)
    return positions(plan.source < 0, num_tokens - plan.image_place.shape[0])


def check_plan(op: str, token_ids: Tensor, plan: InjectionPlan) -> None:
    """The ids an op is given must be as many as the plan was made from, on its device."""
    indices = {f"plan.{name}": tensor for name, tensor in zip(plan._fields[:4], plan[:4], strict=True)}
    check_devices(op, token_ids=token_ids, **indices)
    if token_ids.numel() != plan.source.shape[0]:
        raise ValueError(f"token_ids has {token_ids.numel()} tokens; the plan was made for {plan.source.shape[0]}")
