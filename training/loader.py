"""Which samples a step takes, and the processes that make batches of them.

The order is a pure function of (seed, epoch): step k of an epoch takes `order[kG : (k+1)G]`, G samples of the global
batch, whatever the number of processes; the last step takes what is left, so that an epoch shows every sample once.
A global batch is cut into micro-steps of world × B samples (B per process), and a micro-step into one part for each
process; every process runs the same number of micro-steps, and one whose part is empty runs a dummy without supervised
tokens. Resuming needs the step's number and nothing else.

    steps ─ share ─ parts ─ worker processes: read, tokenise, collate ─ Loaded ─ a thread of this process: pixels

A sample that cannot be used is dropped: another takes its place, which is a pure function of (seed, epoch, index,
attempt), so that every run of the same data drops and replaces the same. Where PIL decodes, the workers do it, and the
thread normalises; where DALI does, the workers read and screen the files, and the thread decodes them.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligngpt.batch import Batch, Example, collate, load_in_order, waiting_for_workers
from aligngpt.data.llava_json import Sample
from aligngpt.data.records import Records
from aligngpt.drops import Drop, use_or_drop
from aligngpt.image import ImageError
from aligngpt.processor import AlignGPTProcessor
from aligngpt.text import IGNORE_INDEX, Tokenized
from training.dali_pipeline import DaliPixels, Picture, read

CHARACTERS_PER_TOKEN = 4  # enough to sort by; nothing else depends on it
ATTEMPTS = 10  # samples tried for one place in a batch


@dataclass(frozen=True)
class Part:
    """What a worker makes a batch of: positions in the order of an epoch's data."""

    epoch: int
    indices: list[int]


