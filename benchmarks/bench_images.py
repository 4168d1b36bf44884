"""Picture files to pixels: the training pipeline of DALI against PIL, on the CPU; with DALI on the GPU where one is.

32 JPEG photos of 640 × 480 become 336 × 336. PIL does it on one thread, DALI on one for each core (up to 8). Since in
training either may use all cores (PIL in worker processes), what compares them on a CPU is the processor time a
picture takes, over all threads; the elapsed time is printed beside it.

DALI must agree with PIL first, within the bounds of tests/training/test_dali_pipeline.py.
"""

import io
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aligngpt.processor import AlignGPTImageProcessor
from training.dali_pipeline import DaliPixels, why_not_dali

FILES, ROUNDS = 32, 5


def photo(number: int) -> bytes:
    y, x = np.mgrid[:480, :640]
    waves = np.stack([127 + 80 * np.sin(x / (5 + number) + y / (90 - channel)) for channel in range(3)], -1)
    waves += np.random.default_rng(number).normal(0, 10, waves.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(waves, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.mark.skipif(why_not_dali() is not None, reason=str(why_not_dali()))
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_images_in_turns(benchmark, aspect: str) -> None:
    """The ratio is that of the best times; it is printed, whichever is faster."""
    files = [photo(number) for number in range(FILES)]
    processor = AlignGPTImageProcessor(336, image_aspect_ratio=aspect)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dali = DaliPixels(processor, device)  # decode ends when its pixels are there, on a GPU too
    contenders: dict[str, Callable[[list[bytes]], Tensor]] = {"DALI": dali.pixels, "PIL": processor.pixels}

    apart = (dali.pixels(files).cpu() - processor.pixels(files)) * torch.tensor(processor.image_std)[:, None, None]
    assert apart.abs().max() <= 4 / 255
    assert apart.abs().flatten(1).mean(1).max() <= 0.25 / 255

    elapsed: dict[str, list[float]] = {name: [] for name in contenders}
    processor_time: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            started, worked = time.perf_counter(), time.process_time()
            run(files)
            elapsed[name].append(time.perf_counter() - started)
            processor_time[name].append(time.process_time() - worked)
    for name in contenders:
        rate, cost = FILES / min(elapsed[name]), min(processor_time[name]) / FILES * 1e3
        benchmark.extra_info |= {
            f"{name} images a second": round(rate),
            f"{name} processor ms an image": round(cost, 1),
        }
        print(f"\n{aspect}, {name}: {rate:.0f} images/s, {cost:.1f} ms of processor time an image", end="")
    benchmark.group = f"images, {aspect}"
    benchmark.pedantic(dali.pixels, (files,), rounds=3)
