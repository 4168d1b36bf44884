"""`python -m training.plan`: hours, memory and communication of a run on a cluster, before there is one.

    python -m training.plan --gpus 64 --model 7b --samples 558k
    python -m training.plan --gpus 2 --model tiny --samples 10k --calibrate

No model folder and no data are needed: models have known shapes, samples the lengths of LLaVA's sets. It prints what
memory, a step, its communication and its hours come to, and in a line each what that rests on: counted, measured (on
which device, or here with --calibrate) or assumed. It refuses what cannot be, naming the flag, what it got and what it
needs. Exit status: 0 done, 1 a value that cannot be used, 2 a command line that is not understood.
"""

import argparse
import dataclasses
import itertools
import math
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from aligngpt.checkpoint import read_config
from aligngpt.config import AlignGPTConfig
from training import cluster, sharding
from training.calibrate import Calibration, calibrate, check_available
from training.cluster import ASSUMED, H100, Network
from training.config import PRESETS, ModelConfig, Stage, TrainConfig
from training.loader import Order
from training.plan import Lengths, plan_run
from training.plan_lines import (
    communication_lines,
    gigabytes,
    hours_lines,
    many,
    memory_lines,
    of_step,
    weight_lines,
)

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL_TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
# Width, MLP, layers, heads, vocabulary; tower; side and patch of an image.
SHAPES = {
    "7b": ((4096, 11008, 32, 32, 32000), CLIP_L, (336, 14)),
    "13b": ((5120, 13824, 40, 40, 32000), CLIP_L, (336, 14)),
    "tiny": ((256, 688, 4, 4, 8192), SMALL_TOWER, (96, 8)),
}
PRESET_OF = {"7b": "aligngpt-7b", "13b": "aligngpt-13b", "tiny": "tiny"}
# Text tokens of a sample at the 11 deciles, and which of them are learned from. Captions have 8 to 40 words;
# conversations are what benchmarks/lengths.py estimates of LLaVA's 665K.
CAPTION = (10, 13, 16, 20, 23, 26, 29, 32, 36, 39, 42)
CONVERSATION = (60, 101, 130, 144, 156, 170, 191, 233, 302, 450, 898)
TEXT_ALONE = (167, 639, 964, 1353, 1569, 1849, 2048, 2048, 2048, 2048, 2048)
LEARNED = {"pretrain": 0.92, "finetune": 0.46}
WITHOUT_IMAGE = {"pretrain": 0.0, "finetune": 40 / 664}
WIDTH = 118  # of a line of words
SIMULATED_SAMPLES = 100_000  # of which the first steps are packed; the rest are alike


def count(text: str) -> int:
    """A number as people write it: 558k, 1.2M, 665000."""
    found = re.fullmatch(
        r"(\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(\.\d+)?\s*([kmbg]?)", text.strip(), re.IGNORECASE | re.ASCII
    )
    number = Decimal(0)
    if found:
        factor = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}[found[3].lower()]
        number = Decimal(found[1].replace(",", "").replace("_", "") + (found[2] or "")) * factor
    if not number or number % 1:
        raise argparse.ArgumentTypeError(
            f"is {text!r}; it needs a whole number of at least 1, such as 64, 558k or 1.2M"
        )
    return int(number)


