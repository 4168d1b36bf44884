"""`aligngpt score DATA`: how well each picture and its words agree, by a model of type clip or siglip.

The score of a pair is a cosine (`aligngpt.similarity`). Samples without an image have no row.

    record      int64    position of the sample in the data, from 0
    id          string
    score       float32  NaN where there is none
    truncated   bool     the text was longer than the model reads (CLIP: 77 tokens) and was cut
    problem     string   why there is no score; else null

Rows go to a folder, in parts of `--chunk-size` pairs, and manifest.json last (`aligngpt.data.tables`): which data
(`data_hash`), which model (hashes of its files, its revision on the Hub where the folder says it), how text and images
were prepared, in which precision and on what kind of device.

The data alone says which pairs a part holds and which of them are a batch: pairs of about the same length, at most
`--batch-size` images together. `torchrun -m aligngpt score …` deals the parts out to its processes, on one machine or
on several that share the output folder; part c is for process c mod their number. A part is written whole when all its
pairs have a score, so a scoring that was killed goes on when the command is given again, with as many processes as one
likes: each repeats at most the part that it was in, and the folder is then the same, byte for byte, as if nothing had
happened. Parts that are damaged are scored again, and those without any score, after a wrong `--image-folder` for
example; a scoring without any is refused. A folder that was begun with other data, another model, another kind of
device (a CPU's number of threads included) or other settings is refused, because its bits would differ; so is one that
another scoring is writing to. Under torchrun a CPU has one thread unless OMP_NUM_THREADS says more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .data.records import Records, in_shards, open_records
from .data.tables import (
    MANIFEST,
    alone,
    differences,
    gone_if_empty,
    part_name,
    prepare_folder,
    read_manifest,
    read_part,
    read_table,
    table_file,
    versions,
    write_json,
    write_manifest,
    write_table,
)
from .similarity import (
    PRECISIONS,
    Preparation,
    Scores,
    batches_by_size,
    load_model,
    model_hash,
    model_revision,
    score_pairs,
)
from .team import Team, team

if TYPE_CHECKING:
    import pyarrow

_STARTED = "scoring.json"  # in the folder of a scoring that is not finished: the metadata of its parts


# ---------------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True, eq=False)
class Scoring:
    """All that a process needs to make a part."""

    folder: Path
    records: Records
    model: nn.Module
    preparation: Preparation
    about: dict[str, Any]  # the metadata of each part
    names: dict[str, dict[str, Any]]  # what the manifest says beyond it
    pairs: np.ndarray  # (pairs,) positions in the data of the samples with an image
    batch_size: int
    chunk_size: int

    @property
    def num_parts(self) -> int:
        return -(-len(self.pairs) // self.chunk_size)

    def places(self, part: int) -> np.ndarray:
        """Positions in the data of a part's pairs."""
        return self.pairs[part * self.chunk_size : (part + 1) * self.chunk_size]

    def is_whole(self, part: int) -> bool:
        """Whether a part is there, undamaged, of this scoring, and has a score.

        Checksums don't cover all of a Parquet file; writing what was read from it again does.
        """
        path = self.folder / part_name(part)
        if not path.is_file():
            return False
        try:
            table, _ = read_table(path, "scores")
            undamaged = table_file(table, self.about) == path.read_bytes()
            right = undamaged and np.array_equal(table["record"].to_numpy(), self.places(part))
        except (ValueError, KeyError):
            return False
        return right and table["problem"].null_count > 0


def start(
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    model_folder: str | os.PathLike[str],
    *,
    image_folder: str | os.PathLike[str] | None,
    precision: str,
    batch_size: int,
    chunk_size: int,
    device: torch.device,
) -> Scoring:
    """Open the data and the model. Arguments are the command's options.

    ValueError: what `open_records` and `load_model` refuse, or data without any image.
    """
    records = open_records(data, image_folder)
    num_images = records.num_images
    if not num_images.any():
        raise ValueError(f"{data} has {len(records)} samples and none with an image; scoring needs one at least")
    model, how = load_model(model_folder, device, dtype=PRECISIONS[precision])
    about: dict[str, Any] = {
        "kind": "scores",
        "data": {"sha256": records.sha256, "samples": len(records)},
        "model": {"sha256": model_hash(model_folder)},
        "text": {"tokens": how.text_length, "padded": how.padded, "lower": how.lower},
        "image": {
            "size": how.size,
            "aspect": how.aspect,
            "resample": how.resample.name.lower(),
            "mean": list(how.mean),
            "std": list(how.std),
        },
        "precision": precision,
        "batch_size": batch_size,
        "chunk_size": chunk_size,
        "device": _device_name(device),
        **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),
        "versions": versions("torch", "transformers", "tokenizers", "pillow", "numpy", "pyarrow"),
    }
    names: dict[str, dict[str, Any]] = {
        "data": {"name": Path(data).resolve().name},
        "model": {"folder": Path(model_folder).resolve().name, "revision": model_revision(model_folder)},
    }
    pairs = np.flatnonzero(num_images)
    return Scoring(Path(folder), records, model, how, about, names, pairs, batch_size, chunk_size)


