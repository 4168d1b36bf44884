"""Rates of the machine at hand: short real steps of a model of the asked shapes, and what they say of others.

As many processes as asked for run training's own loader and loop (training/loop.py, `read_steps` and `run_steps`) on
drawn weights and drawn samples, in kinds of steps that differ in one thing each: as planned; half of the samples; as
many in twice the micro-batches; texts alone; texts that are supervised throughout. Their median times are taken apart
into seconds a step, a micro-batch, a token, a supervised token and an image, none of them negative. What moves between
the processes, and the loader where it has no cores of its own, is in these times.

Refused are more processes than the machine has GPUs, or without one, cores.
"""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor

from aligngpt.config import AlignGPTConfig
from aligngpt.data.llava_json import Sample
from aligngpt.data.records import RecordList
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.text import IGNORE_INDEX, TokenIds, Tokenized
from training import loop, metrics, optim, sharding
from training.checkpoints import Checkpoints
from training.cluster import Cost, Work
from training.config import Stage, TrainConfig
from training.dropped import DroppedSamples
from training.guard import Guard
from training.loader import Cut, Order, Part, Samples
from training.metrics import Metrics
from training.packing import pack, share
from training.plan import Lengths
from training.processes import Stop
from training.sharding import World

WARM_UP, TIMED = 8, 8  # steps of a kind; the first ones of a process are slower
HELD_BY_A_WORKER = 5  # steps: four in hand and one in the making (aligngpt.batch.load_in_order)
PHOTO = (640, 480)
DRAWN_ROWS = 256  # of a weight; further rows repeat them


class Kind(NamedTuple):
    """A global batch that is trained on again and again."""

    name: str
    tokens: tuple[int, ...]  # of each sample, image rows included
    images: tuple[int, ...]
    supervised: tuple[int, ...]
    token_budget: int
    per_device: int


@dataclass(frozen=True)
class Calibration:
    """What was found, by kind of step."""

    cost: Cost
    kinds: dict[str, tuple[Work, float]]  # and its median seconds
    processes: int
    threads: int
    decoder: str = "pil"

    @property
    def error(self) -> float:
        """The largest share by which the cost is off one of the kinds."""
        return max((abs(self.cost.of(work) / seconds - 1) for work, seconds in self.kinds.values()), default=0.0)

    def said(self) -> list[str]:
        sizes = ", ".join(f"{seconds:.3g} s {name}" for name, (_, seconds) in self.kinds.items())
        return [
            f"seconds: measured here in {len(self.kinds) * TIMED} steps of {self.processes} process(es) with "
            f"{self.threads} thread(s) each: {sizes}; what they were taken apart into gives them back within "
            f"{self.error:.0%}",
            f"images: decoded by {self.decoder.upper()} in these steps, whatever the run's --data.decoder auto takes",
        ]


# ---------------------------------------------------------------------------------------------------- what is run


