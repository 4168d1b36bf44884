"""Ours as LLaVA against transformers' Llava, and what the alignment token costs.

AlignGPT with `align_mode` "none" is LLaVA, so transformers' `LlavaForConditionalGeneration` with the same weights has
to give the same logits, loss and updates. Everybody is given the same samples, as long as those of LLaVA's data:

    forward     logits of every token, by models in the dtype itself, without gradients. Ours packed and padded
    step        one of each of training's stages: ours packed, sharded and from training's loader (bench_step.py), the
                others as transformers' Trainer does it: padded, weights in fp32, autocast where ours computes in bf16,
                fused AdamW. The loss must be that of the samples one by one; the gradient's norm and, in fp32, all
                weights after the update those of Llava run eagerly
    the token   a step of ours with it and without it: the gate, or the look-up of levels, and a token more a sample

The mark of an image row must have a row in Llava's vocabulary: it is given `<unk>`, which no text here has, and padding
is `</s>`. On a CPU torch.compile and Liger are not timed: the first
compiles for most of a minute, the second has no path there.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import LlavaForConditionalGeneration
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava

from aligngpt.batch import Batch
from aligngpt.config import AlignGPTConfig, llava_config
from aligngpt.model import AlignGPTForConditionalGeneration
from benchmarks import bench_step, work
from benchmarks.bench_step import (
    LLAMA_7B,
    MICRO,
    PLAIN_LR,
    STEPS,
    TINY,
    Beside,
    Data,
    Size,
    ready,
    tolerance,
    update_floors,
    updated,
)
from benchmarks.case import Case, Contender, InTurns
from benchmarks.liger import with_liger
from benchmarks.measure import Outputs, Run, count_syncs
from benchmarks.plain import PlainBatch, plain_batch
from training.config import Stage, TrainConfig
from training.loop import Step

UNKNOWN, END = 0, 2  # of the benchmark's tokenizer: an image's mark, and padding, which is masked
LLAVA, COMPILED, LIGER = "transformers Llava", "transformers Llava, torch.compile", "Liger's Llava"
WITHOUT = "ours, without the token"


class LlavaSize(Size):
    """The same without an alignment token."""

    def config(self) -> AlignGPTConfig:
        config = super().config()
        config.align_mode = "none"
        return config


def without_token(data: Data) -> Data:
    """The same samples without alignment tokens."""
    samples = copy.copy(data.samples)
    samples.processor = copy.copy(samples.processor)
    samples.processor.align, samples.levels = False, None
    return data._replace(samples=samples)


def llava_of(model: AlignGPTForConditionalGeneration) -> LlavaForConditionalGeneration:
    """transformers' Llava that shares the model's weights, and trains those that the model trains."""
    config = llava_config(model.config, image_token_id=UNKNOWN, vocab_size=model.config.text_config.vocab_size)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    own = dict(model.named_parameters())
    for name, _ in list(llava.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(llava.get_submodule(owner), leaf, own[name])
    for name, module in llava.named_modules():
        for leaf, _ in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, model.get_submodule(name).get_buffer(leaf))
    return llava.train(model.training)


def llava_inputs(batch: Batch, config: AlignGPTConfig) -> dict[str, Any]:
    """A padded batch as Llava takes it."""
    assert batch.attention_mask is not None
    image = batch.input_ids == config.image_token_id
    ids = batch.input_ids.masked_fill(batch.attention_mask == 0, END).masked_fill(image, UNKNOWN)
    pixels = {"pixel_values": batch.pixel_values} if len(batch.pixel_values) else {}
    return {"input_ids": ids, "attention_mask": batch.attention_mask, **pixels}


def by_liger(llava: LlavaForConditionalGeneration, run: Run) -> Run:
    from liger_kernel.transformers import apply_liger_kernel_to_llava

    return with_liger(lambda: apply_liger_kernel_to_llava(model=llava), (modeling_llama, modeling_llava), run)


# ------------------------------------------------------------------------------------------------ forward


class Forward(NamedTuple):
    """One batch of the first samples, and a model in its dtype that all contenders share."""

    model: AlignGPTForConditionalGeneration
    packed: Batch
    padded: Batch


def make_forward(device: torch.device, size: LlavaSize, dtype: torch.dtype) -> Forward:
    with tempfile.TemporaryDirectory() as folder:
        data = without_token(Data.make(size, "finetune", Path(folder), size.per_device))
        examples = data.examples()
    collate = data.samples.processor.collate
    model = bench_step.whole_model(size, bench_step.recipe("finetune", dtype)).eval().requires_grad_(False).to(dtype)
    return Forward(model, collate(examples, packed=True).to(device), collate(examples).to(device))


def our_forward(forward: Forward, *, packed: bool) -> Run:
    batch = forward.packed if packed else forward.padded
    inputs = {name: value for name, value in batch.model_inputs().items() if name not in ("labels", "rows")}
    inputs["pixel_values"] = batch.pixel_values.to(forward.model.dtype)

    @torch.no_grad()
    def run() -> Outputs:
        bench_step.attend(forward.model, packed=packed)
        return [forward.model(**inputs, use_cache=False).logits]

    return run


def llava_forward(forward: Forward, *, kind: str = LLAVA, dtype: torch.dtype | None = None) -> Run:
    llava = llava_of(forward.model)
    if dtype is not None:
        llava = copy.deepcopy(llava).to(dtype)
    llava.set_attn_implementation("sdpa")
    inputs = llava_inputs(forward.padded, forward.model.config)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(llava.dtype)
    if kind == COMPILED:
        llava.compile()
    run = torch.no_grad()(lambda: [llava(**inputs, use_cache=False).logits])
    return by_liger(llava, run) if kind == LIGER else run


def of_tokens(forward: Forward, outputs: Outputs) -> Outputs:
    """Logits (T, V) of all tokens but padding."""
    (logits,) = outputs
    assert forward.padded.attention_mask is not None
    padded = logits.shape[:2] == forward.padded.attention_mask.shape
    return [logits[forward.padded.attention_mask.bool()] if padded else logits[0]]


def done(run: Run, forward: Forward, seconds: float) -> dict[str, Any]:
    """Work of the stages before the loss, and logits of every token."""
    model, batch, each = forward.model, forward.packed, forward.model.dtype.itemsize
    parts = work.of_training(model, [batch], compute_bytes=each, fused_loss=False)
    found = [parts[name] for name in ("vision tower", "projector", "injection", "LLM forward")]
    vocabulary, width = model.lm_head.weight.shape
    return {
        "bytes": sum(part.bytes for part in found)
        + each * (vocabulary * width + batch.num_tokens * (vocabulary + width)),
        "flops": sum(part.flops for part in found) + 2 * batch.num_tokens * vocabulary * width,
        "syncs": count_syncs(run, model.device),
    }


def forward_case(size: LlavaSize, dtype: torch.dtype) -> Case:
    def contender(prepare: Callable[[Forward], Run], *, gpu_only: bool = False) -> Contender:
        return Contender(prepare, of_tokens, gpu_only=gpu_only, details=done)

    return Case(
        name=f"llava forward, {size.per_device} samples",
        make=lambda device: make_forward(device, size, dtype),
        contenders={
            "ours": contender(partial(our_forward, packed=True)),
            "ours, padded": contender(partial(our_forward, packed=False)),
            LLAVA: contender(llava_forward),
            COMPILED: contender(partial(llava_forward, kind=COMPILED), gpu_only=True),
            LIGER: contender(partial(llava_forward, kind=LIGER), gpu_only=True),
        },
        exact=lambda forward: of_tokens(forward, llava_forward(forward, dtype=torch.float64)()),
        plain=lambda forward: of_tokens(forward, llava_forward(forward)()),
        stage="training step",
        items=size.per_device,
        unit="samples",
        group="llava forward",
        memory=True,
        trains=True,
        one_copy=True,
    )


# ------------------------------------------------------------------------------------------------ step


class Training(NamedTuple):
    size: LlavaSize
    config: TrainConfig
    step: Step  # packed
    padded: list[Batch]
    plain: list[PlainBatch]
    expected: Outputs  # the loss, of batches of one sample; the rest of Llava


def make_training(device: torch.device, size: LlavaSize, stage: Stage, dtype: torch.dtype) -> Training:
    config = bench_step.recipe(stage, dtype)
    with tempfile.TemporaryDirectory() as folder:
        data = without_token(Data.make(size, stage, Path(folder), size.global_batch))
        (step,) = (ready(loaded, device) for loaded in data.steps(device))
        alone = [ready(loaded, device) for loaded in data.padded(1).steps(device)]
        (padded,) = (ready(loaded, device) for loaded in data.padded(size.per_device).steps(device))
        examples = data.examples()
    plain = [
        plain_batch(examples[start : start + size.per_device], size.config()).to(device)
        for start in range(0, len(examples), size.per_device)
    ]
    training = Training(size, config, step, padded.batches, plain, [])
    _, *others = updated(training, llava_step(training)())
    return training._replace(expected=[bench_step.mean_loss(size, config, alone), *others])


def our_step(training: Training) -> Run:
    model = bench_step.make_model(training.size, training.config)
    optimizer = bench_step.optimizer_of(model, lr=PLAIN_LR)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return lambda: [bench_step.train_step(model, optimizer, training.step, training.config), *trained]


def llava_step(training: Training, *, kind: str = LLAVA) -> Run:
    llava = llava_of(bench_step.whole_model(training.size, training.config))
    llava.set_attn_implementation("sdpa")
    if kind == COMPILED:
        llava.compile()
    trained = [parameter for parameter in llava.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PLAIN_LR, weight_decay=0.0, fused=True)
    inputs = [llava_inputs(batch, training.size.config()) | {"labels": batch.labels} for batch in training.padded]
    supervised, autocast = training.step.supervised_tokens, training.config.precision == "bf16"

    def run() -> Outputs:
        total = torch.zeros((), device=trained[0].device)
        for batch in inputs:
            with torch.autocast(total.device.type, torch.bfloat16, enabled=autocast):
                loss = llava(**batch, num_items_in_batch=supervised, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        norm = clip_grad_norm_(trained, training.config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return [torch.stack([total, norm]), *trained]

    return by_liger(llava, run) if kind == LIGER else run


def compiled_plain_run(training: Training) -> Run:
    """The plain loop of plain.py, its LLM compiled."""
    size, config, step, _, plain, expected = training
    return bench_step.plain_run(Beside(size, config, step, plain, expected), compiles=True)


def useful(run: Run, training: Training, seconds: float) -> dict[str, Any]:
    rate = {"tokens": training.step.tokens, "tokens_per_second": round(training.step.tokens / seconds, 1)}
    return rate | bench_step.counted(run, training.size, training.config, [training.step])


def step_case(size: LlavaSize, stage: Stage, dtype: torch.dtype) -> Case:
    def contender(prepare: Callable[[Training], Run], *, gpu_only: bool = False) -> Contender:
        return Contender(prepare, updated, gpu_only=gpu_only, details=useful)

    return Case(
        name=f"llava step, {stage}, {size.global_batch} samples",
        make=lambda device: make_training(device, size, stage, dtype),
        contenders={
            "ours": contender(our_step),
            LLAVA: contender(llava_step),
            COMPILED: contender(partial(llava_step, kind=COMPILED), gpu_only=True),
            LIGER: contender(partial(llava_step, kind=LIGER), gpu_only=True),
            "plain loop, torch.compile": contender(compiled_plain_run, gpu_only=True),
        },
        exact=lambda training: training.expected,
        plain=lambda training: training.expected,
        floors=update_floors(dtype),
        stage="training step",
        items=size.global_batch,
        unit="samples",
        group="llava step",
        memory=True,
        rounds=5,
        trains=True,
        one_copy=True,
    )


# ------------------------------------------------------------------------------------------------ the token


class Cost(NamedTuple):
    """A step of the same samples, with alignment tokens and without."""

    config: TrainConfig
    sizes: dict[str, Size]  # by contender, as the others
    steps: dict[str, Step]
    expected: dict[str, Tensor]  # the loss, of batches of one sample


def make_cost(device: torch.device, size: LlavaSize, stage: Stage, dtype: torch.dtype) -> Cost:
    config = bench_step.recipe(stage, dtype)
    sizes: dict[str, Size] = {"ours": Size(*size), WITHOUT: size}
    steps, expected = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        with_token = Data.make(size, stage, Path(folder), size.global_batch)
        for name, data in (("ours", with_token), (WITHOUT, without_token(with_token))):
            (steps[name],) = (ready(loaded, device) for loaded in data.steps(device))
            alone = [ready(loaded, device) for loaded in data.padded(1).steps(device)]
            expected[name] = bench_step.mean_loss(sizes[name], config, alone)
    return Cost(config, sizes, steps, expected)


def cost_run(cost: Cost, name: str) -> Run:
    """The loss as a share of what it has to be, at rate 0."""
    model = bench_step.make_model(cost.sizes[name], cost.config)
    optimizer = bench_step.optimizer_of(model, lr=0.0)

    def run() -> Outputs:
        loss, _ = bench_step.train_step(model, optimizer, cost.steps[name], cost.config)
        return [loss.double() / cost.expected[name].cpu()]

    return run


def counts(run: Run, cost: Cost, seconds: float, *, name: str) -> dict[str, Any]:
    step = cost.steps[name]
    found = bench_step.counted(run, cost.sizes[name], cost.config, [step])
    return {"tokens": step.tokens, "micro_batches": len(step.batches)} | found


def cost_case(size: LlavaSize, stage: Stage, dtype: torch.dtype) -> Case:
    one = [torch.ones((), dtype=torch.float64)]
    return Case(
        name=f"alignment token, {stage}, {size.global_batch} samples",
        make=lambda device: make_cost(device, size, stage, dtype),
        contenders={
            name: Contender(partial(cost_run, name=name), details=partial(counts, name=name))
            for name in ("ours", WITHOUT)
        },
        exact=lambda cost: one,
        plain=lambda cost: one,
        floors=(tolerance(dtype),),
        stage="training step",
        items=size.global_batch,
        unit="samples",
        group="alignment token",
        memory=True,
        rounds=7,
        trains=True,
        one_copy=True,
    )


# ------------------------------------------------------------------------------------------------ cases and test


LLAVA_7B = LlavaSize(*LLAMA_7B)._replace(layers=2, global_batch=16, per_device=8)  # five of them train side by side
LLAVA_TINY = LlavaSize(*TINY)._replace(layers=2)
LLAVA_MICRO = LlavaSize(*MICRO)


def cases_of(size: LlavaSize, dtype: torch.dtype, stages: Sequence[Stage] = STEPS) -> list[Case]:
    steps = [step_case(size, stage, dtype) for stage in stages]
    return [forward_case(size, dtype), *steps, *(cost_case(size, stage, dtype) for stage in stages)]


def cases() -> list[Case]:
    return cases_of(LLAVA_7B, torch.bfloat16)


def cpu_cases() -> list[Case]:
    return cases_of(LLAVA_TINY, torch.float32)


def small_cases() -> list[Case]:
    return cases_of(LLAVA_MICRO, torch.float32, stages=("finetune",))


def test_llava(in_turns: InTurns, case: Case) -> None:
    in_turns(case)
