"""What every op shares: the choice of an implementation, the refusal of wrong arguments, and staying in the graph.

An op is called with `impl="auto" | "triton" | "reference"`. `why_not_triton` looks at the call and returns None, or a
sentence saying why Triton cannot take it: "auto" then runs the PyTorch reference and logs the sentence once, "triton"
raises `KernelUnavailable` with it. No environment variable changes what "auto" picks.

"auto" also goes by measurement: `measured.json` holds, by GPU, the time of what an op replaces divided by the time of
its kernels. Below 1 the reference runs. An op that replaces calls of a tuned library (`MUST_BE_MEASURED`) waits for a
measurement; the others do less work than their reference by construction and run without one.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    from types import SimpleNamespace

    # Kernels below are then plain functions that nothing calls: `why_not_triton` says that the package is missing.
    def jit(kernel: Any = None, **_: Any) -> Any:
        return kernel or (lambda kernel: kernel)

    triton, tl = SimpleNamespace(jit=jit, __version__=None), SimpleNamespace(constexpr=int)

logger = logging.getLogger(__name__)

Impl = Literal["auto", "triton", "reference"]
INTERPRETED = triton.__version__ is not None and triton.knobs.runtime.interpret  # read by triton.jit at import too
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MUST_BE_MEASURED = frozenset({"fused_projector", "project_and_inject"})


class KernelUnavailable(RuntimeError):
    """A Triton kernel was asked for by name and cannot take this call; the message says why."""


class Chip(NamedTuple):
    """What the tile tables go by."""

    capability: int  # 80, 90, 100: ten times the CUDA compute capability
    multiprocessors: int
    shared_bytes: int  # that one block may use

    @property
    def has_tma(self) -> bool:
        """Whether blocks are copied through tensor descriptors: Hopper and data-center Blackwell.

        Other Blackwells (sm_120) have them too, but less than half the shared memory and no asynchronous products: they
        are laid out as Ampere is.
        """
        return 90 <= self.capability < 120


A100, H100, B200 = Chip(80, 108, 166_912), Chip(90, 132, 232_448), Chip(100, 148, 232_448)
_assumed: list[Chip] = []


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Chip(capability, properties.multi_processor_count, shared_bytes)


def chip(device: torch.device) -> Chip:
    """The chip that kernels for tensors on `device` are laid out for."""
    if _assumed:
        return _assumed[-1]
    if device.type != "cuda":
        return A100  # Triton's interpreter
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


@contextlib.contextmanager
def assume_chip(assumed: Chip) -> Iterator[None]:
    """Lay kernels out for this chip, wherever they run: for the interpreter's tests and ahead-of-time compilation."""
    _assumed.append(assumed)
    try:
        yield
    finally:
        _assumed.pop()


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Compiler options of a launch. FP fusion is set here because its default differs between versions of Triton."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def why_not_triton(op: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """None if Triton can run `op` on `device`, else the reason as a sentence."""
    if triton.__version__ is None:
        return "the package triton is not installed"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, and the kernels are laid out for NVIDIA's GPUs"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"its inputs are on {device}, and Triton kernels run on CUDA devices"
    if device.type == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET is set, and Triton's interpreter runs on the CPU"
    if device.type == "cuda" and chip(device).capability < 80:
        return f"{device} has compute capability {chip(device).capability / 10}, and the kernels need 8.0"
    if dtype is not None and dtype not in DTYPES:
        return f"its inputs are {dtype}, and the kernels take float16, bfloat16 and float32"
    if dtype == torch.bfloat16 and INTERPRETED and op in ("fused_projector", "project_and_inject", "flash_decode"):
        return "its inputs are torch.bfloat16, of which Triton's interpreter computes wrong products"
    return None


def why_not_auto(op: str, device: torch.device, bucket: str = "") -> str | None:
    """None if "auto" should take the kernels where they can run, else the reason as a sentence."""
    if device.type != "cuda":
        return f"its inputs are on {device}, where Triton's interpreter is for tests"
    ratio = measured_ratio(op, device, bucket)
    if ratio is None and op in MUST_BE_MEASURED:
        return f"its kernels are not measured on sm_{chip(device).capability} yet"
    return f"its kernels measured {ratio:.2f} × the speed of what they replace" if ratio and ratio < 1 else None


def measured_ratio(op: str, device: torch.device, bucket: str = "") -> float | None:
    """Speed of the op's kernels on this kind of GPU, divided by that of what they replace; None: not measured."""
    return _measured().get(f"sm_{chip(device).capability}", {}).get(f"{op} {bucket}".strip())


