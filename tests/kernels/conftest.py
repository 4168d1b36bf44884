"""What the op tests share: a small vocabulary of batches, the comparison with float64, and proof that no call waits.

Without a GPU `impl="triton"` runs in Triton's interpreter, on CPU tensors; with one, compiled.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from aligngpt_kernels.dispatch import Impl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

IMAGE, ALIGN, PAD, BOS, VOCABULARY = 40, 41, 0, 1, 40  # the two placeholder ids lie outside the embedding table


TRITON_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
"""bfloat16 only where there is a GPU: the interpreter's `tl.dot` returns garbage for it."""


class _NoSync(TorchDispatchMode):
    FORBIDDEN = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_sync() -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def forbid() -> Iterator[None]:
        with _NoSync():
            yield

    return forbid


@pytest.fixture
def sequence() -> Callable[..., Tensor]:
    """sequence(3, "i", 2): BOS, align if an image follows, 3 text ids, one image's placeholders, 2 text ids."""

    def make(*parts: int | str, rows: int, align: bool = True) -> Tensor:
        ids = [BOS, *([ALIGN] if align and "i" in parts else [])]
        for part in parts:
            ids += [IMAGE] * rows if isinstance(part, str) else torch.randint(2, VOCABULARY, (part,)).tolist()
        return torch.tensor(ids)

    return make


@pytest.fixture(params=TRITON_DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def as_exact_as_torch(device: str) -> Callable[..., list[Tensor]]:
    """Runs an op by Triton, its reference in the same dtype, and its reference in float64, forward and backward.

    The Triton error of every output and of every gradient may be twice that of the reference, and never has to be less
    than half a unit in the last place of the largest number. Memory that is not written reads as NaN.
    """

    def run(op: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype, impl: Impl) -> list[Tensor]:
        leaves = [t.detach().to(device, dtype).requires_grad_(t.requires_grad) for t in inputs]
        outputs = op(*leaves, impl=impl)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        with_grad = [out for out in outputs if out.requires_grad]
        torch.manual_seed(1)
        upstream = [torch.randn(out.shape, dtype=torch.float64).to(out) for out in with_grad]
        grads = torch.autograd.grad(with_grad, trained, upstream) if with_grad else ()
        return [*(out.detach() for out in outputs), *grads]

    def compare(op: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        rounded = [t.detach().to(dtype).double().requires_grad_(t.requires_grad) for t in inputs]
        exact = run(op, rounded, torch.float64, "reference")
        plain = run(op, rounded, dtype, "reference")
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills `empty` with NaN
        try:
            got = run(op, rounded, dtype, "triton")
        finally:
            torch.use_deterministic_algorithms(False)
        for index, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
            assert (g.shape, g.dtype) == (p.shape, p.dtype), index
            if g.numel():
                allowed = 2 * (p.double() - e).abs().max() + torch.finfo(g.dtype).eps / 2 * e.abs().max()
                assert (g.double() - e).abs().max() <= allowed, f"result {index}"
        return got

    return compare


@pytest.fixture(autouse=True)
def _seed_and_device(device: str) -> Iterator[None]:
    """Tensors that name no device are made on the GPU where there is one."""
    torch.manual_seed(0)
    with torch.device(device):
        yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # its limit on recompilations counts over all tests
