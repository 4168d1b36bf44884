"""The data of the experiments: scenes, captions made false in three ways, and levels that `aligngpt` does not make.

    python -m experiments.noise scenes FOLDER --number N --seed S [--pixels P]
    python -m experiments.noise pairs SCENES OUT --kind uniform|biased|swapped --rate R --seed S
    python -m experiments.noise true-levels PAIRS OUT --num-levels N --seed S
    python -m experiments.noise constant PAIRS OUT
    python -m experiments.noise best-quarter LEVELED OUT

`pairs` writes the pairs of a scenes folder again, each with a caption of its own and its true "alignment":

    uniform   each fact is replaced, with a probability drawn for the whole caption, by another value at random. The
              probability is u ** (1 / rate - 1), u from [0, 1], whose mean is `rate`
    biased    the same, but what replaces a fact is always the same value: the first of its kind or, if that is the
              truth, the second. In the scenes all values are equally frequent; in the captions that one becomes a
              frequent one, so that false facts agree with each other and more data does not average them away. For
              size, which has two values, it is the same as uniform
    swapped   with probability `rate` the caption is the true one of another picture; its alignment is the share of its
              facts that hold under the kindest pairing of objects, about 0.4

`true-levels` ranks the pairs by their true alignment and cuts the ranking into levels of equal count, as CLIP's scores
are cut; the order alone differs. Pairs of equal alignment are ordered by a shuffle, so that a tie which is larger than
a level fills several with pairs of one distribution (half of the swapped pairs are wholly true: levels 4 to 7 of 8).
`constant` gives every pair level 1. `best-quarter` keeps of records with levels those in the upper quarter of levels.

Everything is a pure function of its arguments. A rate outside 0 to 1 (neither included) is refused.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np

from aligngpt.data.scenes import (
    FACTS,
    PIXELS,
    Scene,
    Thing,
    alignment,
    caption,
    corrupt,
    fact_precision,
    read_scenes,
    write_scenes,
)
from aligngpt.data.tables import write_json
from aligngpt.levels import cut_levels
from experiments.emoji import misnamed
from experiments.plan import Noise


def noisy_captions(scenes: Sequence[Scene], noise: Noise, seed: int) -> list[tuple[str, float]]:
    """A caption for each scene, and its true alignment."""
    if not 0 < noise.rate < 1:
        raise ValueError(f"rate is {noise.rate}; it must lie between 0 and 1")
    make = swapped if noise.kind == "swapped" else replaced
    return [make(number, scenes, noise, Random(f"{seed} {noise.name} {number}")) for number in range(len(scenes))]


def replaced(number: int, scenes: Sequence[Scene], noise: Noise, random: Random) -> tuple[str, float]:
    """The caption of a scene with some of its facts replaced, "uniform" or "biased"."""
    rate = random.random() ** (1 / noise.rate - 1)
    scene = scenes[number]
    claimed = corrupt(scene, rate, random) if noise.kind == "uniform" else corrupt_alike(scene, rate, random)
    return caption(claimed), alignment(claimed, scene)


def swapped(number: int, scenes: Sequence[Scene], noise: Noise, random: Random) -> tuple[str, float]:
    """With probability `noise.rate` the caption of another picture, else the scene's own."""
    other = number
    if random.random() < noise.rate:
        other = (number + random.randrange(1, len(scenes))) % len(scenes)
    text = caption(scenes[other])
    true, stated = fact_precision(text, scenes[number])
    return text, true / stated


def corrupt_alike(scene: Scene, rate: float, random: Random) -> Scene:
    """Each fact replaced, with probability `rate`, by the first value of its kind, or the second where that is true."""

    def fact(thing: Thing, kind: str) -> str:
        true: str = getattr(thing, kind)
        if random.random() >= rate:
            return true
        first, second, *_ = FACTS[kind]
        return second if true == first else first

    return tuple(Thing(**{kind: fact(thing, kind) for kind in FACTS}) for thing in scene)


def true_levels(alignments: Sequence[float], num_levels: int, seed: int) -> list[int]:
    """Levels of equal count in the order of the true alignment, ties in the order of a shuffle."""
    shuffled = np.random.default_rng(seed).permutation(len(alignments))
    place = np.empty(len(alignments))
    place[np.lexsort((shuffled, np.asarray(alignments)))] = np.arange(len(alignments))
    return cut_levels(place, num_levels)[0].tolist()


def mean_true_facts(captions: Sequence[str], scenes: Sequence[Scene], levels: Sequence[int]) -> list[float | None]:
    """For each level the mean share of a caption's facts that hold in its scene, scenes of one object left out.

    Captions of a model are measured alike. Those after the last scene are of other pictures, and are left out too. None
    for a level that has no other: a tower that has learned little may score captions by their length.
    """
    shares: list[list[float]] = [[] for _ in range(max(levels) + 1)]
    for text, scene, level in zip(captions, scenes, levels, strict=False):
        if len(scene) > 1:
            true, stated = fact_precision(text, scene)
            shares[level].append(true / stated)
    return [fmean(of_level) if of_level else None for of_level in shares]


def best_quarter(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those in the upper quarter of the levels; there must be a multiple of four of them."""
    num_levels = 1 + max(record["align_level"] for record in records)
    if num_levels % 4:
        raise ValueError(f"the records have {num_levels} levels; a quarter of them needs a multiple of 4")
    return [record for record in records if record["align_level"] >= num_levels * 3 // 4]


# ---------------------------------------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.noise", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    scenes = commands.add_parser("scenes")
    scenes.add_argument("folder", type=Path)
    scenes.add_argument("--number", type=int, required=True)
    scenes.add_argument("--seed", required=True)
    scenes.add_argument("--pixels", type=int, default=PIXELS)
    pairs = commands.add_parser("pairs")
    pairs.add_argument("--kind", choices=("uniform", "biased", "swapped"), required=True)
    pairs.add_argument("--rate", type=float, required=True)
    pairs.add_argument("--seed", type=int, required=True)
    levels = commands.add_parser("true-levels")
    levels.add_argument("--num-levels", type=int, required=True)
    levels.add_argument("--seed", type=int, required=True)
    for command in (pairs, levels, commands.add_parser("constant"), commands.add_parser("best-quarter")):
        command.add_argument("source", type=Path)
        command.add_argument("out", type=Path)
    args = parser.parse_args()

    if args.what == "scenes":
        from demo.miniature import made_whole  # only now: it imports torch and transformers

        with made_whole(args.folder) as folder:
            for _ in write_scenes(folder, args.number, seed=args.seed, pixels=args.pixels):
                pass
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.what == "pairs":
        records = read(args.source / "pairs.json")
        found = noisy_captions(read_scenes(args.source), Noise(args.kind, args.rate), args.seed)
        made = [with_caption(record, *new) for record, new in zip(records, found, strict=True)]
        if (emoji := args.source / "emoji.json").exists():
            made += misnamed(read(emoji), args.rate, args.seed)
    else:
        records = read(args.source)
        if args.what == "true-levels":
            level = true_levels([record["alignment"] for record in records], args.num_levels, args.seed)
            made = [record | {"align_level": value} for record, value in zip(records, level, strict=True)]
        elif args.what == "constant":
            made = [record | {"align_level": 1} for record in records]
        else:
            made = best_quarter(records)
    write_json(args.out, made)


def with_caption(record: dict[str, Any], text: str, truth: float) -> dict[str, Any]:
    prompt, _ = record["conversations"]
    return record | {"conversations": [prompt, {"from": "gpt", "value": text}], "alignment": round(truth, 4)}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
