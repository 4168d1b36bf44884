"""FLOPs of a training step, as MFU counts them.

6 per trained weight and row it is applied to, 4 per frozen weight that passes gradient, 2 per frozen weight that passes
none (the tower); none for recomputation, for attention scores or for looking up rows. Only work that is done counts:
the projector sees image rows, the head the supervised tokens alone. Gate and table work once a sample and are left out.
"""

from typing import Any, NamedTuple

from torch import nn

from aligngpt.model import AlignGPTForConditionalGeneration


class Flops(NamedTuple):
    """FLOPs of forward and backward, in the sense of this file's first lines."""

    token: float  # by the LLM without its head; image rows are tokens too
    supervised_token: float  # by the head
    image: float  # by tower and projector

    def of(self, *, tokens: float, supervised_tokens: float, images: float) -> float:
        return tokens * self.token + supervised_tokens * self.supervised_token + images * self.image


def count_flops(model: AlignGPTForConditionalGeneration) -> Flops:
    """Of a model with its parts frozen and wrapped as they train; on meta, sharded or whole."""
    inner, head, config = model.model, model.lm_head.weight, model.config

    def per_row(module: nn.Module, kind: type[nn.Module], frozen: int) -> float:
        weights: list[Any] = [layer.weight for layer in module.modules() if isinstance(layer, kind)]
        return sum((6 if weight.requires_grad else frozen) * weight.numel() for weight in weights)

    # All that trains beside the LLM stands before it, so its frozen weights pass gradient; before the projector nothing
    # trains. The tower's products are of patches, and of CLS where there is one.
    patches = config.image_seq_length
    rows = patches + (config.vision_feature_select_strategy == "default")
    return Flops(
        token=per_row(inner.language_model, nn.Linear, 4),
        supervised_token=(6 if head.requires_grad else 4) * head.numel(),
        image=rows * per_row(inner.vision_tower, nn.Linear, 2)
        + patches * (per_row(inner.vision_tower, nn.Conv2d, 2) + per_row(inner.multi_modal_projector, nn.Linear, 2)),
    )
