"""What `aligngpt convert` writes: for each layout which name, shape and type every weight gets, and the files beside.

A target is decided whole before anything is written. A model that a layout cannot hold is refused with the reason;
what it holds but its readers treat otherwise is a note for the user.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .card import write_card
from .checkpoint import OUR_NAMES, STAGE_1, TO_LLAVA, TO_PUBLIC, Stored, new_name
from .config import KNOWN_TOWERS, AlignGPTConfig, _tower_config, llava_config, public_config
from .convert_sources import Entry, Kind, Model, Options, set_dtype
from .text import IMAGE_MARK, V1_SYSTEM

_ROWS = 64  # a vocabulary that grows becomes a multiple of it, as in LLaVA's own folders

# What the public code's modules are built for, whatever its config says.
_PUBLIC_SIZES = {"num_align_levels": 8, "gate_hidden_size": 256, "image_seq_length": 576}

# LLaVA's processor renders with it; the words and blanks are those of `text.render` with template "v1".
_V1_JINJA = (
    "{% if messages[0]['role'] != 'system' %}SYSTEM {% endif %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set words = message['content'] %}{% set marks = '' %}"
    "{% else %}"
    "{% set words = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{% set marks = '<image>\\n' * (message['content'] | selectattr('type', 'equalto', 'image') | list | length) %}"
    "{% endif %}"
    "{% if message['role'] == 'system' %}{{ words + ' ' if words else '' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + ((marks + words | trim) | trim if marks else words) + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + words + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
).replace("SYSTEM", V1_SYSTEM)


# LLaVA's processor gives a template lists of items; a template of text alone, which follows, wants each as a string.
_ITEMS_JINJA = (
    "{% set found = namespace(messages=[], words='') %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set found.words = message['content'] %}{% else %}"
    "{% set found.words = '' %}{% for item in message['content'] %}"
    "{% set found.words = found.words + ('<image>\n' if item['type'] == 'image' else item['text']) %}{% endfor %}"
    "{% if found.words.endswith('<image>\n') %}{% set found.words = found.words[:-1] %}{% endif %}{% endif %}"
    "{% set found.messages = found.messages + [{'role': message['role'], 'content': found.words}] %}"
    "{% endfor %}"
    "{% set messages = found.messages %}"
)


@dataclass(frozen=True)
class Target:
    """What will be written: weights, and the other files of a folder by `finish`."""

    entries: list[Entry]
    finish: Callable[[Path], None]
    notes: list[str]


def _to_aligngpt(model: Model, options: Options) -> Target:
    def finish(folder: Path) -> None:
        model.config.save_pretrained(folder)
        model.processor.save_pretrained(folder)
        _shared_files(model, folder)
        write_card(folder, model.config, model.processor, origin=model.origin, base_models=_known(model.tower))

    return Target(model.entries(OUR_NAMES, options.dtype), finish, [])


def _to_public(model: Model, options: Options) -> Target:
    config, processor = model.config, model.processor
    tower = options.vision or model.tower or _tower_by_size(config)
    raw = public_config(config, tower=tower or "", max_length=processor.max_length)
    if tower is None:
        raise ValueError(
            "the public form names the folder of its vision tower, or one of the hub, and this tower has the size of "
            f"none of {', '.join(KNOWN_TOWERS)}; name it by --vision"
        )
    named = options.vision or model.tower
    guess = "" if named else "; this name is guessed from the tower's size (--vision)"
    _check_tower_named(config, tower)
    notes = [f"the public code takes the tower's weights from {tower}, its mm_vision_tower, not from OUT{guess}"]
    if config.gate_text != "all":
        notes.append(f"gate_text is {config.gate_text!r}: the public code averages earlier answers too")
    if processor.template != "v1":
        notes.append(
            f"the template is {processor.template!r}, which the folder does not say; give it to the public code"
        )
    notes += [
        f"{name} is {getattr(config, name)}; the public code is built for {size}, which has to be changed in it"
        for name, size in _PUBLIC_SIZES.items()
        if getattr(config, name) != size
    ]
    if raw["rope_theta"] != 10000.0:
        notes.append(f"rope_theta is {raw['rope_theta']}; transformers 4.31, which the public code names, ignores it")
    if model.sentencepiece is None:
        notes.append("the public code reads tokenizer.model, and there is none; --llm names a folder that has it")

    def finish(folder: Path) -> None:
        _write_json(folder / "config.json", raw)
        _write_json(folder / "preprocessor_config.json", _pictures(model))
        processor.tokenizer.save_pretrained(folder)
        _shared_files(model, folder)
        write_card(folder, config, processor, origin=model.origin, form="public", base_models=_known(named))

    return Target(model.entries(TO_PUBLIC, options.dtype), finish, notes)


def _to_llava(model: Model, options: Options) -> Target:
    tokenizer = copy.deepcopy(model.processor.tokenizer)
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer._set_processor_class("LlavaProcessor")  # what is stored must not name ours
    image, rows = tokenizer.get_vocab()[IMAGE_MARK], model.config.text_config.vocab_size
    if image >= rows:
        rows = -(-(image + 1) // _ROWS) * _ROWS
    config = llava_config(model.config, image_token_id=image, vocab_size=rows)
    set_dtype(config, model.config.dtype)
    with torch.device("meta"):
        wanted = LlavaForConditionalGeneration(config).state_dict()
    assert wanted.keys() - model.weights.keys() <= {"lm_head.weight"}  # which may be tied
    grown = {
        name: value if value.shape == wanted[name].shape else _Grown(value, wanted[name].shape[0])
        for name, value in model.weights.items()
        if name in wanted
    }
    model = copy.copy(model)
    model.weights = {**model.weights, **grown}
    notes = []
    if rows != model.config.text_config.vocab_size:
        notes.append(
            f"the vocabulary grows from {model.config.text_config.vocab_size} to {rows} rows, for {IMAGE_MARK}"
        )
    template = _V1_JINJA if model.processor.template == "v1" else None
    if model.processor.template == "chat":
        template = _ITEMS_JINJA + tokenizer.get_chat_template()
    tokenizer.chat_template = None  # it would be stored as the processor's
    if template is None:
        notes.append(
            f"the template is {model.processor.template!r}; no chat template of LLaVA's kind is written for it"
        )

    def finish(folder: Path) -> None:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_json(folder / "preprocessor_config.json", _pictures(model))
        fields = {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_MARK,
            "patch_size": config.vision_config.patch_size,
            "num_additional_image_tokens": int(config.vision_config.model_type == "clip_vision_model"),
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }
        _write_json(folder / "processor_config.json", fields)
        if template:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        _shared_files(model, folder)
        shown = copy.deepcopy(model.config)
        shown.image_token_index, shown.text_config.vocab_size = image, rows
        write_card(folder, shown, model.processor, origin=model.origin, form="llava", base_models=_known(model.tower))

    return Target(model.entries(TO_LLAVA, options.dtype), finish, notes)


TARGETS: dict[Kind, Callable[[Model, Options], Target]] = {
    "aligngpt": _to_aligngpt,
    "public": _to_public,
    "llava": _to_llava,
}


def stage_1_file(model: Model, options: Options) -> bytes:
    """Projector and table under the public names: a pickle of tensors, as the public code reads it."""
    if model.config.align_mode == "none":
        raise ValueError("align_mode is 'none': the model has no alignment table that was ever trained")
    for name, got, wanted in (
        ("projector_hidden_act", model.config.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", model.config.multimodal_projector_bias, True),
    ):
        if got != wanted:
            raise ValueError(f"{name} is {got!r}; a stage-1 file of the public code needs {wanted!r}")
    entries = [entry for entry in model.entries(OUR_NAMES, options.dtype) if entry[0] in STAGE_1]
    content = io.BytesIO()
    torch.save({new_name(name, TO_PUBLIC): make() for name, _, _, make in entries}, content)
    return content.getvalue()


@dataclass(frozen=True)
class _Grown:
    """A vocabulary's weight with more rows, each the mean of those that were there."""

    stored: Stored
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, *self.stored.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        rows = self.stored.read()
        mean = rows.mean(0, dtype=torch.float32).to(rows.dtype)
        return torch.cat((rows, mean.expand(self.num_rows - len(rows), *mean.shape)))[start:stop]


