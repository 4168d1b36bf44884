"""Answering: the generation engine beside transformers' `generate` and its continuous batching.

All contenders of a case have the same weights and prompts, and as many tokens to choose; none of them ends an answer.

    one     one prompt with a picture, one answer
    images  many prompts, each with a picture of its own
    texts   as many of that length without one, by the LLM alone: transformers' continuous batching takes ids only
    first   one prompt with a picture and its first token alone: the wait before an answer begins
    stages  several prompts with pictures, by the stages that the engine's code marks

A call ends when all tokens are on the host, and its time is the host's. Beside it are recorded: the time until each
prompt has its first token, what each token after it takes, tokens and answers a second, peak memory together with what
a contender keeps between calls, and how often a token makes the host wait for all that the device has to do.

Two answers of the same model differ where two tokens are nearly as likely, and from there on altogether. So each token
is judged within its own answer: the whole sequence is read once, without a cache, in float64 (float32 for a model of 16
bits), and the token's logit may lie as far below the largest as two logits may be off each other. That is twice the
largest error that the same pass makes in the model's own dtype, times the factor of `case.py`. The first CHECKED
answers of a case are judged; all, where each is one token.

On a GPU the shapes are those of 7B, 704 tokens before an answer of 128, and our steps are compiled. On a CPU the model
is as small as the demo's, and ours compiles where its name says so.
"""

import copy
import dataclasses
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from aligngpt.generate import Engine, Request
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.processor import AlignGPTProcessor
from aligngpt.sampling import Sampling
from benchmarks import lengths, shapes
from benchmarks.bench_step import LLAMA_7B, MICRO_TOWER, SMALLEST, Size
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs, allocations, count_syncs, peak_bytes, synchronize
from benchmarks.stages import StageWork, measure
from benchmarks.work import align_gate_flops, gate_weights, projector_flops, text_mean_flops, tower_flops

CHECKED = 4
PAGE = 64  # tokens of a page of transformers' continuous batching
BOS = 1
STATIC = "generate, static cache"  # which transformers compiles on a GPU, with CUDA graphs
ONE_AT_A_TIME = "generate, one at a time"
CONTINUOUS = "continuous batching"


