"""What both miniatures share: a tokenizer of whole words, two optimizers with one schedule, and a log.

A real run downloads its vision tower and its LLM. The demo trains small ones of the same classes on scenes drawn for
the purpose, and saves them as the ordinary folders that every command takes.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from aligngpt.data.scenes import FACTS

SCENE_WORDS = [value for values in FACTS.values() for value in values]
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
NEWLINE = "\n"

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content + eos_token }}{% else %}{{ message.content + ' : ' }}{% endif %}{% endfor %}"
)


def word_tokenizer(words: Sequence[str], *, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with a token a word, one for the newline, for ":" and for each special token.

    Words are lower-cased; one that is not in `words` becomes `<unk>`. BOS is added, and without a chat template EOS.
    """
    vocabulary = [PAD, UNK, BOS, NEWLINE, ":", *dict.fromkeys(words), EOS]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A" + ("" if chat_template else f" {EOS}"),
        special_tokens=[(token, vocabulary.index(token)) for token in (BOS, EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        chat_template=chat_template,
    )


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for all else; linear warm-up, a plateau, linear decay."""

    def __init__(self, model: nn.Module, *, matrix_lr: float, lr: float, betas: tuple[float, float]):
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
        self.optimizers = (
            torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0.0),
        )
        self.peaks = (matrix_lr, lr)

    def step(self, share: float) -> None:
        """One step at `share` of the peak rates, which also clears the gradients."""
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()


def rate(step: int, total_steps: int) -> float:
    """Share of the peak rate at step 0, 1, …: up over 20 steps, level until half time, then down to a fiftieth."""
    return min((step + 1) / 20, 1.0, max(0.02, (total_steps - step) / (total_steps / 2)))


def arguments(module: str, doc: str, *, width: int, layers: int) -> argparse.ArgumentParser:
    """A miniature's command line, to which it adds its own; `width` and `layers` are its defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the model")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=width, help=f"default: {width}")
    parser.add_argument("--layers", type=int, default=layers, help=f"default: {layers}")
    return parser


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, FOLDER.tmp, that becomes FOLDER when all is written."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    os.replace(temporary, folder)


def run(losses: Iterable[torch.Tensor], optimizers: Optimizers, total_steps: int, folder: Path) -> None:
    """Take `total_steps` losses from a generator that computes them, a step on each; a JSON line a step."""
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as log:
        bar = tqdm(
            zip(range(total_steps), losses, strict=False),
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            disable=None,  # none in a file
        )
        started = time.perf_counter()
        for step, loss in bar:
            loss.backward()
            optimizers.step(rate(step, total_steps))
            now = time.perf_counter()
            value = loss.item()
            assert math.isfinite(value), f"step {step + 1}: the loss is {value}"
            log.write(json.dumps({"step": step + 1, "loss": value, "seconds": now - started}) + "\n")
            log.flush()
            bar.set_postfix_str(f"loss {value:.3f}", refresh=False)
            started = now
