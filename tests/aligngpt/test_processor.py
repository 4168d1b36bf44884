"""The processor: prompts, messages, training samples, and its folder."""

import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlamaConfig

from aligngpt import AlignGPTConfig, AlignGPTProcessor
from aligngpt.data.llava_json import Sample
from aligngpt.data.records import RecordList
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.text import Turn


@pytest.fixture
def config(tower_config):
    from transformers import CLIPVisionConfig

    return AlignGPTConfig.from_parts(LlamaConfig(vocab_size=320), CLIPVisionConfig(**tower_config))


@pytest.fixture
def processor(config, tokenizer):
    return AlignGPTProcessor.for_model(config, AlignGPTImageProcessor(56), tokenizer)


def picture(colour="red"):
    return Image.new("RGB", (30, 20), colour)


def message(text, *images):
    return [
        {
            "role": "user",
            "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
        }
    ]


def said(content):
    return [{"role": "user", "content": content}]


def test_messages_and_their_rendered_text_give_the_same_inputs(processor):
    conversations = [message("What is this?", picture()), message("And these two?", picture("blue"), picture("green"))]
    direct = processor.apply_chat_template(conversations, tokenize=True)
    texts = processor.apply_chat_template(conversations)
    assert [text.count("<image>") for text in texts] == [1, 2]
    rendered = processor([picture(), picture("blue"), picture("green")], texts)
    assert direct.keys() == rendered.keys() == {"input_ids", "attention_mask", "gate_mask", "pixel_values"}
    for name in direct:
        assert torch.equal(direct[name], rendered[name]), name
    ids, mask = direct["input_ids"], direct["attention_mask"].bool()
    assert (ids == processor.image_token_id).sum(1).tolist() == [16, 32]
    first = mask.long().argmax(1)
    assert (ids.gather(1, first[:, None] + 1) == processor.align_token_id).all()
    special = (ids == processor.align_token_id) | (ids == processor.image_token_id)
    assert torch.equal(direct["gate_mask"], mask & ~special & (mask.cumsum(1) > 1))


def test_a_training_sample_begins_as_its_prompt_at_inference(processor, tmp_path):
    """Same ids and the same text in the gate, whatever the answer: the gate never sees it."""
    picture().save(tmp_path / "a.png")
    sample = Sample("1", ("a.png",), (Turn("user", "<image>\nWhat is this?"), Turn("assistant", "a red car")), None, 0)
    example = processor.example(sample, RecordList([sample], tmp_path))
    prompt = processor.apply_chat_template(message("What is this?", picture()), tokenize=True)
    length = prompt["input_ids"].shape[1]
    assert torch.equal(example.text.input_ids[:length], prompt["input_ids"][0])
    assert torch.equal(example.text.gate_mask[:length], prompt["gate_mask"][0])
    assert not example.text.gate_mask[length:].any()
    assert (example.text.labels[:length] == -100).all()
    assert (example.text.labels[length:] != -100).all()
    assert torch.equal(example.pixel_values, prompt["pixel_values"])


def test_without_alignment_there_is_no_token(config, tokenizer):
    config.align_mode = "none"
    processor = AlignGPTProcessor.for_model(config, AlignGPTImageProcessor(56), tokenizer)
    ids = processor(picture(), "<image> What?")["input_ids"]
    assert (ids == processor.image_token_id).sum() == 16
    assert (ids == processor.align_token_id).sum() == 0


def test_the_image_processor_is_the_training_one(processor, oracle):
    arrays = np.load(oracle / "image_preprocess.npz")
    images = [Image.fromarray(arrays[f"{name}.image_uint8"]) for name in ("wide", "tall", "square")]
    for aspect in ("pad", "square"):
        pixels = AlignGPTImageProcessor(56, image_aspect_ratio=aspect)(images)["pixel_values"]
        expected = np.stack([arrays[f"{name}.pixel_values_{aspect}"] for name in ("wide", "tall", "square")])
        assert np.abs(pixels.numpy() - expected).max() <= 1 / 255 / min(processor.image_processor.image_std)


def test_its_folder_restores_every_field(processor, config, tmp_path):
    processor.template, processor.gate_text, processor.max_length = "llama_2", "all", 77
    processor.image_processor.image_aspect_ratio = "square"
    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is AlignGPTProcessor
    assert again.to_dict() == processor.to_dict()
    text = processor.apply_chat_template(message("What is this?", picture()))
    assert torch.equal(again(picture(), text)["input_ids"], processor(picture(), text)["input_ids"])


def test_fields_can_be_set_on_reading_and_others_are_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AlignGPTProcessor.from_pretrained(tmp_path, gate_text="all", template="llama_2")
    assert (again.gate_text, again.template) == ("all", "llama_2")
    with pytest.raises(ValueError, match="gate is no field of AlignGPTProcessor"):
        AlignGPTProcessor.from_pretrained(tmp_path, gate="all")
    with pytest.raises(ValueError, match="template is 'v2'"):
        AlignGPTProcessor.from_pretrained(tmp_path, template="v2")


