"""`generate`: batched, padded on either side, cached or not, with everything that looks at the prompt's ids."""

import pytest
import torch
from PIL import Image

from aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from aligngpt.processor import AlignGPTImageProcessor

COLOURS = ("red", "navy", "olive")


@pytest.fixture(scope="module")
def model(make_llm, make_tower):
    model = AlignGPTForConditionalGeneration.from_parts(make_llm("llama"), make_tower("clip"))
    model.generation_config.eos_token_id = None  # a random model must not stop at chance
    return model


@pytest.fixture(scope="module")
def processor(model, tokenizer):
    return AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer)


def prompts(processor, count: int, padding_side: str = "left"):
    """Prompts of different lengths; the last of three has no image."""
    texts = ["What? <image>\nThis is the first.", "<image>", "No image at all in here."][:count]
    images = [Image.new("RGB", (60, 40), colour) for colour in COLOURS[: min(count, 2)]]
    return processor(images, texts, padding_side=padding_side)


def answers(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 6, "do_sample": False} | kwargs
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def greedy(model, inputs, steps: int) -> torch.Tensor:
    """One row's answer by running the whole sequence anew for every token."""
    embeds, _ = model.model.embed(inputs["input_ids"], inputs.get("pixel_values"), gate_mask=inputs["gate_mask"])
    tokens = []
    for _ in range(steps):
        logits = model(inputs_embeds=embeds).logits[:, -1]
        tokens.append(logits.argmax(-1))
        embeds = torch.cat((embeds, model.get_input_embeddings()(tokens[-1])[:, None]), 1)
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_padded_batch_answers_as_each_prompt_alone(model, processor, padding_side, use_cache):
    together = answers(model, prompts(processor, 3, padding_side), use_cache=use_cache)
    texts = ["What? <image>\nThis is the first.", "<image>", "No image at all in here."]
    for row, text in enumerate(texts):
        images = [Image.new("RGB", (60, 40), COLOURS[row])] if "<image>" in text else None
        alone = processor(images, text)
        expected = greedy(model, alone, 6)[0]
        assert torch.equal(answers(model, alone, use_cache=use_cache)[0], expected)
        assert torch.equal(together[row], expected)


def test_every_decoding_that_reads_the_prompt_works(model, processor):
    """`<align>` and `<image>` lie outside the vocabulary; logits processors and candidates see padding instead."""
    inputs = prompts(processor, 1)
    plain = answers(model, inputs)
    assert torch.equal(answers(model, inputs, prompt_lookup_num_tokens=3), plain)
    assert torch.equal(answers(model, inputs, num_beams=1, cache_implementation="static"), plain)
    assert torch.equal(answers(model, inputs, repetition_penalty=1.0 + 1e-6), plain)
    penalised = answers(model, inputs, repetition_penalty=5.0)
    assert len(set(penalised[0].tolist())) == penalised.shape[1]
    assert answers(model, inputs, no_repeat_ngram_size=2).shape == plain.shape


def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_pair(model, processor):
    inputs = prompts(processor, 1)
    vocab = model.config.text_config.vocab_size
    with torch.no_grad():
        prompt, _ = model.model.embed(inputs["input_ids"], inputs["pixel_values"], gate_mask=inputs["gate_mask"])
        first = model(inputs_embeds=prompt).logits[0, -1].log_softmax(-1)
        every = torch.cat((prompt.expand(vocab, -1, -1), model.get_input_embeddings().weight[:, None]), 1)
        second = model(inputs_embeds=every).logits[:, -1].log_softmax(-1)
    best = (first[:, None] + second).flatten().argmax().item()
    found = answers(model, inputs, num_beams=vocab, max_new_tokens=2)[0].tolist()
    assert found == [best // vocab, best % vocab]


def test_sampling_follows_its_seed(model, processor):
    inputs = prompts(processor, 3)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(answers(model, inputs, do_sample=True, temperature=2.0))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_level_can_be_fixed(model, processor):
    inputs = prompts(processor, 2)
    answered = [answers(model, inputs, align_levels=torch.tensor([level] * 2)) for level in (0, 7)]
    assert not torch.equal(*answered)


def test_what_would_break_the_alignment_token_is_refused(model, processor):
    inputs = prompts(processor, 1)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        answers(model, inputs, prefill_chunk_size=4)
    past = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds an earlier turn"):
        answers(model, inputs, past_key_values=past)


def test_the_returned_ids_decode(model, processor):
    inputs = prompts(processor, 1)
    text = processor.batch_decode(model.generate(**inputs, max_new_tokens=2), skip_special_tokens=True)[0]
    assert text.startswith("What?")
    assert "This is the first." in text
    assert "This is the first." in processor.batch_decode(inputs["input_ids"])[0]
