"""A training run from its config to its model: `train` sets it up, `run_steps` is the one loop.

Loss is the sum over supervised tokens divided by their number in the global batch, over all micro-batches and
processes; it does not depend on how the batch is cut. Which samples were dropped is agreed on by all processes before
the step, so they stop together; the run folder is not touched before the first step's batches are all there.
"""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from aligngpt.batch import Batch
from aligngpt.config import AlignGPTConfig
from aligngpt.data.records import Records, check_levels, in_shards, open_records
from aligngpt.levels import read_levels, with_levels
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.processor import AlignGPTImageProcessor, AlignGPTProcessor
from training import checkpointing, optim, sharding
from training.config import Stage, TrainConfig
from training.dali_pipeline import why_not_dali
from training.dropped import BadSampleError, DroppedSamples
from training.loader import ATTEMPTS, Order, Part, Samples, estimated_lengths, micro_batches, share
from training.metrics import Metrics, peak_memory_bytes
from training.sharding import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What one optimizer step takes: this process's micro-batches, and counts over the global batch."""

    batches: list[Batch]
    tokens: int
    supervised_tokens: int
    dropped_samples: int  # of the run so far
    data_seconds: float  # this process waited for its loader


def train(config: TrainConfig, stage: Stage) -> None:
    """Run, or go on with, the run that `config` describes; on return RUN/model is there.

    Raises:
        ValueError: the run folder, a model folder or the data are not what the config needs.
        BadSampleError: too many samples cannot be used; the checkpoints so far stay.
        FloatingPointError: the gradient is not finite; likewise.
    """
    with sharding.world() as world:
        config = with_decoder(config, world)
        first_step = checkpointing.steps_done(config)
        if first_step is None:
            say(world, f"{config.run_dir} is finished; its result is {config.run_dir}/model")
            return

        # Everything cheap comes before the weights: a wrong folder or a bad first sample shows within seconds.
        model_config = sharding.starting_config(config.model, image_aspect_ratio=config.data.image_aspect_ratio)
        weights = sharding.starting_weights(config.model, model_config, seed=config.seed)
        processor = make_processor(config, model_config)
        samples = read_samples(config, model_config, processor)
        order = make_order(config, samples)
        total_steps = config.max_steps or config.epochs * order.steps_per_epoch
        plan = make_plan(config, order, first_step, total_steps, world)
        dropped = DroppedSamples(
            Path(config.run_dir),
            first_step=first_step,
            total=order.samples_until(total_steps),
            max_rate=config.data.max_drop_rate,
            world=world,
        )
        steps = read_steps(config, samples, plan, order, first_step, dropped, world)
        with alone():
            first = list(itertools.islice(steps, 1))

        model = make_model(config, model_config, weights, world)
        optimizer = optim.make_optimizer(model.named_parameters(), config.optim)
        if first_step:
            checkpointing.load(config, first_step, model, optimizer)
        with ExitStack() as held:
            if world.rank == 0:
                held.enter_context(checkpointing.create_run(config, stage))
            world.add(0)
            metrics = Metrics(
                Path(config.run_dir), first_step=first_step, total_steps=total_steps, enabled=world.rank == 0
            )
            held.enter_context(metrics)
            if world.rank == 0:
                dropped.start()
            numbered = enumerate(itertools.chain(first, steps), first_step)
            with alone():
                run_steps(config, model, optimizer, numbered, total_steps, order.steps_per_epoch, metrics, world)
            checkpointing.export(config, model, weights, processor, world)
        say(world, f"model written to {config.run_dir}/model")


@contextmanager
def alone() -> Iterator[None]:
    """Where a ValueError is one process's own: the others do not say it, so it is no message for all of them."""
    try:
        yield
    except BadSampleError:
        raise
    except ValueError as error:
        raise RuntimeError("a training step failed") from error