def mean(text: str) -> float:
    """A number that is not negative: 0.94."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"is {text!r}; it needs a number of at least 0, such as 0.94")
    return number


def bandwidth(text: str) -> float:
    """Bytes a second: 400GB/s, 400 (GB/s), 100Gb/s (bits)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB/s|Gb/s|TB/s|MB/s|GB|)", text.strip())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"is {text!r}; it needs a bandwidth such as 400GB/s or 3200Gb/s")
    factor = {"GB/s": 1e9, "GB": 1e9, "": 1e9, "Gb/s": 1e9 / 8, "TB/s": 1e12, "MB/s": 1e6}[found[2]]
    return float(found[1]) * factor


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m training.plan",
        description="Hours, memory and communication of a run on a cluster, from measured rates and counted bytes.",
    )
    add = made.add_argument
    add("--gpus", type=count, required=True, help="processes of the run, a GPU each")
    add("--gpus-per-node", type=count, help=f"of a machine; without it {ASSUMED.gpus_per_node}")
    add(
        "--model", default="7b", help=f"{', '.join(SHAPES)}, or a folder of an AlignGPT model or, with --vision, an LLM"
    )
    add("--vision", default="", help="folder of the tower, if --model is an LLM's")
    add("--stage", choices=("pretrain", "finetune"), default="pretrain")
    add("--preset", choices=PRESETS, help="of hyper-parameters; without it the model's")
    add("--samples", type=count, default="558k", help="of the data set, such as 558k")
    add("--epochs", type=count, default=1)
    add("--tokens-per-sample", type=count, help="on average, image rows included; without it LLaVA's")
    add("--images-per-sample", type=mean, help="on average; without it LLaVA's")
    add("--global-batch-size", type=count, help="samples of a step; without it the preset's, as the next are")
    add("--token-budget", type=count, help="tokens of a micro-batch")
    add("--shard-over", type=count, help="processes that share a copy of the weights (HSDP); without it all")
    add("--gather", choices=("layer", "step"))
    add("--activation-checkpointing", choices=("full", "selective", "none"))
    add("--lora-rank", type=count)
    add("--save-every", type=count, help="steps between checkpoints")
    add("--device", help=f"such as 'NVIDIA H200'; without it this machine's, or an {H100}")
    add(
        "--links",
        type=bandwidth,
        help="of a GPU to others of its machine, each way; without it NVLink 4's 450GB/s",
    )
    add(
        "--network",
        type=bandwidth,
        help="of a machine to others, all ports, each way; without it 400GB/s",
    )
    add("--calibrate", action="store_true", help="measure this machine's rates first, by short real steps")
    return made


def shape(model: str, vision: str) -> AlignGPTConfig:
    """The config of a model that is known by its name or lies in a folder.

    Raises:
        ValueError: it is neither, or --vision is given beside what has a tower.
    """
    if model in SHAPES:
        if vision:
            raise ValueError(f"--vision is {vision!r}; --model {model} has its tower, and needs it left out")
        (width, mlp, layers, heads, vocabulary), tower, (side, patch) = SHAPES[model]
        llm = LlamaConfig(
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )
        return AlignGPTConfig.from_parts(llm, CLIPVisionConfig(**tower, image_size=side, patch_size=patch))
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"--model is {model!r}; it needs one of {', '.join(SHAPES)}, or a folder that holds config.json"
        )
    if not vision and read_config(model).get("model_type") != AlignGPTConfig.model_type:
        raise ValueError(f"--model is {model!r}, which is no AlignGPT model; it needs --vision, its tower's folder")
    parts = ModelConfig(llm=model, vision=vision) if vision else ModelConfig(init=model)
    try:
        return sharding.starting_config(parts, image_aspect_ratio="pad")
    except ValueError as error:  # in the words of this command
        raise ValueError(
            re.sub("--model[.](llm|init)", "--model", str(error)).replace("--model.vision", "--vision")
        ) from error


def network_of(asked: argparse.Namespace) -> Network:
    """What lies between the GPUs. A calibrated run is on this machine.

    Raises:
        ValueError: it is described, and measured.
    """
    given = {"gpus_per_node": asked.gpus_per_node, "links": asked.links, "network": asked.network}
    given = {name: value for name, value in given.items() if value is not None}
    if asked.calibrate and given:
        flag = next(iter(given)).replace("_", "-")
        raise ValueError(f"--{flag} is given; --calibrate needs it left out: it measures all processes on this machine")
    return ASSUMED._replace(**{"gpus_per_node": asked.gpus} if asked.calibrate else given)


def preset_of(asked: argparse.Namespace) -> str:
    return asked.preset or PRESET_OF.get(asked.model, "aligngpt-7b")


