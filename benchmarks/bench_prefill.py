"""Prefill: several prompts with pictures, of different lengths, to the first token of each.

    ours                     the engine packs them end to end and reads them at once; nothing is padded
    forward, padded          the model's forward of the batch padded on the left, attention by SDPA, into a new cache
    forward, compiled        the same, its LLM by torch.compile
    generate, padded         transformers' `generate(max_new_tokens=1)` of that batch
    generate, one at a time  of each prompt by itself, so that nothing is padded either

All have the same weights, tower and prompts, and a call ends when the tokens are on the host. The tokens are judged as
bench_generate judges them: of every prompt, by a pass of that prompt alone in float64 (float32 for a model of 16 bits).

Items are the prompts' tokens, image rows included, padding not. FLOPs are those of the products and of attention within
each prompt (causal ones half), and of the head for the last tokens alone; the tower's last layer is not needed.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench_generate import (
    LARGE,
    LEAST,
    ONE_AT_A_TIME,
    SMALL,
    Asked,
    Work,
    batch,
    cache_bytes,
    contender,
    generate,
    make,
    none_lacking,
    ours,
    plain_lacking,
    prefill_work,
    twin,
    weight_bytes,
)
from benchmarks.case import Case, Contender

COMPILED = "forward, compiled"


@torch.no_grad()
def forward(asked: Asked, *, compiled: bool = False) -> Callable[[int], Tensor]:
    """The likeliest token after each prompt, by one pass of the padded batch."""
    model = twin(asked.peer)
    if compiled:
        model.model.language_model.compile(dynamic=False)

    @torch.no_grad()
    def answer(new: int) -> Tensor:
        inputs = batch(asked.prompts, asked.device)
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**inputs, logits_to_keep=1, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True).cpu()

    return answer


def case(work: Work, compiles: bool) -> Case:
    assert work.new == 1
    contenders: dict[str, Contender] = {
        "ours": contender(ours, rows=work.requests),
        "forward, padded": contender(forward),
        "generate, padded": contender(generate, rows=work.requests),
        ONE_AT_A_TIME: contender(generate, rows=1),
    }
    if compiles:
        contenders[COMPILED] = contender(forward, compiled=True)
    done = prefill_work(work)
    pictures = "with pictures" if work.pictures else "of text"
    return Case(
        name=f"prefill: {work.requests} prompts {pictures} of {min(work.prompts)} to {work.prompt} tokens",
        make=partial(make, work=work),
        contenders=contenders,
        exact=none_lacking,
        plain=plain_lacking,
        bytes=int(done.bytes),
        flops=int(done.flops),
        stage="prefill",
        items=done.items,
        unit=done.unit,
        group="prefill",
        sweep=("prompts", work.requests),
        input_bytes=weight_bytes(work) + 2 * cache_bytes(work),  # ours is kept while a peer has its own
        rounds=5,
        trains=True,
        one_copy=True,
    )


def works(work: Work, requests: int, least_text: int, text: int) -> Work:
    return work._replace(requests=requests, least_text=least_text, text=text, new=1)


def cases() -> list[Case]:
    return [case(works(LARGE, requests, 64, 512), compiles=requests == 16) for requests in (4, 16)]


def cpu_cases() -> list[Case]:
    return [case(works(SMALL, requests, 16, 256), compiles=requests == 8) for requests in (2, 8)]


def small_cases() -> list[Case]:
    return [case(works(LEAST, 3, 5, 24), compiles=False)]


def test_prefill(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