class Work(NamedTuple):
    """What is asked in a case."""

    size: Size
    text: int  # tokens of the longest prompt, <align> among them, without image rows
    new: int  # tokens of an answer
    requests: int
    pictures: bool
    dtype: torch.dtype
    least_text: int | None = None  # of the shortest prompt; the others lie evenly between. None: all are equally long

    @property
    def rows_per_image(self) -> int:
        return lengths.IMAGE_ROWS // self.size.scale

    @property
    def prompt(self) -> int:
        """Tokens of the longest one."""
        return self.text + self.rows_per_image * self.pictures

    @property
    def prompts(self) -> list[int]:
        """Tokens of each, the longest first."""
        shorter = self.text - (self.text if self.least_text is None else self.least_text)
        return [self.prompt - shorter * number // max(self.requests - 1, 1) for number in range(self.requests)]

    @property
    def checked(self) -> int:
        """Answers that are judged."""
        return self.requests if self.new == 1 else min(CHECKED, self.requests)


class Asked(NamedTuple):
    """The inputs of a case."""

    work: Work
    model: AlignGPTForConditionalGeneration  # of ours
    peer: AlignGPTForConditionalGeneration  # the same weights, with attention by SDPA
    processor: AlignGPTProcessor
    prompts: list[dict[str, Tensor]]  # on the host
    error: float  # of the plain path's logits, the largest one

    @property
    def device(self) -> torch.device:
        return self.model.device


# ------------------------------------------------------------------------------------------------ model and prompts


def make(device: torch.device, work: Work) -> Asked:
    model = make_model(work.size, device, work.dtype)
    processor = lengths.processor(
        work.size.vocabulary, scale=work.size.scale, image_size=work.size.image_size, template="chat"
    )
    peer = twin(model)
    prompts = list(make_prompts(work, model))
    asked = Asked(work, model, peer, processor, prompts, 0.0)
    return asked._replace(error=plain_error(asked))


@torch.no_grad()
def make_model(size: Size, device: torch.device, dtype: torch.dtype) -> AlignGPTForConditionalGeneration:
    """Of random weights, drawn on the device."""
    with torch.device(device):
        model = AlignGPTForConditionalGeneration._from_config(size.config(), dtype=dtype).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(float("norm" in name and "weight" in name))
        else:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    return model


def twin(model: AlignGPTForConditionalGeneration) -> AlignGPTForConditionalGeneration:
    """Another model on the same weights, with settings of its own and attention by SDPA."""
    with torch.device("meta"):
        other = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    for module, own in zip(model.modules(), other.modules(), strict=True):
        own._buffers.update(module._buffers)
    other.set_attn_implementation("sdpa")
    other.generation_config = copy.deepcopy(model.generation_config)
    return other


def make_prompts(work: Work, model: AlignGPTForConditionalGeneration) -> Iterator[dict[str, Tensor]]:
    """One row each: [BOS, <align>, image rows, text] or [BOS, text]."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    for length in work.prompts:
        head = [BOS]
        inputs = {}
        if work.pictures:
            head += [config.align_token_id] + [config.image_token_id] * config.image_seq_length
            pixels = torch.randn(1, 3, work.size.image_size, work.size.image_size, generator=generator)
            inputs["pixel_values"] = pixels
        text = torch.randint(3, work.size.vocabulary, (length - len(head),), generator=generator)
        ids = torch.cat((torch.tensor(head), text))[None]
        is_text = torch.arange(ids.shape[1])[None] >= len(head)
        yield inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "gate_mask": is_text}


def batch(prompts: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """All as long as the longest, those that are shorter padded on the left."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)

    def rows(prompt: dict[str, Tensor], name: str) -> Tensor:
        missing = 0 if name == "pixel_values" else longest - prompt[name].shape[1]
        return pad(prompt[name], (missing, 0)) if missing else prompt[name]

    return {name: torch.cat([rows(prompt, name) for prompt in prompts]).to(device) for name in prompts[0]}


# ------------------------------------------------------------------------------------------------ what is right


@torch.no_grad()
def logits_of(model: AlignGPTForConditionalGeneration, prompt: dict[str, Tensor], answer: Tensor) -> Tensor:
    """Logits (tokens, V) for each token of an answer (tokens,), of one pass without a cache."""
    inputs = batch([prompt], model.device)
    new = answer.shape[0]
    answer = answer[None].to(model.device)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], answer), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["gate_mask"] = torch.cat((inputs["gate_mask"], torch.zeros_like(answer, dtype=torch.bool)), 1)
    return model(**inputs, logits_to_keep=new + 1, use_cache=False).logits[0, :-1]


def in_wider_dtype(model: AlignGPTForConditionalGeneration) -> AlignGPTForConditionalGeneration:
    """The same weights, computed with in float64, or float32 where they have 16 bits.

    The LLM's are widened while they are in use: in float32 those of 7B take 27 GB.
    """
    wider = torch.float64 if model.dtype == torch.float32 else torch.float32
    other = twin(model)
    llm = {*other.model.language_model.modules(), other.lm_head}
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, args: Any) -> None:
        for weight in module.parameters(recurse=False):
            narrow[weight] = weight.data
            weight.data = weight.data.to(wider)

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = narrow.pop(weight)

    for module in other.modules():
        if module in llm:
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)
        else:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(wider)
    return other


def plain_error(asked: Asked) -> float:
    """How far logits of a pass in the model's own dtype are off, at the most."""
    exact, generator = in_wider_dtype(asked.peer), torch.Generator().manual_seed(1)
    found = 0.0
    for prompt in asked.prompts[: asked.work.checked]:
        answer = torch.randint(3, asked.work.size.vocabulary, (asked.work.new,), generator=generator)
        wanted = logits_of(exact, prompt, answer)
        found = max(found, float((logits_of(asked.peer, prompt, answer).to(wanted.dtype) - wanted).abs().max()))
    return found


