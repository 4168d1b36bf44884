"""Scenes: what is said of a picture is what is drawn, and what is counted as true is true."""

import itertools
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from aligngpt.data.llava_json import read_llava_json
from aligngpt.data.scenes import (
    CELL,
    COLORS,
    COLUMNS,
    FACTS,
    KINDS,
    NUMBERS,
    ROWS,
    SHAPES,
    Scene,
    Thing,
    alignment,
    ask,
    caption,
    corrupt,
    draw_scene,
    fact_precision,
    parse_caption,
    read_scenes,
    render,
    write_scenes,
)

RED = Thing("large", "red", "circle", "top", "left")
BLUE = Thing("small", "blue", "star", "middle", "right")
SCENE: Scene = (RED, BLUE)


def scenes(number: int) -> list[Scene]:
    random = Random(3)
    return [draw_scene(random) for _ in range(number)]


def test_a_scene_is_drawn_as_it_is_described():
    """Every cell of 200 pictures: ground where nothing is, the thing's color at its middle, its size in pixels."""
    random = Random(0)
    covered: dict[tuple[str, str], list[int]] = {}
    means: dict[str, list[np.ndarray]] = {color: [] for color in COLORS}
    for scene in scenes(200):
        pixels = np.asarray(render(scene, random)).astype(int)
        assert pixels.shape == (72, 72, 3)
        empty = set(itertools.product(ROWS, COLUMNS)) - {(thing.row, thing.column) for thing in scene}
        cells = {
            (row, column): pixels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
            for (y, row), (x, column) in itertools.product(enumerate(ROWS), enumerate(COLUMNS))
        }
        ground = next(cells[place] for place in empty)[CELL // 2, CELL // 2]
        assert all((cells[place] == ground).all() for place in empty)
        for thing in scene:
            cell = cells[thing.row, thing.column]
            means[thing.color].append(cell[CELL // 2 - 1 : CELL // 2 + 1, CELL // 2 - 1 : CELL // 2 + 1].mean((0, 1)))
            pixels_covered = int((np.abs(cell - ground).sum(-1) > 60).sum())
            covered.setdefault((thing.size, thing.shape), []).append(pixels_covered)
    for shape in SHAPES:
        assert max(covered["small", shape]) < min(covered["large", shape])
    centers = {color: np.mean(found, 0) for color, found in means.items()}
    for color, found in means.items():
        for mean in found:
            assert min(centers, key=lambda other: np.abs(centers[other] - mean).sum()) == color


def test_a_larger_picture_is_the_same_one():
    """Three times as large and averaged down again: edges differ by their smoothing, 0.9 of 765 on average; things
    larger by a twentieth would make it 3."""
    differences = []
    for number, scene in enumerate(scenes(60)):
        small, large = (render(scene, Random(number), pixels=pixels) for pixels in (72, 216))
        differences.append(np.abs(np.asarray(large.reduce(3)).astype(int) - np.asarray(small)).sum(-1).mean())
    assert np.mean(differences) < 1.5


def test_a_caption_states_every_fact_and_is_read_back():
    assert caption(SCENE) == "large red circle top left and small blue star middle right"
    for scene in scenes(100):
        claims = parse_caption(caption(scene))
        assert claims == [{fact: getattr(thing, fact) for fact in FACTS} for thing in scene]
        assert fact_precision(caption(scene), scene) == (5 * len(scene), 5 * len(scene))


@pytest.mark.parametrize(
    ("text", "true", "stated"),
    [
        ("small blue star middle right and large red circle top left", 10, 10),  # in another order
        ("large red circle top left", 5, 5),  # one is not mentioned: nothing false is said
        ("large red star middle right", 3, 5),  # kindest as the star: star, middle, right
        ("small red circle top left and small blue star middle left", 8, 10),
        ("large red circle top left and large red circle top left", 5, 10),  # said twice, there once
        ("red and blue and green circle", 2, 4),  # one claim more than things; the third is nobody's
        ("a red thing , red red", 1, 1),  # other words are not facts, and a kind counts once
        ("", 0, 0),
    ],
)
def test_true_facts_of_a_caption(text, true, stated):
    assert fact_precision(text, SCENE) == (true, stated)


def test_corruption_replaces_facts_at_its_rate():
    random = Random(1)
    for scene in scenes(50):
        assert corrupt(scene, 0.0, random) == scene
        assert alignment(corrupt(scene, 1.0, random), scene) == 0
    kept = [alignment(corrupt(scene, 0.3, random), scene) for scene in scenes(2000)]
    assert np.mean(kept) == pytest.approx(0.7, abs=0.01)  # three standard errors
    assert alignment((Thing("large", "red", "star", "top", "right"), BLUE), SCENE) == 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_has_one_answer_and_it_is_right(kind):
    random = Random(2)
    asked = 0
    for scene in scenes(400):
        question = ask(scene, kind, random)
        if question is None:
            continue
        asked += 1
        words = question.text.split()
        if kind == "count":
            right = [NUMBERS[len(scene) - 1]]
        elif kind == "presence":
            there = any(thing.color == words[-2] and thing.shape == words[-1] for thing in scene)
            right = ["yes" if there else "no"]
        elif kind == "shape at":
            right = [thing.shape for thing in scene if [thing.row, thing.column] == words[-2:]]
        elif kind == "shape":
            right = [thing.shape for thing in scene if thing.color == words[-1]]
        elif kind == "place":
            right = [f"{thing.row} {thing.column}" for thing in scene if thing.shape == words[-1]]
        else:
            right = [getattr(thing, kind) for thing in scene if thing.shape == words[-1]]
        assert [question.answer] == right
        assert (question.answer in question.guesses) == (kind not in ("count", "presence"))
    assert asked > 300  # few scenes allow no question of a kind


def test_presence_is_denied_of_what_the_scene_nearly_has():
    """A "no" recombines a color and a shape that are there whenever two things differ in both."""
    random = Random(4)
    answers = []
    for scene in scenes(600):
        question = ask(scene, "presence", random)
        color, shape = question.text.split()[-2:]
        answers.append(question.answer)
        if question.answer == "no":
            crossed = {(a.color, b.shape) for a in scene for b in scene} - {(t.color, t.shape) for t in scene}
            has_color, has_shape = any(t.color == color for t in scene), any(t.shape == shape for t in scene)
            assert (has_color and has_shape) if crossed else (has_color != has_shape)
    assert 0.42 < answers.count("no") / len(answers) < 0.58


def test_a_folder_of_scenes_is_llava_data_and_a_function_of_its_seed(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert len(list(write_scenes(tmp_path / name, 12, seed=seed, questions_per_scene=3))) == 12
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 15
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert (tmp_path / "a/pairs.json").read_bytes() != (tmp_path / "c/pairs.json").read_bytes()

    drawn = read_scenes(tmp_path / "a")
    pairs = read_llava_json(tmp_path / "a/pairs.json")
    records = json.loads((tmp_path / "a/pairs.json").read_text())
    for scene, pair, record in zip(drawn, pairs, records, strict=True):
        claims = parse_caption(pair.turns[1].text)
        kept = [claim[fact] == getattr(t, fact) for claim, t in zip(claims, scene, strict=True) for fact in FACTS]
        assert record["alignment"] == pytest.approx(np.mean(kept), abs=1e-4)
        assert (tmp_path / "a" / pair.images[0]).is_file()
    questions = read_llava_json(tmp_path / "a/questions.json")
    assert len(questions) == 36
    assert {sample.images[0] for sample in questions} == {pair.images[0] for pair in pairs}


def test_sets_of_words_do_not_overlap():
    """A word tells its kind of fact, so that captions can be read back."""
    words = [value for values in FACTS.values() for value in values]
    assert len(words) == len(set(words))
    assert len(COLORS) == 7
    assert len(SHAPES) == 6
