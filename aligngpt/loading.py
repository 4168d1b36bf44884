"""A model folder to a model that answers, as the commands take it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .model import AlignGPTForConditionalGeneration
    from .processor import AlignGPTProcessor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(folder: str, dtype: str | None) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    """A model that answers, and its processor.

    dtype: a name of `DTYPES`; None: as stored. ValueError: it is no model folder, brings code, or is a public folder
    whose vision tower is not known.
    """
    from transformers.utils import logging

    from .checkpoint import read_config, refuse_code
    from .config import KNOWN_TOWERS, _tower_config, is_public
    from .model import AlignGPTForConditionalGeneration
    from .processor import AlignGPTProcessor

    if not Path(folder).is_dir():
        raise ValueError(f"MODEL is {folder!r}, which is no folder; it needs to be a folder that holds a model")
    refuse_code(folder)
    if is_public(config := read_config(folder)):
        tower = config.get("mm_vision_tower")
        try:
            _tower_config(tower)
        except ValueError as error:  # its advice is for Python
            raise ValueError(
                f"{Path(folder, 'config.json')}: mm_vision_tower is {tower!r}; it needs to be "
                f"{' or '.join(KNOWN_TOWERS)}, or a local folder that holds the vision tower"
            ) from error
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    processor = AlignGPTProcessor.from_pretrained(folder)
    kwargs = {} if dtype is None else {"dtype": DTYPES[dtype]}
    return AlignGPTForConditionalGeneration.from_pretrained(folder, **kwargs).eval(), processor


def find_device(name: str) -> torch.device:
    """What --device names; auto: a GPU if there is one. ValueError: there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}; it needs to be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device is {name!r}; torch sees {torch.cuda.device_count()} GPUs here (aligngpt doctor says why)"
        )
    return device