def kinds(config: TrainConfig, lengths: Lengths, processes: int) -> list[Kind]:
    """Global batches of the run's sizes and others."""
    count = config.global_batch_size
    by_length = np.argsort(lengths.tokens, kind="stable")
    # Evenly over all lengths: the middles of `count` equal parts of them.
    chosen = by_length[((np.arange(count) + 0.5) * len(by_length) / count).astype(int)]
    tokens, images = lengths.tokens[chosen].clip(4), lengths.images[chosen]
    text = (tokens - lengths.image_rows * images).clip(3)
    supervised = (text * lengths.supervised).round().clip(1, text - 2)
    planned = Kind(
        "as planned",
        tuple(tokens.tolist()),
        tuple(images.tolist()),
        tuple(supervised.astype(int).tolist()),
        max(config.token_budget, int(tokens.max())),
        config.per_device_batch_size,
    )
    steps = work_of(planned, config, processes).micro_batches
    smaller = max(int(tokens.max()), math.ceil(1.1 * tokens.sum() / (2 * steps * processes)))
    none = (0,) * count
    found = [
        planned,
        planned._replace(name="half of it", **{name: getattr(planned, name)[::2] for name in Kind._fields[1:4]}),
        planned._replace(
            name="in more micro-batches", token_budget=smaller, per_device=max(1, planned.per_device // 2)
        ),
        planned._replace(name="texts alone", images=none),
        planned._replace(name="all supervised", images=none, supervised=tuple((tokens - 2).tolist())),
    ]
    return [kind for kind in found if len(kind.tokens) >= processes]


def work_of(kind: Kind, config: TrainConfig, processes: int) -> Work:
    """The busiest process's in a step."""
    if config.data.packing:
        bins = pack(kind.tokens, budget=kind.token_budget, num_processes=processes)
    else:
        bins = share(len(kind.tokens), per_device=kind.per_device, num_processes=processes)

    def cost(places: list[int]) -> int:
        tokens = [kind.tokens[place] for place in places]
        return sum(tokens) if config.data.packing else max(tokens, default=1) * len(tokens)

    together = [bins[start : start + processes] for start in range(0, len(bins), processes)]
    return Work(
        len(together),
        sum(max(map(cost, of_step)) for of_step in together),
        *(
            sum(max(sum(values[place] for place in places) for places in of_step) for of_step in together)
            for values in (kind.supervised, kind.images)
        ),
    )


class Texts:
    """Stands in for the processor of the run's samples: texts of given lengths, of random words."""

    def __init__(self, kind: Kind, model: AlignGPTConfig, image_aspect_ratio: str):
        self.kind, self.model = kind, model
        self.rows_per_image = model.image_seq_length
        self.image_processor = AlignGPTImageProcessor(
            model.vision_config.image_size, image_aspect_ratio=image_aspect_ratio
        )
        self.token_ids = TokenIds(model.image_token_id, model.align_token_id, model.text_config.pad_token_id or 0)

    def text(self, sample: Sample, max_length: int | None = None) -> Tokenized:
        tokens, images, supervised = (values[sample.record] for values in self.kind[1:4])
        most = self.model.text_config.vocab_size
        taken = sorted(number for number in {self.token_ids.image, self.token_ids.align} if 3 <= number < most)
        words = np.random.default_rng(sample.record).integers(3, most - len(taken), tokens)
        for number in taken:  # no word is one of these
            words += words >= number
        ids = torch.from_numpy(words)
        ids[0] = 1
        first = 1
        if images and self.model.align_mode != "none":
            ids[1] = self.token_ids.align
            first = 2
        pictured = ids[first : first + images * self.rows_per_image]
        pictured.fill_(self.token_ids.image)
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[-supervised:] = ids[-supervised:]
        gate = (labels == IGNORE_INDEX) & (ids != self.token_ids.image) & (ids != self.token_ids.align)
        gate[0] = False
        return Tokenized(ids, labels, gate, images)


def samples_of(
    kind: Kind, config: TrainConfig, model: AlignGPTConfig, pictures: Sequence[str], world: World, stage: Stage
) -> Samples:
    """The kind's global batch as the loader reads it."""
    place = itertools.count()
    records = [
        Sample(str(number), tuple(pictures[next(place) % len(pictures)] for _ in range(images)), (), None, number)
        for number, images in enumerate(kind.images)
    ]
    cut = Cut(world.rank, world.size, kind.token_budget if config.data.packing else None, kind.per_device)
    return Samples(
        RecordList(records, "/"),
        Texts(kind, model, config.data.image_aspect_ratio),  # type: ignore[arg-type]
        levels="random" if stage == "pretrain" else None,
        num_levels=model.num_align_levels,
        seed=config.seed,
        cut=cut,
        decode_by_dali=config.data.decoder == "dali",
        hardware_decoder=config.data.hardware_decoder,
    )


def draw_photo(folder: Path) -> str:
    """The name below / of a picture with edges and noise, as a camera makes them."""
    noise = np.random.default_rng(0).normal(0, 10, (*PHOTO[::-1], 3))
    y, x = np.mgrid[: PHOTO[1], : PHOTO[0]]
    waves = np.stack([127 + 80 * np.sin(x / 7 + y / (90 - channel)) for channel in range(3)], -1)
    file = folder / "photo.jpg"
    Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8)).save(file, quality=90)
    return str(file.resolve()).lstrip("/")


