"""AlignGPT: LLaVA with one token that tells the LLM how well image and text are aligned (arXiv 2405.14129).

    image ─ vision tower (frozen) ─ projector ─ image rows I ──┬─────────────────────────────┐
    text ── embeddings T ── mean over gate_mask: t̄ ── dots ⟨I_j, t̄⟩ ── gate: α ── H          │
                                    [BOS, H, …text…, image rows, …text…] ── LLM ── loss / logits

`H` is a row of the alignment table when `align_levels` is given (stage 1, or a fixed level at inference); otherwise the
gate mixes it as `config.align_mode` says (stage 2 and inference). A batch says which: the model has no stage.

The sequence is built by the fused ops of `aligngpt_kernels`, which read raw weights. Where a weight cannot be read raw
(quantised, on meta, sharded on its own, wrapped by an adapter), the module is called instead, and that is logged once.
Quantised on loading are the LLM's layers alone, unless the quantisation's config names others.

A batch is padded, (B, L) with an attention mask, or packed: one row of T tokens, in which `cu_seqlens` says where each
sequence begins; that needs the attention `aligngpt_varlen` or `aligngpt_decode` in the LLM. Positions in (B·L) and (T,)
are counted alike.
"""

import copy
import functools
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from aligngpt_kernels import (
    InjectionPlan,
    align_gate,
    fused_projector,
    inject,
    injection_plan,
    linear_cross_entropy,
    text_mean,
)
from aligngpt_kernels.dispatch import keep_in_graph
from aligngpt_kernels.gate import mix_levels, sample_dots
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    LlavaModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaMultiModalProjector
from transformers.utils import can_return_tuple

from . import attention, decoding
from .batch import positions
from .checkpoint import check_names, check_shapes, read_config, refuse_code, set_align_sizes, stored_weights
from .config import AlignGPTConfig, is_public, known_fields
from .stages import stage

logger = logging.getLogger(__name__)

# What a quantisation leaves alone by default: little beside an LLM, and the answer hangs on it.
_NOT_QUANTISED = ("model.vision_tower", "model.multi_modal_projector", "model.align_gate", "lm_head")


@dataclass
class AlignGPTOutput(LlavaCausalLMOutputWithPast):
    """LLaVA's output and two fp32 tensors of ours.

    `align_weights` (S, N-1): the weights of the local levels in each sample's H. `token_loss` (R,), detached: the
    negative log-likelihood at each of the supervised `rows`, or at all rows where none were named, 0 without a label.
    """

    align_weights: Tensor | None = None
    token_loss: Tensor | None = None


class AlignGate(nn.Module):
    """Weights of α = softmax(W2·gelu(W1·dots + b1) + b2), W1 (hidden, P), W2 (N-1, hidden); `align_gate` uses them."""

    def __init__(self, config: AlignGPTConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.image_seq_length, config.gate_hidden_size)
        self.linear_2 = nn.Linear(config.gate_hidden_size, config.num_align_levels - 1)

    def forward(self, dots: Tensor) -> Tensor:
        """α (S, N-1) fp32 of dots (S, P) by the modules, for when their weights cannot be read."""
        return self.linear_2(F.gelu(self.linear_1(dots))).float().softmax(-1)


