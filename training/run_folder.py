"""The run folder: what a run is, and the model it leaves.

    RUN/config.json                    {"config": …, "stage": …, "environment": …}, written once a batch is there
    RUN/metrics.jsonl                  a line a step
    RUN/lock                           held by the run that is at work
    RUN/checkpoints/, RUN/LATEST       what the run goes on from: checkpoints.py
    RUN/model/                         the result: safetensors, config and processor, for `from_pretrained`
    RUN/profile/                       of a run with --profile: aligngpt/profiling.py
    RUN/adapter/                       of a run with --lora.rank: its adapters, which RUN/model has merged, for PEFT

Files and folders are written under a name ending in .tmp and renamed when they are whole and on the disk. Checkpoints
are for resuming one's own run, RUN/model is for exchange.
"""

import fcntl
import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from aligngpt import __version__
from aligngpt.card import write_card
from aligngpt.checkpoint import write_weights
from aligngpt.data.tables import sync_to_disk, whole_file
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.processor import AlignGPTProcessor
from training import lora
from training.checkpoints import FOLDER, SaveError, discard
from training.config import NOT_LEARNED, Stage, TrainConfig, differences, environment, flat, to_json
from training.sharding import Stored, World, set_dtype, tied_names, whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------- the folder


def is_finished(config: TrainConfig) -> bool:
    """Whether the run that `config` describes has left its result in its folder; the folder is not touched.

    Raises:
        ValueError: the folder holds something else, another run (the message lists what differs), a run that is at
            work, or one where `--no-resume` was given.
    """
    folder = Path(config.run_dir)
    if not folder.exists():
        existing = next(parent for parent in folder.parents if parent.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise ValueError(f"--run-dir is {folder}; {existing} needs to be a folder that can be written to")
        return False
    if not folder.is_dir():
        raise ValueError(f"--run-dir is {folder}, a file; it needs a folder of its own")
    if not (folder / "config.json").is_file():
        if any(item.name not in (FOLDER, "lock") for item in folder.iterdir() if item.suffix != ".tmp"):
            raise ValueError(f"--run-dir is {folder}, which holds other files; it needs an empty or a new folder")
        return False
    theirs = recorded(folder)
    if not config.resume:
        raise ValueError(f"--run-dir is {folder}, which already holds a run; it needs a new folder, or --resume")
    unknown = sorted(flat(to_json(config)).keys() - theirs.keys() - NOT_LEARNED)
    if unknown:
        raise ValueError(
            f"--run-dir is {folder}, which holds a run of an earlier version, without {', '.join(unknown)}; it needs a "
            "new folder"
        )
    different = differences(to_json(config), theirs)
    if different:
        raise ValueError(
            f"--run-dir is {folder}, which holds a run with another config; it needs the same one to go on. "
            f"What differs: {'; '.join(different)}"
        )
    if (folder / "lock").is_file():
        with (folder / "lock").open() as lock:  # free again at once; other processes of this run ask the same
            _take(lock, fcntl.LOCK_SH, folder)
    return (folder / "model").is_dir()


def profile(config: TrainConfig) -> Path:
    """Where a run with `--profile` writes to."""
    return Path(config.run_dir) / "profile"


def recorded(folder: Path) -> dict[str, Any]:
    """The config, under dotted names, of the run that a folder's config.json describes.

    Raises:
        ValueError: config.json is something else.
    """
    try:
        return flat(json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--run-dir is {folder}, whose config.json is no run's; it needs a folder of its own"
        ) from error


def create_run(config: TrainConfig, stage: Stage) -> IO[str]:
    """Make the folder with its config.json, or clear a resumed one of what an interrupted save left.

    Returns the folder's lock; it is free again when the file is closed or the process ends, however it ends.

    Raises:
        ValueError: another run is at work in the folder.
    """
    folder = Path(config.run_dir)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    _take(lock, fcntl.LOCK_EX, folder)
    for stale in [*folder.glob("*.tmp"), *(folder / FOLDER).glob("*.tmp")]:
        discard(stale)
    if not (folder / "config.json").exists():
        resolved = {"stage": stage, "config": to_json(config), "environment": environment()}
        with whole_file(folder / "config.json", sync=True) as temporary:
            temporary.write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
    return lock


def _take(lock: IO[str], kind: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"--run-dir is {folder}, in which another run is at work; it needs a folder of its own"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--run-dir is {folder}; it needs a file system on which files can be locked (flock): {error.strerror}"
        ) from error


# ---------------------------------------------------------------------------------------------------- the result


def export(
    config: TrainConfig,
    model: AlignGPTForConditionalGeneration,
    weights: Mapping[str, Stored],
    processor: AlignGPTProcessor,
    world: World,
) -> None:
    """Write RUN/model one tensor at a time: trained weights gathered, frozen ones copied as they were read."""
    final = Path(config.run_dir) / "model"
    temporary = final.with_suffix(".tmp")
    try:
        _write_model(config, model, weights, processor, world, temporary)
    except (OSError, SafetensorError) as error:
        discard(temporary)
        raise SaveError(
            f"--run-dir is {config.run_dir}, where the model could not be written ({error}); the last checkpoint is "
            "whole, and the same command writes the model from it"
        ) from error
    if world.rank == 0:
        _put_in_place(temporary, final)
    world.add(0)


def _write_model(
    config: TrainConfig,
    model: AlignGPTForConditionalGeneration,
    weights: Mapping[str, Stored],
    processor: AlignGPTProcessor,
    world: World,
    folder: Path,
) -> None:
    dtype = DTYPES[config.export_dtype]
    if world.rank == 0:
        folder.mkdir()
    entries: list[lora.Entry] = []
    for parameter, names in tied_names(model).items():
        if parameter.requires_grad:
            entries.append((names[0], tuple(parameter.shape), dtype, functools.partial(whole, parameter)))
        else:
            stored = weights[next(name for name in names if name in weights)]
            read = stored.read if world.rank == 0 else _nothing
            entries.append((names[0], stored.shape, stored.dtype, read))
    if config.lora.rank:
        _export_adapters(config, model, world)
        entries = lora.merged(model, entries, dtype, write=world.rank == 0)
    write_weights(folder, entries, write=world.rank == 0)
    if world.rank == 0:
        set_dtype(model.config, dtype)
        # Not type(model): fully_shard gives the model a class of its own.
        model.config.architectures = [AlignGPTForConditionalGeneration.__name__]
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_card(folder, model.config, processor, origin=f"Written by a training run of aligngpt {__version__}.")
        for name in ("generation_config.json", "tokenizer.model"):
            source = Path(config.model.init or config.model.llm) / name
            if source.is_file():
                shutil.copy(source, folder)


def _export_adapters(config: TrainConfig, model: AlignGPTForConditionalGeneration, world: World) -> None:
    final = Path(config.run_dir) / "adapter"
    temporary = final.with_suffix(".tmp")
    lora.save_adapters(model, temporary, base=config.model.init or config.model.llm, write=world.rank == 0)
    if world.rank == 0:
        discard(final)
        _put_in_place(temporary, final)


def _put_in_place(temporary: Path, final: Path) -> None:
    for path in (*temporary.iterdir(), temporary):
        sync_to_disk(path)
    os.replace(temporary, final)
    sync_to_disk(final.parent)


def _nothing() -> Tensor:
    return torch.empty(0)
