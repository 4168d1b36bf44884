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
from training.cluster import Network, Prediction
from training.config import Stage, TrainConfig
from training.loader import Order, Samples
from training.plan import GROUPS, Lengths, Plan, Weight, plan_run, sample_lengths

ASSUMED_MFU = 0.4  # where no rate is known
H100 = "NVIDIA H100 80GB HBM3"
H100_TFLOPS = 989.0
H100_BYTES = 80 * 10**9


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


def many(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def unit_of(number: float, prefixes: str = "GMK") -> tuple[str, float]:
    """The prefix in which a number is read easily, and its factor."""
    factors = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3}
    prefix = next((prefix for prefix in prefixes if number >= factors[prefix]), prefixes[-1])
    return prefix, factors[prefix]


def gigabytes(count: float) -> str:
    prefix, factor = unit_of(count)
    return f"{count / factor:,.2f} {prefix}B"


def weight_lines(weights: list[Weight]) -> list[str]:
    """Parameters by group."""
    lines = [f"{'parameters':36}{'trained':>16}{'frozen':>16}"]
    for group in (*GROUPS, "all"):
        members = [weight for weight in weights if group in (weight.group, "all")]
        trained = sum(weight.elements for weight in members if weight.trained)
        frozen = sum(weight.elements for weight in members) - trained
        if members:
            lines.append(f"  {group:34}" + "".join(f"{n:16,}" if n else f"{'-':>16}" for n in (trained, frozen)))
    return lines


def memory_lines(plan: Plan, device_bytes: int) -> list[str]:
    """Bytes of a process; what lies on the host is marked."""
    need, largest = plan.memory, plan.batches.largest
    where = ", on the host" if need.offload else ""
    none_yet = "" if need.gradients_then else "; made after that moment, not in the sum"
    whole = "; whole until the step's last micro-batch" if need.gradients_then > need.gradients else ""
    rows = (
        ("parameters", need.parameters, f"exact{where}"),
        ("vision tower, whole in each process", need.tower, "exact"),
        ("gradients", max(need.gradients, need.gradients_then), f"exact{where}{none_yet}{whole}"),
        ("optimizer", need.optimizer, f"exact{where}"),
        ("gathered while at work", need.gathered, "estimate"),
        ("gradients being reduced", need.reducing, "estimate"),
        (
            "activations",
            need.activations,
            f"estimate for {largest.tokens:,} tokens and {many(largest.images, 'image', 'images')}",
        ),
        ("pixels made ahead", need.pixels, "estimate"),
    )
    prefix, factor = unit_of(max(need.device, need.host))
    lines = [
        f"{'memory of a process':36}{prefix + 'B':>16}",
        *(f"  {name:34}{n / factor:16,.3f}  {note}" for name, n, note in rows),
    ]
    share = f"{need.device / device_bytes:.0%} of {gigabytes(device_bytes)}; the most at once, {need.moment}"
    lines.append(f"  {'together':34}{need.device / factor:16,.3f}  {share}")
    if need.host:
        lines.append(f"  {'on the host':34}{need.host / factor:16,.3f}")
    lines.append("  CUDA, NCCL and the allocator's gaps come on top")
    return lines


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
    peak = config.log.peak_tflops or H100_TFLOPS
    if config.tokens_per_second:
        seconds, how = tokens / config.tokens_per_second, f"at {config.tokens_per_second:,.0f} tokens/s"
    elif prediction is not None:
        seconds, how = prediction.seconds, f"by measured rates: {tokens / prediction.seconds:,.0f} tokens/s"
        if processes > 1:
            how += f", of which {prediction.exposed / seconds:.0%} waits for communication"
    else:
        seconds = flops / (processes * peak * 1e12 * ASSUMED_MFU)
        rate = tokens / seconds
        how = f"if MFU is {ASSUMED_MFU:.0%} of {peak:,.0f} TFLOP/s, an assumption: {rate:,.0f} tokens/s"
    prefix, factor = unit_of(flops, "TGMK")
    lines = [f"  {flops / factor:,.1f} {prefix}FLOP a step", f"time: {hours(seconds * total_steps)}, {how}"]
    if done is None:
        lines.append(f"the run in {config.run_dir} is finished")
    elif done:
        lines.append(f"{done:,} steps are done; {hours(seconds * (total_steps - done))} are left")
    return lines


def communication_lines(prediction: Prediction, network: Network, processes: int) -> list[str]:
    """What a process and a machine move in a step."""
    if processes == 1:
        return ["communication: none, with one process"]
    kinds: dict[str, list[float]] = {}
    for collective, times in prediction.traffic.counted().items():
        found = kinds.setdefault(f"{collective.kind} of {collective.members}", [0, 0.0, 0.0])
        for place, value in enumerate((1, collective.bytes, collective.sent)):
            found[place] += times * value
    kinds["together"] = [sum(values) for values in zip(*kinds.values(), strict=True)]
    prefix, factor = unit_of(kinds["together"][1])
    lines = [f"{'communication of a step':36}{'calls':>8}{f'{prefix}B, whole':>14}{f'{prefix}B, sent by each':>20}"]
    for kind, (calls, whole, sent) in kinds.items():
        lines.append(f"  {kind:34}{calls:8,.0f}{whole / factor:14,.3f}{sent / factor:20,.3f}")
    machines = -(-processes // network.gpus_per_node)
    if machines > 1:
        lines.append(f"  a machine sends {gigabytes(prediction.crossing)} of it to others")
    return lines


def hours_lines(prediction: Prediction, flops: float, total_steps: int, processes: int) -> list[str]:
    """Seconds of a step by what takes them, and the run's hours."""
    seconds, total = prediction.seconds, prediction.seconds * total_steps
    rows = (
        ("forward and backward", prediction.compute),
        ("optimizer and what is fixed", prediction.between),
        ("waiting for communication", prediction.exposed),
        ("together", seconds),
    )
    hidden = ""
    if prediction.communication and not prediction.communicates:
        share = 1 - prediction.exposed / prediction.communication
        hidden = f"; of {prediction.communication:,.3g} s of communication {max(share, 0):.0%} are behind compute"
    prefix, factor = unit_of(flops / seconds / processes, "TGM")
    return [
        "seconds of a step",
        *(f"  {name:34}{value:8.3f}{hidden if name.startswith('waiting') else ''}" for name, value in rows),
        f"  {flops / seconds / processes / factor:,.1f} {prefix}FLOP/s a process, "
        f"{prediction.tokens / seconds:,.0f} tokens/s of all",
        f"time: {hours(total)}, {total_steps:,} steps; {total * processes / 3600:,.1f} GPU-hours",
    ]


def of_step(lengths: Lengths, order: Order, total_steps: int) -> tuple[float, float, float]:
    """Tokens, supervised tokens and images of a step, on average over the run."""
    samples = order.samples_until(total_steps) / total_steps
    text = lengths.tokens - lengths.image_rows * lengths.images
    return (
        samples * float(lengths.tokens.mean()),
        samples * float(text.clip(0).mean()) * lengths.supervised,
        samples * float(lengths.images.mean()),
    )


def hours(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


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

    name, device, device_bytes = H100, "an H100 assumed, since this machine has no GPU", H100_BYTES
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
        *(communication_lines(prediction, network, processes) if prediction else ()),
        *time_lines(config, plan, lengths, order, total_steps, done, processes, prediction),
        *(f"  {line}" for line in (prediction.assumed if prediction and not config.tokens_per_second else ())),
        *(f"note: {note}" for note in notes),
    ]
    print("\n".join(lines), flush=True)
