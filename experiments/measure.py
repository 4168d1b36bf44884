"""`python -m experiments.measure STAGE MODEL SCENES OUT.json`: what a trained model does on scenes it never saw.

    stage-1   captions at every level the model has: what of them is true, and how likely the true one is
    stage-2   answers by kind of question, at fixed levels too, beside references; what the gate goes by

SCENES holds the folders `validation` (stage 1 alone) and `test`, drawn by `aligngpt.data.scenes`; scenes of one object
are left out.
Level "none" is that of a model without an alignment token.

Captions are generated, greedily and sampled. All else is read off a single pass over a prompt and its right
continuation: an answer counts as right if each of its tokens, the end included, is the likeliest after those before it,
which is when greedy decoding says it. OUT.json is written whole or not at all.

ValueError: the model was trained for the other stage.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchFeature
from transformers.utils import logging

from aligngpt.batch import Example
from aligngpt.data.llava_json import Sample, read_llava_json
from aligngpt.data.scenes import Scene, caption, parse_caption, read_scenes
from aligngpt.data.tables import prepare_outputs, write_json
from aligngpt.text import IMAGE_MARK, Turn
from demo.evaluate import (
    SEED,
    Asked,
    Speaker,
    accuracies,
    any_object,
    majority,
    others,
    read_questions,
    score_captions,
)

BATCH = 250
# The first so many of a split: choices need fewer than what is reported, and each model is read at all its levels.
PICTURES = {"validation": 200, "test": 600}
QUESTIONS = {"test": 2400}  # nothing is chosen by them
QUESTIONS_BY_LEVEL = 800
SAMPLES = 6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.measure", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("stage-1", "stage-2"))
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("scenes", type=Path, help="folder that holds validation and test")
    parser.add_argument("out", type=Path, help="JSON file that is written")
    args = parser.parse_args()
    logging.disable_progress_bar()  # a bar for each model that is loaded
    try:
        prepare_outputs([("out", args.out)], [])
        speaker = Speaker.load(args.model)
        speaker.model.to("cuda" if torch.cuda.is_available() else "cpu")
        found = (measure_captions if args.stage == "stage-1" else measure_answers)(speaker, args.scenes)
        write_json(args.out, found, indent=1)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


class Reading(NamedTuple):
    """What a model makes of a text's supervised tokens (T,): the likeliest in the place of each, and its nats."""

    tokens: Tensor
    likeliest: Tensor
    nll: Tensor

    @property
    def is_said(self) -> bool:
        """Whether greedy decoding says them."""
        return torch.equal(self.tokens, self.likeliest)


@torch.no_grad()
def read(speaker: Speaker, examples: Sequence[Example], level: int | None = None) -> list[Reading]:
    """Each example read at an alignment level; None leaves it to the gate, or to nothing where there is no token."""
    model = speaker.model
    readings: list[Reading] = []
    for start in range(0, len(examples), BATCH):
        chunk = [replace(example, level=level) for example in examples[start : start + BATCH]]
        batch = speaker.processor.collate(chunk).to(model.device)
        inputs = {name: value for name, value in batch.model_inputs().items() if name not in ("labels", "rows")}
        hidden = model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        logits = model.lm_head(hidden[batch.rows]).float()
        tokens = batch.input_ids.flatten()[batch.rows + 1]
        columns = tokens, logits.argmax(-1), F.cross_entropy(logits, tokens, reduction="none")
        lengths = [example.text.num_supervised for example in chunk]
        readings += map(Reading, *(column.cpu().split(lengths) for column in columns))
    return readings


def mean_nll(readings: Sequence[Reading]) -> float:
    """Nats per token, over all tokens."""
    return torch.cat([reading.nll for reading in readings]).double().mean().item()


def with_pictures(speaker: Speaker, samples: Sequence[Sample], pictures: Sequence[Path]) -> list[Example]:
    """Samples of a picture each, to be read."""
    pixels = speaker.processor.image_processor.pixels(list(pictures))
    return [
        Example(sample.id, speaker.processor.text(sample), image[None])
        for sample, image in zip(samples, pixels, strict=True)
    ]


