"""From conversations and pictures to what the model reads, the same for training, evaluation and answering.

`AlignGPTProcessor` joins a tokenizer and `AlignGPTImageProcessor`. It places one `<align>` and P `<image>` tokens per
image, so that every shape is known before the model runs, and it emits `gate_mask`, the text the gate averages. Their
two ids lie outside the tokenizer; `decode` leaves them out.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .batch import Batch, Example, collate
from .checkpoint import read_config, refuse_code
from .config import AlignGPTConfig, is_public
from .data.llava_json import Sample
from .data.records import Records
from .image import ImageError, normalised, open_image, squared
from .text import (
    GATE_TEXTS,
    IMAGE_MARK,
    TEMPLATES,
    Part,
    Role,
    TokenIds,
    Tokenized,
    Turn,
    render,
    tokenize,
)

ImageInput = Image.Image | np.ndarray | str | Path | bytes

_FIELDS = ("template", "rows_per_image", "align_token_id", "image_token_id", "align", "gate_text", "max_length")
# transformers' keywords, with the values that ask for what is done anyway.
_DONE_ANYWAY: dict[str, tuple[Any, ...]] = {
    "return_tensors": ("pt",),
    "padding": (True, "longest"),
    "truncation": (False, None),
    "add_special_tokens": (True,),
    "tools": (None,),
    "documents": (None,),
    "return_assistant_tokens_mask": (False,),
    "sanitize_control_tokens": (True,),
}
_FROM_AUTO = ("trust_remote_code", "code_revision", "token", "force_download", "use_fast", "backend", "subfolder")


class AlignGPTImageProcessor(ImageProcessingMixin):
    """Pictures to the tower's input, by `aligngpt.image`.

    Args:
        size: pixels of the square side.
        image_mean, image_std: of each RGB channel, for values in [0, 1].
        image_aspect_ratio: "square" crops the centre, "pad" pads with the mean colour.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  transformers' interface

    def __init__(
        self,
        size: int = 336,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        image_aspect_ratio: str = "pad",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.image_aspect_ratio = image_aspect_ratio

    def pixels(self, images: Sequence[ImageInput]) -> Tensor:
        """(images, 3, size, size) fp32."""
        return self.normalised([self._squared(_rgb(image)) for image in images])

    def read(self, file: str | Path | bytes, name: str) -> Tensor:
        """(3, size, size) uint8 of an image file, or of what is in it. ImageError, naming it `name`: it is none."""
        image = open_image(file, name=name)
        try:
            return self._squared(image)
        except ImageError as error:  # too long to be resized
            raise ImageError(name, error.why) from error

    def normalised(self, pictures: Sequence[Tensor]) -> Tensor:
        """(pictures, 3, size, size) fp32 of what `read` returns."""
        empty = torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        return normalised(torch.stack(list(pictures)) if pictures else empty, self.image_mean, self.image_std)

    def _squared(self, image: Image.Image) -> Tensor:
        return squared(image, size=self.size, mean=self.image_mean, aspect=self.image_aspect_ratio)

    def __call__(self, images: ImageInput | Sequence[ImageInput], **kwargs: Any) -> BatchFeature:
        return BatchFeature({"pixel_values": self.pixels(_listed(images))})


class AlignGPTProcessor(ProcessorMixin):
    """Tokenizer and image processor of an AlignGPT model.

    Args:
        template: "plain", "v1", "llama_2" or "chat" (the tokenizer's own chat template).
        rows_per_image: P, `<image>` tokens per picture.
        align_token_id, image_token_id: ids of the two tokens the model treats by itself.
        align: whether samples with an image get an `<align>` (False where `align_mode` is "none").
        gate_text: "prompt" or "all", which text `gate_mask` keeps.
        max_length: tokens kept of a training sample.
    """

    def __init__(
        self,
        image_processor: AlignGPTImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "v1",
        rows_per_image: int = 576,
        align_token_id: int = 32000,
        image_token_id: int = 32001,
        align: bool = True,
        gate_text: str = "prompt",
        max_length: int = 2048,
        chat_template: str | None = None,
    ):
        for name, value, allowed in (("template", template, TEMPLATES), ("gate_text", gate_text, GATE_TEXTS)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        self.template = template
        self.rows_per_image = rows_per_image
        self.align_token_id = align_token_id
        self.image_token_id = image_token_id
        self.align = align
        self.gate_text = gate_text
        self.max_length = max_length
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_parts(
        cls,
        llm: str | Path,
        vision: str | Path,
        config: AlignGPTConfig,
        *,
        template: str = "v1",
        max_length: int = 2048,
    ) -> "AlignGPTProcessor":
        """Processor of a new model: the LLM folder's tokenizer, the tower folder's mean and deviation."""
        mean, std = _normalisation(vision)
        image_processor = AlignGPTImageProcessor(config.vision_config.image_size, mean, std, config.image_aspect_ratio)
        return cls.for_model(
            config, image_processor, AutoTokenizer.from_pretrained(llm, trust_remote_code=False), template, max_length
        )

    @classmethod
    def for_model(
        cls,
        config: AlignGPTConfig,
        image_processor: AlignGPTImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "v1",
        max_length: int = 2048,
    ) -> "AlignGPTProcessor":
        """The processor whose tokens fit a model's config."""
        return cls(
            image_processor,
            tokenizer,
            template=template,
            rows_per_image=config.image_seq_length,
            align_token_id=config.align_token_id,
            image_token_id=config.image_token_id,
            align=config.align_mode != "none",
            gate_text=config.gate_text,
            max_length=max_length,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "AlignGPTProcessor":
        """Read a folder that `save_pretrained` wrote, or a public AlignGPT folder. `kwargs` override fields.

        Args:
            vision_config: as in `AlignGPTForConditionalGeneration.from_pretrained`, for a public folder.

        Raises:
            ValueError: it holds no AlignGPT processor, or code, or a keyword is neither a field nor transformers' own.
        """
        folder = Path(pretrained_model_name_or_path)
        refuse_code(folder)
        loading = {name: kwargs.pop(name) for name in ("cache_dir", "revision", "local_files_only") if name in kwargs}
        fields = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        unknown = [name for name in kwargs if name not in _FROM_AUTO and not name.startswith("_")]
        if unknown and "_from_pipeline" not in kwargs:  # a pipeline passes on the keywords of its model, as dtype
            raise ValueError(f"{unknown[0]} is no field of {cls.__name__}; its fields are {', '.join(_FIELDS)}")
        if (folder / "config.json").is_file() and is_public(raw := read_config(folder)):
            config = AlignGPTConfig.from_dict(raw, vision_config=vision_config)
            processor = cls.from_parts(folder, folder, config, max_length=raw.get("tokenizer_model_max_length", 2048))
            return cls(processor.image_processor, processor.tokenizer, **(processor.fields() | fields))
        try:
            saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **loading)
            if saved.pop("processor_class", None) != cls.__name__:
                raise ValueError("its processor_config.json is another's or missing")
        except (OSError, ValueError) as error:
            raise ValueError(f"{pretrained_model_name_or_path} holds no {cls.__name__}: {error}") from error
        pictures = saved.pop("image_processor")
        pictures.pop("image_processor_type", None)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **loading)
        return cls(AlignGPTImageProcessor(**pictures), tokenizer, **(saved | fields))

    def fields(self) -> dict[str, Any]:
        """What distinguishes this processor beside its tokenizer and image processor."""
        return {name: getattr(self, name) for name in _FIELDS}

    @property
    def token_ids(self) -> TokenIds:
        tokenizer = self.tokenizer
        candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
        return TokenIds(
            image=self.image_token_id,
            align=self.align_token_id,
            pad=next((candidate for candidate in candidates if candidate is not None), 0),
        )

    def tokenize(self, parts: Sequence[Part], *, num_images: int, max_length: int | None, name: str) -> Tokenized:
        return tokenize(
            parts,
            self.tokenizer,
            self.token_ids,
            rows_per_image=self.rows_per_image,
            align=self.align,
            gate_text="all" if self.gate_text == "all" else "prompt",
            max_length=max_length,
            num_images=num_images,
            name=name,
        )

    def text(self, sample: Sample, template: str | None = None, max_length: int | None = None) -> Tokenized:
        """A training sample's ids, labels and gate mask, in the processor's template and length or others.

        ValueError names the record: its problem, what `render` and `tokenize` refuse, no answer within `max_length`.
        """
        max_length = max_length or self.max_length
        if sample.problem:
            raise ValueError(f"{sample.name}: {sample.problem}")
        parts = render(
            sample.turns,
            template or self.template,
            tokenizer=self.tokenizer,
            has_images=bool(sample.images),
            name=sample.name,
        )
        text = self.tokenize(parts, num_images=len(sample.images), max_length=max_length, name=sample.name)
        if not text.num_supervised:
            raise ValueError(f"{sample.name}: nothing of its answers is within max_length, {max_length} tokens")
        return text

    def example(self, sample: Sample, records: Records, *, level: int | None = None) -> Example:
        """A training sample of a data set with its pictures. ValueError names the record and what is wrong with it."""
        text = self.text(sample)
        try:
            pictures = [
                self.image_processor.read(records.image(sample, number), sample.images[number])
                for number in range(text.num_images)  # a cut may leave out the last ones
            ]
        except (ValueError, OSError) as error:
            raise ValueError(f"{sample.name}: {error}") from error
        return Example(id=sample.id, text=text, pixel_values=self.image_processor.normalised(pictures), level=level)

    def collate(self, examples: Sequence[Example], *, packed: bool = False) -> Batch:
        """`aligngpt.batch.collate` with this processor's tokens and sizes."""
        size = self.image_processor.size
        return collate(
            examples, token_ids=self.token_ids, rows_per_image=self.rows_per_image, image_size=size, packed=packed
        )

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Rendered prompts, `<image>` standing for each picture in order, as the model's inputs.

        `images` may also be a list for each prompt. Returns input_ids, attention_mask and gate_mask (B, L), and
        pixel_values (M, 3, size, size) if there are images.

        Raises:
            ValueError: no text, or the marks in the texts do not match the images in number.
        """
        _refuse_unknown(kwargs, "the processor")
        if text is None:
            raise ValueError("text is missing; a prompt with one <image> for each picture is needed")
        texts = [text] if isinstance(text, str) else list(text)
        pictures = [] if images is None else _listed(images)
        marks = sum(prompt.count(IMAGE_MARK) for prompt in texts)
        if marks != len(pictures):
            raise ValueError(f"text has {marks} {IMAGE_MARK} marks; {len(pictures)} images were given")
        prompts = [
            self.tokenize(
                _raw_parts(prompt), num_images=prompt.count(IMAGE_MARK), max_length=None, name=f"text {number}"
            )
            for number, prompt in enumerate(texts)
        ]
        return self._prompt_batch(prompts, pictures, padding_side)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        padding_side: str = "left",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Messages in this model's template; with `tokenize` the model's inputs, pictures included.

        A message is {"role", "content"}; its content a string, or a list of {"type": "text", "text"} and
        {"type": "image", "image": a PIL image, an array, a path or bytes}. A picture may also stand under "path",
        "url" (a path or a data: URL) or "base64", and as {"type": "image_url", "image_url": {"url"}}. Without
        `tokenize` it may be missing: it is then given to `__call__` with the text. One conversation or a list of them.

        Args:
            add_generation_prompt: end where the assistant begins to speak; None: yes, unless the last message goes on.
            continue_final_message: end with the last message's words, which the answer then continues.
        """
        if not conversation:
            raise ValueError("conversation is empty; it needs at least one message")
        conversations = [conversation] if isinstance(conversation[0], Mapping) else conversation
        given = dict(processor_kwargs or {})
        padding_side = given.pop("padding_side", padding_side)
        _refuse_unknown(kwargs | given, "apply_chat_template")
        if chat_template is not None:
            raise ValueError("chat_template is given; the processor's template field says which one is used")
        if not isinstance(continue_final_message, bool):
            raise ValueError(f"continue_final_message is {continue_final_message!r}; it needs to be True or False")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message are both given; it needs to be one")
        rendered, pictures, counts = [], [], []
        for number, messages in enumerate(conversations):
            name = f"conversation {number}"
            turns, found = turns_of(messages, name)
            parts = render(
                turns,
                self.template,
                tokenizer=self.tokenizer,
                add_generation_prompt=add_generation_prompt,
                has_images=bool(found),
                name=name,
            )
            rendered.append(_open_ended(parts, turns[-1], name) if continue_final_message else parts)
            if tokenize and any(picture is None for picture in found):
                raise ValueError(f"{name} has an item of type 'image' without a picture; it needs one to be tokenized")
            pictures += found
            counts.append(len(found))
        if not tokenize:
            texts = ["".join(part.text for part in parts) for parts in rendered]
            return texts[0] if conversations is not conversation else texts
        prompts = [
            self.tokenize(parts, num_images=count, max_length=None, name=f"conversation {number}")
            for number, (parts, count) in enumerate(zip(rendered, counts, strict=True))
        ]
        batch = self._prompt_batch(prompts, pictures, padding_side)
        return batch if return_dict else batch["input_ids"]

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """The tokenizer's `decode`, without `<align>` and `<image>`: a text, or a list of them for rows of ids."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        if len(ids) and np.ndim(ids[0]):
            return self.batch_decode(ids, **kwargs)
        ours = (self.align_token_id, self.image_token_id)
        return self.tokenizer.decode([int(token) for token in ids if token not in ours], **kwargs)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        return [self.decode(sequence, **kwargs) for sequence in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Texts of rows of ids, a prompt's or `generate`'s, alike: what stands for `<image>` in the latter is left out.

        It is padding, so all padding is. Pipelines call this, and find the prompt's text in front of the answer's.
        """
        rows = generated_outputs.tolist() if hasattr(generated_outputs, "tolist") else generated_outputs
        pad = self.token_ids.pad
        rows = rows if len(rows) == 0 or np.ndim(rows[0]) else [rows]
        rows = [[int(token) for token in row if token != pad] for row in rows]
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in rows]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "gate_mask", "pixel_values"]

    def _prompt_batch(self, prompts: list[Tokenized], images: list[ImageInput], padding_side: str) -> BatchFeature:
        def pad(rows: list[Tensor], value: Any) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side)

        data = {
            "input_ids": pad([prompt.input_ids for prompt in prompts], self.token_ids.pad),
            "attention_mask": pad([torch.ones_like(prompt.input_ids) for prompt in prompts], 0),
            "gate_mask": pad([prompt.gate_mask for prompt in prompts], False),
        }
        if images:
            data["pixel_values"] = self.image_processor.pixels(images)
        return BatchFeature(data)


