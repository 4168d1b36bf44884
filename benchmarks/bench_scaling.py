"""How cost grows with batch, sequence length, images, vocabulary, cache and processes; bench_data.py has data sets.

Each case is a point of a sweep, checked before it is timed like any other, and says how fast its sweep may grow and why
(sweep.py; fit.py fits the exponents and compares). Only ours contends: what a point costs beside others is in the other
files.

    model       a training step by samples (those of four conversations, again and again); forward and backward of the
                LLM by tokens, as one packed sequence and as many of EACH tokens; tower to injection by images of a
                sample; loss, and text mean + gate + injection, by vocabulary; a decode step by answers and by cached
                tokens; prefill by prompts
    processes   a step of the same global batch over 1, 2 and 4 of them, sharded by FSDP2 over gloo. They are started
                for the case and share this machine's cores, so beside the wall time stand the seconds of all their
                processors, and the bytes of what each gathers and reduces

On a GPU the model's sweeps have the widths of 7B and the processes are left out: they are the host's.
"""

import atexit
import copy
import dataclasses
import os
import pickle
import resource
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aligngpt.batch import Batch, Example, collate
from aligngpt.generate import Answer, Engine, Request
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.sampling import Sampling
from aligngpt.text import TokenIds, Tokenized
from benchmarks import bench_chain, bench_generate, bench_loss, sets
from benchmarks.bench_generate import Asked, Work, none_lacking, plain_lacking, shortfall
from benchmarks.bench_step import (
    LLAMA_7B,
    SEED,
    SMALLEST,
    Data,
    Size,
    Step,
    attend,
    make_model,
    mean_loss,
    optimizer_of,
    ready,
    recipe,
    tolerance,
    train_step,
    world_of_one,
)
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs, Run
from benchmarks.sweep import ROUNDS, Grows, swept
from benchmarks.worlds import Group
from training import loop
from training.config import TrainConfig
from training.loader import Part

EACH = 64  # tokens of a short sequence
TEXT = 32  # tokens beside the images of a sample
NEW = 256  # tokens of an answer, more than a step is timed
BASE = 4  # conversations that a batch repeats
SHARED = f"processes beyond the {os.cpu_count()} cores take turns"

# ------------------------------------------------------------------------------------------------ training


class Stepping(NamedTuple):
    config: TrainConfig
    size: Size
    step: Step
    expected: Tensor


_kept: dict[str, Any] = {}


