"""The emoji set beside the scenes: pictures with names in ordinary words, for an LLM that knows them.

    python -m experiments.emoji EMOJI SCENES --seed S

EMOJI is a folder in LLaVA's form whose pretrain.json has a name for each picture. Four of five pictures, which the seed
draws, go to SCENES/train/emoji, the others to SCENES/test/emoji; emoji.json beside each has their names, with paths
relative to it. `demo.vision --pairs SCENES/train/emoji.json` lets the tower learn those names, or it could not score
them; `misnamed` makes the pairs of stage 1. What a model makes of the others' names is measured beside what it makes of
them with another picture: names that neither the tower nor stage 1 has seen, of which the LLM knows the words alone.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from aligngpt.data.tables import write_json


def split(records: Sequence[dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """The records of train and of test, with the paths that they get there."""
    renamed = [record | {"image": f"emoji/{Path(record['image']).name}"} for record in records]
    Random(f"emoji {seed}").shuffle(renamed)
    cut = len(renamed) * 4 // 5
    return {"train": renamed[:cut], "test": renamed[cut:]}


def misnamed(records: Sequence[dict[str, Any]], rate: float, seed: int) -> list[dict[str, Any]]:
    """The records, each with probability `rate` with another name; their true "alignment" is then 0, else 1."""
    random = Random(f"names {rate:g} {seed}")
    names = sorted({record["conversations"][1]["value"] for record in records})
    made = []
    for record in records:
        prompt, answer = record["conversations"]
        is_false = random.random() < rate
        name = random.choice([n for n in names if n != answer["value"]]) if is_false else answer["value"]
        made.append(record | {"conversations": [prompt, answer | {"value": name}], "alignment": float(not is_false)})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.emoji", description=__doc__.splitlines()[0])
    parser.add_argument("emoji", type=Path)
    parser.add_argument("scenes", type=Path, help="folder that holds train and test")
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    records = json.loads((args.emoji / "pretrain.json").read_text(encoding="utf-8"))
    for name, part in split(records, args.seed).items():
        folder = args.scenes / name
        (folder / "emoji").mkdir(exist_ok=True)
        for record in part:
            shutil.copyfile(args.emoji / "images" / Path(record["image"]).name, folder / record["image"])
        write_json(folder / "emoji.json", part)


if __name__ == "__main__":
    main()
