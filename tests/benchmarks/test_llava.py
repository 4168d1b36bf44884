"""Ours as LLaVA and transformers' Llava are held to each other, and whoever is wrong is named.

Everybody of a case runs here; what torch.compile would make runs as it is, since that takes a minute.
"""

import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama import modeling_llama

from benchmarks import bench_step, lengths, plain
from benchmarks.bench_llava import (
    COMPILED,
    LIGER,
    LLAVA,
    LLAVA_MICRO,
    WITHOUT,
    cost_case,
    done,
    forward_case,
    step_case,
)
from benchmarks.bench_step import leave_world
from benchmarks.case import Case, check
from benchmarks.work import ADAMW_FLOPS
from training.flops import count_flops

CPU = torch.device("cpu")
PLAIN = "plain loop, torch.compile"


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    yield
    leave_world()


@pytest.fixture(autouse=True)
def _few_small_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "PHOTOS", 2)
    monkeypatch.setattr(lengths, "PHOTO_SIZE", (40, 30))


@pytest.fixture
def liger(monkeypatch):
    """A package that patches transformers as Liger does. Its rotation counts its calls, and may be wrong."""
    rotate = modeling_llama.apply_rotary_pos_emb
    fake = SimpleNamespace(calls=0, factor=1.0)

    def rotated(q, k, *args, **kwargs):
        fake.calls += 1
        q, k = rotate(q, k, *args, **kwargs)
        return fake.factor * q, k

    def apply(model):
        assert type(model).__name__ == "LlavaForConditionalGeneration"
        modeling_llama.apply_rotary_pos_emb = rotated

    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    functions = SimpleNamespace(apply_liger_kernel_to_llava=apply)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", functions)
    yield fake
    assert modeling_llama.apply_rotary_pos_emb is rotate, "who runs beside Liger runs as transformers has it"


def checked(case: Case) -> dict[str, dict]:
    """What everybody who can run on a CPU is told about his answer."""
    inputs = case.make(CPU)
    exact, plain_outputs = case.exact(inputs), case.plain(inputs)
    return {
        name: check(case, name, inputs, contender.prepare(inputs), plain_outputs, exact)
        for name, contender in case.contenders.items()
        if name != COMPILED
    }


def test_all_give_the_same_logits(liger):
    found = checked(forward_case(LLAVA_MICRO, torch.float32))
    assert set(found) == {"ours", "ours, padded", LLAVA, LIGER}
    assert not any("wrong" in record for record in found.values()), found
    assert liger.calls


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_all_take_the_same_step(stage, liger, monkeypatch):
    monkeypatch.setattr(bench_step, "compile_llm", lambda model: None)
    found = checked(step_case(LLAVA_MICRO, stage, torch.float32))
    assert set(found) == {"ours", LLAVA, LIGER, PLAIN}
    assert not any("wrong" in record for record in found.values()), found
    assert liger.calls


def test_who_is_wrong_is_named(liger, monkeypatch):
    """Liger's attention, and a loop that does not clip; neither is in the others' way."""
    liger.factor = 1.01
    monkeypatch.setattr(plain, "clip_grad_norm_", lambda parameters, norm: torch.tensor(1.0))
    monkeypatch.setattr(bench_step, "compile_llm", lambda model: None)
    found = checked(step_case(LLAVA_MICRO, "finetune", torch.float32))
    assert "wrong" not in found["ours"]
    assert "wrong" not in found[LLAVA]
    assert "result 0 is off" in found[LIGER]["wrong"]
    assert "result 1 is off" in found[PLAIN]["wrong"]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_token_is_one_of_each_sample_with_an_image(stage):
    case = cost_case(LLAVA_MICRO, stage, torch.float32)
    cost = case.make(CPU)
    images = sum(len(batch.pixel_values) for batch in cost.steps["ours"].batches)
    assert 0 < images <= LLAVA_MICRO.global_batch
    assert cost.steps["ours"].tokens - cost.steps[WITHOUT].tokens == images
    assert cost.steps["ours"].supervised_tokens == cost.steps[WITHOUT].supervised_tokens
    found = checked(dataclasses.replace(case, make=lambda device: cost))
    assert not any("wrong" in record for record in found.values()), found


def test_work_without_a_token_is_that_of_training_and_the_optimizer():
    """Of two steps; no gate is counted."""
    cost = cost_case(LLAVA_MICRO, "finetune", torch.float32).make(CPU)
    step, model = cost.steps[WITHOUT], bench_step.whole_model(cost.sizes[WITHOUT], cost.config)
    found = bench_step.counted(list, cost.sizes[WITHOUT], cost.config, [step, step])
    counted = count_flops(model).of(tokens=step.tokens, supervised_tokens=step.supervised_tokens, images=step.images)
    rows = step.images * model.config.image_seq_length
    to_tower = 2 * rows * model.model.multi_modal_projector.linear_1.weight.numel()
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert found["flops"] == 2 * (counted - to_tower + ADAMW_FLOPS * trained)
    assert found["syncs"] == 0


def test_work_of_a_forward_pass_is_its_products():
    """A head for each token, no loss, no gradient."""
    forward = forward_case(LLAVA_MICRO, torch.float32).make(CPU)
    found = done(list, forward, 1.0)
    model, tokens = forward.model, forward.packed.num_tokens
    inner, images = model.model, len(forward.packed.pixel_values)
    rows = images * model.config.image_seq_length

    def weights(module):
        return sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))

    tower = (rows + images) * weights(inner.vision_tower)
    patches = [part for part in inner.vision_tower.modules() if isinstance(part, torch.nn.Conv2d)]
    tower += rows * sum(part.weight.numel() for part in patches)
    language = tokens * (weights(inner.language_model) + model.lm_head.weight.numel())
    assert found["flops"] == 2 * (tower + rows * weights(inner.multi_modal_projector) + language)
