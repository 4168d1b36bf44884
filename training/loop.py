"""A training run from its config to its model: `train` sets it up, `run_steps` is the one loop.

Loss is the sum over supervised tokens divided by their number in the global batch, over all micro-batches and
processes; it does not depend on how the batch is cut. Which samples were dropped is agreed on by all processes before
the step, so they stop together; the run folder is not touched before the first step's batches are all there.
"""

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from aligngpt import attention
from aligngpt.batch import Batch
from aligngpt.config import AlignGPTConfig
from aligngpt.data.records import Records, check_levels, in_shards, open_records
from aligngpt.levels import read_levels, with_levels
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.processor import AlignGPTImageProcessor, AlignGPTProcessor
from aligngpt.profiling import Profile, check_folder, peak_memory_bytes
from aligngpt.stages import TRAINING_STEP, stage
from training import checkpoints, lora, optim, run_folder, sharding
from training.checkpoints import Checkpoints, SaveError
from training.config import Stage, TrainConfig
from training.dali_pipeline import why_not_dali
from training.dropped import BadSampleError, DroppedSamples
from training.flops import count_flops
from training.guard import Guard
from training.loader import ATTEMPTS, Cut, Order, Part, Samples, estimated_lengths, micro_batches
from training.metrics import Metrics, StepSums, check_log
from training.processes import Stop, Terminated, watch_peers
from training.sharding import World

logger = logging.getLogger(__name__)

PROFILED_STEPS, UNPROFILED_STEPS = 3, 2  # the first ones compile and allocate


@dataclass(frozen=True)
class Step:
    """What one optimizer step takes: this process's micro-batches, and counts over the global batch."""

    batches: list[Batch]
    tokens: int
    images: int
    supervised_tokens: int
    dropped_samples: int  # of the run so far
    data_seconds: float  # this process waited for its loader


@dataclass(frozen=True)
class Run:
    """What a step is done with."""

    config: TrainConfig
    world: World
    model: AlignGPTForConditionalGeneration
    optimizer: torch.optim.Optimizer
    order: Order
    total_steps: int
    guard: Guard
    stop: Stop
    metrics: Metrics
    saves: Checkpoints
    dropped: DroppedSamples
    profile: Profile | None = None


def train(config: TrainConfig, stage: Stage) -> None:
    """Run, or go on with, the run that `config` describes; on return RUN/model is there.

    Raises:
        ValueError: the run folder, a model folder or the data are not what the config needs.
        BadSampleError: too many samples cannot be used, or processes read different ones; the checkpoints so far stay.
        SaveError: a checkpoint could not be written; likewise.
        FloatingPointError: too many steps in a row were not finite; likewise.
        Terminated: SIGTERM, after the checkpoint of the step that was at work.
    """
    with sharding.world(config.sharding.size, deterministic=config.deterministic) as world, watch_peers(world):
        config = with_decoder(config, world)
        check_log(config.log, world)
        if any(world.gather(run_folder.is_finished(config))):
            say(world, f"{config.run_dir} is finished; its result is {config.run_dir}/model")
            return
        if config.profile:
            check_folder("--profile writes RUN/profile, which", run_folder.profile(config))
        newest = checkpoints.steps_saved(config)
        saved = checkpoints.find(config, world)
        first_step, extra = (saved.step, saved.extra) if saved else (0, {})

        # Everything cheap comes before the weights: a wrong folder or a bad first sample shows within seconds.
        model_config = sharding.starting_config(config.model, image_aspect_ratio=config.data.image_aspect_ratio)
        weights = sharding.starting_weights(config.model, model_config, seed=config.seed)
        check_packing(config, model_config)
        processor = make_processor(config, model_config)
        samples = read_samples(config, model_config, processor, rank=world.rank, num_processes=world.size)
        order = make_order(config, samples)
        began_with = extra.get("samples_per_epoch", order.num_samples)
        if order.num_samples != began_with:
            raise ValueError(
                f"--data.path is {config.data.path}, which gives {order.num_samples} samples; the run in "
                f"{config.run_dir} began with {began_with} and needs the same to go on"
            )
        total_steps = config.max_steps or config.epochs * order.steps_per_epoch
        run_dir = Path(config.run_dir)
        dropped = DroppedSamples(
            run_dir,
            lines=extra.get("dropped", []),
            total=order.samples_until(total_steps),
            max_rate=config.data.max_drop_rate,
        )
        steps = read_steps(config, samples, order, first_step, total_steps, dropped, world)
        with alone():
            # The wait for it is over before its step begins.
            first = [dataclasses.replace(step, data_seconds=0.0) for step in itertools.islice(steps, 1)]

        model, weights = make_model(config, model_config, weights, world)
        optimizer = optim.make_optimizer(model.named_parameters(), config.optim)
        if saved:
            checkpoints.load(saved, model, optimizer)
        with ExitStack() as held:
            if world.rank == 0:
                held.enter_context(run_folder.create_run(config, stage))
                if (run_dir / "model").exists() or checkpoints.steps_saved(config) != newest:
                    raise ValueError(f"--run-dir is {run_dir}, in which another run was at work; start this one again")
                dropped.start()
            world.add(0)
            guard = Guard(config.guard, run_dir, world, first_step=first_step, state=extra.get("guard"))
            metrics = Metrics(config, first_step=first_step, total_steps=total_steps, world=world)
            held.enter_context(metrics)
            saves = held.enter_context(Checkpoints(config, model, optimizer, world, after=saved))
            numbered = enumerate(itertools.chain(first, steps), first_step)
            with alone(), Stop() as stop, profiled(config, world, total_steps - first_step) as profile:
                run = Run(
                    config, world, model, optimizer, order, total_steps, guard, stop, metrics, saves, dropped, profile
                )
                run_steps(run, numbered)
                saves.wait()
                if any(world.add(stop.requested)):  # since the last step's numbers were added up
                    say(world, f"stopped by SIGTERM after the last step; the same command writes {run_dir}/model")
                    raise Terminated
            run_folder.export(config, model, weights, processor, world)
        say(world, f"model written to {config.run_dir}/model")


