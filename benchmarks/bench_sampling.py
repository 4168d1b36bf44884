"""Sampling: from the logits of a step (R, V) to the next token of each row.

    greedy    the likeliest token
    top-p     temperature 0.7, then a draw among the likeliest tokens that together have the probability top_p
    penalty   the likeliest, once the tokens of a prompt of 704 have their repetition penalty

    ours          `Sampler.choose`, with a number from 0 to 1 that was drawn beforehand for each token
    transformers  the logits processors that `generate` would have, then argmax or softmax and `torch.multinomial`

Both eager and compiled; the engine runs ours compiled on a GPU and eager on a CPU.

Every answer is exact or wrong. Of each row LIKELY tokens have logits of their own, 1/16 apart, which every dtype holds,
so that none of the choices hangs on rounding; top_p ends in the middle of a token's probability, and the numbers that
ours draws by lie in the middle of their tokens' shares, half of them in that of the last token that is kept. A draw of
ours must be the token that float64 has at that number. transformers draws by a number that nobody sees: what it drew
from is judged, by the tokens at the same numbers, and its own draw must be one of those kept.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from aligngpt.sampling import Kind, Sampler
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs, Run
from benchmarks.shapes import VOCABULARY

LIKELY, HIGHEST = 128, 16.0
TEMPERATURE, TOP_P, PENALTY = 0.7, 0.9, 1.3  # TOP_P: about
PROMPT = 704  # tokens
KINDS = {"greedy": Kind(False, False), "top-p": Kind(True, False), "penalty": Kind(False, True)}


class Asked(NamedTuple):
    """The inputs of a case."""

    kind: Kind
    logits: Tensor  # (R, V)
    prompt: Tensor  # (R, PROMPT) ids
    top_p: float
    uniform: Tensor  # (R,) float64


def make(device: torch.device, name: str, rows: int, vocabulary: int, dtype: torch.dtype) -> Asked:
    logits = torch.randn(rows, vocabulary, device=device).clamp(max=3).to(dtype)
    likely = torch.rand(rows, vocabulary, device=device).argsort(-1)[:, :LIKELY]
    logits.scatter_(1, likely, (HIGHEST - torch.arange(LIKELY, device=device) / 16).to(dtype).expand(rows, -1))
    prompt = torch.randint(0, vocabulary, (rows, PROMPT), device=device)
    prompt[:, :3] = likely[:, :3]  # the likeliest are penalised

    probability, _ = exact_probability(logits[:1]).sort(descending=True)
    ends = probability[0].cumsum(-1)
    last = int((ends < TOP_P).sum())  # of those that are kept
    shares = ends[: last + 1] / ends[last]
    middles = shares - probability[0, : last + 1] / ends[last] / 2
    places = torch.randint(0, last + 1, (rows,), device=device)
    places[::2] = last
    return Asked(KINDS[name], logits, prompt, float(ends[last] - probability[0, last] / 2), middles[places])


def exact_probability(logits: Tensor) -> Tensor:
    return (logits.double() / TEMPERATURE).softmax(-1)


def at_uniform(probability: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row at a number from 0 to 1, the likeliest first. (R,)"""
    probability, order = probability.double().sort(dim=-1, descending=True, stable=True)
    ends = probability.cumsum(-1)
    place = (ends <= uniform[:, None] * ends[:, -1:]).sum(-1, keepdim=True)
    return order.gather(1, place.clamp(max=order.shape[1] - 1))[:, 0]


def exact_kept(asked: Asked) -> Tensor:
    """The probability of each token that is kept, 0 of the others. (R, V) float64"""
    probability = exact_probability(asked.logits)
    ordered, order = probability.sort(dim=-1, descending=True, stable=True)
    ordered = torch.where(ordered.cumsum(-1) - ordered < asked.top_p, ordered, 0.0)
    return torch.zeros_like(probability).scatter(1, order, ordered)


def exact(asked: Asked) -> Outputs:
    """The tokens, and for a draw whether each is one of those kept."""
    if asked.kind.draws:
        return [at_uniform(exact_kept(asked), asked.uniform), torch.ones_like(asked.uniform, dtype=torch.bool)]
    logits = asked.logits.double()
    if asked.kind.penalises:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, asked.prompt, True)
        logits = torch.where(seen, torch.where(logits < 0, logits * PENALTY, logits / PENALTY), logits)
    return [logits.argmax(-1)]


