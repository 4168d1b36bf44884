"""AlignGPT, or LLaVA, in a plain training loop: padded batches, a loop over samples, logits of every row.

It is what one writes with PyTorch and transformers by the public algorithm (public.py): the LLM with a padding mask,
its head on all rows, cross entropy in float32, torch's AdamW with its defaults. A model of ours lends its modules, so
that both loops have the same weights; no op of ours is used. With `align_mode` "none" no alignment row goes in.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from aligngpt.batch import Example
from aligngpt.config import AlignGPTConfig
from aligngpt.model import AlignGPTForConditionalGeneration
from aligngpt.text import IGNORE_INDEX
from benchmarks.public import MARK, Cut, concatenate, cut_labels, search


class PlainBatch(NamedTuple):
    """Samples as the public code is given them: texts padded on the right, with a MARK where an image goes. (B, L)"""

    ids: Tensor
    present: Tensor  # bool, False at padding
    labels: Tensor
    in_prompt: Tensor  # bool: the words that the gate averages
    levels: Tensor | None  # (S,) of the samples that have an image; None: the gate makes their alignment rows
    pixels: Tensor  # (S, 3, size, size)

    def to(self, device: torch.device) -> "PlainBatch":
        return self._replace(**{name: part.to(device) for name, part in self._asdict().items() if part is not None})


def plain_batch(examples: Sequence[Example], config: AlignGPTConfig) -> PlainBatch:
    """The same samples, without alignment tokens and with one mark for all rows of an image."""
    ids, labels, in_prompt = [], [], []
    for example in examples:
        text = example.text
        image = text.input_ids == config.image_token_id
        first = image & (image.cumsum(0) == 1)
        kept = (text.input_ids != config.align_token_id) & (~image | first)
        ids.append(text.input_ids.masked_fill(first, MARK)[kept])
        labels.append(text.labels[kept])
        in_prompt.append(text.gate_mask[kept])
    levels = [example.level for example in examples if example.level is not None and len(example.pixel_values)]
    return PlainBatch(
        pad_sequence(ids, batch_first=True),
        pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        pad_sequence(in_prompt, batch_first=True),
        torch.tensor(levels) if levels else None,
        torch.cat([example.pixel_values for example in examples]),
    )


def embed(model: AlignGPTForConditionalGeneration, batch: PlainBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The LLM's input (B, L, D), its mask and its labels (B, L)."""
    inner, config = model.model, model.config
    images: Iterable[Tensor] = ()
    if len(batch.pixels):
        with torch.no_grad():
            features = inner.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        images = inner.multi_modal_projector(features)
    cuts = search(batch.ids, batch.present)

    def heads(texts: Tensor, image_blocks: Tensor) -> Tensor:  # (S, longest, D), (S, P, D)
        if batch.levels is not None:
            return inner.align_table[batch.levels]
        averaged = averaged_words(batch, cuts)
        mean = (texts * averaged[..., None]).sum(1) / (averaged.sum(1, keepdim=True) + 1e-8)
        dots = (image_blocks @ mean[:, :, None])[:, :, 0]
        alpha = inner.align_gate(dots)
        return alpha @ inner.align_table[:-1] + inner.align_table[-1]

    has_head = config.align_mode != "none"
    rows = concatenate(cuts, model.get_input_embeddings(), images, heads if has_head else None)
    labels = cut_labels(
        batch.labels,
        batch.present,
        cuts,
        image_rows=config.image_seq_length,
        has_head=has_head,
        ignored=IGNORE_INDEX,
    )
    lengths = torch.tensor([len(own) for own in labels], device=rows.device)
    mask = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    return rows, mask, pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)


def averaged_words(batch: PlainBatch, cuts: Sequence[Cut]) -> Tensor:
    """(S, longest) bool, of the samples that have an image: which words of the text without its mark the gate takes."""
    found = []
    for row, present, cut in zip(batch.in_prompt, batch.present, cuts, strict=True):
        if cut.after is not None:
            own, at = row[present], len(cut.before)
            found.append(torch.cat([own[:at], own[at + 1 :]]))
    return pad_sequence(found, batch_first=True)


def compile_llm(model: AlignGPTForConditionalGeneration) -> None:
    """Have torch.compile make the LLM of a plain loop; what is around it goes by Python's own lists."""
    model.model.language_model.compile()


def step(
    model: AlignGPTForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PlainBatch],
    *,
    supervised_tokens: int,
    clip_norm: float,
    autocast: bool,
) -> Tensor:
    """An optimizer step; its loss and the norm of its gradient. (2,)"""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = torch.zeros((), device=trained[0].device)
    for batch in batches:
        with torch.autocast(total.device.type, torch.bfloat16, enabled=autocast):
            embeddings, mask, labels = embed(model, batch)
            states = model.model.language_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
            logits = model.lm_head(states.last_hidden_state)
        logits, labels = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(logits, labels, reduction="sum") / supervised_tokens
        loss.backward()
        total += loss.detach()
    norm = clip_grad_norm_(trained, clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack([total, norm])
