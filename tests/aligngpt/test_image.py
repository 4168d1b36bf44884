"""aligngpt.image: equal to the recorded pre-processing, and safe with files that are not what they seem."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from aligngpt.image import HEADER_BYTES, MAX_BYTES, MAX_PIXELS, ImageError, open_image, preprocess, resized_size

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
def test_fault_1_2_4_5_13_refused_file(tmp_path, content, message):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=f"{path}: {message}"):
        open_image(path)


def test_fault_13_what_is_no_file_is_refused_without_waiting(tmp_path):
    """A pipe would be waited for. Messages name the image as the data do, not the machine's folders."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for path, why in (
        (tmp_path, "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "loop", r"can't be read \(Too many levels of symbolic links\)"),
        (tmp_path / "file/1.jpg", r"can't be read \(Not a directory\)"),
        (tmp_path / "missing", "no such file"),
    ):
        with pytest.raises(ImageError, match=rf"^coco/1\.jpg: {why}$"):
            open_image(path, name="coco/1.jpg")


def test_an_error_has_its_parts_and_survives_a_worker():
    with pytest.raises(ImageError, match=r"^coco/1\.jpg: not an image \(it is empty\)") as caught:
        open_image(b"", name="coco/1.jpg")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.name, str(error)) == ("coco/1.jpg", f"coco/1.jpg: {error.why}")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side, before=b""):
    """A valid PNG of side × side black pixels, 1 bit each, with chunks before its pixels."""
    packer = zlib.compressobj(1)
    row = bytes(1 + (side + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def with_bytes(data, place, new):
    return data[:place] + new + data[place + len(new) :]


def tiff(side, num_strips=1):
    """One strip's place and length, or as many as fill the file with its tags."""
    shorts = struct.pack("<H", 300) * (2 * num_strips)
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 3, num_strips, 300), (277, 3, 1, 1), (278, 4, 1, 1), (279, 3, num_strips, 300)]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return head.ljust(300, b"\0") + shorts


def bombs(side):
    """Files that claim side × side pixels."""
    picture = Image.new("RGB", (64, 64))
    jpeg, lossy, lossless = encoded(picture, "JPEG"), encoded(picture, "WEBP"), encoded(picture, "WEBP", lossless=True)
    animation = encoded(picture, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")])
    webp = min(side, 16383)  # what its headers can say
    bits = struct.unpack("<I", lossless[21:25])[0] >> 28 << 28 | (webp - 1) << 14 | (webp - 1)
    return {
        "png": png(side),
        "jpg": with_bytes(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", side, side)),
        "gif": with_bytes(encoded(picture, "GIF"), 6, struct.pack("<HH", side, side)),
        "webp": with_bytes(lossy, lossy.index(b"\x9d\x01\x2a") + 3, struct.pack("<HH", webp, webp)),
        "lossless.webp": with_bytes(lossless, 21, struct.pack("<I", bits)),
        "animated.webp": with_bytes(animation, 24, 2 * (webp - 1).to_bytes(3, "little")),
        "tiff": tiff(side),
        "bmp": with_bytes(encoded(picture, "BMP"), 18, struct.pack("<ii", side, side)),
        "ppm": with_bytes(encoded(picture, "PPM"), 0, b"P6 %d %d 255\n" % (side, side)),
    }


def test_fault_11_fault_12_no_file_takes_more_than_100_megabytes_to_refuse(tmp_path):
    """Bombs of 100 and 400 megapixels (WebP: 268, all it can say), and small pictures with too much around them.

    In a process of its own, so that its peak memory is these files'.
    """
    files = {f"{side}.{form}": data for side in (10_000, 20_000) for form, data in bombs(side).items()}
    expected = dict.fromkeys(files, f"at most {MAX_PIXELS} are decoded")
    too_much = {
        "profile.png": png(8, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 28), 9))),
        "comment.png": png(8, chunk(b"tEXt", b"x\0" + bytes(HEADER_BYTES))),
        "segments.jpg": encoded(noise(), "JPEG")[:2] + (b"\xff\xe1\xff\xff" + bytes(65533)) * 80,
        "tags.tiff": tiff(64, 4_000_000),
    }
    files |= too_much
    expected |= dict.fromkeys(too_much, f"more than {HEADER_BYTES} bytes before its pixels")
    expected["profile.png"] = "Decompressed data too large"
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.write(encoded(noise(), "JPEG")[:-2])
        file.truncate(10 << 30)
    expected["sparse.jpg"] = f"{10 << 30} bytes; at most {MAX_BYTES} are read"

    code = """
import resource, sys
from aligngpt.image import ImageError, open_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        open_image(path)
    except ImageError as error:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""
    paths = [str(tmp_path / name) for name in expected]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    for line, (name, says) in zip(done.stdout.splitlines(), expected.items(), strict=True):
        rise_kib, message = line.split(" ", 1)
        assert message.startswith(f"{tmp_path / name}: ")
        assert says in message
        assert int(rise_kib) < 100 * 1024, message


def test_metadata_of_an_ordinary_size_is_no_obstacle():
    picture = noise(400, 300)
    for form, size in (("JPEG", 3 << 20), ("WEBP", 3 << 20), ("TIFF", 1 << 20), ("PNG", 1 << 19)):
        with_profile = encoded(picture, form, icc_profile=bytes(size))
        assert open_image(with_profile).size == (400, 300)


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_fault_10_extreme_shapes(aspect):
    one = preprocess(Image.new("RGB", (1, 1), (255, 0, 51)), size=56, mean=MEAN, std=STD, aspect=aspect)
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(one, expected[:, None, None].expand(3, 56, 56))
    with pytest.raises(ImageError, match="image: 1×20000 is too long"):
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
