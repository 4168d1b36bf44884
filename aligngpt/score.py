"""`aligngpt score DATA`: how well each picture and its words agree, by a model of type clip or siglip.

A pair is a sample with an image; its text is what the assistant says, turns joined by a blank. The score is the cosine
of the model's two embeddings, in fp32; where a sample has several images, the mean of their cosines. Samples without
an image have no row.

    record      int64    position of the sample in the data, from 0
    id          string
    score       float32  NaN where there is none
    truncated   bool     the text was longer than the model reads (CLIP: 77 tokens) and was cut
    problem     string   why there is no score: an image that is missing or damaged, a text without words; else null

The file's metadata says which data (`data_hash`), which model (hashes of its weights and tokenizer) and how text and
images were prepared. Each is prepared as the model was trained, from its folder's own files: CLIP cuts out the centre
and reads texts of any length up to its limit, SigLIP stretches the image and always reads its full length of tokens,
padded. A siglip with Gemma's tokenizer is a SigLIP 2 of fixed size, which was trained on small letters; it gets them.
Special tokens spelled in a text stay ordinary characters.

Scores do not depend on the batch size beyond rounding. They are written in chunks beside the output; a scoring that
was interrupted goes on from its last whole chunk when the command is given again, and its file is then the same, byte
for byte, as if nothing had happened. Chunks that are damaged are scored again, and those of other data, another model
or another batch size are not used.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from . import __version__
from .batch import load_in_order
from .checkpoint import read_config
from .data.llava_json import Sample, image_path, read_llava_json
from .data.tables import data_hash, prepare_outputs, read_table, write_table
from .image import open_image, preprocess

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

PAIRS_PER_CHUNK = 8192  # at most this many are scored again after an interruption
_DEFAULTS: dict[str, dict[str, Any]] = {  # by model type, for a folder that has no preprocessor_config.json
    "clip": {
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        "do_center_crop": True,
    },
    "siglip": {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5), "do_center_crop": False},
}
_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Preparation:
    """How pairs become a model's input."""

    tokenizer: PreTrainedTokenizerBase
    text_length: int  # longer texts are cut to this many tokens
    padded: bool  # shorter ones are padded to it, and the padding is read too
    lower: bool  # texts are put into small letters
    pad_id: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    aspect: str
    resample: Image.Resampling


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B pairs, of which G can be scored and have M images together."""

    records: list[int]  # (B,)
    ids: list[str]  # (B,)
    truncated: list[bool]  # (B,)
    problems: list[str | None]  # (B,), None for those G
    token_ids: Tensor  # (G, L) int64
    attention_mask: Tensor  # (G, L) int64
    pixel_values: Tensor  # (M, 3, size, size) fp32
    owners: Tensor  # (M,) int64: which of the G an image belongs to


@dataclass(frozen=True, eq=False)
class Scores:
    """Rows of the scores file."""

    records: list[int]
    ids: list[str]
    scores: np.ndarray  # float32
    truncated: list[bool]
    problems: list[str | None]


# ---------------------------------------------------------------------------------------------------- the model


def load_model(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[nn.Module, Preparation]:
    """A clip or siglip with both towers, in fp32 and eval mode, and how its inputs are made.

    ValueError: another kind of model, weights that are missing, a pre-processing that is not one of the two known ones.
    """
    from transformers import AutoModel, AutoTokenizer, GemmaTokenizer

    config = read_config(Path(folder))
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise ValueError(f"{folder} holds a model of type {kind!r}; scoring needs one of {', '.join(_DEFAULTS)}")
    model, report = AutoModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ValueError(
            f"{folder} lacks {len(names)} weights, {names[0]} among them; scoring needs the whole {kind}, both towers"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    padded = kind == "siglip"
    if padded and tokenizer.pad_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no padding token; a siglip needs one, since it reads padding")
    preparation = Preparation(
        tokenizer=tokenizer,
        text_length=model.config.text_config.max_position_embeddings,
        padded=padded,
        lower=kind == "siglip" and isinstance(tokenizer, GemmaTokenizer),
        pad_id=tokenizer.pad_token_id or 0,
        **_image_preparation(folder, kind, model.config.vision_config.image_size),
    )
    return model.to(device).eval(), preparation


def _image_preparation(folder: str | os.PathLike[str], kind: str, size: int) -> dict[str, Any]:
    """What preprocessor_config.json says, as arguments of `aligngpt.image.preprocess`."""
    from transformers.image_processing_base import ImageProcessingMixin

    stated = dict(_DEFAULTS[kind])
    if any((Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        stated |= ImageProcessingMixin.get_image_processor_dict(folder)[0]
    sizes = set()
    for name in ("size", "crop_size") if stated["do_center_crop"] else ("size",):
        value = stated.get(name) or size
        sizes |= set(value.values()) if isinstance(value, dict) else {value}
    if sizes != {size}:
        raise ValueError(
            f"{folder}: preprocessor_config.json makes images of {', '.join(map(str, sorted(sizes)))} pixels; "
            f"the model's vision tower needs {size}, in every step"
        )
    return {
        "size": size,
        "mean": tuple(stated["image_mean"]),
        "std": tuple(stated["image_std"]),
        "aspect": "square" if stated["do_center_crop"] else "stretch",
        "resample": Image.Resampling(stated.get("resample", Image.Resampling.BICUBIC)),
    }


def model_hash(folder: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of a model folder's config, weights and tokenizer files, by name."""
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    tokenizer = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    hashes = {}
    for path in [folder / "config.json", *weights, *sorted(tokenizer)]:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


