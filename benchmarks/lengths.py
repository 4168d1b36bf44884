"""Conversations as long as those of LLaVA's 665K instruction set, and captions as long as those of its 558K.

Who is in the 665K and how often is from LLaVA-1.5 (arXiv 2310.03744): 40K conversations of ShareGPT without an image,
and 625K with one, which 576 rows stand for. How long they are is estimated: turns as published (VQAv2 has 5 questions
an image, GQA 13), words of questions and answers as its prompts have them ("Answer the question using a single word or
phrase." brings short ones, ShareGPT answers with hundreds of tokens and is cut at 2048). Turns, questions and answers
are drawn evenly from their ranges, every source has its share of any number of samples, and `python -m
benchmarks.lengths` prints what comes out. A caption of the 558K has 8 to 40 tokens.

A small set is the large one divided by `scale`, image rows and longest length included, so that the lengths have the
same proportions; 576 / scale must be a square for the tower. Words are random, and each is one token.
"""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from aligngpt.data.llava_json import Sample
from aligngpt.data.records import RecordList
from aligngpt.processor import AlignGPTImageProcessor, AlignGPTProcessor
from aligngpt.text import IMAGE_MARK, Tokenized, Turn

IMAGE_ROWS, MAX_LENGTH = 576, 2048
SYSTEM = 35  # tokens of Vicuna's first sentences
CAPTION = (8, 40)  # tokens
PHOTOS, PHOTO_SIZE = 16, (640, 480)
SPECIAL = ("<unk>", "<s>", "</s>", "<user>", "<assistant>")
# As few marks as can be: what a real template writes beside them is counted in the questions.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %} <user> {{ m['content'] }} <assistant> "
    "{% else %}{{ m['content'] }} </s>{% endif %}{% endfor %}"
)


class Source(NamedTuple):
    name: str
    thousands: int  # of samples
    has_image: bool
    turns: tuple[int, int]
    question: tuple[int, int]  # tokens
    answer: tuple[int, int]


SOURCES = (
    Source("ShareGPT", 40, False, (1, 12), (10, 100), (80, 400)),
    Source("LLaVA conversations", 58, True, (3, 6), (10, 18), (12, 50)),
    Source("LLaVA descriptions", 23, True, (1, 1), (10, 22), (90, 160)),
    Source("LLaVA reasoning", 77, True, (1, 1), (12, 26), (70, 140)),
    Source("VQAv2", 83, True, (3, 8), (8, 14), (1, 3)),
    Source("GQA", 72, True, (8, 18), (8, 16), (1, 2)),
    Source("OKVQA", 9, True, (1, 2), (18, 26), (1, 3)),
    Source("OCR-VQA", 80, True, (4, 6), (8, 16), (1, 12)),
    Source("A-OKVQA", 66, True, (1, 2), (40, 60), (1, 2)),
    Source("TextCaps", 22, True, (1, 1), (30, 120), (10, 25)),
    Source("RefCOCO", 48, True, (2, 10), (12, 45), (6, 28)),
    Source("Visual Genome", 86, True, (4, 16), (12, 45), (5, 28)),
)


def conversations(num_samples: int, *, vocabulary: int, scale: int = 1, seed: int = 0) -> list[Sample]:
    """Samples of all sources, in random order."""
    generator = random.Random(seed)
    sources = [source for source, count in zip(SOURCES, _shares(num_samples), strict=True) for _ in range(count)]
    generator.shuffle(sources)
    return [_conversation(source, n, vocabulary, scale, generator) for n, source in enumerate(sources)]


def captions(num_samples: int, *, vocabulary: int, scale: int = 1, seed: int = 0) -> list[Sample]:
    """Images with a caption and a level, as stage 1 has them."""
    generator = random.Random(seed)
    samples = []
    for number in range(num_samples):
        words = _words(generator.randint(*CAPTION) / scale, vocabulary, generator)
        turns = (Turn("user", IMAGE_MARK), Turn("assistant", words))
        samples.append(Sample(str(number), (_photo(number),), turns, number % 8, number))
    return samples


