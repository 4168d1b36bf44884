"""`--dry-run`: what a run needs, printed before it starts. Nothing is written, and no weight is read.

It refuses what the run would refuse, with one exception: the LLM's and the tower's weights need not be there yet. The
device is this machine's GPU, or where there is none an H100 of 80 GB. What does not fit is said with what would.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from training import checkpoints, cluster, loop, run_folder, sharding
from training.cluster import H100, Prediction
from training.config import Stage, TrainConfig
from training.loader import Order, Samples
from training.metrics import PEAK_TFLOPS
from training.plan import Lengths, Plan, plan_run, sample_lengths
from training.plan_lines import (
    communication_lines,
    gigabytes,
    hours,
    many,
    memory_lines,
    of_step,
    unit_of,
    weight_lines,
)

ASSUMED_MFU = 0.4  # where no rate is known


def other_ways(config: TrainConfig, processes: int) -> Iterator[tuple[str, TrainConfig, int]]:
    """What needs less memory: flags, the config and the number of processes that they make."""
    cut, lora = config.sharding, config.lora
    changed = dataclasses.replace
    if "llm" in config.model.train and not lora.rank:
        yield "--lora.rank 16", changed(config, lora=changed(lora, rank=16)), processes
    if not cut.offload:
        yield "--sharding.offload", changed(config, sharding=changed(cut, offload=True)), processes
    if cut.gather == "step":
        yield "--sharding.gather layer", changed(config, sharding=changed(cut, gather="layer")), processes
    if cut.activation_checkpointing != "full":
        full = changed(cut, activation_checkpointing="full")
        yield "--sharding.activation-checkpointing full", changed(config, sharding=full), processes
    if config.data.packing and config.token_budget // 2 >= config.data.max_length:
        half = config.token_budget // 2
        yield f"--token-budget {half}", changed(config, token_budget=half), processes
    if not config.data.packing and config.per_device_batch_size > 1:
        half = config.per_device_batch_size // 2
        yield f"--per-device-batch-size {half}", changed(config, per_device_batch_size=half), processes
    if not cut.size and 2 * processes <= config.global_batch_size:
        for more in (2 * processes, 4 * processes, 8 * processes):
            if more <= config.global_batch_size:
                yield f"{more} processes", config, more


def data_lines(
    config: TrainConfig, plan: Plan, lengths: Lengths, samples: Samples, order: Order, total_steps: int
) -> list[str]:
    """Counts of samples, steps and tokens."""
    batches, packing = plan.batches, config.data.packing
    left_out = len(samples.records) - len(samples)
    size = config.token_budget if packing else config.per_device_batch_size
    how = "counted" if lengths.sampled == len(samples) else f"estimated from {lengths.sampled} tokenised records"
    tokens, supervised, images = of_step(lengths, order, total_steps)
    return [
        "data",
        f"  {len(samples.records):,} records, {left_out:,} left out; "
        f"{many(order.steps_per_epoch, 'step', 'steps')} an epoch, {many(total_steps, 'step', 'steps')}, "
        f"{order.samples_until(total_steps):,} samples",
        f"  a step: {tokens:,.0f} tokens, {supervised:,.0f} of them supervised, {images:,.0f} images ({how})",
        f"  {many(batches.micro_batches, 'micro-batch', 'micro-batches')} of up to {size:,} "
        f"{'tokens' if packing else 'samples'} a process and step",
        f"  useful tokens: {batches.packed:.0%} of what is computed if packed, {batches.padded:.0%} if padded",
    ]


def time_lines(
    config: TrainConfig,
    plan: Plan,
    lengths: Lengths,
    order: Order,
    total_steps: int,
    done: int | None,
    processes: int,
    prediction: Prediction | None,
) -> list[str]:
    """FLOPs of a step, and hours; prediction: by rates that were measured, where the device's are known."""
    tokens, supervised, images = of_step(lengths, order, total_steps)
    flops = plan.flops.of(tokens=tokens, supervised_tokens=supervised, images=images)
    peak = config.log.peak_tflops or PEAK_TFLOPS["H100"]
    if config.tokens_per_second:
        seconds, how = tokens / config.tokens_per_second, f"at {config.tokens_per_second:,.0f} tokens/s"
    elif prediction is not None:
        seconds, how = prediction.seconds, f"by measured rates: {tokens / prediction.seconds:,.0f} tokens/s"
        if processes > 1:
            how += f", of which {prediction.exposed / seconds:.0%} waits for communication"
    else:
        seconds = flops / (processes * peak * 1e12 * ASSUMED_MFU)
        rate = tokens / seconds
        slower = ", which is of bf16 and not reached in fp32" if config.precision == "fp32" else ""
        how = f"if MFU is {ASSUMED_MFU:.0%} of {peak:,.0f} TFLOP/s{slower}, an assumption: {rate:,.0f} tokens/s"
    prefix, factor = unit_of(flops, "TGMK")
    lines = [f"  {flops / factor:,.1f} {prefix}FLOP a step", f"time: {hours(seconds * total_steps)}, {how}"]
    if done is None:
        lines.append(f"the run in {config.run_dir} is finished")
    elif done:
        lines.append(f"{done:,} steps are done; {hours(seconds * (total_steps - done))} are left")
    return lines


