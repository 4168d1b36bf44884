"""Synthetic scenes whose alignment with a caption is known: the data set of `make demo`.

A scene is a square of 3 × 3 cells, 72 × 72 pixels unless it is asked for larger, with one to three objects in different
cells, each a size, a colour and a shape, moved a little from its cell's centre. Its caption states five facts an
object, in reading order:

    large red circle top left and small blue star middle right

`corrupt` replaces each fact, with a probability drawn for the whole caption, by another value of its kind; what is left
over is the pair's true `alignment`. `fact_precision` judges words of unknown origin, so it pairs claimed and real
objects as kindly as it can: the caption of another scene has about 0.4 of its facts right. `ask` asks what has one
answer.

`write_scenes` draws a set of them into a folder that every command takes:

    FOLDER/images/00000.jpg …     the pictures
    FOLDER/pairs.json             LLaVA JSON for stage 1: a picture and its corrupted caption, with "alignment"
    FOLDER/questions.json         LLaVA JSON for stage 2: a picture, one question and its answer, with "kind"
    FOLDER/scenes.json            what is in each picture

Everything is a pure function of the seed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from PIL import Image, ImageDraw

from .tables import write_json

SIZES = ("small", "large")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
FACTS: dict[str, tuple[str, ...]] = {"size": SIZES, "color": COLORS, "shape": SHAPES, "row": ROWS, "column": COLUMNS}
NUMBERS = ("one", "two", "three")

PIXELS = 72  # a side; lengths below are for this one, and grow with it
CELL = PIXELS // 3
_JITTER = 1.5  # pixels an object is moved from its cell's centre, at most, each way
_RADIUS = {"small": 6.0, "large": 9.0}  # pixels; half a pixel more or less
_OVERSAMPLE = 3  # drawn larger and averaged down, for smooth edges
_RGB = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (240, 220, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}

Kind = Literal["size", "color", "shape", "shape at", "place", "count", "presence"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene: a value of each kind in `FACTS`."""

    size: str
    color: str
    shape: str
    row: str
    column: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape} {self.row} {self.column}"


