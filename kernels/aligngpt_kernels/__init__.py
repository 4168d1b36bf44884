"""AlignGPT's fused ops, usable without the model: `kernels/README.md` shows them on a page.

Each op has a `*_reference` in plain PyTorch, which is its meaning and its CPU path. Needs torch, and triton where there
is a GPU. `python -m aligngpt_kernels` says what would run here.
"""

from .cross_entropy import LinearCrossEntropy, linear_cross_entropy, linear_cross_entropy_reference
from .decode import flash_decode, flash_decode_reference
from .dispatch import KernelUnavailable
from .embedding import text_mean, text_mean_reference
from .gate import align_gate, align_gate_reference
from .injection import inject, inject_reference
from .plan import InjectionPlan, injection_plan
from .project_inject import project_and_inject, project_and_inject_reference
from .projector import fused_projector, fused_projector_reference

__all__ = [
    "InjectionPlan",
    "KernelUnavailable",
    "LinearCrossEntropy",
    "align_gate",
    "align_gate_reference",
    "flash_decode",
    "flash_decode_reference",
    "fused_projector",
    "fused_projector_reference",
    "inject",
    "inject_reference",
    "injection_plan",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "project_and_inject",
    "project_and_inject_reference",
    "text_mean",
    "text_mean_reference",
]
