"""Collating: order, padding, levels, supervised rows, and what is refused."""

import pytest
import torch

from aligngpt.batch import Example, collate
from aligngpt.text import TokenIds, Tokenized

IDS = TokenIds(image=11, align=10, pad=0)


def example(name, ids, answer=1, images=0, level=None):
    ids = torch.tensor(ids)
    labels = ids.clone()
    labels[: len(ids) - answer] = -100
    text = Tokenized(ids, labels, (ids < 10) & (torch.arange(len(ids)) > 0), images)
    return Example(name, text, torch.full((images, 3, 4, 4), float(len(name))), level)


def join(*examples, packed=False):
    return collate(examples, token_ids=IDS, rows_per_image=2, image_size=4, packed=packed)


def test_rows_keep_their_order_and_padding_is_nowhere_else():
    batch = join(
        example("a", [1, 5, 6, 7, 8], answer=2),
        example("bb", [1, 10, 11, 11, 3], images=1, level=4),
        example("ccc", [1, 10, 11, 11, 4, 11, 11, 9], images=2, level=0),
    )
    assert batch.ids == ["a", "bb", "ccc"]
    assert batch.input_ids.tolist()[1] == [1, 10, 11, 11, 3, 0, 0, 0]
    assert batch.attention_mask.sum(1).tolist() == [5, 5, 8]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [2, 3, 3]
    assert batch.align_levels.tolist() == [4, 0]
    assert batch.plan.align_place.tolist() == [9, 17]
    assert batch.plan.image_sample(2).tolist() == [0, 1, 1]
    # A supervised token at column c of row b is predicted at flat index 8·b + c - 1.
    assert batch.rows.tolist() == [2, 3, 8 + 3, 16 + 6]
    assert batch.num_supervised == 4
    assert not (batch.gate_mask & (batch.attention_mask == 0)).any()


def test_a_text_only_batch_holds_zero_images():
    batch = join(example("a", [1, 5, 6]))
    assert batch.pixel_values.shape == (0, 3, 4, 4)
    assert batch.align_levels is None
    assert batch.plan.align_place.shape == (0,)


def test_a_fully_masked_batch_has_no_rows():
    assert join(example("a", [1, 5, 6], answer=0)).rows.shape == (0,)


def test_mismatches_name_the_sample():
    with pytest.raises(ValueError, match="sample b: 2 image tokens for 2 images; 2 per image"):
        join(example("a", [1, 5]), example("b", [1, 10, 11, 11, 5], images=2))
    with pytest.raises(ValueError, match="sample b has no alignment level"):
        join(example("a", [1, 10, 11, 11, 5], images=1, level=1), example("b", [1, 10, 11, 11, 5], images=1))


def test_moving_a_batch_moves_its_plan():
    batch = join(example("a", [1, 10, 11, 11, 5], images=1, level=1)).to("meta")
    assert {t.device.type for t in (batch.input_ids, batch.rows, batch.plan.source, batch.align_levels)} == {"meta"}
    assert batch.plan.exact is True


def test_packed_samples_lie_end_to_end():
    batch = join(
        example("a", [1, 5, 6, 7, 8], answer=5),
        example("bb", [9]),
        example("ccc", [1, 10, 11, 11, 4, 11, 11, 9], images=2, level=6),
        packed=True,
    )
    assert batch.attention_mask is None
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 8, 9, 1, 10, 11, 11, 4, 11, 11, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.cu_seqlens.tolist(), batch.seq_lengths, batch.max_seqlen) == ([0, 5, 6, 14], (5, 1, 8), 8)
    # The labels of 1 and 9, each its sample's first token, are gone: what stands before them is no part of it.
    assert batch.labels.tolist() == [[-100, 5, 6, 7, 8, -100, -100, -100, -100, -100, -100, -100, -100, 9]]
    assert batch.rows.tolist() == [0, 1, 2, 3, 12]
    assert batch.plan.token_sample[batch.rows].tolist() == [-1, -1, -1, -1, 0]
    assert batch.plan.align_place.tolist() == [7]
    assert batch.num_tokens == 14
    moved = batch.to("meta")
    assert {moved.cu_seqlens.device.type, moved.position_ids.device.type} == {"meta"}
    assert moved.seq_lengths == (5, 1, 8)
    assert moved.num_tokens == 14


def test_a_packed_batch_of_nothing_is_one_token_that_teaches_nothing():
    batch = join(packed=True)
    assert (batch.ids, batch.input_ids.tolist(), batch.cu_seqlens.tolist()) == ([], [[0]], [0, 1])
    assert batch.num_tokens == batch.num_supervised == 0
    assert not batch.gate_mask.any()
