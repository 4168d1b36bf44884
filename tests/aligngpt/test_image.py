"""aligngpt.image: equal to the recorded pre-processing, and safe with files that are not what they seem."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from aligngpt.image import MAX_PIXELS, ImageError, open_image, preprocess, resized_size

RECORDED = np.load(Path(__file__).parents[1] / "data" / "oracle" / "image_preprocess.npz")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def noise(width=80, height=60, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_recorded_preprocessing(shape, aspect):
    """The criterion is 1/255 before normalisation; it holds to the last bit."""
    image = open_image(encoded(Image.fromarray(RECORDED[f"{shape}.image_uint8"]), "PNG"))
    found = preprocess(image, size=56, mean=MEAN, std=STD, aspect=aspect)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(RECORDED[f"{shape}.pixel_values_{aspect}"]))


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_stretch_is_a_plain_resize(resample):
    image = noise(80, 60)
    found = preprocess(image, size=56, mean=MEAN, std=STD, aspect="stretch", resample=resample)
    pixels = np.asarray(image.resize((56, 56), resample), dtype=np.float64) / 255
    expected = torch.from_numpy(((pixels - MEAN) / STD).transpose(2, 0, 1))
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("aspect", ["square", "stretch"])
@pytest.mark.parametrize("width", [400, 40])  # made smaller, as where Pillow 13 turns the passes round; made larger
def test_widths_are_resized_before_heights(width, aspect):
    """Black and white noise, taller than 2:1: what is clipped between the passes shows their order."""
    size = 56
    pixels = np.random.default_rng(0).integers(0, 2, (1000, width, 3), dtype=np.uint8) * 255
    image = Image.fromarray(pixels)
    new = resized_size(width, 1000, size) if aspect == "square" else (size, size)
    expected = image.resize((new[0], 1000), Image.Resampling.BICUBIC).resize(new, Image.Resampling.BICUBIC)
    top = (new[1] - size) // 2
    found = preprocess(image, size=size, mean=(0, 0, 0), std=(1, 1, 1), aspect=aspect)
    assert np.array_equal((found * 255).round().numpy().transpose(1, 2, 0), np.asarray(expected)[top : top + size])


def test_fault_8_modes_are_as_pil_converts_them(tmp_path):
    images = [noise(mode=mode) for mode in ("L", "LA", "RGBA", "CMYK")] + [noise().quantize(16)]
    images.append(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80)))
    for image, form in zip(images, ("PNG", "PNG", "PNG", "JPEG", "PNG", "PNG"), strict=True):
        path = tmp_path / "image.bin"
        path.write_bytes(encoded(image, form))
        found = open_image(path)
        assert found.mode == "RGB"
        assert found.tobytes() == Image.open(path).convert("RGB").tobytes()


def test_fault_7_gif_named_jpg_has_the_same_pixels(tmp_path):
    path = tmp_path / "animal.jpg"
    path.write_bytes(encoded(noise().quantize(16), "GIF"))
    assert open_image(path).tobytes() == Image.open(path, formats=["GIF"]).convert("RGB").tobytes()


def test_fault_9_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(), "JPEG", exif=exif)
    found = open_image(data)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (60, 80)  # the tag is there
    assert found.size == (80, 60)
    assert found.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_fault_3_truncated(form, share):
    data = encoded(noise(), form)
    with pytest.raises(ImageError, match=r"^coco/1\.jpg: (can't be decoded|not an image)"):
        open_image(data[: int(len(data) * share)], name="coco/1.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image .it is empty"),  # fault 1
        (encoded(noise(), "JPEG")[:20], "not an image"),  # 2
        (np.random.default_rng(1).bytes(5000), "not an image"),  # 4
        (b"<!DOCTYPE html><html>404</html>", r"not an image .it begins with b'<!DOCTYPE html>"),  # 5
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # never reaches Ghostscript
        (None, "no such file"),  # 13
    ],
)
def test_refused_file(tmp_path, content, message):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=f"{path}: {message}"):
        open_image(path)


def png_bomb(side):
    """A valid PNG of side × side black pixels, 1 bit each, in a few kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_fault_11_fault_12_bombs_are_refused_from_the_header(tmp_path, side):
    """100 and 400 megapixels; in a process of its own, so that its peak memory is this file's."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(side))
    code = """
import resource, sys
from aligngpt.image import ImageError, open_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_image(sys.argv[1])
except ImageError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    rise_kib, message = done.stdout.split(" ", 1)
    assert f"{path}: " in message
    assert f"at most {MAX_PIXELS} are decoded" in message
    assert int(rise_kib) < 100 * 1024


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_fault_10_extreme_shapes(aspect):
    one = preprocess(Image.new("RGB", (1, 1), (255, 0, 51)), size=56, mean=MEAN, std=STD, aspect=aspect)
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(one, expected[:, None, None].expand(3, 56, 56))
    with pytest.raises(ImageError, match="image of 1×20000 is too long"):
        preprocess(Image.new("RGB", (1, 20_000)), size=336, mean=MEAN, std=STD, aspect=aspect)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aspect": "crop"}, "aspect is 'crop'; it must be one of square, pad, stretch"),
        ({"mean": (0.5,)}, "mean and std have 1 and 3 numbers"),
        ({"image": noise(mode="RGBA")}, "image has mode 'RGBA'"),
    ],
)
def test_refused_arguments(change, message):
    arguments = {"image": noise(), "size": 56, "mean": MEAN, "std": STD, "aspect": "pad"} | change
    with pytest.raises(ValueError, match=message):
        preprocess(arguments.pop("image"), **arguments)