@dataclass(frozen=True)
class DrawnWeight:
    """A weight that is drawn where it is needed, from its name. Norms are 1, biases 0."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        rows, *others = self.shape
        count = len(range(*slice(start, stop).indices(rows)))
        if not others:
            return torch.full((count,), float("norm" in self.name and self.name.endswith("weight")))
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        drawn = torch.randn(min(count, DRAWN_ROWS), *others, generator=generator) * math.prod(others) ** -0.5
        return drawn[torch.arange(count) % len(drawn)] if count > len(drawn) else drawn


# ---------------------------------------------------------------------------------------------------- the steps


@dataclass(frozen=True)
class Request:
    """What a process of a calibration is told."""

    config: TrainConfig
    stage: Stage
    model: AlignGPTConfig
    kinds: list[Kind]
    pictures: list[str]
    processes: int
    port: int


def in_process(rank: int, request: Request, folder: str) -> None:
    """One of the processes that run the steps; the first one writes their times into the folder."""
    multiprocessing.set_start_method(None, force=True)  # the loader's workers begin as a run's do, not like this one
    if request.processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request.processes}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"LOCAL_WORLD_SIZE": str(request.processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request.port)}
    with sharding.world(request.config.sharding.size) as world:
        run_kinds(request, Path(folder), world)


def run_kinds(request: Request, folder: Path, world: World) -> None:
    """Train on each kind for some steps. The first process leaves their times, and the last kind's metrics."""
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    config = dataclasses.replace(request.config, run_dir=str(run_dir), save_every=2**31)
    names = {name: DrawnWeight(name, tuple(p.shape)) for name, p in sharding.build(request.model).named_parameters()}
    model, _ = loop.make_model(config, request.model, dict(names), world)
    optimizer = optim.make_optimizer(model.named_parameters(), config.optim)
    saves = Checkpoints(config, model, optimizer, world)
    # Some are there to be loaded after the last one timed: the loader stays at work.
    steps, spent = WARM_UP + TIMED + held(config), []
    for kind in request.kinds:
        samples = samples_of(kind, config, request.model, request.pictures, world, request.stage)
        order = Order(len(kind.tokens), len(kind.tokens), config.seed)
        dropped = DroppedSamples(run_dir, lines=[], total=steps * len(kind.tokens), max_rate=1.0)
        guard = Guard(config.guard, run_dir, world, first_step=0)
        with Metrics(config, first_step=0, total_steps=steps, world=world, bar=False) as written, Stop() as stop:
            run = loop.Run(config, world, model, optimizer, order, steps, guard, stop, written, saves, dropped)
            read = loop.read_steps(config, samples, order, 0, steps, dropped, world)
            first = [next(read)]
            time.sleep(seconds_to_fill(samples, config, len(kind.tokens)))
            loop.run_steps(run, enumerate(itertools.chain(first, itertools.islice(read, WARM_UP + TIMED - 1))))
            del read  # and its workers
        if world.rank == 0:
            lines = (run_dir / metrics.FILE).read_text(encoding="utf-8").splitlines()
            spent.append([json.loads(line)["seconds"] for line in lines[WARM_UP:]])
    if world.rank == 0:
        found = {"seconds": spent, "threads": torch.get_num_threads()}
        (folder / "times.json").write_text(json.dumps(found), encoding="utf-8")


def held(config: TrainConfig) -> int:
    """Steps that the loader has in hand or in the making, and its thread on the way to the device."""
    return HELD_BY_A_WORKER * config.data.workers + config.data.prefetch + 1


