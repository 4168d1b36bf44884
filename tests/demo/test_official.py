"""demo.official: official files that the benchmarks read, and whose right answers are right."""

import json
from collections import Counter
from pathlib import Path

from aligngpt.data.scenes import write_scenes
from aligngpt.evaluation import gqa, pope
from aligngpt.evaluation.task import Answered
from demo.official import write_official


def test_the_right_answers_score_everything(tmp_path: Path):
    for _ in write_scenes(tmp_path / "scenes", num_scenes=60, seed=5):
        pass
    for _ in range(2):  # it may be written again
        write_official(tmp_path / "scenes", tmp_path / "eval")
    records = json.loads((tmp_path / "scenes/questions.json").read_text())
    right = {str(number): record["conversations"][1]["value"] for number, record in enumerate(records)}

    asked = gqa.questions(tmp_path / "eval")
    outcome = gqa.score(Answered(tmp_path / "eval", asked, right, tmp_path))
    assert outcome.headline == 100
    assert len(asked) == sum(record["kind"] != "presence" for record in records)
    assert set(outcome.metrics["semantic"]) == {record["kind"] for record in records} - {"presence"}

    asked = pope.questions(tmp_path / "eval")
    outcome = pope.score(Answered(tmp_path / "eval", asked, right, tmp_path))
    assert outcome.headline == 100
    count = Counter((question.facts["category"], question.facts["yes"]) for question in asked)
    for category in ("adversarial", "popular"):
        assert count[category, True] == count[category, False] > 0
    scenes = json.loads((tmp_path / "scenes/scenes.json").read_text())
    for question in asked:
        scene = scenes[int(Path(question.image).stem)]
        color, shape = question.prompt.split()[-2:]
        there = any([color, shape] == thing[1:3] for thing in scene)
        assert there == question.facts["yes"], (question, scene)
        if not there:
            both = any(color == thing[1] for thing in scene) and any(shape == thing[2] for thing in scene)
            assert question.facts["category"] == ("adversarial" if both else "popular")
