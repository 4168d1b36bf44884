"""Text piece by piece: joined it is the decoded whole, cut it is the whole before the stop string."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aligngpt import AlignGPTProcessor
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.streaming import TextStream

TEXT = " née\n  日本 ✅ . zwei 🇫🇷 "


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so most characters here are two to four."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(params=["sentencepiece", "byte level"])
def processor(request, tokenizer) -> AlignGPTProcessor:
    chosen = tokenizer if request.param == "sentencepiece" else byte_level_tokenizer()
    return AlignGPTProcessor(AlignGPTImageProcessor(56), chosen, align_token_id=10**6, image_token_id=10**6 + 1)


def said(processor, tokens, stop=()) -> tuple[list[str], TextStream]:
    stream = TextStream(processor, stop)
    pieces = [stream.add(token) for token in tokens]
    pieces.append(stream.end())
    assert "".join(pieces) == stream.text
    return [piece for piece in pieces if piece], stream


def test_no_half_character_is_shown_and_no_special_token(processor):
    ids = processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces, _ = said(processor, [*ids, processor.tokenizer.eos_token_id])
    assert "".join(pieces).strip() == TEXT.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5
    half = processor.tokenizer("a✅", add_special_tokens=False)["input_ids"][:-1]
    pieces, _ = said(processor, half)  # cut inside a character it is shown as the tokenizer shows it
    assert "".join(pieces) == processor.decode(half, skip_special_tokens=True)


def test_the_pieces_of_any_tokens_are_the_decoded_whole(processor):
    """Random tokens: half characters, bytes that are none, runs of blanks, special tokens, ids that are no token."""
    rng = random.Random(0)
    vocabulary = len(processor.tokenizer) + 5
    blanks = processor.tokenizer("   ", add_special_tokens=False)["input_ids"]
    for _ in range(1000):
        tokens = [rng.randrange(vocabulary) for _ in range(rng.randrange(1, 25))]
        for _ in range(rng.randrange(3)):
            place = rng.randrange(len(tokens))
            tokens[place:place] = blanks
        whole = processor.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(said(processor, tokens)[0]) == whole, tokens


def test_a_stop_string_ends_the_text_wherever_tokens_part_it(processor):
    rng = random.Random(1)
    ids = processor.tokenizer("the cat sat on the mat. the end", add_special_tokens=False)["input_ids"]
    whole = processor.decode(ids, skip_special_tokens=True)
    for _ in range(100):
        begin = rng.randrange(len(whole))
        stops = [whole[begin : begin + rng.randrange(1, 7)], "zz", "the cap"]
        pieces, stream = said(processor, ids, stops)
        assert stream.stopped
        assert "".join(pieces) == whole[: whole.index(stops[0])]
    pieces, stream = said(processor, ids, ["the ending", "mat!"])  # begun, never finished
    assert not stream.stopped
    assert "".join(pieces) == whole


def test_a_long_answer_costs_no_more_a_token(processor, monkeypatch):
    lengths = []
    decode = processor.tokenizer.decode
    monkeypatch.setattr(
        processor.tokenizer, "decode", lambda ids, **more: lengths.append(len(ids)) or decode(ids, **more)
    )
    ids = processor.tokenizer("some words to say. " * 40, add_special_tokens=False)["input_ids"]
    said(processor, ids)
    assert max(lengths) < 12
