"""A tiny random LLM, a tiny CLIP tower, a few generated pictures, and the real commands run on them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from training.config import Stage, read_command_line
from training.loop import train

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tests/data/oracle"
LLM: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 321,  # odd, so that two processes hold parts of different size
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


@dataclass(frozen=True)
class Parts:
    """Folders of what a run needs."""

    llms: dict[str, Path]  # "llama"; "gemma": tied head, scaled embedding
    vision: Path
    images: Path
    captions: Path  # 11 records with an image and a level, 1 of text alone
    chats: Path  # 13 records, 5 of them without an image


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int
    output: str
    run_dir: Path

    @property
    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    llms = {
        "llama": LlamaForCausalLM(LlamaConfig(**LLM, tie_word_embeddings=False)),
        "gemma": GemmaForCausalLM(GemmaConfig(**LLM, head_dim=8)),
    }
    assert llms["gemma"].config.tie_word_embeddings
    for name, llm in llms.items():
        llm.save_pretrained(root / name)
        for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            (root / name / file).write_bytes((TOKENIZER / file).read_bytes())
    CLIPVisionModel(CLIPVisionConfig(**TOWER, image_size=28, patch_size=14)).save_pretrained(root / "vision")

    images = root / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    answers = ["red", "a bus on the road", "two cats", "blue sky", "an old house by the sea", "tea"]

    def record(number: int, question: str, **more: Any) -> dict[str, Any]:
        answer = f"{answers[number % len(answers)]} {number}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": f"s{number}", "conversations": turns, **more}

    captions = [record(n, "<image>\nDescribe it.", image=f"{n}.png", align_level=n % 8) for n in range(11)]
    captions.append(record(11, "Say something."))
    chats = [
        record(n, "How are you today?") if n % 5 in (1, 2) else record(n, "<image>\nWhat is it?", image=f"{n % 12}.png")
        for n in range(13)
    ]
    for name, records in (("captions", captions), ("chats", chats)):
        (root / f"{name}.json").write_text(json.dumps(records))
    return Parts(
        {name: root / name for name in llms}, root / "vision", images, root / "captions.json", root / "chats.json"
    )


@pytest.fixture(scope="session")
def train_here() -> Callable[..., Finished]:
    """`train_here(stage, run_dir, *flags)` is `launch` without a process of its own: a world of one."""

    def run(stage: Stage, run_dir: Path, *flags: object, preset: str = "tiny") -> Finished:
        try:
            train(read_command_line(stage, [preset, "--run-dir", str(run_dir), *map(str, flags)]), stage)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return Finished(0, "", run_dir)

    return run


@pytest.fixture(scope="session")
def launch() -> Callable[..., Finished]:
    """`launch(script, run_dir, *flags, processes=…)` runs training/<script>.py; processes=0: without torchrun.

    `on_triton`: the ops run Triton's kernels, in its interpreter where there is no GPU, instead of their references.
    """

    def run(
        script: str,
        run_dir: Path,
        *flags: object,
        processes: int = 0,
        preset: str = "tiny",
        on_triton: bool = False,
    ) -> Finished:
        start = [sys.executable]
        if processes:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        program = ["tests/training/on_triton.py", script] if on_triton else [f"training/{script}.py"]
        command = [*start, *program, preset, "--run-dir", run_dir, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        return Finished(done.returncode, done.stdout + done.stderr, run_dir)

    return run
