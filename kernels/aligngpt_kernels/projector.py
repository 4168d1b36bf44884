"""fused_projector: the two linear layers with a GELU between that carry image features into the LLM's space.

    y = gelu(x W1ᵀ + b1) W2ᵀ + b2,     gelu(u) = u Φ(u), the exact (erf) form

LLaVA-1.5's `mlp2x_gelu` (arXiv 2310.03744), unchanged in AlignGPT (arXiv 2405.14129).

With u = x W1ᵀ + b1 and a = gelu(u), the kernels of `gemm` compute

    a, u         in one product: bias and GELU are its epilogue, on the float32 sum
    y            in one product, by cuBLAS unless `SECOND_BY_CUBLAS_FROM` says otherwise
    du, a, Σdu   in one product, dy W2, whose epilogue multiplies by gelu'(u), makes a again from u, and adds up du
    dW2, Σdy     in one kernel, dyᵀ a
    dW1, dx      in one kernel, duᵀ x, and by cuBLAS, du W1, each only if needed

and nothing is saved for the backward but u, or nothing at all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .dispatch import Impl, as_autocast, check_devices, check_floats, check_shape, measured_dtype, register, use_triton
from .gemm import gemm, weight_grad

# Rows; fewer go to `gemm`, whose split of K fills the chip. It was slower on an H200 up to 1152 rows: all to cuBLAS.
SECOND_BY_CUBLAS_FROM = 0


def fused_projector_reference(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, recompute: bool = False
) -> Tensor:
    """The formula above in plain PyTorch; arguments as `fused_projector`."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(_two_layers, x, w1, b1, w2, b2, use_reentrant=False, preserve_rng_state=False)
    return _two_layers(x, w1, b1, w2, b2)


def _two_layers(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def first_layer(x: Tensor, w1: Tensor, b1: Tensor, keep: bool) -> list[Tensor]:  # (M, in_dim)
    """gelu(x W1ᵀ + b1), and with `keep` the sum before the GELU, each (M, hidden)."""
    return gemm(x, w1, "gelu, keep" if keep else "gelu", bias=b1)


def _launch_projector(
    x: Tensor,  # (M, in_dim)
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # (M, D); (M, hidden) before the GELU with `keep`, else empty
    act, *pre = first_layer(x, w1, b1, keep)
    by_cublas = x.shape[0] >= SECOND_BY_CUBLAS_FROM
    out = F.linear(act, w2, b2) if by_cublas else gemm(act, w2, "bias", bias=b2)[0]
    return out, pre[0] if keep else x.new_empty(0)


def projector_grads(
    grad: Tensor,  # (M, D)
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    pre: Tensor,  # empty: computed again
    needs: list[bool],  # gradient of x, w1, b1, w2, b2
    needs_act: bool,
) -> tuple[list[Tensor], Tensor]:
    """The gradients that are needed, in that order, and with `needs_act` the (M, hidden) after the GELU."""
    for_x, for_w1, for_b1, for_w2, for_b2 = needs
    before_gelu = for_x or for_w1 or for_b1
    grads: dict[str, Tensor] = {}
    act = pre
    if (before_gelu or for_w2 or needs_act) and pre.numel() == 0:
        (pre,) = gemm(x, w1, "bias", bias=b1)
    if before_gelu:
        grad_pre, act, sums = gemm(grad, w2, "dgelu", pre=pre)
        if for_x:
            grads["x"] = grad_pre @ w1
        if for_w1:
            grads["w1"], _ = weight_grad(grad_pre, x, with_bias=False)
        if for_b1:
            grads["b1"] = sums.sum(0).to(b1.dtype)
    elif for_w2 or needs_act:
        act = F.gelu(pre)
    if for_w2:
        grads["w2"], grads["b2"] = weight_grad(grad, act, with_bias=for_b2)
    elif for_b2:
        grads["b2"] = grad.sum(0)
    return [grads[name] for name, need in zip(("x", "w1", "b1", "w2", "b2"), needs, strict=True) if need], act


def _launch_projector_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, pre: Tensor, needs: list[bool]
) -> list[Tensor]:
    return projector_grads(grad, x, w1, b1, w2, pre, needs, needs_act=False)[0]


def _fake_projector(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    pre = x.new_empty(x.shape[0], w1.shape[0]) if keep else x.new_empty(0)
    return x.new_empty(x.shape[0], w2.shape[0]), pre


def _fake_projector_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, pre: Tensor, needs: list[bool]
) -> list[Tensor]:
    shapes = x.shape, w1.shape, b1.shape, w2.shape, w2.shape[:1]
    return [x.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


class _TritonProjector(torch.autograd.Function):
    """Saves its arguments and what the launcher kept."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w1, b1, w2, _, _ = inputs
        ctx.save_for_backward(x, w1, b1, w2, output[1])
        ctx.set_materialize_grads(False)  # nobody sees the second output, whose gradient would be zeros of its size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:5])
        needed = iter(_projector_backward(grads[0], *ctx.saved_tensors, needs))
        return *(next(needed) if need else None for need in needs), None


_projector_backward = register("projector_backward", _launch_projector_backward, _fake_projector_backward)
_projector = register("projector", _launch_projector, _fake_projector, _TritonProjector)


def fused_projector(
    x: Tensor,  # (..., in_dim)
    w1: Tensor,  # (hidden, in_dim), nn.Linear layout
    b1: Tensor,  # (hidden,)
    w2: Tensor,  # (D, hidden)
    b2: Tensor,  # (D,)
    *,
    recompute: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # (..., D)
    """Project image features: `gelu(x W1ᵀ + b1) W2ᵀ + b2`.

    One floating dtype throughout, which is also the result's; under autocast that of `F.linear`. Zero rows are fine:
    the weights then get zero gradients. For the backward the sum before the GELU is saved beside the arguments,
    `hidden` numbers a row; with `recompute` nothing is, and the backward multiplies by W1 once more. For AlignGPT-7B at
    16 images that is 75 MB less, and 1/14 more operations in forward and backward together.

    Raises ValueError for dtypes or devices that differ, shapes that do not chain, or a DTensor; KernelUnavailable for
    `impl="triton"` where Triton cannot run.
    """
    x, w1, b1, w2, b2 = as_autocast(x, w1, b1, w2, b2)
    check_floats("fused_projector", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    check_shape("w1", w1, ("hidden", x.shape[-1]))
    check_shape("b1", b1, (w1.shape[0],))
    check_shape("w2", w2, ("D", w1.shape[0]))
    check_shape("b2", b2, (w2.shape[0],))
    check_devices("fused_projector", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    rows = x.shape[:-1]
    bucket = f"M{'<=' if rows.numel() <= 1152 else '>'}1152 {measured_dtype(x.dtype)}".strip()
    if use_triton("fused_projector", impl, x.device, x.dtype, bucket=bucket):
        arguments = x.reshape(rows.numel(), x.shape[-1]), w1, b1, w2, b2
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in arguments)
        out, _ = _projector(*arguments, trained and not recompute)
        return out.view(*rows, w2.shape[0])
    return fused_projector_reference(x, w1, b1, w2, b2, recompute=recompute)
