"""How far each back-end's pixels are from PIL's, and what that does to a vision tower's features: `docs/parity.md`.

    python -m benchmarks.parity [--tower FOLDER] [--page docs/parity.md]

Each kind of image goes through `AlignGPTImageProcessor` (the reference), DALI on a CPU, DALI on a GPU where one is, and
torchvision where it is installed, "square" and "pad". Pixels are compared before normalisation, in units of 1/255.
Features are the tower's `hidden_states[-2][:, 1:]`; their drift is ‖f - f of PIL‖ / ‖f of PIL‖. Without `--tower` the
tower has random weights from a fixed seed, so that its drift only tells which kinds suffer more.
"""

import argparse
import importlib.metadata
import importlib.util
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from aligngpt.image import open_image
from aligngpt.processor import AlignGPTImageProcessor
from benchmarks.conftest import device_name
from training.dali_pipeline import DaliPixels, read, why_not_dali

SIZE = 336
ASPECTS = ("square", "pad")
BACKENDS = ("DALI, CPU", "DALI, GPU", "torchvision")
PAGE = Path(__file__).parents[1] / "docs" / "parity.md"

# A back-end makes (3, size, size) of a file, or None where it hands it to PIL.
Backend = Callable[[bytes], Tensor | None]


@dataclass(frozen=True)
class Difference:
    """A file's pixels and features against PIL's."""

    most: float  # 1/255
    mean: float  # 1/255
    drift: float

    def __str__(self) -> str:
        return f"{self.most:.0f} · {self.mean:.4f} · {self.drift:.1e}"


# ---------------------------------------------------------------------------------------------------- images


