"""Every op recorded as a CUDA graph, its plan and its backward too: a replay gives what a call would give by then."""

from functools import partial

import pytest
import torch
from aligngpt_kernels import (
    align_gate,
    flash_decode,
    fused_projector,
    inject,
    injection_plan,
    linear_cross_entropy,
    project_and_inject,
    text_mean,
)
from torch import Tensor

IMAGE, ALIGN, VOCABULARY, BATCH, LENGTH, ROWS, WIDTH = 40, 41, 40, 2, 12, 3, 64
DTYPE = torch.bfloat16
PROJECTOR = (32, 16), (32,), (WIDTH, 32), (WIDTH,)
GATE = (8, ROWS), (8,), (4, 8), (4,), (5, WIDTH)
EMBED, IMAGE_ROWS, SAMPLE_ROWS = (VOCABULARY, WIDTH), (BATCH, ROWS, WIDTH), (BATCH, WIDTH)
plan_of = partial(
    injection_plan, image_token_id=IMAGE, align_token_id=ALIGN, num_image_rows=BATCH * ROWS, num_samples=BATCH
)


def indices() -> dict[str, Tensor]:
    """An image somewhere in each sequence, some labels, and some visible keys."""
    ids = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    ids[:, 1] = ALIGN
    position, start = torch.arange(LENGTH), torch.randint(2, LENGTH - ROWS, (BATCH, 1))
    ids = torch.where((position >= start) & (position < start + ROWS), IMAGE, ids)
    return {
        "ids": ids,
        "mask": torch.rand(BATCH, LENGTH) < 0.5,
        "labels": torch.randint(0, VOCABULARY, (LENGTH,)),
        "rows": torch.randperm(LENGTH)[:8],
        "lengths": torch.randint(1, 300, (BATCH,)),
    }


CALLS = {  # of the indices and of floating arguments, whose shapes follow
    "fused_projector": (lambda at, *x: fused_projector(*x, impl="triton"), (BATCH, ROWS, 16), *PROJECTOR),
    "text_mean": (lambda at, x: text_mean(at["ids"], x, at["mask"], plan_of(at["ids"]), impl="triton"), EMBED),
    "align_gate": (
        lambda at, *x: align_gate(
            *x, image_sample=plan_of(at["ids"]).image_sample(ROWS), mode="adaptive", impl="triton"
        ),
        *(IMAGE_ROWS, SAMPLE_ROWS, *GATE),
    ),
    "inject": (
        lambda at, *x: inject(at["ids"], *x, plan=plan_of(at["ids"]), impl="triton"),
        *(EMBED, IMAGE_ROWS, SAMPLE_ROWS),
    ),
    "project_and_inject": (
        lambda at, *x: project_and_inject(*x[:5], at["ids"], *x[5:], plan=plan_of(at["ids"]), impl="triton"),
        *((BATCH, ROWS, 16), *PROJECTOR, EMBED, SAMPLE_ROWS),
    ),
    "linear_cross_entropy": (
        lambda at, *x: linear_cross_entropy(*x, at["labels"], rows=at["rows"], reduction="mean", impl="triton"),
        *((LENGTH, WIDTH), EMBED),
    ),
    "flash_decode": (
        lambda at, *x: flash_decode(*x, at["lengths"], impl="triton"),
        *((BATCH, 4, 1, WIDTH), (BATCH, 2, 300, WIDTH), (BATCH, 2, 300, WIDTH)),
    ),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")
@pytest.mark.parametrize("name", CALLS)
def test_a_replayed_graph_reads_what_its_inputs_now_hold(name):
    call, *shapes = CALLS[name]
    trains = name != "flash_decode"
    at, floats = indices(), [torch.randn(shape, dtype=DTYPE, requires_grad=trains) for shape in shapes]

    def step() -> list[Tensor]:
        outputs = call(at, *floats)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        with_grad = [out for out in outputs if out.requires_grad]
        upstream = [torch.linspace(0.5, 1.5, out.numel()).view_as(out).to(out.dtype) for out in with_grad]
        grads = torch.autograd.grad(with_grad, floats, upstream) if trains else ()
        return [*(out.detach() for out in outputs), *grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(2):
        for index, new in zip(at.values(), indices().values(), strict=True):
            index.copy_(new)
        for tensor in floats:
            tensor.data.normal_()
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        for position, (got, want) in enumerate(zip(results, step(), strict=True)):
            assert torch.equal(got, want), position
