"""The emoji beside the scenes: no picture is in both parts, and what is called true is."""

from experiments.emoji import misnamed, split

RECORDS = [
    {
        "image": f"images/{n}.png",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"n{n}"}],
    }
    for n in range(1000)
]


def test_every_picture_is_in_one_part_under_its_own_name():
    parts = split(RECORDS, 0)
    assert [len(parts[name]) for name in ("train", "test")] == [800, 200]
    together = [*parts["train"], *parts["test"]]
    assert {record["image"] for record in together} == {f"emoji/{n}.png" for n in range(1000)}
    for record in together:
        assert record["image"] == f"emoji/{record['conversations'][1]['value'][1:]}.png"
    assert split(RECORDS, 0) == parts
    assert split(RECORDS, 1) != parts


def test_a_name_is_true_where_it_says_so():
    made = misnamed(RECORDS, 0.25, 0)
    for record, one in zip(RECORDS, made, strict=True):
        assert one["alignment"] == float(one["conversations"][1] == record["conversations"][1])
        assert one["conversations"][0] == record["conversations"][0]
    assert 200 < sum(one["alignment"] == 0 for one in made) < 300
