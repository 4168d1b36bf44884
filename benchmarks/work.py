"""What a stage has to do: items, bytes and FLOPs, by which all files of benchmarks count.

FLOPs are 2 per weight and row forward, 2 backward for the gradient of the rows where it is wanted and 2 for that of a
trained weight; none for attention scores, recomputation and looking up rows. The tower counts whole, as it runs. That
is as training/flops.py counts, one stage at a time, but that MFU is by 6 per trained weight: here the projector's first
layer, which passes no gradient on to the frozen tower, has 4. So their sum without gate and optimizer, which are left
out there, is `count_flops` less 2 per weight of that layer and row. On a GPU the loss makes its gradients in its
forward pass, which is where their FLOPs and bytes then are.

Of a training step `of_training` counts from model and batches.

Bytes are the least that a stage can do with: its weights once for each micro-batch, its inputs and its outputs, in the
type that they are computed in. Activations that are kept between forward and backward are not in it, so the share of
the bandwidth that follows for LLM and backward is a lower bound; those two are limited by arithmetic.

    vision tower    images      weights, pixels -> features
    projector       image rows  weights, features -> image rows
    gate            samples     words that are averaged and image rows -> an alignment row each; by level: rows alone
    injection       tokens      rows -> rows
    LLM forward     tokens      weights, embeddings -> hidden states
    loss            supervised tokens   weight of the head, hidden states
    backward        tokens      weights, gradient of hidden states -> fp32 gradients of trained weights
    optimizer       weights     fp32 weight, gradient and two moments -> weight and moments
    checkpoint      bytes       what is saved, to host memory
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from aligngpt.batch import Batch
from aligngpt.model import AlignGPTForConditionalGeneration
from benchmarks import shapes
from benchmarks.stages import StageWork

ADAMW_BYTES = 28  # a weight: it, its gradient and two moments are read, all but the gradient written, in fp32
ADAMW_FLOPS = 14  # a weight: 3 and 4 for the moments, 1 for the decay, 6 for the update
FP32_BYTES = 4


def of_training(
    model: AlignGPTForConditionalGeneration,
    batches: Sequence[Batch],  # of one step
    *,
    compute_bytes: int,  # of a number
    fused_loss: bool,  # whether the loss makes its gradients in its forward pass
    saved_bytes: int | None = None,  # by a checkpoint; None: the step saves none
) -> dict[str, StageWork]:
    """The work of each stage, in the order of the step."""
    inner, config, head = model.model, model.config, model.lm_head.weight
    each, passes = compute_bytes, len(batches)
    images = sum(len(batch.pixel_values) for batch in batches)
    samples = sum(int((batch.plan.align_place >= 0).sum()) for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    supervised = sum(batch.num_supervised for batch in batches)
    words = sum(int(batch.gate_mask.sum()) for batch in batches)
    features, width = config.vision_config.hidden_size, config.text_config.hidden_size
    patches, levels = config.image_seq_length, config.num_align_levels
    rows = images * patches
    tower_rows = images * (patches + (config.vision_feature_select_strategy == "default"))

    tower = per_row(inner.vision_tower, nn.Linear) * tower_rows + per_row(inner.vision_tower, nn.Conv2d) * rows
    llm = per_row(inner.language_model, nn.Linear)
    llm_bytes = each * llm * passes
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trained_head = head.numel() if head.requires_grad else 0

    loss_flops = 2 * supervised * head.numel()
    loss_bytes = passes * each * head.numel() + each * supervised * width
    head_gradients = supervised * (2 * head.numel() + 2 * trained_head)  # of rows and of the weight, FLOPs
    head_gradient_bytes = each * supervised * width + FP32_BYTES * trained_head
    backward_flops = tokens * (2 * llm + 2 * per_row(inner.language_model, nn.Linear, trained=True))
    if inner.multi_modal_projector.linear_1.weight.requires_grad:
        backward_flops += projector_backward_flops(rows, features, width)
    backward_bytes = llm_bytes + each * tokens * width + FP32_BYTES * trained
    if fused_loss:
        loss_flops, loss_bytes = loss_flops + head_gradients, loss_bytes + head_gradient_bytes
        backward_bytes -= FP32_BYTES * trained_head
    else:
        backward_flops += head_gradients

    if samples == 0:
        mean_and_mix, gate_bytes = 0, 0
    elif batches[0].align_levels is None:
        gate = sum(parameter.numel() for parameter in inner.align_gate.parameters())
        mean_and_mix = text_mean_flops(words, width) + align_gate_flops(rows, samples, width, gate, levels)
        gate_bytes = each * (width * (words + rows + levels + samples) + gate * passes)
    else:
        mean_and_mix, gate_bytes = 0, each * 2 * samples * width

    pixels = sum(batch.pixel_values.nbytes for batch in batches)
    work = {
        "vision tower": StageWork(
            images, "images", each * (elements(inner.vision_tower) * passes + features * rows) + pixels, 2 * tower
        ),
        "projector": StageWork(
            rows,
            "image rows",
            each * (elements(inner.multi_modal_projector) * passes + (features + width) * rows),
            projector_flops(rows, features, width),
        ),
        "gate": StageWork(samples, "samples", gate_bytes, mean_and_mix),
        "injection": StageWork(tokens, "tokens", each * 2 * tokens * width, 0),
        "LLM forward": StageWork(tokens, "tokens", llm_bytes + each * 2 * tokens * width, 2 * tokens * llm),
        "loss": StageWork(supervised, "supervised tokens", loss_bytes, loss_flops),
        "backward": StageWork(tokens, "tokens", backward_bytes, backward_flops),
        "optimizer": StageWork(trained, "weights", ADAMW_BYTES * trained, ADAMW_FLOPS * trained),
    }
    if saved_bytes is not None:
        work["checkpoint"] = StageWork(saved_bytes, "bytes", 2 * saved_bytes, 0)
    return work


def tower_flops(images: int, patches: int, *, patch: int, width: int, mlp: int, layers: int) -> int:
    """Of a CLIP tower's forward pass, with a row for CLS."""
    of_layers, of_patches = layers * (4 * width**2 + 2 * width * mlp), 3 * patch**2 * width
    return 2 * images * ((patches + 1) * of_layers + patches * of_patches)


