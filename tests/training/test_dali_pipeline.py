"""DALI against PIL: the same pixels within 4/255 and 0.25/255 on average, and no file that hurts another."""

import dataclasses
import io
import json
import platform
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aligngpt.data.llava_json import Sample
from aligngpt.data.records import RecordList
from aligngpt.image import ImageError, open_image
from aligngpt.processor import AlignGPTImageProcessor, AlignGPTProcessor
from aligngpt.text import Turn
from training import dali_pipeline, loop
from training.config import tiny
from training.dali_pipeline import FILES_A_RUN, DaliPixels, Encoded, read, screen, why_not_dali
from training.loader import Cut, Part, Samples, micro_batches

if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    pytest.skip("setup.py leaves DALI out on this platform", allow_module_level=True)

CPU = torch.device("cpu")


def noise(width: int = 80, height: int = 60, mode: str = "RGB") -> Image.Image:
    """Independent bytes: the hardest picture to resample, every edge and overshoot shows."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def scene(width: int, height: int) -> Image.Image:
    """Waves, some grain, and a disc in one colour."""
    rng = np.random.default_rng(width + height)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 80 * np.sin(x / (5 + c) + y / (9 - c)) for c in range(3)], -1)
    waves += rng.normal(0, 20, waves.shape)
    waves[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2] = (255, 0, 40)
    return Image.fromarray(np.clip(waves, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def make(
    size: int = 56, aspect: str = "pad", device: torch.device = CPU, *, resized_by_dali: bool | None = None
) -> DaliPixels:
    """resized_by_dali: True checks what a GPU does by the same operators on a CPU."""
    dali = DaliPixels(AlignGPTImageProcessor(size, image_aspect_ratio=aspect), device)
    if resized_by_dali is not None:
        dali.resized_by_dali = resized_by_dali
    return dali


def assert_close(
    ours: Tensor, theirs: Tensor, processor: AlignGPTImageProcessor, most: float = 4, mean: float = 0.25
) -> None:
    """Each picture by the project's bounds or closer ones, in units of 1/255 before normalisation."""
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    apart = ((ours.cpu() - theirs) * torch.tensor(processor.image_std)[:, None, None] * 255).abs().flatten(1)
    assert apart.max() <= most + 1e-3, apart.amax(1)
    assert apart.mean(1).max() <= mean, apart.mean(1)


ENCODINGS: list[Callable[[Image.Image], bytes]] = [
    lambda image: encoded(image, quality=95, subsampling="4:4:4"),
    lambda image: encoded(image, subsampling="4:2:0"),
    lambda image: encoded(image, subsampling="4:2:2", progressive=True),
    lambda image: encoded(image.convert("L")),
    lambda image: encoded(image, "PNG"),
]
SIZES = [
    (640, 480),  # a photo, made smaller
    (211, 377),  # odd, tall
    (300, 300),
    (56, 56),  # left as it is, or made larger
    (31, 43),
    (400, 1000),  # taller than 2:1: Pillow 13 by itself would resize heights first
    (900, 33),  # one side made larger, the middle kept or nearly all of it padding
    (13, 500),
    (3, 2),  # the filter reaches over both edges
    (1, 1),
]


def pictures(draw: Callable[[int, int], Image.Image]) -> list[bytes]:
    return [encode(draw(*size)) for size in SIZES for encode in ENCODINGS]


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [56, 336])
@pytest.mark.parametrize(("draw", "resized_by_dali"), [(noise, False), (scene, False), (noise, True)])
def test_pixels_are_those_of_pil(
    draw: Callable[[int, int], Image.Image], resized_by_dali: bool, size: int, aspect: str
) -> None:
    dali = make(size, aspect, resized_by_dali=resized_by_dali)
    files = pictures(draw)
    assert len(files) > FILES_A_RUN
    assert all(isinstance(read(file, dali.image_processor), Encoded) for file in files)
    bounds = {"most": 2, "mean": 0.05} if resized_by_dali else {"most": 2, "mean": 0.015}
    assert_close(dali.pixels(files), dali.image_processor.pixels(files), dali.image_processor, **bounds)