class _AlignInit:
    """`_init_weights` of the two model classes: gate and projector as torch's Linear, the table xavier-uniform."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Of custom code transformers takes a module without parameters of its own, such as the gate, for initialized.
        super()._initialize_weights(module, False)  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, AlignGate | LlavaMultiModalProjector):
            for linear in (module.linear_1, module.linear_2):
                bound = 1 / math.sqrt(linear.in_features)
                init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
                if linear.bias is not None:
                    init.uniform_(linear.bias, -bound, bound)
        elif isinstance(module, AlignGPTModel) and hasattr(module, "align_table"):
            init.xavier_uniform_(module.align_table)


class AlignGPTModel(_AlignInit, LlavaModel):
    """Vision tower, projector, alignment table and gate, and the LLM without its head."""

    config: AlignGPTConfig

    def __init__(self, config: AlignGPTConfig):
        config.check()
        super().__init__(config)
        self.align_table = nn.Parameter(torch.empty(config.num_align_levels, config.text_config.hidden_size))
        self.align_gate = AlignGate(config)
        self.vision_tower.requires_grad_(False)
        self._is_hf_initialized = False  # LlavaModel ended with a post_init of its own, before the table was there
        self.post_init()

    def train(self, mode: bool = True) -> "AlignGPTModel":
        super().train(mode)
        self.vision_tower.eval()
        return self

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The LLM's layers, whatever it calls them."""
        return next(module for module in self.language_model.modules() if isinstance(module, nn.ModuleList))

    @torch.no_grad()
    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Patch features (M, P, C) of images (M, 3, height, width): the tower's chosen hidden states, CLS dropped."""
        config = self.config
        if self.training:
            trained = next((name for name, p in self.vision_tower.named_parameters() if p.requires_grad), None)
            if trained is not None:
                raise ValueError(
                    f"vision_tower.{trained} is to be trained; the tower is frozen and gives no gradient: freeze it, "
                    'or leave it out of an adapter (peft: exclude_modules=r".*vision_tower.*")'
                )
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        tower_dtype = next(self.vision_tower.parameters()).dtype
        if pixel_values.shape[0] == 0:
            width = config.vision_config.hidden_size * len(layers)
            return pixel_values.new_zeros(0, config.image_seq_length, width, dtype=tower_dtype)
        states = self.vision_tower(pixel_values.to(tower_dtype), output_hidden_states=True).hidden_states
        features = torch.cat([states[layer] for layer in layers], dim=-1)
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        if features.shape[1] != config.image_seq_length:
            raise ValueError(
                f"pixel_values of {tuple(pixel_values.shape[-2:])} give {features.shape[1]} rows per image; "
                f"the gate was built for {config.image_seq_length}"
            )
        return features

    def project(self, features: Tensor) -> Tensor:
        """Image rows (M, P, D) of patch features (M, P, C)."""
        projector = self.multi_modal_projector
        first, second = projector.linear_1, projector.linear_2
        if self.config.projector_hidden_act == "gelu" and first.bias is not None and _raw(first) and _raw(second):
            return fused_projector(
                features.to(first.weight.dtype), first.weight, first.bias, second.weight, second.bias
            )
        return projector(features.to(self.align_table.dtype))

    def embed(
        self,
        input_ids: Tensor,  # (B, L)
        pixel_values: Tensor | None = None,  # (M, 3, height, width)
        *,
        attention_mask: Tensor | None = None,  # (B, L)
        align_levels: Tensor | None = None,  # (S,)
        gate_mask: Tensor | None = None,  # (B, L) bool
        plan: InjectionPlan | None = None,
        cu_seqlens: Tensor | None = None,  # (sequences + 1,), on the device of the ids
    ) -> tuple[Tensor, Tensor | None]:
        """The LLM's input (B, L, D) and the gate's weights (S, N-1), None where no gate ran.

        `plan` is the collator's; without one it is made here. Several images of a sample stand in `pixel_values` in
        the order of their placeholders.
        """
        config = self.config
        if pixel_values is None:
            size = config.vision_config.image_size
            pixel_values = self.align_table.new_zeros(0, 3, size, size, device=input_ids.device)
        if plan is None:
            plan = self._plan(input_ids, pixel_values.shape[0], align_levels, cu_seqlens)
        with stage("vision tower"):
            features = self.image_features(pixel_values)
        with stage("projector"):
            image_rows = self.project(features).to(input_ids.device, self.align_table.dtype)

        # Under autocast only tower and projector take part: what follows sums in fp32 by itself.
        with _weights_here(self), torch.autocast(input_ids.device.type, enabled=False):
            ids, table, scale = self._word_rows(input_ids, plan)
            weights = None
            with stage("gate"):
                if config.align_mode == "none":
                    align_rows = table.new_zeros(plan.align_place.shape[0], table.shape[1])
                elif align_levels is not None:
                    align_rows = self._level_rows(align_levels, plan)
                else:
                    gate_mask = _gate_mask(gate_mask, attention_mask, cu_seqlens, plan, input_ids)
                    mean = text_mean(ids, table, gate_mask, plan, embed_scale=scale)
                    align_rows, weights = self._gated_rows(image_rows, mean, plan)
            with stage("injection"):
                image_rows, align_rows = image_rows.to(table.dtype), align_rows.to(table.dtype)
                return inject(ids, table, image_rows, align_rows, plan=plan, embed_scale=scale), weights

    @torch.no_grad()
    def alignment(
        self,
        input_ids: Tensor,  # (B, L)
        pixel_values: Tensor,  # (M, 3, height, width)
        *,
        attention_mask: Tensor | None = None,
        gate_mask: Tensor | None = None,
        plan: InjectionPlan | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the gate looks at and what it says, fp32: the dots (M, P) and its weights (S, N-1), without the LLM.

        dots[m, p] = ⟨image row p of image m, text mean of the image's sample⟩. Arguments as `embed`'s.
        """
        if self.config.align_mode == "none":
            raise ValueError("align_mode is 'none'; only a model with an alignment token compares words with pictures")
        if plan is None:
            plan = self._plan(input_ids, pixel_values.shape[0], None, cu_seqlens)
        image_rows = self.project(self.image_features(pixel_values)).to(input_ids.device, self.align_table.dtype)
        with _weights_here(self), torch.autocast(input_ids.device.type, enabled=False):
            ids, table, scale = self._word_rows(input_ids, plan)
            gate_mask = _gate_mask(gate_mask, attention_mask, cu_seqlens, plan, input_ids)
            mean = text_mean(ids, table, gate_mask, plan, embed_scale=scale)
            images = torch.arange(image_rows.shape[0], device=image_rows.device)
            dots = sample_dots(image_rows, mean[plan.image_sample(self.config.image_seq_length)], images)
            _, weights = self._gated_rows(image_rows, mean, plan)
        return dots, weights

    def _word_rows(self, input_ids: Tensor, plan: InjectionPlan) -> tuple[Tensor, Tensor, float]:
        """Ids, the table whose rows they choose, and what rows are multiplied by, as the ops take them."""
        embedding = self.get_input_embeddings()
        if _raw(embedding):
            table = embedding.weight
            return input_ids, table, _rounded(float(getattr(embedding, "scalar_embed_scale", 1.0)), table.dtype)
        # The module embeds every token; row t of what it returns is then "the table's" row of token t.
        text_ids = torch.where(plan.source.view(input_ids.shape) == -1, input_ids, 0)
        ids = torch.arange(input_ids.numel(), device=input_ids.device).view(input_ids.shape)
        return ids, embedding(text_ids).flatten(0, 1).to(input_ids.device), 1.0

    def _level_rows(self, align_levels: Tensor, plan: InjectionPlan) -> Tensor:
        """Stage 1's look-up: the table's row of each sample's level. (S, D)"""
        num_samples, num_levels = plan.align_place.shape[0], self.align_table.shape[0]
        if align_levels.shape != (num_samples,) or align_levels.is_floating_point():
            raise ValueError(
                f"align_levels is {align_levels.dtype} of shape {tuple(align_levels.shape)}; "
                f"{num_samples} samples have an image, and each needs a whole number"
            )
        if align_levels.device.type == "cpu" and bool(((align_levels < 0) | (align_levels >= num_levels)).any()):
            raise ValueError(f"align_levels is {align_levels.tolist()}; levels are 0 to {num_levels - 1}")
        rows = F.embedding(align_levels, self.align_table.to(align_levels.device))
        # A rank whose batch is text alone goes by the gate; a gate that trains must then get a gradient here too.
        return keep_in_graph(rows, *self.align_gate.parameters()) if self.training else rows

    def _gated_rows(self, image_rows: Tensor, mean: Tensor, plan: InjectionPlan) -> tuple[Tensor, Tensor]:
        """Stage 2's H (S, D) and the weights of the local levels (S, N-1)."""
        gate, mode = self.align_gate, self.config.align_mode
        assert mode != "none"
        image_sample = plan.image_sample(self.config.image_seq_length)
        if _raw(gate.linear_1) and _raw(gate.linear_2):
            gate_weights = gate.linear_1.weight, gate.linear_1.bias, gate.linear_2.weight, gate.linear_2.bias
            return align_gate(image_rows, mean, *gate_weights, self.align_table, image_sample=image_sample, mode=mode)
        weights = gate(sample_dots(image_rows, mean, image_sample)).to(mean.device)
        return mix_levels(weights, self.align_table.to(mean.device), mode)

    def _plan(
        self, input_ids: Tensor, num_images: int, align_levels: Tensor | None, cu_seqlens: Tensor | None
    ) -> InjectionPlan:
        """Where the ids are on the host they are counted and checked; elsewhere shapes alone size the plan: no sync.

        Without levels S is then only bounded, by the number of images and of sequences; samples that do not exist own
        no token.
        """
        config = self.config
        num_image_rows = num_images * config.image_seq_length
        on_host = input_ids.device.type == "cpu"
        num_sequences = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        bound = min(num_images, num_sequences) if align_levels is None else align_levels.shape[0]
        plan = injection_plan(
            input_ids if cu_seqlens is None else input_ids.flatten(),
            image_token_id=config.image_token_id,
            align_token_id=config.align_token_id,
            cu_seqlens=cu_seqlens,
            num_image_rows=None if on_host else num_image_rows,
            num_samples=None if on_host else bound,
        )
        if on_host:
            self._check_counts(input_ids, plan, num_images)
        return plan

    def _check_counts(self, input_ids: Tensor, plan: InjectionPlan, num_images: int) -> None:
        config, vocab_size = self.config, self.config.text_config.vocab_size
        if plan.image_place.shape[0] != num_images * config.image_seq_length:
            raise ValueError(
                f"input_ids has {plan.image_place.shape[0]} image tokens; pixel_values holds {num_images} images "
                f"of {config.image_seq_length} rows"
            )
        wanted = 0 if config.align_mode == "none" else plan.align_place.shape[0]
        found = int((input_ids == config.align_token_id).sum())
        if found != wanted or (wanted and not plan.exact) or (wanted and bool((plan.align_place < 0).any())):
            raise ValueError(
                f"input_ids has {found} <align> tokens; with align_mode {config.align_mode!r} it needs {wanted}, "
                "one in each sample that has an image"
            )
        text_ids = input_ids.flatten()[plan.source == -1]
        wrong = text_ids[(text_ids < 0) | (text_ids >= vocab_size)]
        if len(wrong):
            raise ValueError(f"input_ids holds token {int(wrong[0])}; the LLM's vocabulary is 0 to {vocab_size - 1}")

    def _check_packed(
        self,
        tokens: Tensor,  # ids (1, T) or embeddings (1, T, D)
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        seq_lengths: Sequence[int] | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
    ) -> None:
        """Refuse what packed sequences do not go with. Lengths are checked where they are on the host."""
        for name, value in (("attention_mask", attention_mask), ("past_key_values", past_key_values)):
            if value is not None:
                raise ValueError(f"{name} is given beside cu_seqlens; packed sequences need none, leave it out")
        used = self.language_model.config._attn_implementation
        if used not in (attention.NAME, decoding.NAME):
            raise ValueError(
                f"cu_seqlens is given, and the LLM's attention is {used!r}; it needs {attention.NAME!r} or "
                f"{decoding.NAME!r}: call model.model.language_model.set_attn_implementation({attention.NAME!r}) once"
            )
        if max_seqlen is None:
            raise ValueError("max_seqlen is missing beside cu_seqlens; it needs the longest sequence's length")
        if tokens.shape[0] != 1:
            raise ValueError(f"{tokens.shape[0]} rows are given beside cu_seqlens; packed sequences need to lie in one")
        if seq_lengths is None and cu_seqlens.device.type == "cpu":
            seq_lengths = cu_seqlens.diff().tolist()
        if seq_lengths is not None and (
            sum(seq_lengths) != tokens.shape[1] or min(seq_lengths) < 1 or max(seq_lengths) > max_seqlen
        ):
            raise ValueError(
                f"cu_seqlens holds sequences of {list(seq_lengths)} tokens; they need to be {tokens.shape[1]} "
                f"together, none empty and none longer than max_seqlen {max_seqlen}"
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        align_levels: Tensor | None = None,
        gate_mask: Tensor | None = None,
        plan: InjectionPlan | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        seq_lengths: Sequence[int] | None = None,
        attention_backend: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The LLM's last hidden states (B, L, D), and `align_weights`. Arguments as in the class with the head."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        if cu_seqlens is not None:
            self._check_packed(tokens, cu_seqlens, max_seqlen, seq_lengths, attention_mask, past_key_values)
            cu_seqlens = cu_seqlens.to(device=tokens.device, dtype=torch.int32)
            if position_ids is None:
                position_ids = _places(cu_seqlens, tokens)
        if pixel_values is not None and pixel_values.shape[0] and past_key_values is not None:
            past = int(past_key_values.get_seq_length())
            if past > 0:
                raise ValueError(
                    f"past_key_values holds {past} tokens in front of an image; the alignment token depends on the "
                    "whole prompt: start anew, and use no prefix tuning"
                )
        weights = None
        if inputs_embeds is None:
            assert input_ids is not None
            if pixel_values is None and not self.training:  # text alone, as in every step of decoding
                if input_ids.device.type == "cpu":
                    for name in ("image", "align"):
                        if bool((input_ids == getattr(self.config, f"{name}_token_id")).any()):
                            raise ValueError(f"input_ids has {name} tokens; pixel_values is missing")
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:  # in training also without an image: projector, gate and table stay in every rank's graph
                inputs_embeds, weights = self.embed(
                    input_ids,
                    pixel_values,
                    attention_mask=attention_mask,
                    align_levels=align_levels,
                    gate_mask=gate_mask,
                    plan=plan,
                    cu_seqlens=cu_seqlens,
                )
        with stage("LLM forward"):
            if cu_seqlens is not None:
                assert max_seqlen is not None
                kwargs["use_cache"] = False  # there is nothing that could go on from several sequences
                kwargs |= attention.layer_inputs(
                    cu_seqlens,
                    max_seqlen,
                    inputs_embeds.shape[1],
                    device=inputs_embeds.device,
                    dtype=_compute_dtype(inputs_embeds),
                    head_size=_head_size(self.config.text_config),
                    seq_lengths=seq_lengths,
                    backend=attention_backend,
                )
                if self.language_model.config._attn_implementation == decoding.NAME:
                    attention_mask = decoding.no_mask(inputs_embeds.device)
            outputs = self.language_model(
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        outputs["align_weights"] = weights
        return outputs


class AlignGPTForConditionalGeneration(_AlignInit, LlavaForConditionalGeneration):
    """AlignGPT with its language-model head. `from_parts` builds a new one, `from_pretrained` reads a folder."""

    config: AlignGPTConfig
    config_class = AlignGPTConfig

    def __init__(self, config: AlignGPTConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = AlignGPTModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        embedding = self.get_input_embeddings()
        (name,) = (name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    @classmethod
    def from_parts(
        cls, llm: PreTrainedModel | str | Path, vision: PreTrainedModel | str | Path, *, seed: int = 0, **align: Any
    ) -> "AlignGPTForConditionalGeneration":
        """A new AlignGPT from a causal LM and a CLIP or SigLIP model of transformers (or their folders).

        Modules are taken over, not copied, and take the LLM's floating type. Projector, gate and table start fresh
        from `seed`. `align` sets any field of `AlignGPTConfig`, such as `align_mode="none"` or `num_align_levels=4`.
        """
        if not isinstance(llm, PreTrainedModel):
            llm = AutoModelForCausalLM.from_pretrained(llm, trust_remote_code=False)
        if not isinstance(vision, PreTrainedModel):
            vision = AutoModel.from_pretrained(vision, trust_remote_code=False)
        vision = getattr(vision, "vision_model", vision) if hasattr(vision.config, "vision_config") else vision
        head = llm.get_output_embeddings()
        config = AlignGPTConfig.from_parts(llm.config, vision.config, lm_head_bias=head.bias is not None, **align)
        with torch.device("meta"):
            model = cls(config)
        model.model.language_model = llm.base_model
        model.model.vision_tower = vision.to(head.weight.dtype).requires_grad_(False)
        model.lm_head = head
        for name, tensor in fresh_align_weights(config, seed).items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(head.weight)))
        model.generation_config = saveable(llm.generation_config)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read one of our folders or a public AlignGPT folder; every weight must be there and no other.

        Args:
            vision_config: dimensions of a public folder's tower, where `mm_vision_tower` in its config is neither a
                local folder nor a known CLIP name.
        """
        folder = Path(pretrained_model_name_or_path)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _of_the_llm(kwargs["quantization_config"])
        if folder.is_dir():
            refuse_code(folder)
            raw = read_config(folder)
            if raw.get("model_type") != cls.config_class.model_type:
                raise ValueError(f"{folder} holds a model of type {raw.get('model_type')!r}; wanted an AlignGPT folder")
            if is_public(raw):
                return cls._from_public(folder, raw, vision_config, **kwargs)
        elif folder.is_absolute() or len(folder.parts) != 2:
            raise ValueError(f"{folder} is no folder")
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"{folder} holds a damaged file of weights: {error}") from error
        check_names(set(info["unexpected_keys"]), set(info["missing_keys"]), source=str(folder))
        model.model.vision_tower.requires_grad_(False)  # loading makes every parameter anew
        return (model, info) if wants_info else model

    @classmethod
    def _from_public(cls, folder: Path, raw: dict[str, Any], vision_config: Any, **kwargs: Any) -> Any:
        stored = stored_weights(folder)
        config = kwargs.pop("config", None) or AlignGPTConfig.from_dict(raw, vision_config=vision_config)
        for name in known_fields():
            if name in kwargs:
                setattr(config, name, kwargs.pop(name))
        set_align_sizes(config, stored)
        wanted, tied = wanted_weights(config)
        check_names(stored, wanted, source=str(folder), tied=tied)
        check_shapes(stored, wanted, source=str(folder))
        kwargs["dtype"] = kwargs.pop("torch_dtype", None) or kwargs.get("dtype") or config.dtype
        weights = {name: tensor.read() for name, tensor in stored.items()}
        loaded = super().from_pretrained(None, config=config, state_dict=weights, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.model.vision_tower.requires_grad_(False)
        return loaded

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        align_levels: Tensor | None = None,
        gate_mask: Tensor | None = None,
        plan: InjectionPlan | None = None,
        rows: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> AlignGPTOutput:
        """One pass over `[BOS, <align>, …text…, P × <image>, …]` ids.

        Args:
            input_ids: (B, L), with one `<align>` per sample that has an image and P `<image>` per image.
            pixel_values: (M, 3, height, width), the images in the order of their placeholders; may hold none.
            attention_mask: (B, L), 0 at padding, on either side.
            labels: (B, L), -100 where no loss is taken; shifted here.
            align_levels: (S,) levels 0..N-1, one per sample with an image. Given: H is the table's row, whatever the
                mode. Absent: the gate.
            gate_mask: (B, L) bool, the text the gate averages; None: all attended text but the first token.
            plan, rows: the collator's injection plan, and indices into (B·L) of the supervised rows.
            num_items_in_batch: divides the summed loss; None: the number of supervised tokens here.
            cu_seqlens: (sequences + 1,) int32, where each sequence begins in a packed batch, and its T tokens. B is
                then 1, `attention_mask` absent, `position_ids` begin anew in each sequence (made here if absent), and
                no sequence's first token has a loss.
            max_seqlen: at least the longest sequence's length, with `cu_seqlens`.
            seq_lengths: (among the others) their lengths as numbers, so that no back-end has to ask the device.
            attention_backend: (among the others) one of `attention.BACKENDS` by name; None: the first that can run.

        Returns:
            `loss` and `token_loss` if labels are given; `logits` (B, L or logits_to_keep, V), None when training with
            labels; `align_weights` (S, N-1) where the gate ran; without `plan` and levels, on a GPU, S is a bound and
            rows of samples that do not exist follow the others.

        Raises:
            ValueError: image tokens and images do not match (checked where the ids are on the host), the images' size
                is not the tower's, or what stands beside `cu_seqlens` does not go with it.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            align_levels=align_levels,
            gate_mask=gate_mask,
            plan=plan,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = token_loss = None
        if labels is not None:
            if cu_seqlens is not None:  # what stands before a sequence's first token is another sequence
                labels = labels.masked_fill(_places(cu_seqlens.to(labels.device), labels) == 0, -100)
            with stage("loss"):
                loss, token_loss = self._loss(hidden, labels, rows, num_items_in_batch)
        logits = None
        if loss is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept, :])
        return AlignGPTOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            align_weights=outputs.align_weights,
            token_loss=token_loss,
        )

    def _loss(
        self, hidden: Tensor, labels: Tensor, rows: Tensor | None, num_items: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        """Σ over supervised tokens of the negative log-likelihood, divided by their number; and each row's own."""
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1).to(hidden.device)
        rows = None if rows is None else rows.to(hidden.device)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if num_items is None:
            num_items = (labels != -100).sum().clamp(min=1)
        if _raw(self.lm_head) and self.lm_head.bias is None:
            weight = self.lm_head.weight
            total, each = linear_cross_entropy(hidden.to(weight.dtype), weight, labels, rows=rows)
            each = each if rows is None else each[rows]
        else:
            if rows is not None:
                hidden, labels = hidden[rows], labels[rows]
            each = F.cross_entropy(self.lm_head(hidden).float(), labels, reduction="none")
            total = each.sum()
        return total / num_items, each.detach()

    def _replicate_for_data_parallel(self) -> nn.Module:
        """What transformers' Trainer comes to when one process sees several GPUs."""
        raise ValueError(
            "DataParallel is asked for; it would part images from their prompts: start one process a GPU (torchrun)"
        )

    # ---------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with the prompt embedded once, before it starts.

        The alignment row depends on the whole prompt, so the prompt is embedded whole (text, image rows, H) and only
        then expanded over beams. What logits processors see, and what is returned, has `<align>` and `<image>`
        replaced by padding. Right-padded prompts are moved to the right edge first, so that every answer follows its
        prompt at once.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        generation_config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size", getattr(generation_config, "prefill_chunk_size", None)):
            raise ValueError(
                "prefill_chunk_size is set; the alignment token depends on the whole prompt, prefill it whole"
            )
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            raise ValueError(
                "past_key_values holds an earlier turn; the alignment token depends on the whole prompt, start anew"
            )
        if "prompt_embeds" not in inspect.signature(self.prepare_inputs_for_generation).parameters:
            raise ValueError(
                "prepare_inputs_for_generation was replaced, as peft's prompt and prefix tuning do; they put tokens in "
                "front of the alignment token, which stands first: use LoRA or another adapter of layers"
            )
        if input_ids is None:
            return super().generate(**kwargs)
        attention_mask = kwargs.pop("attention_mask", None)
        gate_mask = kwargs.pop("gate_mask", None)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids, attention_mask, gate_mask = _left_padded(input_ids, attention_mask, gate_mask)
        prompt_embeds, _ = self.model.embed(
            input_ids,
            kwargs.pop("pixel_values", None),
            attention_mask=attention_mask,
            align_levels=kwargs.pop("align_levels", None),
            gate_mask=gate_mask,
        )
        kwargs.pop("plan", None)  # a collator's, of rows that may have been rotated since
        return super().generate(
            input_ids=self._visible_ids(input_ids, kwargs.get("pad_token_id"), generation_config),
            attention_mask=attention_mask,
            prompt_embeds=prompt_embeds,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, prompt_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        ids = inputs.get("input_ids")
        if prompt_embeds is None or ids is None:
            return inputs
        start, prompt_length = input_ids.shape[1] - ids.shape[1], prompt_embeds.shape[1]
        if start < prompt_length:  # prefill, or a step without a cache: the prompt's part is already embedded
            answer = self.get_input_embeddings()(input_ids[:, prompt_length:])
            inputs["inputs_embeds"] = torch.cat((prompt_embeds[:, start:].to(answer.dtype), answer), dim=1)
            inputs["input_ids"] = None
        return inputs

    def _visible_ids(self, input_ids: Tensor, pad: int | None, generation_config: Any) -> Tensor:
        """The ids with `<align>` and `<image>` replaced by padding: what may be looked up in the vocabulary."""
        known = (
            pad,
            generation_config.pad_token_id,
            self.config.text_config.pad_token_id,
            generation_config.eos_token_id,
        )
        pad = next((c for c in known if c is not None), 0)
        pad = pad[0] if isinstance(pad, list) else pad
        special = (input_ids == self.config.align_token_id) | (input_ids == self.config.image_token_id)
        return torch.where(special, pad, input_ids)


def saveable(generation_config: Any) -> Any:
    """A copy without sampling values that nothing uses: with them (Vicuna's has some) transformers refuses to save."""
    config = copy.deepcopy(generation_config)
    if not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, None)
    return config