def dry_run(config: TrainConfig, stage: Stage) -> None:
    """Print the plan of a run, in one process of torchrun.

    Raises:
        ValueError: what the run would be refused for, weights that are not there yet excepted.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    processes = config.processes or int(os.environ.get("WORLD_SIZE", "1"))
    done = None if run_folder.is_finished(config) else checkpoints.steps_saved(config)
    model_config = sharding.starting_config(config.model, image_aspect_ratio=config.data.image_aspect_ratio)
    notes = []
    without = [
        folder
        for folder in filter(None, (config.model.init, config.model.llm, config.model.vision))
        if not any(path.suffix in (".safetensors", ".bin") for path in Path(folder).iterdir())
    ]
    if without:
        notes.append(f"{' and '.join(without)}: no weights yet; the run needs them")
    else:
        sharding.starting_weights(config.model, model_config, seed=config.seed)
    loop.check_packing(config, model_config)
    processor = loop.make_processor(config, model_config)
    samples = loop.read_samples(config, model_config, processor, rank=0, num_processes=processes)
    order = loop.make_order(config, samples)
    total_steps = config.max_steps or config.epochs * order.steps_per_epoch
    lengths = sample_lengths(samples)
    if lengths.unusable:
        notes.append(f"{lengths.unusable} of {lengths.sampled} sampled records cannot be used; see `aligngpt doctor`")
    plan = plan_run(config, model_config, lengths, order, processes=processes, total_steps=total_steps)

    name, device, device_bytes = H100, "an H100 assumed, since this machine has no GPU", int(cluster.MEMORY["H100"][0])
    if torch.cuda.is_available():
        name = device = torch.cuda.get_device_name()
        device_bytes = torch.cuda.get_device_properties(0).total_memory
    step, network = of_step(lengths, order, total_steps), cluster.ASSUMED
    prediction = cluster.predict_run(config, stage, plan, step, processes, device=name, network=network)
    if plan.memory.device > device_bytes:
        need = plan.memory
        stays = 0 if need.offload else need.parameters + need.tower + need.gradients + need.optimizer
        alone = f"; weights, gradients and optimizer alone take {gigabytes(stays)}" if stays > device_bytes else ""
        notes.append(f"it does not fit: it takes {gigabytes(need.device)} of {gigabytes(device_bytes)}{alone}")
        for flags, changed, number in other_ways(config, processes):
            need = plan_run(changed, model_config, lengths, order, processes=number, total_steps=total_steps).memory
            host = f" and {gigabytes(need.host)} of the host's" if need.host else ""
            fits = "fits" if need.device <= device_bytes else "does not fit either"
            notes.append(f"with {flags}: {gigabytes(need.device)}{host}, {fits}")
            if number > processes and fits == "fits":
                break
    elif plan.memory.device > 0.9 * device_bytes:
        notes.append("it is tight: CUDA, NCCL and the allocator's gaps take a few GB too")
    lines = [
        f"plan of {stage}: {many(processes, 'process', 'processes')}, {device}",
        "",
        *weight_lines(plan.weights),
        "",
        *memory_lines(plan, device_bytes),
        "",
        *data_lines(config, plan, lengths, samples, order, total_steps),
        *communication_lines(cluster.traffic_of(config, plan, processes), network, processes),
        *time_lines(config, plan, lengths, order, total_steps, done, processes, prediction),
        *(f"  {line}" for line in (prediction.assumed if prediction and not config.tokens_per_second else ())),
        *(f"note: {note}" for note in notes),
    ]
    print("\n".join(lines), flush=True)
