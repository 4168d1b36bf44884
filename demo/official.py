"""`python -m demo.official RUN`: the demo's test questions as the official files of POPE and GQA, in RUN/eval.

    python -m demo.official runs/demo
    aligngpt eval runs/demo/stage-2/model --task pope,gqa --data runs/demo/eval --out runs/demo/answers

POPE asks whether there is such an object; each of its categories has as many that are there as that are not. What is
not there is, in "adversarial", a color and a shape that the scene has, but not together, in "popular" anything else;
"random" is empty. GQA asks for size, color, shape, place and count, which are its semantic types.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligngpt.data.llava_json import read_llava_json
from aligngpt.data.scenes import Scene, read_scenes


def write_official(scenes: Path, root: Path) -> None:
    """scenes: a folder of `write_scenes`; root: what --data names."""
    contents = read_scenes(scenes)
    kinds = [record["kind"] for record in json.loads((scenes / "questions.json").read_text(encoding="utf-8"))]
    present: list[dict[str, Any]] = []
    absent: dict[str, list[dict[str, Any]]] = {"adversarial": [], "popular": [], "random": []}
    asked: list[dict[str, Any]] = []
    labels: dict[str, dict[str, Any]] = {}
    for number, (sample, kind) in enumerate(zip(read_llava_json(scenes / "questions.json"), kinds, strict=True)):
        name = Path(sample.images[0]).name
        text, answer = sample.turns[0].text.split("\n", 1)[1], sample.turns[1].text
        row = {"question_id": number, "image": name, "text": text}
        if kind != "presence":
            asked.append(row)
            labels[str(number)] = {"answer": answer, "types": {"structural": "query", "semantic": kind}}
        elif answer == "yes":
            present.append({**row, "label": answer})
        else:
            scene = contents[int(sample.id.split()[0])]
            absent[_category(scene, text)].append({**row, "label": answer})
    rows = []
    for category, missing in absent.items():
        pairs = [row for pair in zip(missing, present, strict=False) for row in pair]
        del present[: len(missing)]
        _write_lines(root / f"pope/coco/coco_pope_{category}.json", pairs)
        rows += [
            {name: row[name] for name in ("question_id", "image", "text")} | {"category": category} for row in pairs
        ]
    _write_lines(root / "pope/llava_pope_test.jsonl", rows)
    _write_lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", asked)
    (root / "gqa/data").mkdir(exist_ok=True)
    (root / "gqa/data/testdev_balanced_questions.json").write_text(json.dumps(labels), encoding="utf-8")
    for folder in ("pope/val2014", "gqa/data/images"):
        shutil.copytree(scenes / "images", root / folder, dirs_exist_ok=True)


def _category(scene: Scene, text: str) -> str:
    """By whether the scene has an absent object's color, and its shape."""
    words = set(text.split())
    both = any(thing.color in words for thing in scene) and any(thing.shape in words for thing in scene)
    return "adversarial" if both else "popular"


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.official", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="a folder of the demo, runs/demo for example")
    run = parser.parse_args().run
    write_official(run / "scenes/test", run / "eval")
    print(run / "eval")


if __name__ == "__main__":
    main()
