"""fused_projector: the two linear layers with a GELU between that carry image features into the LLM's space.

    y = gelu(x W1ᵀ + b1) W2ᵀ + b2,     gelu(u) = u Φ(u), the exact (erf) form

LLaVA-1.5's `mlp2x_gelu` (arXiv 2310.03744), unchanged in AlignGPT (arXiv 2405.14129).
"""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import Impl, check_floats, check_shape, use_triton


def fused_projector_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The formula above in plain PyTorch; arguments as `fused_projector`."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def fused_projector(
    x: Tensor,  # (..., in_dim)
    w1: Tensor,  # (hidden, in_dim), nn.Linear layout
    b1: Tensor,  # (hidden,)
    w2: Tensor,  # (D, hidden)
    b2: Tensor,  # (D,)
    *,
    impl: Impl = "auto",
) -> Tensor:  # (..., D)
    """Project image features: `gelu(x W1ᵀ + b1) W2ᵀ + b2`.

    One floating dtype throughout, which is also the result's. Zero rows are fine: the weights then get zero gradients.
    Raises ValueError for dtypes that differ, shapes that do not chain, or a DTensor; KernelUnavailable for
    `impl="triton"` where Triton cannot run.
    """
    check_floats("fused_projector", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    check_shape("w1", w1, ("hidden", x.shape[-1]))
    check_shape("b1", b1, (w1.shape[0],))
    check_shape("w2", w2, ("D", w1.shape[0]))
    check_shape("b2", b2, (w2.shape[0],))
    use_triton("fused_projector", impl, x.device)
    return fused_projector_reference(x, w1, b1, w2, b2)
