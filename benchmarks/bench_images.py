"""Picture files to batches of pixels: training's loader, with DALI and with PIL, against a PyTorch `DataLoader` with
PIL and CLIP's image processor; with DALI on the GPU where one is.

JPEG photos of 640 × 480 on disk become batches of pixels on the device, padded to squares or with the centre cut out.

    PIL + DataLoader   PIL opens and pads (as LLaVA does), transformers' processor does one picture at a time
    ours, DALI         `training.loader.micro_batches`, half the workers: they read and screen, a thread of this process
                       decodes
    ours, PIL          the same with `--data.decoder pil`: the workers decode

With as many workers as the process has cores, MOST_WORKERS at most. Ours make whole batches, captions tokenised. Each
call reads all files and has its workers begin and end.

First and last batch of a call are compared with what the peer makes of the same files without workers: our PIL path and
the peer must agree to the bit, DALI within the bounds of training/dali_pipeline.py; and none may lose a picture.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from aligngpt.data.llava_json import Sample
from aligngpt.data.records import RecordList
from aligngpt.processor import AlignGPTImageProcessor, AlignGPTProcessor
from aligngpt.text import Turn
from benchmarks.case import OURS_FACTOR, Case, Contender
from benchmarks.measure import Outputs, Run, count_syncs
from training.dali_pipeline import why_not_dali
from training.loader import Cut, Part, Samples, micro_batches

MOST_WORKERS = 8
LARGEST_APART, MEAN_APART = 4 / 255, 0.25 / 255  # of DALI's pixels, before they are normalised
BY_DALI, BY_PIL, PEER = "ours, DALI", "ours, PIL", "PIL + DataLoader"


class Peer(Dataset[Tensor]):
    """One file to (3, size, size), as a user of PIL and transformers writes it."""

    def __init__(self, paths: list[Path], aspect: str, size: int):
        self.paths = paths
        self.aspect = aspect
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=False
        )
        self.colour = tuple(int(channel * 255) for channel in self.processor.image_mean)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        image = Image.open(self.paths[number]).convert("RGB")
        if self.aspect == "pad" and image.width != image.height:
            side = max(image.size)
            canvas = Image.new("RGB", (side, side), self.colour)
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


@dataclass(frozen=True, eq=False)
class Files:
    """The inputs of a case. The files are there as long as this is."""

    paths: list[Path]
    peer: Peer
    processor: AlignGPTImageProcessor
    batch: int
    device: torch.device
    expected: Tensor  # first and last batch (2 · batch, 3, size, size)


def make(device: torch.device, aspect: str, size: int, batch: int, batches: int) -> Files:
    folder = Path(tempfile.mkdtemp(prefix="bench-images-"))
    different = batch + batch // 2  # photos, so that the last batch is not the first one
    for number in range(different):
        photo(number).save(folder / f"{number}.jpg", quality=90)
    paths = [folder / f"{number % different}.jpg" for number in range(batches * batch)]
    peer = Peer(paths, aspect, size)
    shown = [*range(batch), *range(len(paths) - batch, len(paths))]
    expected = torch.stack([peer[number] for number in shown])
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    files = Files(paths, peer, AlignGPTImageProcessor(size, image_aspect_ratio=aspect), batch, device, expected)
    weakref.finalize(files, shutil.rmtree, folder, ignore_errors=True)
    return files


def photo(number: int) -> Image.Image:
    y, x = np.mgrid[:480, :640]
    waves = np.stack([127 + 80 * np.sin(x / (5 + number) + y / (90 - channel)) for channel in range(3)], -1)
    waves += np.random.default_rng(number).normal(0, 10, waves.shape)
    return Image.fromarray(np.clip(waves, 0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------ contenders


def workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def read_by(batches: Callable[[Files], Iterable[Tensor]], files: Files) -> Run:
    def run() -> Outputs:
        rest = iter(batches(files))
        first = last = next(rest)
        count = len(first)
        for last in rest:
            count += len(last)
        return [first, last, torch.tensor(count)]

    return run


def by_peer(files: Files) -> Iterator[Tensor]:
    loader = DataLoader(files.peer, batch_size=files.batch, num_workers=workers())
    return (pixels.to(files.device) for pixels in loader)


def by_ours(files: Files, *, dali: bool) -> Iterator[Tensor]:
    data = samples(files, dali)
    starts = range(0, len(files.paths), files.batch)
    plan = [Part(0, list(range(start, start + files.batch))) for start in starts]
    number = max(workers() // 2, 1) if dali else workers()
    for loaded in micro_batches(data, plan, workers=number, device=files.device, prefetch=2):
        assert loaded.batches is not None
        yield loaded.batches[0].pixel_values.to(files.device)


def samples(files: Files, dali: bool) -> Samples:
    """A caption of one word for each file, tokenised as in stage 1."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "waves"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    records = [
        Sample(str(record), (path.name,), (Turn("user", "<image>"), Turn("assistant", "waves")), None, record)
        for record, path in enumerate(files.paths)
    ]
    processor = AlignGPTProcessor(files.processor, tokenizer, template="plain")
    data = RecordList(records, files.paths[0].parent)
    cut = Cut(per_device=files.batch)
    return Samples(data, processor, levels=None, num_levels=8, seed=0, cut=cut, decode_by_dali=dali)


