"""Captions are made false as often and in the way that they say, and levels by truth are what a hand count gives."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from aligngpt.data.llava_json import read_llava_json
from aligngpt.data.scenes import FACTS, Thing, caption, draw_scene, parse_caption, read_scenes, write_scenes
from experiments.noise import best_quarter, mean_true_facts, noisy_captions, true_levels
from experiments.plan import BIASED, NOISES, SWAPPED, Noise

ROOT = Path(__file__).parents[2]
SCENES = [draw_scene(Random(number)) for number in range(4000)]


@pytest.mark.parametrize("noise", [noise for noise in NOISES if noise.kind != "swapped"], ids=lambda noise: noise.name)
def test_facts_are_replaced_at_the_rate_that_is_named(noise):
    """Each caption's alignment is its share of facts left alone, word for word; its mean over pairs is 1 - rate."""
    false = []
    replacements: dict[str, Counter[str]] = {kind: Counter() for kind in FACTS}
    for scene, (text, truth) in zip(SCENES, noisy_captions(SCENES, noise, 3), strict=True):
        claims = parse_caption(text)
        wrong = [
            (kind, claim[kind], getattr(thing, kind))
            for claim, thing in zip(claims, scene, strict=True)
            for kind in FACTS
            if claim[kind] != getattr(thing, kind)
        ]
        assert truth == pytest.approx(1 - len(wrong) / (5 * len(scene)), abs=1e-12)
        false.append(1 - truth)
        for kind, value, true in wrong:
            replacements[kind][value] += 1
            if noise == BIASED:
                assert value == FACTS[kind][true == FACTS[kind][0]]
    # The rate's standard deviation is at most 0.34, so the mean's is 0.0054 and 0.02 is more than three of them.
    assert sum(false) / len(false) == pytest.approx(noise.rate, abs=0.02)
    if noise.kind == "uniform":  # no value is preferred: seven colors are equally true and equally false
        colors = replacements["color"]
        assert max(colors.values()) < 1.3 * min(colors.values())
    assert noisy_captions(SCENES[:50], noise, 3) == noisy_captions(SCENES, noise, 3)[:50]
    assert noisy_captions(SCENES[:50], noise, 4) != noisy_captions(SCENES[:50], noise, 3)


def test_a_swapped_caption_is_the_true_one_of_another_picture():
    A = (Thing("large", "red", "circle", "top", "left"), Thing("small", "blue", "star", "middle", "right"))
    B = (Thing("small", "red", "star", "top", "right"),)
    found = noisy_captions([A, B] * 200, SWAPPED, 0)
    own = [caption(A), caption(B)] * 200
    expected = {
        # Of the five facts of B in A: red and top with the first object; small, star and right with the second.
        (caption(A), caption(B)): 3 / 5,
        # Of the ten facts of A in B, one object for two claimed ones: the same three of the better pairing.
        (caption(B), caption(A)): 3 / 10,
        (caption(A), caption(A)): 1.0,
        (caption(B), caption(B)): 1.0,
    }
    seen = Counter((mine, text, truth) for mine, (text, truth) in zip(own, found, strict=True))
    for mine, text, truth in seen:
        assert truth == pytest.approx(expected[mine, text], abs=1e-12)
    assert len(seen) == 4

    texts = [caption(scene) for scene in SCENES]
    for rate in (0.25, 0.5):
        found = noisy_captions(SCENES, Noise("swapped", rate), 1)
        kept = sum(text == mine for mine, (text, _) in zip(texts, found, strict=True))
        assert kept / len(SCENES) == pytest.approx(1 - rate, abs=0.025)  # three standard deviations


def test_true_levels_are_of_equal_count_and_split_ties_by_chance():
    alignments = [0.9, 0.1, 0.5, 0.5, 0.0, 1.0, 0.5, 0.5]
    levels = true_levels(alignments, 4, seed=0)
    assert Counter(levels) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert [levels[place] for place in (4, 1)] == [0, 0]
    assert [levels[place] for place in (0, 5)] == [3, 3]
    ties = {tuple(true_levels(alignments, 4, seed=seed)[place] for place in (2, 3, 6, 7)) for seed in range(40)}
    assert len(ties) == 6  # every way to split four ties in two

    levels = true_levels([1.0] * 400 + [0.0] * 400, 8, seed=1)
    assert max(levels[400:]) == 3
    assert min(levels[:400]) == 4
    assert Counter(levels[:100]).keys() == {4, 5, 6, 7}  # not by place


def test_the_best_quarter_is_that_of_the_levels():
    records = [{"align_level": level, "id": id} for id, level in enumerate([7, 0, 5, 6, 3, 6])]
    assert [record["id"] for record in best_quarter(records)] == [0, 3, 5]
    with pytest.raises(ValueError, match="the records have 6 levels; a quarter of them needs a multiple of 4"):
        best_quarter([{"align_level": 5}])


def test_true_facts_are_counted_by_level_and_without_scenes_of_one_object():
    scene = (Thing("large", "red", "circle", "top", "left"), Thing("small", "blue", "star", "middle", "right"))
    captions = {
        "large red circle top left and small blue star middle left": (1, scene),  # 9 of 10
        # The kindest pairing is the crossed one: blue, star, middle; large, circle, left.
        "large blue star middle left and large blue circle bottom left": (1, scene),
        "small green square bottom right": (1, scene[:1]),
        caption(scene): (0, scene),
        "small green square": (2, scene[1:]),
        "balloon": (0, None),
    }
    levels = [level for level, _ in captions.values()]
    scenes = [of for _, of in captions.values() if of]
    assert mean_true_facts(list(captions), scenes, levels) == [1.0, pytest.approx((0.9 + 0.6) / 2), None]


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"rate is 1\.0; it must lie between 0 and 1"):
        noisy_captions(SCENES[:1], Noise("uniform", 1.0), 0)


def test_the_command_writes_pairs_that_training_reads(tmp_path):
    list(write_scenes(tmp_path / "scenes", 40, seed=0))
    command = [sys.executable, "-m", "experiments.noise"]
    options = ["--kind", "biased", "--rate", "0.5", "--seed", "2"]
    pairs, leveled = tmp_path / "noise/pairs.json", tmp_path / "noise/true.json"
    subprocess.run([*command, "pairs", tmp_path / "scenes", pairs, *options], check=True, cwd=ROOT)
    options = ["--num-levels", "4", "--seed", "2"]
    subprocess.run([*command, "true-levels", pairs, leveled, *options], check=True, cwd=ROOT)
    records, clean = (json.loads(file.read_text()) for file in (leveled, tmp_path / "scenes/pairs.json"))
    expected = noisy_captions(read_scenes(tmp_path / "scenes"), BIASED, 2)
    assert [(r["conversations"][1]["value"], r["alignment"]) for r in records] == [
        (text, round(truth, 4)) for text, truth in expected
    ]
    assert [record["id"] for record in records] == [record["id"] for record in clean]
    assert [record["conversations"][0] for record in records] == [record["conversations"][0] for record in clean]
    samples = list(read_llava_json(leveled))
    assert [sample.level for sample in samples] == true_levels([r["alignment"] for r in records], 4, 2)
    assert samples[7].images == (clean[7]["image"],)
