"""Which run a folder holds, as far as it can be asked without training one."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.checkpointing import steps_done
from training.config import DataConfig, TrainConfig, to_json


def test_a_run_from_before_a_field_goes_on_with_what_the_field_means_for_it(tmp_path: Path) -> None:
    """A config.json of then has neither data.decoder nor data.levels_hash: PIL decoded, and levels had no file."""

    def config(**data: Any) -> TrainConfig:
        return TrainConfig(run_dir=str(tmp_path), data=DataConfig(**data))

    theirs = to_json(config())
    del theirs["data"]["decoder"], theirs["data"]["levels_hash"]
    (tmp_path / "config.json").write_text(json.dumps({"config": theirs}))
    (tmp_path / "LATEST").write_text("step-00000007\n")
    assert steps_done(config(decoder="pil")) == 7
    with pytest.raises(ValueError, match=r"What differs: data\.decoder: 'pil' there, 'dali' now$"):
        steps_done(config(decoder="dali"))
    with pytest.raises(ValueError, match=r"What differs: data\.levels_hash: '' there, 'ab' now$"):
        steps_done(config(decoder="pil", levels_hash="ab"))


@pytest.mark.parametrize("content", ["[", "{}", "[]", '{"config": null}'])
def test_a_config_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"whose config\.json is no run's"):
        steps_done(TrainConfig(run_dir=str(tmp_path)))
