"""Which samples a step takes, and the processes that make batches of them.

The order is a pure function of (seed, epoch): step k of an epoch takes `order[kG : (k+1)G]`, G samples of the global
batch, whatever the number of processes; the last step takes what is left, so that an epoch shows every sample once.
How they are cut into micro-batches is in packing.py. Resuming needs the step's number and nothing else.

    steps ─ parts ─ worker processes: tokenise, cut, read, collate ─ Loaded ─ a thread of this process: pixels

For packed batches a worker tokenises the whole global batch, of which it reads only its own process's images: about a
millisecond a sample, for which no process needs to ask another what is where. That all found the same is checked by a
checksum: processes that disagree would wait for each other in different collectives.

A sample that cannot be used is dropped: another takes its place, which is a pure function of (seed, epoch, index,
attempt), so that every run of the same data drops and replaces the same. What its text shows is known before the batch
is cut. What only its image shows is not, so the one that stands in is cut to the length of the sample whose place it
takes. Where PIL decodes, the workers do it, and the thread normalises; where DALI does, the workers read and screen the
files, and the thread decodes them.
"""

import contextlib
import dataclasses
import itertools
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

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
from aligngpt.text import Tokenized
from training.dali_pipeline import DaliPixels, Picture, read
from training.packing import pack, share

T = TypeVar("T")

CHARACTERS_PER_TOKEN = 4  # enough to sort by; nothing else depends on it
ATTEMPTS = 10  # samples tried for one place in a batch
LEAVE_SECONDS = 10.0


