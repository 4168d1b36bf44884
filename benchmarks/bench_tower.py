"""The vision tower's forward pass: `model.image_features` against transformers' tower in several ways, on 16 images.

Features are the hidden states after the last layer but one. Ours, like LLaVA's, runs the tower whole; who leaves out
the last layer, of which nothing is used, is a contender of its own. Bytes are weights, pixels and features once; FLOPs
those of work.py.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aligngpt.model import AlignGPTForConditionalGeneration
from benchmarks import shapes
from benchmarks.bench_step import LLAMA_7B, MICRO_TOWER, Size
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs, Run
from benchmarks.work import tower_flops

CLIP = LLAMA_7B._replace(vocabulary=64, width=64, mlp=64, layers=1, heads=2)  # the tower has no use for the LLM
ON_CPU = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}


class Tower(NamedTuple):
    model: AlignGPTForConditionalGeneration
    pixels: Tensor  # (M, 3, size, size)


def make(device: torch.device, size: Size, images: int, dtype: torch.dtype) -> Tower:
    with torch.device(device):
        model = AlignGPTForConditionalGeneration(size.config()).to(dtype).eval()
    return Tower(model, torch.randn(images, 3, size.image_size, size.image_size, device=device, dtype=dtype))


def ours(tower: Tower) -> Run:
    return lambda: [tower.model.model.image_features(tower.pixels)]


def features(module: nn.Module, pixels: Tensor, layer: int = -2) -> Tensor:
    return module(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]


def transformers_tower(tower: Tower, attention: str, dtype: torch.dtype | None = None) -> nn.Module:
    module = copy.deepcopy(tower.model.model.vision_tower).to(dtype)
    module.config._attn_implementation = attention
    return module


def by_transformers(attention: str, *, compiled: bool = False) -> Contender:
    def prepare(tower: Tower) -> Run:
        module = transformers_tower(tower, attention)
        function = torch.compile(features, dynamic=False) if compiled else features
        return torch.no_grad()(lambda: [function(module, tower.pixels)])

    return Contender(prepare, gpu_only=compiled)


def without_last_layer(tower: Tower) -> Run:
    module = transformers_tower(tower, "sdpa")
    layers = next(part for part in module.modules() if isinstance(part, nn.ModuleList))
    del layers[-1]
    return torch.no_grad()(lambda: [features(module, tower.pixels, layer=-1)])


@torch.no_grad()
def eager(tower: Tower, dtype: torch.dtype | None = None) -> Outputs:
    module = transformers_tower(tower, "eager", dtype)
    return [torch.cat([features(module, image[None].to(dtype)) for image in tower.pixels])]


def case(size: Size, images: int, dtype: torch.dtype) -> Case:
    width, mlp, layers = (size.tower[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    patches, pixels = (size.image_size // size.patch) ** 2, 3 * size.image_size**2
    weights = layers * (4 * width**2 + 2 * width * mlp) + 3 * size.patch**2 * width
    elements = weights + images * (pixels + patches * width)
    return Case(
        name=f"vision tower, {layers} layers, {images} images",
        make=lambda device: make(device, size, images, dtype),
        contenders={
            "ours": Contender(ours),
            "eager": by_transformers("eager"),
            "SDPA": by_transformers("sdpa"),
            "SDPA, torch.compile": by_transformers("sdpa", compiled=True),
            "SDPA, without the last layer": Contender(without_last_layer),
        },
        exact=lambda tower: eager(tower, torch.float64),
        plain=lambda tower: eager(tower, tower.pixels.dtype),
        bytes=dtype.itemsize * elements,
        flops=tower_flops(images, patches, patch=size.patch, width=width, mlp=mlp, layers=layers),
        stage="vision tower",
        items=images,
        unit="images",
        group="vision tower",
        sweep=("images", images),
        memory=True,
        host=True,
        one_copy=True,
        rounds=5,
        trains=True,
    )


def cases() -> list[Case]:
    return [case(CLIP, images, torch.bfloat16) for images in (1, shapes.IMAGES)]


def cpu_cases() -> list[Case]:
    return [case(CLIP._replace(tower=ON_CPU), 1, torch.float32)]


def small_cases() -> list[Case]:
    return [case(CLIP._replace(scale=36, tower=MICRO_TOWER), 2, torch.float32)]


def test_tower(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