# ---------------------------------------------------------------------------------------------------- the pairs


def pair_text(sample: Sample) -> str:
    """The words that a sample's images are compared with."""
    return " ".join(turn.text for turn in sample.turns if turn.role == "assistant")


class PairBatches(Dataset[PairBatch]):
    """A list of positions in the data to a batch; what is wrong with a pair becomes its `problem`."""

    def __init__(self, samples: Sequence[Sample], image_folder: str | os.PathLike[str], preparation: Preparation):
        self.samples = samples
        self.image_folder = image_folder
        self.preparation = preparation

    def __getitem__(self, records: list[int]) -> PairBatch:
        problems: list[str | None] = []
        texts: list[str] = []  # of the pairs that can be scored
        pixels: list[Tensor] = []
        owners: list[int] = []
        for record in records:
            sample = self.samples[record]
            try:
                text = pair_text(sample)
                if not text.strip():
                    raise ValueError("the text has no words")
                images = [self._pixels(name) for name in sample.images]
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            problems.append(None)
            owners += [len(texts)] * len(images)
            pixels += images
            texts.append(text)
        token_ids, attention_mask, cut = self._tokens(texts)
        was_cut = iter(cut)
        size = self.preparation.size
        return PairBatch(
            records=records,
            ids=[self.samples[record].id for record in records],
            truncated=[problem is None and next(was_cut) for problem in problems],
            problems=problems,
            token_ids=token_ids,
            attention_mask=attention_mask,
            pixel_values=torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size),
            owners=torch.tensor(owners, dtype=torch.int64),
        )

    def _pixels(self, name: str) -> Tensor:
        how = self.preparation
        image = open_image(image_path(self.image_folder, name), name=name)
        return preprocess(image, size=how.size, mean=how.mean, std=how.std, aspect=how.aspect, resample=how.resample)

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor, list[bool]]:
        """Ids and mask (G, L), and which texts were cut."""
        how = self.preparation
        if not texts:
            return torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64), []
        # Cut by the tokenizer, which keeps its closing token: CLIP reads the text's embedding there.
        options = {"split_special_tokens": True, "verbose": False}
        if how.lower:
            texts = [text.lower() for text in texts]
        whole = how.tokenizer(texts, **options)["input_ids"]
        kept = how.tokenizer(texts, **options, truncation=True, max_length=how.text_length)["input_ids"]
        length = how.text_length if how.padded else max(map(len, kept))
        token_ids = torch.full((len(texts), length), how.pad_id)
        attention_mask = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, ids in enumerate(kept):
            token_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return token_ids, attention_mask, [len(ids) > how.text_length for ids in whole]


