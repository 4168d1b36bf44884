"""`aligngpt convert SOURCE OUT`: models between the layouts that people have them in.

    aligngpt    our folder: nested config.json, safetensors, processor
    public      the folder of the public AlignGPT code: flat config.json, the tower's name, tokenizer.model
    stage-1     the file that the public code's first stage leaves, mm_projector_align.bin: projector and table
    llava       LLaVA-1.5 in transformers, `LlavaForConditionalGeneration`

What SOURCE is shows in its files, never in its name. Everything passes through our config and our names: a source is
read into a `Model`, whose weights are still on the disk, and a target says which name, shape and type each of them
gets. Then names, shapes and free space are checked, and only then is anything written, a shard at a time, into
a hidden folder beside OUT, which becomes OUT when it is whole and on the disk.

Weights are copied bit by bit unless a type is asked for. Some are new where the source has none: table and gate of a
LLaVA and the gate of a stage-1 file are drawn from `--seed`, as at the beginning of training; and where LLaVA needs a
row for its image token the vocabulary grows to a multiple of 64. New rows are the mean of the others, so that a new
token's logit is the mean of all logits and never above the largest.

Refused with a `ValueError`, before anything is written: an OUT that exists, a folder that brings code or pickles
anything but tensors, quantised weights, weights that are missing, left over or of another shape (the message lists
them), and a model that the target cannot hold, with the reason. What a target holds but its readers treat otherwise is
said on standard error.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from .checkpoint import refuse_code, write_weights
from .config import ALIGN_MODES
from .convert_sources import KINDS, READERS, Entry, Kind, Options, recognised
from .convert_targets import TARGETS, stage_1_file
from .data.tables import sync_to_disk, whole_file
from .text import TEMPLATES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SHARD_BYTES = 2**30
# What transformers trips over where a JSON file holds something else than it should.
_MISREAD = (
    json.JSONDecodeError,
    UnicodeDecodeError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    StrictDataclassError,
)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Kind = "aligngpt",
    options: Options | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write what `source` holds to `out` in another layout; returns what its user should know, a sentence each.

    The process holds a shard, or the largest tensor where that is more, never the model.
    """
    source, out, options = Path(source), Path(out), options or Options()
    if out.exists() or out.is_symlink():
        raise ValueError(f"OUT is {out}, which exists; it needs a new name")
    kind = recognised(source)
    for folder in (source, options.llm, options.tower):
        if folder is not None and folder.is_dir():
            refuse_code(folder)
    try:
        model = READERS[kind](source, options)
    except _MISREAD as error:
        folders = " or ".join(str(folder) for folder in (source, options.llm, options.tower) if folder is not None)
        raise ValueError(
            f"a JSON file of {folders} is damaged or holds what no such model has ({type(error).__name__}: {error})"
        ) from error
    if to == "stage-1":
        content = stage_1_file(model, options)
        _check_space(out, len(content))
        with _said_when_full(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(out, sync=True) as temporary:
                temporary.write_bytes(content)
        return [*model.notes, "only projector and table are in it: no gate, no LLM, no tower"]
    target = TARGETS[to](model, options)
    total = sum(dtype.itemsize * torch.Size(shape).numel() for _, shape, dtype, _ in target.entries)
    _check_space(out, total)
    with _whole_folder(out) as folder, tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        write_weights(folder, [_counted(entry, bar) for entry in target.entries], max_shard_bytes=max_shard_bytes)
        target.finish(folder)
    return model.notes + target.notes


def _counted(entry: Entry, bar: Any) -> Entry:
    """The entry, shown on a progress bar once it is made."""
    name, shape, dtype, make = entry

    def made() -> Tensor:
        tensor = make()
        bar.update(tensor.nbytes)
        return tensor

    return name, shape, dtype, made


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into; it becomes OUT when all went well and is removed when not.

    What a killed conversion to the same OUT left is removed. ValueError: another conversion is writing it.
    """
    temporary = out.with_name(f".{out.name}.converting")
    with _said_when_full(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"OUT is {out}, which another conversion is writing; it needs a new name") from error
            try:
                for stale in temporary.iterdir():
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
                yield temporary
                for path in (*temporary.iterdir(), temporary):
                    sync_to_disk(path)
                os.rename(temporary, out)
                sync_to_disk(out.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        finally:
            os.close(lock)


@contextmanager
def _said_when_full(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"OUT is {out}, which could not be written ({error}); nothing of it is left") from error


def _check_space(out: Path, num_bytes: int) -> None:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise ValueError(
            f"OUT is {out}; it needs {num_bytes / 1e9:.1f} GB, and {existing} has {free / 1e9:.1f} GB left"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt convert`."""
    parser.add_argument("source", metavar="SOURCE", help="a model folder, or a stage-1 file of the public code")
    parser.add_argument("out", metavar="OUT", help="the folder to write, or the file with --to stage-1; must not exist")
    parser.add_argument(
        "--to",
        choices=get_args(Kind),
        default="aligngpt",
        help="layout of OUT: aligngpt (ours, the default), public (the public AlignGPT code's), stage-1 (that code's "
        "mm_projector_align.bin), llava (LLaVA-1.5 in transformers, from models with align_mode none)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    parser.add_argument(
        "--llm",
        metavar="DIR",
        help="the LLM's folder: for a stage-1 file, and where SOURCE lacks tokenizer or tokenizer.model",
    )
    parser.add_argument(
        "--vision",
        metavar="X",
        help="the vision tower's folder: for a stage-1 file, and for a public folder that names an unknown one; with "
        "--to public what OUT names, a folder or a name on the hub",
    )
    parser.add_argument(
        "--align-mode", choices=ALIGN_MODES, help="of a LLaVA: none, the same model (default); others begin AlignGPT"
    )
    parser.add_argument("--num-levels", type=int, metavar="N", help="of a LLaVA: rows of the new table (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws new table and gate (default 0)")
    parser.add_argument(
        "--template", choices=TEMPLATES, help="of prompts (default: as stored; plain after stage 1; v1)"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=MAX_SHARD_BYTES / 2**30, metavar="G", help="GiB of a file (default 1)"
    )


def run(args: argparse.Namespace) -> int:
    """`aligngpt convert`: one line on standard output, what to know on standard error."""
    from transformers.utils import logging

    if not 0 < args.max_shard_gb < math.inf:
        raise ValueError(f"--max-shard-gb is {args.max_shard_gb}; it needs to be a number above 0")
    if args.llm is not None and not Path(args.llm).is_dir():
        raise ValueError(f"--llm is {args.llm}, which is no folder")
    logging.set_verbosity_error()  # what a source's config says in an old way is no concern of the user's
    warnings.simplefilter("ignore", FutureWarning)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    options = Options(
        llm=None if args.llm is None else Path(args.llm),
        vision=args.vision,
        align_mode=args.align_mode,
        num_levels=args.num_levels,
        seed=args.seed,
        template=args.template,
        dtype=DTYPES.get(args.dtype),
    )
    notes = convert(args.source, args.out, to=args.to, options=options, max_shard_bytes=int(args.max_shard_gb * 2**30))
    for note in notes:
        print(f"aligngpt convert: {note}", file=sys.stderr)
    out = Path(args.out)
    files = [out] if out.is_file() else list(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{out}: {KINDS[args.to]}, {size / 1e9:.2f} GB in {len(files)} files")
    return 0