@dataclass(frozen=True)
class Loaded:
    """A micro-batch, and the samples that could not be used for it.

    dropped: each with the attempt that it was, 0 for the order's own sample, 1, 2, … for those that were to stand in.
    batch: None where `ATTEMPTS` samples in a row could not be used. pictures: those of the batch, as long as its
    pixel_values are (M, 3, 0, 0).
    """

    batch: Batch | None
    dropped: list[tuple[int, Drop]]
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

    def samples_until(self, step: int) -> int:
        """How many samples the first `step` steps take; the last one of an epoch takes what is left."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.num_samples + steps * self.global_batch_size

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


def estimated_lengths(records: Records, rows_per_image: int) -> np.ndarray:
    """(records,) about how many tokens each sample has, without a tokenizer."""
    return records.num_characters // CHARACTERS_PER_TOKEN + rows_per_image * records.num_images


def random_level(seed: int, record: int, num_levels: int) -> int:
    """The level of a sample under `--data.levels random`: fixed for the run, the same in every epoch."""
    return int(np.random.SeedSequence([seed, record]).generate_state(1)[0]) % num_levels


def replacement(seed: int, epoch: int, index: int, attempt: int, num_samples: int) -> int:
    """Which of the samples takes the place of sample `index`, of which it is attempt 1, 2, …"""
    drawn = np.random.SeedSequence([seed, epoch, index, attempt]).generate_state(1, np.uint64)[0]
    return int(drawn % np.uint64(num_samples))


# ---------------------------------------------------------------------------------------------------- batches


class Samples(Dataset[Loaded]):
    """The samples of a run, and how a part of them becomes a batch.

    kept: (samples,) the records that the run takes; None: all of them. levels: (records,) the level of each record,
    "random", or None where no sample has one. The levels of a run are decided here, so they are data to the model.
    decode_by_dali: DALI decodes, not PIL; `hardware_decoder` is the share of it that a GPU's decoding unit gets.
    """

    def __init__(
        self,
        records: Records,
        processor: AlignGPTProcessor,
        *,
        kept: np.ndarray | None = None,
        levels: np.ndarray | Literal["random"] | None,
        num_levels: int,
        seed: int,
        decode_by_dali: bool = False,
        hardware_decoder: float = 0.0,
    ):
        self.records = records
        self.processor = processor
        self.kept = np.arange(len(records)) if kept is None else kept
        self.levels = levels
        self.num_levels = num_levels
        self.seed = seed
        self.decode_by_dali = decode_by_dali
        self.hardware_decoder = hardware_decoder

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, part: Part) -> Loaded:
        return self.load(part, {})

    def load(self, part: Part, refused: Mapping[str, ImageError]) -> Loaded:
        """The batch of a part. refused: images, by name, that turned out not to decode."""

        def use(sample: Sample) -> tuple[Example, list[Picture]]:
            for name in sample.images:
                if name in refused:
                    raise refused[name]
            text = self.processor.text(sample)
            image_processor = self.processor.image_processor
            names = sample.images[: text.num_images]  # a cut may leave out the last ones
            named = [(self.records.image(sample, number), name) for number, name in enumerate(names)]
            pictures: list[Picture] = (
                [read(file, image_processor, name=name) for file, name in named]
                if self.decode_by_dali
                else [image_processor.read(file, name) for file, name in named]
            )
            return Example(sample.id, text, torch.empty(len(pictures), 3, 0, 0), self.level(sample)), pictures

        examples: list[Example] = []
        pictures: list[Picture] = []
        dropped: list[tuple[int, Drop]] = []
        for index in part.indices:
            for attempt in range(ATTEMPTS):
                taken = replacement(self.seed, part.epoch, index, attempt, len(self)) if attempt else index
                found = use_or_drop(self.records, int(self.kept[taken]), use)
                if not isinstance(found, Drop):
                    break
                dropped.append((attempt, found))
            else:
                return Loaded(None, dropped, [])
            examples.append(found[0])
            pictures += found[1]
        batch = collate(
            examples or [self.dummy()],
            token_ids=self.processor.token_ids,
            rows_per_image=self.processor.rows_per_image,
            image_size=0,
        )
        return Loaded(batch, dropped, pictures)

    def decoder(self, device: torch.device) -> Callable[[Sequence[Picture]], Tensor]:
        """What makes pictures pixels, (M, 3, size, size) fp32 on the device. ImageError: one that does not decode."""
        image_processor = self.processor.image_processor
        if self.decode_by_dali:
            return DaliPixels(image_processor, device, hardware_share=self.hardware_decoder).decode
        # Without DALI all of them are tensors.
        return lambda pictures: image_processor.normalised([picture.to(device) for picture in pictures])  # type: ignore[union-attr]

    def decoded(self, part: Part, loaded: Loaded, decode: Callable[[Sequence[Picture]], Tensor]) -> Loaded:
        """The batch with its pixels. Where a picture does not decode after all, its samples are replaced too."""
        refused: dict[str, ImageError] = {}
        while (batch := loaded.batch) is not None:
            try:
                pixels = decode(loaded.pictures)
            except ImageError as error:
                if error.name in refused:  # it would go round for ever
                    raise
                refused[error.name] = error
                loaded = self.load(part, refused)
            else:
                return Loaded(dataclasses.replace(batch, pixel_values=pixels), loaded.dropped, [])
        return loaded

    def level(self, sample: Sample) -> int | None:
        if not sample.images or self.levels is None:
            return None
        if isinstance(self.levels, str):
            return random_level(self.seed, sample.record, self.num_levels)
        return int(self.levels[sample.record])

    def dummy(self) -> Example:
        """One padding token, no image, nothing supervised."""
        token = torch.tensor([self.processor.token_ids.pad])
        text = Tokenized(token, torch.full_like(token, IGNORE_INDEX), torch.zeros_like(token, dtype=torch.bool), 0)
        return Example(id="dummy", text=text, pixel_values=torch.empty(0, 3, 0, 0))


def micro_batches(
    samples: Samples, parts: Sequence[Part], *, workers: int, device: torch.device, prefetch: int
) -> Iterator[Loaded]:
    """A batch for each part, in order, made ahead of time by `workers` processes and a thread, `prefetch` of them.

    Pixels are on the device, everything else is on the host.
    """
    loader = load_in_order(samples, parts, workers=workers)
    return _decoded_ahead(zip(parts, loader, strict=True), samples, device, prefetch)


def _decoded_ahead(
    loader: Iterable[tuple[Part, Loaded]], samples: Samples, device: torch.device, prefetch: int
) -> Iterator[Loaded]:
    """What the loader gives, decoded in order by a thread that keeps `prefetch` batches in hand.

    Nothing waits for the thread: a worker that hangs must not keep the process from ending. Once this is closed, the
    thread ends with the item it is at.
    """
    decode = samples.decoder(device)
    ready: queue.Queue[Loaded | BaseException | None] = queue.Queue(prefetch)
    closed = threading.Event()

    def work() -> None:
        try:
            for part, loaded in loader:
                ready.put(samples.decoded(part, loaded, decode))
                if closed.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            ready.put(error)

    threading.Thread(target=work, name="pixels", daemon=True).start()
    try:
        while True:
            with waiting_for_workers():
                item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        while not ready.empty():  # makes room for what the thread still puts
            ready.get()
