"""A training step: by stage, packed against padded, against a plain loop, and as a share of what a GPU can do.

Samples are as long as those of LLaVA's data (lengths.py) and come through training's own loader; the model is built,
sharded over a world of one and trained as training/loop.py does it, in bf16 with fp32 weights on a GPU and in fp32 on a
CPU. All contenders of a case do the same samples and count as wrong unless their loss is the same.

    lengths     an epoch of instruction tuning, packed; padded to the longest of each micro-batch in plain order; padded
                in LLaVA's order, in which a global batch has one modality and is sorted by length. The rate is 0, so
                that every epoch has the same loss. Useful tokens are as many in each, so times compare as tokens/s do
    plain       a step of each of the stages, beside the same model in a plain padded loop (plain.py). The loss must be
                that of the samples one by one, the gradient's norm that of the plain loop and, in fp32, the weights
                after the step too
    MFU         a step at the shapes of 7B, one micro-batch of the preset's token budget and as many layers as fit, for
                each way of checkpointing. FLOPs as training/plan.py counts them. With it the step by stage
    stages      a step by stage as it runs in training, its data read, decoded and packed by the loader, its result
                saved. Every step reads the same global batch, so that all do the same work; the rate is 0. `us` is a
                step's that does not save; the step of `whole_us` and `stages` does, and begins when the checkpoint
                before is on the disk. Of reading and decoding a step sees what it waits for, "data wait"

On a GPU all have the shapes of 7B. On a CPU the models are small and the lengths are divided by 4 or 9; what has MFU as
its result needs a GPU.
"""

import atexit
import copy
import dataclasses
import functools
import itertools
import math
import shutil
import tempfile
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from aligngpt import attention
from aligngpt.batch import Example
from aligngpt.config import AlignGPTConfig
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.profiling import peak_memory_bytes
from aligngpt.stages import stage as marked
from benchmarks import lengths, shapes, stages, work
from benchmarks.case import Case, Contender, free
from benchmarks.measure import Outputs, Run, count_syncs
from benchmarks.plain import PlainBatch, compile_llm, plain_batch
from benchmarks.plain import step as plain_step
from training import loop, optim, plan, sharding
from training.checkpoints import Checkpoints
from training.config import Stage, TrainConfig, aligngpt_7b
from training.flops import count_flops
from training.forecast import CLIP_L
from training.loader import Cut, Loaded, Order, Part, Samples, estimated_lengths, micro_batches
from training.loop import Step
from training.metrics import peak_tflops
from training.run_folder import DTYPES
from training.sharding import World

SEED = 0
HEADROOM = 0.85  # of a GPU's memory, that what is planned may take
MOST_STEPS = 100_000  # that read the same batch
STAGE_ROUNDS = 3  # of a step by stage, and as many without marks


class Size(NamedTuple):
    """A model and the lengths of its samples."""

    scale: int  # by which lengths are divided
    vocabulary: int
    width: int
    mlp: int
    layers: int
    heads: int
    tower: dict[str, int]
    global_batch: int
    samples: int
    per_device: int  # samples of a padded micro-batch
    token_budget: int  # tokens of a packed one
    patch: int

    @property
    def image_size(self) -> int:
        return math.isqrt(lengths.IMAGE_ROWS // self.scale) * self.patch

    def config(self) -> AlignGPTConfig:
        llm = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=lengths.MAX_LENGTH,
            tie_word_embeddings=False,
        )
        vision = CLIPVisionConfig(**self.tower, image_size=self.image_size, patch_size=self.patch)
        return AlignGPTConfig.from_parts(llm, vision, num_align_levels=shapes.LEVELS)