def measured_dtype(dtype: torch.dtype) -> str:
    """What a product was measured in, as part of a bucket: nothing for the 16-bit dtypes, which cost alike."""
    return "float32" if dtype == torch.float32 else ""


@functools.cache
def _measured() -> dict[str, dict[str, float]]:
    return json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))


@torch.compiler.assume_constant_result
def use_triton(
    op: str,
    impl: Impl,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    bucket: str = "",  # the part of `op`'s shapes that is measured on its own
    why_not: str | None = None,  # a reason of the op's own
) -> bool:
    """Whether this call goes to Triton. Raises KernelUnavailable if it was asked for and cannot run."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl is {impl!r}; {op} needs "auto", "triton" or "reference"')
    if impl == "reference":
        return False
    reason = why_not_triton(op, device, dtype) or why_not
    if reason is not None and impl == "triton":
        raise KernelUnavailable(f"{op} cannot run on Triton: {reason}")
    if impl == "auto":
        reason = reason or why_not_auto(op, device, bucket)
    if reason is not None:
        _say_once(op, reason)
    return reason is None


@functools.cache
def _say_once(op: str, reason: str) -> None:
    logger.info("%s runs its PyTorch reference: %s", op, reason)


def register(
    name: str, launch: Callable[..., Any], fake: Callable[..., Any], function: type[Any] | None = None
) -> Callable[..., Any]:
    """A call of `launch` that works in eager mode, under `torch.compile` and with fake tensors.

    Traced, it is the operator `aligngpt::name` of `torch.library`, with `fake` for its shapes. In eager mode it is
    `launch` itself, or `function.apply` where a gradient is needed: the operator costs some 20 µs more a call.

    Args:
        launch: allocates its outputs and launches the kernels. Its annotations are the operator's schema: tensors,
            lists of them, numbers and bools; it returns new tensors only.
        function: an `autograd.Function` with `setup_context` and `backward`, for which `launch` is the forward.
    """
    launch = _on_its_device(launch)
    if function is not None:
        function.forward = staticmethod(launch)
    definition = torch.library.custom_op(f"aligngpt::{name}", launch, mutates_args=())
    definition.register_fake(fake)
    if function is not None:
        definition.register_autograd(function.backward, setup_context=function.setup_context)
    operator = getattr(torch.ops.aligngpt, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or any(_is_traced(a) for a in args):
            return operator(*args)
        if function is not None and torch.is_grad_enabled() and any(_needs_grad(a) for a in args):
            return function.apply(*args)
        return launch(*args)

    return call


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(launch)
    def guarded(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        if device.type != "cuda":
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return guarded


def _is_traced(argument: Any) -> bool:
    return isinstance(argument, Tensor) and type(argument) not in (Tensor, torch.nn.Parameter)


def _needs_grad(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device, without waiting for what runs there.

    From the host it goes by way of pinned memory, which is kept until it was read. Ordinary memory is not: where the
    system lets a GPU read it, what is freed meanwhile arrives as something else.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors` in the dtype that `F.linear` would give them where autocast is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def check_devices(op: str, **tensors: Tensor) -> None:
    """All on one device, that of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; {op} needs {first.device}, the device of {first_name}")


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
