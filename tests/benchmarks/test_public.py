"""The public code's sequences as re-stated: where it is right they are ours, and where it is wrong they are not its."""

import pytest
import torch

from benchmarks.public import MARK, concatenate, cut_labels, search

WIDTH, ROWS, IGNORED = 4, 3, -100
ROWS_OF = [  # ids of a sample, and where its image stands
    ([1, 5, 6, MARK, 7], True),
    ([1, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], False),  # a text alone that is longer than all rows with an image
    ([1, MARK], True),
]
TABLE = torch.arange(1.0, 20)[:, None].expand(-1, WIDTH)


@pytest.mark.parametrize("left", [False, True], ids=["padded behind", "padded in front"])
@pytest.mark.parametrize("has_head", [True, False], ids=["AlignGPT", "LLaVA"])
def test_rows_keep_order_content_and_the_place_of_the_alignment_row(left, has_head):
    longest = max(len(ids) for ids, _ in ROWS_OF)

    def padded(rows, padding):
        filled = [
            [padding] * (longest - len(row)) + row if left else row + [padding] * (longest - len(row)) for row in rows
        ]
        return torch.tensor(filled)

    marked = padded([ids for ids, _ in ROWS_OF], 0)
    present = padded([[1] * len(ids) for ids, _ in ROWS_OF], 0).bool()
    labels = padded([[IGNORED if i == MARK else 100 + i for i in ids] for ids, _ in ROWS_OF], IGNORED)
    images = [torch.full((ROWS, WIDTH), -float(n)) for n in (1, 2)]
    seen = []

    def heads(texts, blocks):
        seen.append((texts, blocks))
        return torch.stack([torch.full((WIDTH,), -10.0), torch.full((WIDTH,), -20.0)])

    cuts = search(marked, present)
    rows = concatenate(cuts, lambda ids: TABLE[ids], images, heads if has_head else None)
    head = [[-10.0], [-20.0]] if has_head else [[], []]
    expected = [
        [2, *head[0], 6, 7, -1, -1, -1, 8],
        [2, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18],
        [2, *head[1], -2, -2, -2],
    ]
    assert [row.tolist() for row in rows[..., 0]] == [row + [0] * (11 - len(row)) for row in expected]
    assert bool((rows == rows[..., :1]).all())

    found = cut_labels(labels, present, cuts, image_rows=ROWS, has_head=has_head, ignored=IGNORED)
    none = [IGNORED] * has_head
    assert [row.tolist() for row in found] == [
        [101, *none, 105, 106, *[IGNORED] * ROWS, 107],
        [101, *range(108, 118)],
        [101, *none, *[IGNORED] * ROWS],
    ]
    if has_head:
        ((texts, blocks),) = seen
        assert texts[..., 0].tolist() == [[2, 6, 7, 8], [2, 0, 0, 0]]
        assert torch.equal(blocks, torch.stack(images))


def test_several_images_of_a_sample_are_refused():
    ids = torch.tensor([[1, MARK, 5, MARK]])
    with pytest.raises(ValueError, match="a sample of 2 images"):
        search(ids, torch.ones_like(ids, dtype=torch.bool))
