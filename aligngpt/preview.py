"""`aligngpt preview DATA`: a sample as the model reads it, each token marked by what it is to the model.

One line per run of tokens of one kind, its kind in front, so the output reads without colours too; tokens are divided
by `│` and runs of image rows folded:

    text        <s>
    align       <align>
    gate text   A│ chat│ between│ …│ US│ER│:
    image       <image>×576
    gate text   \\n│What│ is│ shown│?│ A│SS│IST│ANT│:
    supervised   a│ red│ car│</s>

The ids come from the processor, by the same call that training makes. Characters that would steer a terminal are
escaped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from .data.llava_json import printable
from .data.records import Records, in_shards, open_records
from .image import open_image
from .text import IGNORE_INDEX, TEMPLATES, TokenIds, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .processor import AlignGPTProcessor

# kind: (ANSI style, what it means)
KINDS = {
    "text": ("2", "read, but neither supervised nor averaged by the gate"),
    "gate text": ("36", "averaged by the gate"),
    "supervised": ("32", "carries loss"),
    "both": ("32;4", "carries loss and is averaged by the gate"),
    "image": ("35", "rows of a picture"),
    "align": ("33;1", "where the alignment vector stands"),
}
_WIDTH = max(map(len, KINDS))


def token_kinds(tokenized: Tokenized, token_ids: TokenIds) -> list[str]:
    """The kind of each token, a key of `KINDS`; (L,)."""
    kinds = []
    for token, label, gate in zip(
        tokenized.input_ids.tolist(), tokenized.labels.tolist(), tokenized.gate_mask.tolist(), strict=True
    ):
        if token == token_ids.image:
            kinds.append("image")
        elif token == token_ids.align:
            kinds.append("align")
        elif label != IGNORE_INDEX:
            kinds.append("both" if gate else "supervised")
        else:
            kinds.append("gate text" if gate else "text")
    return kinds


def format_tokenized(
    tokenized: Tokenized, tokenizer: PreTrainedTokenizerBase, token_ids: TokenIds, *, rows_per_image: int, color: bool
) -> str:
    """The runs of a sample, a line each, then a legend that counts them.

    rows_per_image: P, so that pictures side by side are folded one by one.
    """
    kinds = token_kinds(tokenized, token_ids)
    ids = tokenized.input_ids.tolist()
    lines = []
    place = 0
    for kind, run in groupby(kinds):
        length = len(list(run))
        tokens = ids[place : place + length]
        place += length
        if kind == "image":
            folds = [min(rows_per_image, length - row) for row in range(0, length, rows_per_image)]
            lines += [_line(kind, f"<image>×{rows}", color) for rows in folds]
        elif kind == "align":
            lines.append(_line(kind, "<align>", color))
        else:
            lines.append(_line(kind, "│".join(_token_text(tokenizer, token) for token in tokens), color))
    lines.append("")
    for kind, (_, meaning) in KINDS.items():
        if kind in kinds:
            lines.append(_line(kind, f"{kinds.count(kind):5} tokens  {meaning}", color))
    lines.append(
        f"{'all':{_WIDTH}}  {len(kinds):5} tokens, {tokenized.num_supervised} of them predicted under the loss"
    )
    return "\n".join(lines)


def preview(
    records: Records,
    chosen: Iterable[int],
    processor: AlignGPTProcessor,
    *,
    open_images: bool = False,
    template: str | None = None,
    color: bool = False,
) -> Iterator[str]:
    """One text per chosen record: a heading, then `format_tokenized`.

    open_images: the pictures are opened too and their sizes shown. template: instead of the processor's own.
    ValueError names the record: what `AlignGPTProcessor.text`, `Records.image` and `open_image` refuse.
    """
    template = template or processor.template
    for sample in map(records.__getitem__, chosen):
        tokenized = processor.text(sample, template)
        facts = [sample.name, f"template {template}"]
        if sample.level is not None:
            facts.append(f"level {sample.level}")
        for number, image in enumerate(sample.images):
            fact = image
            if open_images and number < tokenized.num_images:
                try:
                    width, height = open_image(records.image(sample, number), name=image).size
                except ValueError as error:
                    raise ValueError(f"{sample.name}: {error}") from error
                fact = f"{image} {width}×{height}"
            facts.append(printable(fact))
        body = format_tokenized(
            tokenized, processor.tokenizer, processor.token_ids, rows_per_image=processor.rows_per_image, color=color
        )
        yield f"{' · '.join(facts)}\n\n{body}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt preview`."""
    parser.add_argument("data", metavar="DATA", help="a LLaVA JSON or JSON lines file, or shards")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a model folder, for its processor")
    parser.add_argument(
        "--image-folder", metavar="DIR", help="open the pictures too, and show their sizes (shards: always)"
    )
    parser.add_argument("--template", choices=TEMPLATES, help="instead of the model's own")
    parser.add_argument("--index", type=int, default=0, metavar="N", help="first record shown (default 0)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="records shown (default 1)")
    parser.add_argument(
        "--no-color", action="store_true", help="no ANSI colours (also: NO_COLOR set, or not a terminal)"
    )


def run(args: argparse.Namespace) -> int:
    """`aligngpt preview`: prints to standard output."""
    from .processor import AlignGPTProcessor  # loads transformers: not for `aligngpt --help`

    color = not args.no_color and not os.environ.get("NO_COLOR") and sys.stdout.isatty()
    records = open_records(args.data, args.image_folder)
    if not len(records):
        raise ValueError(f"{args.data} holds no records; it needs at least one")
    if args.count < 1 or not 0 <= args.index < len(records):
        raise ValueError(
            f"--index {args.index} --count {args.count}: {args.data} has records 0 to {len(records) - 1}; "
            f"the index must be one of them and the count at least 1"
        )
    chosen = range(args.index, min(args.index + args.count, len(records)))
    open_images = bool(args.image_folder) or in_shards(args.data)
    processor = AlignGPTProcessor.from_pretrained(args.model)
    encoding = sys.stdout.encoding or "utf-8"
    for text in preview(records, chosen, processor, open_images=open_images, template=args.template, color=color):
        print(text.encode(encoding, "replace").decode(encoding))
    return 0


def _line(kind: str, text: str, color: bool) -> str:
    line = f"{kind:{_WIDTH}}  {text}"
    return f"\x1b[{KINDS[kind][0]}m{line}\x1b[0m" if color else line


def _token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if "▁" in piece:  # SentencePiece's blank; decoding one token would drop it
        return printable(piece.replace("▁", " "))
    decoded = str(tokenizer.decode([token]))
    return printable(piece if "\ufffd" in decoded else decoded)  # the bytes of half a character
