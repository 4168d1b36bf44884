"""What `aligngpt convert` reads: each layout as a `Model`, our config and our names, its weights still on the disk.

`recognised` says what a folder or file is, by what is in it. A reader returns a model whose every weight is there, once
and in its shape; whatever is missing, left over or unknown is an error that lists it, and quantised weights are
refused. What a source cannot have is drawn from a seed: table and gate of a LLaVA, the gate of a stage-1 file.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_base import ImageProcessingMixin

from . import __version__
from .checkpoint import (
    LLAVA_NAMES,
    OUR_NAMES,
    PUBLIC_NAMES,
    STAGE_1,
    STAGE_1_FILE,
    Dropped,
    Fresh,
    Renames,
    Stored,
    check_names,
    check_shapes,
    left_out,
    new_name,
    read_config,
    refuse_code,
    renamed,
    set_align_sizes,
    stored_file,
    stored_parts,
    stored_tensors,
)
from .config import KNOWN_TOWERS, AlignGPTConfig, _tower_config, from_llava, is_public
from .model import fresh_align_weights, saveable, wanted_weights
from .processor import AlignGPTImageProcessor, AlignGPTProcessor, _normalisation

Kind = Literal["aligngpt", "public", "stage-1", "llava"]
Entry = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]  # as `write_weights` takes them
KINDS = {
    "aligngpt": "an AlignGPT folder of ours",
    "public": "a folder of the public AlignGPT code",
    "stage-1": "a stage-1 file of the public AlignGPT code",
    "llava": "a LLaVA folder of transformers",
}
_PIECES = "tokenizer.model"
# What a source of that kind cannot have, and is drawn anew.
_NEW: dict[Kind, tuple[str, ...]] = {
    "llava": ("model.align_table", "model.align_gate."),
    "stage-1": ("model.align_gate.",),
}


@dataclass
class Model:
    """A model between two layouts.

    Attributes:
        weights: every weight once, by our names, in the model's order; nothing of it is read yet.
        given: which of them the source had; the others are new.
        tower: what the source calls its vision tower, if it names one.
        generation: how it generates, where the source says so.
        sentencepiece: the tokenizer's own tokenizer.model, where there is one; older readers want it.
        notes: what its user should know.
    """

    kind: Kind
    config: AlignGPTConfig
    weights: dict[str, Stored]
    given: set[str]
    processor: AlignGPTProcessor
    origin: str
    tower: str | None = None
    generation: GenerationConfig | None = None
    sentencepiece: Path | None = None
    notes: list[str] = field(default_factory=list)

    def entries(self, renames: Renames, dtype: torch.dtype | None) -> list[Entry]:
        """The weights under a target's names, in `dtype` or as they are stored."""
        entries: list[Entry] = []
        for name, stored in self.weights.items():
            target = new_name(name, renames)
            assert target is not None, f"no name for {name}"
            if not isinstance(target, Dropped):
                # What is new has no stored type; it takes the model's.
                kept = dtype or (stored.dtype if name in self.given else self.config.dtype)
                entries.append((target, stored.shape, kept, functools.partial(_cast, name, stored, kept)))
        return entries


@dataclass(frozen=True)
class Options:
    """What the command line gives beside source and target; see `add_arguments`."""

    llm: Path | None = None
    vision: str | None = None
    align_mode: str | None = None
    num_levels: int | None = None
    seed: int = 0
    template: str | None = None
    dtype: torch.dtype | None = None

    @property
    def tower(self) -> Path | None:
        """The tower's folder, where `vision` is one."""
        return Path(self.vision) if self.vision and Path(self.vision).is_dir() else None


