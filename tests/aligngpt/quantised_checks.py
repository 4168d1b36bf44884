"""Run by test_ecosystem.py: `quantised_checks.py FOLDER SCRATCH DEVICE`, with torchao and bitsandbytes in the path.

The model in FOLDER is loaded quantised in each way, and compared with one of plain layers that hold the rounded
weights. Both packages take seconds to import and write to stderr, which the other tests are spared.
"""

import copy
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from PIL import Image
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from aligngpt import AlignGPTProcessor

FOLDER, SCRATCH, DEVICE = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
KEPT = {"vision_tower", "multi_modal_projector", "align_gate", "align_table", "embed_tokens", "lm_head"}
PLAIN = AutoModelForImageTextToText.from_pretrained(FOLDER)
LINEAR = {name for name, module in PLAIN.named_modules() if isinstance(module, nn.Linear)}
OF_THE_LLM = {name for name in LINEAR if not KEPT & set(name.split("."))}
load = functools.partial(AutoModelForImageTextToText.from_pretrained, device_map=DEVICE)


def prompts() -> dict[str, Tensor]:
    processor = AlignGPTProcessor.from_pretrained(FOLDER)
    return dict(processor([Image.new("RGB", (60, 40), "red")], ["What is <image>\nthis?", "No picture, only words"]))


INPUTS = prompts()
THERE = {name: tensor.to(DEVICE) for name, tensor in INPUTS.items()}


class Said(logging.Handler):
    """What the model says of ops that it leaves out: once in a process."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**(THERE if model.device.type == DEVICE else INPUTS)).logits.cpu()


def first_answers(model: Any) -> Tensor:
    return model.generate(**THERE, max_new_tokens=3, do_sample=False).cpu()[:, INPUTS["input_ids"].shape[1]]


def rounded_weights(model: Any) -> dict[str, Tensor]:
    """Of the layers that torchao quantised, by name."""
    return {
        name: module.weight.dequantize().detach().cpu()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter
    }


def with_weights(weights: dict[str, Tensor]) -> Any:
    model = copy.deepcopy(PLAIN)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    return model


def torchao_of_the_llm_alone() -> None:
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = load(FOLDER, quantization_config=config)
    assert config.modules_to_not_convert is None, "the caller's config was written into"
    rounded = rounded_weights(model)
    assert set(rounded) == OF_THE_LLM
    for name, weight in rounded.items():
        exact = PLAIN.get_submodule(name).weight
        assert ((weight - exact).abs() <= 0.51 * exact.abs().amax(1, keepdim=True) / 127).all(), name
    torch.testing.assert_close(logits(model), logits(with_weights(rounded)), atol=1e-4, rtol=1e-4)
    assert torch.equal(first_answers(model), logits(model)[:, -1].argmax(-1))
    assert not SAID.lines, SAID.lines
    model.save_pretrained(SCRATCH / "torchao")
    again = load(SCRATCH / "torchao")
    for name, weight in rounded_weights(again).items():
        assert torch.equal(weight, rounded.pop(name)), name
    assert not rounded
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)


def torchao_of_everything() -> None:
    """Projector and gate are then called, not read."""
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    model = load(FOLDER, quantization_config=config)
    rounded = rounded_weights(model)
    assert set(rounded) == LINEAR - {"lm_head"}
    torch.testing.assert_close(logits(model), logits(with_weights(rounded)), atol=1e-4, rtol=1e-4)
    assert torch.equal(first_answers(model), logits(model)[:, -1].argmax(-1))
    assert len(SAID.lines) == 1, SAID.lines
    assert "is called instead of the fused op" in SAID.lines[0]


def bitsandbytes(bits: int, coarse: Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]) -> None:
    """As the weights dequantised, within twice what rounding the input of the same layers does."""
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_threshold=0.0)  # no column is an outlier
    model = load(FOLDER, quantization_config=config)
    stored = model.state_dict()
    for name, tensor in PLAIN.state_dict().items():
        assert torch.equal(stored[name].cpu(), tensor) == bool(KEPT & set(name.split(".")) or "norm" in name), name
    model.save_pretrained(SCRATCH / str(bits))  # before it answers: on some CPUs bitsandbytes rewrites its weights then
    again = load(SCRATCH / str(bits)).state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    found = logits(model)
    assert torch.equal(first_answers(model), found[:, -1].argmax(-1))
    by_hand = load(FOLDER, quantization_config=config).dequantize().float().cpu()
    exact = logits(by_hand)
    for name in OF_THE_LLM:
        by_hand.get_submodule(name).register_forward_pre_hook(coarse)
    assert (found - exact).abs().max() <= 2 * (logits(by_hand) - exact).abs().max()
    assert not torch.allclose(exact, logits(PLAIN), atol=1e-2)


def in_bf16(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].bfloat16().float(),)


def in_int8(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Each row in steps of 1/127 of its largest."""
    step = args[0].abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
    return ((args[0] / step).round() * step,)


def qlora() -> None:
    """Low-rank adapters over four bits: they alone get a gradient."""
    model = prepare_model_for_kbit_training(load(FOLDER, quantization_config=BitsAndBytesConfig(load_in_4bit=True)))
    target = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=target)).train()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    vocab_size = PLAIN.config.text_config.vocab_size
    labels = THERE["input_ids"].masked_fill(THERE["input_ids"] >= vocab_size, -100)
    lora(**THERE, labels=labels).loss.backward()
    for name, parameter in lora.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == ("lora_" in name), name
    lora.eval()
    assert torch.equal(first_answers(lora), logits(lora)[:, -1].argmax(-1))


if __name__ == "__main__":
    torch.manual_seed(0)
    SAID = Said()
    logging.getLogger("aligngpt.model").addHandler(SAID)
    logging.getLogger("aligngpt.model").setLevel(logging.INFO)
    torchao_of_the_llm_alone()
    torchao_of_everything()
    bitsandbytes(4, in_bf16)
    bitsandbytes(8, in_int8)
    qlora()
