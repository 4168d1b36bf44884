"""The sequences of the public AlignGPT code, re-stated from its description: a loop over samples, each concatenated.

    [BOS, H, …text…, P image rows, …text…]

`search` finds the images in padded ids, `concatenate` builds the rows, `cut_labels` does with labels what is done with
ids. What the public code costs is left as it is: for every sample the host waits for the device four times (`search`);
its text is embedded and cut, and its rows, its text and its image are concatenated each by itself; the three kinds are
padded with zeros to the longest and stacked, text and image for the gate alone; then the alignment rows H go in by one
more concatenation. No op of the project is used.

Where the public code is wrong, this page does not follow it, so that it can be held to the project's answers:

    samples are reordered, those with an image first        here they keep their order
    a text alone is cut to the longest row with an image    here all rows are as long as the longest
    with padding on the left, H stands behind the first pad here rows are padded behind, and H is always second
    a sample of several images crashes the gate             here it is refused by name
    the gate is tied to 576 patches                         here `heads` makes H, of images of any P
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MARK = -200  # stands in the ids for an image


class Cut(NamedTuple):
    """A sample's text ids before its image and after it; None: it has no image, and all of them come before."""

    before: Tensor
    after: Tensor | None


Embed = Callable[[Tensor], Tensor]  # rows of text ids
Heads = Callable[[Tensor, Tensor], Tensor]  # alignment rows (S, D) of texts (S, longest, D) and images (S, P, D)


def search(
    marked: Tensor,  # (B, L) ids with a MARK where an image goes
    present: Tensor,  # (B, L) bool, False at padding
) -> list[Cut]:
    """Each sample's text before and after its image, found on the device: drop padding, count images, find them."""
    cuts = []
    for row, kept in zip(marked, present, strict=True):
        ids = row[kept]
        count = int((ids == MARK).sum())
        if count == 0:
            cuts.append(Cut(ids, None))
            continue
        if count > 1:
            raise ValueError(f"marked has a sample of {count} images; the public code's gate takes one")
        (at,) = torch.where(ids == MARK)[0].tolist()
        cuts.append(Cut(ids[:at], ids[at + 1 :]))
    return cuts


def concatenate(
    cuts: Sequence[Cut],
    embed: Embed,
    images: Iterable[Tensor],  # (P, D), of the samples that have one, in order
    heads: Heads | None,  # None: no alignment rows, which is LLaVA
    *,
    packed: bool = False,  # one row of all samples, end to end, where each has an image
) -> Tensor:
    """The rows that the LLM is given, (B, L, D) with zeros at padding, or (T, D) packed."""
    samples, alone, texts, image_blocks = [], [], [], []
    images = iter(images)
    for cut in cuts:
        if cut.after is None:
            alone.append(embed(cut.before))
            continue
        before, after = embed(torch.cat([cut.before, cut.after])).split([len(cut.before), len(cut.after)])
        image = next(images)
        samples.append(torch.cat([before, image, after]))
        if heads is not None:
            texts.append(torch.cat([before, after]))
            image_blocks.append(torch.cat([image]))
    if not samples:
        return pad_and_stack(alone)
    align_rows = None if heads is None else heads(pad_and_stack(texts), pad_and_stack(image_blocks))
    if packed:
        assert align_rows is not None
        assert not alone
        return torch.cat([p for s, h in zip(samples, align_rows, strict=True) for p in (s[:1], h[None], s[1:])])
    rows = pad_and_stack(samples)
    if align_rows is not None:
        rows = torch.cat([rows[:, :1], align_rows[:, None], rows[:, 1:]], dim=1)
    if not alone:
        return rows
    with_image, without = iter(rows), iter(alone)
    return pad_and_stack([next(without if cut.after is None else with_image) for cut in cuts])


def cut_labels(
    labels: Tensor,  # (B, L), beside the marked ids
    present: Tensor,
    cuts: Sequence[Cut],
    *,
    image_rows: int,
    has_head: bool,
    ignored: int,
) -> list[Tensor]:
    """Each sample's labels beside its rows: `ignored` at alignment and image rows."""
    found = []
    for row, kept, cut in zip(labels, present, cuts, strict=True):
        own = row[kept]
        if cut.after is None:
            found.append(own)
            continue
        at, nothing = len(cut.before), own.new_full((image_rows + has_head,), ignored)
        found.append(torch.cat([own[:1], nothing[:has_head], own[1:at], nothing[has_head:], own[at + 1 :]]))
    return found


def pad_and_stack(blocks: Sequence[Tensor]) -> Tensor:
    """Rows (L, D) of several lengths as (B, longest, D), zeros behind the shorter ones."""
    longest = max(len(block) for block in blocks)
    padded = [torch.cat([block, block.new_zeros(longest - len(block), block.shape[1])]) for block in blocks]
    return torch.stack(padded)
