"""The model's configuration: LLaVA's, plus what the alignment token needs.

`AlignGPTConfig` is LLaVA's nested config (`text_config`, `vision_config`) with the alignment fields of the paper
(arXiv 2405.14129). A flat `config.json` of the public AlignGPT folders is recognised by its own keys and converted.
`public_config`, `from_llava` and `llava_config` convert to the public form and from and to LLaVA's; they refuse what
the other form cannot say.
"""

import copy
import dataclasses
import difflib
from typing import Any, Literal, get_args

from transformers import AutoConfig, LlavaConfig, PretrainedConfig

AlignMode = Literal["adaptive", "local", "global", "average", "none"]
GateText = Literal["prompt", "all"]
ALIGN_MODES: tuple[str, ...] = get_args(AlignMode)

# How patches are taken from a tower's hidden state: CLIP puts a CLS token first, SigLIP has none.
SELECT_STRATEGY = {"clip_vision_model": "default", "siglip_vision_model": "full"}

# A public AlignGPT folder names its tower and holds no dimensions of it.
_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}

# The LLM's fields in a public folder's flat config; the others there belong to AlignGPT or to its training script.
_LLAMA_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "head_dim",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
]

# Heads that do more than one matrix product; `linear_cross_entropy` would silently leave that out.
_HEAD_SCALES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}