def shortfall(asked: Asked, outputs: Outputs) -> Outputs:
    """How far the logit of each chosen token lies below the largest, of the answers that are checked. (tokens,)"""
    (answers,) = outputs
    work = asked.work
    if answers.shape != (work.requests, work.new):
        return [answers]
    exact = in_wider_dtype(asked.peer)
    lacking = []
    for prompt, answer in zip(asked.prompts[: work.checked], answers, strict=False):
        logits = logits_of(exact, prompt, answer)
        logits[:, asked.peer.generation_config.suppress_tokens or []] = -torch.inf
        lacking.append(logits.amax(1) - logits.gather(1, answer[:, None].to(logits.device))[:, 0])
    return [torch.cat(lacking).cpu()]


def none_lacking(asked: Asked) -> Outputs:
    return [torch.zeros(asked.work.checked * asked.work.new, dtype=torch.float64)]


def plain_lacking(asked: Asked) -> Outputs:
    """What two logits may be off each other."""
    return [out + 2 * asked.error for out in none_lacking(asked)]


# ------------------------------------------------------------------------------------------------ contenders


class Answering:
    """All answers of a case, by `answer(tokens of each)`, which returns them on the host (requests, tokens)."""

    def __init__(
        self, asked: Asked, make_answer: Callable[[Asked], Callable[[int], Tensor]], *, whole: bool, counted: bool
    ):
        """`whole`: the first answers, not timed, have all their tokens, for what is sized by them. `counted`: waits can
        be counted, since the thread that calls does the work."""
        self.asked, self.counted = asked, counted

        def make() -> None:
            self.answer = make_answer(asked)
            self.first_seconds = self.seconds_of(asked.work.new if whole else min(asked.work.new, 2))  # compiles

        self.kept_bytes = kept_bytes(make, asked.device)

    def __call__(self) -> Outputs:
        return [self.answer(self.asked.work.new)]

    def seconds_of(self, new: int) -> float:
        synchronize(self.asked.device)
        started = time.perf_counter()
        self.answer(new)
        return time.perf_counter() - started

    def details(self, asked: Asked, seconds: float) -> dict[str, Any]:
        work = asked.work
        found: dict[str, Any] = {}
        if work.new > 1:
            first = statistics.median(self.seconds_of(1) for _ in range(3))
            found["first_tokens_ms"] = round(1e3 * first, 3)
            found["ms_per_token"] = round(1e3 * (seconds - first) / (work.new - 1), 4)
        found |= {
            "new_tokens": work.new,
            "weight_bytes": weight_bytes(work),
            "new_tokens_per_second": round(work.requests * work.new / seconds, 2),
            "answers_per_second": round(work.requests / seconds, 3),
            "first_call_seconds": round(self.first_seconds, 2),
        }
        if self.counted or asked.device.type == "cuda":  # on a CPU another thread's memory is not seen
            found["kept_bytes"] = self.kept_bytes
            found["peak_bytes"] = self.kept_bytes + peak_bytes(self, asked.device)
        if self.counted:
            found["syncs"] = count_syncs(self, asked.device)
        if self.counted and work.requests == 1 and work.new > 1:
            waits = found["syncs"] - count_syncs(lambda: [self.answer(1)], asked.device)
            found["syncs_per_token"] = round(waits / (work.new - 1), 2)
        return found


def kept_bytes(make: Callable[[], Any], device: torch.device) -> int:
    """What is held since `make` was called, and was not before; on a CPU of what this thread allocates."""
    if device.type != "cuda":
        return sum(size for size in allocations(make) if isinstance(size, int))
    before = torch.cuda.memory_allocated(device)
    make()
    synchronize(device)
    return torch.cuda.memory_allocated(device) - before


