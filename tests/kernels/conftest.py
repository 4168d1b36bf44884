"""What the op tests share: a small vocabulary of batches, the comparison with float64, and proof that no call waits.

Without a GPU `impl="triton"` runs in Triton's interpreter, on CPU tensors; with one, compiled.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from aligngpt_kernels.dispatch import A100, H100, Impl, assume_chip
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

IMAGE, ALIGN, PAD, BOS, VOCABULARY = 40, 41, 0, 1, 40  # the two placeholder ids lie outside the embedding table


TRITON_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
"""bfloat16 only where there is a GPU: the interpreter's `tl.dot` returns garbage for it."""

DRAWS = 8  # in which PyTorch's error is measured where once is too few


aten = torch.ops.aten


class _NoSync(TorchDispatchMode):
    """Operators whose result, or its size, the host reads back from a GPU; on a CPU they are called all the same."""

    FORBIDDEN = (
        aten._local_scalar_dense,
        aten.equal,
        aten.allclose,
        aten.nonzero,
        aten.masked_select,
        aten.bincount,
        aten._unique,
        aten._unique2,
        aten.unique_dim,
        aten.unique_consecutive,
        aten.unique_dim_consecutive,
    )
    INDEXING = (aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_)
    BEYOND_DISPATCH = ("tolist", "cpu", "numpy", "__array__")  # methods that call no operator on a CPU tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        waits = packet in self.FORBIDDEN
        if packet in self.INDEXING:
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if func is aten.repeat_interleave.Tensor:
            waits = kwargs.get("output_size") is None
        assert not waits, f"{func} waits for the device"
        return func(*args, **kwargs)

    @staticmethod
    def refusal(method: str) -> Callable[..., None]:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError(f"{method} waits for the device")

        return refuse


@pytest.fixture
def no_sync() -> Callable[[], AbstractContextManager[None]]:
    """Nothing inside may wait for the device. On a GPU its runtime watches too."""

    @contextmanager
    def forbid() -> Iterator[None]:
        on_gpu = torch.cuda.is_available()
        before = torch.cuda.get_sync_debug_mode() if on_gpu else 0
        with pytest.MonkeyPatch.context() as patch, _NoSync():
            for method in _NoSync.BEYOND_DISPATCH:
                patch.setattr(Tensor, method, _NoSync.refusal(method))
            try:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("error")
                yield
            finally:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode(before)

    return forbid


class _Launches(TorchDispatchMode):
    FILLS = (aten.zeros, aten.zeros_like, aten.new_zeros, aten.zero_, aten.full, aten.new_full, aten.fill_)

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.FILLS:
            self.launched.append("fill")
        return func(*args, **(kwargs or {}))


class _Counted:
    def __init__(self, name: str, kernel: Any, launched: list[str]) -> None:
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def count_launches() -> Callable[..., AbstractContextManager[list[str]]]:
    """`with count_launches(*modules) as launched`: what these modules launch of their kernels, and fills by torch."""

    @contextmanager
    def count(*modules: ModuleType) -> Iterator[list[str]]:
        with pytest.MonkeyPatch.context() as patch, _Launches() as mode:
            for module in modules:
                for name in [name for name in vars(module) if name.endswith("_kernel")]:
                    patch.setattr(module, name, _Counted(name, getattr(module, name), mode.launched))
            yield mode.launched

    return count


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


@pytest.fixture(
    params=[None] if torch.cuda.is_available() else [A100, H100],
    ids=lambda chip: f"sm_{chip.capability}" if chip else "this GPU",
)
def laid_out(request: pytest.FixtureRequest) -> Iterator[None]:
    """The layouts of this machine: its own on a GPU, by pointers and by tensor descriptors in the interpreter."""
    if request.param is None:
        yield
    else:
        with assume_chip(request.param):
            yield


@pytest.fixture
def allowed_error() -> Callable[[Tensor, Tensor], Tensor]:
    """Twice the error of plain torch, and half a unit in the last place of the largest number."""

    def allowed(plain: Tensor, exact: Tensor) -> Tensor:
        return 2 * (plain.double() - exact).abs().max() + torch.finfo(plain.dtype).eps / 2 * exact.abs().max()

    return allowed


@pytest.fixture
def as_exact_as_torch(device: str, allowed_error: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    """Runs an op by Triton, its reference in the same dtype, and its reference in float64, forward and backward.

    The Triton error of every output and of every gradient may be `allowed_error`. The largest error among a few numbers
    depends on chance, PyTorch's too, so a result beyond that is compared with the worst of DRAWS: the same numbers in
    another order within each input, hence of the same sizes, whose sums round anew. Among thousands of numbers that
    changes next to nothing. Memory that is not written reads as NaN.
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

    def shuffled(tensor: Tensor, draw: int) -> Tensor:
        order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(draw), device="cpu")
        elements = tensor.detach().flatten()[order.to(tensor.device)]
        return elements.view(tensor.shape).requires_grad_(tensor.requires_grad)

    def worst_allowed(op: Callable[..., Any], rounded: list[Tensor], dtype: torch.dtype, index: int) -> Tensor:
        drawn = []
        for draw in range(DRAWS):
            inputs = [shuffled(tensor, draw) for tensor in rounded]
            plain, exact = (run(op, inputs, kind, "reference")[index] for kind in (dtype, torch.float64))
            drawn.append(allowed_error(plain, exact))
        return torch.stack(drawn).max()

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
                error = (g.double() - e).abs().max()
                near = error <= allowed_error(p, e) or error <= worst_allowed(op, rounded, dtype, index)
                assert near, f"result {index} is off by {error}; PyTorch's by {(p.double() - e).abs().max()}"
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
