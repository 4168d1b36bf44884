"""linear_cross_entropy, forward + backward, against full logits, torch's own and Liger's: 16384 rows, 15 % supervised.

Ours is given the supervised rows, as the collator makes them. Full logits are the loss as it is usually written: the
head on all rows, float32, cross entropy. Liger's and torch's also run on rows that were compacted outside the time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from aligngpt_kernels import linear_cross_entropy, linear_cross_entropy_reference
from torch import Tensor

from benchmarks.case import TOO_SMALL, Absent, Case, Contender, InTurns, compiled, our_impl, simple, with_grads
from benchmarks.measure import MIN_ROUNDS, Outputs, Run
from benchmarks.shapes import CPU_WIDTH, LOSS_ROWS, SUPERVISED, VOCABULARY, VOCABULARY_LLAMA3, WIDTH

IGNORED = -100


class Head(NamedTuple):
    hidden: Tensor  # (R, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (R,)
    rows: Tensor  # the supervised ones, in order

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight]


def make(
    rows: int, supervised: int, width: int, vocabulary: int, trained: bool, dtype: torch.dtype, device: torch.device
) -> Head:
    hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype).mul_(width**-0.5).requires_grad_(trained)
    chosen = torch.randperm(rows, device=device)[:supervised].sort().values
    labels = torch.full((rows,), IGNORED, device=device)
    labels[chosen] = torch.randint(0, vocabulary, (supervised,), device=device)
    return Head(hidden, weight, labels, chosen)


def ours(h: Head) -> Outputs:
    impl = our_impl(h.hidden)
    return with_grads(linear_cross_entropy(h.hidden, h.weight, h.labels, rows=h.rows, impl=impl)[0], h.leaves)


def reference(h: Head) -> Outputs:
    return with_grads(linear_cross_entropy_reference(h.hidden, h.weight, h.labels, rows=h.rows)[0], h.leaves)


def full_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum", ignore_index=IGNORED)


def full(h: Head) -> Outputs:
    return with_grads(full_loss(h.hidden, h.weight, h.labels), h.leaves)


def full_compiled(h: Head) -> Outputs:
    return with_grads(compiled(full_loss)(h.hidden, h.weight, h.labels), h.leaves)


def torchs(h: Head) -> Outputs:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"torch {torch.__version__} has linear_cross_entropy without options: it would make full logits")
    options = torch.nn.LinearCrossEntropyOptions()  # chunks
    loss = F.linear_cross_entropy(
        h.hidden, h.weight, h.labels, reduction="sum", ignore_index=IGNORED, options=options
    )  # fmt: skip
    return with_grads(loss, h.leaves)


def liger(h: Head) -> Outputs:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")(h.weight, h.hidden, h.labels)
    return with_grads(loss, h.leaves)


def compacted(h: Head) -> Head:
    rows = torch.arange(len(h.rows), device=h.rows.device)
    return Head(h.hidden.detach()[h.rows].requires_grad_(), h.weight, h.labels[h.rows], rows)


def on_compacted(function: Callable[[Head], Outputs], **options: Any) -> Contender:
    def prepare(h: Head) -> Run:
        few = compacted(h)
        return lambda: function(few)

    def finish(h: Head, outputs: Outputs) -> Outputs:
        loss, grad, *rest = outputs
        return [loss, torch.zeros_like(h.hidden).index_copy(0, h.rows, grad), *rest]

    return Contender(prepare, finish, **options)


def exact(h: Head) -> Outputs:
    few = compacted(h)
    head = few._replace(
        hidden=few.hidden.detach().double().requires_grad_(),
        weight=h.weight.detach().double().requires_grad_(h.weight.requires_grad),
    )
    loss, grad, *rest = full_in_double(head)
    return [loss, grad.new_zeros(h.hidden.shape).index_copy(0, h.rows, grad), *rest]


def full_in_double(h: Head) -> Outputs:
    return with_grads(F.cross_entropy(F.linear(h.hidden, h.weight), h.labels, reduction="sum"), h.leaves)


def case(
    vocabulary: int,
    *,
    trained: bool,
    rows: int = LOSS_ROWS,
    width: int = WIDTH,
    dtype: torch.dtype = torch.bfloat16,
    compiles: bool = True,
    rounds: int = MIN_ROUNDS,
) -> Case:
    supervised = round(SUPERVISED * rows)

    def make_here(device: torch.device) -> Head:
        return make(rows, supervised, width, vocabulary, trained, dtype, device)

    weight = vocabulary * width
    moved = supervised * width + rows * width + weight * (2 if trained else 1)
    contenders = {
        "ours": simple(ours),
        "reference": simple(reference),
        "full logits": simple(full),
        "torch linear_cross_entropy": simple(torchs),
        "torch linear_cross_entropy, compacted rows": on_compacted(torchs),
        "Liger": simple(liger, gpu_only=True),
        "Liger, compacted rows": on_compacted(liger, gpu_only=True),
    }
    if compiles:
        contenders["full logits, torch.compile"] = simple(full_compiled)
    return Case(
        name=f"loss V={vocabulary} R={rows}, {supervised} supervised, {'trained' if trained else 'frozen'} head",
        make=make_here,
        contenders=contenders,
        exact=exact,
        plain=full,
        # the sum in float32 of so many losses, each from logits of the dtype: that eager's error is less may be luck
        floors=((torch.finfo(dtype).eps * supervised**-0.5 + torch.finfo(torch.float32).eps * supervised**0.5) / 2,),
        terms=vocabulary,
        bytes=moved * dtype.itemsize,
        flops=2 * supervised * weight * (3 if trained else 2),
        stage="loss",
        items=supervised,
        unit="supervised tokens",
        group=f"loss V={vocabulary}",
        dispatch=("linear_cross_entropy", "ours", ("reference",)),
        absent={} if compiles else {"full logits, torch.compile": TOO_SMALL},
        host=True,
        memory=True,
        rounds=rounds,
    )


def cases() -> list[Case]:
    return [case(vocabulary, trained=t) for vocabulary in (VOCABULARY, VOCABULARY_LLAMA3) for t in (True, False)]


def cpu_case(*, trained: bool) -> Case:
    return case(VOCABULARY, trained=trained, rows=192, width=CPU_WIDTH // 4, dtype=torch.float32, rounds=3)


def cpu_cases() -> list[Case]:
    return [cpu_case(trained=True)]


def full_cases() -> list[Case]:
    return [*cpu_cases(), cpu_case(trained=False)]


def small_cases() -> list[Case]:
    small = partial(case, 500, rows=200, width=64, dtype=torch.float32, compiles=False)
    return [small(trained=trained) for trained in (True, False)]


def test_loss(in_turns: InTurns, case: Case) -> None:
    in_turns(case)