def ours(asked: Asked, rows: int, compile: bool | None = None) -> Callable[[int], Tensor]:
    """With as many rows; their prompts are read at once."""
    work = asked.work
    engine = Engine(
        asked.model,
        asked.processor,
        max_batch_size=rows,
        max_length=work.prompt + work.new,
        max_prefill_tokens=rows * work.prompt,
        compile=compile,
    )

    def answer(new: int) -> Tensor:
        sampling = Sampling(max_new_tokens=new)
        answers = engine.run(Request(prompt, sampling) for prompt in asked.prompts)
        return torch.tensor([answer.tokens for answer in answers])

    return answer


def generate(asked: Asked, rows: int, **options: Any) -> Callable[[int], Tensor]:
    """transformers' `generate`, so many prompts at a time."""

    def answer(new: int) -> Tensor:
        found = []
        for start in range(0, len(asked.prompts), rows):
            inputs = batch(asked.prompts[start : start + rows], asked.device)
            out = asked.peer.generate(**inputs, max_new_tokens=new, do_sample=False, **options)
            found.append(out[:, inputs["input_ids"].shape[1] :].cpu())
        return torch.cat(found)

    return answer


def continuous(asked: Asked) -> Callable[[int], Tensor]:
    """transformers' continuous batching by the LLM alone. Prompts that come again are read again."""
    work, peer = asked.work, twin(asked.peer)
    with torch.device("meta"):
        llm = LlamaForCausalLM(peer.config.text_config).eval()
    llm.model, llm.lm_head = peer.model.language_model, peer.lm_head
    config = ContinuousBatchingConfig(allow_block_sharing=False, max_memory_percent=0.5)  # half: ours is there as well
    if asked.device.type != "cuda":  # where it does not know how much there is
        pages = -(-(work.prompt + work.new) // PAGE) * work.requests
        setattr(config, "page_size" if hasattr(config, "page_size") else "block_size", PAGE)  # its name before 5.18
        config.num_blocks, config.max_batch_tokens = pages + work.requests, work.requests * work.prompt
    settings = GenerationConfig(do_sample=False, max_new_tokens=work.new, eos_token_id=-1, pad_token_id=0)
    manager = llm.init_continuous_batching(settings, config)
    manager.warmup()
    manager.start()

    def answer(new: int) -> Tensor:
        names = manager.add_requests([prompt["input_ids"][0].tolist() for prompt in asked.prompts], max_new_tokens=new)
        found: dict[str, list[int]] = {}
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.error is not None:
                raise RuntimeError(f"continuous batching: {result.error}")
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended by itself")
        return torch.tensor([found[name] for name in names])

    weakref.finalize(answer, manager.stop, block=True, timeout=10)
    return answer


def contender(
    make_answer: Callable[..., Callable[[int], Tensor]], *, whole: bool = False, counted: bool = True, **options: Any
) -> Contender:
    def details(run: Answering, asked: Asked, seconds: float) -> dict[str, Any]:
        return run.details(asked, seconds)

    def prepare(asked: Asked) -> Answering:
        return Answering(asked, partial(make_answer, **options), whole=whole, counted=counted)

    return Contender(prepare, shortfall, details=details)


# ------------------------------------------------------------------------------------------------ cases


def weight_bytes(work: Work) -> int:
    """Of the weights that every step reads: the LLM's layers and the head, not the table of embeddings."""
    size = work.size
    norms = (2 * size.layers + 1) * size.width
    return (layer_weights(size) + norms + size.vocabulary * size.width) * work.dtype.itemsize


def layer_weights(size: Size) -> int:
    """Of the products in the LLM's layers."""
    return size.layers * (4 * size.width**2 + 3 * size.width * size.mlp)


def tower_weights(size: Size) -> int:
    """Of the products in the tower."""
    width, mlp, layers = (size.tower[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return layers * (4 * width**2 + 2 * width * mlp) + 3 * size.patch**2 * width


def projector_weights(size: Size) -> int:
    return size.tower["hidden_size"] * size.width + size.width**2


def cache_bytes(work: Work) -> int:
    """Of all answers' keys and values."""
    return 2 * work.size.layers * work.size.width * (work.prompt + work.new) * work.requests * work.dtype.itemsize


def stage_work(work: Work, sampled: int) -> dict[str, StageWork]:
    """Of a call that reads all prompts at once and chooses `sampled` tokens where that is marked."""
    size, item = work.size, work.dtype.itemsize
    images, tokens = work.requests * work.pictures, sum(work.prompts)
    rows = images * work.rows_per_image
    words = tokens - rows - 2 * images if work.pictures else 0  # without <s> and <align>
    layers, head, tower = layer_weights(size), size.vocabulary * size.width, tower_weights(size)
    steps = work.new - 1
    keys = sum(length + step for length in work.prompts for step in range(1, work.new))  # read in all steps
    vectors = 2 * tokens * size.width * item
    written = 2 * size.layers * tokens * size.width * item  # to the cache
    logits = sampled * size.vocabulary
    return {
        "vision tower": StageWork(
            images,
            "images",
            work.pictures * tower * item + images * 3 * size.image_size**2 * 4,
            tower_flops(
                images,
                work.rows_per_image,
                patch=size.patch,
                width=size.tower["hidden_size"],
                mlp=size.tower["intermediate_size"],
                layers=size.tower["num_hidden_layers"],
            ),
        ),
        "projector": StageWork(
            rows,
            "image rows",
            (work.pictures * projector_weights(size) + rows * (size.tower["hidden_size"] + size.width)) * item,
            projector_flops(rows, size.tower["hidden_size"], size.width),
        ),
        "gate": StageWork(
            images,
            "samples",
            work.pictures * vectors / 2,
            text_mean_flops(words, size.width)
            + align_gate_flops(rows, images, size.width, gate_weights(work.rows_per_image), shapes.LEVELS),
        ),
        "injection": StageWork(tokens, "tokens", vectors, 0),
        "LLM forward": StageWork(tokens, "tokens", layers * item + vectors + written, 2 * layers * tokens),
        "prefill": StageWork(tokens, "tokens", head * item, 2 * head * work.requests),  # what is left of it: the head
        "decode step": StageWork(
            work.requests * steps,
            "tokens",
            weight_bytes(work) * steps + 2 * size.layers * size.width * keys * item,
            2 * (layers + head) * work.requests * steps,
        ),
        "sampling": StageWork(sampled, "tokens", logits * item, logits),
    }


def whole_work(work: Work) -> StageWork:
    """From prompts to the last token, all prompts at once."""
    parts = stage_work(work, work.requests * work.new).values()
    return StageWork(work.requests * work.new, "tokens", sum(p.bytes for p in parts), sum(p.flops for p in parts))


def prefill_work(work: Work) -> StageWork:
    """From prompts to their first tokens; items are the prompts' tokens."""
    return whole_work(work._replace(new=1))._replace(items=sum(work.prompts))


def case(name: str, work: Work, contenders: dict[str, Contender], rounds: int) -> Case:
    done = whole_work(work)
    return Case(
        name=f"generate {name}: {work.requests} x {work.prompt} tokens, {work.new} new",
        make=partial(make, work=work),
        contenders=contenders,
        exact=none_lacking,
        plain=plain_lacking,
        bytes=int(done.bytes),
        flops=int(done.flops),
        stage="answering",
        items=work.requests,
        unit="answers",
        group=f"generate {name}",
        input_bytes=weight_bytes(work) + 2 * cache_bytes(work),  # ours is kept while a peer has its own
        rounds=rounds,
        trains=True,
        one_copy=True,
    )


def one_case(work: Work, compiled: bool = True) -> Case:
    contenders = {"ours": contender(ours, rows=1), "generate": contender(generate, rows=1)}
    if not GPU:
        contenders[STATIC] = contender(generate, rows=1, cache_implementation="static", whole=True)
    if compiled and not GPU:
        contenders["ours, compiled"] = contender(ours, rows=1, compile=True)
    return case("one", work, contenders, rounds=3 if GPU else 5)


def static_case(work: Work) -> Case:
    """By itself: beside it the process ended with an illegal access of memory (H200, torch 2.11, transformers 5.17)."""
    static = contender(generate, rows=1, cache_implementation="static", whole=True)
    return case("one, static cache", work, {"ours": contender(ours, rows=1), STATIC: static}, rounds=3)


def images_case(work: Work, rows: int) -> Case:
    contenders = {
        "ours": contender(ours, rows=work.requests),
        f"ours, {rows} rows": contender(ours, rows=rows),  # each is given to the next request when it is free
        "generate, all at once": contender(generate, rows=work.requests),
    }
    if GPU:
        absent = {ONE_AT_A_TIME: "as many times the time of one, which is a case of its own"}
    else:
        contenders[ONE_AT_A_TIME], absent = contender(generate, rows=1), {}
    absent[CONTINUOUS] = "it takes ids only, and is compared without pictures"
    found = case("images", work, contenders, rounds=3)
    return dataclasses.replace(found, absent=absent)


def texts_case(work: Work) -> Case:
    batching = contender(continuous, whole=True, counted=False)
    return case("texts", work, {"ours": contender(ours, rows=work.requests), CONTINUOUS: batching}, rounds=3)


def first_case(work: Work) -> Case:
    """Their median is the p50 of the time to first token."""
    work = work._replace(new=1, requests=1)
    contenders = {"ours": contender(ours, rows=1), "generate": contender(generate, rows=1)}
    found, done = case("first", work, contenders, rounds=9), prefill_work(work)
    return dataclasses.replace(
        found,
        name=f"time to first token: 1 x {work.prompt} tokens",
        bytes=int(done.bytes),
        flops=int(done.flops),
        stage="time to first token",
        unit="first tokens",
    )


def stages_case(work: Work) -> Case:
    """What the stages that the engine marks take, and how much of the whole is in none of them."""

    def details(run: Answering, asked: Asked, seconds: float) -> dict[str, Any]:
        marked = work.requests if GPU else work.requests * work.new  # a graph of a GPU's step marks nothing in it
        return run.details(asked, seconds) | measure(run, asked.device, stage_work(work, marked), rounds=3)

    answered = contender(ours, rows=work.requests)._replace(details=details)
    found = case("stages", work, {"ours": answered}, rounds=3)
    return dataclasses.replace(
        found, name=f"stages of answering: {work.requests} x {work.prompt} tokens, {work.new} new", group="stages"
    )


GPU = torch.cuda.is_available()
LARGE = Work(LLAMA_7B, text=128, new=128, requests=1, pictures=True, dtype=torch.bfloat16)
DEMO = SMALLEST._replace(scale=64, vocabulary=512, mlp=256, layers=3)
SMALL = Work(DEMO, text=16, new=48, requests=1, pictures=True, dtype=torch.float32)
MICRO = SMALLEST._replace(scale=144, vocabulary=64, width=32, mlp=64, layers=2, heads=2, tower=MICRO_TOWER)
LEAST = Work(MICRO, text=5, new=6, requests=1, pictures=True, dtype=torch.float32)


def cases() -> list[Case]:
    texts = LARGE._replace(text=LARGE.prompt, requests=48, pictures=False)
    images = images_case(LARGE._replace(requests=48), 16)
    stages = stages_case(LARGE._replace(requests=8))
    return [one_case(LARGE), images, static_case(LARGE), texts_case(texts), first_case(LARGE), stages]


def cpu_cases() -> list[Case]:
    texts = SMALL._replace(text=SMALL.prompt, requests=4, pictures=False)
    images = images_case(SMALL._replace(requests=16), 4)
    return [one_case(SMALL), images, texts_case(texts), first_case(SMALL), stages_case(SMALL._replace(requests=8))]


def small_cases() -> list[Case]:
    texts = LEAST._replace(text=LEAST.prompt, requests=3, pictures=False)
    images = images_case(LEAST._replace(requests=3), 2)
    one = one_case(LEAST, compiled=False)
    return [one, images, texts_case(texts), first_case(LEAST), stages_case(LEAST._replace(requests=2))]


def test_generate(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
