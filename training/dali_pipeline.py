"""Picture files to pixels by DALI: `aligngpt.image` of M files at once, on a GPU or on CPU threads.

    read     file -> Encoded, or pixels from PIL               in a loader's worker process
    decode   M of them -> (M, 3, size, size) fp32              in the training process, one run of the pipeline

    bytes ─ decode (RGB, EXIF ignored) ─ pad ─ widths ─ heights ─ (x - mean) / std ─ DLPack ─ copy

`AlignGPTImageProcessor.pixels` is the reference: the two differ by at most 4/255, on average by 0.25/255, before
normalisation. The exception is stripes and checkerboards of one pixel, where many sums end in exactly one half and the
two round them to different sides: the average reaches 0.98/255 (672 × 672 to 56), the largest difference stays 1/255
there. DALI's own bicubic keeps no such bound (up to 15/255), for two reasons:

- PIL rounds and clips to bytes between its two passes, first widths, then heights. So there are two here.
- Where the filter reaches over an edge, PIL leaves those taps out and rescales the others; DALI takes the edge's pixel
  for them. With weights w that sum to 1, and left and right their sums beyond the two edges,
      PIL's = (DALI's - left · first pixel - right · last pixel) / (1 - left - right),
  which `edge_weights` computes on the host, since it depends on the sizes alone.

A bad file kills DALI's pipeline object and the batch in it, so files are screened in `read`: DALI gets JPEG and PNG of
the kinds on which it agrees with PIL, whole to the end marker, not larger than PIL may decode. All others go through
PIL, which decodes them or says what is wrong. Should DALI still refuse a file, the pipeline is made anew, the files are
tried one by one, and PIL has the last word on that one: a file's pixels do not depend on its neighbours. Where DALI
refuses every one of several files that PIL decodes, DALI is at fault, and its error is raised.

Host memory has a bound. A run takes at most 32 files and 32 megapixels, the largest picture made on the way counted for
each (padded, or resized and not yet cut); a file above 16 megapixels goes to PIL. The worst found were 1.4 GB for two
pictures of 336 × 47600; two photos of 4000 × 3000 took 0.6 GB. DALI keeps that memory for its next run.

The GPU path (`device="mixed"`, then GPU operators) has tests marked `gpu`; it has not been run or measured yet.
"""

import importlib.util
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aligngpt.image import ImageError, open_image, resized_size
from aligngpt.processor import AlignGPTImageProcessor

logger = logging.getLogger(__name__)

FILES_A_RUN = 32  # what one run of the pipeline takes; more files go in several
PIXELS_A_FILE = 16_000_000  # the largest picture, as `_pixels_made` counts, that DALI gets
PIXELS_A_RUN = 32_000_000  # a run ends before it has more
# Stuffed zeros and restarts belong to the scan. A marker may follow any number of 0xFF: the last of them is matched,
# since a pattern that takes them all would start over at each.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")


def why_not_dali() -> str | None:
    """Why pictures can't be decoded by DALI here; None if they can."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the namespace `nvidia`
        found = False
    if found:
        return None
    return "DALI is not installed; pip install 'aligngpt[dali]' brings it, 'aligngpt[dali-cu12]' the one for CUDA 12"


# ---------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class Encoded:
    """A file that DALI may decode."""

    data: bytes
    width: int
    height: int
    name: str  # what errors call it


Picture = Encoded | Tensor  # a tensor: (3, size, size) fp32, made by PIL


def read(source: str | Path | bytes, image_processor: AlignGPTImageProcessor, *, name: str | None = None) -> Picture:
    """A file for `DaliPixels.decode`: as it is if DALI may decode it, otherwise decoded by PIL.

    ImageError: as `open_image` and `preprocess` raise it for what they refuse.
    """
    if name is None:
        name = f"image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    return screen(source, image_processor, name=name) or _by_pil(source, image_processor, name)


def screen(source: str | Path | bytes, image_processor: AlignGPTImageProcessor, *, name: str) -> Encoded | None:
    """The file, if DALI may decode it. What it costs is known from its header, before anything is decoded.

    JPEG: gray and colour, baseline or progressive, of 8 bits; PNG: up to 8 bits a channel. On those DALI and PIL agree,
    palettes and alpha included. Whole means that the segments lead to the end marker.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in open_image
        try:
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                (width, height), form, mode = image.size, image.format, image.mode
            if _pixels_made(width, height, image_processor) > PIXELS_A_FILE:
                return None
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
        except Exception:  # whatever PIL's parsers trip over; the PIL path raises it again, with a name
            return None
    jpeg = form == "JPEG" and mode in ("L", "RGB") and _is_whole_jpeg(data)
    png = form == "PNG" and _is_whole_png(data)
    return Encoded(data, width, height, name) if jpeg or png else None