def config_of(asked: argparse.Namespace, network: Network) -> TrainConfig:
    """The preset with what was asked for.

    Raises:
        ValueError: numbers that do not go together.
    """
    preset = PRESETS[preset_of(asked)](asked.stage)
    changed = dataclasses.replace
    given = {
        name: value
        for name in ("global_batch_size", "token_budget", "save_every", "epochs")
        if (value := getattr(asked, name)) is not None
    }
    cut = {
        "size": asked.shard_over or 0,
        "gather": asked.gather or preset.sharding.gather,
        "activation_checkpointing": asked.activation_checkpointing or preset.sharding.activation_checkpointing,
    }
    config = changed(preset, **given, sharding=changed(preset.sharding, **cut))
    if asked.lora_rank:
        config = changed(config, lora=changed(config.lora, rank=asked.lora_rank))
    gpus, size, batch, machine = asked.gpus, asked.shard_over, config.global_batch_size, network.gpus_per_node
    for flag, value, good, needs in (
        ("shard-over", size, not size or gpus % size == 0, f"a number that divides --gpus, {gpus}"),
        ("global-batch-size", batch, batch >= gpus, f"a sample for each of the {gpus} GPUs"),
        ("gpus", gpus, gpus <= machine or gpus % machine == 0, f"whole machines of --gpus-per-node, {machine}"),
        ("shard-over", size, not size or network.holds(gpus, size),
         f"a number that divides --gpus-per-node, {machine}, or is a multiple of it"),
        ("token-budget", config.token_budget, config.token_budget >= config.data.max_length,
         f"room for the longest sample, {config.data.max_length} tokens"),
        ("tokens-per-sample", asked.tokens_per_sample, (asked.tokens_per_sample or 0) <= config.data.max_length,
         f"at most the preset's longest sample, {config.data.max_length}"),
        ("lora-rank", asked.lora_rank, not asked.lora_rank or asked.stage == "finetune", "--stage finetune"),
    ):  # fmt: skip
        if not good:
            raise ValueError(f"--{flag} is {value}; it needs {needs}")
    return config


def lengths_of(asked: argparse.Namespace, config: TrainConfig, rows: int) -> tuple[Lengths, list[str]]:
    """Lengths of the data set's samples, and where they come from.

    Raises:
        ValueError: samples shorter than their images.
    """
    stage, most = asked.stage, config.data.max_length
    number = min(asked.samples, SIMULATED_SAMPLES)
    random = np.random.default_rng(0)
    share = 1 - WITHOUT_IMAGE[stage] if asked.images_per_sample is None else asked.images_per_sample
    whole, part = divmod(share, 1)
    images = (whole + (random.random(number) < part)).astype(np.int64)
    places, deciles = random.random(number), np.linspace(0, 1, 11)
    pictured = np.interp(places, deciles, CAPTION if stage == "pretrain" else CONVERSATION)
    alone = np.interp(places, deciles, CAPTION if stage == "pretrain" else TEXT_ALONE)
    text = np.where(images > 0, pictured, alone)
    said = "drawn from assumed lengths, those of LLaVA's " + (
        "558K captions" if stage == "pretrain" else "665K conversations"
    )
    if asked.tokens_per_sample:
        left = asked.tokens_per_sample - rows * share
        if left < 3:
            raise ValueError(
                f"--tokens-per-sample is {asked.tokens_per_sample}; it needs more than the {rows * share:.0f} rows of "
                "a sample's images"
            )
        text, said = text * left / text.mean(), f"as given, spread like those of LLaVA's and cut to {most:,}"
    tokens = (text + rows * images).round().clip(3, most).astype(np.int64)
    if rows * images.max() >= most:
        raise ValueError(
            f"--images-per-sample is {share:g}; images of {rows} rows need to fit into {most} tokens, with a text"
        )
    lengths = Lengths(tokens, images, rows, LEARNED[stage], number, 0)
    return lengths, [
        f"samples: {tokens.mean():,.0f} tokens, {images.mean():.2f} images, {said}; of their text {LEARNED[stage]:.0%} "
        "is learned from"
    ]