def with_other_pictures(examples: Sequence[Example]) -> list[Example]:
    """The same texts, each with another's picture."""
    return [
        replace(example, pixel_values=other.pixel_values)
        for example, other in zip(examples, others(list(examples)), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------- captions


@dataclass(frozen=True)
class Pictures:
    """Pictures of two objects or more: their scenes by number, the prompts for captions, and the true captions."""

    scenes: dict[int, Scene]
    prompts: list[BatchFeature]
    captions: list[Example]

    @classmethod
    def of(cls, folder: Path, number: int, speaker: Speaker) -> "Pictures":
        """The first `number` of a folder."""
        scenes = [(place, scene) for place, scene in enumerate(read_scenes(folder)) if len(scene) >= 2][:number]
        files = [f"images/{place:05d}.jpg" for place, _ in scenes]
        paths = [folder / file for file in files]
        prompts = [
            speaker.prompt(paths[start : start + BATCH], [""] * len(paths[start : start + BATCH]))
            for start in range(0, len(paths), BATCH)
        ]
        pixels = torch.cat([prompt["pixel_values"] for prompt in prompts]).cpu()
        captions = []
        for (place, scene), file, image in zip(scenes, files, pixels, strict=True):
            turns = (Turn("user", f"{IMAGE_MARK}\n"), Turn("assistant", caption(scene)))
            text = speaker.processor.text(Sample(file, (file,), turns, None, place))
            captions.append(Example(file, text, image[None]))
        return cls(dict(scenes), prompts, captions)


def measure_captions(speaker: Speaker, scenes: Path) -> dict[str, Any]:
    """Scores by split and level, and some greedy captions of the lowest, a middle and the highest level."""
    config = speaker.model.config
    if speaker.processor.template != "plain":
        raise ValueError(f"model writes in the template {speaker.processor.template!r}; stage 1 needs 'plain'")
    no_token: dict[str, int | None] = {"none": None}
    levels = (
        no_token if config.align_mode == "none" else {str(level): level for level in range(config.num_align_levels)}
    )
    found: dict[str, Any] = {}
    for split, number in PICTURES.items():
        pictures = Pictures.of(scenes / split, number, speaker)
        measured = {name: measure_level(speaker, pictures, level) for name, level in levels.items()}
        found[split] = {name: scores for name, (scores, _) in measured.items()}
    names = list(measured)
    shown = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
    found["samples"] = [
        {
            "scene": [astuple(thing) for thing in scene],
            "picture": place,
            "captions": {name: measured[name][1][row] for name in shown},
        }
        for row, (place, scene) in enumerate(list(pictures.scenes.items())[:SAMPLES])
    ]
    if (emoji := scenes / "test/emoji.json").exists():
        found["emoji"] = measure_names(speaker, emoji, levels)
    return found


def measure_names(speaker: Speaker, file: Path, levels: Mapping[str, int | None]) -> dict[str, dict[str, float]]:
    """By level the nats a token of each picture's name, given it and given another picture."""
    samples = read_llava_json(file)
    examples = with_pictures(speaker, samples, [file.parent / sample.images[0] for sample in samples])
    swapped = with_other_pictures(examples)
    return {
        name: {
            "name NLL": mean_nll(read(speaker, examples, level)),
            "another picture": mean_nll(read(speaker, swapped, level)),
        }
        for name, level in levels.items()
    }


def measure_level(speaker: Speaker, pictures: Pictures, level: int | None) -> tuple[dict[str, float], list[str]]:
    """Scores at a level, and the greedy captions."""
    truth = list(pictures.scenes.values())
    scores: dict[str, float] = {}
    for way in ("sampled", "greedy"):
        torch.manual_seed(SEED)  # the same draws at each level, of each model
        said = [
            text for prompt in pictures.prompts for text in speaker.go_on(prompt, level=level, sample=way == "sampled")
        ]
        precision, f1 = score_captions(said, truth)
        scores |= {f"{way} fact precision": precision, f"{way} object F1": f1}
        scores[f"{way} hallucination"] = hallucination(said, truth)
    scores["clean caption NLL"] = mean_nll(read(speaker, pictures.captions, level))
    return scores, said


def hallucination(captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Of the things that captions name, the share that is not there; over all captions together, each thing counted
    once in a caption. A thing is a color with a shape."""
    named = missing = 0
    for text, scene in zip(captions, scenes, strict=True):
        claims = {(claim.get("color"), claim.get("shape")) for claim in parse_caption(text)}
        things = {(color, shape) for color, shape in claims if color and shape}
        named += len(things)
        missing += len(things - {(thing.color, thing.shape) for thing in scene})
    return missing / max(named, 1)


# ---------------------------------------------------------------------------------------------------- answers


def measure_answers(speaker: Speaker, scenes: Path) -> dict[str, Any]:
    """Scores on the test split."""
    if speaker.processor.template == "plain":
        raise ValueError("model writes in the template 'plain'; stage 2 needs one for questions")
    speaker.processor.gate_text = "prompt"  # when one asks there is no answer yet for the gate to read
    found = {}
    for split, number in QUESTIONS.items():
        asked = read_questions(scenes / split)[:number]
        pictures = [question.picture for question in asked]
        examples = with_pictures(speaker, [question.sample for question in asked], pictures)
        found[split] = score_answers(speaker, asked, examples)
    return found


def score_answers(speaker: Speaker, asked: Sequence[Asked], examples: Sequence[Example]) -> dict[str, Any]:
    """Everything about one split's questions."""
    config = speaker.model.config
    answers = read(speaker, examples)
    swapped = with_other_pictures(examples)
    presence = [
        (speaker.processor.decode(reading.likeliest[:1]).strip() == "yes", question.answer == "yes")
        for question, reading in zip(asked, answers, strict=True)
        if question.kind == "presence"
    ]
    found: dict[str, Any] = {
        "questions": Counter(question.kind for question in asked),
        "accuracy": accuracies(asked, [reading.is_said for reading in answers]),
        "another picture": accuracies(asked, [reading.is_said for reading in read(speaker, swapped)]),
        "any object": any_object(asked),
        "majority": majority(asked),
        "presence": score_presence(presence),
        "answer NLL": mean_nll(answers),
    }
    if config.align_mode != "none":
        few, own = asked[:QUESTIONS_BY_LEVEL], answers[:QUESTIONS_BY_LEVEL]
        by_level = [read(speaker, examples[: len(few)], level) for level in range(config.num_align_levels)]
        found["by level"] = {
            "accuracy": [mean_accuracy(few, readings) for readings in by_level],
            "NLL": [mean_nll(readings) for readings in by_level],
            "own accuracy": mean_accuracy(few, own),
            "own NLL": mean_nll(own),
        }
    if config.align_mode in ("adaptive", "local"):
        found["gate"] = describe_gate(speaker, [question.kind for question in asked], examples)
    return found


def mean_accuracy(asked: Sequence[Asked], answers: Sequence[Reading]) -> float:
    """Each kind of question counts the same."""
    return fmean(accuracies(asked, [reading.is_said for reading in answers]).values())


def score_presence(said: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """As POPE's, of pairs: whether "yes" was said, and whether it is right. 0 where there is nothing to divide by.

    yes share: of what was said; yes among answers: of what is right.
    """
    count = Counter(said)
    hits, claims, there = (
        count[True, True],
        count[True, True] + count[True, False],
        count[True, True] + count[False, True],
    )
    return {
        "precision": hits / max(claims, 1),
        "recall": hits / max(there, 1),
        "F1": 2 * hits / max(claims + there, 1),
        "yes share": claims / max(len(said), 1),
        "yes among answers": there / max(len(said), 1),
    }


# ---------------------------------------------------------------------------------------------------- the gate


@torch.no_grad()
def describe_gate(speaker: Speaker, kinds: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
    """How the gate weighs the local levels, how much that depends on the question, and on what scale it works."""
    model = speaker.model.model
    seen = []
    for start in range(0, len(examples), BATCH):
        batch = speaker.processor.collate(examples[start : start + BATCH]).to(model.device)
        seen.append(
            model.alignment(
                batch.input_ids,
                batch.pixel_values,
                attention_mask=batch.attention_mask,
                gate_mask=batch.gate_mask,
                plan=batch.plan,
            )
        )
    dots, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
    gate, table = model.align_gate, model.align_table
    logits = gate.linear_2(F.gelu(gate.linear_1(dots)))
    weights = weights.double().cpu()
    return {
        "weights": {kind: mean.tolist() for kind, (_, mean) in _means(weights, kinds).items()},
        "mutual information": mutual_information(weights, kinds),
        "entropy": entropy(weights).mean().item(),
        "dots std": dots.std().item(),
        "logits std": logits.std(0).mean().item(),
        "table distance": (F.pdist(table).mean() / table.norm(dim=1).mean()).item(),
    }


def mutual_information(weights: Tensor, kinds: Sequence[str]) -> float:
    """I(kind; level) in bits, of a question's kind and a level drawn by its weights (questions, levels)."""
    within = sum(share * entropy(mean).item() for share, mean in _means(weights, kinds).values())
    return entropy(weights.mean(0)).item() - within


def entropy(weights: Tensor) -> Tensor:
    """In bits, of weights in the last dimension."""
    return torch.special.entr(weights).sum(-1) / math.log(2)


def _means(weights: Tensor, kinds: Sequence[str]) -> dict[str, tuple[float, Tensor]]:
    """The share of each kind among the questions, and its mean weights."""
    found = {}
    for kind, count in Counter(kinds).items():
        mine = torch.tensor([other == kind for other in kinds])
        found[kind] = (count / len(kinds), weights[mine].mean(0))
    return found


if __name__ == "__main__":
    main()