def _device_name(device: torch.device) -> str:
    """What a result's last bits may depend on."""
    if device.type == "cpu":
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device)


def claim_folder(scoring: Scoring) -> bool:
    """Say in the folder which scoring it is for; whether that is finished already.

    ValueError: it holds another scoring. Done by one process, `alone` there, before `check_folder` in all.
    """
    folder = scoring.folder
    finished = (folder / MANIFEST).is_file()
    found = _found(folder)
    if found is not None and (differing := differences(scoring.about, found)):
        needs = "it needs a folder of its own"
        if len(differing) == 1 and differing[0].startswith("threads "):
            needs = f"OMP_NUM_THREADS={found['threads']} goes on with these"
        raise ValueError(f"--out {folder} holds scores that were made otherwise: {', '.join(differing)}; {needs}")
    for path in folder.glob("part-*.tmp"):  # half a part of a process that was killed
        path.unlink(missing_ok=True)
    if finished:
        (folder / _STARTED).unlink(missing_ok=True)
    else:
        write_json(folder / _STARTED, scoring.about, indent=1)
    return finished


def _found(folder: Path) -> dict[str, Any] | None:
    """What the folder's scoring says of itself; None: there is none."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    if (folder / _STARTED).is_file():
        return _read_started(folder)
    parts = sorted(folder.glob("part-*.parquet"))
    for path in parts:
        with suppress(ValueError):
            return read_table(path, "scores", [])[1]
    if parts:
        raise ValueError(f"--out {folder} holds {parts[0].name}, which is of no scoring; it needs a folder of its own")
    return None


def check_folder(scoring: Scoring) -> None:
    """ValueError where this process doesn't see the folder that `claim_folder` made, or would score otherwise."""
    folder = scoring.folder
    if not any((folder / name).is_file() for name in (_STARTED, MANIFEST)):
        raise ValueError(f"--out {folder} is not the folder that the first process sees; machines need to share it")
    if differing := differences(scoring.about, _found(folder) or {}):
        raise ValueError(f"it differs from the first process: {', '.join(differing)}; all need the same")


def _read_started(folder: Path) -> dict[str, Any]:
    path = folder / _STARTED
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, parts that fit are kept") from error
    return found if isinstance(found, dict) else {}


def write_parts(
    scoring: Scoring, parts: Sequence[int], *, workers: int, go_on: Callable[[int], bool] = lambda pairs: True
) -> None:
    """Score these parts. `go_on` is told after each batch how many pairs it had, and says whether to."""
    import pyarrow

    records, num_characters, num_images = scoring.records, scoring.records.num_characters, scoring.records.num_images
    batches = (
        batch
        for part in parts
        for batch in batches_by_size(scoring.places(part), num_characters, num_images, scoring.batch_size)
    )
    rows = score_pairs(records, batches, scoring.model, scoring.preparation, workers=workers)
    for part in parts:
        missing, tables = len(scoring.places(part)), []
        while missing:
            scores = next(rows)
            tables.append(_table(scores))
            missing -= len(scores.places)
            if not go_on(len(scores.places)):
                return
        table = pyarrow.concat_tables(tables).sort_by("record").combine_chunks()
        write_table(scoring.folder / part_name(part), table, scoring.about)


def _table(scores: Scores) -> pyarrow.Table:
    import pyarrow

    return pyarrow.table(
        {
            "record": pyarrow.array(scores.places, pyarrow.int64()),
            "id": pyarrow.array(scores.ids, pyarrow.string()),
            "score": pyarrow.array(scores.scores, pyarrow.float32()),
            "truncated": pyarrow.array(scores.truncated, pyarrow.bool_()),
            "problem": pyarrow.array(scores.problems, pyarrow.string()),
        }
    )


def finish(scoring: Scoring) -> dict[str, Any]:
    """Write the manifest, once all parts are there."""
    manifest = write_manifest(scoring.folder, scoring.about, scoring.num_parts, scoring.names)
    names = {part["file"] for part in manifest["parts"]}
    for path in scoring.folder.glob(f"part-{'[0-9]' * 6}.parquet"):
        if path.name not in names:
            path.unlink()
    (scoring.folder / _STARTED).unlink(missing_ok=True)
    return manifest


def lost_parts(scoring: Scoring, parts: Sequence[int]) -> list[int]:
    """Which of these parts of a finished scoring are not there, or not as its manifest says."""
    manifest, lost = read_manifest(scoring.folder), []
    for part in parts:
        try:
            read_part(scoring.folder, manifest, part, [])
        except ValueError:
            lost.append(part)
    return lost


def reopen(scoring: Scoring) -> None:
    """Make a finished scoring one to go on with."""
    write_json(scoring.folder / _STARTED, scoring.about, indent=1)
    (scoring.folder / MANIFEST).unlink()


