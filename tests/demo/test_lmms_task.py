"""The demo's questions as a task of lmms-eval: what its YAML names is there, and scores by the rules."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from aligngpt.data.scenes import KINDS, write_scenes
from demo.lmms_task import utils

TASK = Path(__file__).parents[2] / "demo/lmms_task/scenes.yaml"


class Loader(yaml.SafeLoader):
    """Of lmms-eval's YAML, in which `!function utils.x` is the `x` of the file beside it."""


Loader.add_constructor("!function", lambda loader, node: getattr(utils, node.value.removeprefix("utils.")))


def test_the_task_asks_and_scores_each_question(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(write_scenes(tmp_path / utils.SCENES, 3, seed=0, questions_per_scene=len(KINDS)))
    task = yaml.load(TASK.read_text(encoding="utf-8"), Loader)
    records = json.loads(Path(task["dataset_kwargs"]["data_files"][task["test_split"]]).read_text(encoding="utf-8"))
    kinds = set()
    for record in records:
        (picture,) = task["doc_to_visual"](record)
        stored = Image.open(tmp_path / utils.SCENES / record["image"])
        assert np.array_equal(np.asarray(picture), np.asarray(stored))
        question, answer = task["doc_to_text"](record), task["doc_to_target"](record)
        assert record["conversations"][0]["value"] == f"<image>\n{question}"
        assert task["process_results"](record, [answer]) == {"all": 1.0, record["kind"]: 1.0}
        assert task["process_results"](record, [f"{answer}s"]) == {"all": 0.0, record["kind"]: 0.0}
        kinds.add(record["kind"])
    assert kinds == set(KINDS)
    assert {metric["metric"] for metric in task["metric_list"]} == {"all", *KINDS}
