"""AlignGPT in a plain training loop: padded batches, a loop over samples, logits of every row. No op of ours is used.

It is what one writes with PyTorch and transformers by the public algorithm (SPEC, paragraph 3): embed a sample's text,
cut it where the image goes, concatenate text, alignment row and image rows, pad all samples with zeros to the longest;
the LLM with a padding mask, its head on all rows, cross entropy in float32, torch's AdamW with its defaults. A model of
ours lends its modules, so that both loops have the same weights.
"""

from collections.abc import Iterator, Sequence
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

MARK = -200  # the public code's image token


class Text(NamedTuple):
    """A sample's text with a MARK where its image goes; the others are as long."""

    ids: Tensor
    labels: Tensor
    in_prompt: Tensor  # bool, False at the mark: the words that the gate averages
    level: int | None


class PlainBatch(NamedTuple):
    texts: list[Text]
    pixels: Tensor

    def to(self, device: torch.device) -> "PlainBatch":
        texts = [
            text._replace(ids=text.ids.to(device), labels=text.labels.to(device), in_prompt=text.in_prompt.to(device))
            for text in self.texts
        ]
        return PlainBatch(texts, self.pixels.to(device))


def plain_batch(examples: Sequence[Example], config: AlignGPTConfig) -> PlainBatch:
    """The same samples as the public code is given them."""
    texts = []
    for example in examples:
        ids, labels, gate_mask = example.text.input_ids, example.text.labels, example.text.gate_mask
        image = ids == config.image_token_id
        first = image & (image.cumsum(0) == 1)
        kept = (ids != config.align_token_id) & (~image | first)
        texts.append(Text(ids.masked_fill(first, MARK)[kept], labels[kept], gate_mask[kept], example.level))
    return PlainBatch(texts, torch.cat([example.pixel_values for example in examples]))


def embed(model: AlignGPTForConditionalGeneration, batch: PlainBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The LLM's input (B, L, D), its mask and its labels (B, L)."""
    inner, embedding = model.model, model.get_input_embeddings()
    images: Iterator[Tensor] = iter(())
    if len(batch.pixels):
        with torch.no_grad():
            features = inner.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        images = iter(inner.multi_modal_projector(features))
    rows, labels = [], []
    for text in batch.texts:
        places = torch.where(text.ids == MARK)[0].tolist()
        if not places:
            rows.append(embedding(text.ids))
            labels.append(text.labels)
            continue
        (at,) = places
        before, after = embedding(torch.cat([text.ids[:at], text.ids[at + 1 :]])).split([at, len(text.ids) - at - 1])
        image = next(images)
        if text.level is None:
            words = torch.cat([before, after])[torch.cat([text.in_prompt[:at], text.in_prompt[at + 1 :]])]
            mean = words.sum(0) / (len(words) + 1e-8)
            gate = inner.align_gate
            alpha = gate.linear_2(F.gelu(gate.linear_1(image @ mean))).softmax(-1)
            head = alpha @ inner.align_table[:-1] + inner.align_table[-1]
        else:
            head = inner.align_table[text.level]
        rows.append(torch.cat([before[:1], head[None], before[1:], image, after]))
        unsupervised = text.labels.new_full((len(image) + 1,), IGNORE_INDEX)
        labels.append(
            torch.cat([text.labels[:1], unsupervised[:1], text.labels[1:at], unsupervised[1:], text.labels[at + 1 :]])
        )
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return padded, mask, pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)


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
