"""Answering: the generation engine beside transformers' `generate` and its continuous batching.

All contenders of a case have the same weights and prompts, and as many tokens to choose; none of them ends an answer.

    one     one prompt with a picture, one answer
    images  many prompts, each with a picture of its own
    texts   as many of that length without one, by the LLM alone: transformers' continuous batching takes ids only

A call ends when all tokens are on the host, and its time is the host's. Beside it are recorded: the time until each
prompt has its first token, what each token after it takes, tokens and answers a second, peak memory together with what
a contender keeps between calls, how often a token makes the host wait for all that the device has to do, and how long
the choice of tokens takes by itself.

Two answers of the same model differ where two tokens are nearly as likely, and from there on altogether. So each token
is judged within its own answer: the whole sequence is read once, without a cache, in float64 (float32 for a model of 16
bits), and the token's logit may lie as far below the largest as two logits may be off each other. That is twice the
largest error that the same pass makes in the model's own dtype, times the factor of `case.py`. The first CHECKED
answers of a case are judged.

On a GPU the shapes are those of 7B, 704 tokens before an answer of 128. On a CPU the model is as small as the demo's.
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
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from aligngpt.generate import Engine, Request
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.processor import AlignGPTProcessor
from aligngpt.sampling import Kind, Sampler, Sampling
from benchmarks import lengths
from benchmarks.bench_step import LLAMA_7B, SMALLEST, Size
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs, count_syncs, synchronize, take_turns

CHECKED = 4
PAGE = 64  # tokens of a page of transformers' continuous batching
BOS = 1
STATIC = "generate, static cache"  # which transformers compiles on a GPU, with CUDA graphs
ONE_AT_A_TIME = "generate, one at a time"
CONTINUOUS = "continuous batching"


class Work(NamedTuple):
    """What is asked in a case."""

    size: Size
    text: int  # tokens of a prompt, <align> among them, without image rows
    new: int  # tokens of an answer
    requests: int
    pictures: bool
    dtype: torch.dtype

    @property
    def prompt(self) -> int:
        return self.text + (lengths.IMAGE_ROWS // self.size.scale if self.pictures else 0)


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
    for _ in range(work.requests):
        head = [BOS]
        inputs = {}
        if work.pictures:
            head += [config.align_token_id] + [config.image_token_id] * config.image_seq_length
            pixels = torch.randn(1, 3, work.size.image_size, work.size.image_size, generator=generator)
            inputs["pixel_values"] = pixels
        text = torch.randint(3, work.size.vocabulary, (work.prompt - len(head),), generator=generator)
        ids = torch.cat((torch.tensor(head), text))[None]
        is_text = torch.arange(ids.shape[1])[None] >= len(head)
        yield inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "gate_mask": is_text}


def batch(prompts: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """All of one length, so that none is padded."""
    return {name: torch.cat([prompt[name] for prompt in prompts]).to(device) for name in prompts[0]}


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
    for prompt in asked.prompts[:CHECKED]:
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
    for prompt, answer in zip(asked.prompts[:CHECKED], answers, strict=False):
        logits = logits_of(exact, prompt, answer)
        lacking.append(logits.amax(1) - logits.gather(1, answer[:, None].to(logits.device))[:, 0])
    return [torch.cat(lacking).cpu()]


def none_lacking(asked: Asked) -> Outputs:
    return [torch.zeros(min(CHECKED, asked.work.requests) * asked.work.new, dtype=torch.float64)]


def plain_lacking(asked: Asked) -> Outputs:
    """What two logits may be off each other."""
    return [out + 2 * asked.error for out in none_lacking(asked)]


# ------------------------------------------------------------------------------------------------ contenders


class Answering:
    """All answers of a case, by `answer(tokens of each)`, which returns them on the host (requests, tokens)."""

    def __init__(self, asked: Asked, make_answer: Callable[[Asked], Callable[[int], Tensor]], *, whole: bool):
        """`whole`: the first answers, not timed, have all their tokens, for what is sized by them."""
        self.asked, before = asked, held_bytes(asked.device)
        self.answer = make_answer(asked)
        self.first_seconds = self.seconds_of(asked.work.new if whole else 2)  # compiles
        self.kept_bytes = held_bytes(asked.device) - before
        self.peak_bytes = 0  # of the last call

    def __call__(self) -> Outputs:
        device = self.asked.device
        synchronize(device)
        before = held_bytes(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        tokens = self.answer(self.asked.work.new)
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        return [tokens]

    def seconds_of(self, new: int) -> float:
        synchronize(self.asked.device)
        started = time.perf_counter()
        self.answer(new)
        return time.perf_counter() - started

    def details(self, asked: Asked, seconds: float) -> dict[str, Any]:
        work = asked.work
        first = statistics.median(self.seconds_of(1) for _ in range(3))
        found = {
            "first_tokens_ms": round(1e3 * first, 3),
            "ms_per_token": round(1e3 * (seconds - first) / (work.new - 1), 4),
            "new_tokens": work.new,
            "new_tokens_per_second": round(work.requests * work.new / seconds, 2),
            "answers_per_second": round(work.requests / seconds, 3),
            "first_call_seconds": round(self.first_seconds, 2),
        }
        if asked.device.type == "cuda":
            found |= {"peak_bytes": self.kept_bytes + self.peak_bytes}
            if work.requests == 1:
                waits = count_syncs(self, asked.device) - count_syncs(lambda: [self.answer(1)], asked.device)
                found["syncs_per_token"] = round(waits / (work.new - 1), 2)
        return found


def held_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


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
            found.append(out[:, asked.work.prompt :].cpu())
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


def choice_us(asked: Asked, rows: int) -> dict[str, float]:
    """Microseconds in which tokens of as many rows are chosen, by itself and not compiled."""
    device, vocabulary = asked.device, asked.work.size.vocabulary
    sampler = Sampler(rows, vocabulary, 1, [], device)
    sampler.temperature.fill_(1.0)
    sampler.top_p.fill_(0.9)
    logits = torch.randn(rows, vocabulary, device=device, dtype=asked.work.dtype)
    numbers = torch.arange(rows, device=device)
    kinds = {"greedy": Kind(False, False), "top-p": Kind(True, False), "penalty": Kind(False, True)}
    calls = {name: [lambda kind=kind: [sampler.choose(logits, numbers, kind)]] for name, kind in kinds.items()}
    return {name: round(1e6 * found.seconds, 2) for name, found in take_turns(calls, device, 0.1).items()}


def contender(make_answer: Callable[..., Callable[[int], Tensor]], *, whole: bool = False, **options: Any) -> Contender:
    def details(run: Answering, asked: Asked, seconds: float) -> dict[str, Any]:
        found = run.details(asked, seconds)
        if make_answer is ours:
            found["choice_us"] = choice_us(asked, options["rows"])
        return found

    def prepare(asked: Asked) -> Answering:
        return Answering(asked, partial(make_answer, **options), whole=whole)

    return Contender(prepare, shortfall, details=details)


# ------------------------------------------------------------------------------------------------ cases


def weight_bytes(work: Work) -> int:
    """Of the weights that every step reads: the LLM's layers and the head, not the table of embeddings."""
    size = work.size
    layer = 4 * size.width**2 + 3 * size.width * size.mlp + 2 * size.width
    return (size.layers * layer + size.width + size.vocabulary * size.width) * work.dtype.itemsize


