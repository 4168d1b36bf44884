"""The run folder: what a run is, checkpoints it goes on from, and the model it leaves.

    RUN/config.json                    {"config": …, "stage": …, "environment": …}, written once a batch is there
    RUN/metrics.jsonl                  a line a step
    RUN/lock                           held by the run that is at work
    RUN/checkpoints/step-00000500/     sharded: trained weights and AdamW's moments, torch.distributed.checkpoint
    RUN/LATEST                         name of the checkpoint to go on from
    RUN/model/                         the result: safetensors, config and processor, for `from_pretrained`

Every folder is written under a name ending in .tmp and renamed when it is whole; LATEST changes after that. A
checkpoint needs no random state, position or schedule beside its step: sample order, learning rate and random streams
are computed from (seed, step). DCP's metadata is a pickle: checkpoints are for resuming one's own run, RUN/model is for
exchange.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from aligngpt.checkpoint import write_weights
from aligngpt.data.tables import whole_file
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.processor import AlignGPTProcessor
from training.config import Stage, TrainConfig, differences, environment, flat, to_json
from training.sharding import Stored, World, set_dtype, tied_names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What a config.json from before these fields means: all its runs were like this.
_ADDED_LATER = {"data.decoder": "pil", "data.levels_hash": "", "data.hardware_decoder": 0.0}


# ---------------------------------------------------------------------------------------------------- the folder


def steps_done(config: TrainConfig) -> int | None:
    """The step of the checkpoint that a run in this folder goes on from, 0 for a new one; None: it is finished.

    Raises:
        ValueError: the folder holds something else, another run (the message lists what differs), or a run where
            `--no-resume` was given.
    """
    folder = Path(config.run_dir)
    if not folder.exists():
        existing = next(parent for parent in folder.parents if parent.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise ValueError(f"--run-dir is {folder}; {existing} needs to be a folder that can be written to")
        return 0
    if not folder.is_dir():
        raise ValueError(f"--run-dir is {folder}, a file; it needs a folder of its own")
    if not (folder / "config.json").is_file():
        if any(item.name not in ("checkpoints", "lock") for item in folder.iterdir()):
            raise ValueError(f"--run-dir is {folder}, which holds other files; it needs an empty or a new folder")
        return 0
    theirs = recorded(folder)
    if not config.resume:
        raise ValueError(f"--run-dir is {folder}, which already holds a run; it needs a new folder, or --resume")
    different = differences(to_json(config), theirs)
    if different:
        raise ValueError(
            f"--run-dir is {folder}, which holds a run with another config; it needs the same one to go on. "
            f"What differs: {'; '.join(different)}"
        )
    if (folder / "model").is_dir():
        return None
    latest = folder / "LATEST"
    if not latest.is_file():
        return 0
    return _step_of(latest.read_text(encoding="utf-8").strip())


def recorded(folder: Path) -> dict[str, Any]:
    """The config, under dotted names, of the run that a folder's config.json describes.

    Raises:
        ValueError: config.json is something else.
    """
    try:
        return _ADDED_LATER | flat(json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"])
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
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"--run-dir is {folder}, in which another run is at work; it needs a folder of its own"
        ) from error
    for stale in [*folder.glob("*.tmp"), *folder.glob("checkpoints/*.tmp")]:
        _remove(stale)
    if not (folder / "config.json").exists():
        resolved = {"stage": stage, "config": to_json(config), "environment": environment()}
        _write(folder / "config.json", json.dumps(resolved, indent=2) + "\n")
    return lock


# ---------------------------------------------------------------------------------------------------- checkpoints


def save(config: TrainConfig, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Write the checkpoint after `step` steps; all processes take part. Old ones go when it is in place."""
    folder = Path(config.run_dir) / "checkpoints"
    final = folder / f"step-{step:08d}"
    temporary = final.with_suffix(".tmp")
    dcp.save(_state(model, optimizer), checkpoint_id=temporary)
    world.add(0)
    if world.rank == 0:
        _remove(final)
        os.replace(temporary, final)
        _write(Path(config.run_dir) / "LATEST", final.name + "\n")
        kept = sorted(folder.glob("step-*[0-9]"))
        later = [path for path in kept if path.name > final.name]  # of a run that went on from an earlier checkpoint
        for old in later + kept[: len(kept) - len(later)][: -config.keep_last]:
            _remove(old)
    world.add(0)


def load(config: TrainConfig, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint of `step` into model and optimizer; any number of processes may read it.

    Raises:
        ValueError: LATEST names a checkpoint that is not there.
    """
    folder = Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"
    if not folder.is_dir():
        raise ValueError(f"{config.run_dir}/LATEST names {folder.name}; {folder} is not there")
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)  # into the weights themselves
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_OPTIONS)


_OPTIONS = StateDictOptions(ignore_frozen_params=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad},
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_OPTIONS),
    }


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
    dtype = DTYPES[config.export_dtype]
    if world.rank == 0:
        temporary.mkdir()
    entries: list[tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]] = []
    for parameter, names in tied_names(model).items():
        if parameter.requires_grad:
            assert isinstance(parameter, DTensor), f"{names[0]} is not sharded"
            entries.append((names[0], tuple(parameter.shape), dtype, parameter.full_tensor))
        else:
            stored = weights[next(name for name in names if name in weights)]
            read = stored.read if world.rank == 0 else _nothing
            entries.append((names[0], stored.shape, stored.dtype, read))
    write_weights(temporary, entries, write=world.rank == 0)
    if world.rank == 0:
        set_dtype(model.config, dtype)
        model.config.architectures = [type(model).__mro__[1].__name__]  # fully_shard put a class of its own in front
        model.config.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        generation = Path(config.model.init or config.model.llm) / "generation_config.json"
        if generation.is_file():
            shutil.copy(generation, temporary)
        os.replace(temporary, final)
    world.add(0)


def _nothing() -> Tensor:
    return torch.empty(0)


def _step_of(name: str) -> int:
    if not name.startswith("step-") or not name[5:].isdigit():
        raise ValueError(f"LATEST holds {name!r}; it needs the name of a checkpoint, step-<number>")
    return int(name[5:])


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
