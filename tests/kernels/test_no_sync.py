"""`no_sync` itself: what waits for a device is refused, on a CPU too, and what does not is let through."""

import pytest
import torch

WAITS = {  # of a tensor 0, 1, 2 and of where it is even
    "item": lambda x, mask: x[0].item(),
    "bool": lambda x, mask: bool(x[0]),
    "int": lambda x, mask: int(x[0]),
    "float": lambda x, mask: float(x[0]),
    "index": lambda x, mask: range(3)[x[0]],
    "format": lambda x, mask: f"{x[0]}",
    "in": lambda x, mask: 1 in x,
    "if any": lambda x, mask: 1 if mask.any() else 0,
    "tolist": lambda x, mask: x.tolist(),
    "cpu": lambda x, mask: x.cpu(),
    "numpy": lambda x, mask: x.numpy(force=True),
    "equal": lambda x, mask: torch.equal(x, x),
    "allclose": lambda x, mask: torch.allclose(x, x),
    "nonzero": lambda x, mask: x.nonzero(),
    "where alone": lambda x, mask: torch.where(mask),
    "x[mask]": lambda x, mask: x[mask],
    "x[:, mask]": lambda x, mask: x[None][:, mask],
    "x[mask] = 0": lambda x, mask: x.__setitem__(mask, 0),
    "x[mask] = tensor": lambda x, mask: x.__setitem__(mask, x[:2] + 1),
    "index_put": lambda x, mask: x.index_put((mask,), x[:2]),
    "masked_select": lambda x, mask: x.masked_select(mask),
    "unique": lambda x, mask: x.unique(),
    "unique with counts": lambda x, mask: torch.unique(x, return_counts=True),
    "unique rows": lambda x, mask: torch.unique(x[:, None], dim=0),
    "unique_consecutive": lambda x, mask: x.unique_consecutive(),
    "bincount": lambda x, mask: x.bincount(),
    "repeat_interleave": lambda x, mask: x.repeat_interleave(x),
}
GOES_ON = {
    "x[int]": lambda x, mask: x[x],
    "x[int] = tensor": lambda x, mask: x.__setitem__(x.flip(0), x + 1),
    "fill_": lambda x, mask: x[:1].fill_(0),
    "where": lambda x, mask: torch.where(mask, x, 0),
    "masked_fill": lambda x, mask: x.masked_fill(mask, 0),
    "repeat_interleave": lambda x, mask: x.repeat_interleave(x, output_size=3),
    "repeat_interleave by a number": lambda x, mask: x.repeat_interleave(2),
    "sort": lambda x, mask: x.sort(stable=True),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_refused(name, no_sync):
    x = torch.arange(3)
    mask = x % 2 == 0
    WAITS[name](x.clone(), mask)
    with pytest.raises(AssertionError, match="waits for the device"), no_sync():
        WAITS[name](x, mask)
    WAITS[name](x, mask)


@pytest.mark.parametrize("name", GOES_ON)
def test_what_does_not_wait_is_let_through(name, no_sync):
    x = torch.arange(3)
    mask = x % 2 == 0
    with no_sync():
        GOES_ON[name](x, mask)
    assert x.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the GPU's runtime says it")
def test_a_copy_to_the_gpu_is_refused_and_the_mode_is_put_back(no_sync):
    before = torch.cuda.get_sync_debug_mode()
    with pytest.raises(RuntimeError, match="synchroniz"), no_sync():
        torch.tensor([1, 2, 3], device="cuda")
    assert torch.cuda.get_sync_debug_mode() == before
