"""Picture files to pixels by DALI: `aligngpt.image` of M files at once, on a GPU or on CPU threads.

    read     file -> Encoded, or bytes of pixels from PIL      in a loader's worker process
    decode   M of them -> (M, 3, size, size) fp32              in the training process, one run of the pipeline

    bytes ─ decode (RGB, EXIF ignored) ─ pad ─ widths ─ heights ─ crop ─ (x / 255 - mean) / std

On a CPU, DALI decodes to PIL's bytes and torch does the rest; on a GPU, DALI's operators do all of it. Either way the
tensors that leave DALI are its own memory, taken through DLPack.

`AlignGPTImageProcessor.pixels` is the reference: the two differ by at most 4/255, on average by 0.25/255, before
normalisation. The exception is stripes and checkerboards of one pixel, where many sums end in exactly one half and the
two round them to different sides: the average reaches 1/255 (672 × 672 to 56), the largest difference stays 1/255
there. What keeps the bound:

- PIL rounds and clips to bytes between its two passes, first widths, then heights. torch's resize of bytes does the
  same, with weights of 16 bits where PIL's have 22: at most 2/255 apart, on average 0.01/255.
- DALI's operators do not, so on a GPU there are two resizes, each rounded. And where the filter reaches over an edge,
  PIL and torch leave those taps out and rescale the others; DALI takes the edge's pixel for them. With weights w that
  sum to 1, and left and right their sums beyond the two edges,
      PIL's = (DALI's - left · first pixel - right · last pixel) / (1 - left - right),
  which `edge_weights` computes on the host, since it depends on the sizes alone. DALI's bicubic by itself is up to
  15/255 off.

A bad file kills DALI's pipeline object and the batch in it, so files are screened in `read`: DALI gets JPEG and PNG of
the kinds on which it agrees with PIL, whole to the end marker, not larger than PIL may decode. All others go through
PIL, which decodes them or says what is wrong. Should DALI still refuse a file, the pipeline is made anew, the files are
tried one by one, and PIL has the last word on that one: a file's pixels do not depend on its neighbours. Where DALI
refuses every one of several files that PIL decodes, DALI is at fault, and its error is raised.

Host memory has a bound. A run takes at most 32 files and 32 megapixels, the largest picture made on the way counted for
each (padded, or resized and not yet cut); a file goes to PIL if it is above 16 megapixels, or is larger itself than its
pixels. On a CPU the worst found were 290 MB (32 pictures of 1000 × 1000, two threads), of which DALI keeps a part.

The GPU path (`device="mixed"`, then GPU operators) has tests marked `gpu`; it has not been run or measured yet. Its
operators are tested on a CPU.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from aligngpt.image import ImageError, opened, resized_size
from aligngpt.processor import AlignGPTImageProcessor

logger = logging.getLogger(__name__)

FILES_A_RUN = 32  # what one run of the pipeline takes; more files go in several
PIXELS_A_FILE = 16_000_000  # the largest picture, as `_pixels_made` counts, that DALI gets
PIXELS_A_RUN = 32_000_000  # a run ends before it has more
BYTES_BESIDE_PIXELS = 1 << 20  # how much larger than its pixels, 3 bytes each, a file for DALI may be
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


Picture = Encoded | Tensor  # a tensor: (3, size, size) uint8, made by PIL


def read(source: str | Path | bytes, image_processor: AlignGPTImageProcessor, *, name: str | None = None) -> Picture:
    """A file for `DaliPixels.decode`: as it is if DALI may decode it, otherwise decoded by PIL.

    ImageError: as `open_image` and `preprocess` raise it for what they refuse.
    """
    if name is None:
        name = f"image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    return screen(source, image_processor, name=name) or image_processor.read(source, name)


def screen(source: str | Path | bytes, image_processor: AlignGPTImageProcessor, *, name: str) -> Encoded | None:
    """The file, if DALI may decode it. What it costs is known from its header, before anything is decoded.

    JPEG: gray and colour, baseline or progressive, of 8 bits; PNG: up to 8 bits a channel. On those DALI and PIL agree,
    palettes and alpha included. Whole means that the segments lead to the end marker.
    """
    try:
        with opened(source, name=name, formats=("JPEG", "PNG")) as image:
            (width, height), form, mode = image.size, image.format, image.mode
        length = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        if _pixels_made(width, height, image_processor) > PIXELS_A_FILE:
            return None
        if length > 3 * width * height + BYTES_BESIDE_PIXELS:
            return None
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except (ImageError, OSError):  # the PIL path says what is wrong
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
    """The pipeline of one size, mean, deviation and aspect ratio on one device. For one thread at a time.

    hardware_share: the share (0 to 1) of a batch's JPEGs that a GPU's decoding unit gets, if it has one. The default is
        0: how many of a batch are that share depends on the batch, and where the unit does not restore chroma as the
        CPU does, a file's pixels would depend on its neighbours. Its pixels are unmeasured, as is its speed.
    """

    def __init__(self, image_processor: AlignGPTImageProcessor, device: torch.device, *, hardware_share: float = 0.0):
        if image_processor.image_aspect_ratio not in ("square", "pad"):
            raise ValueError(f"aspect is {image_processor.image_aspect_ratio!r}; DALI's pipeline has square and pad")
        if not 0 <= hardware_share <= 1:
            raise ValueError(f"hardware_share is {hardware_share}; it must be between 0 and 1")
        self.image_processor = image_processor
        self.device = device
        self.hardware_share = hardware_share
        self.resized_by_dali = device.type == "cuda"
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.threads = max(1, min(8, cores))
        self.pool = ThreadPoolExecutor(self.threads, "resize")  # has no thread before its first task
        self.pipeline: Any = None  # made by the first run: a pipeline belongs to its process
        # (3, 1, 1) each, beside the planes of a picture
        self.mean, self.std, self.colour = (
            torch.tensor(values)[:, None, None]
            for values in (
                image_processor.image_mean,
                image_processor.image_std,
                [int(channel * 255) for channel in image_processor.image_mean],
            )
        )

    def pixels(self, sources: Sequence[str | Path | bytes]) -> Tensor:
        """(M, 3, size, size) fp32 on the device: `AlignGPTImageProcessor.pixels` of files."""
        return self.decode([read(source, self.image_processor) for source in sources])

    def decode(self, pictures: Sequence[Picture]) -> Tensor:
        """(M, 3, size, size) fp32 on the device, in the pictures' order; no later call changes it.

        On a GPU it is DALI's own memory where one run makes the whole batch: use it on the stream that is current here,
        or keep it until its use on another has ended. A batch of several runs, or with pictures from PIL, is put
        together by copying.

        ImageError: a file that neither DALI nor PIL decodes.
        RuntimeError: of several files in a run DALI decodes none and PIL all.
        """
        files = {row: picture for row, picture in enumerate(pictures) if isinstance(picture, Encoded)}
        runs = list(self._runs(files))
        if len(runs) == 1 and len(files) == len(pictures):
            pixels = self._pixels(list(files.values()))[0]
        else:
            size = self.image_processor.size
            pixels = torch.empty(len(pictures), 3, size, size, device=self.device)
            for row, picture in enumerate(pictures):
                if isinstance(picture, Tensor):
                    pixels[row] = self.image_processor.normalised([picture])[0]
            for rows in runs:
                pixels[rows] = self._pixels([files[row] for row in rows])[0]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # another thread takes them, on whatever stream
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

    def _pixels(self, files: list[Encoded]) -> tuple[Tensor, str | None]:
        """(F, 3, size, size) of one run; of a single file that PIL had to decode, DALI's reason too."""
        try:
            result = self._run(files)
        except RuntimeError as error:  # DALI's only kind; the pipeline can't be used after it
            self.pipeline = None
            why = " ".join(str(error).split())
        else:
            return self._finished(result), None
        if len(files) == 1:
            logger.info("%s: DALI can't decode it; PIL is asked. DALI says: %s", files[0].name, why)
            picture = self.image_processor.read(files[0].data, files[0].name)
            return self.image_processor.normalised([picture]).to(self.device), why
        alone, reasons = zip(*(self._pixels([file]) for file in files), strict=True)
        if all(reasons):
            raise RuntimeError(
                f"DALI fails on all {len(files)} files: {reasons[-1]}; --data.decoder pil does without it"
            )
        return torch.cat(alone), None

    def _run(self, files: list[Encoded]) -> Any:
        """The pipeline's result: pictures as decoded or, `resized_by_dali`, pixels. No later run writes into it."""
        if self.pipeline is None:
            self.pipeline = self._build()
        inputs = [self._inputs(file) for file in files]
        for name in inputs[0]:
            self.pipeline.feed_input(name, [values[name] for values in inputs])
        # Given a stream, DALI orders on it both the result and, once that is dropped, the use of its memory.
        (result,) = self.pipeline.run(torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None)
        return result

    def _finished(self, result: Any) -> Tensor:
        if self.resized_by_dali:
            return torch.from_dlpack(result.as_tensor())
        images = [torch.from_dlpack(image) for image in result]
        pixels = torch.empty(len(images), 3, self.image_processor.size, self.image_processor.size)
        list(self.pool.map(self._finish, images, pixels))
        return pixels

    def _finish(
        self,
        image: Tensor,  # (height, width, 3) uint8
        pixels: Tensor,  # (3, size, size), written
    ) -> None:
        size = self.image_processor.size
        height, width = image.shape[:2]
        if self.image_processor.image_aspect_ratio == "pad" and width != height:
            side = max(width, height)
            left, top = (side - width) // 2, (side - height) // 2
            row = self.colour.flatten().to(torch.uint8).repeat(side)  # repeating pixels down as well is much slower
            canvas = row.repeat(side, 1).view(side, side, 3)
            canvas[top : top + height, left : left + width] = image
            image, height, width = canvas, side, side
        new_width, new_height = resized_size(width, height, size)
        left, top = (new_width - size) // 2, (new_height - size) // 2
        planes = image.permute(2, 0, 1)[None]  # channels last, as torch's resize of bytes likes them
        resized = interpolate(planes, (new_height, new_width), mode="bicubic", antialias=True)[0]
        pixels.copy_(resized[:, top : top + size, left : left + size]).div_(255).sub_(self.mean).div_(self.std)

    def _inputs(self, file: Encoded) -> dict[str, np.ndarray]:
        """A file's bytes and, computed from its sizes, what DALI's operators take."""

        def numbers(*values: float, dtype: Any = np.float32) -> np.ndarray:
            return np.array(values, dtype=dtype)

        inputs = {"file": np.frombuffer(file.data, dtype=np.uint8)}
        if not self.resized_by_dali:
            return inputs
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
        pipeline = Pipeline(
            batch_size=FILES_A_RUN,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            image = fn.decoders.image(
                fn.external_source(name="file", dtype=types.UINT8, ndim=1),
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # the CPU's way to restore chroma, on a GPU too
                adjust_orientation=False,
                hw_decoder_load=self.hardware_share,
            )
            pipeline.set_outputs(self._operators(image) if self.resized_by_dali else image)
        pipeline.build()
        return pipeline

    def _operators(self, image: Any) -> Any:
        """What follows the decoder, in DALI's operators."""
        from nvidia.dali import fn, types

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
            weights = weights.gpu() if self.device.type == "cuda" else weights
            return fn.cast(line * weights[0] - first * weights[1] - last * weights[2], dtype=types.UINT8)

        if self.image_processor.image_aspect_ratio == "pad":
            image = fn.slice(
                image,
                given("corner", dtype=types.INT32),
                given("canvas", dtype=types.INT32),
                axes=(0, 1),
                out_of_bounds_policy="pad",
                fill_values=self.colour.flatten().tolist(),
            )
        image = resample(image, "widths", image[:, :1], image[:, -1:])
        image = resample(image, "heights", image[:1], image[-1:])
        return fn.crop_mirror_normalize(
            image,
            dtype=types.FLOAT,
            mean=[channel * 255 for channel in self.image_processor.image_mean],
            std=[deviation * 255 for deviation in self.image_processor.image_std],
            output_layout="CHW",
        )