def projector_flops(rows: int, features: int, width: int) -> int:
    return 2 * rows * width * (features + width)


def projector_backward_flops(rows: int, features: int, width: int) -> int:
    """Trained, of frozen features: gradients of both weights and of what is between them."""
    return 2 * rows * width * (features + 2 * width)


def text_mean_flops(words: int, width: int) -> int:
    """Forward; backward, where each word's row gets its share, as many."""
    return words * width


def gate_weights(rows: int) -> int:
    """Of the gate that each image's rows go through."""
    return shapes.GATE_HIDDEN * (rows + 1) + (shapes.LEVELS - 1) * (shapes.GATE_HIDDEN + 1)


def align_gate_flops(rows: int, samples: int, width: int, weights: int, levels: int) -> int:
    """Forward: dots of the image rows, the gate's weights, the mix of so many levels."""
    return 2 * rows * width + 2 * samples * (weights + levels * width)


def align_gate_backward_flops(rows: int, samples: int, width: int, weights: int, levels: int) -> int:
    """Gradients of image rows, text means and the gate's weights; the table is frozen."""
    return 4 * rows * width + 2 * samples * (2 * weights + levels * width)


def elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def per_row(module: nn.Module, kind: type[nn.Module], *, trained: bool = False) -> int:
    """Weights that every row is multiplied by; trained: those alone that take a gradient."""
    weights: list[Any] = [part.weight for part in module.modules() if isinstance(part, kind)]
    return sum(weight.numel() for weight in weights if weight.requires_grad or not trained)
