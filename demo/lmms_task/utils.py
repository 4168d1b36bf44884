"""What `scenes.yaml` tells lmms-eval of the demo's questions: a record of LLaVA JSON is a document."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from aligngpt.image import open_image
from aligngpt.text import IMAGE_MARK

SCENES = Path("runs/demo/scenes/test")  # where `scenes.yaml` reads the questions, too


def pictures(record: Mapping[str, Any]) -> list[Image.Image]:
    return [open_image(SCENES / record["image"])]


def question(record: Mapping[str, Any]) -> str:
    return record["conversations"][0]["value"].removeprefix(f"{IMAGE_MARK}\n")


def answer(record: Mapping[str, Any]) -> str:
    return record["conversations"][1]["value"]


def score(record: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the model's one answer is the right one: among all questions, and among those of its kind."""
    right = float(results[0] == answer(record))
    return {"all": right, record["kind"]: right}
