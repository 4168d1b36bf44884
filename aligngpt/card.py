"""The README.md of a model folder: what the model is, how to load and ask it, what its numbers are.

Everything in a card is read from config and processor. Nothing is said about training data, scores or licence, since
neither knows them; the card says so.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .text import V1_SYSTEM

if TYPE_CHECKING:
    from .config import AlignGPTConfig
    from .processor import AlignGPTProcessor

_MODES = {
    "adaptive": "a gate reads how well image rows and text agree, mixes the local levels and adds the global one",
    "local": "a gate reads how well image rows and text agree and mixes the local levels",
    "global": "it is the global level",
    "average": "it is the mean of the local levels plus the global one",
}
_GATE_TEXTS = {
    "prompt": "the prompt's text, without any of the assistant's turns",
    "all": "all text but the first token, earlier answers included",
}
_UNKNOWN = (
    "This card was written from configuration alone: training data, evaluation and licence are not recorded there. The "
    "licences of the LLM and of the vision tower hold for their weights in here."
)
_ANSWER = (
    "output = model.generate(**inputs, max_new_tokens=64)\n"
    'answer = output[0, inputs["input_ids"].shape[1] :]\n'
    "print(processor.decode(answer, skip_special_tokens=True))\n```"
)
_TOWER = (
    "`mm_vision_tower` in config.json names the vision tower. Where that is neither a CLIP that aligngpt knows nor a "
    "local folder, `vision_config` gives both `from_pretrained` its dimensions."
)
_TEMPLATES = {
    "plain": "`plain`: pictures alone, for a caption that ends at the first newline",
    "v1": f'`v1` (Vicuna): "{V1_SYSTEM} USER: … ASSISTANT:"',
    "llama_2": '`llama_2`: "[INST] <<SYS>> … <</SYS>> … [/INST]"',
    "chat": "`chat`: the tokenizer's own chat template",
}


def write_card(
    folder: str | Path,
    config: AlignGPTConfig,
    processor: AlignGPTProcessor,
    *,
    origin: str,
    form: Literal["aligngpt", "public", "llava"] = "aligngpt",
    base_models: Sequence[str] = (),
) -> None:
    """Write README.md.

    Args:
        origin: a sentence on how the folder came to be.
        form: whose layout the folder has: ours, the public AlignGPT code's, transformers' LLaVA's.
        base_models: names on the Hugging Face hub of models that this one holds, where they are known.
    """
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    if base_models:
        head += ["base_model:", *(f"- {name}" for name in base_models)]
    tags = ["llava"] if form == "llava" else ["aligngpt", "multimodal"]
    head += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    sections = [
        "\n".join(head),
        _what(config, form),
        "## Use\n\n" + _use(processor, form) + (f"\n\n{_paragraph(_TOWER)}" if form == "public" else ""),
        "## Numbers\n\n" + _numbers(config, processor, form),
        "## Origin\n\n" + _paragraph(f"{origin} {_UNKNOWN}"),
    ]
    Path(folder, "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _what(config: AlignGPTConfig, form: str) -> str:
    if form == "llava":
        return "# LLaVA\n\nA LLaVA model in the layout of transformers: vision tower, projector, LLM."
    if config.align_mode == "none":
        return "# AlignGPT without its alignment token\n\n" + _paragraph(
            "A LLaVA-1.5 model in AlignGPT's layout (`align_mode` is `none`): vision tower, projector, LLM. The "
            "alignment table and the gate in the folder are not used."
        )
    last, mode = config.num_align_levels - 1, config.align_mode
    gate = "; a folder after stage 1 has a gate that is not trained yet" if mode in ("adaptive", "local") else ""
    return "# AlignGPT\n\n" + _paragraph(
        "A multimodal LLM ([arXiv 2405.14129](https://arxiv.org/abs/2405.14129)) whose prompt carries one alignment "
        "token beside the text and the image rows; it says how well image and text are aligned. Its vector is made "
        f"from a table of {last + 1} levels: rows 0 to {last - 1} are the local levels, from the worst aligned pairs "
        f"upwards, row {last} belongs to the best aligned ones and is the global level. In stage 1 a pair's own level "
        f"chooses the row{gate}. Otherwise `align_mode` is `{mode}`: {_MODES[mode]}."
    )


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _use(processor: AlignGPTProcessor, form: str) -> str:
    template = processor.template
    if form == "llava" and template not in ("v1", "chat"):  # for which a LLaVA folder has no chat template
        asked = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": asked}])
        return (
            "```python\nfrom PIL import Image\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            'folder = "."  # where this file is\n'
            "model = AutoModelForImageTextToText.from_pretrained(folder)\n"
            "processor = AutoProcessor.from_pretrained(folder)\n"
            f"prompt = {json.dumps(prompt)}\n"
            'inputs = processor(images=Image.open("picture.jpg"), text=prompt, return_tensors="pt")\n' + _ANSWER
        )
    question = "" if template == "plain" else ', {"type": "text", "text": "What is in this picture?"}'
    imports = "" if form == "llava" else "import aligngpt  # registers its classes with transformers\n"
    arguments = "messages, tokenize=True"
    if form == "llava":
        arguments = '\n    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"\n'
    return (
        f"```python\n{imports}from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        'folder = "."  # where this file is\n'
        "model = AutoModelForImageTextToText.from_pretrained(folder)\n"
        "processor = AutoProcessor.from_pretrained(folder)\n"
        f'content = [{{"type": "image", "path": "picture.jpg"}}{question}]\n'
        'messages = [{"role": "user", "content": content}]\n'
        f"inputs = processor.apply_chat_template({arguments})\n" + _ANSWER
    )


def _numbers(config: AlignGPTConfig, processor: AlignGPTProcessor, form: str) -> str:
    text, vision = config.text_config, config.vision_config
    layer = config.vision_feature_layer
    rows = [
        (
            "LLM",
            f"{text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}, {text.vocab_size} tokens",
        ),
        (
            "vision tower",
            f"{vision.model_type}, {vision.num_hidden_layers} layers, width {vision.hidden_size}, "
            f"{vision.image_size} pixels, patches of {vision.patch_size}",
        ),
        ("image rows", f"{config.image_seq_length} a picture, from hidden state {layer}"),
        ("pictures are made square by", {"pad": "padding", "square": "a centre crop"}[config.image_aspect_ratio]),
        ("image token", str(config.image_token_id)),
        ("dtype", str(config.dtype).removeprefix("torch.")),
    ]
    if form != "llava":
        rows.insert(5, ("template", _TEMPLATES[processor.template]))
    if form != "llava" and config.align_mode != "none":
        rows[5:5] = [("alignment token", str(config.align_token_id)), ("levels", str(config.num_align_levels))]
        if config.align_mode in ("adaptive", "local"):
            rows.append(("the gate reads", _GATE_TEXTS[config.gate_text]))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