def _known(tower: str | None) -> list[str]:
    return [tower] if tower in KNOWN_TOWERS and tower else []


def _tower_by_size(config: AlignGPTConfig) -> str | None:
    """The known tower whose sizes this one has."""
    return next((name for name, sizes in KNOWN_TOWERS.items() if not _other_sizes(config, sizes)), None)


def _check_tower_named(config: AlignGPTConfig, tower: str) -> None:
    """ValueError: the tower that the public code would load is another than the model's."""
    if tower in KNOWN_TOWERS or Path(tower).is_dir():
        wrong = _other_sizes(config, _tower_config(tower))
        if wrong:
            raise ValueError(f"the vision tower {tower} is not the model's: {', '.join(wrong)}; --vision names its own")


def _other_sizes(config: AlignGPTConfig, sizes: Mapping[str, Any]) -> list[str]:
    """Which of a tower's sizes are not those of the model's tower."""
    keys = next(iter(KNOWN_TOWERS.values())).keys() - {"projection_dim"}
    ours = {key: getattr(config.vision_config, key, None) for key in sorted(keys)}
    return [f"{key} is {sizes.get(key)}, not {value}" for key, value in ours.items() if sizes.get(key) != value]


def _pictures(model: Model) -> dict[str, Any]:
    """preprocessor_config.json, in the form that every version of transformers reads."""
    pictures = model.processor.image_processor
    pad = pictures.image_aspect_ratio == "pad"
    return {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": pictures.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": pictures.size, "width": pictures.size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pictures.image_mean),
        "image_std": list(pictures.image_std),
        **({"do_pad": True} if pad else {}),
    }


def _shared_files(model: Model, folder: Path) -> None:
    """What goes along in every layout."""
    if model.generation is not None:
        model.generation.save_pretrained(folder)
    if model.sentencepiece is not None:
        shutil.copyfile(model.sentencepiece, folder / model.sentencepiece.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
