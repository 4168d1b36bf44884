"""What the op tests share: a small vocabulary of batches, and proof that a call never waits for a device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

IMAGE, ALIGN, PAD, BOS, VOCABULARY = 40, 41, 0, 1, 40  # the two placeholder ids lie outside the embedding table


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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
