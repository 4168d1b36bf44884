"""Projector, gate and injection as one stage of 16 images: ours, in parts and fused, against what it replaces.

What it replaces is the eager projector and the public code's concatenating algorithm (public.py) with its gate
between: the text mean of each padded text block, the dots with the padded image block, a two-layer MLP, the mix. Ours
is given its plan, as bench_injection says; "ours, with its plan" is in parts and makes it in the call.
Forward + backward gives projector and gate their gradients; the embeddings and the gate's table are frozen.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from aligngpt_kernels import (
    InjectionPlan,
    align_gate,
    align_gate_reference,
    fused_projector,
    fused_projector_reference,
    inject,
    inject_reference,
    project_and_inject,
    text_mean,
    text_mean_reference,
)
from torch import Tensor

from benchmarks import bench_injection, bench_projector
from benchmarks.bench_injection import Batch, concatenated, make_batch
from benchmarks.bench_projector import Projector
from benchmarks.case import TOO_SMALL, Case, InTurns, compiled, our_impl, simple, with_grads
from benchmarks.measure import Outputs
from benchmarks.public import Cut, search
from benchmarks.shapes import CPU_WIDTH, FEATURES, GATE_HIDDEN, IMAGES, LEVELS, ROWS, TEXT, VOCABULARY, WIDTH
from benchmarks.work import (
    align_gate_backward_flops,
    align_gate_flops,
    gate_weights,
    projector_backward_flops,
    projector_flops,
    text_mean_flops,
)

COMPILED = "reference, torch.compile"


class Chain(NamedTuple):
    batch: Batch  # its image and align rows are not used
    projector: Projector  # x: (M, P, features)
    gate: tuple[Tensor, Tensor, Tensor, Tensor]  # w1, b1, w2, b2
    table: Tensor
    gate_mask: Tensor  # all text but each sample's first token
    counts: Tensor  # (S, 1) how many those are


def make(
    device: torch.device, dtype: torch.dtype, rows: int, features: int, width: int, vocabulary: int, backward: bool
) -> Chain:
    batch = make_batch("padded", dtype, device, rows=rows, width=width, vocabulary=vocabulary)
    if backward:
        batch = batch._replace(upstream=torch.randn(*batch.ids.shape, width, dtype=dtype, device=device))
    projector = bench_projector.make(IMAGES * rows, features, width, dtype, device, backward)

    def draw(*shape: int) -> Tensor:
        bound = shape[-1] ** -0.5
        return torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound).requires_grad_(backward)

    gate = draw(GATE_HIDDEN, rows), draw(GATE_HIDDEN), draw(LEVELS - 1, GATE_HIDDEN), draw(LEVELS - 1)
    counts = torch.tensor([[len(text) - 1.0] for text in batch.texts], device=device)
    table = torch.randn(LEVELS, width, device=device, dtype=dtype)
    projector = projector._replace(x=projector.x.view(IMAGES, rows, features))
    gate_mask = batch.ids != bench_injection.PADDING
    gate_mask[:, 0] = False
    return Chain(batch, projector, gate, table, gate_mask, counts)


def in_parts(c: Chain, eager_projector: bool = False) -> Tensor:
    b, impl = c.batch, our_impl(c.batch.ids)
    image_rows = fused_projector(*c.projector[:5], impl="reference" if eager_projector else impl)
    mean = text_mean(b.ids, b.embed_weight, c.gate_mask, b.plan, impl=impl)
    image_sample = b.plan.image_sample(image_rows.shape[1])
    heads, _ = align_gate(image_rows, mean, *c.gate, c.table, image_sample=image_sample, mode="adaptive", impl=impl)
    return inject(b.ids, b.embed_weight, image_rows, heads, plan=b.plan, impl=impl)


def fused(c: Chain) -> Tensor:
    b, impl = c.batch, our_impl(c.batch.ids)
    mean = text_mean(b.ids, b.embed_weight, c.gate_mask, b.plan, impl=impl)
    out, dots = project_and_inject(*c.projector[:5], b.ids, b.embed_weight, mean, plan=b.plan, impl=impl)
    out.view(-1, out.shape[-1])[b.plan.align_place.long()] = mix(dots, c)
    return out


def reference(c: Chain, *, compiles: bool = False) -> Tensor:
    b, function = c.batch, compiled(of_references) if compiles else of_references
    arguments = c.projector[:5], c.gate, c.table, c.gate_mask, b.ids, b.embed_weight, b.plan
    return function(*arguments)


def of_references(
    projector: tuple[Tensor, ...],
    gate: tuple[Tensor, Tensor, Tensor, Tensor],
    table: Tensor,
    gate_mask: Tensor,
    ids: Tensor,
    embed_weight: Tensor,
    plan: InjectionPlan,
) -> Tensor:
    x, w1, b1, w2, b2 = projector
    image_rows = fused_projector_reference(x, w1, b1, w2, b2)
    mean = text_mean_reference(ids, embed_weight, gate_mask, plan)
    image_sample = plan.image_sample(image_rows.shape[1])
    heads, _ = align_gate_reference(image_rows, mean, *gate, table, image_sample=image_sample, mode="adaptive")
    return inject_reference(ids, embed_weight, image_rows, heads, plan=plan)


def planning(c: Chain) -> Tensor:
    return in_parts(c._replace(batch=c.batch._replace(plan=c.batch.planned())))


def mix(dots: Tensor, c: Chain) -> Tensor:
    """The gate from its dots on; they may be float32."""
    w1, b1, w2, b2 = (t.to(dots.dtype) for t in c.gate)
    alpha = F.linear(F.gelu(F.linear(dots, w1, b1)), w2, b2).softmax(-1)
    return (alpha @ c.table[:-1].to(dots.dtype) + c.table[-1]).to(c.table.dtype)


def concatenating(c: Chain, cuts: list[Cut]) -> Tensor:
    image_rows = fused_projector_reference(*c.projector[:5])

    def heads(text: Tensor, image: Tensor) -> Tensor:  # (S, longest text, D), (S, P, D)
        mean = text[:, 1:].sum(1) / (c.counts.to(text.dtype) + 1e-8)
        return mix((image @ mean[:, :, None])[:, :, 0], c)

    return concatenated(c.batch._replace(image_rows=image_rows), cuts, heads)


def known(c: Chain) -> Tensor:
    return concatenating(c, [Cut(text[: bench_injection.CUT], text[bench_injection.CUT :]) for text in c.batch.texts])


def searching(c: Chain) -> Tensor:
    return concatenating(c, search(c.batch.marked, c.batch.marked != bench_injection.PADDING))


def outputs(function: Callable[[Chain], Tensor], c: Chain) -> Outputs:
    """The embeddings and, where an upstream gradient is there, those of projector and gate."""
    out, upstream = function(c), c.batch.upstream
    return [out] if upstream is None else with_grads(out, [*c.projector[1:5], *c.gate], upstream.to(out.dtype))


def exact(c: Chain) -> Outputs:
    def double(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    w1, b1, w2, b2 = map(double, c.gate)
    doubled = c._replace(
        batch=c.batch._replace(embed_weight=c.batch.embed_weight.double()),
        projector=Projector(*map(double, c.projector)),
        gate=(w1, b1, w2, b2),
        table=c.table.double(),
    )
    return outputs(reference, doubled)


def case(
    *,
    backward: bool = False,
    rows: int = ROWS,
    features: int = FEATURES,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.bfloat16,
    compiles: bool = True,
) -> Case:
    image_rows, tokens = IMAGES * rows, IMAGES * (TEXT + rows + 1)
    weights, texts = features * width + width**2, IMAGES * TEXT * width
    functions: dict[str, Callable[[Chain], Tensor]] = {
        "ours, in parts": in_parts,
        "ours, eager projector": partial(in_parts, eager_projector=True),
        "ours, project_and_inject": fused,
        "ours, with its plan": planning,
        "reference": reference,
        "eager + concatenating": known,
        "eager + concatenating, searching": searching,
    }
    if compiles:
        functions[COMPILED] = partial(reference, compiles=True)
    moved = image_rows * features + weights + texts + tokens * width
    gate = image_rows, IMAGES, width, gate_weights(rows), LEVELS
    words = IMAGES * (TEXT - 1) - 5 * sum(range(IMAGES))  # make_batch's lengths, less each one's BOS
    products = projector_flops(image_rows, features, width) + text_mean_flops(words, width) + align_gate_flops(*gate)
    if backward:  # as in bench_projector and bench_gate; the embeddings are frozen
        moved += image_rows * (features + width) + width**2 + weights
        products += projector_backward_flops(image_rows, features, width) + align_gate_backward_flops(*gate)
    direction = "forward + backward" if backward else "forward"
    return Case(
        name=f"projector + gate + injection {direction}, {IMAGES} images",
        make=lambda device: make(device, dtype, rows, features, width, vocabulary, backward),
        contenders={name: simple(partial(outputs, function)) for name, function in functions.items()},
        exact=exact,
        plain=partial(outputs, known),
        bytes=moved * dtype.itemsize,
        flops=products,
        terms=image_rows if backward else width,
        stage="projector + gate + injection",
        absent={} if compiles else {COMPILED: TOO_SMALL},
        items=IMAGES,
        unit="images",
        group=f"chain {direction}",
        # without it the parts run, each where its own measurement lets it
        dispatch=("project_and_inject", "ours, project_and_inject", ("ours, in parts", "ours, eager projector")),
        host=True,
        memory=True,
    )


def cases() -> list[Case]:
    return [case(backward=backward) for backward in (False, True)]


def cpu_cases() -> list[Case]:
    here = partial(case, rows=144, width=CPU_WIDTH // 2, dtype=torch.float32)
    return [here(backward=backward, compiles=backward) for backward in (False, True)]


def small_cases() -> list[Case]:
    small = partial(case, rows=16, features=32, width=64, vocabulary=500, dtype=torch.float32, compiles=False)
    return [small(backward=backward) for backward in (False, True)]


def test_chain(in_turns: InTurns, case: Case) -> None:
    in_turns(case)
