"""linear_cross_entropy: the formula in float64, torch's own reductions, and rows without labels."""

import pytest
import torch
import torch.nn.functional as F
from aligngpt_kernels import linear_cross_entropy
from torch import Tensor


def inputs(rows: int, supervised: int, ignore_index: int = -100, vocabulary: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[labels == ignore_index] = (ignore_index + 1) % vocabulary
    labels[torch.randperm(rows)[supervised:]] = ignore_index
    return hidden, weight, labels


def by_formula(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, smoothing: float) -> Tensor:
    log_p = (hidden @ weight.T).log_softmax(-1)
    chosen = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels == ignore_index, 0.0, -(1 - smoothing) * chosen - smoothing * log_p.mean(-1))


@pytest.mark.parametrize(("rows", "supervised"), [(8, 8), (13, 4), (1, 1), (5, 0), (0, 0)])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("with_rows", [False, True], ids=["all rows", "rows"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients(rows, supervised, reduction, with_rows, ignore_index, smoothing):
    hidden, weight, labels = inputs(rows, supervised, ignore_index)
    index = (labels != ignore_index).nonzero()[:, 0] if with_rows else None
    loss, each = linear_cross_entropy(
        hidden, weight, labels,
        rows=index, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing,
    )  # fmt: skip
    want_each = by_formula(hidden, weight, labels, ignore_index, smoothing)
    want = {"sum": want_each.sum(), "mean": want_each.sum() / max(supervised, 1), "none": want_each}[reduction]
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(each, want_each.detach(), rtol=1e-13, atol=1e-13)
    assert not each.requires_grad
    up = torch.randn_like(loss)
    got_grads = torch.autograd.grad(loss, (hidden, weight), up)
    want_grads = torch.autograd.grad(want, (hidden, weight), up)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


def test_fault_36_all_labels_ignored_is_a_zero_and_not_a_nan():
    hidden, weight, labels = inputs(5, 0)
    loss, _ = linear_cross_entropy(hidden, weight, labels, reduction="mean")
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_mean_is_torchs():
    hidden, weight, labels = inputs(13, 4)
    for smoothing in (0.0, 0.2):
        loss, _ = linear_cross_entropy(hidden, weight, labels, reduction="mean", label_smoothing=smoothing)
        torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels, label_smoothing=smoothing))


def test_bfloat16_takes_its_softmax_in_float32():
    """Within 2 × the error of bfloat16 logits, far below that of a bfloat16 softmax; non-contiguous weight."""
    hidden, weight, labels = inputs(64, 40, vocabulary=5000)
    low_hidden, low_weight = hidden.detach().bfloat16(), weight.detach().T.contiguous().T.bfloat16()
    loss, each = linear_cross_entropy(low_hidden, low_weight, labels)
    exact = by_formula(low_hidden.double(), low_weight.double(), labels, -100, 0.0)
    plain = F.cross_entropy((low_hidden @ low_weight.T).float(), labels, reduction="none")
    assert (loss.dtype, each.dtype) == (torch.float32, torch.float32)
    assert (each - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 4)}, r"hidden has shape \(1, 3, 4\); it needs \(R, D\)"),
        ({"labels": torch.zeros(2).long()}, r"labels has shape \(2,\); it needs \(3,\)"),
        ({"weight": torch.zeros(5, 4).half()}, "weight is torch.float16; linear_cross_entropy needs torch.float32"),
        ({"rows": torch.ones(3).bool()}, "rows is torch.bool; linear_cross_entropy needs int32 or int64"),
        ({"reduction": "avg"}, "reduction is 'avg'; linear_cross_entropy needs"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; linear_cross_entropy needs 0 to 1"),
    ],
)
def test_refusals(change, message):
    call = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**call, **change})