def _pixels_made(width: int, height: int, image_processor: AlignGPTImageProcessor) -> int:
    """The largest picture that PIL makes on the way, in pixels."""
    if image_processor.image_aspect_ratio == "pad":
        width = height = max(width, height)
    resized = resized_size(width, height, image_processor.size)
    return max(width * height, resized[0] * resized[1])


def _is_whole_jpeg(data: bytes) -> bool:
    """Whether segments and scans of a frame that DALI decodes lead to the end marker."""
    place, scans = 2, 0
    while found := _JPEG_MARKER.search(data, place):
        kind, place = found[1][0], found.end()
        if kind == 0xD9:
            return scans > 0
        if 0xC3 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # lossless, hierarchical, arithmetic coding
            return False
        scans += kind == 0xDA
        place += int.from_bytes(data[place : place + 2])  # a segment's length; a scan's header has one too
    return False


def _is_whole_png(data: bytes) -> bool:
    """Whether the chunks of a still picture of at most 8 bits a channel lead to the end chunk."""
    place = 8
    if data[24:25] > b"\x08":  # bits a channel, in the first chunk
        return False
    while len(kind := data[place + 4 : place + 8]) == 4 and kind != b"acTL":
        place += 12 + int.from_bytes(data[place : place + 4])
        if kind == b"IEND":
            return place <= len(data)
    return False


def _by_pil(source: str | Path | bytes, image_processor: AlignGPTImageProcessor, name: str) -> Tensor:
    image = open_image(source, name=name)
    try:
        return image_processor.pixels([image])[0]
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error


# ---------------------------------------------------------------------------------------------------- geometry


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0.0))


