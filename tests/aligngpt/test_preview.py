"""aligngpt.preview: what the command prints is what the model gets."""

import argparse
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from aligngpt.cli import main
from aligngpt.data.records import open_records
from aligngpt.preview import KINDS, add_arguments, format_tokenized, preview, run, token_kinds
from aligngpt.processor import AlignGPTImageProcessor, AlignGPTProcessor
from aligngpt.text import TokenIds, Tokenized

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
IDS = TokenIds(image=321, align=320, pad=0)
RECORDS = [
    {
        "id": "car",
        "image": "car.png",
        "align_level": 5,
        "conversations": [
            {"from": "human", "value": "What is <image>\nin the image?"},
            {"from": "gpt", "value": "a red car\x1b[2J"},
        ],
    },
    {"id": "talk", "conversations": [{"from": "human", "value": "Yes?"}, {"from": "gpt", "value": "No."}]},
]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ORACLE)


def by_hand(labels):
    """Eleven tokens of every kind: BOS, <align>, words, two pictures of two rows, a word, a newline, </s>."""
    ids = torch.tensor([1, 320, 262, 260, 321, 321, 321, 321, 264, 13, 2])
    gate = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0], dtype=torch.bool)
    return Tokenized(ids, torch.where(torch.tensor(labels, dtype=torch.bool), ids, -100), gate, 2)


def test_format_by_hand(tokenizer):
    sample = by_hand([0] * 9 + [1, 1])
    kinds = ["text", "align", "gate text", "gate text", *["image"] * 4, "gate text", "both", "supervised"]
    assert token_kinds(sample, IDS) == kinds
    text = format_tokenized(sample, tokenizer, IDS, rows_per_image=2, color=False)
    assert text.splitlines()[:8] == [
        "text        <s>",
        "align       <align>",
        "gate text    US│ER",
        "image       <image>×2",
        "image       <image>×2",
        "gate text    a",
        "both        \\n",
        "supervised  </s>",
    ]
    for kind in KINDS:
        assert re.search(rf"^{kind} +{kinds.count(kind)} tokens", text, re.MULTILINE)
    assert "11 tokens, 2 of them predicted" in text


def test_color_adds_only_color(tokenizer):
    sample = by_hand([0] * 9 + [1, 1])
    plain = format_tokenized(sample, tokenizer, IDS, rows_per_image=2, color=False)
    colored = format_tokenized(sample, tokenizer, IDS, rows_per_image=2, color=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain
    for style, _ in KINDS.values():
        assert f"\x1b[{style}m" in colored


@pytest.fixture
def place(tmp_path, tokenizer):
    """A model folder (its processor), a data file and an image folder; returns the command's arguments."""
    processor = AlignGPTProcessor(
        AlignGPTImageProcessor(size=56), tokenizer, rows_per_image=16, align_token_id=320, image_token_id=321
    )
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    Image.new("RGB", (64, 48)).save(tmp_path / "car.png")

    always = [str(tmp_path / "data.json"), "--model", str(tmp_path / "model"), "--image-folder", str(tmp_path)]

    def arguments(*more):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return parser.parse_args([*always, *more])

    arguments.arguments = always

    return arguments


def test_command_shows_what_training_gets(place, capsys):
    assert run(place("--count", "2")) == 0
    first, second = capsys.readouterr().out.split("record 1 ")
    assert first.startswith("record 0 (id car) · template v1 · level 5 · car.png 64×48\n")
    lines = first.splitlines()
    assert "image       <image>×16" in lines
    learned = next(line for line in lines if line.startswith("supervised"))
    # The words' own escape sequence is shown, never sent to the terminal.
    assert learned.replace("│", "") == "supervised   a red car\\x1b[2J</s>"
    assert second.startswith("(id talk) · template v1\n")
    assert "image" not in second
    assert "align" not in second


def test_template_and_index(place, capsys):
    assert run(place("--template", "llama_2", "--index", "1")) == 0
    out = capsys.readouterr().out
    assert out.startswith("record 1 (id talk) · template llama_2\n")
    assert "[INST] <<SYS>>" in out.replace("│", "")


def test_color_only_for_terminals(place, monkeypatch):
    class Terminal(io.StringIO):
        encoding = "ascii"

        def isatty(self):
            return True

    for environment, options, colored in [("", (), True), ("1", (), False), ("", ("--no-color",), False)]:
        monkeypatch.setenv("NO_COLOR", environment)
        terminal = Terminal()
        monkeypatch.setattr("sys.stdout", terminal)
        assert run(place(*options)) == 0
        assert ("\x1b[" in terminal.getvalue()) is colored
        assert "<image>?16" in terminal.getvalue()  # × has no place in ASCII


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--index", "2"), "has records 0 to 1"),
        (("--index", "-1"), "has records 0 to 1"),
        (("--count", "0"), "the count at least 1"),
        (("--template", "chat"), "template 'chat' is the tokenizer's chat_template"),
        (("--image-folder", "/nowhere"), r"record 0 \(id car\): car.png: no such file"),
        (("--model", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence(place, capsys, options, message):
    assert main(["preview", *place.arguments, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(f"aligngpt preview: .*{message}", captured.err)


def test_preview_without_image_folder_opens_nothing(place):
    arguments = place()
    processor = AlignGPTProcessor.from_pretrained(arguments.model)
    (text,) = preview(open_records(arguments.data), [0], processor)
    assert text.startswith("record 0 (id car) · template v1 · level 5 · car.png\n")