def once(make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` gives, made once: a Size has no hash, but a name."""
    name = repr((make.__name__, arguments))
    if name not in _kept:
        _kept[name] = make(*arguments)
    return _kept[name]


def conversations(size: Size) -> Data:
    """BASE of them."""
    return Data.make(size, "finetune", sets.new_folder(), BASE)


def repeated(size: Size, samples: int) -> Data:
    """The same again and again, in one global batch."""
    data = copy.copy(once(conversations, size).samples)
    data.kept = np.arange(samples) % BASE
    return Data(data, size._replace(global_batch=samples))


def loss_of_conversations(device: torch.device, size: Size, dtype: torch.dtype) -> Tensor:
    """One by one."""
    alone = repeated(size, BASE).padded(1)
    return mean_loss(size, recipe("finetune", dtype), [ready(loaded, device) for loaded in alone.steps(device)])


def make_stepping(device: torch.device, size: Size, dtype: torch.dtype, samples: int) -> Stepping:
    (step,) = (ready(loaded, device) for loaded in repeated(size, samples).steps(device))
    return Stepping(recipe("finetune", dtype), size, step, once(loss_of_conversations, device, size, dtype))


def stepping(made: Stepping) -> Run:
    model = make_model(made.size, made.config)
    optimizer = optimizer_of(model, lr=0.0)
    return lambda: [train_step(model, optimizer, made.step, made.config)[0]]


def step_case(size: Size, dtype: torch.dtype, samples: int) -> Case:
    case = Case(
        name="a training step by samples",
        make=lambda device: make_stepping(device, size, dtype, samples),
        contenders={"ours": Contender(stepping)},
        exact=lambda made: [made.expected],
        plain=lambda made: [made.expected],
        floors=(tolerance(dtype),),
        stage="training step",
        items=samples,
        unit="samples",
        rounds=ROUNDS,
        trains=True,
        one_copy=True,
    )
    return swept(case, "samples of a step", samples, {"us": (1, "each sample is read")})


class Passing(NamedTuple):
    model: AlignGPTForConditionalGeneration
    packed: Batch
    padded: Batch  # the same sequences, none of which is padded


def make_passing(device: torch.device, size: Size, dtype: torch.dtype, tokens: int, each: int) -> Passing:
    model = bench_generate.make_model(size, device, dtype).train()
    config, generator = model.config, torch.Generator().manual_seed(SEED)
    is_text = torch.arange(each) > 0
    no_image = torch.empty(0, 3, size.image_size, size.image_size)
    examples = []
    for number in range(tokens // each):
        ids = torch.randint(3, size.vocabulary, (each,), generator=generator)
        examples.append(Example(str(number), Tokenized(ids, ids, is_text, 0), no_image))
    token_ids = TokenIds(pad=0, image=config.image_token_id, align=config.align_token_id)
    about = {"token_ids": token_ids, "rows_per_image": config.image_seq_length, "image_size": size.image_size}
    packed, padded = (collate(examples, **about, packed=packed).to(device) for packed in (True, False))
    return Passing(model, packed, padded)


def passing(made: Passing) -> Run:
    attend(made.model, packed=True)
    return partial(loss_and_gradient, made.model, made.packed)


def loss_and_gradient(model: AlignGPTForConditionalGeneration, batch: Batch) -> Outputs:
    """The mean loss, and its gradient to the embedding table, whose way leads through every layer."""
    loss = model(**batch.model_inputs(), num_items_in_batch=batch.num_supervised, use_cache=False).loss
    table = model.get_input_embeddings().weight
    trained = [weight for weight in model.model.language_model.parameters() if weight is not table]
    return [loss.detach(), torch.autograd.grad(loss, [table, *trained])[0]]


def passed(made: Passing, dtype: torch.dtype | None = None) -> Outputs:
    """By SDPA on rows, in another dtype."""
    model = copy.deepcopy(made.model).to(dtype)
    attend(model, packed=False)
    return loss_and_gradient(model, made.padded)


def sequence_case(size: Size, dtype: torch.dtype, tokens: int, each: int | None) -> Case:
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    case = Case(
        name="LLM forward + backward by tokens of " + (f"sequences of {each}" if each else "one sequence"),
        make=lambda device: make_passing(device, size, dtype, tokens, each or tokens),
        contenders={"ours": Contender(passing)},
        exact=lambda made: passed(made, wider),
        plain=lambda made: passed(made, dtype),
        floors=(tolerance(dtype), tolerance(dtype)),
        stage="LLM forward + backward",
        items=tokens,
        unit="tokens",
        rounds=ROUNDS,
        trains=True,
        one_copy=True,
    )
    allowed = (1, "each token is read") if each else (2, "each token attends to all before it")
    return swept(case, "tokens", tokens, {"us": allowed})


# ------------------------------------------------------------------------------------------------ before the LLM


class Seeing(NamedTuple):
    model: AlignGPTForConditionalGeneration
    ids: Tensor  # (1, L)
    gate_mask: Tensor
    pixels: Tensor


def make_seeing(device: torch.device, size: Size, dtype: torch.dtype, images: int) -> Seeing:
    model = bench_generate.make_model(size, device, dtype)
    config, generator = model.config, torch.Generator().manual_seed(SEED)
    text = torch.randint(3, size.vocabulary, (TEXT,), generator=generator)
    head = [bench_generate.BOS, config.align_token_id] + [config.image_token_id] * config.image_seq_length * images
    ids = torch.cat((torch.tensor(head), text))[None]
    pixels = torch.randn(images, 3, size.image_size, size.image_size, generator=generator)
    gate_mask = torch.arange(ids.shape[1])[None] >= len(head)
    return Seeing(model, ids.to(device), gate_mask.to(device), pixels.to(device))


@torch.no_grad()
def seen(made: Seeing, dtype: torch.dtype | None = None) -> Outputs:
    model = made.model if dtype is None else copy.deepcopy(made.model).to(dtype)
    return [model.model.embed(made.ids, made.pixels, gate_mask=made.gate_mask)[0]]


def images_case(size: Size, dtype: torch.dtype, images: int) -> Case:
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    case = Case(
        name="tower to injection by images of a sample",
        make=lambda device: make_seeing(device, size, dtype, images),
        contenders={"ours": Contender(lambda made: lambda: seen(made))},
        exact=lambda made: seen(made, wider),
        plain=lambda made: seen(made, wider),  # what ours may be off is in the floor
        floors=(1e-5 if dtype == torch.float32 else 2e-2,),
        stage="tower to injection",
        items=images,
        unit="images",
        rounds=ROUNDS,
        trains=True,
        one_copy=True,
    )
    return swept(case, "images of a sample", images, {"us": (1, "each image is read")})


def vocabulary_cases(
    vocabularies: Sequence[int], dtype: torch.dtype, rows: int, width: int, image_rows: int, features: int
) -> list[Case]:
    """rows: of the loss."""
    found = []
    for vocabulary in vocabularies:
        loss = bench_loss.case(vocabulary, trained=True, rows=rows, width=width, dtype=dtype)
        chain = bench_chain.case(vocabulary=vocabulary, rows=image_rows, features=features, width=width, dtype=dtype)
        loss, chain = (dataclasses.replace(case, name=f"{case.stage} by vocabulary") for case in (loss, chain))
        found += [
            swept(loss, "vocabulary", vocabulary, {"us": (1, "each word has a logit")}),
            swept(chain, "vocabulary", vocabulary, {"us": (0, "only the words of the text are read")}),
        ]
    return found


# ------------------------------------------------------------------------------------------------ answering


class Decoding:
    """Steps of an engine that has read all prompts, and reads them again where the answers end."""

    def __init__(self, asked: Asked):
        work = asked.work
        self.engine = Engine(
            asked.model,
            asked.processor,
            max_batch_size=work.requests,
            max_length=work.prompt + NEW,
            max_prefill_tokens=work.requests * work.prompt,
            step_rows=[work.requests],
        )
        self.requests = [Request(prompt, Sampling(max_new_tokens=NEW)) for prompt in asked.prompts]
        self.answers: list[Answer] = []
        self._begin()

    def _begin(self) -> None:
        self.answers = [self.engine.submit(request) for request in self.requests]
        self._until(1)

    def _until(self, tokens: int) -> None:
        while min(len(answer.tokens) for answer in self.answers) < tokens:
            self.engine.step()

    def __call__(self) -> Outputs:
        """A step, and the first two tokens of each answer: the second is the first call's. (answers, 2)"""
        if self.answers[0].finish_reason is not None:
            self._begin()
        self.engine.step()
        self._until(2)  # where the host sees a step's tokens after the next one
        return [torch.tensor([answer.tokens[:2] for answer in self.answers])]


def decode_case(size: Size, dtype: torch.dtype, answers: int, cached: int, *, by_answers: bool) -> Case:
    work = Work(size, cached, 2, answers, False, dtype)
    case = Case(
        name="a decode step by " + ("answers" if by_answers else f"cached tokens of {answers} answers"),
        make=lambda device: bench_generate.make(device, work),
        contenders={"ours": Contender(Decoding, shortfall)},
        exact=none_lacking,
        plain=plain_lacking,
        stage="decode step",
        items=answers,
        unit="tokens",
        rounds=ROUNDS,
        trains=True,
        one_copy=True,
    )
    if by_answers:
        return swept(case, "answers", answers, {"us": (1, "each answer has keys of its own")})
    return swept(case, "cached tokens", cached, {"us": (1, "each key is read")})


def prefill_case(size: Size, dtype: torch.dtype, prompts: int, text: int) -> Case:
    work = Work(size, text, 1, prompts, True, dtype)

    def prefill(asked: Asked) -> Run:
        answer = bench_generate.ours(asked, prompts)
        return lambda: [answer(1)]

    case = Case(
        name="prefill by prompts",
        make=lambda device: bench_generate.make(device, work),
        contenders={"ours": Contender(prefill, shortfall)},
        exact=none_lacking,
        plain=plain_lacking,
        stage="prefill",
        items=prompts,
        unit="prompts",
        rounds=ROUNDS,
        trains=True,
        one_copy=True,
    )
    return swept(case, "prompts", prompts, {"us": (1, "each prompt is read")})


# ------------------------------------------------------------------------------------------------ processes


class CollectiveBytes(TorchDispatchMode):
    """Counts what the collectives of this process gather and reduce, of which n in a ring send (n - 1) / n each."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            shares = {"allgather": 1, "reduce_scatter": 1, "allreduce": 2}  # the last is reduced, then gathered
            times = next((times for kind, times in shares.items() if kind in name), 0)
            self.bytes += times * max((_bytes(argument) for argument in args), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0


class Reply(NamedTuple):
    """Of a process, about a step."""

    loss: float
    norm: float
    processor_seconds: float
    collective_bytes: int


def shared_out(size: Size, samples: int, processes: int) -> list[list[Batch]]:
    """What each process takes of a global batch, as training's loader cuts it."""
    found = []
    for rank in range(processes):
        data, part = repeated(size, samples).samples, Part(0, list(range(samples)))
        data.cut = dataclasses.replace(data.cut, rank=rank, num_processes=processes)
        batches = data.decoded(part, data.load(part, {}), data.decoder(torch.device("cpu"))).batches
        assert batches is not None
        found.append(batches)
    return found


def join_step(size: Size, pickled: bytes) -> Callable[[], Reply]:
    """In a process of a Group: the model, and a step of this process's part of `shared_out`."""
    world, config = world_of_one(), recipe("finetune", torch.float32)
    model = make_model(size, config)
    optimizer = optimizer_of(model, lr=0.0)
    batches = pickle.loads(pickled)[world.rank]
    (supervised,) = world.add(sum(batch.num_supervised for batch in batches))
    step = loop.Step(batches, 0, 0, int(supervised), 0, 0.0)

    def take() -> Reply:
        before = resource.getrusage(resource.RUSAGE_SELF)
        with CollectiveBytes() as moved:
            loss, norm = train_step(model, optimizer, step, config).tolist()
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Reply(loss, norm, seconds, moved.bytes)

    return take


_groups: dict[str, Group] = {}  # the one that runs


def group_of(processes: int, size: Size, samples: int) -> Group:
    """As many processes, the same ones as long as nobody asks for others."""
    key = repr((processes, size, samples))
    if key not in _groups or not _groups[key].is_open:
        close_groups()
        shares = pickle.dumps(shared_out(size, samples, processes))  # by torch's own pickler they are shared, not sent
        _groups[key] = Group(processes, partial(join_step, size, shares))
    return _groups[key]


@atexit.register
def close_groups() -> None:
    for group in _groups.values():
        group.close()
    _groups.clear()


class InWorld:
    """A step on request by all processes."""

    def __init__(self, made: Stepping, processes: int, samples: int):
        self.group = group_of(processes, made.size, samples)
        self.replies: list[list[Reply]] = []

    def __call__(self) -> Outputs:
        self.replies.append(self.group())
        return [torch.tensor([reply.loss for reply in self.replies[-1]], dtype=torch.float64)]

    def details(self, made: Stepping) -> dict[str, Any]:
        seconds = [sum(reply.processor_seconds for reply in replies) for replies in self.replies[1:]]
        low, median, high = (1e6 * q for q in statistics.quantiles(seconds, n=4, method="inclusive"))
        moved = max(reply.collective_bytes for reply in self.replies[-1])
        return {
            "processor_us": round(median, 1),
            "quartiles_processor_us": [round(low, 1), round(high, 1)],
        } | ({"collective_bytes": moved} if self.group.size > 1 else {})  # one has nobody to gather from


def world_case(size: Size, samples: int, processes: int) -> Case:
    dtype = torch.float32
    case = Case(
        name=f"a step of {samples} samples by processes",
        make=lambda device: make_stepping(device, size, dtype, samples),
        contenders={"ours": Contender(lambda made: InWorld(made, processes, samples))},
        clock="host",
        exact=lambda made: [made.expected.double().expand(processes)],
        plain=lambda made: [made.expected.double().expand(processes)],
        floors=(tolerance(dtype),),
        stage="training step",
        items=samples,
        unit="samples",
        rounds=ROUNDS,
        trains=True,
        one_copy=True,
    )
    grows: Grows = {
        "us": (1, SHARED),
        "processor_us": (1, "each process gathers all weights"),
        "collective_bytes": (0, "each process gathers all weights and reduces all gradients"),
    }
    return swept(case, "processes", processes, grows, lambda run, made: run.details(made))


# ------------------------------------------------------------------------------------------------ cases and tests


def model_cases(
    size: Size, dtype: torch.dtype, powers: range, tokens: Sequence[int], cached: Sequence[int], answers: Sequence[int]
) -> list[Case]:
    """powers: of two, by which samples, images and prompts grow.

    A step's samples are BASE times twice as many, 16 to 128 on a CPU: what a smaller one holds lies in the cache there,
    and to grow out of that costs more than in proportion (8 samples took 19 ms backward, 16 took 43, 48 took 130).
    """
    return [
        *(step_case(size, dtype, BASE << power + 1) for power in powers),
        *(sequence_case(size, dtype, count, None) for count in tokens),
        *(sequence_case(size, dtype, count, EACH) for count in tokens),
        *(images_case(size, dtype, 1 << power) for power in powers),
        *(decode_case(size, dtype, count, 2 * EACH, by_answers=True) for count in answers),
        *(decode_case(size, dtype, 8, count, by_answers=False) for count in cached),
        *(prefill_case(size, dtype, 1 << power, EACH) for power in powers),
    ]


VOCABULARIES = (16384, 32000, 64000, 128256)


def cases() -> list[Case]:
    size, dtype = LLAMA_7B._replace(layers=2), torch.bfloat16
    tokens = [128 << power for power in range(5)]
    return [
        *model_cases(size, dtype, range(5), tokens, [256, 512, 1024, 1536], [4, 8, 16, 32, 64]),
        *vocabulary_cases(VOCABULARIES, dtype, rows=4096, width=4096, image_rows=576, features=1024),
    ]


def cpu_cases() -> list[Case]:
    size, dtype = SMALLEST, torch.float32
    tokens = [128 << power for power in range(5)]
    return [
        *model_cases(size, dtype, range(1, 5), tokens, [256, 512, 1024, 1536], [4, 8, 16, 32]),
        *vocabulary_cases(VOCABULARIES, dtype, rows=128, width=64, image_rows=64, features=64),
        *(world_case(size, 16, processes) for processes in (1, 2, 4)),
    ]


def small_cases() -> list[Case]:
    size, dtype = SMALLEST._replace(layers=1), torch.float32
    return [
        *model_cases(size, dtype, range(2), [128, 256], [64, 128], [2, 4]),
        *vocabulary_cases((500, 1000), dtype, rows=128, width=32, image_rows=16, features=32),
        *(world_case(size, 4, processes) for processes in ((1,) if torch.cuda.is_available() else (1, 2))),
    ]


def test_scaling(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