Scene = tuple[Thing, ...]  # in reading order


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene. `guesses`: the answer for each of its objects, if it is about one of them."""

    kind: Kind
    text: str
    answer: str
    guesses: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------- scenes


def draw_scene(random: Random, *, num_objects: int | None = None) -> Scene:
    """A random scene of one to three objects, in different cells, no two alike in both colour and shape."""
    count = num_objects or random.randint(1, 3)
    cells = sorted(random.sample(range(9), count))
    looks = random.sample(list(itertools.product(COLORS, SHAPES)), count)
    return tuple(
        Thing(random.choice(SIZES), color, shape, ROWS[cell // 3], COLUMNS[cell % 3])
        for cell, (color, shape) in zip(cells, looks, strict=True)
    )


def render(scene: Scene, random: Random, *, pixels: int = PIXELS) -> Image.Image:
    """The picture of a scene, RGB `pixels` × `pixels`; `random` moves, sizes and shades the objects a little."""
    side, scale = pixels * _OVERSAMPLE, pixels / PIXELS * _OVERSAMPLE
    ground = tuple(random.randint(215, 250) for _ in range(3))
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    for thing in scene:
        x = (COLUMNS.index(thing.column) + 0.5) * CELL + random.uniform(-_JITTER, _JITTER)
        y = (ROWS.index(thing.row) + 0.5) * CELL + random.uniform(-_JITTER, _JITTER)
        radius = _RADIUS[thing.size] + random.uniform(-0.5, 0.5)
        color = tuple(min(255, max(0, channel + random.randint(-12, 12))) for channel in _RGB[thing.color])
        outline = [((x + radius * dx) * scale, (y + radius * dy) * scale) for dx, dy in _OUTLINES[thing.shape]]
        draw.polygon(outline, fill=color)
    return image.reduce(_OVERSAMPLE)


def _star() -> list[tuple[float, float]]:
    corners = []
    for number in range(10):
        angle, reach = math.pi * number / 5, (1.1, 0.5)[number % 2]
        corners.append((reach * math.sin(angle), -reach * math.cos(angle)))
    return corners


_ARM = 0.36  # half the width of a cross's arms
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(math.cos(2 * math.pi * n / 24), math.sin(2 * math.pi * n / 24)) for n in range(24)],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)],
    "cross": [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
    "star": _star(),
}


# ---------------------------------------------------------------------------------------------------- captions


def caption(things: Iterable[Thing]) -> str:
    """The words for a scene, or for what a corrupted one claims."""
    return " and ".join(map(str, things))


def corrupt(scene: Scene, rate: float, random: Random) -> Scene:
    """Each fact replaced, with probability `rate`, by another value of its kind."""
    return tuple(
        Thing(
            **{
                fact: random.choice([v for v in values if v != getattr(thing, fact)])
                if random.random() < rate
                else getattr(thing, fact)
                for fact, values in FACTS.items()
            }
        )
        for thing in scene
    )


def parse_caption(text: str) -> list[dict[str, str]]:
    """What a caption claims: a dictionary fact → value for each object, facts that are not stated left out.

    A generated caption may be anything: words that are no value are skipped; of two values of a kind the first counts.
    """
    kind_of = {value: fact for fact, values in FACTS.items() for value in values}
    claims = []
    for phrase in text.split(" and "):
        claim: dict[str, str] = {}
        for word in phrase.split():
            if word in kind_of:
                claim.setdefault(kind_of[word], word)
        if claim:
            claims.append(claim)
    return claims


def true_facts(claims: Sequence[dict[str, str]], scene: Scene) -> int:
    """How many of the claimed facts hold, under the kindest pairing of claimed objects with objects of the scene.

    What is claimed of more objects than are there is false.
    """
    facts = [[sum(getattr(t, fact) == value for fact, value in claim.items()) for t in scene] for claim in claims]
    if len(claims) > len(scene):
        facts = [list(column) for column in zip(*facts, strict=True)]
    pairings = itertools.permutations(range(max(len(claims), len(scene))), len(facts))
    return max(sum(row[other] for row, other in zip(facts, pairing, strict=True)) for pairing in pairings)


def fact_precision(text: str, scene: Scene) -> tuple[int, int]:
    """How many facts of a caption are true of the scene, and how many it states."""
    claims = parse_caption(text)
    return true_facts(claims[:6], scene), sum(map(len, claims))  # pairing more would take long; they are false


# ---------------------------------------------------------------------------------------------------- questions


def ask(scene: Scene, kind: Kind, random: Random) -> Question | None:
    """A question of a kind, or None where the scene allows none with a single answer.

    A presence question is answered "no" half of the time. Such a question puts together a color and a shape that are
    both there, on different objects, where that is possible; elsewhere one of the two is not there.
    """
    if kind == "count":
        return Question(kind, "how many objects", NUMBERS[len(scene) - 1], ())
    if kind == "presence":
        return _ask_presence(scene, random)
    things = list(scene)
    random.shuffle(things)
    for thing in things:
        if kind == "shape at":
            question, same = f"what shape is at {thing.row} {thing.column}", 1
        elif kind == "shape":
            question, same = f"what shape is {thing.color}", sum(other.color == thing.color for other in scene)
        else:
            asks = {"size": "what size is", "color": "what color is", "place": "where is"}[kind]
            question, same = f"{asks} the {thing.shape}", sum(other.shape == thing.shape for other in scene)
        if same == 1:
            return Question(kind, question, _answer(thing, kind), tuple(_answer(other, kind) for other in scene))
    return None


def _answer(thing: Thing, kind: Kind) -> str:
    if kind == "place":
        return f"{thing.row} {thing.column}"
    return getattr(thing, "shape" if kind == "shape at" else kind)


def _ask_presence(scene: Scene, random: Random) -> Question:
    there = {(thing.color, thing.shape) for thing in scene}
    if random.random() < 0.5:
        color, shape = random.choice(sorted(there))
        answer = "yes"
    else:
        crossed = sorted({(a.color, b.shape) for a in scene for b in scene} - there)
        others = sorted(set(itertools.product(COLORS, SHAPES)) - there)
        near = [look for look in others if any(look[0] == color or look[1] == shape for color, shape in there)]
        color, shape = random.choice(crossed or near)
        answer = "no"
    return Question("presence", f"is there a {color} {shape}", answer, ())


# ---------------------------------------------------------------------------------------------------- files


def write_scenes(
    folder: Path, num_scenes: int, *, seed: int | str, questions_per_scene: int = 4, pixels: int = PIXELS
) -> Iterator[None]:
    """Draw `num_scenes` scenes into a new folder, one at each step of the iterator; the JSON files come last.

    A scene's questions are of different kinds, all of them if it is asked so many and allows them.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    scenes, pairs, questions = [], [], []
    for number in range(num_scenes):
        random = Random(f"{seed} {number}")
        scene = draw_scene(random)
        name = f"images/{number:05d}.jpg"
        render(scene, random, pixels=pixels).save(folder / name, quality=90)
        scenes.append([astuple(thing) for thing in scene])
        claimed = corrupt(scene, random.random(), random)
        pair = _record(f"{number}", name, "describe the picture", caption(claimed))
        pairs.append(pair | {"alignment": round(alignment(claimed, scene), 4)})
        kinds = random.sample(KINDS, len(KINDS))
        asked = [question for kind in kinds if (question := ask(scene, kind, random)) is not None]
        for question in asked[:questions_per_scene]:
            record = _record(f"{number} {question.kind}", name, question.text, question.answer)
            questions.append(record | {"kind": question.kind, "guesses": question.guesses})
        yield
    for file, content in (("pairs", pairs), ("questions", questions), ("scenes", scenes)):
        write_json(folder / f"{file}.json", content)


def read_scenes(folder: Path) -> list[Scene]:
    """The scenes of a folder, by number."""
    content = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    return [tuple(Thing(*facts) for facts in scene) for scene in content]


def alignment(claimed: Scene, scene: Scene) -> float:
    """The true alignment of a corrupted caption: the share of its facts that were left as they are, 0 to 1."""
    kept = [
        getattr(claim, fact) == getattr(thing, fact)
        for claim, thing in zip(claimed, scene, strict=True)
        for fact in FACTS
    ]
    return sum(kept) / len(kept)


def _record(id: str, image: str, prompt: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns}