SMALL_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALLEST_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MICRO_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MICRO = Size(36, 64, 32, 64, 2, 2, MICRO_TOWER, 8, 20, 3, 112, 8)  # the last global batch is smaller
SMALLEST = Size(9, 1024, 128, 344, 2, 4, SMALLEST_TOWER, 32, 128, 16, 16384 // 9, 8)  # the tower does 3 % of the work
TINY = Size(4, 8192, 256, 688, 4, 4, SMALL_TOWER, 8, 8, 4, 2048, 8)  # sizes of a step as in the preset "tiny"
LLAMA_7B = Size(1, shapes.VOCABULARY, shapes.WIDTH, 11008, 32, shapes.HEADS, CLIP_L, 32, 128, 16, 16384, 14)


# ------------------------------------------------------------------------------------------------ what is trained


_held = ExitStack()


@functools.cache
def world_of_one() -> World:
    """This process on its own, until it ends or `leave_world` is called."""
    atexit.register(_held.close)
    return _held.enter_context(sharding.world())


def leave_world() -> None:
    _held.close()
    world_of_one.cache_clear()


@dataclass(frozen=True)
class Drawn:
    """A weight that is drawn where it is needed, by its name."""

    name: str
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype = torch.float32

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        if len(self.shape) == 1:  # norms are 1, biases 0
            value = float("norm" in self.name and "weight" in self.name)
            return torch.full(self.shape, value, device=self.device)[start:stop]
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        drawn = torch.randn(self.shape, device=self.device, generator=generator)
        return drawn.mul_(math.prod(self.shape[1:]) ** -0.5)[start:stop]


Checkpointing = Literal["none", "selective", "full"]


def recipe(stage: Stage, dtype: torch.dtype, checkpointing: Checkpointing = "none") -> TrainConfig:
    """The preset of the stage, changed in how it computes."""
    preset = aligngpt_7b(stage)
    return dataclasses.replace(
        preset,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        sharding=dataclasses.replace(preset.sharding, activation_checkpointing=checkpointing),
    )


def make_model(size: Size, config: TrainConfig) -> AlignGPTForConditionalGeneration:
    """A model as training makes it, of weights that their names alone decide."""
    model, _ = loop.make_model(config, size.config(), drawn(size), world_of_one())
    return model


def whole_model(size: Size, config: TrainConfig) -> AlignGPTForConditionalGeneration:
    """The same model, not sharded and for padded batches: trained weights in fp32, frozen ones as they compute."""
    model = sharding.build(size.config())
    sharding.freeze(model, config.model.train)
    dtype = DTYPES[config.precision]
    sharding.fill(model, drawn(size), world_of_one(), compute_dtype=dtype, source="the benchmark")
    return model


def drawn(size: Size) -> dict[str, sharding.Stored]:
    device = world_of_one().device
    parameters = sharding.build(size.config()).named_parameters()
    return {name: Drawn(name, tuple(parameter.shape), device) for name, parameter in parameters}


def attend(model: AlignGPTForConditionalGeneration, *, packed: bool) -> None:
    """Choose the LLM's attention; training's models begin with that for packed batches."""
    model.model.language_model.set_attn_implementation(attention.NAME if packed else "sdpa")


def step_of(loaded: Loaded) -> Step:
    """What the loop's `read_steps` counts, for a world of one."""
    assert loaded.batches is not None
    return Step(
        loaded.batches,
        tokens=sum(batch.num_tokens for batch in loaded.batches),
        images=sum(len(batch.pixel_values) for batch in loaded.batches),
        supervised_tokens=sum(batch.num_supervised for batch in loaded.batches),
        dropped_samples=0,
        data_seconds=0.0,
    )


def ready(loaded: Loaded, device: torch.device) -> Step:
    """The same with its micro-batches on the device."""
    step = step_of(loaded)
    return dataclasses.replace(step, batches=[batch.to(device) for batch in step.batches])


def train_step(
    model: AlignGPTForConditionalGeneration, optimizer: torch.optim.Optimizer, step: Step, config: TrainConfig
) -> Tensor:
    """An optimizer step of training/loop.py; its loss and the norm of its gradient. (2,)"""
    world = world_of_one()
    sums = loop.forward_and_backward(model, step, config, world)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    means, norm = loop.reduce_and_clip(trained, sums, config, world)
    with marked("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor([means["loss"], norm])


class Data(NamedTuple):
    """Samples of a stage, which the loader or a plain loop reads."""

    samples: Samples
    size: Size

    @classmethod
    def make(cls, size: Size, stage: Stage, folder: Path, num_samples: int) -> "Data":
        make = lengths.captions if stage == "pretrain" else lengths.conversations
        records = lengths.with_photos(make(num_samples, vocabulary=size.vocabulary, scale=size.scale), folder)
        template = "plain" if stage == "pretrain" else "chat"
        processor = lengths.processor(size.vocabulary, scale=size.scale, image_size=size.image_size, template=template)
        levels = records.levels if stage == "pretrain" else None
        cut = Cut(token_budget=size.token_budget)
        return cls(Samples(records, processor, levels=levels, num_levels=shapes.LEVELS, seed=SEED, cut=cut), size)

    def padded(self, per_device: int) -> "Data":
        """The same, in micro-batches of so many samples."""
        samples = copy.copy(self.samples)
        samples.cut = Cut(per_device=per_device)
        return self._replace(samples=samples)

    def that_fit(self) -> "Data":
        """The first samples, as many as one packed micro-batch holds, in one global batch."""
        samples, budget = copy.copy(self.samples), self.size.token_budget
        sizes = [len(samples.processor.text(sample).input_ids) for sample in samples.records]
        samples.kept = np.flatnonzero(np.cumsum(sizes) <= budget)
        return Data(samples, self.size._replace(global_batch=len(samples.kept)))

    def examples(self) -> list[Example]:
        """In the order of the first epoch."""
        samples, (indices,) = self.samples, self._order("shuffle").steps(0, 1)
        records = [samples.records[int(index)] for index in indices]
        return [samples.processor.example(r, samples.records, level=samples.level(r)) for r in records]

    def _order(self, kind: Literal["shuffle", "grouped"]) -> Order:
        samples = self.samples
        return Order(
            len(samples),
            self.size.global_batch,
            SEED,
            kind,
            lengths=estimated_lengths(samples.records, samples.processor.rows_per_image),
            has_image=samples.records.num_images > 0,
        )

    def steps(
        self, device: torch.device, kind: Literal["shuffle", "grouped"] = "shuffle", *, workers: int = 0
    ) -> Iterator[Loaded]:
        """An epoch of global batches."""
        order = self._order(kind)
        parts = [Part(0, indices.tolist()) for indices in order.steps(0, order.steps_per_epoch)]
        return micro_batches(self.samples, parts, workers=workers, device=device, prefetch=2)

    def same(self, device: torch.device, *, workers: int) -> Iterator[Loaded]:
        """The first global batch again and again, read anew each time."""
        (indices,) = self._order("shuffle").steps(0, 1)
        parts = [Part(0, indices.tolist())] * MOST_STEPS
        return micro_batches(self.samples, parts, workers=workers, device=device, prefetch=2)


def optimizer_of(model: AlignGPTForConditionalGeneration, lr: float) -> torch.optim.Optimizer:
    settings = dataclasses.replace(TrainConfig().optim, lr=lr)
    return optim.make_optimizer(model.named_parameters(), settings)


@torch.no_grad()
def mean_loss(size: Size, config: TrainConfig, steps: Iterable[Step]) -> Tensor:
    """Over all supervised tokens, by a model that is not sharded. The batches are padded."""
    model = whole_model(size, config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[config.precision])
    batches = [batch for step in steps for batch in step.batches]
    losses = [model(**batch.model_inputs(), num_items_in_batch=1, use_cache=False).loss.double() for batch in batches]
    mean = torch.stack(losses).sum() / sum(batch.num_supervised for batch in batches)
    del model, parameter, losses
    free(mean.device)  # whoever comes next may need all memory
    return mean


def tolerance(dtype: torch.dtype) -> float:
    """Relative, of a mean loss."""
    return 1e-5 if dtype == torch.float32 else 2e-3


# ------------------------------------------------------------------------------------------------ packed and padded


class Epoch(NamedTuple):
    config: TrainConfig
    model: AlignGPTForConditionalGeneration  # which all contenders share: at rate 0 it stays as it is
    optimizer: torch.optim.Optimizer
    steps: dict[str, list[Step]]  # by contender
    expected: Tensor  # the loss, of batches of one sample


def make_epoch(device: torch.device, size: Size, dtype: torch.dtype) -> Epoch:
    config = recipe("finetune", dtype)
    with tempfile.TemporaryDirectory() as folder:
        data = Data.make(size, "finetune", Path(folder), size.samples)
        cuts: dict[str, tuple[Data, Any]] = {
            "ours, packed": (data, "shuffle"),
            "ours, padded": (data.padded(size.per_device), "shuffle"),
            "ours, padded, grouped": (data.padded(size.per_device), "grouped"),
        }
        steps = {name: [ready(step, device) for step in cut.steps(device, kind)] for name, (cut, kind) in cuts.items()}
        expected = mean_loss(size, config, [ready(step, device) for step in data.padded(1).steps(device)])
    model = make_model(size, config)
    return Epoch(config, model, optimizer_of(model, lr=0.0), steps, expected)


def epoch_run(epoch: Epoch, name: str) -> Run:
    model, optimizer, steps = epoch.model, epoch.optimizer, epoch.steps[name]
    supervised = sum(step.supervised_tokens for step in steps)

    def run() -> Outputs:
        attend(model, packed=name == "ours, packed")
        results = [train_step(model, optimizer, step, epoch.config) for step in steps]
        losses = [loss * step.supervised_tokens for (loss, _), step in zip(results, steps, strict=True)]
        return [torch.stack(losses).sum() / supervised]

    return run


def tokens_per_second(run: Run, epoch: Epoch, seconds: float) -> dict[str, Any]:
    tokens = sum(step.tokens for step in epoch.steps["ours, packed"])
    return {"tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}


def lengths_case(size: Size, dtype: torch.dtype) -> Case:
    def details(run: Run, epoch: Epoch, seconds: float) -> dict[str, Any]:
        return tokens_per_second(run, epoch, seconds) | counted(run, size, epoch.config, epoch.steps["ours, packed"])

    names = ("ours, packed", "ours, padded", "ours, padded, grouped")
    contenders = {name: Contender(functools.partial(epoch_run, name=name), details=details) for name in names}
    return Case(
        name=f"step lengths, {size.samples} samples in global batches of {size.global_batch}",
        make=lambda device: make_epoch(device, size, dtype),
        contenders=contenders,
        exact=lambda epoch: [epoch.expected],
        plain=lambda epoch: [epoch.expected],
        floors=(tolerance(dtype),),
        stage="training step",
        items=size.samples,
        unit="samples",
        group="step lengths",
        memory=True,
        rounds=5,
        trains=True,
        one_copy=True,
    )


# ------------------------------------------------------------------------------------------------ ours and plain

# AdamW's first update is the rate, whatever the gradient. Where that is hardly above the epsilon, a tenth of the rate
# is a fair error.
PLAIN_LR = 1e-3
BF16_NORM = 0.05  # relative: by how much two ways of rounding may put the norm apart


class Beside(NamedTuple):
    size: Size
    config: TrainConfig
    step: Step
    plain: list[PlainBatch]
    expected: Outputs  # the loss, of batches of one sample; the rest of the plain loop


def make_beside(device: torch.device, size: Size, stage: Stage, dtype: torch.dtype) -> Beside:
    config = recipe(stage, dtype)
    with tempfile.TemporaryDirectory() as folder:
        data = Data.make(size, stage, Path(folder), size.global_batch)
        (step,) = (ready(loaded, device) for loaded in data.steps(device))
        alone = [ready(loaded, device) for loaded in data.padded(1).steps(device)]
        examples = data.examples()
    batches = [
        plain_batch(examples[start : start + size.per_device], size.config()).to(device)
        for start in range(0, len(examples), size.per_device)
    ]
    beside = Beside(size, config, step, batches, [])
    _, *others = updated(beside, plain_run(beside)())
    free(device)
    return beside._replace(expected=[mean_loss(size, config, alone), *others])


def plain_run(beside: Beside, *, compiles: bool = False) -> Run:
    model = whole_model(beside.size, beside.config)
    if compiles:
        compile_llm(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PLAIN_LR, weight_decay=0.0)
    supervised, autocast = beside.step.supervised_tokens, beside.config.precision == "bf16"

    def run() -> Outputs:
        result = plain_step(
            model,
            optimizer,
            beside.plain,
            supervised_tokens=supervised,
            clip_norm=beside.config.optim.clip_norm,
            autocast=autocast,
        )
        return [result, *trained]

    return run


def our_run(beside: Beside) -> Run:
    model = make_model(beside.size, beside.config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(model, lr=PLAIN_LR)
    return lambda: [train_step(model, optimizer, beside.step, beside.config), *trained]


def updated(inputs: Any, outputs: Outputs) -> Outputs:
    """The loss, the gradient's norm and, in fp32, all trained weights in a row."""
    (loss, norm), *weights = outputs
    if inputs.config.precision != "fp32":
        return [loss, norm]
    return [loss, norm, torch.cat([sharding.whole(weight).flatten() for weight in weights])]


def update_floors(dtype: torch.dtype) -> tuple[float, ...]:
    """Of what `updated` gives; the largest weight is 1."""
    return tolerance(dtype), 1e-5 if dtype == torch.float32 else BF16_NORM, PLAIN_LR / 10


def plain_case(size: Size, stage: Stage, dtype: torch.dtype) -> Case:
    def details(run: Run, beside: Beside, seconds: float) -> dict[str, Any]:
        return counted(run, size, beside.config, [beside.step])

    return Case(
        name=f"step beside a plain loop, {stage}, {size.global_batch} samples",
        make=lambda device: make_beside(device, size, stage, dtype),
        contenders={
            "ours": Contender(our_run, updated, details=details),
            "plain loop": Contender(plain_run, updated, details=details),
        },
        exact=lambda beside: beside.expected,
        plain=lambda beside: beside.expected,
        floors=update_floors(dtype),
        stage="training step",
        items=size.global_batch,
        unit="samples",
        group=f"step beside a plain loop, {stage}",
        memory=True,
        rounds=7,
        trains=True,
        one_copy=True,
    )


# ------------------------------------------------------------------------------------------------ stages, MFU


class Shaped(NamedTuple):
    """A micro-batch at the shapes of 7B."""

    size: Size  # with the layers that fit
    config: TrainConfig
    step: Step
    expected: Tensor
    planned_bytes: int  # by training/plan.py


class ShapedRun:
    def __init__(self, shaped: Shaped):
        self.shaped = shaped
        self.model = make_model(shaped.size, shaped.config)
        self.optimizer = optimizer_of(self.model, lr=0.0)

    def __call__(self) -> Outputs:
        loss, _ = train_step(self.model, self.optimizer, self.shaped.step, self.shaped.config)
        return [loss]

    def details(self, shaped: Shaped, seconds: float) -> dict[str, Any]:
        step = shaped.step
        flops = count_flops(self.model).of(
            tokens=step.tokens, supervised_tokens=step.supervised_tokens, images=step.images
        )
        device = world_of_one().device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self()
        highest, peak = peak_memory_bytes(device), peak_tflops(device)
        share = {} if peak is None else {"mfu": round(flops / seconds / (peak * 1e12), 4)}
        parts = work_of(self.model, step, shaped.config)
        table = stages.measure(self, device, parts, STAGE_ROUNDS)
        return share | {
            "bytes": sum(part.bytes for part in parts.values()),
            "planned_bytes": shaped.planned_bytes,
            "peak_bytes": highest,
            "layers": shaped.size.layers,
            "tokens": step.tokens,
            "images": step.images,
            "flops": flops,
            **table,
        }


def work_of(
    model: AlignGPTForConditionalGeneration, step: Step, config: TrainConfig, saved_bytes: int | None = None
) -> dict[str, stages.StageWork]:
    return work.of_training(
        model,
        step.batches,
        compute_bytes=DTYPES[config.precision].itemsize,
        fused_loss=world_of_one().device.type == "cuda",
        saved_bytes=saved_bytes,
    )


def counted(run: Run, size: Size, config: TrainConfig, steps: Iterable[Step]) -> dict[str, Any]:
    """What these steps have to do, all stages together, and how often the host waits for the device in `run`."""
    model = sharding.build(size.config()).to("meta")
    sharding.freeze(model, config.model.train)
    parts = [part for step in steps for part in work_of(model, step, config).values()]
    waits = count_syncs(run, world_of_one().device)
    return {"bytes": sum(part.bytes for part in parts), "flops": sum(part.flops for part in parts), "syncs": waits}


def make_shaped(
    device: torch.device, size: Size, stage: Stage, dtype: torch.dtype, checkpointing: Checkpointing
) -> Shaped:
    config = recipe(stage, dtype, checkpointing)
    with tempfile.TemporaryDirectory() as folder:
        data = Data.make(size, stage, Path(folder), size.token_budget // (lengths.IMAGE_ROWS // size.scale))
        one = data.that_fit()
        (step,) = (ready(loaded, device) for loaded in one.steps(device))
        alone = [ready(loaded, device) for loaded in one.padded(1).steps(device)]
    assert len(step.batches) == 1
    if device.type == "cuda":
        room = int(HEADROOM * torch.cuda.mem_get_info(device)[1])
        size = size._replace(layers=layers_that_fit(size, config, step, room))
    return Shaped(size, config, step, mean_loss(size, config, alone), planned_bytes(size, config, step))


def planned_bytes(size: Size, config: TrainConfig, step: Step) -> int:
    """What a device holds in a step of one micro-batch, by training/plan.py."""
    model = sharding.build(size.config()).to("meta")
    sharding.freeze(model, config.model.train)
    sharding.prepare_layers(model, config.sharding)
    (batch,) = step.batches
    rows, tokens = batch.input_ids.shape
    dtype = DTYPES[config.precision]
    weights = plan.weights_of(model)  # first: what follows leaves a model of few layers
    held = plan.activations(model, plan.MicroBatch((rows, tokens), step.images, step.supervised_tokens), dtype)
    return plan.memory(
        weights,
        held,
        shards=1,
        compute_bytes=dtype.itemsize,
        micro_batches=1,
        pixels=batch.pixel_values.nbytes,
        config=config.sharding,
    ).device


def layers_that_fit(size: Size, config: TrainConfig, step: Step, num_bytes: int) -> int:
    """How many of the decoder layers so many bytes hold in training."""
    counts = range(1, size.layers + 1)
    fit = bisect_right(counts, num_bytes, key=lambda n: planned_bytes(size._replace(layers=n), config, step))
    return max(fit, 1)


def shaped_case(size: Size, stage: Stage, dtype: torch.dtype, checkpointing: Checkpointing) -> Case:
    return Case(
        name=f"step at 7B shapes, {stage}, {size.token_budget} tokens, checkpointing {checkpointing}",
        make=lambda device: make_shaped(device, size, stage, dtype, checkpointing),
        contenders={"ours": Contender(ShapedRun, details=lambda run, *found: run.details(*found))},
        exact=lambda shaped: [shaped.expected],
        plain=lambda shaped: [shaped.expected],
        floors=(tolerance(dtype),),
        stage="training step",
        items=size.token_budget,
        unit="tokens",
        group=f"step at 7B shapes, {stage}",
        rounds=5,
        trains=True,
        one_copy=True,
    )


# ------------------------------------------------------------------------------------------------ stages in place


class Folder:
    """A temporary folder, which goes with this."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class InPlace(NamedTuple):
    """A global batch that is read anew for each step."""

    size: Size
    config: TrainConfig
    data: Data
    folder: Folder  # of its images and of the checkpoints
    expected: Tensor
    workers: int


def make_in_place(device: torch.device, size: Size, stage: Stage, dtype: torch.dtype, workers: int) -> InPlace:
    folder = Folder()
    config = dataclasses.replace(recipe(stage, dtype), run_dir=str(folder.path), keep_last=1)
    data = Data.make(size, stage, folder.path, size.global_batch)
    alone = [ready(loaded, device) for loaded in data.padded(1).steps(device)]
    return InPlace(size, config, data, folder, mean_loss(size, config, alone), workers)


class InPlaceRun:
    def __init__(self, inputs: InPlace):
        self.config, self.device = inputs.config, world_of_one().device
        self.model = make_model(inputs.size, inputs.config)
        self.optimizer = optimizer_of(self.model, lr=0.0)
        self.loader = inputs.data.same(self.device, workers=inputs.workers)
        self.saves = Checkpoints(self.config, self.model, self.optimizer, world_of_one())
        self.numbers = itertools.count(1)

    def __call__(self) -> Outputs:
        with marked("data wait"):
            loaded = next(self.loader)
        loss, _ = train_step(self.model, self.optimizer, step_of(loaded), self.config)
        return [loss]

    def and_save(self) -> None:
        self()
        with marked("checkpoint"):
            self.saves.save(next(self.numbers), {})
            self.saves.wait_staged()

    def details(self, inputs: InPlace, seconds: float) -> dict[str, Any]:
        step = step_of(next(self.loader))
        self.and_save()
        self.saves.wait()
        saved = sum(buffer.nbytes for buffer in self.saves.buffers.values())
        table = stages.measure(
            self.and_save,
            self.device,
            work_of(self.model, step, self.config, saved),
            STAGE_ROUNDS,
            before=self.saves.wait,
        )
        self.saves.wait()
        return {
            "samples": inputs.size.global_batch,
            "micro_batches": len(step.batches),
            "layers": inputs.size.layers,
            "checkpoint_seconds": round(self.saves.seconds, 4),
            **table,
        }


def stages_case(size: Size, stage: Stage, dtype: torch.dtype, workers: int = 1) -> Case:
    return Case(
        name=f"stages of a training step, {stage}",
        make=lambda device: make_in_place(device, size, stage, dtype, workers),
        contenders={"ours": Contender(InPlaceRun, details=lambda run, *found: run.details(*found))},
        exact=lambda inputs: [inputs.expected],
        plain=lambda inputs: [inputs.expected],
        floors=(tolerance(dtype),),
        stage="training step",
        items=size.global_batch,
        unit="samples",
        group="stages",
        clock="host",
        rounds=STAGE_ROUNDS,
        trains=True,
        one_copy=True,
    )


# ------------------------------------------------------------------------------------------------ cases and tests


STEPS: tuple[Stage, Stage] = ("pretrain", "finetune")
WAYS: tuple[Checkpointing, ...] = ("none", "selective", "full")


def shaped_cases() -> list[Case]:
    return [
        shaped_case(
            LLAMA_7B._replace(token_budget=aligngpt_7b(stage).token_budget), stage, torch.bfloat16, checkpointing
        )
        for stage in STEPS
        for checkpointing in WAYS
    ]


def cases() -> list[Case]:
    dtype, few = torch.bfloat16, LLAMA_7B._replace(layers=2)
    beside = [plain_case(few, stage, dtype) for stage in STEPS]
    in_place = [stages_case(few, stage, dtype, workers=4) for stage in STEPS]
    return [*shaped_cases(), lengths_case(LLAMA_7B._replace(layers=4), dtype), *beside, *in_place]


def cpu_cases() -> list[Case]:
    dtype = torch.float32
    beside = [plain_case(TINY, stage, dtype) for stage in STEPS]
    return [lengths_case(SMALLEST, dtype), *beside, *(stages_case(TINY, stage, dtype) for stage in STEPS)]


def small_cases() -> list[Case]:
    dtype = torch.float32
    made = lengths_case(MICRO, dtype), plain_case(MICRO, "finetune", dtype), stages_case(MICRO, "finetune", dtype, 0)
    return [dataclasses.replace(case, rounds=2) for case in made]


def test_step(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