def cache_bytes(work: Work) -> int:
    """Of all answers' keys and values."""
    return 2 * work.size.layers * work.size.width * (work.prompt + work.new) * work.requests * work.dtype.itemsize


def case(name: str, work: Work, contenders: dict[str, Contender], rounds: int) -> Case:
    return Case(
        name=f"generate {name}: {work.requests} x {work.prompt} tokens, {work.new} new",
        make=partial(make, work=work),
        contenders=contenders,
        exact=none_lacking,
        plain=plain_lacking,
        bytes=weight_bytes(work) * work.new,
        flops=0,
        stage="answering",
        items=work.requests,
        unit="answers",
        group=f"generate {name}",
        input_bytes=weight_bytes(work) + 2 * cache_bytes(work),  # ours is kept while a peer has its own
        rounds=rounds,
        trains=True,
        one_copy=True,
    )


def one_case(work: Work) -> Case:
    contenders = {"ours": contender(ours, rows=1), "generate": contender(generate, rows=1)}
    if not GPU:
        contenders[STATIC] = contender(generate, rows=1, cache_implementation="static", whole=True)
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
    contenders = {"ours": contender(ours, rows=work.requests), CONTINUOUS: contender(continuous, whole=True)}
    return case("texts", work, contenders, rounds=3)


GPU = torch.cuda.is_available()
LARGE = Work(LLAMA_7B, text=128, new=128, requests=1, pictures=True, dtype=torch.bfloat16)
DEMO = SMALLEST._replace(scale=64, vocabulary=512, mlp=256, layers=3)
SMALL = Work(DEMO, text=16, new=48, requests=1, pictures=True, dtype=torch.float32)


def cases() -> list[Case]:
    texts = LARGE._replace(text=LARGE.prompt, requests=48, pictures=False)
    images = images_case(LARGE._replace(requests=48), 16)
    return [one_case(LARGE), images, static_case(LARGE), texts_case(texts)]


def small_cases() -> list[Case]:
    texts = SMALL._replace(text=SMALL.prompt, requests=4, pictures=False)
    return [one_case(SMALL), images_case(SMALL._replace(requests=16), 4), texts_case(texts)]


def test_generate(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
