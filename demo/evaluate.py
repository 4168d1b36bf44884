"""What the demo's models get right on pictures they never saw: captions by level, answers by kind of question."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase

from aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from aligngpt.data.llava_json import Sample, read_llava_json
from aligngpt.data.scenes import FACTS, KINDS, Scene, fact_precision, parse_caption, read_scenes
from aligngpt.data.tables import read_table

BATCH = 250
SEED = 1  # of sampling


@dataclass(frozen=True)
class Speaker:
    """A model folder, loaded."""

    model: AlignGPTForConditionalGeneration
    processor: AlignGPTProcessor

    @classmethod
    def load(cls, folder: Path) -> "Speaker":
        return cls(AlignGPTForConditionalGeneration.from_pretrained(folder), AlignGPTProcessor.from_pretrained(folder))

    def prompt(self, pictures: Sequence[Path], prompts: Sequence[str]) -> BatchFeature:
        """One conversation for each picture, its prompt after it."""
        return self.processor.apply_chat_template(
            [
                [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
                for picture, prompt in zip(pictures, prompts, strict=True)
            ],
            tokenize=True,
        ).to(self.model.device)

    def say(
        self, pictures: Sequence[Path], prompts: Sequence[str], *, level: int | None = None, sample: bool = False
    ) -> list[str]:
        """What it says to each picture with its prompt, greedily or sampled at temperature 1.

        level: the alignment level of all of them; None leaves it to the gate, or to nothing where there is no token.
        """
        torch.manual_seed(SEED)
        said: list[str] = []
        for start in range(0, len(pictures), BATCH):
            inputs = self.prompt(pictures[start : start + BATCH], prompts[start : start + BATCH])
            said += self.go_on(inputs, level=level, sample=sample)
        return said

    def go_on(self, inputs: BatchFeature, *, level: int | None, sample: bool) -> list[str]:
        """What it says after prompts, one batch of them; arguments as `say`'s, which sets the seed."""
        tokenizer = self.processor.tokenizer
        newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
        ends = [tokenizer.eos_token_id, newline]  # of an answer, of a caption
        options: dict[str, Any] = {"do_sample": sample} | ({"temperature": 1.0, "top_k": 0} if sample else {})
        rows, length = inputs["input_ids"].shape
        if level is not None:
            options["align_levels"] = torch.full((rows,), level, device=self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=room(tokenizer), eos_token_id=ends, **options)
        texts = self.processor.batch_decode(tokens[:, length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def gate(self, pictures: Sequence[Path], prompts: Sequence[str]) -> Tensor:
        """The gate's weights of the local levels, (pictures, N - 1)."""
        inputs = self.prompt(pictures, prompts)
        weights = self.model.model.embed(
            inputs["input_ids"],
            inputs["pixel_values"],
            attention_mask=inputs["attention_mask"],
            gate_mask=inputs["gate_mask"],
        )[1]
        assert weights is not None
        return weights


def room(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens for a caption of three objects, and two more; an answer takes fewer."""
    lengths = [max(len(tokenizer.encode(f" {v}", add_special_tokens=False)) for v in vs) for vs in FACTS.values()]
    return 3 * sum(lengths) + 5  # "and" twice, the newline


# ---------------------------------------------------------------------------------------------------- levels


def evaluate_levels(levels: Path, pairs: Path) -> dict[str, Any]:
    """How well the scores found the true alignment: the rank correlation of the two, and its mean in each level."""
    table, _ = read_table(levels, "levels")
    truth = np.array([record["alignment"] for record in json.loads(pairs.read_text(encoding="utf-8"))])
    level = table["level"].to_numpy()
    return {
        "rank correlation": float(np.corrcoef(_ranks(table["score"].to_numpy()), _ranks(truth))[0, 1]),
        "mean true alignment": [float(truth[level == number].mean()) for number in range(level.max() + 1)],
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


# ---------------------------------------------------------------------------------------------------- captions


def evaluate_captions(
    speaker: Speaker, folder: Path, *, level: int | None, another_picture: bool = False
) -> dict[str, float]:
    """Captions of a folder's scenes with two objects or more: the share of true facts among those stated, and the F1 of
    whole objects with all five facts right; sampled and greedy.

    another_picture: hold each caption against another picture's scene, which shows what is right by chance.
    """
    scenes = {number: scene for number, scene in enumerate(read_scenes(folder)) if len(scene) >= 2}
    pictures = [folder / f"images/{number:05d}.jpg" for number in scenes]
    truth = list(scenes.values())
    if another_picture:
        truth = others(truth)
    scores: dict[str, float] = {}
    for way, sample in (("sampled", True), ("greedy", False)):
        said = speaker.say(pictures, [""] * len(pictures), level=level, sample=sample)
        scores[f"{way} fact precision"], scores[f"{way} object F1"] = score_captions(said, truth)
    return scores


def others(items: list[Any]) -> list[Any]:
    """Every item in another's place."""
    half = len(items) // 2
    return items[half:] + items[:half]


def score_captions(captions: Sequence[str], scenes: Sequence[Scene]) -> tuple[float, float]:
    """Fact precision and object F1, each over all captions together."""
    true = stated = right = claimed = there = 0
    for text, scene in zip(captions, scenes, strict=True):
        facts_true, facts_stated = fact_precision(text, scene)
        claims = [tuple(claim.get(fact) for fact in FACTS) for claim in parse_caption(text)]
        things = {tuple(getattr(thing, fact) for fact in FACTS) for thing in scene}
        true, stated = true + facts_true, stated + facts_stated
        right, claimed, there = right + len(things & set(claims)), claimed + len(claims), there + len(things)
    return true / max(stated, 1), 2 * right / (claimed + there)


# ---------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Asked:
    """A question of a scenes folder, with what evaluation knows about it."""

    sample: Sample
    kind: str
    guesses: list[str]  # the answer for each of the scene's objects, if the question is about one
    picture: Path
    scene: Scene

    @property
    def prompt(self) -> str:
        return self.sample.turns[0].text.removeprefix("<image>\n")

    @property
    def answer(self) -> str:
        return self.sample.turns[1].text


def read_questions(folder: Path) -> list[Asked]:
    """A folder's questions about scenes with two objects or more. Of the presence questions answered "no" only those
    count that put together a color and a shape which are both in the scene."""
    scenes = read_scenes(folder)
    records = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    asked = []
    for sample, record in zip(read_llava_json(folder / "questions.json"), records, strict=True):
        scene = scenes[int(sample.id.split()[0])]
        question = Asked(sample, record["kind"], record["guesses"], folder / sample.images[0], scene)
        if len(scene) >= 2 and not (question.answer == "no" and not recombines(question)):
            asked.append(question)
    return asked


def recombines(question: Asked) -> bool:
    """Whether color and shape of a presence question are both in the scene."""
    words = set(question.prompt.split())
    return any(t.color in words for t in question.scene) and any(t.shape in words for t in question.scene)


def evaluate_answers(speaker: Speaker, folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy by kind of question, beside two references.

    reference: `any_object` where the question is about one, else `majority`.
    another picture: the model's own answers, each shown another question's picture.
    """
    asked = read_questions(folder)
    pictures, prompts = [question.picture for question in asked], [question.prompt for question in asked]
    said = speaker.say(pictures, prompts)
    said_blind = speaker.say(others(pictures), prompts)
    answers = [question.answer for question in asked]
    accuracy = accuracies(asked, [a == b for a, b in zip(said, answers, strict=True)])
    blind = accuracies(asked, [a == b for a, b in zip(said_blind, answers, strict=True)])
    reference = majority(asked) | any_object(asked)
    counts = Counter(question.kind for question in asked)
    return {
        kind: {
            "questions": counts[kind],
            "accuracy": accuracy[kind],
            "reference": reference[kind],
            "another picture": blind[kind],
        }
        for kind in accuracy
    }


def accuracies(asked: Sequence[Asked], right: Sequence[bool]) -> dict[str, float]:
    """The share of right answers by kind of question, of the kinds that were asked.

    Presence is the mean of the shares on its two answers, since more questions are left with "yes".
    """
    shares = {}
    for kind, rows in _by_kind(asked).items():
        counts = Counter(asked[row].answer for row in rows)
        each = [len(counts) * counts[asked[row].answer] if kind == "presence" else len(rows) for row in rows]
        shares[kind] = sum(1 / number for row, number in zip(rows, each, strict=True) if right[row])
    return shares


def any_object(asked: Sequence[Asked]) -> dict[str, float]:
    """What answering for an object of the scene chosen at random would get, by kind of question about one."""
    return {
        kind: sum(asked[row].guesses.count(asked[row].answer) / len(asked[row].guesses) for row in rows) / len(rows)
        for kind, rows in _by_kind(asked).items()
        if asked[rows[0]].guesses
    }


def majority(asked: Sequence[Asked]) -> dict[str, float]:
    """What always giving the commonest answer would get, by kind of question; presence as in `accuracies`."""
    shares = {}
    for kind, rows in _by_kind(asked).items():
        counts = Counter(asked[row].answer for row in rows)
        shares[kind] = 1 / len(counts) if kind == "presence" else max(counts.values()) / len(rows)
    return shares


def _by_kind(asked: Sequence[Asked]) -> dict[str, list[int]]:
    """Which questions are of a kind, for each that there is one of, in the order of `KINDS`."""
    rows = {kind: [row for row, question in enumerate(asked) if question.kind == kind] for kind in KINDS}
    return {kind: places for kind, places in rows.items() if places}