# ------------------------------------------------------------------------------------------------ contenders


def ours(asked: Asked, *, compile: bool = False) -> Run:
    logits, kind = asked.logits, asked.kind
    rows, vocabulary = logits.shape
    sampler = Sampler(rows, vocabulary, 1, [], logits.device)
    if kind.draws:
        sampler.temperature.fill_(TEMPERATURE)
        sampler.top_p.fill_(asked.top_p)
        sampler.uniform[:, 0] = asked.uniform
    if kind.penalises:
        sampler.penalty.fill_(PENALTY)
        sampler.seen.scatter_(1, asked.prompt, True)
    numbers = torch.arange(rows, device=logits.device)
    choose = torch.compile(sampler.choose, dynamic=False) if compile else sampler.choose
    return lambda: [choose(logits, numbers, kind)]


def with_kept(asked: Asked, outputs: Outputs) -> Outputs:
    """Tokens; of a draw also whether they are among those kept."""
    (tokens,) = outputs
    return [tokens, is_kept(asked, tokens)] if asked.kind.draws else [tokens]


def is_kept(asked: Asked, tokens: Tensor) -> Tensor:
    return exact_kept(asked).gather(1, tokens[:, None])[:, 0] > 0


def transformers(asked: Asked, *, compile: bool = False) -> Run:
    kind, logits, prompt = asked.kind, asked.logits, asked.prompt
    processors = LogitsProcessorList()  # in the order that `generate` has
    if kind.penalises:
        processors.append(RepetitionPenaltyLogitsProcessor(PENALTY))
    if kind.draws:
        processors += [TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(asked.top_p)]

    def choose(logits: Tensor, prompt: Tensor) -> Outputs:
        scores = processors(prompt, logits.to(torch.float32, copy=True))
        if not kind.draws:
            return [scores.argmax(-1)]
        probability = scores.softmax(-1)
        return [torch.multinomial(probability, 1)[:, 0], probability]

    run = torch.compile(choose, dynamic=False) if compile else choose
    return lambda: run(logits, prompt)


def by_what_it_drew_from(asked: Asked, outputs: Outputs) -> Outputs:
    if not asked.kind.draws:
        return outputs
    tokens, probability = outputs
    return [at_uniform(probability, asked.uniform), is_kept(asked, tokens)]


# ------------------------------------------------------------------------------------------------ cases


def case(name: str, rows: int, vocabulary: int, dtype: torch.dtype, *, compiles: bool) -> Case:
    contenders = {
        "ours": Contender(ours, with_kept),
        "transformers": Contender(transformers, by_what_it_drew_from),
    }
    if compiles:
        contenders["ours, compiled"] = Contender(partial(ours, compile=True), with_kept)
        contenders["transformers, compiled"] = Contender(partial(transformers, compile=True), by_what_it_drew_from)
    logits = rows * vocabulary * dtype.itemsize
    seen = rows * vocabulary if KINDS[name].penalises else 0
    return Case(
        name=f"sampling {name}: {rows} x {vocabulary}",
        make=partial(make, name=name, rows=rows, vocabulary=vocabulary, dtype=dtype),
        contenders=contenders,
        exact=exact,
        plain=lambda asked: [],  # nothing is rounded
        bytes=logits + seen,
        stage="sampling",
        items=rows,
        unit="tokens",
        group=f"sampling {name}, {rows} rows",
        sweep=("vocabulary", vocabulary),
        equal=True,
        host=True,
        memory=True,
        trains=True,
        one_copy=True,  # a step has just written its logits, which lie in the cache there too
    )


SHAPES = [(rows, vocabulary) for rows in (1, 16) for vocabulary in (VOCABULARY, 128256)]


def cases() -> list[Case]:
    return [case(name, *shape, torch.bfloat16, compiles=True) for name in KINDS for shape in SHAPES]


def cpu_cases() -> list[Case]:
    """All but the largest shape, which takes seconds to check. Each kind compiles at one of them."""
    compiled = (16, VOCABULARY)
    return [case(name, *shape, torch.float32, compiles=shape == compiled) for name in KINDS for shape in SHAPES[:-1]]


def small_cases() -> list[Case]:
    return [case(name, 2, 1000, torch.float32, compiles=False) for name in KINDS]


def test_sampling(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
