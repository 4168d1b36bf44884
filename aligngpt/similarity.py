"""How well pictures and words agree: a model of type clip or siglip, and the cosine of its two embeddings.

A pair is a sample with an image; its text is what the assistant says, turns joined by a blank. The cosine is taken in
fp32; where a sample has several images, its score is the mean of their cosines.

Text and images are prepared as the model was trained, from its folder's own files: CLIP cuts out the centre and reads
texts of any length up to its limit, SigLIP stretches the image and always reads its full length of tokens, padded. A
siglip with Gemma's tokenizer is a SigLIP 2 of fixed size, which was trained on small letters; it gets them. Special
tokens spelled in a text stay ordinary characters.

A pair that cannot be scored has a `problem` instead: an image that is missing or damaged, a text without words, a
record that cannot be read or learned from. Beyond rounding, scores don't depend on what else is in the batch.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from .batch import load_in_order
from .checkpoint import read_config
from .data.llava_json import Sample
from .data.records import Records
from .image import normalised, open_image, squared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
    dtype: torch.dtype  # of the model


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B pairs, of which G can be scored and have M images together."""

    places: list[int]  # (B,) in the data
    ids: list[str]  # (B,)
    truncated: list[bool]  # (B,)
    problems: list[str | None]  # (B,), None for those G
    token_ids: Tensor  # (G, L) int64
    attention_mask: Tensor  # (G, L) int64
    pixels: Tensor  # (M, 3, size, size) uint8
    owners: Tensor  # (M,) int64: which of the G an image belongs to


@dataclass(frozen=True, eq=False)
class Scores:
    """Rows of a part."""

    places: list[int]
    ids: list[str]
    scores: np.ndarray  # float32
    truncated: list[bool]
    problems: list[str | None]


# ---------------------------------------------------------------------------------------------------- the model


def load_model(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Preparation]:
    """A clip or siglip with both towers, in eval mode, and how its inputs are made.

    ValueError: another kind of model, weights that are missing or damaged, a pre-processing that is not one of the two
    known ones. `.bin` files go through PyTorch's tensor-only reader.
    """
    from transformers import AutoModel, AutoTokenizer, GemmaTokenizer

    config = read_config(Path(folder))
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise ValueError(f"{folder} holds a model of type {kind!r}; scoring needs one of {', '.join(_DEFAULTS)}")
    try:
        model, report = AutoModel.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, weights_only=True
        )
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{folder}: a file of weights is not whole, or not of plain tensors alone: {error}") from error
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
        dtype=dtype,
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


def model_revision(folder: str | os.PathLike[str]) -> str | None:
    """The commit on the Hugging Face Hub that a folder was downloaded from, None if the folder doesn't say.

    A snapshot of the Hub's cache has it as its name; `hf download --local-dir` notes it beside the files.
    """
    folder = Path(os.path.abspath(folder))
    note = folder / ".cache/huggingface/download/config.json.metadata"
    stated = ""
    if folder.parent.name == "snapshots":
        stated = folder.name
    elif note.is_file():
        stated = note.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    return stated if re.fullmatch("[0-9a-f]{40}", stated) else None


# ---------------------------------------------------------------------------------------------------- the pairs


def pair_text(sample: Sample) -> str:
    """The words that a sample's images are compared with."""
    return " ".join(turn.text for turn in sample.turns if turn.role == "assistant")


def batches_by_size(
    places: np.ndarray, num_characters: np.ndarray, num_images: np.ndarray, batch_size: int
) -> list[list[int]]:
    """Positions (pairs,) in the data, ordered by characters and cut where `batch_size` images are reached.

    num_characters, num_images: (records,) of all data; characters of all turns stand for those of the text, which is
    known without reading it. A pair with more images than that is a batch of its own.
    """
    batches: list[list[int]] = []
    room = 0
    for place in places[np.argsort(num_characters[places], kind="stable")].tolist():
        images = int(num_images[place])
        if not batches or images > room:
            batches.append([])
            room = batch_size
        batches[-1].append(place)
        room -= images
    return batches


class PairBatches(Dataset[PairBatch]):
    """A list of positions in the data to a batch; what is wrong with a pair becomes its `problem`."""

    def __init__(self, records: Records, preparation: Preparation):
        self.records = records
        self.preparation = preparation

    def __getitem__(self, places: list[int]) -> PairBatch:
        ids: list[str] = []
        problems: list[str | None] = []
        texts: list[str] = []  # of the pairs that can be scored
        pixels: list[Tensor] = []
        owners: list[int] = []
        for place in places:
            ids.append("")  # a record that cannot be read has no id
            try:
                sample = self.records[place]
                ids[-1] = sample.id
                if sample.problem:
                    raise ValueError(sample.problem)
                text = pair_text(sample)
                if not text.strip():
                    raise ValueError("the text has no words")
                images = [self._pixels(sample, number) for number in range(len(sample.images))]
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
            places=places,
            ids=ids,
            truncated=[problem is None and next(was_cut) for problem in problems],
            problems=problems,
            token_ids=token_ids,
            attention_mask=attention_mask,
            pixels=torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size, dtype=torch.uint8),
            owners=torch.tensor(owners, dtype=torch.int64),
        )

    def _pixels(self, sample: Sample, number: int) -> Tensor:
        how = self.preparation
        image = open_image(self.records.image(sample, number), name=sample.images[number])
        return squared(image, size=how.size, mean=how.mean, aspect=how.aspect, resample=how.resample)

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
    records: Records,
    batches: Iterable[list[int]],
    model: nn.Module,
    preparation: Preparation,
    *,
    workers: int = 0,
) -> Iterator[Scores]:
    """Rows for the samples at the places of each batch.

    model, preparation: of `load_model`; the model's device is where it runs.
    workers: processes that read images; with 0 they are read here.
    """
    for batch in load_in_order(PairBatches(records, preparation), batches, workers=workers):
        scores = np.full(len(batch.places), np.nan, dtype=np.float32)
        problems = list(batch.problems)
        good = [row for row, problem in enumerate(problems) if problem is None]
        if good:
            scores[good] = _cosines(model, batch, preparation)
        for row in good:
            if not np.isfinite(scores[row]):
                scores[row], problems[row] = np.nan, "the model's score is not finite"
        yield Scores(batch.places, batch.ids, scores, batch.truncated, problems)


@torch.inference_mode()
def _cosines(model: nn.Module, batch: PairBatch, how: Preparation) -> np.ndarray:
    """(G,) mean cosine of each pair's images with its text."""
    device = next(model.parameters()).device
    mask = {} if how.padded else {"attention_mask": batch.attention_mask.to(device)}
    pixels = normalised(batch.pixels.to(device), how.mean, how.std).to(how.dtype)
    features: Any = model  # both kinds have the two methods
    with torch.backends.cudnn.flags(allow_tf32=False):  # the patch embedding is a convolution: fp32 there too
        images = features.get_image_features(pixel_values=pixels).pooler_output
        texts = features.get_text_features(input_ids=batch.token_ids.to(device), **mask).pooler_output
    texts = texts.float()[batch.owners.to(device)]
    cosines = F.cosine_similarity(images.float(), texts, dim=-1).double().cpu().numpy()
    owners = batch.owners.numpy()
    return np.bincount(owners, weights=cosines) / np.bincount(owners)