@contextmanager
def alone() -> Iterator[None]:
    """Where a ValueError is one process's own: the others do not say it, so it is no message for all of them."""
    try:
        yield
    except (BadSampleError, SaveError):
        raise
    except ValueError as error:
        raise RuntimeError("a training step failed") from error


@contextmanager
def profiled(config: TrainConfig, world: World, num_steps: int) -> Iterator[Profile | None]:
    """Of a run with `--profile` what its first process is to record of the steps that are left; else None."""
    if not config.profile or world.rank:
        yield None
        return
    skip = max(min(UNPROFILED_STEPS, num_steps - 1), 0)
    with Profile(
        run_folder.profile(config),
        world.device,
        unit=TRAINING_STEP,
        skip=skip,
        record=PROFILED_STEPS,
        say=functools.partial(say, world),
    ) as profile:
        yield profile


def run_steps(run: Run, steps: Iterable[tuple[int, Step]]) -> None:
    """The loop. Steps are numbered from 0 here and from 1 where people read them."""
    config, world, model, optimizer = run.config, run.world, run.model, run.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flops = count_flops(model)
    started = time.perf_counter()
    for number, step in steps:
        seed_step(config.seed, number, world.rank)
        optim.set_rate(optimizer, optim.rate(number, run.total_steps, config.optim.warmup_ratio))

        sums = forward_and_backward(model, step, config, world)
        means, norm, stops, failed = reduce_and_clip(
            trained, sums, config, world, lambda: (run.stop.requested, run.saves.failed())
        )

        run.saves.wait_staged()  # a save still reads the weights
        ids = [id for batch in step.batches for id in batch.ids]
        with stage("optimizer"):
            if run.guard.check(number + 1, means["loss"], norm, supervised_tokens=step.supervised_tokens, ids=ids):
                optimizer.step()
            optimizer.zero_grad()

        seconds = time.perf_counter() - started
        run.metrics.step(
            step=number + 1,
            epoch=number // run.order.steps_per_epoch,
            **means,
            lr=optimizer.param_groups[0]["lr"],
            grad_norm=norm,
            tokens=step.tokens,
            supervised_tokens=step.supervised_tokens,
            seconds=seconds,
            flops=flops.of(tokens=step.tokens, supervised_tokens=step.supervised_tokens, images=step.images),
            data_seconds=step.data_seconds,
            dropped_samples=step.dropped_samples,
            skipped_steps=run.guard.seen.skipped,
            micro_batches=len(step.batches),
            peak_memory_bytes=peak_memory_bytes(world.device),
        )
        run.stop.must_fit(seconds, run.saves.seconds)
        if failed:
            run.saves.wait()  # raises
        if run.profile:
            run.profile.step()
        started = time.perf_counter()
        if stops or (number + 1) % config.save_every == 0 or number + 1 == run.total_steps:
            taken = {"samples": run.order.samples_until(number + 1), "samples_per_epoch": run.order.num_samples}
            with stage("checkpoint"):
                run.saves.save(number + 1, taken | {"guard": run.guard.state(), "dropped": run.dropped.lines})
        if stops:
            run.saves.wait()
            say(world, f"stopped by SIGTERM after step {number + 1}; the same command goes on from there")
            raise Terminated


