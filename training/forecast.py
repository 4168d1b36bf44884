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
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from aligngpt.checkpoint import read_config
from aligngpt.config import AlignGPTConfig
from training import cluster, sharding
from training.calibrate import Calibration, calibrate, check_available
from training.cluster import Network
from training.config import PRESETS, ModelConfig, Stage, TrainConfig
from training.dry_run import (
    H100,
    communication_lines,
    gigabytes,
    hours_lines,
    many,
    memory_lines,
    of_step,
    weight_lines,
)
from training.loader import Order
from training.plan import Lengths, plan_run

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
    found = re.fullmatch(r"(\d+(?:[.,_]\d+)*)\s*([kKmMbBgG]?)", text.strip())
    try:
        number = float(found[1].replace(",", "").replace("_", "")) if found else 0.0
    except ValueError:
        number = 0.0
    factor = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}[found[2].lower()] if found else 1
    if not number or round(number * factor) != number * factor:
        raise argparse.ArgumentTypeError(
            f"is {text!r}; it needs a whole number of at least 1, such as 64, 558k or 1.2M"
        )
    return round(number * factor)


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
    add("--gpus-per-node", type=count, default=cluster.ASSUMED.gpus_per_node, help="of a machine")
    add(
        "--model", default="7b", help=f"{', '.join(SHAPES)}, or a folder of an AlignGPT model or, with --vision, an LLM"
    )
    add("--vision", default="", help="folder of the tower, if --model is an LLM's")
    add("--stage", choices=("pretrain", "finetune"), default="pretrain")
    add("--preset", choices=PRESETS, help="of hyper-parameters; without it the model's")
    add("--samples", type=count, default="558k", help="of the data set, such as 558k")
    add("--epochs", type=count, default=1)
    add("--tokens-per-sample", type=count, help="on average, image rows included; without it LLaVA's")
    add("--images-per-sample", type=float, help="on average; without it LLaVA's")
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
        default=cluster.ASSUMED.links,
        help="of a GPU to others of its machine, each way; without it NVLink 4's 450GB/s",
    )
    add(
        "--network",
        type=bandwidth,
        default=cluster.ASSUMED.network,
        help="of a machine to others, all ports, each way; without it 400GB/s",
    )
    add("--calibrate", action="store_true", help="measure this machine's rates first, by short real steps")
    return made


def shape(model: str, vision: str) -> AlignGPTConfig:
    """The config of a model that is known by its name or lies in a folder.

    Raises:
        ValueError: it is neither.
    """
    if model in SHAPES:
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
    parts = ModelConfig(llm=model, vision=vision) if vision else ModelConfig(init=model)
    if not vision and read_config(model).get("model_type") != AlignGPTConfig.model_type:
        raise ValueError(f"--model is {model!r}, which is no AlignGPT model; it needs --vision, its tower's folder")
    return sharding.starting_config(parts, image_aspect_ratio="pad")


def config_of(asked: argparse.Namespace) -> TrainConfig:
    """The preset with what was asked for.

    Raises:
        ValueError: numbers that do not go together.
    """
    preset = PRESETS[asked.preset or PRESET_OF.get(asked.model, "aligngpt-7b")](asked.stage)
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
    gpus, size, batch = asked.gpus, asked.shard_over, config.global_batch_size
    for flag, value, good, needs in (
        ("shard-over", size, not size or gpus % size == 0, f"a number that divides --gpus, {gpus}"),
        ("global-batch-size", batch, batch >= gpus, f"a sample for each of the {gpus} GPUs"),
        ("gpus", gpus, gpus <= asked.gpus_per_node or gpus % asked.gpus_per_node == 0,
         f"whole machines of --gpus-per-node, {asked.gpus_per_node}"),
        ("token-budget", config.token_budget, config.token_budget >= config.data.max_length,
         f"room for the longest sample, {config.data.max_length} tokens"),
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
    said = "assumed, as long as those of LLaVA's " + ("558K captions" if stage == "pretrain" else "665K conversations")
    if asked.tokens_per_sample:
        left = asked.tokens_per_sample - rows * share
        if left < 3:
            raise ValueError(
                f"--tokens-per-sample is {asked.tokens_per_sample}; it needs more than the {rows * share:.0f} rows of "
                "a sample's images"
            )
        text, said = text * left / text.mean(), "as given, spread like those of LLaVA's"
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
    config, model = config_of(asked), shape(asked.model, asked.vision)
    device, memory_bytes = device_of(asked)
    lengths, assumed = lengths_of(asked, config, model.image_seq_length)
    gpus = asked.gpus
    order = Order(asked.samples, config.global_batch_size, config.seed)
    total_steps = config.epochs * order.steps_per_epoch
    # Steps are packed from what was drawn; there are more of them in the run.
    drawn = dataclasses.replace(order, num_samples=len(lengths.tokens))
    plan = plan_run(config, model, lengths, drawn, processes=gpus, total_steps=min(total_steps, drawn.steps_per_epoch))

    calibrated: Calibration | None = None
    if asked.calibrate:
        calibrated = calibrate(config, stage, model, lengths, processes=gpus)
    network = Network(asked.gpus_per_node, asked.links, asked.network)
    step = of_step(lengths, order, total_steps)
    prediction = cluster.predict_run(
        config, stage, plan, step, gpus, device=device, network=network, calibrated=calibrated
    )
    assert prediction is not None, device
    trained = sum(weight.elements for weight in plan.weights if weight.trained)
    saves = -(-total_steps // config.save_every)
    tokens, supervised, images = step
    flops = plan.flops.of(tokens=tokens, supervised_tokens=supervised, images=images)
    machines = -(-gpus // asked.gpus_per_node)
    room = "" if plan.memory.device <= memory_bytes else f"it does not fit into {gigabytes(memory_bytes)}"
    lines = [
        f"plan of {stage}: {asked.model} on {gpus} × {device}"
        + (f", {machines} machines of {asked.gpus_per_node}" if machines > 1 else ""),
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
        *communication_lines(prediction, network, gpus),
        "",
        *hours_lines(prediction, flops, total_steps, gpus),
        f"checkpoints: {gigabytes(12 * trained)} each, {many(saves, 'save', 'saves')}, {config.keep_last} kept; "
        "written while training goes on",
        "",
        "what this rests on",
        *itertools.chain.from_iterable(
            textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
            for line in ("memory, tokens, FLOPs and bytes moved: counted", *assumed, *prediction.assumed)
        ),
    ]
    return "\n".join(lines)


def device_of(asked: argparse.Namespace) -> tuple[str, float]:
    """The device that is planned for and its memory's bytes.

    Raises:
        ValueError: nothing is known of it.
    """
    if asked.calibrate and asked.device:
        raise ValueError(f"--device is {asked.device!r}; --calibrate needs it left out: it measures this machine's")
    if asked.calibrate:
        check_available(asked.gpus)
    if torch.cuda.is_available() and not asked.device:
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    if asked.calibrate:
        return "this machine's CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = asked.device or H100
    found = cluster.memory_of(device)
    if found is None:
        known = ", ".join(sorted({*cluster.known_rates(), *cluster.MEMORY}))
        raise ValueError(f"--device is {device!r}; it needs one of {known}, or --calibrate on such a machine")
    return device, found[0]


def main(args: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(args)
    try:
        print(forecast(asked), flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