def edge_weights(length: int, resized: int, size: int) -> np.ndarray:
    """How DALI's resampled line becomes PIL's: out = w[0] · line - w[1] · first pixel - w[2] · last pixel.

    A line of `length` pixels is resampled to `resized`, of which the middle `size` are kept. Returns (3, size) fp32.
    """
    scale = length / resized
    stretch = max(scale, 1.0)  # the filter widens where the line shrinks
    middle = (np.arange(size) + (resized - size) // 2 + 0.5) * scale
    taps = np.floor(middle - 2 * stretch).astype(np.int64)[:, None] + np.arange(int(4 * stretch) + 3)
    weights = _bicubic((taps + 0.5 - middle[:, None]) / stretch)
    weights /= weights.sum(1, keepdims=True)
    left, right = (weights * (taps < 0)).sum(1), (weights * (taps >= length)).sum(1)
    return (np.stack([np.ones(size), left, right]) / (1 - left - right)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- pixels


class DaliPixels:
    """The pipeline of one size, mean, deviation and aspect ratio on one device. For one thread at a time."""

    def __init__(self, image_processor: AlignGPTImageProcessor, device: torch.device):
        if image_processor.image_aspect_ratio not in ("square", "pad"):
            raise ValueError(f"aspect is {image_processor.image_aspect_ratio!r}; DALI's pipeline has square and pad")
        self.image_processor = image_processor
        self.device = device
        self.pipeline: Any = None  # made by the first run: a pipeline belongs to its process

    def pixels(self, sources: Sequence[str | Path | bytes]) -> Tensor:
        """(M, 3, size, size) fp32 on the device: `AlignGPTImageProcessor.pixels` of files."""
        return self.decode([read(source, self.image_processor) for source in sources])

    def decode(self, pictures: Sequence[Picture]) -> Tensor:
        """(M, 3, size, size) fp32 on the device, in the pictures' order; no later call changes it.

        ImageError: a file that neither DALI nor PIL decodes.
        RuntimeError: of several files in a run DALI decodes none and PIL all.
        """
        size = self.image_processor.size
        pixels = torch.empty(len(pictures), 3, size, size, device=self.device)
        files = {}
        for row, picture in enumerate(pictures):
            if isinstance(picture, Encoded):
                files[row] = picture
            else:
                pixels[row] = picture
        for rows in self._runs(files):
            self._decode_into(pixels, rows, [files[row] for row in rows])
        return pixels

    def _runs(self, files: dict[int, Encoded]) -> Iterator[list[int]]:
        """The rows in order, cut where a run would exceed `FILES_A_RUN` or `PIXELS_A_RUN`."""
        rows: list[int] = []
        total = 0
        for row, file in files.items():
            made = _pixels_made(file.width, file.height, self.image_processor)
            if rows and (len(rows) == FILES_A_RUN or total + made > PIXELS_A_RUN):
                yield rows
                rows, total = [], 0
            rows.append(row)
            total += made
        if rows:
            yield rows

    def _decode_into(self, pixels: Tensor, rows: list[int], files: list[Encoded]) -> str | None:
        """One run; of a single file that PIL had to decode, DALI's reason is returned."""
        if self.pipeline is None:
            self.pipeline = self._build()
        try:
            pixels[rows] = self._run(files)
        except RuntimeError as error:  # DALI's only kind; the pipeline can't be used after it
            self.pipeline = None
            why = " ".join(str(error).split())
        else:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # the copy ends before DALI's next run
            return None
        if len(files) == 1:
            logger.info("%s: DALI can't decode it; PIL is asked. DALI says: %s", files[0].name, why)
            pixels[rows[0]] = _by_pil(files[0].data, self.image_processor, files[0].name)
            return why
        reasons = [self._decode_into(pixels, [row], [file]) for row, file in zip(rows, files, strict=True)]
        if all(reasons):
            raise RuntimeError(
                f"DALI fails on all {len(files)} files: {reasons[-1]}; --data.decoder pil does without it"
            )
        return None

    def _run(self, files: list[Encoded]) -> Tensor:
        """The pipeline's result, in memory that its next run overwrites."""
        inputs = [self._inputs(file) for file in files]
        for name in inputs[0]:
            self.pipeline.feed_input(name, [values[name] for values in inputs])
        (result,) = self.pipeline.run()
        return torch.from_dlpack(result.as_tensor())

    def _inputs(self, file: Encoded) -> dict[str, np.ndarray]:
        """A file's bytes and, computed from its sizes, what the pipeline's steps take."""

        def numbers(*values: float, dtype: Any = np.float32) -> np.ndarray:
            return np.array(values, dtype=dtype)

        inputs = {"file": np.frombuffer(file.data, dtype=np.uint8)}
        width, height, size = file.width, file.height, self.image_processor.size
        if self.image_processor.image_aspect_ratio == "pad":
            side = max(width, height)
            inputs["corner"] = numbers(-((side - height) // 2), -((side - width) // 2), dtype=np.int32)
            inputs["canvas"] = numbers(side, side, dtype=np.int32)
            width = height = side
        new_width, new_height = resized_size(width, height, size)
        left, top = (new_width - size) // 2, (new_height - size) // 2
        across, down = width / new_width, height / new_height
        return inputs | {
            "widths.size": numbers(height, size),
            "widths.start": numbers(0, left * across),
            "widths.end": numbers(height, (left + size) * across),
            "widths.edges": edge_weights(width, new_width, size)[:, None, :, None],
            "heights.size": numbers(size, size),
            "heights.start": numbers(top * down, 0),
            "heights.end": numbers((top + size) * down, size),
            "heights.edges": edge_weights(height, new_height, size)[:, :, None, None],
        }

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        colour = [channel * 255 for channel in self.image_processor.image_mean]

        def given(name: str, dtype: Any = types.FLOAT, ndim: int = 1) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        def resample(image: Any, name: str, first: Any, last: Any) -> Any:
            """One of PIL's passes: to the size and from the region that are given, rounded to bytes."""
            line = fn.resize(
                image,
                size=given(f"{name}.size"),
                roi_start=given(f"{name}.start"),
                roi_end=given(f"{name}.end"),
                interp_type=types.INTERP_CUBIC,
                antialias=True,
                dtype=types.FLOAT,
            )
            weights = given(f"{name}.edges", ndim=4)
            weights = weights.gpu() if on_gpu else weights
            return fn.cast(line * weights[0] - first * weights[1] - last * weights[2], dtype=types.UINT8)

        threads = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        pipeline = Pipeline(
            batch_size=FILES_A_RUN,
            num_threads=max(1, min(8, threads)),
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            # On a GPU, plain chroma upsampling would differ from the CPU's. The decoding unit of newer GPUs knows no
            # other, and how much it gets depends on the batch: it gets nothing.
            image = fn.decoders.image(
                given("file", dtype=types.UINT8),
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,
                adjust_orientation=False,
                hw_decoder_load=0.0,
            )
            if self.image_processor.image_aspect_ratio == "pad":
                image = fn.slice(
                    image,
                    given("corner", dtype=types.INT32),
                    given("canvas", dtype=types.INT32),
                    axes=(0, 1),
                    out_of_bounds_policy="pad",
                    fill_values=[int(channel) for channel in colour],
                )
            image = resample(image, "widths", image[:, :1], image[:, -1:])
            image = resample(image, "heights", image[:1], image[-1:])
            pixels = fn.crop_mirror_normalize(
                image,
                dtype=types.FLOAT,
                mean=colour,
                std=[deviation * 255 for deviation in self.image_processor.image_std],
                output_layout="CHW",
            )
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline
