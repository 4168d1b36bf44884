"""The plan's indices against a reading of the ids one token at a time."""

import pytest
import torch
from aligngpt_kernels import InjectionPlan, inject, injection_plan
from torch import Tensor

IMAGE, ALIGN, BOS = 40, 41, 1
NO_ROW = torch.iinfo(torch.int32).min


def read_one_by_one(sequences: list[list[int]]) -> dict[str, list[int]]:
    source, token_sample, image_place, align_place = [], [], [], []
    for ids in sequences:
        sample = len(align_place) if IMAGE in ids else -1
        if sample >= 0:
            align_place.append(-1)
        for token in ids:
            if token == IMAGE:
                source.append(len(image_place))
                image_place.append(len(token_sample))
            elif token == ALIGN and sample >= 0 and align_place[sample] == -1:
                source.append(-2 - sample)
                align_place[sample] = len(token_sample)
            else:
                source.append(NO_ROW if token == ALIGN else -1)
            token_sample.append(sample)
    return {"source": source, "token_sample": token_sample, "image_place": image_place, "align_place": align_place}


SEQUENCES = {
    "text, one image, several images, image first": [
        [BOS, 5, 6],
        [BOS, ALIGN, 7, IMAGE, IMAGE, 8, 9],
        [BOS, ALIGN, IMAGE, IMAGE, 3, IMAGE, IMAGE, 4],
        [ALIGN, IMAGE, IMAGE],
    ],
    "no image at all": [[BOS, 5], [BOS, 6, 7]],
    "image without align (mode none)": [[BOS, IMAGE, IMAGE, 5]],
    "second align, and align without an image": [[BOS, ALIGN, ALIGN, IMAGE, IMAGE], [BOS, ALIGN, 4]],
    "one token": [[BOS]],
}


def plan_of(ids: Tensor, **sizes) -> InjectionPlan:
    return injection_plan(ids, image_token_id=IMAGE, align_token_id=ALIGN, **sizes)


def assert_equals(plan: InjectionPlan, expected: dict[str, list[int]]) -> None:
    for name, values in expected.items():
        got = getattr(plan, name)
        assert got.dtype == torch.int32
        assert got.tolist() == values, name


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize("layout", ["packed", "padded right", "padded left"])
def test_equals_reading_the_ids_one_by_one(sequences, layout):
    if layout == "packed":
        lengths = torch.tensor([0, *map(len, sequences)])
        ids = torch.tensor([token for s in sequences for token in s])
        plan = injection_plan(ids, image_token_id=IMAGE, align_token_id=ALIGN, cu_seqlens=lengths.cumsum(0).int())
        assert_equals(plan, read_one_by_one(sequences))
        return
    longest = max(map(len, sequences))
    padding = [[0] * (longest - len(ids)) for ids in sequences]
    rows = [pad + ids if layout == "padded left" else ids + pad for ids, pad in zip(sequences, padding, strict=True)]
    assert_equals(plan_of(torch.tensor(rows)), read_one_by_one(rows))


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_given_sizes_fix_the_shapes_without_waiting(sequences, no_sync):
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    counted = plan_of(ids)
    num_rows, num_samples = len(counted.image_place), len(counted.align_place)
    with no_sync():
        same = plan_of(ids, num_image_rows=num_rows, num_samples=num_samples)
        roomy = plan_of(ids, num_image_rows=num_rows + 4, num_samples=num_samples + 2)
    for a, b in zip(counted[:4], same[:4], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(roomy.source, counted.source)
    assert roomy.image_place.tolist() == [*counted.image_place.tolist(), -1, -1, -1, -1]
    assert roomy.align_place.tolist() == [*counted.align_place.tolist(), -1, -1]
    assert not same.exact


def test_exact_only_if_every_align_has_its_row():
    exact = {name: plan_of(torch.tensor([s[0]])).exact for name, s in SEQUENCES.items()}
    assert exact.pop("second align, and align without an image") is False
    assert all(exact.values())


def test_image_sample():
    ids = torch.tensor(
        [[BOS, ALIGN, IMAGE, IMAGE, IMAGE, IMAGE], [BOS, 2, 3, 4, 5, 6], [BOS, ALIGN, 3, IMAGE, IMAGE, 4]]
    )
    assert plan_of(ids).image_sample(2).tolist() == [0, 0, 1]
    assert plan_of(ids, num_image_rows=8, num_samples=2).image_sample(2).tolist() == [0, 0, 1, -1]
    assert plan_of(ids[1:2]).image_sample(2).tolist() == []
    with pytest.raises(ValueError, match="rows_per_image is 4; the plan has 6 image rows"):
        plan_of(ids).image_sample(4)


def test_empty_and_empty_span():
    empty = plan_of(torch.empty(0, dtype=torch.long))
    assert [len(t) for t in empty[:4]] == [0, 0, 0, 0]
    ids = torch.tensor([BOS, ALIGN, IMAGE, BOS, 3])
    plan = injection_plan(ids, image_token_id=IMAGE, align_token_id=ALIGN, cu_seqlens=torch.tensor([0, 3, 3, 5]))
    assert plan.token_sample.tolist() == [0, 0, 0, -1, -1]


@pytest.mark.parametrize(
    ("ids", "cu_seqlens", "message"),
    [
        (torch.zeros(3), None, "token_ids is torch.float32; injection_plan needs int32 or int64"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, r"token_ids has shape \(1, 2, 3\); it needs"),
        (torch.zeros(1, 2, dtype=torch.long), torch.tensor([0, 2]), r"token_ids with cu_seqlens has shape \(1, 2\)"),
    ],
)
def test_refusals(ids, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        injection_plan(ids, image_token_id=IMAGE, align_token_id=ALIGN, cu_seqlens=cu_seqlens)


def test_indices_on_another_device_are_refused_by_name():
    ids = torch.tensor([1, ALIGN, 3, IMAGE, IMAGE])
    with pytest.raises(ValueError, match=r"cu_seqlens is on meta; injection_plan needs .*, the device of token_ids"):
        injection_plan(ids, image_token_id=IMAGE, align_token_id=ALIGN, cu_seqlens=torch.tensor([0, 5], device="meta"))
    plan = injection_plan(ids, image_token_id=IMAGE, align_token_id=ALIGN)
    for name in plan._fields[:4]:
        astray = plan._replace(**{name: getattr(plan, name).to("meta")})
        with pytest.raises(ValueError, match=rf"plan\.{name} is on meta; inject needs .*, the device of token_ids"):
            inject(ids, torch.randn(9, 4), torch.randn(1, 2, 4), torch.randn(1, 4), plan=astray)