def test_a_public_folder_has_a_processor_too(public_folder, oracle, tower_config, tmp_path):
    for file in (*public_folder.glob("config.json"), *oracle.glob("tokenizer*"), oracle / "special_tokens_map.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    processor = AlignGPTProcessor.from_pretrained(tmp_path, vision_config=tower_config)
    assert (processor.rows_per_image, processor.gate_text, processor.template) == (16, "all", "v1")
    assert (processor.align_token_id, processor.image_token_id) == (320, 321)
    assert processor.image_processor.size == 56


def test_an_array_is_an_image_too(processor):
    array = np.asarray(picture())
    assert torch.equal(processor(array, "<image>")["pixel_values"], processor(picture(), "<image>")["pixel_values"])


def test_from_parts_takes_the_towers_normalisation(config, oracle, tmp_path):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    AlignGPTImageProcessor(56, mean, std).save_pretrained(tmp_path)
    processor = AlignGPTProcessor.from_parts(oracle, tmp_path, config)
    assert (processor.image_processor.image_mean, processor.image_processor.image_std) == (mean, std)
    assert processor.image_processor.size == 56


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(picture(), "no mark"), "text has 0 <image> marks; 1 images were given"),
        (lambda p: p(None, "<image>"), "text has 1 <image> marks; 0 images were given"),
        (lambda p: p(picture()), "text is missing"),
        (lambda p: p("nowhere.png", "<image>"), "nowhere.png"),
        (lambda p: p("http://x/a.png", "<image>"), "image 'http://x/a.png' is a URL"),
        (lambda p: p({}, "<image>"), "an image is a dict"),
        (lambda p: p(picture(), "<image>", max_length=3), "the processor takes no max_length=3"),
        (lambda p: p.apply_chat_template(message("<image> x", picture())), "conversation 0 holds <image> in a text"),
        (lambda p: p.apply_chat_template(said([{"type": "video"}])), "conversation 0, message 0 has an item"),
        (lambda p: p.apply_chat_template(said([{"type": "text"}])), "it needs 'type': 'text' with 'text', or"),
        (lambda p: p.apply_chat_template(said([{"type": "image"}]), tokenize=True), "'image' without a picture"),
        (lambda p: p.apply_chat_template(said([{"type": "image", "url": "a", "path": "a"}])), "path and url; an item"),
        (lambda p: p.apply_chat_template(said([{"type": "image", "base64": "?"}])), "message 0: a picture in base64"),
        (lambda p: p.apply_chat_template(said(" "), continue_final_message=True), "ends with an empty message"),
        (lambda p: p.apply_chat_template(said("x"), continue_final_message="x"), "is 'x'; it needs to be True or"),
        (
            lambda p: p.apply_chat_template(said("x"), add_generation_prompt=True, continue_final_message=True),
            "are both given",
        ),
        (lambda p: p.apply_chat_template(said("x"), processor_kwargs={"truncation": True}), "no truncation=True"),
        (lambda p: p.apply_chat_template(said(5)), "message 0 has role 'user' and content of type int"),
        (lambda p: p.apply_chat_template([{"content": "x"}]), "message 0 has role None"),
        (lambda p: p.apply_chat_template([]), "conversation is empty"),
        (lambda p: p.apply_chat_template(said("x"), "{{ x }}"), "chat_template is given"),
        (lambda p: p.apply_chat_template(said("x"), tokenise=True), "takes no tokenise=True"),
        (lambda p: AlignGPTProcessor.from_pretrained("tests/data/oracle"), "holds no AlignGPTProcessor"),
    ],
)
def test_wrong_input_is_named(processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor)


def test_a_samples_error_names_its_record(processor, tmp_path):
    (tmp_path / "b.png").write_text("<html>not here</html>")
    turns = (Turn("user", "<image>\nWhat is this?"), Turn("assistant", "a red car"))
    for image, why in (("a.png", "no such file"), ("b.png", "not an image")):
        with pytest.raises(ValueError, match=rf"^record 3 \(id x7\): {image}: {why}"):
            processor.example(Sample("x7", (image,), turns, None, 3), RecordList([], tmp_path))


def test_fault_25_26_nothing_to_learn_is_an_error(processor):
    """An answer that is wholly behind max_length, and a conversation that was read with a problem."""
    turns = (Turn("user", "Why? " * 50), Turn("assistant", "So."))
    processor.max_length = 90
    with pytest.raises(ValueError, match=r"^record 3 \(id x7\): nothing of its answers is within max_length, 90 "):
        processor.text(Sample("x7", (), turns, None, 3))
    with pytest.raises(ValueError, match=r"^record 3 \(id x7\): the conversation is empty"):
        processor.text(Sample("x7", (), (), None, 3, "the conversation is empty"))


def test_fault_27_a_cut_in_front_of_an_image_leaves_its_file_out(processor, tmp_path):
    """The second picture is behind max_length; its file, which is not there, is not asked for."""
    picture().save(tmp_path / "a.png")
    turns = [Turn("user", "<image>\nWhat is this?"), Turn("assistant", "a red car")] * 2
    sample = Sample("x7", ("a.png", "b.png"), tuple(turns), None, 3)
    whole = processor.text(sample)
    second = (whole.input_ids == processor.image_token_id).nonzero()[16].item()
    processor.max_length = second + 5
    example = processor.example(sample, RecordList([sample], tmp_path))
    assert example.pixel_values.shape[0] == example.text.num_images == 1
    assert torch.equal(example.text.input_ids, whole.input_ids[:second])
    assert torch.equal(example.text.labels, whole.labels[:second])
    processor.max_length = second + 16
    with pytest.raises(ValueError, match=r"b\.png: no such file"):
        processor.example(sample, RecordList([sample], tmp_path))


def test_fault_52_code_that_a_folder_brings_is_never_run(processor, tmp_path, monkeypatch):
    """Nor is the user asked: typing "y" to such a question would run it."""
    processor.save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(ran)!r}, 'w')\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}}
    config["tokenizer_class"] = "Tokenizer"
    file.write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(ValueError):
        AlignGPTProcessor.from_pretrained(tmp_path)
    assert not ran.exists()
