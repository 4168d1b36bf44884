"""Every ablation of the paper is one value on the command line; each runs two steps and shows that it is in force.

A level fixed at inference is `aligngpt chat --level`: see test_chat.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from aligngpt.model import AlignGPTForConditionalGeneration, fresh_align_weights
from aligngpt.processor import AlignGPTProcessor
from training.config import ModelConfig
from training.loader import random_level
from training.sharding import starting_config, starting_weights

Train = Callable[..., Any]
TABLE = "model.align_table"
STEPS = ["--max-steps", 2, "--global-batch-size", 12, "--data.workers", 0, "--data.decoder", "pil"]


@pytest.fixture(scope="module")
def stage_1(parts: Any, train_here: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AlignGPT folder that stage 2's ablations start from."""
    return train_here("pretrain", tmp_path_factory.mktemp("stage-1"), *flags_1(parts)).run_dir / "model"


def flags_1(parts: Any) -> list[object]:
    flags: list[object] = ["--model.llm", parts.llms["llama"], "--model.vision", parts.vision, *STEPS]
    return [*flags, "--data.path", parts.captions, "--data.image-folder", parts.images, "--optim.lr", 1e-2]


def flags_2(parts: Any, init: Path) -> list[object]:
    flags: list[object] = ["--model.init", init, *STEPS, "--optim.align-lr", 1e-2]
    return [*flags, "--data.path", parts.chats, "--data.image-folder", parts.images]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def align_row(folder: Path, parts: Any) -> tuple[Tensor, Tensor]:
    """What stands after BOS in a prompt with an image, and the table."""
    model = AlignGPTForConditionalGeneration.from_pretrained(folder).eval()
    processor = AlignGPTProcessor.from_pretrained(folder)
    prompt = processor(images=[parts.images / "3.png"], text="<image>\nWhat is it?")
    rows, _ = model.model.embed(**prompt)
    return rows[0, 1].detach(), model.model.align_table.detach()


@pytest.mark.parametrize("mode", ["adaptive", "local", "global", "average", "none"])
def test_align_mode(parts: Any, stage_1: Path, train_here: Train, tmp_path: Path, mode: str) -> None:
    """The gate learns in the two modes that use it; the result's alignment row is the mode's, or there is none."""
    folder = train_here("finetune", tmp_path / mode, *flags_2(parts, stage_1), "--model.align-mode", mode)
    folder = folder.run_dir / "model"
    before, after = weights(stage_1), weights(folder)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert ("model.align_gate.linear_2.weight" in changed) == (mode in ("adaptive", "local"))
    assert TABLE not in changed
    assert {"lm_head.weight", "model.multi_modal_projector.linear_1.weight"} <= changed

    processor = AlignGPTProcessor.from_pretrained(folder)
    ids = processor(images=[parts.images / "3.png"], text="<image>\nWhat is it?")["input_ids"][0].tolist()
    assert ids.count(processor.token_ids.align) == (mode != "none")
    if mode != "none":
        row, table = align_row(folder, parts)
        means = {"global": table[7], "average": table[:7].mean(0) + table[7]}
        if mode in means:
            assert (row - means[mode]).abs().max() <= 1e-6
        else:  # the row less the global level is a mix of the local ones, and no plain mean
            mixed = row - table[7] if mode == "adaptive" else row
            mix = torch.linalg.lstsq(table[:7].double().T, mixed.double()[:, None]).solution[:, 0]
            assert (mix @ table[:7].double() - mixed).abs().max() <= 1e-6
            assert mix.sum().item() == pytest.approx(1, abs=1e-4)
            assert (mix - 1 / 7).abs().max() > 1e-4


def test_a_random_table_in_stage_2(parts: Any, stage_1: Path, train_here: Train, tmp_path: Path) -> None:
    """Another table than stage 1 left and than it began with, and it stays as it was drawn."""
    run = train_here("finetune", tmp_path / "run", *flags_2(parts, stage_1), "--model.random-table")
    table, learned = (weights(folder)[TABLE] for folder in (run.run_dir / "model", stage_1))
    model = ModelConfig(init=str(stage_1), random_table=True)
    config = starting_config(model, image_aspect_ratio="pad")
    assert torch.equal(table, starting_weights(model, config, seed=0)[TABLE].read())
    for other in (learned, fresh_align_weights(config, seed=0)[TABLE]):
        both = torch.stack([table.flatten(), other.flatten()])
        assert abs(torch.corrcoef(both)[0, 1]) < 0.3  # 256 independent numbers


def test_random_levels_and_another_number_of_them(parts: Any, train_here: Train, tmp_path: Path) -> None:
    """A table of 16 rows, of which those of the levels drawn for the 11 records with an image are trained."""
    flags = [*flags_1(parts), "--data.levels", "random", "--model.num-levels", 16]
    run = train_here("pretrain", tmp_path / "run", *flags)
    after = weights(run.run_dir / "model")
    before = fresh_align_weights(AutoConfig.from_pretrained(run.run_dir / "model"), seed=0)
    assert after[TABLE].shape == (16, 32)
    assert after["model.align_gate.linear_2.weight"].shape[0] == 15
    moved = (after[TABLE] != before[TABLE]).any(1).nonzero().flatten().tolist()
    assert moved == sorted({random_level(0, record, 16) for record in range(11)})