def run_steps(
    config: TrainConfig,
    model: AlignGPTForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[tuple[int, Step]],
    total_steps: int,
    steps_per_epoch: int,
    metrics: Metrics,
    world: World,
) -> None:
    """The loop. Steps are numbered from 0 here and from 1 where people read them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    started = time.perf_counter()
    for number, step in steps:
        seed_step(config.seed, number, world.rank)
        optim.set_rate(optimizer, optim.rate(number, total_steps, config.optim.warmup_ratio))

        # FSDP averages gradients over the processes; dividing by a process's mean count makes that the global sum.
        supervised_per_process = max(step.supervised_tokens, 1) / world.size
        loss = torch.zeros((), device=world.device)
        for batch in step.batches:
            inputs = batch.to(world.device).model_inputs()
            micro_loss = model(**inputs, num_items_in_batch=supervised_per_process, use_cache=False).loss
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = clip_grad_norm_(trained, config.optim.clip_norm)
        norm = (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {number + 1}: the gradient's norm is {norm}; the weights were not changed")
        optimizer.step()
        optimizer.zero_grad()

        (loss_sum,) = world.add(loss.item())
        now = time.perf_counter()
        metrics.step(
            step=number + 1,
            epoch=number // steps_per_epoch,
            loss=loss_sum / world.size,
            lr=optimizer.param_groups[0]["lr"],
            grad_norm=norm,
            tokens=step.tokens,
            supervised_tokens=step.supervised_tokens,
            tokens_per_second=step.tokens / (now - started),
            seconds=now - started,
            data_seconds=step.data_seconds,
            dropped_samples=step.dropped_samples,
            peak_memory_bytes=peak_memory_bytes(world.device),
        )
        if (number + 1) % config.save_every == 0 or number + 1 == total_steps:
            checkpointing.save(config, number + 1, model, optimizer, world)
        started = time.perf_counter()


def make_plan(config: TrainConfig, order: Order, first_step: int, total_steps: int, world: World) -> list[list[Part]]:
    """This process's parts of each step that is left, one for each micro-batch."""
    plan = []
    for step, batch in enumerate(order.steps(first_step, total_steps), first_step):
        lists = share(batch, rank=world.rank, world_size=world.size, per_device=config.per_device_batch_size)
        plan.append([Part(step // order.steps_per_epoch, indices) for indices in lists])
    return plan


def read_steps(
    config: TrainConfig,
    samples: Samples,
    plan: list[list[Part]],
    order: Order,
    first_step: int,
    dropped: DroppedSamples,
    world: World,
) -> Iterator[Step]:
    """The steps of a plan, in order, each counted over all processes.

    Raises:
        BadSampleError: in every process, when too many samples cannot be used.
    """
    parts = list(itertools.chain.from_iterable(plan))
    data = config.data
    loader = micro_batches(samples, parts, workers=data.workers, device=world.device, prefetch=data.prefetch)
    for number, step_parts in enumerate(plan, first_step):
        started = time.perf_counter()
        loaded = list(itertools.islice(loader, len(step_parts)))
        data_seconds = time.perf_counter() - started
        batches = [item.batch for item in loaded if item.batch is not None]
        drops = list(itertools.chain.from_iterable(item.dropped for item in loaded))
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        supervised = sum(batch.num_supervised for batch in batches)
        counts = world.add(tokens, supervised, len(drops), len(loaded) - len(batches))
        tokens, supervised, num_drops, failed = map(int, counts)
        if num_drops:
            drops = list(itertools.chain.from_iterable(world.gather(drops)))
            dropped.step(number, drops, taken=order.samples_until(number + 1))
        if failed:
            raise BadSampleError(
                f"{samples.records.path}: {ATTEMPTS} samples in a row cannot be used. {dropped.reasons()}"
            )
        yield Step(batches, tokens, supervised, dropped.count, data_seconds)


def with_decoder(config: TrainConfig, world: World) -> TrainConfig:
    """The config with `--data.decoder` settled, the same for all processes: they may run on different machines.

    "auto" is what the run folder's run began with, and for a new run DALI where all processes have it.

    Raises:
        ValueError: it is "dali", which one of them lacks.
    """
    missing = next((why for why in world.gather(why_not_dali()) if why), None)
    decoder, asked = config.data.decoder, f"--data.decoder is {config.data.decoder!r}"
    if decoder == "auto" and (Path(config.run_dir) / "config.json").is_file():
        decoder = checkpointing.recorded(Path(config.run_dir))["data.decoder"]
        asked += f" and the run in {config.run_dir} began with {decoder!r}"
    if decoder == "dali" and missing:
        raise ValueError(f"{asked}; it needs DALI in every process: {missing}")
    if decoder == "auto":
        decoder = "pil" if missing else "dali"
        logger.info("images are decoded by %s", f"PIL: {missing}" if missing else f"DALI on {world.device}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, decoder=decoder))


def make_processor(config: TrainConfig, model_config: AlignGPTConfig) -> AlignGPTProcessor:
    """The processor of the model's config, with the run's template, aspect ratio and length."""
    data, model = config.data, config.model
    try:
        if model.init:
            saved = AlignGPTProcessor.from_pretrained(model.init)
            pictures = saved.image_processor
            image_processor = AlignGPTImageProcessor(
                pictures.size, pictures.image_mean, pictures.image_std, data.image_aspect_ratio
            )
            return AlignGPTProcessor.for_model(
                model_config, image_processor, saved.tokenizer, data.template, data.max_length
            )
        return AlignGPTProcessor.from_parts(
            model.llm, model.vision, model_config, template=data.template, max_length=data.max_length
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{model.init or model.llm} gives no tokenizer or processor: {error}") from error


def read_samples(config: TrainConfig, model_config: AlignGPTConfig, processor: AlignGPTProcessor) -> Samples:
    """The records of `--data.path`, and which of them have which level; without those that a levels file sets aside."""
    data = config.data
    records = open_records(data.path, data.image_folder or None)
    if not len(records):
        raise ValueError(f"--data.path is {data.path}, which holds no records; it needs at least one")
    if not in_shards(data.path) and not data.image_folder and records.num_images.any():
        raise ValueError(f"--data.image-folder is ''; {data.path} names images, so it needs the folder they start from")
    num_levels = model_config.num_align_levels
    kept: np.ndarray | None = None
    levels: np.ndarray | Literal["random"] | None
    if data.levels == "none" or model_config.align_mode == "none":  # without <align> there is nothing to look up
        levels = None
    elif data.levels == "random":
        levels = "random"
    elif data.levels == "record":
        try:
            check_levels(records, num_levels)
        except ValueError as error:
            raise ValueError(f"{error}; --data.levels random or a levels file does without") from error
        levels = records.levels
    else:
        kept, levels = levels_from_file(records, data.levels, num_levels)
    return Samples(
        records,
        processor,
        kept=kept,
        levels=levels,
        num_levels=num_levels,
        seed=config.seed,
        decode_by_dali=data.decoder == "dali",
        hardware_decoder=data.hardware_decoder,
    )


def levels_from_file(records: Records, path: str, num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    """What `with_levels` makes of a file that `aligngpt levels` wrote.

    Raises:
        ValueError: the file is of other data, of another number of levels, or lacks the level of a record.
    """
    levels = read_levels(path)
    if levels.num_levels != num_levels:
        raise ValueError(
            f"--data.levels is {path}, which has {levels.num_levels} levels; it needs the model's {num_levels}"
        )
    kept, of_records = with_levels(records, levels)
    if len(kept) < len(records):
        logger.info("%d of %d samples are left out: %s sets them aside", len(records) - len(kept), len(records), path)
    return kept, of_records


def make_order(config: TrainConfig, samples: Samples) -> Order:
    """In which order the run's samples come."""
    records, kept = samples.records, samples.kept
    return Order(
        len(samples),
        config.global_batch_size,
        config.seed,
        config.data.order,
        lengths=estimated_lengths(records, samples.processor.rows_per_image)[kept],
        has_image=(records.num_images > 0)[kept],
    )


def make_model(
    config: TrainConfig, model_config: AlignGPTConfig, weights: dict[str, sharding.Stored], world: World
) -> AlignGPTForConditionalGeneration:
    """The model on this process's device: cut up, filled, frozen where the run does not train it."""
    compute_dtype = checkpointing.DTYPES[config.precision]
    model = sharding.build(model_config)
    sharding.freeze(model, config.model.train)
    if config.gradient_checkpointing:
        sharding.recompute_layers(model)
    sharding.shard(model, world.mesh, compute_dtype=compute_dtype)
    source = config.model.init or f"{config.model.llm} with {config.model.vision}"
    sharding.fill(model, weights, world, compute_dtype=compute_dtype, source=source)
    return model


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's random stream as a function of the step, so that a checkpoint need not hold it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) >> 1)


def say(world: World, message: str) -> None:
    """Print once for the whole run."""
    if world.rank == 0:
        print(message, flush=True)
