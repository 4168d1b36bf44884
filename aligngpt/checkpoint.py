"""Weights in and out: our folders, the public AlignGPT ones, LLaVA's, and the parts a new model is built from.

Every reader answers with one table, our state-dict name → `StoredTensor`, and a stored tensor is read a slice at a
time, so that a process takes from disk what it holds and no more. Files are safetensors or PyTorch `.bin` shards; the
latter are unpickled by PyTorch's tensor-only reader (`weights_only=True`) and memory-mapped. Writers stream: a shard is
in memory, never a model.

Refused with a `ValueError`: a file that is cut, or holds anything but tensors (nothing in it is run), a name that no
table has, two names for one weight, weights or shapes that are not the model's, a folder that brings code.
"""

import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import AlignGPTConfig, is_public

T = TypeVar("T")


@dataclass(frozen=True)
class Dropped:
    """What becomes of a weight that is left out, and why it may be."""

    why: str


_ROTARY = Dropped("rotary frequencies, which the model computes")
_POSITIONS = Dropped("position numbers, which the model computes")
_MASKS = Dropped("attention masks, which the model computes")
_TEXT_HALF = Dropped("the tower's text half")
_NO_ALIGN = Dropped("table and gate, which align_mode 'none' does not use")

# Regular expressions, tried in order; the first that matches the start of a name renames it or drops the weight.
Renames = tuple[tuple[str, str | Dropped], ...]
PUBLIC_NAMES: Renames = (
    (r"(model\.)?align_indicators\.indicator_embs$", "model.align_table"),
    (r"(model\.)?gated_weight_layer\.mlp\.0\.", "model.align_gate.linear_1."),
    (r"(model\.)?gated_weight_layer\.mlp\.2\.", "model.align_gate.linear_2."),
    (r"(model\.)?mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"(model\.)?mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"(model\.)?vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids$", _POSITIONS),
    (r"(model\.)?vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", _ROTARY),
    (r"model\.(layers|norm|embed_tokens)\.", r"model.language_model.\1."),
    (r"lm_head\.", "lm_head."),
)
TO_PUBLIC: Renames = (
    (r"model\.align_table$", "align_indicators.indicator_embs"),
    (r"model\.align_gate\.linear_1\.", "gated_weight_layer.mlp.0."),
    (r"model\.align_gate\.linear_2\.", "gated_weight_layer.mlp.2."),
    (r"model\.multi_modal_projector\.linear_1\.", "mm_projector.0."),
    (r"model\.multi_modal_projector\.linear_2\.", "mm_projector.2."),
    (r"model\.vision_tower\.", "vision_tower.vision_tower.vision_model."),
    (r"model\.language_model\.", "model."),
    (r"lm_head\.", "lm_head."),
)
# What the public code's first stage leaves, by our names; it is stored under the public ones.
STAGE_1_FILE = "mm_projector_align.bin"
STAGE_1 = (
    "model.align_table",
    "model.multi_modal_projector.linear_1.weight",
    "model.multi_modal_projector.linear_1.bias",
    "model.multi_modal_projector.linear_2.weight",
    "model.multi_modal_projector.linear_2.bias",
)
# LLaVA of transformers: folders of its first years, of today's, and a model's own names.
LLAVA_NAMES: Renames = (
    (r"(model\.language_model|language_model\.model)\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", _ROTARY),
    (r"(model\.)?vision_tower\.(vision_model\.)?embeddings\.position_ids$", _POSITIONS),
    (r"(language_model\.)?lm_head\.", "lm_head."),
    (r"(model\.language_model|language_model\.model)\.", "model.language_model."),
    (r"(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
)
TO_LLAVA: Renames = (  # the first years' names: every version reads them
    (r"model\.align_(table|gate)", _NO_ALIGN),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.vision_tower\.", "vision_tower.vision_model."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
)
OUR_NAMES: Renames = ((r"(model|lm_head)\.", r"\1."),)
# LLMs call their body and head differently.
_LAYER = r"(model|transformer|gpt_neox)\.(layers|h)\.\d+\.(self_attn|attn|attention)\."
LLM_NAMES: Renames = (
    (_LAYER + r"rotary_emb\.inv_freq$", _ROTARY),
    (_LAYER + r"(bias|masked_bias)$", _MASKS),
    (r"(model|transformer|gpt_neox)\.", "model.language_model."),
    (r"(lm_head|embed_out)\.", "lm_head."),
)
# A tower's own folder, or a whole CLIP or SigLIP model's with the text half left aside.
VISION_NAMES: Renames = (
    (r"(vision_model\.)?embeddings\.position_ids$", _POSITIONS),
    (r"text_model\.|logit_scale$|logit_bias$|(visual|text)_projection\.", _TEXT_HALF),
    (r"vision_model\.", "model.vision_tower."),
    (r"(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.", r"model.vision_tower.\1."),
)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# A mapped file's pages count as the process's memory once they are read; beyond this many bytes it is mapped anew.
_MAPPED_BYTES = 2**26


class _File:
    """A file of tensors, opened when one is asked for. ValueError: it is none, or it is cut."""

    def __init__(self, path: Path):
        self.path = path
        self.is_bin = path.suffix == ".bin"
        self.is_mapped = True
        self._read_bytes = 0

    @cached_property
    def tensors(self) -> Any:
        try:
            if not self.is_bin:
                return safe_open(self.path, framework="pt")
            # Files of PyTorch before 1.6 are no zip archives and cannot be mapped.
            self.is_mapped = zipfile.is_zipfile(self.path)
            tensors = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.is_mapped)
        except pickle.UnpicklingError as error:  # PyTorch's own words say how to run it
            raise ValueError(
                f"{self.path} is not a whole file of plain tensors: it is damaged or holds objects of code, which "
                "AlignGPT does not run"
            ) from error
        except Exception as error:
            raise ValueError(f"{self.path} is not a whole file of plain tensors: {error}") from error
        others = [] if isinstance(tensors, Mapping) else [type(tensors).__name__]
        others += [] if others else [str(name) for name, value in tensors.items() if not _is_plain(value)]
        if others:
            raise ValueError(f"{self.path} is not a whole file of plain tensors: it holds {others[0]}")
        return tensors

    def read(self, tensor: Any, key: Any) -> Tensor:
        """Its own copy of a part of one of the file's tensors."""
        part = tensor[key].clone()
        self._read_bytes += part.nbytes
        if self.is_mapped and self._read_bytes > _MAPPED_BYTES:
            self.__dict__.pop("tensors", None)
            self._read_bytes = 0
        return part


