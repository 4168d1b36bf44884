"""fused_projector against eager PyTorch, torch.compile, and cuBLASLt's GEMM with a GELU epilogue.

The epilogue (`torch._addmm_activation`, NVIDIA's apex) has the tanh form of GELU and no backward; it is compared with
the erf form like the others, and passes because the forms differ by less than bfloat16 rounds. "ours, both products" is
what `SECOND_BY_CUBLAS_FROM` of the projector's module decides about.

On a CPU the projector is 1024 → 1024 → 1024, in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from aligngpt_kernels import fused_projector, fused_projector_reference, projector
from torch import Tensor

from benchmarks.case import TOO_SMALL, Case, Contender, InTurns, compiled, our_impl, simple, with_grads
from benchmarks.measure import Outputs
from benchmarks.shapes import CPU_WIDTH, FEATURES, WIDTH, WIDTH_13B
from benchmarks.work import projector_backward_flops, projector_flops

SMALL_ROWS = 1152  # up to here the projector's dispatch and requirement differ


class Projector(NamedTuple):
    x: Tensor  # (rows, features)
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    upstream: Tensor  # gradient of the result


def make(
    rows: int, features: int, width: int, dtype: torch.dtype, device: torch.device, trained: bool = False
) -> Projector:
    """Weights as nn.Linear draws them; the features are frozen, as in both stages."""

    def uniform(*shape: int, bound: float) -> Tensor:
        weight = torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound)
        return weight.requires_grad_(trained)

    first, second = features**-0.5, width**-0.5
    return Projector(
        torch.randn(rows, features, device=device, dtype=dtype),
        uniform(width, features, bound=first),
        uniform(width, bound=first),
        uniform(width, width, bound=second),
        uniform(width, bound=second),
        torch.randn(rows, width, device=device, dtype=dtype),
    )


def ours(p: Projector) -> Tensor:
    return fused_projector(*p[:5], impl=our_impl(p.x))


def ours_both(p: Projector) -> Tensor:
    """The second product by our kernel too."""
    with mock.patch.object(projector, "SECOND_BY_CUBLAS_FROM", len(p.x) + 1):
        return ours(p)


def eager(p: Projector) -> Tensor:
    return fused_projector_reference(*p[:5])


def by_compiler(p: Projector) -> Tensor:
    return compiled(fused_projector_reference)(*p[:5])


def cublaslt(p: Projector) -> Outputs:
    hidden = torch._addmm_activation(p.b1, p.x, p.w1.T, use_gelu=True)
    return [torch.addmm(p.b2, hidden, p.w2.T)]


def apex(p: Projector) -> Outputs:
    from apex.fused_dense import FusedDenseGeluDenseFunc

    return [FusedDenseGeluDenseFunc.apply(p.x, p.w1, p.b1, p.w2, p.b2)]


def case(
    rows: int,
    *,
    backward: bool = False,
    features: int = FEATURES,
    width: int = WIDTH,
    dtype: torch.dtype = torch.bfloat16,
    compiles: bool = True,
) -> Case:
    def outputs(function: Callable[[Projector], Tensor], p: Projector) -> Outputs:
        return with_grads(function(p), p[1:5], p.upstream) if backward else [function(p)]

    def exact(p: Projector) -> Outputs:
        return outputs(eager, Projector(*(t.detach().double().requires_grad_(t.requires_grad) for t in p)))

    contenders: dict[str, Contender] = {
        "ours": simple(lambda p: outputs(ours, p)),
        "eager": simple(lambda p: outputs(eager, p)),
    }
    if compiles:
        contenders["torch.compile"] = simple(lambda p: outputs(by_compiler, p))
    if rows <= SMALL_ROWS:
        contenders["ours, both products"] = simple(lambda p: outputs(ours_both, p))
    if not backward:
        contenders["cuBLASLt epilogue (tanh)"] = simple(cublaslt, gpu_only=True)
        contenders["apex (tanh)"] = simple(apex, gpu_only=True)
    weights, products = features * width + width**2 + 2 * width, projector_flops(rows, features, width)
    moved = rows * (features + width) + weights
    if backward:  # read the upstream gradient, input and weights again, write the weights' gradients
        moved += rows * (features + width) + width**2 + weights
        products += projector_backward_flops(rows, features, width)
    size = "" if width == WIDTH else f" width={width}"
    return Case(
        name=f"projector {'forward + backward' if backward else 'forward'} M={rows}{size}",
        make=lambda device: make(rows, features, width, dtype, device, backward),
        contenders=contenders,
        exact=exact,
        plain=lambda p: outputs(eager, p),
        bytes=moved * dtype.itemsize,
        flops=products,
        terms=rows if backward else width,
        stage="projector",
        items=rows,
        unit="image rows",
        group=f"projector {'forward + backward' if backward else 'forward'}{size}",
        absent={} if compiles else {"torch.compile": TOO_SMALL},
        host=True,
        memory=True,
        dispatch=("fused_projector M<=1152" if rows <= SMALL_ROWS else "fused_projector M>1152", "ours", ("eager",)),
    )


def cases() -> list[Case]:
    forward = [case(rows) for rows in (1, 16, 64, 576, 1152, 2304, 4608, 9216)]
    return [*forward, case(9216, width=WIDTH_13B), *(case(rows, backward=True) for rows in (1152, 9216))]


def cpu_cases() -> list[Case]:
    here = partial(case, width=CPU_WIDTH, dtype=torch.float32)
    return [*map(here, (64, 576, 2304)), here(2304, backward=True)]


def small_cases() -> list[Case]:
    small = partial(case, 64, features=64, width=128, dtype=torch.float32, compiles=False)
    return [small(backward=backward) for backward in (False, True)]


def test_projector(in_turns: InTurns, case: Case) -> None:
    in_turns(case)