def score_pairs(
    samples: Sequence[Sample],
    image_folder: str | os.PathLike[str],
    model: nn.Module,
    preparation: Preparation,
    *,
    batch_size: int = 64,
    workers: int = 0,
    first: int = 0,
) -> Iterator[Scores]:
    """Rows for the samples that have an image, in order, a batch at a time.

    model, preparation: of `load_model`; the model's device is where it runs.
    workers: processes that read images; with 0 they are read here. first: batches that are left out at the start.
    """
    pairs = [record for record, sample in enumerate(samples) if sample.images]
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)][first:]
    for batch in load_in_order(PairBatches(samples, image_folder, preparation), batches, workers=workers):
        scores = np.full(len(batch.records), np.nan, dtype=np.float32)
        problems = list(batch.problems)
        good = [place for place, problem in enumerate(problems) if problem is None]
        if good:
            scores[good] = _cosines(model, batch, preparation.padded)
        for place in good:
            if not np.isfinite(scores[place]):
                scores[place], problems[place] = np.nan, "the model's score is not finite"
        yield Scores(batch.records, batch.ids, scores, batch.truncated, problems)


@torch.inference_mode()
def _cosines(model: nn.Module, batch: PairBatch, padded: bool) -> np.ndarray:
    """(G,) mean cosine of each pair's images with its text."""
    device = next(model.parameters()).device
    mask = {} if padded else {"attention_mask": batch.attention_mask.to(device)}
    with torch.backends.cudnn.flags(allow_tf32=False):  # the patch embedding is a convolution: fp32 there too
        found = model(input_ids=batch.token_ids.to(device), pixel_values=batch.pixel_values.to(device), **mask)
    texts = found.text_embeds[batch.owners.to(device)]
    cosines = F.cosine_similarity(found.image_embeds, texts, dim=-1).double().cpu().numpy()
    owners = batch.owners.numpy()
    return np.bincount(owners, weights=cosines) / np.bincount(owners)


# ---------------------------------------------------------------------------------------------------- the file