def wanted_weights(config: AlignGPTConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a model of this config, each once, by state-dict name, on the meta device; and the names that are
    left out, each with the name of the weight that it is tied to."""
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(config)
    tied = dict(model._tied_weights_keys) if config.tie_word_embeddings else {}
    return {name: weight for name, weight in model.state_dict().items() if name not in tied}, tied


def fresh_align_weights(config: AlignGPTConfig, seed: int) -> dict[str, Tensor]:
    """New projector, gate and table, fp32 on the CPU, by state-dict name: a pure function of config and seed."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        modules = {"multi_modal_projector": LlavaMultiModalProjector(config), "align_gate": AlignGate(config)}
        table = torch.empty(config.num_align_levels, config.text_config.hidden_size)
        weights = {"model.align_table": nn.init.xavier_uniform_(table)}
    for prefix, module in modules.items():
        weights |= {f"model.{prefix}.{name}": tensor.float() for name, tensor in module.state_dict().items()}
    return weights


def _raw(module: nn.Module) -> bool:
    """Whether an op may read `module.weight` itself: a plain floating-point weight, and nothing around the module."""
    weight = getattr(module, "weight", None)
    reason = None
    if not isinstance(weight, Tensor) or is_traceable_wrapper_subclass(weight):  # sharded, or quantised by torchao
        reason = f"its weight is a {type(weight).__name__}"
    elif not weight.is_floating_point() or weight.is_meta:
        reason = f"its weight is {weight.dtype} on {weight.device}"
    elif type(module) not in (nn.Linear, nn.Embedding) and not hasattr(module, "scalar_embed_scale"):
        reason = "it is not a plain layer"
    elif module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        reason = "it has hooks"
    if reason is not None:
        _say_once(f"{type(module).__name__}: {reason}; the module is called instead of the fused op")
    return reason is None


def _weights_here(module: nn.Module) -> AbstractContextManager[Any]:
    """Where a module's own parameters may be used though its `forward` isn't called: accelerate may have put them away.

    Those of its children come when the children are called.
    """
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _of_the_llm(quantization: Any) -> Any:
    """A quantisation's config that leaves `_NOT_QUANTISED` alone where it names no modules to be left alone."""
    quantization = copy.copy(quantization)
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if getattr(quantization, name, ()) is None:
            setattr(quantization, name, list(_NOT_QUANTISED))
    return quantization


def _all_text(place: Tensor, plan: InjectionPlan) -> Tensor:
    """(B, L) bool: text but each sequence's first token (BOS). `place` is each token's place, negative at padding."""
    return (place > 0) & (plan.source.view(place.shape) == -1)


def _gate_mask(
    gate_mask: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    plan: InjectionPlan,
    input_ids: Tensor,
) -> Tensor | None:
    """`gate_mask`, or all text where there is none; None where `text_mean` finds that out by itself."""
    if gate_mask is None and cu_seqlens is not None:
        return _all_text(_places(cu_seqlens, input_ids), plan)
    if gate_mask is None and attention_mask is not None:
        return _all_text(attention_mask.long().cumsum(-1) * attention_mask - 1, plan)
    return gate_mask


def _places(cu_seqlens: Tensor, tokens: Tensor) -> Tensor:
    """(1, T) int64: each packed token's place in its sequence."""
    return positions(cu_seqlens, tokens.shape[1])[None]


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that products of the layers run in."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _head_size(text_config: PretrainedConfig) -> int:
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def _left_padded(
    input_ids: Tensor, attention_mask: Tensor, gate_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each row rotated so that its trailing padding stands in front."""
    length = input_ids.shape[1]
    place = torch.arange(length, device=input_ids.device)
    trailing = length - 1 - (place * attention_mask).amax(dim=1, keepdim=True)
    order = (place - trailing) % length
    rotate: Callable[[Tensor], Tensor] = lambda t: t.gather(1, order)  # noqa: E731
    return rotate(input_ids), rotate(attention_mask), None if gate_mask is None else rotate(gate_mask)


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """A number as the embedding module multiplies by it: in its weight's type."""
    return torch.tensor(value, dtype=dtype).item()


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)
