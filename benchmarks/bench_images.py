"""Picture files to batches of pixels: training's path through DALI against a PyTorch `DataLoader` with PIL and CLIP's
image processor, and our own path through PIL; with DALI on the GPU where one is.

JPEG photos of 640 × 480 on disk become batches of 32 × 3 × 336 × 336, padded or with the centre cut out. On two cores:

    peer   DataLoader, 2 workers: PIL opens and pads (as LLaVA does), transformers' processor does one picture at a time
    DALI   `training.loader.micro_batches`, 1 worker: it reads and screens, a thread of this process decodes
    PIL    the same with `--data.decoder pil`, 2 workers: they decode

Ours make whole batches, captions tokenised. First the pixels must agree: our PIL path with the peer to the bit, DALI
within the bounds of tests/training/test_dali_pipeline.py. Then they take turns, start of the workers included. The
ratio is that of the best rounds.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
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
from training.dali_pipeline import why_not_dali
from training.loader import Cut, Part, Samples, micro_batches

PHOTOS, BATCH, BATCHES, ROUNDS, SIZE = 32, 32, 32, 3, 336


def photo(number: int) -> Image.Image:
    y, x = np.mgrid[:480, :640]
    waves = np.stack([127 + 80 * np.sin(x / (5 + number) + y / (90 - channel)) for channel in range(3)], -1)
    waves += np.random.default_rng(number).normal(0, 10, waves.shape)
    return Image.fromarray(np.clip(waves, 0, 255).astype(np.uint8))


class Peer(Dataset[Tensor]):
    """One file to (3, size, size), as a user of PIL and transformers writes it."""

    def __init__(self, paths: list[Path], aspect: str):
        self.paths = paths
        self.aspect = aspect
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_convert_rgb=False
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


def samples(paths: list[Path], image_processor: AlignGPTImageProcessor, by_dali: bool) -> Samples:
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
        for record, path in enumerate(paths)
    ]
    processor = AlignGPTProcessor(image_processor, tokenizer, template="plain")
    data = RecordList(records, paths[0].parent)
    cut = Cut(per_device=BATCH)
    return Samples(data, processor, levels=None, num_levels=8, seed=0, cut=cut, decode_by_dali=by_dali)


@pytest.mark.skipif(why_not_dali() is not None, reason=str(why_not_dali()))
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_images_in_turns(benchmark, tmp_path: Path, aspect: str) -> None:
    """The ratio is printed, whichever is faster."""
    for number in range(PHOTOS):
        photo(number).save(tmp_path / f"{number}.jpg", quality=90)
    paths = [tmp_path / f"{number % PHOTOS}.jpg" for number in range(BATCHES * BATCH)]
    processor = AlignGPTImageProcessor(SIZE, image_aspect_ratio=aspect)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    peer = Peer(paths, aspect)
    plan = [Part(0, list(range(start, start + BATCH))) for start in range(0, len(paths), BATCH)]

    def by_peer() -> Iterator[Tensor]:
        return (batch.to(device) for batch in DataLoader(peer, batch_size=BATCH, num_workers=2))

    def ours(by_dali: bool) -> Iterator[Tensor]:
        data = samples(paths, processor, by_dali)
        workers = 1 if by_dali else 2
        for loaded in micro_batches(data, plan, workers=workers, device=device, prefetch=2):
            assert loaded.batches is not None
            yield loaded.batches[0].pixel_values.to(device)

    contenders: dict[str, Callable[[], Iterator[Tensor]]] = {
        "peer": by_peer,
        "DALI": lambda: ours(True),
        "PIL": lambda: ours(False),
    }
    first = {name: next(run()).cpu() for name, run in contenders.items()}
    assert torch.equal(first["PIL"], first["peer"])
    apart = (first["DALI"] - first["peer"]) * torch.tensor(processor.image_std)[:, None, None]
    assert apart.abs().max() <= 4 / 255
    assert apart.abs().flatten(1).mean(1).max() <= 0.25 / 255

    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            started = time.perf_counter()
            images = sum(len(batch) for batch in run())
            rates[name].append(images / (time.perf_counter() - started))
    print(
        f"\n{aspect}, {device}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads of torch; "
        f"peer: DataLoader, 2 workers, {type(peer.processor).__name__}",
        end="",
    )
    for name in contenders:
        ratio = max(rates[name]) / max(rates["peer"])
        benchmark.extra_info |= {f"{name} images a second": round(max(rates[name])), f"{name} / peer": round(ratio, 2)}
        print(f"\n{aspect}, {name}: {max(rates[name]):.0f} images/s, {ratio:.2f} × the peer", end="")
    benchmark.group = f"images, {aspect}"
    benchmark.pedantic(lambda: sum(len(batch) for batch in ours(True)), rounds=1)