def write_scores(
    out: str | os.PathLike[str],
    samples: Sequence[Sample],
    image_folder: str | os.PathLike[str],
    model_folder: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
) -> pyarrow.Table:
    """Score all pairs into the Parquet file `out`, going on where an interrupted scoring stopped; returns its table.

    ValueError: what `load_model` refuses, or data without any image.
    """
    import pyarrow
    from tqdm import tqdm

    num_pairs = sum(bool(sample.images) for sample in samples)
    if not num_pairs:
        raise ValueError(f"the data has {len(samples)} samples and none with an image; scoring needs one at least")
    model, preparation = load_model(model_folder, device)
    metadata = _metadata(samples, model_folder, preparation, batch_size, device)
    batches_per_chunk = max(1, PAIRS_PER_CHUNK // batch_size)
    num_chunks = -(-num_pairs // (batches_per_chunk * batch_size))
    out = Path(out)
    chunks = out.with_name(out.name + ".chunks")
    done = _whole_chunks(chunks, metadata)
    rows = score_pairs(
        samples,
        image_folder,
        model,
        preparation,
        batch_size=batch_size,
        workers=workers,
        first=done * batches_per_chunk,
    )
    with tqdm(total=num_pairs, unit="pair", disable=None) as progress:
        progress.update(min(num_pairs, done * batches_per_chunk * batch_size))
        for chunk in range(done, num_chunks):
            parts = []
            for scores in islice(rows, batches_per_chunk):
                parts.append(_table(scores))
                progress.update(len(scores.ids))
            write_table(chunks / f"{chunk:06d}.parquet", pyarrow.concat_tables(parts), metadata)
    tables = [read_table(chunks / f"{chunk:06d}.parquet", "scores")[0] for chunk in range(num_chunks)]
    table = pyarrow.concat_tables(tables).combine_chunks()
    write_table(out, table, metadata)
    shutil.rmtree(chunks)
    return table


def _whole_chunks(folder: Path, metadata: dict[str, Any]) -> int:
    """How many chunks from the start can be gone on from; a folder of another scoring is emptied."""
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    while (path := folder / f"{done:06d}.parquet").is_file():
        try:
            if read_table(path, "scores")[1] != metadata:
                break
        except ValueError:  # damaged
            break
        done += 1
    kept = {f"{chunk:06d}.parquet" for chunk in range(done)}
    for path in folder.glob("*.parquet*"):
        if path.name not in kept:
            path.unlink()
    return done


def _table(scores: Scores) -> pyarrow.Table:
    import pyarrow

    return pyarrow.table(
        {
            "record": pyarrow.array(scores.records, pyarrow.int64()),
            "id": pyarrow.array(scores.ids, pyarrow.string()),
            "score": pyarrow.array(scores.scores, pyarrow.float32()),
            "truncated": pyarrow.array(scores.truncated, pyarrow.bool_()),
            "problem": pyarrow.array(scores.problems, pyarrow.string()),
        }
    )


def _metadata(
    samples: Sequence[Sample],
    folder: str | os.PathLike[str],
    how: Preparation,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "pillow", "numpy")
    return {
        "kind": "scores",
        "data": {"sha256": data_hash(samples), "samples": len(samples)},
        "model": {"folder": Path(folder).resolve().name, "sha256": model_hash(folder)},
        "text": {"tokens": how.text_length, "padded": how.padded, "lower": how.lower},
        "image": {
            "size": how.size,
            "aspect": how.aspect,
            "resample": how.resample.name.lower(),
            "mean": list(how.mean),
            "std": list(how.std),
        },
        "batch_size": batch_size,
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "versions": {"aligngpt": __version__} | {package: version(package) for package in packages},
    }


# ---------------------------------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt score`."""
    parser.add_argument("data", metavar="DATA", help="a LLaVA JSON file")
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="folder of a model of type clip or siglip, both towers"
    )
    parser.add_argument("--image-folder", required=True, metavar="DIR", help="what the data's image names start from")
    parser.add_argument("--out", required=True, metavar="FILE", help="the Parquet file to write")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pairs at a time (default 64)")
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes that read images (default 4, or as many as there are cores)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """`aligngpt score`: writes the file, then says in a few lines what is in it."""
    for flag, value, least in (("--batch-size", args.batch_size, 1), ("--workers", args.workers, 0)):
        if value < least:
            raise ValueError(f"{flag} is {value}; it needs a whole number of at least {least}")
    if not Path(args.image_folder).is_dir():
        raise ValueError(f"--image-folder is {args.image_folder}; it needs a folder that exists")
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise ValueError("--device is cuda, but PyTorch finds no GPU; it needs one, or --device cpu")
    device = ("cuda" if has_gpu else "cpu") if args.device == "auto" else args.device
    out = Path(args.out)
    prepare_outputs([("--out", args.out)], read=[args.data])

    samples = read_llava_json(args.data)
    table = write_scores(
        out,
        samples,
        args.image_folder,
        args.model,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
    )
    problems = [
        (record, id, problem)
        for record, id, problem in zip(*(table[name].to_pylist() for name in ("record", "id", "problem")), strict=True)
        if problem
    ]
    cut = sum(table["truncated"].to_pylist())
    print(f"{table.num_rows - len(problems)} pairs scored into {out}")
    if cut:
        print(f"{cut} of them have a text longer than the model reads; it was cut (column truncated)")
    if len(samples) > table.num_rows:
        print(f"{len(samples) - table.num_rows} samples without an image have no row")
    if problems:
        print(f"{len(problems)} pairs have no score (column problem):", file=sys.stderr)
        for record, id, problem in problems[:10]:
            print(f"  record {record} (id {id}): {problem}", file=sys.stderr)
        if len(problems) > 10:
            print("  …", file=sys.stderr)
    return 0