def recognised(source: Path) -> Kind:
    """What a folder or file is, by what is in it. ValueError: nothing that can be converted."""
    if source.is_file() or ((source / STAGE_1_FILE).is_file() and not _has_weights(source)):
        return "stage-1"
    if not source.is_dir():
        raise ValueError(f"SOURCE is {source}, which is no folder and no file")
    raw = read_config(source)
    kind = raw.get("model_type")
    if raw.get("quantization_config"):
        raise ValueError(f"{source} holds quantised weights; it needs weights as they were before that")
    if kind == AlignGPTConfig.model_type:
        return "public" if is_public(raw) else "aligngpt"
    if kind == LlavaConfig.model_type and "text_config" in raw:
        return "llava"
    if kind == LlavaConfig.model_type:
        raise ValueError(f"{source} has the layout of the first LLaVA code; it needs the one of transformers")
    raise ValueError(
        f"{source} holds a {kind!r} model; it needs to be {', '.join(list(KINDS.values())[:-1])} or a LLaVA"
    )


def _read_aligngpt(source: Path, options: Options) -> Model:
    config = AlignGPTConfig.from_dict(read_config(source))
    weights, notes = _named(source, OUR_NAMES)
    processor = AlignGPTProcessor.from_pretrained(source)
    if options.llm is not None:
        ours, theirs = processor.tokenizer.get_vocab(), _tokenizer(options.llm).get_vocab()
        if any(ours.get(token) != number for token, number in theirs.items()):
            raise ValueError(f"--llm is {options.llm}, whose tokenizer is not the one of {source}")
    return _model("aligngpt", source, config, weights, processor, options, notes=notes)


def _read_public(source: Path, options: Options) -> Model:
    raw = read_config(source)
    tower = options.vision or raw.get("mm_vision_tower")
    if isinstance(tower, str) and Path(tower).is_dir():
        refuse_code(tower)
    try:
        vision = _tower_config(tower)
    except ValueError as error:
        raise ValueError(
            f"the vision tower of {source} is {tower!r}, neither a local folder nor one of {', '.join(KNOWN_TOWERS)}; "
            "--vision needs to name one of these"
        ) from error
    try:
        config = AlignGPTConfig.from_dict(raw, vision_config=vision)
    except KeyError as error:
        raise ValueError(f"{source / 'config.json'} lacks {error}") from error
    weights, notes = _named(source, PUBLIC_NAMES)
    set_align_sizes(config, weights)
    processor = AlignGPTProcessor.for_model(
        config,
        _image_processor(config, options.tower or source),
        _tokenizer(options.llm or source),
        max_length=raw.get("tokenizer_model_max_length") or 2048,
    )
    if options.template is None:
        notes.append("the public form names no template; v1 is taken (--template)")
    return _model("public", source, config, weights, processor, options, tower=tower, notes=notes)


def _read_stage_1(source: Path, options: Options) -> Model:
    if options.llm is None or options.tower is None:
        raise ValueError(
            f"{source} holds projector and table alone; --llm and --vision need to name the folders of LLM and tower"
        )
    file = source if source.is_file() else source / STAGE_1_FILE
    trained = renamed(stored_file(file), PUBLIC_NAMES, file)
    check_names(trained, STAGE_1, source=str(file))
    config = AlignGPTConfig.from_parts(
        _part_config("--llm", options.llm),
        _part_config("--vision", options.tower),
        image_aspect_ratio="square",  # as the first stage makes its pictures
    )
    parts: dict[str, Stored] = {**stored_parts(options.llm, options.tower), **trained}
    set_align_sizes(config, trained)
    config.lm_head_bias = "lm_head.bias" in parts
    processor = AlignGPTProcessor.for_model(
        config, _image_processor(config, options.tower), _tokenizer(options.llm), "plain"
    )
    notes = [f"the gate is new, drawn from seed {options.seed}: the second stage trains it"]
    return _model("stage-1", file, config, parts, processor, options, tower=options.vision, notes=notes)


