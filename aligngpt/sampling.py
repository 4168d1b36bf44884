"""How the next token is chosen, for many rows at once and on the device.

A row's settings lie in tensors, so that rows with different ones share a step. Random numbers are drawn beforehand, on
the host, from the row's own seed, one for each token that it may get: an answer then depends on its own request alone,
is the same on every device up to rounding, and nothing is drawn inside a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from aligngpt_kernels.dispatch import to_device
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen.

    Fields:
        max_new_tokens: the longest answer; 0 is an empty one.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_p: draw among the likeliest tokens that together have this probability (arXiv 1904.09751).
        repetition_penalty: divides the positive logits of tokens that were seen, prompt included, and multiplies the
            negative ones (arXiv 1909.05858).
        stop: strings that end the answer; they are not part of it.
        seed: of the draws.

    Raises:
        ValueError: a value that means nothing.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        texts = isinstance(self.stop, list | tuple) and all(isinstance(text, str) and text for text in self.stop)
        for name, good, needs in (
            ("max_new_tokens", _whole(self.max_new_tokens), "a whole number of at least 0"),
            ("temperature", _single(self.temperature) and self.temperature >= 0, "a float32 number of at least 0"),
            ("top_p", _single(self.top_p) and 0 < self.top_p <= 1, "a share above 0 and up to 1"),
            (
                "repetition_penalty",
                _single(self.repetition_penalty) and self.repetition_penalty > 0,
                "a float32 number above 0",
            ),
            ("stop", texts, "a list of strings, none of them empty"),
            ("seed", _whole(self.seed) and self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it needs to be {needs}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _single(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


class Kind(NamedTuple):
    """What the rows of a step need beside the likeliest token. Steps of each kind are compiled by themselves."""

    draws: bool  # of any row
    penalises: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Kind":
        return cls(any(s.temperature > 0 for s in samplings), any(s.repetition_penalty != 1 for s in samplings))


class Sampler:
    """The settings of `num_rows` rows, what each has drawn and seen, and the choice of their next tokens.

    Args:
        max_new_tokens: of any row.
        suppressed: tokens that are never chosen.
    """

    def __init__(
        self, num_rows: int, vocab_size: int, max_new_tokens: int, suppressed: Sequence[int], device: torch.device
    ):
        numbers: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.temperature = torch.zeros(num_rows, **numbers)
        self.top_p = torch.ones(num_rows, **numbers)
        self.penalty = torch.ones(num_rows, **numbers)
        self.uniform = torch.zeros(num_rows, max_new_tokens, **numbers)
        self.num_chosen = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.seen = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self.suppressed = torch.tensor(suppressed, dtype=torch.long, device=device)

    @property
    def state(self) -> list[Tensor]:
        """What `choose` writes."""
        return [self.num_chosen, self.seen]

    def begin(self, row: int, sampling: Sampling, prompt: Tensor, limit: int) -> None:
        """A new answer of up to `limit` tokens begins in a row. `prompt` (L,): ids within the vocabulary."""
        self.temperature[row] = sampling.temperature
        self.top_p[row] = sampling.top_p
        self.penalty[row] = sampling.repetition_penalty
        self.num_chosen[row] = 0
        device = self.uniform.device
        if sampling.temperature > 0:
            generator = torch.Generator().manual_seed(sampling.seed)
            self.uniform[row, :limit] = to_device(torch.rand(limit, generator=generator, dtype=torch.float32), device)
        if sampling.repetition_penalty != 1:
            self.seen[row] = False
            self.seen[row, to_device(prompt, device)] = True

    def choose(self, logits: Tensor, rows: Tensor, kind: Kind) -> Tensor:  # (R, V), (R,) -> (R,)
        """The next token of some rows."""
        logits = logits.to(self.seen.device, torch.float32)  # the LLM may end on another device
        if self.suppressed.numel():
            logits = logits.index_fill(1, self.suppressed, -torch.inf)
        if kind.penalises:
            penalty = self.penalty[rows, None]
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.seen[rows], penalised, logits)
        if kind.draws:
            last = self.uniform.shape[1] - 1
            uniform = self.uniform[rows, self.num_chosen[rows].clamp(max=last)]  # rows that have ended run on
            tokens = draw(logits, self.temperature[rows], self.top_p[rows], uniform)
        else:
            tokens = logits.argmax(-1)
        self.num_chosen[rows] += 1
        if kind.penalises:
            self.seen[rows, tokens] = True
        return tokens


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:  # (R, V), three of (R,)
    """A token of each row (R,): the one at `uniform` of the cumulative probability of the likeliest.

    Where `temperature` is 0 it is the likeliest token.
    """
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
    scaled = (logits - logits.amax(-1, keepdim=True)) / heat  # below 0, so that the smallest heat overflows to no NaN
    probability, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    kept = torch.where(before < top_p[:, None], probability, 0.0).cumsum(-1)
    place = (kept <= uniform[:, None] * kept[:, -1:]).sum(-1, keepdim=True)
    num_kept = (before < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)  # top_p may round to 0, logits be NaN
    drawn = order.gather(1, torch.minimum(place, num_kept - 1))[:, 0]
    return torch.where(temperature > 0, drawn, logits.argmax(-1))  # probabilities may be equal where logits are not