def forward_and_backward(
    model: AlignGPTForConditionalGeneration, step: Step, config: TrainConfig, world: World
) -> StepSums:
    """Add a step's gradients up over its micro-batches, and return its sums."""
    autocast = config.precision == "bf16" and config.optim.kind == "apex"  # FSDP2 casts what it has cut up
    # FSDP averages gradients over the processes; dividing by a process's mean count makes that the global sum.
    supervised_per_process = max(step.supervised_tokens, 1) / world.size
    sums = StepSums(model.config.num_align_levels, world.device)
    for place, batch in enumerate(step.batches, 1):
        with stage("batch to device"):
            batch = batch.to(world.device)
        sharding.before_micro_batch(model, config.sharding, last=place == len(step.batches))
        with torch.autocast(world.device.type, torch.bfloat16, enabled=autocast):
            output = model(**batch.model_inputs(), num_items_in_batch=supervised_per_process, use_cache=False)
        with stage("backward"):
            output.loss.backward()
        sums.add(batch, output)
    return sums


def reduce_and_clip(
    trained: Sequence[Any],  # the weights that train
    sums: StepSums,
    config: TrainConfig,
    world: World,
    more: Callable[[], tuple[float, ...]] = tuple,
) -> tuple[Any, ...]:
    """Clip a step's gradient. The step's means over all processes, the norm before, and the sums of `more`, which is
    asked when the host has waited for the gradient."""
    with stage("gradient norm"):
        norm = sharding.whole(get_total_norm([parameter.grad for parameter in trained])).item()
        means, norms, *added = sums.reduce(world, norm, *more())
        norm = norms / world.size  # copies of the weights may sum theirs in other orders, and must clip alike
        clip_grads_with_norm_(trained, config.optim.clip_norm, torch.tensor(norm, device=world.device))
    return means, norm, *added


