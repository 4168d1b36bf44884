"""inject against building the same rows by concatenation, a sample at a time: 16 images, width 4096.

Three ways of concatenating are timed beside it:

- `public`: what AlignGPT's public code does (public.py). Embed a sample's text, cut it at the image, concatenate; keep
  the text rows and the image rows as blocks of their own for the gate; pad all three to the longest sample with zeros,
  stack them; insert the alignment rows into the sequences by one more concatenation. 1384 MB read and written in
  bfloat16.
- `searching`: the same from what the public code is given, padded ids with a marker for each image: to know where to
  cut, every sample waits for the device four times. Its labels, which the public code cuts up likewise, are left out.
- `lean`: the least a concatenating loop can do, each sample concatenated whole with its alignment row, padded,
  stacked. Three passes over the rows, so at most three times the bytes of `inject` (185 MB in bfloat16).

Ours is given its plan, as the collator makes it on the host beside the ids, while the device is at work on the batch
before. "ours, with its plan" makes it in the call from ids on the device, for which it waits, as `searching` does.

Packed sequences need no padding: there the loops' samples are joined by one concatenation.

On a CPU too the width is 4096, in both dtypes. There, in float32, `public` must take REQUIRED times as long for equal
samples.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import InjectionPlan, inject, inject_reference, injection_plan
from torch import Tensor

from benchmarks.case import TOO_SMALL, Case, InTurns, compiled, our_impl, simple, with_grads
from benchmarks.measure import Outputs
from benchmarks.public import MARK, Cut, Heads, concatenate, pad_and_stack, search
from benchmarks.shapes import IMAGES, ROWS, TEXT, VOCABULARY, WIDTH

CUT = 40  # text tokens before the image, BOS among them
HALF = torch.bfloat16
PADDING = 0  # the id that padded rows end with
REQUIRED = 5
COMPILED = ("reference, torch.compile", "concatenating once, torch.compile")
LAYOUTS = ["equal", "padded", "packed"]  # "padded" and "packed": 128, 123, … 53 text tokens


class Batch(NamedTuple):
    texts: list[Tensor]  # each sample's text ids, BOS first
    ids: Tensor  # with placeholders: (B, L), or packed (T,)
    embed_weight: Tensor
    image_rows: Tensor
    align_rows: Tensor
    plan: InjectionPlan
    marked: Tensor  # (B, longest text + 1), with a MARK where the image goes
    planned: Callable[[], InjectionPlan]  # makes the plan anew
    upstream: Tensor | None = None  # gradient of the result, where one is asked for


def make_batch(
    layout: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    rows: int = ROWS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
) -> Batch:
    image_id, align_id = vocabulary, vocabulary + 1
    lengths = [TEXT - (0 if layout == "equal" else 5 * i) for i in range(IMAGES)]
    texts = [torch.randint(1, vocabulary, (length,), device=device) for length in lengths]
    align, mark = torch.tensor([align_id], device=device), torch.tensor([MARK], device=device)
    image = torch.full((rows,), image_id, device=device)
    sequences = [torch.cat([t[:1], align, t[1:CUT], image, t[CUT:]]) for t in texts]
    if layout == "packed":
        ids, spans = torch.cat(sequences), torch.tensor([0, *map(len, sequences)], device=device).cumsum(0)
    else:
        ids, spans = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), None
    embed_weight = torch.randn(vocabulary, width, dtype=dtype, device=device)
    embed_weight[PADDING] = 0  # so that padding is zeros in every algorithm
    image_rows = torch.randn(IMAGES, rows, width, dtype=dtype, device=device)
    align_rows = torch.randn(IMAGES, width, dtype=dtype, device=device)
    planned = partial(injection_plan, ids, image_token_id=image_id, align_token_id=align_id, cu_seqlens=spans)
    marked = [torch.cat([t[:CUT], mark, t[CUT:]]) for t in texts]
    marked_ids = torch.nn.utils.rnn.pad_sequence(marked, batch_first=True)
    return Batch(texts, ids, embed_weight, image_rows, align_rows, planned(), marked_ids, planned)


def lean(batch: Batch, *, compiles: bool = False) -> Tensor:
    function = compiled(joined) if compiles else joined
    packed = batch.ids.dim() == 1
    return function(batch.texts, batch.embed_weight, batch.image_rows, batch.align_rows, packed)


def joined(texts: list[Tensor], embed_weight: Tensor, image_rows: Tensor, align_rows: Tensor, packed: bool) -> Tensor:
    samples = []
    for text, image, align in zip(texts, image_rows, align_rows, strict=True):
        rows = F.embedding(text, embed_weight)
        samples.append(torch.cat([rows[:1], align[None], rows[1:CUT], image, rows[CUT:]]))
    return torch.cat(samples) if packed else pad_and_stack(samples)


def public(batch: Batch) -> Tensor:
    return concatenated(batch, [Cut(text[:CUT], text[CUT:]) for text in batch.texts])


def searching(batch: Batch) -> Tensor:
    return concatenated(batch, search(batch.marked, batch.marked != PADDING))


def concatenated(batch: Batch, cuts: Sequence[Cut], heads: Heads | None = None) -> Tensor:
    """By the public algorithm; without `heads` the alignment rows are the batch's."""
    return concatenate(
        cuts,
        partial(F.embedding, weight=batch.embed_weight),
        batch.image_rows,
        (lambda texts, images: batch.align_rows) if heads is None else heads,
        packed=batch.ids.dim() == 1,
    )


