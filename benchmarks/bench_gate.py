"""text_mean and align_gate, apart and together, against their references, eager and compiled: 16 images."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from aligngpt_kernels import InjectionPlan, align_gate, align_gate_reference, text_mean, text_mean_reference
from torch import Tensor

from benchmarks.bench_injection import make_batch
from benchmarks.case import TOO_SMALL, Case, InTurns, compiled, our_impl, simple, with_grads
from benchmarks.measure import Outputs
from benchmarks.shapes import CPU_WIDTH, GATE_HIDDEN, IMAGES, LEVELS, ROWS, TEXT, VOCABULARY, WIDTH
from benchmarks.work import align_gate_backward_flops, align_gate_flops, gate_weights, text_mean_flops


class Gate(NamedTuple):
    ids: Tensor  # packed
    embed_weight: Tensor
    image_rows: Tensor
    mean: Tensor  # (S, D) float32, for align_gate alone
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    table: Tensor
    plan: InjectionPlan
    image_sample: Tensor
    upstream: Tensor  # (S, D) float32


def make(device: torch.device, dtype: torch.dtype, rows: int, width: int, vocabulary: int, backward: bool) -> Gate:
    """The table is frozen, as in stage 2."""
    batch = make_batch("packed", dtype, device, rows=rows, width=width, vocabulary=vocabulary)

    def draw(*shape: int) -> Tensor:
        bound = shape[-1] ** -0.5
        return torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound).requires_grad_(backward)

    samples = batch.align_rows.shape[0]
    mean = torch.randn(samples, width, device=device) / width**0.5  # so that dots are about 1
    return Gate(
        batch.ids,
        batch.embed_weight.requires_grad_(backward),
        batch.image_rows.requires_grad_(backward),
        mean.requires_grad_(backward),
        draw(GATE_HIDDEN, rows),
        draw(GATE_HIDDEN),
        draw(LEVELS - 1, GATE_HIDDEN),
        draw(LEVELS - 1),
        torch.randn(LEVELS, width, device=device, dtype=dtype),
        batch.plan,
        batch.plan.image_sample(rows),
        torch.randn(samples, width, device=device),
    )


def double(g: Gate) -> Gate:
    floats: dict[str, Any] = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        for name, value in g._asdict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return g._replace(**floats)


def our_mean(g: Gate) -> Tensor:
    return text_mean(g.ids, g.embed_weight, None, g.plan, impl=our_impl(g.ids))


def our_gate(g: Gate) -> Tensor:
    weights = g.w1, g.b1, g.w2, g.b2, g.table
    impl = our_impl(g.ids)
    return align_gate(g.image_rows, g.mean, *weights, image_sample=g.image_sample, mode="adaptive", impl=impl)[0]


def plain_mean(g: Gate) -> Tensor:
    return text_mean_reference(g.ids, g.embed_weight, None, g.plan)


def plain_gate(g: Gate) -> Tensor:
    weights = g.w1, g.b1, g.w2, g.b2, g.table
    return align_gate_reference(g.image_rows, g.mean, *weights, image_sample=g.image_sample, mode="adaptive")[0]


def both(mean: Callable[[Gate], Tensor], gate: Callable[[Gate], Tensor]) -> Callable[[Gate], Tensor]:
    return lambda g: gate(g._replace(mean=mean(g)))


OPS: dict[str, tuple[Callable[[Gate], Tensor], Callable[[Gate], Tensor]]] = {
    "text_mean": (our_mean, plain_mean),
    "align_gate": (our_gate, plain_gate),
    "text_mean + align_gate": (both(our_mean, our_gate), both(plain_mean, plain_gate)),
}


def case(
    op: str,
    *,
    backward: bool = False,
    rows: int = ROWS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.bfloat16,
    compiles: bool = True,
) -> Case:
    ours, plain = OPS[op]

    def outputs(function: Callable[[Gate], Tensor], g: Gate) -> Outputs:
        if not backward:
            return [function(g)]
        leaves = {"text_mean": [g.embed_weight], "align_gate": [g.image_rows, g.mean, *g[4:8]]}
        chosen = leaves.get(op) or [*leaves["text_mean"], g.image_rows, *g[4:8]]
        out = function(g)
        return with_grads(out, chosen, g.upstream.to(out.dtype))

    text_rows = IMAGES * TEXT - 5 * sum(range(IMAGES)) - IMAGES  # make_batch's lengths, less each one's BOS
    elements = flops = 0
    if op != "align_gate":
        elements += text_rows * width + (vocabulary * width if backward else 0)  # the whole table's gradient
        flops += text_mean_flops(text_rows, width) * (2 if backward else 1)
    if op != "text_mean":
        gate = IMAGES * rows, IMAGES, width, gate_weights(rows), LEVELS
        elements += IMAGES * rows * width * (3 if backward else 1)  # image rows again, and their gradient
        flops += align_gate_flops(*gate) + (align_gate_backward_flops(*gate) if backward else 0)
    contenders = {"ours": simple(lambda g: outputs(ours, g)), "reference": simple(lambda g: outputs(plain, g))}
    if compiles:
        contenders["reference, torch.compile"] = simple(lambda g: outputs(compiled(plain), g))
    return Case(
        name=f"{op} {'forward + backward' if backward else 'forward'}, {IMAGES} samples",
        make=lambda device: make(device, dtype, rows, width, vocabulary, backward),
        contenders=contenders,
        exact=lambda g: outputs(plain, double(g)),
        plain=lambda g: outputs(plain, g),
        bytes=elements * dtype.itemsize,
        flops=flops,
        terms=width,
        stage="gate",
        items=IMAGES,
        unit="samples",
        group="gate",
        absent={} if compiles else {"reference, torch.compile": TOO_SMALL},
        host=True,
        memory=True,
        dispatch=(op, "ours", ("reference",)) if op in ("text_mean", "align_gate") else None,
    )


def cases() -> list[Case]:
    return [case(op, backward=backward) for op in OPS for backward in (False, True)]


def cpu_cases() -> list[Case]:
    here = partial(case, width=CPU_WIDTH, dtype=torch.float32)
    return [here(op, backward=backward) for op in OPS for backward in (False, True)]


def small_cases() -> list[Case]:
    small = partial(case, rows=16, width=64, vocabulary=500, dtype=torch.float32, compiles=False)
    return [small(op, backward=backward) for op in OPS for backward in (False, True)]


def test_gate(in_turns: InTurns, case: Case) -> None:
    in_turns(case)
