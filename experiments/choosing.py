"""`python -m experiments.choosing MODEL SCENES OUT.json`: whether it matters that the gate chooses for each question.

The same questions of SCENES/test are answered twice: with the row that the gate mixes for each, and all with the mean
of these rows. What the gate says on average is the same both times; only the choice is gone. Beside it stands how far
the rows lie apart, in units of the mean row's norm, and how long the table's rows are. OUT.json is written whole or not
at all.

ValueError: MODEL does not mix levels.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from aligngpt.batch import Example
from aligngpt.data.tables import prepare_outputs, write_json
from demo.evaluate import Asked, Speaker, read_questions
from experiments.measure import BATCH, QUESTIONS, mean_accuracy, mean_nll, read, with_pictures

MODES = ("adaptive", "local")


@torch.no_grad()
def measure_choice(speaker: Speaker, asked: Sequence[Asked]) -> dict[str, float]:
    config, table = speaker.model.config, speaker.model.model.align_table
    if config.align_mode not in MODES:
        raise ValueError(f"model has align_mode {config.align_mode!r}; it needs one of {', '.join(MODES)}")
    speaker.processor.gate_text = "prompt"  # when one asks there is no answer yet for the gate to read
    examples = with_pictures(speaker, [question.sample for question in asked], [question.picture for question in asked])
    rows = mixed_rows(speaker, examples)
    mean = rows.mean(0)
    own = read(speaker, examples)
    found: dict[str, float] = {}
    before = table[0].clone()
    table[0] = mean
    same = read(speaker, examples, level=0)
    table[0] = before
    for name, answers in (("own row", own), ("mean row", same)):
        found |= {f"{name} NLL": mean_nll(answers), f"{name} accuracy": mean_accuracy(asked, answers)}
    apart = ((rows - mean).norm(dim=1).mean() / mean.norm()).item()
    return found | {"rows apart": apart, "table norm": table.norm(dim=1).mean().item()}


def mixed_rows(speaker: Speaker, examples: Sequence[Example]) -> Tensor:
    """What the gate puts in the alignment token's place, (examples, D)."""
    model, found = speaker.model.model, []
    for start in range(0, len(examples), BATCH):
        batch = speaker.processor.collate(examples[start : start + BATCH]).to(model.device)
        mask, gate_mask = batch.attention_mask, batch.gate_mask
        _, weights = model.alignment(
            batch.input_ids, batch.pixel_values, attention_mask=mask, gate_mask=gate_mask, plan=batch.plan
        )
        found.append(weights @ model.align_table[:-1])
    rows = torch.cat(found)
    return rows + model.align_table[-1] if model.config.align_mode == "adaptive" else rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.choosing", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("scenes", type=Path, help="folder that holds test")
    parser.add_argument("out", type=Path, help="JSON file that is written")
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        prepare_outputs([("out", args.out)], [])
        speaker = Speaker.load(args.model)
        speaker.model.to("cuda" if torch.cuda.is_available() else "cpu")
        asked = read_questions(args.scenes / "test")[: QUESTIONS["test"]]
        write_json(args.out, measure_choice(speaker, asked), indent=1)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