def _shares(num_samples: int) -> list[int]:
    """How many samples each source gives."""
    ends = np.cumsum([source.thousands for source in SOURCES])
    return np.diff(np.round(ends * num_samples / ends[-1]).astype(int), prepend=0).tolist()


def _conversation(source: Source, number: int, vocabulary: int, scale: int, generator: random.Random) -> Sample:
    turns = generator.randint(*source.turns)
    asked = SYSTEM + sum(generator.randint(*source.question) for _ in range(turns))
    answered = sum(generator.randint(*source.answer) for _ in range(turns))
    kept = max(1, round(turns / scale))
    spoken: list[Turn] = []
    for turn in range(kept):
        mark = f"{IMAGE_MARK} " if source.has_image and turn == 0 else ""
        spoken.append(Turn("user", mark + _words(asked / scale / kept, vocabulary, generator)))
        spoken.append(Turn("assistant", _words(answered / scale / kept, vocabulary, generator)))
    return Sample(str(number), (_photo(number),) if source.has_image else (), tuple(spoken), None, number)


def _words(count: float, vocabulary: int, generator: random.Random) -> str:
    words = generator.choices(range(len(SPECIAL), vocabulary), k=max(1, round(count)))
    return " ".join(f"w{word}" for word in words)


def _photo(number: int) -> str:
    return f"{number % PHOTOS}.jpg"


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One that knows all the words."""
    words = {word: token for token, word in enumerate(SPECIAL)}
    words |= {f"w{token}": token for token in range(len(SPECIAL), vocabulary)}
    inner = Tokenizer(WordLevel(words, unk_token=SPECIAL[0]))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=TEMPLATE,
    )


def processor(vocabulary: int, *, scale: int, image_size: int, template: str) -> AlignGPTProcessor:
    return AlignGPTProcessor(
        AlignGPTImageProcessor(image_size),
        tokenizer(vocabulary),
        template=template,
        rows_per_image=IMAGE_ROWS // scale,
        align_token_id=vocabulary,
        image_token_id=vocabulary + 1,
        max_length=MAX_LENGTH // scale,
    )


def with_photos(samples: list[Sample], folder: Path) -> RecordList:
    """The samples with their images, which are written into the folder."""
    for number in range(PHOTOS):
        noise = np.random.default_rng(number).normal(0, 10, (*PHOTO_SIZE[::-1], 3))
        y, x = np.mgrid[: PHOTO_SIZE[1], : PHOTO_SIZE[0]]
        waves = np.stack([127 + 80 * np.sin(x / (5 + number) + y / (90 - channel)) for channel in range(3)], -1)
        Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return RecordList(samples, folder)


def main() -> None:
    shown = "{:20} {:4}K  mean {:5.0f} tokens, 5 to 95 %: {:4.0f} to {:4.0f}, {:3.0%} of them supervised"
    reader = processor(1000, scale=1, image_size=336, template="chat")
    of_source: dict[str, list[Tokenized]] = {source.name: [] for source in SOURCES}
    for source in SOURCES:
        generator = random.Random(0)
        for number in range(200):
            of_source[source.name].append(reader.text(_conversation(source, number, 1000, 1, generator)))
    of_source["together"] = [reader.text(sample) for sample in conversations(1992, vocabulary=1000)]
    thousands = {source.name: source.thousands for source in SOURCES} | {"together": 664}
    for name, texts in of_source.items():
        tokens, supervised = np.array([(len(text.input_ids), text.num_supervised) for text in texts]).T
        print(
            shown.format(
                name, thousands[name], tokens.mean(), *np.percentile(tokens, [5, 95]), supervised.sum() / tokens.sum()
            )
        )


if __name__ == "__main__":
    main()
