"""Run by test_sharding.py under torchrun: `sharding_checks.py FOLDER`, with FOLDER/<name>/llm, FOLDER/<name>/vision.

Each model is built without weights, cut over two processes and filled; then compared with the same model as
transformers loads it: every buffer, every weight, the logits, and what each process read from the files.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from aligngpt.model import AlignGPTForConditionalGeneration
from training import sharding
from training.config import ModelConfig


class Counted:
    """A stored tensor that counts the elements it hands out."""

    read_elements = 0

    def __init__(self, stored: sharding.Stored):
        self.stored, self.shape, self.dtype = stored, stored.shape, stored.dtype

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        rows = self.stored.read(start, stop)
        Counted.read_elements += rows.numel()
        return rows


def check(folder: Path, world: sharding.World) -> None:
    parts = ModelConfig(llm=str(folder / "llm"), vision=str(folder / "vision"))
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32)
    reference = AlignGPTForConditionalGeneration.from_parts(llm, folder / "vision", seed=7)
    config = sharding.starting_config(parts, image_aspect_ratio="pad")
    weights = {name: Counted(stored) for name, stored in sharding.starting_weights(parts, config, seed=7).items()}
    model = sharding.build(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    sharding.freeze(model, ("llm", "projector", "gate"))
    sharding.shard(model, world.mesh, compute_dtype=torch.float32)
    Counted.read_elements = 0
    sharding.fill(model, weights, world, compute_dtype=torch.float32, source=str(folder))
    model.eval()

    buffers, wanted = dict(model.named_buffers()), dict(reference.named_buffers())
    assert buffers.keys() == wanted.keys()
    for name, buffer in wanted.items():
        assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(buffers[name], buffer), name

    tied = sharding.tied_names(model)
    assert sorted(map(sorted, tied.values())) == sorted(map(sorted, sharding.tied_names(reference).values()))
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in tied)
    assert Counted.read_elements == held
    cut = sum(parameter.numel() for parameter in tied if isinstance(parameter, DTensor))
    rounding = sum(parameter[0].numel() for parameter in tied if isinstance(parameter, DTensor))
    tower = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    assert held - tower <= cut / world.size + rounding
    state = dict(reference.named_parameters())
    for parameter, (name, *_) in tied.items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert torch.equal(whole, state[name]), name

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (2, 9), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)


with sharding.world() as everyone:
    for case in sorted(Path(sys.argv[1]).iterdir()):
        check(case, everyone)
        if everyone.rank == 0:
            print(f"{case.name} ok")