def _listed(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """Images in order; a list may hold a list for each prompt."""
    if not isinstance(images, list | tuple):
        return [images]  # type: ignore[list-item]
    return [image for entry in images for image in (entry if isinstance(entry, list | tuple) else [entry])]


def _raw_parts(prompt: str) -> list[Part]:
    """A rendered prompt split at its image marks."""
    parts: list[Part] = []
    for number, piece in enumerate(prompt.split(IMAGE_MARK)):
        if number:
            parts.append(Part(IMAGE_MARK, "image"))
        if piece:
            parts.append(Part(piece, "text"))
    return parts


def _open_ended(parts: list[Part], last: Turn, name: str) -> list[Part]:
    """A rendered conversation without what closes its last message."""
    if not last.text.strip():
        raise ValueError(f"{name} ends with an empty message; continue_final_message needs words to go on from")
    end = max(number for number, part in enumerate(parts) if part.literal or part.kind == "image")
    return parts[: end + 1]


def _refuse_unknown(kwargs: Mapping[str, Any], caller: str) -> None:
    """Of transformers' common keywords only those that ask for what is done anyway."""
    for name, value in kwargs.items():
        if value not in _DONE_ANYWAY.get(name, ()):
            raise ValueError(f"{caller} takes no {name}={value!r}; it returns padded PyTorch tensors, whole prompts")


def turns_of(messages: Sequence[Mapping[str, Any]], name: str) -> tuple[list[Turn], list[Any]]:
    """A conversation's turns, and its pictures in order, None where one is missing. ValueError names the message."""
    turns: list[Turn] = []
    pictures: list[Any] = []
    spoken: list[str] = []  # texts of the messages; where there are pictures they may not hold a mark
    for number, message in enumerate(messages):
        where = f"{name}, message {number}"
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        if role is None or role not in get_args(Role) or not isinstance(content, str | list | tuple):
            raise ValueError(
                f"{where} has role {role!r} and content of type {type(content).__name__}; "
                f"it needs a role of {', '.join(get_args(Role))} and a string or a list of items"
            )
        text = ""
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "text" and isinstance(item.get("text"), str):
                spoken.append(item["text"])
                text += item["text"]
            elif kind in ("image", "image_url"):
                pictures.append(_picture(item, where))
                text += IMAGE_MARK + "\n"
            else:
                raise ValueError(
                    f"{where} has an item {item!r}; it needs 'type': 'text' with 'text', "
                    "or 'type': 'image' with 'image': a PIL image, an array, a path or bytes"
                )
        turns.append(Turn(role, text.rstrip("\n") if text.endswith(IMAGE_MARK + "\n") else text))
    if pictures and any(IMAGE_MARK in text for text in spoken):
        raise ValueError(f"{name} holds {IMAGE_MARK} in a text beside pictures; give pictures as items of type 'image'")
    return turns, pictures


def _picture(item: Mapping[str, Any], where: str) -> Any:
    """The picture of a message's item, None if it holds none."""
    url = item.get("image_url")
    forms = dict(item) if url is None else {"url": url.get("url") if isinstance(url, Mapping) else url}
    given = [name for name in ("image", "path", "url", "base64") if forms.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{where} has an item with {' and '.join(given)}; an item needs to be one picture")
    if not given:
        return None
    picture: Any = forms[given[0]]
    return _from_base64(picture, where) if given == ["base64"] else picture


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"{where}: a picture in base64 cannot be read: {error}") from error


def _rgb(image: ImageInput) -> Image.Image:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, str) and image.startswith("data:image/"):
        image = _from_base64(image.partition(",")[2], image.partition(",")[0][:40])
    if isinstance(image, str) and "://" in image:
        raise ValueError(f"image {image!r} is a URL; it needs to be downloaded first")
    if isinstance(image, str | Path | bytes):
        return open_image(image)
    raise ValueError(f"an image is a {type(image).__name__}; it needs to be a PIL image, an array, a path or bytes")


def _normalisation(vision: str | Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation in the tower folder's preprocessor_config.json; CLIP's where it has none."""
    path = Path(vision) / "preprocessor_config.json"
    if not path.is_file():
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    config, _ = ImageProcessingMixin.get_image_processor_dict(vision)
    return config["image_mean"], config["image_std"]
