"""Which samples a step takes, and the processes that make batches of them.

The order is a pure function of (seed, epoch): step k of an epoch takes `order[kG : (k+1)G]`, G samples of the global
batch, whatever the number of processes; the last step takes what is left, so that an epoch shows every sample once.
A global batch is cut into micro-steps of world × B samples (B per process), and a micro-step into one part for each
process; every process runs the same number of micro-steps, and one whose part is empty runs a dummy without supervised
tokens. Resuming needs the step's number and nothing else.

    steps ─ share ─ lists of indices ─ worker processes: read, tokenise, decode, collate ─ Batch, or BadSample

Where DALI decodes, the workers read and screen the files, and a thread of the training process turns them into pixels.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from aligngpt.batch import Batch, Example, collate, load_in_order
from aligngpt.data.llava_json import Sample, image_path
from aligngpt.image import ImageError
from aligngpt.processor import AlignGPTProcessor
from aligngpt.text import IGNORE_INDEX, Tokenized
from training.dali_pipeline import DaliPixels, Picture, read

CHARACTERS_PER_TOKEN = 4  # enough to sort by; nothing else depends on it
AHEAD = 2  # batches that DALI decodes while the model is at work


class BadSampleError(ValueError):
    """A sample that cannot be trained on; the message names file, record and sample id."""


@dataclass(frozen=True)
class BadSample:
    """What a worker hands over in place of a batch, since an exception would arrive as the text of a traceback."""

    message: str


@dataclass(frozen=True)
class Undecoded:
    """What a worker hands over where DALI decodes: a batch whose pixel_values are (M, 3, 0, 0), and its M pictures."""

    batch: Batch
    pictures: list[Picture]


# ---------------------------------------------------------------------------------------------------- order


@dataclass(frozen=True)
class Order:
    """The order of samples over all epochs.

    lengths and has_image describe the samples and are used by "grouped" alone: a global batch then holds only samples
    with an image or only samples without (the few left over of both kinds are mixed), and is sorted by length, so that
    what is padded together is alike. Which samples meet in a batch stays random.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    kind: Literal["shuffle", "grouped"] = "shuffle"
    lengths: Sequence[int] | np.ndarray = ()
    has_image: Sequence[bool] | np.ndarray = ()

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def epoch(self, epoch: int) -> np.ndarray:
        """All indices in the order of an epoch (0, 1, …)."""
        # RandomState, not default_rng: its stream is the same in every version of NumPy.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
        order = random.permutation(self.num_samples)
        if self.kind == "shuffle":
            return order
        size = self.global_batch_size
        with_image = np.asarray(self.has_image, dtype=bool)[order]
        full, rest = [], []
        for group in (order[with_image], order[~with_image]):
            end = len(group) // size * size
            full += [group[start : start + size] for start in range(0, end, size)]
            rest.append(group[end:])
        left = np.concatenate(rest)
        last = [left[start : start + size] for start in range(0, len(left), size)]
        batches = [*(full[index] for index in random.permutation(len(full))), *last]
        lengths = np.asarray(self.lengths)
        return np.concatenate([batch[np.argsort(lengths[batch], kind="stable")] for batch in batches])

    def steps(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """The global batches of optimizer steps first … stop - 1, counted over all epochs."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(first, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.epoch(epoch)
            start = step % self.steps_per_epoch * self.global_batch_size
            yield order[start : start + self.global_batch_size]


def share(batch: np.ndarray, *, rank: int, world_size: int, per_device: int) -> list[list[int]]:
    """A process's micro-batches of a global batch, as many for every process; a part may be empty."""
    micro_step = world_size * per_device
    return [
        np.array_split(batch[start : start + micro_step], world_size)[rank].tolist()
        for start in range(0, len(batch), micro_step)
    ]


def estimated_lengths(samples: Sequence[Sample], rows_per_image: int) -> list[int]:
    """About how many tokens each sample has, without a tokenizer."""
    return [
        sum(len(turn.text) for turn in sample.turns) // CHARACTERS_PER_TOKEN + rows_per_image * len(sample.images)
        for sample in samples
    ]


def random_level(seed: int, record: int, num_levels: int) -> int:
    """The level of a sample under `--data.levels random`: fixed for the run, the same in every epoch."""
    return int(np.random.SeedSequence([seed, record]).generate_state(1)[0]) % num_levels


# ---------------------------------------------------------------------------------------------------- batches


class Samples(Dataset[Batch | Undecoded | BadSample]):
    """A list of sample indices to a batch. The levels of a run are decided here, so they are data to the model.

    decode_by_dali leaves the pictures to the training process, as `Undecoded`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: AlignGPTProcessor,
        *,
        path: str,
        image_folder: str,
        levels: str,  # "record", "random" or "none"
        num_levels: int,
        seed: int,
        decode_by_dali: bool = False,
    ):
        self.samples = samples
        self.processor = processor
        self.path = path
        self.image_folder = image_folder
        self.levels = levels
        self.num_levels = num_levels
        self.seed = seed
        self.decode_by_dali = decode_by_dali

    def __getitem__(self, indices: list[int]) -> Batch | Undecoded | BadSample:
        examples: list[Example] = []
        pictures: list[Picture] = []
        for index in indices:
            sample = self.samples[index]
            try:
                level = self.level(sample)
                if self.decode_by_dali:
                    text, files = self.processor.text(sample), self.files(sample)
                    examples.append(Example(sample.id, text, torch.empty(len(files), 3, 0, 0), level))
                    pictures += files
                else:
                    examples.append(self.processor.example(sample, self.image_folder, level=level))
            except ValueError as error:
                return BadSample(f"{self.path}: {error}")
        batch = collate(
            examples or [self.dummy()],
            token_ids=self.processor.token_ids,
            rows_per_image=self.processor.rows_per_image,
            image_size=self.side,
        )
        return Undecoded(batch, pictures) if self.decode_by_dali else batch

    @property
    def side(self) -> int:
        """Height and width of the pixels that leave a worker."""
        return 0 if self.decode_by_dali else self.processor.image_processor.size

    def files(self, sample: Sample) -> list[Picture]:
        """A sample's pictures for DALI. ValueError names the record and what is wrong with it."""
        try:
            paths = [image_path(self.image_folder, name) for name in sample.images]
        except ValueError as error:
            raise ValueError(f"{sample.name}: {error}") from error
        return [read(path, self.processor.image_processor, name=f"{sample.name}: {path}") for path in paths]

    def decoded(self, item: Undecoded, pixels: DaliPixels) -> Batch | BadSample:
        """The batch with its pixels."""
        try:
            return dataclasses.replace(item.batch, pixel_values=pixels.decode(item.pictures))
        except ImageError as error:
            return BadSample(f"{self.path}: {error}")

    def level(self, sample: Sample) -> int | None:
        if not sample.images or self.levels == "none":
            return None
        if self.levels == "random":
            return random_level(self.seed, sample.record, self.num_levels)
        if sample.level is None:
            raise ValueError(
                f"{sample.name} has no align_level; it needs one, or --data.levels random, or a levels file"
            )
        return sample.level

    def dummy(self) -> Example:
        """One padding token, no image, nothing supervised."""
        token = torch.tensor([self.processor.token_ids.pad])
        text = Tokenized(token, torch.full_like(token, IGNORE_INDEX), torch.zeros_like(token, dtype=torch.bool), 0)
        return Example(id="dummy", text=text, pixel_values=torch.empty(0, 3, self.side, self.side))


def micro_batches(
    samples: Samples, parts: Iterable[list[int]], *, workers: int, device: torch.device
) -> Iterator[Batch | BadSample]:
    """A batch for each list of indices, in order, made ahead of time by `workers` processes.

    DALI leaves pixels on the device; everything else is on the host.
    """
    loader = load_in_order(samples, parts, workers=workers)
    return _decoded_ahead(loader, samples, device) if samples.decode_by_dali else loader


def _decoded_ahead(
    loader: Iterator[Undecoded | BadSample], samples: Samples, device: torch.device
) -> Iterator[Batch | BadSample]:
    """What the loader gives, decoded in order by a thread that keeps `AHEAD` batches in hand.

    Nothing waits for the thread: a worker that hangs must not keep the process from ending. Once this is closed, the
    thread ends with the item it is at.
    """
    pixels = DaliPixels(samples.processor.image_processor, device)
    ready: queue.Queue[Batch | BadSample | BaseException | None] = queue.Queue(AHEAD)
    closed = threading.Event()

    def work() -> None:
        try:
            for item in loader:
                ready.put(samples.decoded(item, pixels) if isinstance(item, Undecoded) else item)
                if closed.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            ready.put(error)

    threading.Thread(target=work, name="dali", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        while not ready.empty():  # makes room for what the thread still puts
            ready.get()