def read_steps(
    config: TrainConfig,
    samples: Samples,
    order: Order,
    first_step: int,
    total_steps: int,
    dropped: DroppedSamples,
    world: World,
) -> Iterator[Step]:
    """The steps that are left, in order, each counted over all processes.

    Raises:
        BadSampleError: in every process, when too many samples cannot be used, or not all read the same.
    """
    parts = [
        Part(step // order.steps_per_epoch, batch.tolist())
        for step, batch in enumerate(order.steps(first_step, total_steps), first_step)
    ]
    data = config.data
    loader = micro_batches(samples, parts, workers=data.workers, device=world.device, prefetch=data.prefetch)
    for number in range(first_step, total_steps):
        started = time.perf_counter()
        with stage("data wait"):
            loaded = next(loader)
        data_seconds = time.perf_counter() - started
        batches = loaded.batches or []
        tokens = sum(batch.num_tokens for batch in batches)
        images = sum(len(batch.pixel_values) for batch in batches)
        supervised = sum(batch.num_supervised for batch in batches)
        checks = loaded.checksum, loaded.checksum**2
        counts = world.add(tokens, images, supervised, len(loaded.dropped), loaded.batches is None, *checks)
        tokens, images, supervised, num_drops, failed, checksums, squares = map(int, counts)
        if world.size * squares != checksums**2:  # they are equal where all checksums are, and in every process
            raise BadSampleError(
                f"step {number + 1}: the processes do not read the same samples; {samples.records.path} needs to be "
                "the same, and readable, for all of them"
            )
        if num_drops:
            drops = list(itertools.chain.from_iterable(world.gather(loaded.dropped)))
            dropped.step(number, drops, taken=order.samples_until(number + 1))
        if failed:
            raise BadSampleError(
                f"{samples.records.path}: {ATTEMPTS} samples in a row cannot be used. {dropped.reasons()}"
            )
        yield Step(batches, tokens, images, supervised, dropped.count, data_seconds)


def with_decoder(config: TrainConfig, world: World) -> TrainConfig:
    """The config with `--data.decoder` settled, the same for all processes: they may run on different machines.

    "auto" is what the run folder's run began with, and for a new run DALI where all processes have it.

    Raises:
        ValueError: it is "dali", which one of them lacks.
    """
    missing = next((why for why in world.gather(why_not_dali()) if why), None)
    decoder, asked = config.data.decoder, f"--data.decoder is {config.data.decoder!r}"
    if decoder == "auto" and (Path(config.run_dir) / "config.json").is_file():
        decoder = run_folder.recorded(Path(config.run_dir)).get("data.decoder", decoder)
        asked += f" and the run in {config.run_dir} began with {decoder!r}"
    if decoder == "dali" and missing:
        raise ValueError(f"{asked}; it needs DALI in every process: {missing}")
    if decoder == "auto":
        decoder = "pil" if missing else "dali"
        logger.info("images are decoded by %s", f"PIL: {missing}" if missing else f"DALI on {world.device}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, decoder=decoder))


def check_packing(config: TrainConfig, model_config: AlignGPTConfig) -> None:
    """ValueError: sequences are to be packed, and the LLM's attention cannot do that."""
    reason = attention.why_not_packed(model_config.text_config, config.data.max_length)
    if config.data.packing and reason:
        raise ValueError(f"--data.packing is on; it needs another LLM, since {reason}; --data.no-packing pads")


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


def read_samples(
    config: TrainConfig, model_config: AlignGPTConfig, processor: AlignGPTProcessor, *, rank: int, num_processes: int
) -> Samples:
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
        cut=Cut(rank, num_processes, config.token_budget if data.packing else None, config.per_device_batch_size),
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
    order = Order(len(samples), config.global_batch_size, config.seed, config.data.order)
    if order.kind == "shuffle":  # has no use for the rest, which takes seconds for long data sets
        return order
    records, kept = samples.records, samples.kept
    lengths = estimated_lengths(records, samples.processor.rows_per_image)[kept]
    return dataclasses.replace(order, lengths=lengths, has_image=(records.num_images > 0)[kept])


def make_model(
    config: TrainConfig, model_config: AlignGPTConfig, weights: dict[str, sharding.Stored], world: World
) -> tuple[AlignGPTForConditionalGeneration, dict[str, sharding.Stored]]:
    """The model on this process's device: cut up, filled, frozen where the run does not train it.

    With it its starting weights by the names it has, which adapters change.
    """
    sharded = config.optim.kind != "apex"
    # Autocast wants all weights in fp32: ops that take trained and frozen ones together need them of one type.
    compute_dtype = run_folder.DTYPES[config.precision] if sharded else torch.float32
    model = sharding.build(model_config)
    if config.data.packing:
        model.model.language_model.set_attn_implementation(attention.NAME)
    sharding.freeze(model, config.model.train)
    if config.lora.rank:
        weights = lora.add(model, weights, config.lora, seed=config.seed)
    if sharded:
        sharding.shard(model, world.mesh, config.sharding, compute_dtype=compute_dtype)
    source = config.model.init or f"{config.model.llm} with {config.model.vision}"
    sharding.fill(model, weights, world, compute_dtype=compute_dtype, source=source, offload=config.sharding.offload)
    sharding.prepare_layers(model, config.sharding)
    return model, weights


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's random stream as a function of the step, so that a checkpoint need not hold it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) >> 1)


def say(world: World, message: str) -> None:
    """Print once for the whole run."""
    if world.rank == 0:
        with tqdm.external_write_mode():
            print(message, flush=True)
