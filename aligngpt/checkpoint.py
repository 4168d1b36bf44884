"""Weights in and out: our folders, the public AlignGPT folders, and the parts a new model is built from.

Every reader answers with one table, our state-dict name → `StoredTensor`, and a stored tensor is read a slice at a
time, so that a process takes from disk what it holds and no more. Files are safetensors or PyTorch `.bin` shards; the
latter are unpickled by PyTorch's tensor-only reader (`weights_only=True`) and memory-mapped. Writers stream: a shard is
in memory, never a model.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import AlignGPTConfig, is_public

# Regular expressions, tried in order; the first that matches the start of a stored name renames it. None: dropped.
Renames = tuple[tuple[str, str | None], ...]
PUBLIC_NAMES: Renames = (
    (r"(model\.)?align_indicators\.indicator_embs$", "model.align_table"),
    (r"(model\.)?gated_weight_layer\.mlp\.0\.", "model.align_gate.linear_1."),
    (r"(model\.)?gated_weight_layer\.mlp\.2\.", "model.align_gate.linear_2."),
    (r"(model\.)?mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"(model\.)?mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"(model\.)?vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids$", None),
    (r"(model\.)?vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", None),  # a buffer that the model computes itself
    (r"model\.(layers|norm|embed_tokens)\.", r"model.language_model.\1."),
    (r"lm_head\.", "lm_head."),
)
# LLMs call their body and head differently; buffers that the model computes itself may be stored.
LLM_NAMES: Renames = (
    (
        r"(model|transformer|gpt_neox)\.(layers|h)\.\d+\.(self_attn|attn|attention)\.(rotary_emb\.inv_freq|bias|masked_bias)$",
        None,
    ),
    (r"(model|transformer|gpt_neox)\.", "model.language_model."),
    (r"(lm_head|embed_out)\.", "lm_head."),
)
# A tower's own folder, or a whole CLIP or SigLIP model's with the text half left aside.
VISION_NAMES: Renames = (
    (r"(vision_model\.)?embeddings\.position_ids$", None),
    (r"text_model\.|logit_scale$|logit_bias$|(visual|text)_projection\.", None),
    (r"vision_model\.", "model.vision_tower."),
    (r"(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.", r"model.vision_tower.\1."),
)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class _File:
    """A file of tensors, opened when one is asked for. ValueError: it is none, or it is cut."""

    def __init__(self, path: Path):
        self.path = path
        self.is_bin = path.suffix == ".bin"

    @cached_property
    def tensors(self) -> Any:
        try:
            if not self.is_bin:
                return safe_open(self.path, framework="pt")
            # Files of PyTorch before 1.6 are no zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(self.path)
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            raise ValueError(f"{self.path} is not a whole file of plain tensors: {error}") from error


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read when asked for."""

    file: _File
    name: str  # its name in the file

    @cached_property
    def _handle(self) -> Any:
        tensors = self.file.tensors
        return tensors[self.name] if self.file.is_bin else tensors.get_slice(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._handle.shape if self.file.is_bin else self._handle.get_shape())

    @property
    def dtype(self) -> torch.dtype:
        return self._handle.dtype if self.file.is_bin else _DTYPES[self._handle.get_dtype()]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first dimension; the whole tensor by default."""
        rows = self._handle[start : self.shape[0] if stop is None else stop] if self.shape else self._handle[...]
        return rows.clone() if self.file.is_bin else rows  # a slice of the memory map keeps the file open


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's parsed `config.json`; an error names the folder and what it lacks."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def stored_weights(folder: str | Path) -> dict[str, StoredTensor]:
    """Weights of an AlignGPT folder, ours or the public one, by our names."""
    names = PUBLIC_NAMES if is_public(read_config(folder)) else ((r"(model|lm_head)\.", r"\1."),)
    return _renamed(_stored(folder), names, folder)


def set_align_sizes(config: AlignGPTConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Take from a public folder's weights what its config does not say: how large table and gate are."""
    table, gate = "model.align_table", "model.align_gate.linear_1.weight"
    missing = [name for name in (table, gate) if name not in stored]
    if missing:
        raise ValueError(f"the folder's weights lack {', '.join(missing)}; an AlignGPT folder has them")
    config.num_align_levels, config.gate_hidden_size = stored[table].shape[0], stored[gate].shape[0]


def stored_parts(llm: str | Path, vision: str | Path) -> dict[str, StoredTensor]:
    """Weights of the LLM and the vision tower that a new model is built from, by our names."""
    return _renamed(_stored(llm), LLM_NAMES, llm) | _renamed(_stored(vision), VISION_NAMES, vision)


def check_names(stored: Iterable[str], wanted: Iterable[str], *, source: str, tied: Iterable[str] = ()) -> None:
    """Every wanted name is stored and nothing else; `tied` may be absent. Raises ValueError with the lists."""
    stored, wanted, tied = set(stored), set(wanted), set(tied)
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:12])}{' …' if len(names) > 12 else ''}"
        for what, names in (("missing", wanted - stored - tied), ("left over", stored - wanted - tied))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not hold this model's weights; {'; '.join(problems)}")


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


def _stored(folder: str | Path) -> dict[str, StoredTensor]:
    folder = Path(folder)
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            try:
                weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is no index of weights: {error!r}; it needs a weight_map") from error
            outside = [file for file in weight_map.values() if Path(file).name != file]
            if outside:
                raise ValueError(f"{index} points outside its folder: {outside[0]!r}")
            files = {file: _File(folder / file) for file in set(weight_map.values())}
            return {name: StoredTensor(files[file], name) for name, file in weight_map.items()}
        single = folder / f"{stem}{suffix}"
        if single.is_file():
            file = _File(single)
            return {name: StoredTensor(file, name) for name in file.tensors.keys()}  # noqa: SIM118  not a dict
    raise ValueError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards")


def _renamed(stored: dict[str, StoredTensor], renames: Renames, folder: str | Path) -> dict[str, StoredTensor]:
    result: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        for pattern, replacement in renames:
            if match := re.match(pattern, name):
                if replacement is not None:
                    result[match.expand(replacement) + name[match.end() :]] = tensor
                break
        else:
            raise ValueError(f"{folder} holds a weight with an unknown name: {name}")
    return result