def forecast(asked: argparse.Namespace) -> str:
    """What is printed.

    Raises:
        ValueError: see the functions above.
    """
    stage: Stage = asked.stage
    network = network_of(asked)
    config, model = config_of(asked, network), shape(asked.model, asked.vision)
    device, memory_bytes, found = device_of(asked)
    lengths, assumed = lengths_of(asked, config, model.image_seq_length)
    gpus = asked.gpus
    order = Order(asked.samples, config.global_batch_size, config.seed)
    total_steps = config.epochs * order.steps_per_epoch
    # Steps are packed from what was drawn; there are more of them in the run.
    drawn = dataclasses.replace(order, num_samples=len(lengths.tokens))
    plan = plan_run(config, model, lengths, drawn, processes=gpus, total_steps=min(total_steps, drawn.steps_per_epoch))

    calibrated: Calibration | None = None
    if asked.calibrate:
        if plan.memory.device > memory_bytes:
            raise ValueError(
                f"--model is {asked.model}, of which a process takes {gigabytes(plan.memory.device)}; --calibrate "
                f"needs it to fit into the {gigabytes(memory_bytes)} that each of {gpus} has here"
            )
        calibrated = calibrate(config, stage, model, lengths, processes=gpus)
    step = of_step(lengths, order, total_steps)
    prediction = cluster.predict_run(
        config, stage, plan, step, gpus, device=device, network=network, calibrated=calibrated
    )
    trained = sum(weight.elements for weight in plan.weights if weight.trained)
    saves = -(-total_steps // config.save_every)
    tokens, supervised, images = step
    flops = plan.flops.of(tokens=tokens, supervised_tokens=supervised, images=images)
    machines = -(-gpus // network.gpus_per_node)
    cut = config.sharding
    said = [
        "weights, gradients, optimizer, FLOPs and bytes moved: counted; activations and what else comes and goes: "
        "estimated",
        *assumed,
    ]
    timed = ["time: not predicted: known rates are of bf16, and this run computes in fp32; --calibrate measures"]
    if prediction is not None:
        timed = hours_lines(prediction, flops, total_steps, gpus)
        said += prediction.assumed
    room = "" if plan.memory.device <= memory_bytes else f"it does not fit into {gigabytes(memory_bytes)}"
    lines = [
        f"plan of {stage}: {asked.model} on {gpus} × {device}"
        + (f", {machines} machines of {network.gpus_per_node}" if machines > 1 else "")
        + (f" ({found})" if found else ""),
        f"preset {preset_of(asked)}, {config.precision}, weights cut over {cut.size or gpus}, gather {cut.gather}, "
        f"activation checkpointing {cut.activation_checkpointing}"
        + (f", LoRA rank {config.lora.rank}" if config.lora.rank else ""),
        "",
        *weight_lines(plan.weights),
        "",
        *memory_lines(plan, int(memory_bytes)),
        *([f"  note: {room}"] if room else []),
        "",
        f"a step: {config.global_batch_size:,} samples, {tokens:,.0f} tokens, {supervised:,.0f} of them supervised, "
        f"{images:,.0f} images",
        f"  {many(plan.batches.micro_batches, 'micro-batch', 'micro-batches')} of up to {config.token_budget:,} tokens "
        f"a GPU; {plan.batches.packed:.0%} of the GPUs' time goes to tokens, the rest to waiting for fuller bins",
        "",
        *communication_lines(cluster.traffic_of(config, plan, gpus), network, gpus),
        "",
        *timed,
        f"checkpoints: {gigabytes(12 * trained)} each, {many(saves, 'save', 'saves')}, {config.keep_last} kept; "
        "written while training goes on",
        "",
        "what this rests on",
        *itertools.chain.from_iterable(
            textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ") for line in said
        ),
    ]
    return "\n".join(lines)


def device_of(asked: argparse.Namespace) -> tuple[str, float, str]:
    """The device that is planned for, the bytes of memory that a process has there, and why this device if not asked.

    Raises:
        ValueError: nothing is known of it.
    """
    if asked.calibrate and asked.device:
        raise ValueError(f"--device is {asked.device!r}; --calibrate needs it left out: it measures this machine's")
    has_gpu = torch.cuda.is_available()
    if asked.calibrate:
        check_available(asked.gpus)
        if not has_gpu:
            whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return "this machine's CPU", whole / asked.gpus, ""
    if has_gpu and not asked.device:
        device, why = torch.cuda.get_device_name(), "this machine's"
        memory_bytes = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        device, why = asked.device or H100, "" if asked.device else "assumed, since this machine has no GPU"
        memory_bytes, _ = cluster.memory_of(device) or (0.0, 0.0)
    if not asked.calibrate and not (memory_bytes and cluster.is_known(device)):
        known = ", ".join(sorted({*cluster.known_rates(), *cluster.MEMORY}))
        raise ValueError(f"--device is {device!r}; it needs one of {known}, or --calibrate on such a machine")
    return device, memory_bytes, why


def main(args: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(args)
    try:
        print(forecast(asked), flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