# ------------------------------------------------------------------------------------------------ what is right


def apart(files: Files, outputs: Outputs, *, to_the_bit: bool) -> Outputs:
    """How far the pixels of a batch are off before they are normalised, at the most and a picture's mean; how many are
    off though none may be; and how many pictures there were."""
    first, last, count = outputs
    pixels = torch.cat((first, last)).cpu().double()
    std = torch.tensor(files.processor.image_std, dtype=torch.float64)[:, None, None]
    off = ((pixels - files.expected.double()) * std).abs()
    wrong = int((off > 0).sum()) if to_the_bit else 0
    return [off.max(), off.flatten(1).mean(1).max(), torch.tensor(float(wrong)), count.double()]


def none_apart(files: Files) -> Outputs:
    return _bounds(0.0, 0.0, files)


def allowed_apart(files: Files) -> Outputs:
    return _bounds(LARGEST_APART / OURS_FACTOR, MEAN_APART / OURS_FACTOR, files)


def _bounds(largest: float, mean: float, files: Files) -> Outputs:
    return [torch.tensor(value, dtype=torch.float64) for value in (largest, mean, 0.0, len(files.paths))]


def waits(run: Run, files: Files, seconds: float) -> dict[str, Any]:
    return {"syncs": count_syncs(run, files.device)}


def case(aspect: str, size: int, batch: int, batches: int) -> Case:
    exactly, nearly = partial(apart, to_the_bit=True), partial(apart, to_the_bit=False)
    with_dali = Contender(partial(read_by, partial(by_ours, dali=True)), nearly, details=waits)
    why_not = why_not_dali()
    images = batches * batch
    return Case(
        name=f"images {aspect}: {images} photos to {size} x {size}, {batch} a batch",
        make=partial(make, aspect=aspect, size=size, batch=batch, batches=batches),
        contenders=({BY_DALI: with_dali} if why_not is None else {})
        | {
            BY_PIL: Contender(partial(read_by, partial(by_ours, dali=False)), exactly, details=waits),
            PEER: Contender(partial(read_by, by_peer), exactly, details=waits),
        },
        absent={} if why_not is None else {BY_DALI: why_not},
        exact=none_apart,
        plain=allowed_apart,
        bytes=images * 3 * size**2 * 4,
        stage="read + decode",
        clock="host",
        items=images,
        unit="images",
        group=f"images {aspect}",
        memory=True,
        rounds=3,
        trains=True,
        one_copy=True,
    )


ASPECTS = ("square", "pad")


def cases() -> list[Case]:
    return [case(aspect, 336, 32, 32) for aspect in ASPECTS]


def cpu_cases() -> list[Case]:
    return [case("pad", 336, 32, 5)]


def full_cases() -> list[Case]:
    return [case("square", 336, 32, 5), *cpu_cases()]


def small_cases() -> list[Case]:
    return [case("pad", 56, 4, 2)]


def test_images(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