def _read_llava(source: Path, options: Options) -> Model:
    size, mean, std, aspect = _llava_pictures(source)
    levels = {} if options.num_levels is None else {"num_align_levels": options.num_levels}
    llava = LlavaConfig.from_dict(read_config(source))
    config = from_llava(llava, image_aspect_ratio=aspect, align_mode=options.align_mode or "none", **levels)
    weights, notes = _named(source, LLAVA_NAMES)
    tokenizer = _tokenizer(options.llm or source)
    processor = AlignGPTProcessor.for_model(config, AlignGPTImageProcessor(size, mean, std, aspect), tokenizer)
    if options.template is None and (tokenizer.chat_template or any(source.glob("chat_template.*"))):
        notes.append("LLaVA-1.5's template v1 is taken, not the folder's chat template (--template)")
    if config.align_mode != "none":
        notes.append(f"table and gate are new, drawn from seed {options.seed}: both stages are to be trained")
    return _model("llava", source, config, weights, processor, options, notes=notes)


def _llava_pictures(source: Path) -> tuple[int, list[float], list[float], str]:
    """Size, mean, deviation and aspect of a LLaVA folder's image processor. ValueError: ours does not work so."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=True)
        size, crop = found["size"], found.get("crop_size")
        short = size if isinstance(size, int) else size.get("shortest_edge")
        crop = crop if isinstance(crop, int) or crop is None else (crop["height"], crop["width"])
        aspect = "pad" if found.get("do_pad") else "square"
        mean, std = found["image_mean"], found["image_std"]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} has no image processor that can be read ({error})") from error
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    wrong = [f"{step} is {found[step]}" for step in steps if not found.get(step, True)]
    if short is None or crop not in (short, (short, short)):
        wrong.append(f"size is {size} and crop_size {found.get('crop_size')}")
    if found.get("resample", 3) != 3:
        wrong.append(f"resample is {found['resample']}, not bicubic")
    if abs(found.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        wrong.append(f"rescale_factor is {found['rescale_factor']}")
    if wrong:
        raise ValueError(
            f"the image processor of {source} cannot be AlignGPT's: {', '.join(wrong)}; it needs to resize the short "
            "side, bicubic, and to crop the centre to the same size"
        )
    return int(short), list(mean), list(std), aspect


READERS: dict[Kind, Callable[[Path, Options], Model]] = {
    "aligngpt": _read_aligngpt,
    "public": _read_public,
    "stage-1": _read_stage_1,
    "llava": _read_llava,
}


def _model(
    kind: Kind,
    source: Path,
    config: AlignGPTConfig,
    weights: Mapping[str, Stored],
    processor: AlignGPTProcessor,
    options: Options,
    *,
    tower: str | None = None,
    notes: list[str],
) -> Model:
    """Put what was read together; whatever does not fit is refused."""
    for name, value in (("--align-mode", options.align_mode), ("--num-levels", options.num_levels)):
        if value is not None and kind != "llava":
            raise ValueError(f"{name} is {value}; only a LLaVA takes it, {source} is {KINDS[kind]}")
    config.check()
    given = set(weights)
    if kind in _NEW:
        fresh = fresh_align_weights(config, options.seed)
        weights = {**weights, **{name: Fresh(fresh[name]) for name in fresh if name.startswith(_NEW[kind])}}
    wanted, tied = wanted_weights(config)
    check_names(weights, wanted, source=str(source), tied=tied)
    check_shapes(weights, wanted, source=str(source))
    for name, twin in tied.items():
        if name in weights:
            _check_tied(weights[name], weights[twin], f"{source} says that {name} is tied to {twin}")
    folders = [folder for folder in (source, options.llm) if folder is not None and folder.is_dir()]
    tokenizer_folders = folders if kind == "aligngpt" else folders[-1:]
    first = next(weights[name] for name in wanted if name.startswith("model.language_model."))
    set_dtype(config, options.dtype or first.dtype)
    config.architectures = ["AlignGPTForConditionalGeneration"]
    _check_processor(processor, config, f"the processor of {source}")
    config.image_aspect_ratio = processor.image_processor.image_aspect_ratio  # what was done, should the two differ
    if options.template is not None:
        processor.template = options.template
    if processor.template == "chat" and not processor.tokenizer.chat_template:
        raise ValueError("--template is chat; the tokenizer needs a chat template for that, and has none")
    return Model(
        kind=kind,
        config=config,
        weights={name: weights[name] for name in wanted},
        given=given,
        processor=processor,
        origin=_origin(kind, source),
        tower=tower,
        generation=next((_generation(f) for f in folders if (f / "generation_config.json").is_file()), None),
        sentencepiece=next((f / _PIECES for f in tokenizer_folders if (f / _PIECES).is_file()), None),
        notes=notes,
    )


def _check_processor(processor: AlignGPTProcessor, config: AlignGPTConfig, what: str) -> None:
    """ValueError: tokenizer or pictures are another model's."""
    words, rows = processor.tokenizer.vocab_size, config.text_config.vocab_size  # of the former without added tokens
    if words > rows:
        raise ValueError(f"{what} has a tokenizer of {words} tokens; the LLM has {rows}, it needs its own (--llm)")
    for name, got, wanted in (
        ("size", processor.image_processor.size, config.vision_config.image_size),
        ("rows_per_image", processor.rows_per_image, config.image_seq_length),
        ("image_token_id", processor.image_token_id, config.image_token_id),
        ("align", processor.align, config.align_mode != "none"),
        ("align_token_id", processor.align_token_id, config.align_token_id),
    ):
        if got != wanted:
            raise ValueError(f"{what} has {name} {got}; the model's config needs {wanted}")