def seconds_to_fill(samples: Samples, config: TrainConfig, count: int) -> float:
    """Until the loader has as much in hand as it keeps: in a long run it is full, and makes a step while one is taken.

    While it fills, it takes more of the cores than it does ever after.
    """
    started = time.perf_counter()
    samples[Part(0, list(range(count)))]
    each = time.perf_counter() - started
    return 1.25 * each * held(config) / max(config.data.workers, 1)


def available() -> tuple[int, str]:
    """How many processes the machine at hand has devices for, and what these are called."""
    if torch.cuda.is_available():
        return torch.cuda.device_count(), "GPUs"
    return len(os.sched_getaffinity(0)), "cores"


def check_available(processes: int) -> None:
    """ValueError: there are not so many."""
    most, of_what = available()
    if processes > most:
        raise ValueError(f"--gpus is {processes}; --calibrate needs as many {of_what}, and this machine has {most}")


def calibrate(
    config: TrainConfig,
    stage: Stage,
    model: AlignGPTConfig,
    lengths: Lengths,
    *,
    processes: int,
    pictures: Sequence[str] = (),
) -> Calibration:
    """Run the steps in processes of their own, and take their times apart.

    pictures: files that stand for the run's images; none: one is drawn.

    Raises:
        ValueError: the machine has no room for so many processes.
    """
    check_available(processes)
    quiet = dataclasses.replace(config.optim, lr=0.0, projector_lr=0.0, align_lr=0.0)
    data = dataclasses.replace(config.data, decoder="pil" if config.data.decoder == "auto" else config.data.decoder)
    config = dataclasses.replace(config, optim=quiet, data=data, log=type(config.log)())
    asked = kinds(config, lengths, processes)
    with tempfile.TemporaryDirectory() as folder, _threads(processes):
        files = [str(Path(picture).resolve()).lstrip("/") for picture in pictures] or [draw_photo(Path(folder))]
        request = Request(config, stage, model, asked, files, processes, free_port())
        mp.start_processes(in_process, (request, folder), nprocs=processes, start_method="spawn")
        found = json.loads((Path(folder) / "times.json").read_text(encoding="utf-8"))
    works = [work_of(kind, config, processes) for kind in asked]
    seconds = [statistics.median(times) for times in found["seconds"]]
    named = {kind.name: (work, spent) for kind, work, spent in zip(asked, works, seconds, strict=True)}
    return Calibration(fit(works, seconds), named, processes, found["threads"], data.decoder)


class _threads:
    """A context in which processes that are started have as many threads as torchrun gives them."""

    def __init__(self, processes: int):
        self.missing = processes > 1 and "OMP_NUM_THREADS" not in os.environ

    def __enter__(self) -> None:
        if self.missing:
            os.environ["OMP_NUM_THREADS"] = "1"

    def __exit__(self, *error: Any) -> None:
        if self.missing:
            del os.environ["OMP_NUM_THREADS"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Cost:
    """Seconds of each part of the work, none negative, that fit the times best, relatively; the first counts thrice."""
    rows = np.array([[1.0, *work] for work in works]) / np.array(seconds)[:, None]
    rows[0] *= 3
    wanted = np.array([3.0] + [1.0] * (len(works) - 1))
    scale = rows.max(axis=0).clip(1e-300)
    best, least = np.zeros(rows.shape[1]), math.inf
    for columns in _subsets(rows.shape[1]):
        of_columns = rows[:, columns] / scale[columns]
        found, *_ = np.linalg.lstsq(of_columns, wanted, rcond=1e-9)
        rest = float(((of_columns @ found - wanted) ** 2).sum())
        if (found >= 0).all() and rest < least - 1e-12:
            best = np.zeros(rows.shape[1])
            best[columns] = found / scale[columns]
            least = rest
    step, micro_batch, token, supervised_token, image = best.tolist()
    return Cost(step, micro_batch, token, supervised_token, image, communicates=True)


def _subsets(count: int) -> Iterator[list[int]]:
    for size in range(1, count + 1):
        yield from map(list, itertools.combinations(range(count), size))