def _is_plain(value: Any) -> bool:
    """A tensor with every number in it: not sparse, not without values, not in steps of a scale."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
    )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read when asked for."""

    file: _File
    name: str  # its name in the file

    @property
    def _handle(self) -> Any:
        tensors = self.file.tensors
        try:
            return tensors[self.name] if self.file.is_bin else tensors.get_slice(self.name)
        except (KeyError, SafetensorError) as error:
            raise ValueError(f"{self.file.path} lacks {self.name}, which its index puts there") from error

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._handle.shape if self.file.is_bin else self._handle.get_shape())

    @property
    def dtype(self) -> torch.dtype:
        dtype = self._handle.dtype if self.file.is_bin else self._handle.get_dtype()
        if dtype not in (_DTYPES.values() if self.file.is_bin else _DTYPES):
            raise ValueError(
                f"{self.file.path} holds {self.name} as {dtype}; it needs to be one of {', '.join(_DTYPES)}"
            )
        return dtype if self.file.is_bin else _DTYPES[dtype]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first dimension; the whole tensor by default."""
        handle, shape = self._handle, self.shape
        return self.file.read(handle, slice(start, shape[0] if stop is None else stop) if shape else ...)


class Stored(Protocol):
    """A tensor that is read a slice of rows at a time: from a file (`StoredTensor`), or from memory (`Fresh`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int = 0, stop: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Fresh:
    """A newly drawn tensor, read like a stored one; the same in every process."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensor[start:stop]


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's parsed `config.json`; an error names the folder and what it lacks."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; it needs to be a JSON object")
    return config


# What transformers would read code from, or names to import; a vocabulary may hold such a word.
_CODE_KEYS = ("auto_map", "custom_pipelines")
_NO_SETTINGS = ("tokenizer.json", "vocab.json", "added_tokens.json")


def refuse_code(folder: str | Path) -> None:
    """ValueError: a JSON file of the folder names code to run. Nothing is imported or run to find out."""
    for file in sorted(Path(folder).glob("*.json")):
        if file.name in _NO_SETTINGS or file.name.endswith(".index.json"):
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue  # whoever needs the file says so
        if key := next((key for key in _CODE_KEYS if _holds(content, key)), None):
            raise ValueError(f"{file} has {key}, which names code to run; AlignGPT runs none: remove the entry")


def _holds(content: Any, key: str) -> bool:
    if isinstance(content, dict):
        return key in content or any(_holds(value, key) for value in content.values())
    return isinstance(content, list) and any(_holds(value, key) for value in content)


def stored_weights(folder: str | Path) -> dict[str, StoredTensor]:
    """Weights of an AlignGPT folder, ours or the public one, by our names."""
    names = PUBLIC_NAMES if is_public(read_config(folder)) else OUR_NAMES
    return renamed(stored_tensors(folder), names, folder)


def set_align_sizes(config: AlignGPTConfig, stored: Mapping[str, Stored]) -> None:
    """Take from a public folder's weights what its config does not say: how large table and gate are.

    What is missing there stays as it is: `check_names` says so, with all else that is missing.
    """
    for field, name in (
        ("num_align_levels", "model.align_table"),
        ("gate_hidden_size", "model.align_gate.linear_1.weight"),
    ):
        if name in stored and stored[name].shape:
            setattr(config, field, stored[name].shape[0])


def stored_parts(llm: str | Path, vision: str | Path) -> dict[str, StoredTensor]:
    """Weights of the LLM and the vision tower that a new model is built from, by our names."""
    return renamed(stored_tensors(llm), LLM_NAMES, llm) | renamed(stored_tensors(vision), VISION_NAMES, vision)


def check_names(stored: Iterable[str], wanted: Iterable[str], *, source: str, tied: Iterable[str] = ()) -> None:
    """Every wanted name is stored and nothing else; `tied` may be absent. Raises ValueError with the lists."""
    stored, wanted, tied = set(stored), set(wanted), set(tied)
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (("missing", wanted - stored - tied), ("left over", stored - wanted - tied))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not hold this model's weights; {'; '.join(problems)}")


def check_shapes(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, source: str) -> None:
    """Every stored weight that is wanted has the wanted shape. Raises ValueError with the list."""
    wrong = [
        f"{name} is {tuple(stored[name].shape)}, the config says {tuple(wanted[name].shape)}"
        for name in wanted
        if name in stored and tuple(stored[name].shape) != tuple(wanted[name].shape)
    ]
    if wrong:
        raise ValueError(
            f"{source} does not hold this model's weights; {len(wrong)} of another shape: {_listed(wrong)}"
        )


def write_weights(
    folder: str | Path,
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]],
    *,
    max_shard_bytes: int = 5 * 2**30,
    write: bool = True,
) -> None:
    """Write safetensors shards and their index, one shard in memory at a time.

    Args:
        tensors: (name, shape, dtype, make); `make()` is called once for each, in order, in every process: it may
            gather a sharded tensor.
        write: False in the processes that only take part in gathering.
    """
    entries = list(tensors)
    shards: list[list[int]] = [[]]
    filled = total = 0
    for index, (_, shape, dtype, _) in enumerate(entries):
        size = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += size
        total += size

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held: dict[str, Tensor] = {}
        for index in shard:
            name, shape, dtype, make = entries[index]
            tensor = make()
            if write:
                held[name] = tensor.detach().to("cpu", dtype).contiguous()
                assert held[name].shape == torch.Size(shape), f"{name}: {tuple(held[name].shape)} is not {shape}"
                weight_map[name] = file
            del tensor
        if write:
            save_file(held, Path(folder) / file, metadata={"format": "pt"})
    if write and len(shards) > 1:
        index_file = Path(folder) / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """A folder's weights by the names in its files, whether or not an index lists them.

    ValueError: the folder holds none, or its index is no index.
    """
    folder = Path(folder)
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            try:
                weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                outside = [file for file in weight_map.values() if Path(file).name != file]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is no index of weights: {error!r}; it needs a weight_map") from error
            if outside:
                raise ValueError(f"{index} points outside its folder: {outside[0]!r}")
            files = {file: _File(folder / file) for file in sorted(set(weight_map.values()))}
            held = {name: StoredTensor(file, name) for file in files.values() for name in _names(file)}
            return held | {name: StoredTensor(files[file], name) for name, file in weight_map.items()}
        single = folder / f"{stem}{suffix}"
        if single.is_file():
            return stored_file(single)
    raise ValueError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards")


def stored_file(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of one file by their names in it."""
    file = _File(Path(path))
    return {name: StoredTensor(file, name) for name in _names(file)}


def _names(file: _File) -> list[str]:
    return list(file.tensors.keys())


def renamed(stored: Mapping[str, T], renames: Renames, source: str | Path) -> dict[str, T]:
    """A table under other names, without what is dropped. ValueError lists names that `renames` does not know."""
    result: dict[str, T] = {}
    unknown = []
    for name, tensor in stored.items():
        new = new_name(name, renames)
        if new is None:
            unknown.append(name)
        elif new in result:
            raise ValueError(f"{source} holds {new} twice, once as {name}")
        elif not isinstance(new, Dropped):
            result[new] = tensor
    if unknown:
        raise ValueError(f"{source} holds {len(unknown)} weights with an unknown name: {_listed(unknown)}")
    return result


def left_out(names: Iterable[str], renames: Renames) -> dict[str, int]:
    """How many weights `renames` drops, by the reason."""
    found = (new_name(name, renames) for name in names)
    return dict(Counter(new.why for new in found if isinstance(new, Dropped)))


def new_name(name: str, renames: Renames) -> str | Dropped | None:
    """What `renames` makes of a name; None: it does not know it."""
    for pattern, new in renames:
        if match := re.match(pattern, name):
            return new if isinstance(new, Dropped) else match.expand(new) + name[match.end() :]
    return None


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