@dataclass(frozen=True)
class Part:
    """What a worker makes a process's micro-batches of: the global batch, as positions in an epoch's order."""

    epoch: int
    indices: list[int]


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut, and which of the processes this is."""

    rank: int = 0
    num_processes: int = 1
    token_budget: int | None = None  # of a packed micro-batch; None: it is padded
    per_device: int = 1  # samples of a padded micro-batch


@dataclass(frozen=True)
class Loaded:
    """A process's micro-batches of a step, and the samples that could not be used for them.

    dropped: each with the attempt that it was, 0 for the order's own sample, 1, 2, … for those that were to stand in.
    batches: None where `ATTEMPTS` samples in a row could not be used. pictures: those of each batch, as long as its
    pixel_values are (M, 3, 0, 0). checksum: 20 bits of the texts that the global batch was packed by, which must be the
    same in all processes; 0 for padded batches, which are cut without them.
    """

    batches: list[Batch] | None
    dropped: list[tuple[int, Drop]]
    pictures: list[list[Picture]]
    checksum: int


@dataclass(frozen=True)
class _Taken(Generic[T]):
    """Which attempt for a place could be used, what was made of it, and what was dropped before."""

    attempt: int
    value: T | None  # None: none could
    dropped: list[tuple[int, Drop]]


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
    cut: how a global batch becomes this process's micro-batches.
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
        cut: Cut,
        decode_by_dali: bool = False,
        hardware_decoder: float = 0.0,
    ):
        self.records = records
        self.processor = processor
        self.kept = np.arange(len(records)) if kept is None else kept
        self.levels = levels
        self.num_levels = num_levels
        self.seed = seed
        self.cut = cut
        self.decode_by_dali = decode_by_dali
        self.hardware_decoder = hardware_decoder

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, part: Part) -> Loaded:
        return self.load(part, {})

    def load(self, part: Part, refused: Mapping[str, ImageError]) -> Loaded:
        """The micro-batches of a part. refused: images, by name, that turned out not to decode."""
        cut, checksum = self.cut, 0
        if cut.token_budget is None:
            bins = self._mine(share(len(part.indices), per_device=cut.per_device, num_processes=cut.num_processes))
            texts = {place: self._text(part, place) for place in itertools.chain.from_iterable(bins)}
        else:
            texts = {place: self._text(part, place) for place in range(len(part.indices))}
            lengths = [len(taken.value.input_ids) if taken.value else 0 for taken in texts.values()]
            for taken in texts.values():
                checksum = zlib.crc32(taken.value.input_ids.numpy().tobytes() if taken.value else b"", checksum)
            checksum >>= 12
            bins = self._mine(pack(lengths, budget=cut.token_budget, num_processes=cut.num_processes))
        lost = [place for place, taken in texts.items() if taken.value is None]
        if lost:
            mine = set(itertools.chain.from_iterable(bins))  # the others' are reported by them
            return Loaded(
                None, [drop for place in lost if place in mine for drop in texts[place].dropped], [], checksum
            )

        batches: list[Batch] = []
        pictures: list[list[Picture]] = []
        dropped: list[tuple[int, Drop]] = []
        for places in bins:
            found = [self._with_pictures(part, place, texts[place], refused) for place in places]
            dropped += itertools.chain.from_iterable(taken.dropped for taken in found)
            values = [taken.value for taken in found if taken.value is not None]
            if len(values) < len(found):
                return Loaded(None, dropped, [], checksum)
            batches.append(self._collated([example for example, _ in values]))
            pictures.append(list(itertools.chain.from_iterable(of_example for _, of_example in values)))
        return Loaded(batches, dropped, pictures, checksum)

    def _mine(self, bins: list[list[int]]) -> list[list[int]]:
        return bins[self.cut.rank :: self.cut.num_processes]

    def _text(self, part: Part, place: int) -> "_Taken[Tokenized]":
        return self._take(part, place, range(ATTEMPTS), self.processor.text)

    def _take(self, part: Part, place: int, attempts: Iterable[int], use: Callable[[Sample], T]) -> _Taken[T]:
        """The first of the attempts for a place that `use` can use."""
        index = part.indices[place]
        dropped: list[tuple[int, Drop]] = []
        for attempt in attempts:
            taken = replacement(self.seed, part.epoch, index, attempt, len(self)) if attempt else index
            found = use_or_drop(self.records, int(self.kept[taken]), use)
            if not isinstance(found, Drop):
                return _Taken(attempt, found, dropped)
            dropped.append((attempt, found))
        return _Taken(ATTEMPTS, None, dropped)

    def _with_pictures(
        self, part: Part, place: int, text: _Taken[Tokenized], refused: Mapping[str, ImageError]
    ) -> _Taken[tuple[Example, list[Picture]]]:
        """The sample whose text is known, or one that stands in for it, with its pictures."""
        known = text.value
        assert known is not None

        def use(sample: Sample, text: Tokenized) -> tuple[Example, list[Picture]]:
            pictures = self._pictures(sample, text.num_images, refused)
            return Example(sample.id, text, torch.empty(len(pictures), 3, 0, 0), self.level(sample)), pictures

        def use_another(sample: Sample) -> tuple[Example, list[Picture]]:
            return use(sample, self.processor.text(sample, max_length=len(known.input_ids)))

        own = self._take(part, place, [text.attempt], lambda sample: use(sample, known))
        dropped = text.dropped + own.dropped
        if own.value is not None:
            return _Taken(text.attempt, own.value, dropped)
        other = self._take(part, place, range(text.attempt + 1, ATTEMPTS), use_another)
        return _Taken(other.attempt, other.value, dropped + other.dropped)

    def _pictures(self, sample: Sample, num_images: int, refused: Mapping[str, ImageError]) -> list[Picture]:
        image_processor, pictures = self.processor.image_processor, []
        for number, name in enumerate(sample.images[:num_images]):  # a cut may leave out the last ones
            if name in refused:
                raise refused[name]
            file = self.records.image(sample, number)
            pictures.append(
                read(file, image_processor, name=name) if self.decode_by_dali else image_processor.read(file, name)
            )
        return pictures

    def _collated(self, examples: list[Example]) -> Batch:
        return collate(
            examples,
            token_ids=self.processor.token_ids,
            rows_per_image=self.processor.rows_per_image,
            image_size=0,
            packed=self.cut.token_budget is not None,
        )

    def decoder(self, device: torch.device) -> Callable[[Sequence[Picture]], Tensor]:
        """What makes pictures pixels, (M, 3, size, size) fp32 on the device. ImageError: one that does not decode."""
        image_processor = self.processor.image_processor
        if self.decode_by_dali:
            return DaliPixels(image_processor, device, hardware_share=self.hardware_decoder).decode
        # Without DALI all of them are tensors.
        return lambda pictures: image_processor.normalised([picture.to(device) for picture in pictures])  # type: ignore[union-attr]

    def decoded(self, part: Part, loaded: Loaded, decode: Callable[[Sequence[Picture]], Tensor]) -> Loaded:
        """The batches with their pixels. Where a picture does not decode after all, its samples are replaced too."""
        refused: dict[str, ImageError] = {}
        while (found := loaded.batches) is not None:
            try:
                pixels = [decode(pictures) for pictures in loaded.pictures]
            except ImageError as error:
                if error.name in refused:  # it would go round for ever
                    raise
                refused[error.name] = error
                loaded = self.load(part, refused)
            else:
                batches = [
                    dataclasses.replace(batch, pixel_values=of_batch)
                    for batch, of_batch in zip(found, pixels, strict=True)
                ]
                return dataclasses.replace(loaded, batches=batches, pictures=[])
        return loaded

    def level(self, sample: Sample) -> int | None:
        if not sample.images or self.levels is None:
            return None
        if isinstance(self.levels, str):
            return random_level(self.seed, sample.record, self.num_levels)
        return int(self.levels[sample.record])


def micro_batches(
    samples: Samples, parts: Sequence[Part], *, workers: int, device: torch.device, prefetch: int
) -> Iterator[Loaded]:
    """What is made of each part, in order, ahead of time by `workers` processes and a thread, `prefetch` parts of it.

    Pixels are on the device, everything else is on the host.
    """
    loader = load_in_order(samples, parts, workers=workers)
    return _decoded_ahead(zip(parts, loader, strict=True), samples, device, prefetch)


def _decoded_ahead(
    loader: Iterable[tuple[Part, Loaded]], samples: Samples, device: torch.device, prefetch: int
) -> Iterator[Loaded]:
    """What the loader gives, decoded in order by a thread that keeps `prefetch` steps in hand.

    Once this is closed, the thread ends with the item it is at. That is waited for, since a process that ends while its
    thread is in C++ code is aborted; for LEAVE_SECONDS at most, since a worker that hangs must not keep it from ending.
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

    thread = threading.Thread(target=work, name="pixels", daemon=True)
    thread.start()
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
        end = time.monotonic() + LEAVE_SECONDS
        while thread.is_alive() and time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.02)  # makes room for what the thread still puts
