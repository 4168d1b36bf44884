"""What every op shares: the choice of an implementation, the refusal of wrong arguments, and staying in the graph.

An op is called with `impl="auto" | "triton" | "reference"`. `why_not_triton` looks at the call and returns None, or a
sentence saying why Triton cannot take it: "auto" then runs the PyTorch reference and logs the sentence once, "triton"
raises `KernelUnavailable` with it. No environment variable changes the choice.
"""

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Impl = Literal["auto", "triton", "reference"]
TRITON_OPS: frozenset[str] = frozenset()  # names of the ops that have a Triton kernel


class KernelUnavailable(RuntimeError):
    """A Triton kernel was asked for by name and cannot take this call; the message says why."""


def why_not_triton(op: str, device: torch.device) -> str | None:
    """None if Triton can run `op` on `device`, else the reason as a sentence."""
    if op not in TRITON_OPS:
        return "this version has no Triton kernel for it"
    if device.type != "cuda":
        return f"its inputs are on {device}, and Triton kernels run on CUDA devices"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def use_triton(op: str, impl: Impl, device: torch.device) -> bool:
    """Whether this call goes to Triton. Raises KernelUnavailable if it was asked for and cannot run."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl is {impl!r}; {op} needs "auto", "triton" or "reference"')
    if impl == "reference":
        return False
    reason = why_not_triton(op, device)
    if reason is None:
        return True
    if impl == "triton":
        raise KernelUnavailable(f"{op} cannot run on Triton: {reason}")
    _say_once(op, reason)
    return False


@functools.cache
def _say_once(op: str, reason: str) -> None:
    logger.info("%s runs its PyTorch reference: %s", op, reason)


def check_floats(op: str, **tensors: Tensor) -> None:
    """One floating dtype and no DTensor among the arguments; the first one is what the others must equal."""
    check_plain(op, **tensors)
    first_name, first = next(iter(tensors.items()))
    if not first.is_floating_point():
        raise ValueError(f"{first_name} is {first.dtype}; {op} needs a floating dtype")
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; {op} needs {first.dtype}, the dtype of {first_name}")


def check_ints(op: str, **tensors: Tensor) -> None:
    """Integer tensors, no DTensor among them."""
    check_plain(op, **tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {tensor.dtype}; {op} needs int32 or int64")


def check_plain(op: str, **tensors: Tensor) -> None:
    """No DTensor: ops read whole weights, which FSDP2 gathers inside the root's forward."""
    for name, tensor in tensors.items():
        if type(tensor) in (Tensor, torch.nn.Parameter):
            continue
        from torch.distributed.tensor import DTensor  # slow to import, so only for a tensor that may be one

        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is a DTensor placed {tensor.placements}; {op} needs a plain tensor "
                f"(call it inside the FSDP root's forward, or pass {name}.full_tensor())"
            )


def check_shape(name: str, tensor: Tensor, dims: Sequence[int | str]) -> None:
    """Match the shape against `dims`: an int is that size, a str names a free size."""
    fits = tensor.dim() == len(dims) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, dims, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, dims)) + ("," if len(dims) == 1 else "")
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs ({wanted})")


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype sums run in: float32, or float64 for float64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def keep_in_graph(out: Tensor, *unused: Tensor) -> Tensor:
    """`out`, whose backward also gives each of `unused` a gradient of zeros instead of none.

    Under FSDP2 every rank must produce a gradient for every trained weight. Adding `0 * weight` would do so too, but
    turns an infinite weight into NaN and costs a pass.
    """
    return _KeepInGraph.apply(out, *unused)


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *unused: Tensor) -> Tensor:
        ctx.unused = [(t.shape, t.dtype, t.device) for t in unused]
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(ctx.unused, ctx.needs_input_grad[1:], strict=True)
        )
        return grads[0], *zeros