@pytest.mark.parametrize("resized_by_dali", [False, True])
def test_a_checkerboard_of_one_pixel_is_the_worst_case(resized_by_dali: bool) -> None:
    """Every sum ends in one half: all pixels may be one off, none may be more."""
    dali = make(resized_by_dali=resized_by_dali)
    board = Image.fromarray(np.indices((672, 672)).sum(0).astype(np.uint8) % 2 * 255)
    files = [encoded(board, "PNG")]
    assert_close(dali.pixels(files), dali.image_processor.pixels(files), dali.image_processor, most=1, mean=1)


def test_what_needs_no_resize_is_pil_to_the_bit() -> None:
    dali = make(56)
    files = [encoded(noise(56, 56), "PNG"), encoded(scene(56, 56))]
    assert torch.equal(dali.pixels(files), dali.image_processor.pixels(files))


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(scene(90, 50), exif=exif)


def test_fault_9_exif_orientation_is_ignored() -> None:
    dali = make()
    found = dali.pixels([encoded(scene(90, 50)), *(with_orientation(number) for number in range(1, 9))])
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert_close(found, dali.image_processor.pixels([encoded(scene(90, 50))] * 9), dali.image_processor)


FOR_DALI = {
    "gray": encoded(noise(mode="L"), "PNG"),
    "gray and alpha": encoded(noise(mode="LA"), "PNG"),
    "alpha": encoded(noise(mode="RGBA"), "PNG"),
    "palette": encoded(noise().quantize(16), "PNG"),
    "transparent palette": encoded(noise().quantize(16), "PNG", transparency=3),
    "one bit": encoded(noise().convert("1"), "PNG"),
    "RGB in a JPEG": encoded(noise(), keep_rgb=True),
    "restart markers": encoded(noise(), restart_marker_blocks=1),
    "bytes behind the end": encoded(noise()) + b"\xff\xc3 more",
}
FOR_PIL = {
    "GIF": encoded(noise().quantize(16), "GIF"),
    "CMYK": encoded(noise(mode="CMYK")),
    "16 bits": encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13), "PNG"),
    "WebP": encoded(noise(), "WEBP"),
    "BMP": encoded(noise(), "BMP"),
    "animated PNG": encoded(noise(), "PNG", save_all=True, append_images=[noise(80, 60).rotate(90)]),
    "several pictures in a JPEG": encoded(noise(), "MPO", save_all=True, append_images=[noise(80, 60).rotate(90)]),
}


def test_fault_7_fault_8_every_kind_gives_its_pixels_in_a_mixed_batch() -> None:
    """What DALI may not have is PIL's to the bit, in its place among the others."""
    dali = make()
    files = [file for pair in zip(FOR_PIL.values(), FOR_DALI.values(), strict=False) for file in pair]
    files += list(FOR_DALI.values())[len(FOR_PIL) :]
    by_dali = torch.tensor([isinstance(read(file, dali.image_processor), Encoded) for file in files])
    assert [file in FOR_DALI.values() for file in files] == by_dali.tolist()
    ours, theirs = dali.pixels(files), dali.image_processor.pixels(files)
    assert torch.equal(ours[~by_dali], theirs[~by_dali])
    assert_close(ours, theirs, dali.image_processor)


def assert_refused_like_pil(source: Path | bytes, says: str) -> None:
    """By `read`, before DALI is asked, in the words of `open_image`."""
    processor = make().image_processor
    with pytest.raises(ImageError, match=says) as pil:
        open_image(source, name="coco/1.jpg")
    with pytest.raises(ImageError) as ours:
        read(source, processor, name="coco/1.jpg")
    assert str(ours.value) == str(pil.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),  # fault 1
        (encoded(noise())[:20], "not an image"),  # 2
        (np.random.default_rng(1).bytes(5000), "not an image"),  # 4
        (b"<!DOCTYPE html><html>404</html>", "it begins with b'<!DOCTYPE"),  # 5
        (None, "no such file"),  # 13
    ],
)
def test_fault_1_2_4_5_13_refused_file(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "1.jpg").write_bytes(content)
        assert_refused_like_pil(content, says)
    assert_refused_like_pil(tmp_path / "1.jpg", says)


def with_thumbnail() -> bytes:
    """A whole JPEG lies in a segment at its beginning, end marker and all."""
    data, small = encoded(noise()), encoded(noise(16, 12))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(small) + 2) + small + data[2:]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize(
    "data", [encoded(noise()), encoded(noise(), progressive=True), with_thumbnail(), encoded(noise(), "PNG")]
)
def test_fault_3_truncated(data: bytes, share: float) -> None:
    assert isinstance(read(data, make().image_processor), Encoded)
    assert_refused_like_pil(data[: int(len(data) * share)], "can't be decoded|not an image")