def case(
    layout: str,
    *,
    backward: bool = False,
    rows: int = ROWS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = HALF,
    compiles: bool = True,
) -> Case:
    def make(device: torch.device) -> Batch:
        """The embedding table is frozen, so that gradients are what injection itself costs."""
        batch = make_batch(layout, dtype, device, rows=rows, width=width, vocabulary=vocabulary)
        batch.image_rows.requires_grad_(backward)
        batch.align_rows.requires_grad_(backward)
        upstream = torch.randn(*batch.ids.shape, width, dtype=dtype, device=device) if backward else None
        return batch._replace(upstream=upstream)

    def outputs(function: Callable[[Batch], Tensor], b: Batch) -> Outputs:
        return with_grads(function(b), [b.image_rows, b.align_rows], b.upstream) if backward else [function(b)]

    def ours(b: Batch) -> Tensor:
        arguments = b.ids, b.embed_weight, b.image_rows, b.align_rows
        return inject(*arguments, plan=b.plan, impl=our_impl(b.ids))

    def planning(b: Batch) -> Tensor:
        return ours(b._replace(plan=b.planned()))

    def by_compiler(b: Batch) -> Tensor:
        return compiled(inject_reference)(b.ids, b.embed_weight, b.image_rows, b.align_rows, plan=b.plan)

    def reference(b: Batch) -> Tensor:
        return inject_reference(b.ids, b.embed_weight, b.image_rows, b.align_rows, plan=b.plan)

    def exact(b: Batch) -> Outputs:
        return outputs(reference, b)  # copies, in the dtype itself

    functions: dict[str, Callable[[Batch], Tensor]] = {
        "ours": ours,
        "ours, with its plan": planning,
        "reference": reference,
        "concatenating once": lean,
        "concatenating": public,
        "concatenating, searching": searching,
    }
    if compiles:
        functions |= dict(zip(COMPILED, (by_compiler, partial(lean, compiles=True)), strict=True))
    texts = sum(TEXT - (0 if layout == "equal" else 5 * i) for i in range(IMAGES))
    tokens = texts + IMAGES * (rows + 1)
    if layout == "padded":
        tokens = IMAGES * (TEXT + rows + 1)
    moved = tokens + (IMAGES * (rows + 1) if backward else 0)
    direction, precision = "forward + backward" if backward else "forward", "" if dtype == HALF else ", float32"
    return Case(
        name=f"injection {direction}, {layout}{precision}",
        make=make,
        contenders={name: simple(partial(outputs, function)) for name, function in functions.items()},
        exact=exact,
        plain=exact,
        bytes=2 * moved * width * dtype.itemsize,
        equal=True,
        stage="injection",
        absent={} if compiles else dict.fromkeys(COMPILED, TOO_SMALL),
        items=tokens,
        unit="tokens",
        group=f"injection {direction}",
        dispatch=("inject", "ours", ("reference",)),
        host=True,
        memory=True,
    )


def cases() -> list[Case]:
    return [case(layout, backward=backward) for layout in LAYOUTS for backward in (False, True)]


def cpu_cases() -> list[Case]:
    def here(layout: str, dtype: torch.dtype = torch.float32, backward: bool = False) -> Case:
        compiles = layout == "packed" and dtype == torch.float32  # for seconds
        return case(layout, backward=backward, dtype=dtype, compiles=compiles)

    forward = [here(layout, dtype) for layout in LAYOUTS for dtype in (torch.float32, HALF)]
    backward = [here(layout, backward=True) for layout in ("equal", "packed")]
    return [*forward, *backward]


def small_cases() -> list[Case]:
    small = partial(case, rows=16, width=64, vocabulary=500, dtype=torch.float32, compiles=False)
    return [small(layout, backward=backward) for layout in LAYOUTS for backward in (False, True)]


def test_injection(in_turns: InTurns, case: Case, request: pytest.FixtureRequest) -> None:
    found = in_turns(case)["concatenating"]
    if case.name == "injection forward, equal, float32" and "ratio" in found and not request.config.getoption("quick"):
        assert found["ratio"]["high"] >= REQUIRED  # in three rounds of four it was less