# ---------------------------------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt score`."""
    parser.add_argument("data", metavar="DATA", help="a LLaVA JSON file, the same as JSON lines, or a folder of shards")
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="folder of a model of type clip or siglip, both towers"
    )
    parser.add_argument(
        "--image-folder", metavar="DIR", help="what the data's image names start from; shards hold their images"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write parts and manifest.json to")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default 64)")
    parser.add_argument(
        "--chunk-size", type=int, default=8192, metavar="N",
        help="pairs in a part, which are scored again at most after an interruption (default 8192)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that read images, for each process that scores (default 4, or as many as there are cores)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU"
    )


def run(args: argparse.Namespace) -> int:
    """`aligngpt score`: fills the folder, then says in a few lines what is in it."""
    with gone_if_empty(args.out), team() as everyone, ExitStack() as lock:
        manifest, scored_now = _run(args, everyone, lock)
    if everyone.rank == 0:
        _say(Path(args.out), manifest, scored_now)
    return 0


def _run(args: argparse.Namespace, everyone: Team, lock: ExitStack) -> tuple[dict[str, Any], bool]:
    """The manifest ({} in all processes but the first), and whether anything was scored now."""
    is_first = everyone.rank == 0
    scoring = everyone.agree(lambda: _started(args, everyone))
    everyone.agree(lambda: lock.enter_context(alone("--out", scoring.folder)) if is_first else None)
    finished = everyone.gather(everyone.agree(lambda: is_first and claim_folder(scoring)))[0]
    everyone.agree(lambda: check_folder(scoring))
    mine = range(everyone.rank, scoring.num_parts, everyone.size)
    if finished:
        if not any(everyone.gather(everyone.agree(lambda: lost_parts(scoring, mine)))):
            return read_manifest(scoring.folder) if is_first else {}, False
        everyone.agree(lambda: reopen(scoring) if is_first else None)
    todo = everyone.agree(lambda: [part for part in mine if not scoring.is_whole(part)])
    everyone.agree(lambda: _write_mine(scoring, todo, args.workers, everyone))
    return everyone.agree(lambda: finish(scoring) if is_first else {}), True


def _started(args: argparse.Namespace, everyone: Team) -> Scoring:
    for flag, value, least in (
        ("--batch-size", args.batch_size, 1),
        ("--chunk-size", args.chunk_size, 1),
        ("--workers", args.workers, 0),
    ):
        if value < least:
            raise ValueError(f"{flag} is {value}; it needs a whole number of at least {least}")
    if not in_shards(args.data) and not (args.image_folder and Path(args.image_folder).is_dir()):
        raise ValueError(f"--image-folder is {args.image_folder}; it needs a folder that exists")
    device = everyone.device(args.device)
    read = [args.data, args.model, *([args.image_folder] if args.image_folder else [])]
    prepare_folder("--out", args.out, read)
    if everyone.rank:
        from transformers.utils import logging

        logging.disable_progress_bar()
    return start(
        args.data,
        args.out,
        args.model,
        image_folder=args.image_folder,
        precision={"auto": "fp32" if device.type == "cpu" else "bf16"}.get(args.precision, args.precision),
        batch_size=args.batch_size,
        chunk_size=args.chunk_size,
        device=device,
    )


def _write_mine(scoring: Scoring, parts: Sequence[int], workers: int, everyone: Team) -> None:
    """A process's share, with a bar in the first one."""
    from tqdm import tqdm

    pairs = sum(len(scoring.places(part)) for part in parts)
    label = "its pairs of the first process" if everyone.size > 1 else None
    with tqdm(total=pairs, unit="pair", desc=label, disable=True if everyone.rank else None) as progress:

        def go_on(done: int) -> bool:
            progress.update(done)
            return not everyone.failed

        try:
            write_parts(scoring, parts, workers=workers, go_on=go_on)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--batch-size is {scoring.batch_size}, for which the GPU's memory is too small; it needs fewer"
            ) from error


def _say(folder: Path, manifest: dict[str, Any], scored_now: bool) -> None:
    def count(number: int, noun: str) -> str:
        return f"{number} {noun}{'' if number == 1 else 's'}"

    rows, problems, cut = manifest["rows"], manifest["problems"], manifest["text"]["truncated"]
    print(f"{count(rows - problems, 'pair')} scored into {folder}{'' if scored_now else ', finished already'}")
    if cut:
        print(f"{count(cut, 'text')} cut, being longer than the model reads (column truncated)")
    if manifest["data"]["samples"] > rows:
        print(f"{count(manifest['data']['samples'] - rows, 'sample')} without an image, so without a row")
    if problems:
        print(f"{count(problems, 'pair')} without a score (column problem):", file=sys.stderr)
        for row in itertools.islice(_problems(folder, manifest), 10):
            print(f"  record {row['record']} (id {row['id']}): {row['problem']}", file=sys.stderr)
        if problems > 10:
            print("  …", file=sys.stderr)
        print(f"to score them again, remove {folder}", file=sys.stderr)


def _problems(folder: Path, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows without a score."""
    for part in range(len(manifest["parts"])):
        table = read_part(folder, manifest, part, ["record", "id", "problem"])
        yield from (row for row in table.to_pylist() if row["problem"] is not None)