class AlignGPTConfig(LlavaConfig):
    """Configuration of `AlignGPTForConditionalGeneration`.

    Fields beyond `LlavaConfig`'s:
        num_align_levels: N, rows of the alignment table; the last one is the global level.
        align_mode: how a sample's alignment row H is made when no level is given: "adaptive" α·local + global,
            "local" α·local, "global" the last row, "average" the mean of the local rows + global, "none" no token at
            all, which is LLaVA-1.5.
        gate_hidden_size: width of the gate's hidden layer.
        gate_text: which text the gate averages: "prompt" leaves out every assistant turn, "all" is what the public
            code does.
        align_token_id: id of `<align>`; the image token's is `image_token_id`. Both default to the two ids after the
            LLM's vocabulary; embedding and head never grow, since these ids are never looked up.
        image_aspect_ratio: "pad" or "square", how images are made square.
        lm_head_bias: whether the LLM's head has a bias (Phi's has).
    """

    model_type = "aligngpt"
    # What transformers' Trainer does not take for predictions when it evaluates.
    keys_to_ignore_at_inference = ["past_key_values", "align_weights", "token_loss"]  # noqa: RUF012  their interface

    num_align_levels: int = 8
    align_mode: AlignMode = "adaptive"
    gate_hidden_size: int = 256
    gate_text: GateText = "prompt"
    align_token_id: int = 32000
    image_token_index: int = 32001
    image_aspect_ratio: Literal["pad", "square"] = "pad"
    lm_head_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for part in (self.text_config, self.vision_config):
            part._name_or_path = ""  # where somebody had the parts is not for whom the model is given to
        self.check()

    def check(self) -> None:
        """Refuse values that mean nothing; the model asks again, since attributes can be set. Raises ValueError."""
        for name, value, allowed in (
            ("align_mode", self.align_mode, ALIGN_MODES),
            ("gate_text", self.gate_text, get_args(GateText)),
            ("image_aspect_ratio", self.image_aspect_ratio, ("pad", "square")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if self.num_align_levels < 2:
            raise ValueError(
                f"num_align_levels is {self.num_align_levels}; at least one local level and the global one"
            )
        if self.align_token_id == self.image_token_id:
            raise ValueError(f"align_token_id and image_token_id are both {self.align_token_id}; they must differ")

    @classmethod
    def from_parts(cls, llm: PretrainedConfig, vision: PretrainedConfig, **align: Any) -> "AlignGPTConfig":
        """Config of a new model from an LLM's and a vision tower's config; `align` sets any field of this class.

        Raises:
            ValueError: the LLM is none, the tower is neither CLIP nor SigLIP, the LLM's head scales or caps its logits,
                or `align` names no field.
        """
        for name in align:
            if name != "image_token_id" and name not in known_fields():
                nearest = difflib.get_close_matches(name, known_fields(), n=1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                raise ValueError(f"{name} is no field of {cls.__name__}{hint}")
        if not hasattr(llm, "vocab_size"):
            raise ValueError(f"llm has model_type {llm.model_type!r}; it needs to be a model of text alone")
        vision = getattr(vision, "vision_config", vision)  # a whole CLIP or SigLIP model carries its tower's
        _check_tower(vision)
        for name, neutral in _HEAD_SCALES.items():
            if getattr(llm, name, neutral) not in (None, neutral):
                raise ValueError(
                    f"llm has {name}={getattr(llm, name)}; its head is more than a linear layer, which is not supported"
                )
        fields: dict[str, Any] = {
            "text_config": llm,
            "vision_config": vision,
            "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
            "vision_feature_select_strategy": SELECT_STRATEGY[vision.model_type],
            "align_token_id": llm.vocab_size,
            "image_token_index": llm.vocab_size + 1,
            "tie_word_embeddings": llm.tie_word_embeddings,
        }
        if "image_token_id" in align:
            align["image_token_index"] = align.pop("image_token_id")
        return cls(**(fields | align))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if is_public(config_dict):
            config_dict = _nested(config_dict, kwargs.pop("vision_config", None))
        return super().from_dict(config_dict, **kwargs)


def known_fields() -> list[str]:
    """Names that `from_parts` takes."""
    return [field.name for field in dataclasses.fields(AlignGPTConfig)]


def is_public(config: dict[str, Any]) -> bool:
    """Whether a parsed `config.json` is a public AlignGPT folder's flat one."""
    return config.get("model_type") == AlignGPTConfig.model_type and "text_config" not in config


def public_config(config: AlignGPTConfig, *, tower: str, max_length: int) -> dict[str, Any]:
    """The flat `config.json` of a public AlignGPT folder; `_nested` is its inverse, and N stands in the weights.

    Args:
        tower: `mm_vision_tower`, from where the public code takes the tower's weights.
        max_length: tokens of a training sample.

    Raises:
        ValueError: the model has what the public code cannot run; all of it is listed.
    """
    text, vision = config.text_config, config.vision_config
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    needs = (
        ("align_mode", config.align_mode, "adaptive"),
        ("text_config.model_type", text.model_type, "llama"),
        ("text_config.attention_bias", getattr(text, "attention_bias", False), False),
        ("text_config.mlp_bias", getattr(text, "mlp_bias", False), False),
        ("text_config.head_dim", head_size, text.hidden_size // text.num_attention_heads),
        ("vision_config.model_type", vision.model_type, "clip_vision_model"),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, "default"),
        ("projector_hidden_act", config.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", config.multimodal_projector_bias, True),
        ("lm_head_bias", config.lm_head_bias, False),
    )
    problems = [f"{name} is {got!r}, it needs {wanted!r}" for name, got, wanted in needs if got != wanted]
    if not isinstance(config.vision_feature_layer, int):
        problems.append(f"vision_feature_layer is {config.vision_feature_layer}, it needs one layer")
    if problems:
        raise ValueError(f"the public AlignGPT form cannot hold this model: {'; '.join(problems)}")
    fields = text.to_dict()
    rope = dict(fields.pop("rope_parameters", None) or {})
    fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    if kind in ("linear", "dynamic"):  # the form of transformers 4.31, which the public code is written for
        fields["rope_scaling"] = {"type": kind, "factor": rope["factor"]}
    elif kind != "default":
        fields["rope_scaling"] = {"rope_type": kind, **rope}
    else:
        fields["rope_scaling"] = None
    return {
        "model_type": AlignGPTConfig.model_type,
        "architectures": ["AlignGPTForCausalLM"],
        **{name: fields[name] for name in _LLAMA_FIELDS if name in fields and name != "head_dim"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "pretraining_tp": 1,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "mm_vision_tower": tower,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
        "image_aspect_ratio": config.image_aspect_ratio,
        "gate_text": config.gate_text,  # ours: the public code ignores it, `_nested` takes it back
        "tokenizer_model_max_length": max_length,
        "tokenizer_padding_side": "right",
        "use_cache": True,
    }


def from_llava(llava: LlavaConfig, **align: Any) -> AlignGPTConfig:
    """The config of a LLaVA model of transformers as AlignGPT's; `align` sets any field of it.

    LLaVA's image token stays the id that it is. Raises ValueError as `from_parts` does.
    """
    text, vision = llava.text_config, llava.vision_config
    _check_tower(vision)
    num_rows = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    fields = {
        "vision_feature_layer": llava.vision_feature_layer,
        "vision_feature_select_strategy": llava.vision_feature_select_strategy,
        "image_seq_length": num_rows - (llava.vision_feature_select_strategy == "default"),
        "projector_hidden_act": llava.projector_hidden_act,
        "multimodal_projector_bias": llava.multimodal_projector_bias,
        "tie_word_embeddings": llava.tie_word_embeddings,
        "image_token_id": llava.image_token_index,
    }
    return AlignGPTConfig.from_parts(text, vision, **(fields | align))


def llava_config(config: AlignGPTConfig, *, image_token_id: int, vocab_size: int) -> LlavaConfig:
    """The config of the LLaVA model of transformers that is this one; its image token needs a row of the vocabulary.

    Raises:
        ValueError: the model has an alignment token, or a head with a bias.
    """
    if config.align_mode != "none":
        raise ValueError(
            f"align_mode is {config.align_mode!r}: LLaVA has no alignment token; only a model with align_mode 'none' "
            "is one"
        )
    if config.lm_head_bias:
        raise ValueError("lm_head_bias is True; the head of LLaVA in transformers has none")
    text = copy.deepcopy(config.text_config)
    text.vocab_size = vocab_size
    return LlavaConfig(
        text_config=text,
        vision_config=copy.deepcopy(config.vision_config),
        image_token_index=image_token_id,
        image_seq_length=config.image_seq_length,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        projector_hidden_act=config.projector_hidden_act,
        multimodal_projector_bias=config.multimodal_projector_bias,
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    )


def _nested(public: dict[str, Any], vision: PretrainedConfig | dict[str, Any] | None) -> dict[str, Any]:
    """A public folder's flat config as `AlignGPTConfig`'s fields. N is not in it: the weights' shape tells."""
    if vision is None:
        vision = _tower_config(public.get("mm_vision_tower"))
    if isinstance(vision, PretrainedConfig):
        vision = getattr(vision, "vision_config", vision).to_dict()
    if public.get("mm_projector_type") != "mlp2x_gelu":
        raise ValueError(f"mm_projector_type is {public.get('mm_projector_type')!r}; only 'mlp2x_gelu' is supported")
    if public.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError(
            f"mm_vision_select_feature is {public['mm_vision_select_feature']!r}; only 'patch' is supported"
        )
    if public.get("mm_hidden_size") != vision["hidden_size"]:
        raise ValueError(
            f"mm_hidden_size is {public.get('mm_hidden_size')}; the tower's hidden_size is {vision['hidden_size']}"
        )
    llm = {name: public[name] for name in _LLAMA_FIELDS if public.get(name) is not None}
    llm = copy.deepcopy(llm)  # transformers completes rope_scaling where it is
    return {
        "architectures": ["AlignGPTForConditionalGeneration"],
        "dtype": public.get("torch_dtype"),
        "text_config": {"model_type": "llama", **llm},
        "vision_config": vision,
        "vision_feature_layer": public.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "image_aspect_ratio": public.get("image_aspect_ratio") or "square",
        "align_token_id": public["vocab_size"],
        "image_token_index": public["vocab_size"] + 1,
        "gate_text": public.get("gate_text", "all"),  # the public code has the whole text in the gate
        "tie_word_embeddings": public.get("tie_word_embeddings", False),
    }


def _check_tower(vision: PretrainedConfig) -> None:
    if vision.model_type not in SELECT_STRATEGY:
        raise ValueError(f"vision has model_type {vision.model_type!r}; wanted one of {', '.join(SELECT_STRATEGY)}")


def _tower_config(tower: str | None) -> dict[str, Any]:
    if tower in KNOWN_TOWERS:
        return dict(KNOWN_TOWERS[tower])
    try:
        config = AutoConfig.from_pretrained(tower, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"mm_vision_tower is {tower!r}, neither a local folder nor one of {', '.join(KNOWN_TOWERS)}; "
            "pass vision_config= with the tower's dimensions"
        ) from error
    return getattr(config, "vision_config", config).to_dict()