def _named(source: Path, renames: Renames) -> tuple[dict[str, Stored], list[str]]:
    """A folder's weights by our names, and what is left out of it."""
    stored = stored_tensors(source)
    notes = [f"left out {number} weights: {why}" for why, number in left_out(stored, renames).items()]
    weights: dict[str, Stored] = dict(renamed(stored, renames, source))
    return weights, notes


def _check_tied(weight: Stored, twin: Stored, claim: str) -> None:
    """Both may be stored if they are the same."""
    for start in range(0, weight.shape[0], 4096):
        stop = min(start + 4096, weight.shape[0])
        if not torch.equal(weight.read(start, stop), twin.read(start, stop)):
            raise ValueError(f"{claim}, but holds different ones")


def _part_config(flag: str, folder: Path) -> PretrainedConfig:
    if read_config(folder).get("quantization_config"):
        raise ValueError(f"{flag} is {folder}, which holds quantised weights; it needs them as they were before that")
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what is missing or damaged shows as whatever its reader trips over
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{folder} has no tokenizer that can be read ({reason}); --llm names a folder with one"
        ) from error


def _generation(folder: Path) -> GenerationConfig:
    return saveable(GenerationConfig.from_pretrained(folder, local_files_only=True))


def _image_processor(config: AlignGPTConfig, folder: Path) -> AlignGPTImageProcessor:
    return AlignGPTImageProcessor(config.vision_config.image_size, *_normalisation(folder), config.image_aspect_ratio)


def _origin(kind: Kind, source: Path) -> str:
    """A sentence with a hash that tells sources apart: of the config, or of a stage-1 file."""
    file = source if source.is_file() else source / "config.json"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f"Converted from {KINDS[kind]} by aligngpt {__version__}; SHA-256 of its {file.name}: `{digest}`."


def _cast(name: str, stored: Stored, dtype: torch.dtype) -> Tensor:
    source = stored.read()
    tensor = source.to(dtype)
    if dtype == torch.float16 and not torch.equal(tensor.isfinite(), source.isfinite()):
        raise ValueError(f"--dtype is fp16; {name} holds values beyond 65504, it needs bf16 or fp32")
    return tensor


def set_dtype(config: Any, dtype: torch.dtype) -> None:
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype


def _has_weights(folder: Path) -> bool:
    names = ("model.safetensors", "pytorch_model.bin")
    return any((folder / name).is_file() or (folder / f"{name}.index.json").is_file() for name in names)