def scene(width: int, height: int) -> Image.Image:
    """Waves, some grain, and a disc in one colour, with the sharp edge that photos have."""
    rng = np.random.default_rng(width + height)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = np.stack([127 + 80 * np.sin(x / (15 + c) + y / (19 - c)) for c in range(3)], -1)
    waves += rng.normal(0, 20, waves.shape).astype(np.float32)
    waves[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2] = (255, 0, 40)
    return Image.fromarray(np.clip(waves, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def with_alpha(mode: str) -> Image.Image:
    image = scene(640, 480).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def deep() -> Image.Image:
    return Image.fromarray(np.asarray(scene(640, 480).convert("L")).astype(np.uint16) * 3)


def checkerboard(side: int) -> Image.Image:
    return Image.fromarray(np.indices((side, side)).sum(0).astype(np.uint8) % 2 * 255)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# What the page calls each kind of file, and how one is made.
KINDS: dict[str, Callable[[], bytes]] = {
    "4:3, 640 × 480, JPEG": lambda: encoded(scene(640, 480), quality=90),
    "1:1, 480 × 480, JPEG": lambda: encoded(scene(480, 480), quality=90),
    "3:1, 960 × 320, JPEG": lambda: encoded(scene(960, 320), quality=90),
    "1:9, 120 × 1080, JPEG": lambda: encoded(scene(120, 1080), quality=90),
    "1 × 1, PNG": lambda: encoded(scene(1, 1), "PNG"),
    "17 × 13, PNG": lambda: encoded(scene(17, 13), "PNG"),
    "336 × 336, PNG": lambda: encoded(scene(336, 336), "PNG"),
    "12 megapixels, 4000 × 3000, JPEG": lambda: encoded(scene(4000, 3000), quality=90),
    "gray, JPEG": lambda: encoded(scene(640, 480).convert("L")),
    "palette, PNG": lambda: encoded(scene(640, 480).quantize(64), "PNG"),
    "RGBA, PNG": lambda: encoded(with_alpha("RGBA"), "PNG"),
    "LA, PNG": lambda: encoded(with_alpha("LA"), "PNG"),
    "CMYK, JPEG": lambda: encoded(scene(640, 480).convert("CMYK")),
    "16-bit gray, PNG": lambda: encoded(deep(), "PNG"),
    "WebP": lambda: encoded(scene(640, 480), "WEBP"),
    "GIF": lambda: encoded(scene(640, 480).quantize(64), "GIF"),
    "EXIF orientation 6, JPEG": lambda: encoded(scene(640, 480), exif=turned()),
    "checkerboard of one pixel, 3024 × 3024, PNG": lambda: encoded(checkerboard(3024), "PNG"),
}


# ---------------------------------------------------------------------------------------------------- back-ends


def by_dali(processor: AlignGPTImageProcessor, device: torch.device) -> Backend:
    dali = DaliPixels(processor, device)

    def pixels(file: bytes) -> Tensor | None:
        picture = read(file, processor)
        return None if isinstance(picture, Tensor) else dali.decode([picture])[0].cpu()

    return pixels


def by_torchvision(processor: AlignGPTImageProcessor) -> Backend:
    """transformers' CLIP processor, which is torchvision's resize on tensors. PIL decodes for it."""
    from transformers import CLIPImageProcessor

    size = processor.size
    theirs = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    colour = tuple(int(channel * 255) for channel in processor.image_mean)

    def pixels(file: bytes) -> Tensor:
        image = open_image(file)
        if processor.image_aspect_ratio == "pad":
            side = max(image.size)
            canvas = Image.new("RGB", (side, side), colour)
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        return theirs(image, return_tensors="pt")["pixel_values"][0]

    return pixels


def backends(processor: AlignGPTImageProcessor) -> dict[str, Backend | str]:
    """Each of `BACKENDS`, or why it is not measured."""
    no_dali = "not installed" if why_not_dali() else None
    gpu = torch.cuda.is_available()
    return {
        "DALI, CPU": no_dali or by_dali(processor, torch.device("cpu")),
        "DALI, GPU": no_dali or (by_dali(processor, torch.device("cuda", 0)) if gpu else "unmeasured"),
        "torchvision": by_torchvision(processor) if importlib.util.find_spec("torchvision") else "not installed",
    }


# ---------------------------------------------------------------------------------------------------- page


ABOUT = """\
# Pixels of the back-ends against PIL's

`python -m benchmarks.parity` writes this page; its numbers are measured, none is copied.

- **Versions**: {versions}. **Device**: {device}.
- **Tower**: {tower}. Features are `hidden_states[-2][:, 1:]`.
- **A cell** is the largest pixel difference · the mean one (both in 1/255, before normalisation) · the features' drift,
  ‖f - f of PIL‖ / ‖f of PIL‖. The project's bounds are 4 and 0.25; checkerboards of one pixel, where most sums end in
  one half, keep the first alone.
- **PIL**: the back-end leaves this kind to PIL, so the difference is 0. "unmeasured" and "not installed" mean just
  that.
- **torchvision** is transformers' `CLIPImageProcessor`. PIL decodes (and pads) for it, so its difference is that of
  resize and arithmetic alone; torchvision's compiled operators take no part (a build of it for another torch imports
  once their schemas are declared).
"""


def random_tower() -> CLIPVisionModel:
    """ViT-B's width and patches of 14; three layers, since features are taken after the second."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=3,
        image_size=SIZE,
        patch_size=14,
    )
    return CLIPVisionModel(config).eval()


@torch.inference_mode()
def features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    return tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]


def compare(pixels: Tensor, reference: Tensor, tower: CLIPVisionModel, processor: AlignGPTImageProcessor) -> Difference:
    apart = ((pixels - reference) * torch.tensor(processor.image_std)[:, None, None] * 255).abs()
    expected = features(tower, reference)
    drift = (features(tower, pixels) - expected).norm() / expected.norm()
    return Difference(float(apart.max()), float(apart.mean()), float(drift))


def rows(kinds: Mapping[str, Callable[[], bytes]], tower: CLIPVisionModel) -> list[str]:
    """The table's rows, a line for each kind and aspect."""
    lines = []
    for aspect in ASPECTS:
        processor = AlignGPTImageProcessor(tower.config.image_size, image_aspect_ratio=aspect)
        ways = backends(processor)
        for kind, make in kinds.items():
            file = make()
            reference = processor.pixels([file])[0]
            cells = []
            for name in BACKENDS:
                way = ways[name]
                pixels = way if isinstance(way, str) else way(file)
                if isinstance(pixels, Tensor):
                    cells.append(str(compare(pixels, reference, tower, processor)))
                else:
                    cells.append(pixels or "PIL")
            lines.append(f"| {kind} | {aspect} | {' | '.join(cells)} |")
    return lines


def write_page(page: Path, kinds: Mapping[str, Callable[[], bytes]], folder: str | None = None) -> None:
    """folder: of the tower; None: a random one."""
    if folder is None:
        tower = random_tower()
        about = "random weights (seed 0), 768 wide, 2 layers deep, 336 pixels: its drift only ranks the kinds"
    else:
        tower = CLIPVisionModel.from_pretrained(folder).eval()
        about = f"`{Path(folder).name}`"
    packages = ("torch", "transformers", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "torchvision")
    versions = ", ".join(f"{name} {version}" for name in packages if (version := _version(name)))
    page.write_text(
        ABOUT.format(versions=versions, device=device_name(), tower=about)
        + f"\n| image | aspect | {' | '.join(BACKENDS)} |\n|---|---|{'---|' * len(BACKENDS)}\n"
        + "".join(line + "\n" for line in rows(kinds, tower)),
        encoding="utf-8",
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", metavar="FOLDER", help="a CLIP vision tower; default: a random one")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    write_page(arguments.page, KINDS, arguments.tower)


if __name__ == "__main__":
    main()
