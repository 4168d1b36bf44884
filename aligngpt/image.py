"""Image files to pixel tensors: the pre-processing every other path (DALI, torchvision) is tested against.

    open_image   bytes or path -> PIL RGB, fully decoded or refused
    preprocess   PIL RGB       -> float32 (3, size, size), in two steps:
        squared        PIL RGB -> uint8 (3, size, size): pad, resize, crop
        normalised     uint8   -> float32: (x / 255 - mean) / std

    aspect "square":  the short side becomes `size` (bicubic, the long side int(size · long / short)), centre crop.
    aspect "pad":     pasted into the centre of a square canvas of colour int(mean · 255), then as above.
    aspect "stretch": both sides become `size`, nothing is cut; SigLIP's way, for scoring.

The first two are the public code's steps with CLIP's image processor, to the bit
(`tests/data/oracle/image_preprocess.npz`). PIL alone does them, widths before heights in every version of it.
Everything is in RGB: gray, palette, CMYK, alpha and 16-bit images go through PIL's `convert("RGB")`. EXIF orientation
is ignored: pixels are taken as stored, as in the public code.

What a file may cost is decided before it is decoded: it is refused if it has more than `MAX_BYTES`, if more than
`HEADER_BYTES` are read before its size is known (a TIFF's tags take many times their bytes as Python's numbers), or if
it has more than `MAX_PIXELS` pixels. Only the raster formats of `FORMATS` are tried (PIL would hand an EPS file to
Ghostscript). A file cut inside its pixels is refused: its missing half would train as gray. GIF and WebP animations
give their first frame.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 89_478_485  # PIL's own warning threshold: 256 MiB of RGB
MAX_BYTES = 1 << 28  # of a file: what that many pixels take uncompressed
HEADER_BYTES = 1 << 22  # colour profiles and other tables before the size; PIL reads those of a TIFF three times
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
ASPECTS = ("square", "pad", "stretch")


class ImageError(ValueError):
    """An image that can't be used: `name` says which, `why` what is wrong with it."""

    def __init__(self, name: str, why: str):
        super().__init__(name, why)
        self.name = name
        self.why = why

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def open_image(source: str | os.PathLike[str] | bytes, *, name: str | None = None) -> Image.Image:
    """Decode an image to RGB.

    source: a path, or the file's bytes; name: what errors call it (default: the path, or "image of n bytes").
    ImageError: missing, empty, not an image of `FORMATS`, larger than allowed, truncated or damaged.
    """
    if name is None:
        name = f"image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    with opened(source, name=name) as image:
        return image.convert("RGB")


@contextmanager
def opened(
    source: str | os.PathLike[str] | bytes, *, name: str, formats: tuple[str, ...] = FORMATS
) -> Iterator[Image.Image]:
    """PIL's image, of an allowed size, not decoded yet. ImageError as in `open_image`, for what is done with it too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of large or odd files; here they are refused or they decode
        try:
            if isinstance(source, bytes):
                length = len(source)
            else:
                found = os.stat(source)
                if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
                    raise ImageError(name, "no regular file")
                length = found.st_size
            if length > MAX_BYTES:
                raise ImageError(name, f"{length} bytes; at most {MAX_BYTES} are read")
            raw = io.BytesIO(source) if isinstance(source, bytes) else io.FileIO(source)
            with _File(raw) as file, Image.open(file, formats=formats) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(name, f"{width}×{height} pixels; at most {MAX_PIXELS} are decoded")
                file.header_left = None
                yield image
        except ImageError:
            raise
        except FileNotFoundError as error:
            raise ImageError(name, "no such file") from error
        except UnidentifiedImageError as error:
            raise ImageError(name, f"not an image ({_what(source)}); it must be one of {', '.join(formats)}") from error
        except Image.DecompressionBombError as error:
            raise ImageError(name, f"too many pixels; at most {MAX_PIXELS} are decoded ({error})") from error
        except Exception as error:  # damaged input: PIL's decoders raise whatever their parser trips over
            if isinstance(error, OSError) and error.strerror:  # the system's; it would name the whole path
                raise ImageError(name, f"can't be read ({error.strerror})") from error
            raise ImageError(name, f"can't be decoded ({type(error).__name__}: {error})") from error


class _File(io.BufferedReader):
    """A file of which PIL gets `HEADER_BYTES`, unless it takes all at once, until `header_left` is None."""

    header_left: int | None = HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if self.header_left is not None and size is not None and size > 0:
            self.header_left -= size
            if self.header_left < 0:
                raise ValueError(f"more than {HEADER_BYTES} bytes before its pixels")
        return super().read(size)


def _what(source: str | os.PathLike[str] | bytes) -> str:
    head = source[:16] if isinstance(source, bytes) else b""
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            head = file.read(16)
    return f"it begins with {head!r}" if head else "it is empty"


def preprocess(
    image: Image.Image,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    aspect: str,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """Pixels of an RGB image, float32 (3, size, size), normalised: `squared`, then `normalised`."""
    return normalised(squared(image, size=size, mean=mean, aspect=aspect, resample=resample), mean, std)


def squared(
    image: Image.Image,
    *,
    size: int,
    mean: Sequence[float],
    aspect: str,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """Pixels of an RGB image, uint8 (3, size, size).

    aspect: "square" (stage 1), "pad" (stage 2; with the colour of `mean`, 3 numbers of 0..1) or "stretch"; see the
    module's docstring. resample: PIL's filter; every model here but SigLIP 2 (bilinear) was trained with bicubic.
    ImageError: a shape so long that resizing it would need more than `MAX_PIXELS` pixels.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; it must be one of {', '.join(ASPECTS)}")
    if image.mode != "RGB":
        raise ValueError(f"image has mode {image.mode!r}; it must be 'RGB' (open_image returns that)")
    if aspect == "pad":
        image = _pad_to_square(image, tuple(int(channel * 255) for channel in mean))
    if aspect == "stretch":
        image = _resize(image, size, size, resample)
    else:
        image = _resize_and_crop(image, size, resample)
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 of uint8 pixels (…, 3, height, width), by `mean` and `std`, 3 numbers each, of 0..1.

    For each of the 256 values x / 255 in fp32 is what CLIP's image processor computes in float64 and rounds.
    """
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std have {len(mean)} and {len(std)} numbers; RGB needs 3 each")
    channels = [
        torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None] for values in (mean, std)
    ]
    return pixels.float().div_(255).sub_(channels[0]).div_(channels[1])


def _pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    _check_pixels(image, side, side)
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def _resize_and_crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    new_width, new_height = resized_size(image.width, image.height, size)
    _check_pixels(image, new_width, new_height)
    image = _resize(image, new_width, new_height, resample)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resized_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height once the short side is `size`; the long one is rounded down."""
    long = int(size * max(width, height) / min(width, height))
    return (size, long) if width <= height else (long, size)


def _resize(image: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    """PIL's resize, widths first.

    PIL rounds and clips to bytes between its two passes, so their order shows. Until Pillow 12 widths came first;
    from 13 on heights do where a picture taller than 2:1 shrinks. A call for each pass is the former in both.
    """
    return image.resize((width, image.height), resample).resize((width, height), resample)


def _check_pixels(image: Image.Image, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            "image",
            f"{image.width}×{image.height} is too long: it would become {width}×{height}; "
            f"at most {MAX_PIXELS} pixels are made",
        )