def test_fault_3_a_truncated_jpeg_filled_up_with_ones_is_refused_in_linear_time() -> None:
    """A pattern that takes whole runs of 0xFF would need hours for this one."""
    data = encoded(noise())
    assert_refused_like_pil(data[: len(data) // 2] + b"\xff" * 1_000_000, "can't be decoded")
    filled = data[:-2] + b"\xff" * 7 + data[-2:]  # fill bytes before a marker are allowed
    assert isinstance(read(filled, make().image_processor), Encoded)


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_fault_10_a_shape_too_long_is_refused_by_name(aspect: str) -> None:
    data = encoded(noise(1, 20_000), "PNG")
    with pytest.raises(ImageError, match=r"^coco/1\.png: 1×20000 is too long"):
        read(data, make(336, aspect).image_processor, name="coco/1.png")


def png_bomb(side: int) -> bytes:
    """A valid PNG of side × side black pixels, 1 bit each, in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_fault_11_fault_12_bombs_are_refused_from_the_header(tmp_path: Path) -> None:
    """100 and 400 megapixels; in a process of its own, so that its peak memory is these files'."""
    for side in (10_000, 20_000):
        (tmp_path / f"{side}.png").write_bytes(png_bomb(side))
    code = """
import resource, sys
from aligngpt.image import ImageError
from aligngpt.processor import AlignGPTImageProcessor
from training.dali_pipeline import read
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read(path, AlignGPTImageProcessor(336))
    except ImageError as error:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""
    paths = [str(tmp_path / f"{side}.png") for side in (10_000, 20_000)]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    for line, path in zip(done.stdout.splitlines(), paths, strict=True):
        rise_kib, message = line.split(" ", 1)
        assert message.startswith(f"{path}: ")
        assert int(rise_kib) < 100 * 1024


def damaged(data: bytes) -> bytes:
    """A PNG whose compressed stream is spoilt: its chunks are whole, so it passes the screen; nobody decodes it."""
    place = data.index(b"IDAT") + 4
    return data[:place] + b"\0\0" + data[place + 2 :]


def with_wrong_checksum(data: bytes) -> bytes:
    """A PNG whose last data chunk has another checksum: DALI refuses it, PIL does not look."""
    place = data.index(b"IEND") - 8
    return data[:place] + bytes(255 - byte for byte in data[place : place + 4]) + data[place + 4 :]


def test_fault_6_a_file_that_breaks_dali_hurts_no_other() -> None:
    dali = make()
    good = [encoded(scene(60 + number, 50)) for number in range(5)]
    expected = dali.pixels(good)

    spoilt = [*good[:2], damaged(encoded(noise(), "PNG")), *good[2:]]
    files = [read(file, dali.image_processor, name=f"file {number}") for number, file in enumerate(spoilt)]
    assert all(isinstance(file, Encoded) for file in files)
    with pytest.raises(ImageError, match=r"^file 2: can't be decoded"):
        dali.decode(files)
    assert torch.equal(dali.pixels(good), expected)

    odd = with_wrong_checksum(encoded(noise(), "PNG"))
    found = dali.pixels([*good[:2], odd, *good[2:]])
    assert torch.equal(found[2], dali.image_processor.pixels([odd])[0])
    assert torch.equal(torch.cat([found[:2], found[3:]]), expected)
    assert torch.equal(dali.pixels(good), expected)


def test_fault_6_flipped_bits_end_in_pixels_or_in_an_error_that_names_the_file() -> None:
    """Whatever the damage, DALI and PIL agree on it, and the pipeline goes on."""
    dali = make()
    rng = np.random.default_rng(5)
    sources = [encoded(scene(90, 70)), encoded(scene(90, 70), progressive=True), encoded(noise(40, 30), "PNG")]
    outcomes = set()
    for number in range(60):
        data = bytearray(sources[number % 3])
        for place in rng.integers(2, len(data), 3):
            data[place] ^= 1 << int(rng.integers(8))
        try:
            expected = dali.image_processor.pixels([bytes(data)])
        except ImageError:
            with pytest.raises(ImageError, match=r"^photo: "):
                dali.decode([read(bytes(data), dali.image_processor, name="photo")])
            outcomes.add("refused")
        else:
            assert_close(dali.pixels([bytes(data)]), expected, dali.image_processor)
            outcomes.add("decoded")
    assert outcomes == {"refused", "decoded"}


def test_a_file_has_the_same_pixels_in_any_batch_and_keeps_them() -> None:
    dali = make()
    files = pictures(scene)
    together = dali.pixels(files)
    kept = together.clone()
    alone = [dali.pixels([file])[0] for file in reversed(files)]
    assert torch.equal(torch.stack(alone[::-1]), kept)
    assert torch.equal(together, kept)  # no later run wrote into it
    assert dali.pixels([]).shape == (0, 3, 56, 56)


@pytest.mark.parametrize("resized_by_dali", [False, True])
def test_tensors_outlive_the_runs_after_theirs(monkeypatch: pytest.MonkeyPatch, resized_by_dali: bool) -> None:
    """They are DALI's own memory: decoded pictures, or a whole batch where its operators make it in one run."""
    dali = make(resized_by_dali=resized_by_dali)
    batches = [[encoded(scene(60 + 7 * number, 50 + place)) for place in range(4)] for number in range(6)]
    expected = [dali.image_processor.pixels(batch) for batch in batches]
    results: list[Any] = []
    whole_run = dali._run

    def kept(run: list[Encoded]) -> Any:
        results.append(whole_run(run))
        return results[-1]

    monkeypatch.setattr(dali, "_run", kept)
    found = [dali.pixels(batch) for batch in batches]
    if resized_by_dali:
        for pixels, result in zip(found, results, strict=True):
            assert pixels.data_ptr() == torch.from_dlpack(result.as_tensor()).data_ptr()
    images = [[torch.from_dlpack(image) for image in result] for result in results]
    copies = [[image.clone() for image in run] for run in images]
    pixels_then = [pixels.clone() for pixels in found]
    results.clear()  # only torch holds them now
    for batch in batches * 2:
        dali.pixels(batch[::-1])
        results.clear()
    for run, copied in zip(images, copies, strict=True):
        assert all(torch.equal(image, copy) for image, copy in zip(run, copied, strict=True))
    for pixels, then, theirs in zip(found, pixels_then, expected, strict=True):
        assert torch.equal(pixels, then)
        assert_close(pixels, theirs, dali.image_processor)


def test_a_file_much_larger_than_its_pixels_goes_to_pil() -> None:
    """A run's memory is bounded by its pixels; so must its files be."""
    dali = make()
    padded = encoded(noise()) + bytes(dali_pipeline.BYTES_BESIDE_PIXELS + 3 * 80 * 60)
    assert isinstance(read(padded, dali.image_processor), Tensor)
    assert torch.equal(dali.pixels([padded]), dali.image_processor.pixels([padded]))


def test_runs_are_cut_by_files_and_by_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with the pixels of whole runs; a picture counts as the largest that is made of it."""
    dali = make(size=56, aspect="square")
    sources = [encoded(scene(*size)) for size in [(100, 100), (100, 100), (200, 100), (56, 560), (10, 100), (60, 60)]]
    expected = dali.pixels(sources)

    monkeypatch.setattr(dali_pipeline, "PIXELS_A_FILE", 31_000)
    monkeypatch.setattr(dali_pipeline, "PIXELS_A_RUN", 40_000)
    files = [read(source, dali.image_processor) for source in sources]
    assert [isinstance(file, Encoded) for file in files] == [True, True, True, False, False, True]
    at_work: list[int] = []
    whole_run = dali._run

    def counted(run: list[Encoded]) -> Any:
        at_work.append(len(run))
        return whole_run(run)

    monkeypatch.setattr(dali, "_run", counted)
    found = dali.decode(files)
    assert at_work == [3, 1]  # 10,000 + 10,000 + 20,000, and one more
    by_dali = [0, 1, 2, 5]
    assert torch.equal(found[by_dali], expected[by_dali])
    assert_close(found, expected, dali.image_processor)

    at_work.clear()
    monkeypatch.setattr(dali_pipeline, "FILES_A_RUN", 2)
    dali.decode(files)
    assert at_work == [2, 2]


def test_dali_that_fails_on_every_file_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a reason to leave all to PIL in silence. One file alone may be odd; then DALI's reason is logged."""
    dali = make()
    files = [read(encoded(scene(60, 50)), dali.image_processor, name=f"file {number}") for number in range(3)]

    def fail(run: list[Encoded]) -> Tensor:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(dali, "_run", fail)
    with pytest.raises(RuntimeError, match=r"^DALI fails on all 3 files: out of memory; --data\.decoder pil does"):
        dali.decode(files)
    with caplog.at_level("INFO"):
        dali.decode(files[:1])
    assert "file 0: DALI can't decode it; PIL is asked. DALI says: out of memory" in caplog.text


def test_settings_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="aspect is 'stretch'"):
        make(aspect="stretch")
    with pytest.raises(ValueError, match=r"hardware_share is 1\.5; it must be between 0 and 1"):
        DaliPixels(AlignGPTImageProcessor(56), CPU, hardware_share=1.5)


# ---------------------------------------------------------------------------------------------------- in training


@pytest.fixture
def make_samples(tokenizer: Any, tmp_path: Path) -> Callable[[bool], Samples]:
    """Four records over pictures of several kinds: two pictures, none, one, one."""
    for name, data in (("a.jpg", encoded(scene(90, 70))), ("b.gif", FOR_PIL["GIF"]), ("c.png", FOR_DALI["palette"])):
        (tmp_path / name).write_bytes(data)

    def sample(record: int, *images: str) -> Sample:
        question = "<image>\n" * len(images) + "What is it?"
        return Sample(f"s{record}", images, (Turn("user", question), Turn("assistant", "tea")), None, record)

    records = [sample(0, "a.jpg", "b.gif"), sample(1), sample(2, "c.png"), sample(3, "a.jpg")]

    def make(decode_by_dali: bool) -> Samples:
        processor = AlignGPTProcessor(
            AlignGPTImageProcessor(56), tokenizer, rows_per_image=16, align_token_id=320, image_token_id=321
        )
        data = RecordList(records, tmp_path)
        cut = Cut(per_device=4)
        return Samples(data, processor, levels=None, num_levels=8, seed=0, cut=cut, decode_by_dali=decode_by_dali)

    return make


def loaded(samples: Samples, parts: list[list[int]], workers: int, device: torch.device = CPU) -> list[Any]:
    plan = [Part(0, indices) for indices in parts]
    return list(micro_batches(samples, plan, workers=workers, device=device, prefetch=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_pil(make_samples: Callable[[bool], Samples], workers: int) -> None:
    parts = [[2, 0], [1], [3, 1], [0]]  # [1]: text alone
    ours, theirs = (
        [item.batches[0] for item in loaded(make_samples(by_dali), parts, workers)] for by_dali in (True, False)
    )
    assert [len(batch.pixel_values) for batch in ours] == [3, 0, 1, 2]
    for one, other in zip(ours, theirs, strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.rows, other.rows)
        assert one.pixel_values.shape == other.pixel_values.shape
        if len(one.pixel_values):
            assert_close(one.pixel_values, other.pixel_values, make_samples(True).processor.image_processor)


def test_fault_3_fault_6_dropped_wherever_it_is_found(make_samples: Callable[[bool], Samples], tmp_path: Path) -> None:
    """By a worker's screen (a.jpg, cut), by DALI and then PIL (c.png); the stand-ins are those of the PIL path."""
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    (tmp_path / "c.png").write_bytes(damaged((tmp_path / "c.png").read_bytes()))
    ours, theirs = (loaded(make_samples(by_dali), [[2], [1, 3], [1]], workers=1) for by_dali in (True, False))
    assert ours[0].dropped[0][1].reason.startswith("c.png: can't be decoded")
    assert ours[1].dropped[0][1].reason.startswith("a.jpg: can't be decoded")
    for one, other in zip(ours, theirs, strict=True):
        assert one.batches[0].ids == other.batches[0].ids
        assert one.dropped == other.dropped


def settled(decoder: str, *answers: str | None, run_dir: Path | None = None) -> str:
    """What a run settles on whose processes answer why they lack DALI."""
    world: Any = SimpleNamespace(device=CPU, gather=lambda mine: list(answers))
    config = tiny("pretrain")
    data: Any = dataclasses.replace(config.data, decoder=decoder)
    config = dataclasses.replace(config, run_dir=str(run_dir or ""), data=data)
    return loop.with_decoder(config, world).data.decoder


@pytest.mark.parametrize("began_with", ["pil", "dali"])
def test_auto_keeps_what_the_run_began_with(tmp_path: Path, began_with: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"config": {"data": {"decoder": began_with}}}))
    assert settled("auto", None, run_dir=tmp_path) == began_with
    if began_with == "dali":
        with pytest.raises(ValueError, match=r"'auto' and the run in .* began with 'dali'; it needs DALI .*: no DALI"):
            settled("auto", None, "no DALI", run_dir=tmp_path)
    else:
        assert settled("auto", "no DALI", run_dir=tmp_path) == "pil"


def test_the_decoder_is_dali_where_every_process_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_dali() is None
    assert [settled("auto", None, None), settled("dali", None), settled("pil", None)] == ["dali", "dali", "pil"]
    with monkeypatch.context() as patch:
        patch.setattr(dali_pipeline.importlib.util, "find_spec", lambda name: None)
        missing = why_not_dali()
        assert missing
    assert settled("auto", None, missing) == "pil"
    assert settled("pil", missing) == "pil"
    with pytest.raises(ValueError, match=r"--data\.decoder is 'dali'; it needs DALI in every process: DALI is not"):
        settled("dali", None, missing)


def test_runs_by_both_decoders_and_a_resume(parts: Any, launch: Any, tmp_path: Path) -> None:
    """The losses differ by what 2/255 in some pixels make of them; either run resumes bit-equal, by its own decoder."""
    flags = ["--model.llm", parts.llms["llama"], "--model.vision", parts.vision, "--data.workers", 1, "--save-every", 2]
    flags += ["--data.path", parts.captions, "--data.image-folder", parts.images, "--global-batch-size", 4]
    flags += ["--max-steps", 3]
    dali = launch("pretrain", tmp_path / "dali", *flags)
    pil = launch("pretrain", tmp_path / "pil", *flags, "--data.decoder", "pil")
    assert dali.status == pil.status == 0, dali.output + pil.output
    assert "images are decoded by DALI on cpu" in dali.output
    assert json.loads((dali.run_dir / "config.json").read_text())["config"]["data"]["decoder"] == "dali"
    assert dali.losses == pytest.approx(pil.losses, rel=1e-4)
    assert dali.losses != pil.losses

    interrupted = tmp_path / "again"
    shutil.copytree(dali.run_dir, interrupted, ignore=shutil.ignore_patterns("model", "step-00000003"))
    (interrupted / "LATEST").write_text("step-00000002\n")
    other = launch("pretrain", interrupted, *flags, "--data.decoder", "pil")
    assert other.status == 1
    assert "data.decoder: 'dali' there, 'pil' now" in other.output
    again = launch("pretrain", interrupted, *flags)
    assert again.status == 0, again.output
    assert again.losses == dali.losses


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [56, 336])
@pytest.mark.parametrize("draw", [noise, scene])
def test_pixels_on_a_gpu_are_those_of_pil(draw: Callable[[int, int], Image.Image], size: int, aspect: str) -> None:
    dali = make(size, aspect, torch.device("cuda", 0))
    files = [*pictures(draw), *FOR_DALI.values(), *FOR_PIL.values()]
    found = dali.pixels(files)
    assert found.device == torch.device("cuda", 0)
    assert_close(found, dali.image_processor.pixels(files), dali.image_processor)
    again = dali.pixels(files[::-1])
    assert torch.equal(again.flip(0), found)  # whatever the batch, and the first result still stands


@pytest.mark.gpu
def test_a_file_that_breaks_dali_on_a_gpu_hurts_no_other() -> None:
    dali = make(device=torch.device("cuda", 0))
    good = [encoded(scene(60 + number, 50)) for number in range(5)]
    expected = dali.pixels(good)
    with pytest.raises(ImageError, match="can't be decoded"):
        dali.pixels([*good[:2], damaged(encoded(noise(), "PNG")), *good[2:]])
    assert torch.equal(dali.pixels(good), expected)


@pytest.mark.gpu
def test_batches_on_a_gpu_carry_their_pixels_there(make_samples: Callable[[bool], Samples]) -> None:
    device = torch.device("cuda", 0)
    for item in loaded(make_samples(True), [[2, 0], [1], [3]], workers=1, device=device):
        (batch,) = item.batches
        assert batch.pixel_values.device == device
        assert batch.to(device).pixel_values is batch.pixel_values


def test_screening_takes_nothing_that_is_not_a_picture() -> None:
    assert screen(b"\xff\xd8\xff\xd9", make().image_processor, name="x") is None  # a JPEG without a picture
