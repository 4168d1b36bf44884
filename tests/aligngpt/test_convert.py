"""Conversions between the layouts: weights bit for bit, logits by the real classes, and what is refused."""

import fcntl
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from aligngpt import convert as module
from aligngpt.card import write_card
from aligngpt.checkpoint import (
    LLAVA_NAMES,
    LLM_NAMES,
    PUBLIC_NAMES,
    STAGE_1_FILE,
    TO_LLAVA,
    TO_PUBLIC,
    VISION_NAMES,
    Dropped,
    new_name,
)
from aligngpt.cli import main
from aligngpt.config import public_config
from aligngpt.convert import Options, convert
from aligngpt.model import fresh_align_weights, wanted_weights

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
PATCH, SIZE, TOKENS, IMAGE_ID = 14, 56, 384, 320


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def picture(width: int = 70, height: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def question(text: str = "What is it?") -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": text}]}]


def left_nothing(out: Path) -> bool:
    return not any(out.parent.glob(f"*{out.name}*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, oracle, public_folder, tower_config):
    """The oracle's model in every layout that it can be given in, without our help."""
    folder = tmp_path_factory.mktemp("places")
    place = SimpleNamespace(**{name: folder / name for name in ("public", "llm", "tower", "stage_1")})
    for path in vars(place).values():
        path.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(oracle / name, place.public)
        shutil.copy(oracle / name, place.llm)
    shutil.copytree(public_folder, place.public, dirs_exist_ok=True)
    weights = weights_of(place.public)

    fields = json.loads((place.public / "config.json").read_text())
    llm = {name: value for name, value in fields.items() if not name.startswith(("mm_", "tune_", "freeze_"))}
    (place.llm / "config.json").write_text(json.dumps(llm | {"model_type": "llama"}))
    body = {name: value for name, value in weights.items() if name.startswith(("model.", "lm_head."))}
    save_file(body, place.llm / "model.safetensors", metadata={"format": "pt"})

    (place.tower / "config.json").write_text(json.dumps(tower_config))
    prefix = "vision_tower.vision_tower."
    tower = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    save_file(tower, place.tower / "model.safetensors", metadata={"format": "pt"})

    trained = {name: value for name, value in weights.items() if name.startswith(("mm_projector", "align_ind"))}
    torch.save(trained, place.stage_1 / STAGE_1_FILE)
    place.options = Options(llm=place.llm, vision=str(place.tower))
    place.ours = folder / "ours"
    convert(place.public, place.ours, options=Options(vision=str(place.tower)))
    return place


def make_llava(folder: Path, llm, tower, *, strategy: str = "default", pictures=None, **text) -> Path:
    """A LLaVA folder as transformers saves it: the image token has a row of the padded vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "data/oracle")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = tower.config.image_size
    rows = (size // PATCH) ** 2
    config = LlavaConfig(
        text_config=llm.config,
        vision_config=tower.config,
        image_token_index=IMAGE_ID,
        image_seq_length=rows,
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(llm.base_model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.save_pretrained(folder)
    crop = {"height": size, "width": size}
    pictures = pictures or CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop)
    additional = int(strategy == "default")
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=additional,
        chat_template="{% for message in messages %}USER: {% for item in message['content'] %}{% if item['type'] == "
        "'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory, make_llm, make_tower):
    return make_llava(tmp_path_factory.mktemp("llava"), make_llm(vocab_size=TOKENS), make_tower())


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(("there", "back"), [(TO_PUBLIC, PUBLIC_NAMES), (TO_LLAVA, LLAVA_NAMES)])
def test_a_name_that_goes_comes_back(there, back, make_llm, make_tower):
    config = AlignGPTConfig.from_parts(make_llm().config, make_tower().config)
    for name in wanted_weights(config)[0]:
        theirs = new_name(name, there)
        assert isinstance(theirs, Dropped) == (there is TO_LLAVA and "align" in name)
        assert isinstance(theirs, Dropped) or new_name(theirs, back) == name
    assert new_name("model.stranger", back if back is LLAVA_NAMES else VISION_NAMES) is None
    assert isinstance(new_name("transformer.h.3.attn.bias", LLM_NAMES), Dropped)


# ---------------------------------------------------------------------------------------------------- public


@torch.no_grad()
def test_the_public_folder_there_and_back(place, tmp_path, load_case):
    """Logits are the recorded ones, weights the same bits, and the config says what the public code reads."""
    case = load_case("inf_prefill")
    inputs = {name: value for name, value in case.inputs.items() if name != "labels"}
    model = AutoModelForImageTextToText.from_pretrained(place.ours)
    torch.testing.assert_close(
        model(**inputs).logits, torch.from_numpy(case.arrays["out_logits"]), atol=1e-5, rtol=1e-5
    )
    notes = convert(place.ours, tmp_path / "public", to="public", options=Options(vision=str(place.tower)))
    assert any("takes the tower's weights from" in note for note in notes)

    theirs, again = weights_of(place.public), weights_of(tmp_path / "public")
    rotary = {name for name in theirs if name.endswith("inv_freq")}
    assert equal({name: value for name, value in theirs.items() if name not in rotary}, again)
    before, after = (json.loads((f / "config.json").read_text()) for f in (place.public, tmp_path / "public"))
    assert after["mm_vision_tower"] == str(place.tower)
    assert type(AutoProcessor.from_pretrained(tmp_path / "public")) is AlignGPTProcessor
    unread = {"_name_or_path", "transformers_version", "mm_vision_tower", "use_cache"}
    assert {name: after.get(name) for name in before.keys() - unread} == {n: before[n] for n in before.keys() - unread}
    assert (tmp_path / "public/tokenizer.model").read_bytes() == (place.public / "tokenizer.model").read_bytes()

    convert(tmp_path / "public", tmp_path / "ours")  # by the tower's folder, which its config names
    assert equal(weights_of(place.ours), weights_of(tmp_path / "ours"))
    first, second = (AlignGPTConfig.from_pretrained(f) for f in (place.ours, tmp_path / "ours"))
    assert first.to_dict() == second.to_dict()
    words = "A cat?\n\nUSER: two </s> ▁ ä"
    ids = [
        AutoTokenizer.from_pretrained(folder)(words).input_ids for folder in (place.llm, place.ours, tmp_path / "ours")
    ]
    assert ids[0] == ids[1] == ids[2]


def test_what_the_public_form_cannot_say_is_said(place, tmp_path, make_llm, make_tower):
    """Templates and gate_text by a sentence, and the latter comes back; sizes that its code has in its source too."""
    convert(place.stage_1, tmp_path / "ours", options=place.options)
    notes = "\n".join(convert(tmp_path / "ours", tmp_path / "public", to="public", options=place.options))
    for words in (
        "gate_text is 'prompt'",
        "template is 'plain'",
        "image_seq_length is 16; the public code is built for",
    ):
        assert words in notes
    assert "tokenizer.model" not in notes
    convert(tmp_path / "public", tmp_path / "again", options=place.options)
    assert AlignGPTConfig.from_pretrained(tmp_path / "again").gate_text == "prompt"

    llm = make_llm("qwen2", attention_bias=True)
    model = AlignGPTForConditionalGeneration.from_parts(llm, make_tower("siglip"), align_mode="local")
    save(model, tmp_path / "other", place)
    with pytest.raises(ValueError, match="the public AlignGPT form cannot hold this model: ") as refusal:
        convert(tmp_path / "other", tmp_path / "no", to="public", options=place.options)
    for words in (
        "align_mode is 'local'",
        "model_type is 'qwen2'",
        "'siglip_vision_model', it needs 'clip_vision_model'",
    ):
        assert words in str(refusal.value)
    assert left_nothing(tmp_path / "no")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ],
)
def test_rotary_settings_pass_through_the_public_form(rope, make_llm, make_tower):
    tower = make_tower().config
    config = AlignGPTConfig.from_parts(make_llm(rope_parameters=rope, num_key_value_heads=1).config, tower)
    config.dtype = torch.float32
    public = public_config(config, tower="x", max_length=512)
    if rope["rope_type"] == "linear":
        assert public["rope_scaling"] == {"type": "linear", "factor": 2.0}
    again = AlignGPTConfig.from_dict(public, vision_config=tower)
    assert public_config(again, tower="x", max_length=512) == public
    rotary = again.text_config.rope_parameters
    assert {name: rotary[name] for name in rope} == rope


def save(model, folder: Path, place, template: str = "v1") -> Path:
    model.save_pretrained(folder)
    AlignGPTProcessor.from_parts(place.llm, place.tower, model.config, template=template).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------- stage 1


@torch.no_grad()
def test_a_stage_1_file_becomes_a_model_and_comes_back(place, tmp_path, load_case):
    notes = convert(place.stage_1, tmp_path / "ours", options=place.options)
    assert any("the gate is new, drawn from seed 0" in note for note in notes)
    model = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert (processor.template, processor.image_processor.image_aspect_ratio) == ("plain", "square")
    case = load_case("pt_batch")
    assert '"_name_or_path"' not in (tmp_path / "ours/config.json").read_text()  # where the parts were
    loss = model.eval()(**case.inputs, align_levels=torch.from_numpy(case.arrays["align_ids"])).loss
    torch.testing.assert_close(loss, torch.from_numpy(case.arrays["out_loss"]), atol=1e-5, rtol=1e-5)
    fresh = fresh_align_weights(model.config, 0)["model.align_gate.linear_1.weight"]
    assert torch.equal(model.model.align_gate.linear_1.weight, fresh)

    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "s1.bin"), "--to", "stage-1"]) == 0
    theirs = torch.load(place.stage_1 / STAGE_1_FILE, weights_only=True)
    assert equal(theirs, torch.load(tmp_path / "s1.bin", weights_only=True))
    assert equal(theirs, torch.load(tmp_path / "s1.bin", weights_only=False))  # as the public code reads it


# ---------------------------------------------------------------------------------------------------- LLaVA


@pytest.mark.parametrize("names", ["the first years'", "a model's own"])
@torch.no_grad()
def test_a_llava_becomes_ours_and_comes_back(llava, tmp_path, names):
    """In both styles of names; with LLaVA's own processor logits are equal, and what comes back is the same folder."""
    source = tmp_path / "llava"
    shutil.copytree(llava, source)
    if names == "a model's own":
        model = LlavaForConditionalGeneration.from_pretrained(llava)
        rotary = {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
        save_file(model.state_dict() | rotary, source / "model.safetensors", metadata={"format": "pt"})
    (source / "chat_template.jinja").rename(source / "chat_template.json")
    notes = "\n".join(convert(source, tmp_path / "ours"))
    assert "not the folder's chat template" in notes
    (source / "chat_template.json").rename(source / "chat_template.jinja")
    assert ("left out 1 weights: rotary" in notes) == (names == "a model's own")
    theirs, processor = LlavaForConditionalGeneration.from_pretrained(source), AutoProcessor.from_pretrained(source)
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    assert type(ours) is AlignGPTForConditionalGeneration
    assert (ours.config.align_mode, ours.config.image_token_id, ours.config.align_token_id) == (
        "none",
        IMAGE_ID,
        TOKENS,
    )
    inputs = processor(images=[picture()], text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)

    own = AutoProcessor.from_pretrained(tmp_path / "ours")
    mine = own.apply_chat_template(question(), tokenize=True)
    torch.testing.assert_close(mine["pixel_values"], inputs["pixel_values"], atol=1e-5, rtol=1e-5)
    assert int((mine["input_ids"] == IMAGE_ID).sum()) == 16
    torch.testing.assert_close(ours(**mine).logits, theirs(mine["input_ids"], mine["pixel_values"]).logits)

    convert(tmp_path / "ours", tmp_path / "back", to="llava")
    again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    assert equal(again.state_dict(), theirs.state_dict())
    before, after = (model.config.to_dict() for model in (theirs, again))
    assert after | {"_name_or_path": None} == before | {"_name_or_path": None}
    back = AutoProcessor.from_pretrained(tmp_path / "back")
    assert type(back) is LlavaProcessor
    repeated = back(images=[picture()], text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    assert all(torch.equal(repeated[name], inputs[name]) for name in ("input_ids", "pixel_values"))


def test_a_llava_begins_an_aligngpt(llava, tmp_path):
    options = ["--align-mode", "adaptive", "--num-levels", "4", "--seed", "3", "--dtype", "bf16"]
    assert main(["convert", str(llava), str(tmp_path / "ours"), *options]) == 0
    model = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert (model.config.align_mode, model.config.num_align_levels, model.dtype) == ("adaptive", 4, torch.bfloat16)
    fresh = fresh_align_weights(model.config, 3)
    assert torch.equal(model.model.align_table, fresh["model.align_table"].bfloat16())
    assert torch.equal(model.lm_head.weight, weights_of(llava)["language_model.lm_head.weight"].bfloat16())
    inputs = AutoProcessor.from_pretrained(tmp_path / "ours").apply_chat_template(question(), tokenize=True)
    assert model(**inputs).align_weights.shape == (1, 3)


@pytest.mark.parametrize(("llm", "tower"), [("llama", "clip"), ("qwen2", "siglip")])
@torch.no_grad()
def test_a_model_without_the_token_becomes_a_llava(llm, tower, place, make_llm, make_tower, tmp_path):
    """The vocabulary grows by rows whose logit is the mean of all others. The second has a tied head and no CLS."""
    tie = llm == "qwen2"
    parts = make_llm(llm, tie_word_embeddings=tie), make_tower(tower)
    aspect = "square" if tie else "pad"
    ours = AlignGPTForConditionalGeneration.from_parts(*parts, align_mode="none", image_aspect_ratio=aspect)
    notes = convert(save(ours, tmp_path / "ours", place), tmp_path / "llava", to="llava")
    assert any("grows from 320 to 384 rows" in note for note in notes)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not any(info.values())
    own, processor = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("ours", "llava"))

    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(question(), **arguments)
    mine = own.apply_chat_template(question(), tokenize=True)
    torch.testing.assert_close(inputs["pixel_values"], mine["pixel_values"], atol=1e-5, rtol=1e-5)
    ids = torch.where(inputs["input_ids"] == processor.image_token_id, ours.config.image_token_id, inputs["input_ids"])
    logits = ours(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    grown = theirs(**inputs).logits
    torch.testing.assert_close(grown[..., :320], logits, atol=1e-5, rtol=1e-5)
    mean = logits.mean(-1, keepdim=True)
    torch.testing.assert_close(grown[..., 320:], mean.expand(*logits.shape[:-1], 64), atol=1e-5, rtol=1e-5)
    answers = theirs.generate(**inputs, max_new_tokens=4), ours.generate(**mine, max_new_tokens=4)
    assert answers[0].shape[1] == inputs["input_ids"].shape[1] + 4
    assert answers[1].shape[1] == mine["input_ids"].shape[1] + 4

    convert(tmp_path / "llava", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "twice", to="llava")
    assert equal(weights_of(tmp_path / "llava"), weights_of(tmp_path / "twice"))


@pytest.mark.parametrize("template", ["v1", "chat"])
def test_the_template_that_a_llava_gets_is_ours(template, place, make_llm, make_tower, tmp_path):
    model = AlignGPTForConditionalGeneration.from_parts(make_llm(), make_tower(), align_mode="none")
    ours = save(model, tmp_path / "ours", place)
    if template == "chat":  # of text alone
        own = AlignGPTProcessor.from_pretrained(ours)
        own.template, own.tokenizer.chat_template = (
            template,
            (
                "{% for message in messages %}{{ '<' + message.role + '>' + message.content + eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}"
            ),
        )
        own.save_pretrained(ours)
    convert(ours, tmp_path / "llava", to="llava")
    own, processor = AlignGPTProcessor.from_pretrained(ours), AutoProcessor.from_pretrained(tmp_path / "llava")
    mark = {"type": "image", "image": picture()}
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    talks = [
        [("user", [mark, text(" A cat? ")])],
        [("user", [mark])],
        [("user", [text("two: "), mark, mark])],
        [("user", " no picture ")],
        [("system", "Be brief."), ("user", [mark, text("Which?")]), ("assistant", " Red. "), ("user", "Sure?")],
        [("system", ""), ("user", "Hi"), ("assistant", [text("Yes")])],
    ]
    for talk in talks:
        prompt = talk[-1][0] == "user"
        messages = [{"role": role, "content": content} for role, content in talk]
        rendered = processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        assert rendered == own.apply_chat_template(messages, add_generation_prompt=prompt)


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_converted_is_refused_before_anything_is_written(place, llava, tmp_path, capsys):
    stretched = tmp_path / "stretched"
    shutil.copytree(llava, stretched)
    config = json.loads((stretched / "processor_config.json").read_text())
    config["image_processor"] |= {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False}
    (stretched / "processor_config.json").write_text(json.dumps(config))
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.json").write_text('{"model_type": "llava", "mm_hidden_size": 1024}')
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text('{"model_type": "llava", "quantization_config": {"bits": 4}}')
    bare = tmp_path / "bare"
    shutil.copytree(place.public, bare)
    for name in TOKENIZER_FILES:
        (bare / name).unlink()
    misfit = tmp_path / "misfit"
    shutil.copytree(place.ours, misfit)
    fields = json.loads((misfit / "processor_config.json").read_text())
    (misfit / "processor_config.json").write_text(json.dumps(fields | {"rows_per_image": 99}))
    wordy = tmp_path / "wordy"
    shutil.copytree(place.public, wordy)
    (wordy / "tokenizer.model").unlink()
    words = json.loads((place.ours / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {f"word{number}": number for number in range(320, 330)}
    (wordy / "tokenizer.json").write_text(json.dumps(words))
    tower = ("--vision", place.tower)
    other = tmp_path / "other tower"
    other.mkdir()
    wide = json.loads((place.tower / "config.json").read_text()) | {"hidden_size": 64, "image_size": 28}
    (other / "config.json").write_text(json.dumps(wide))
    known = "openai/clip-vit-large-patch14-336"
    for source, options, message in [
        (place.ours, ("--to", "llava"), "align_mode is 'adaptive': LLaVA has no alignment token"),
        (place.ours, ("--to", "public"), "this tower has the size of none of openai/clip"),
        (place.ours, ("--to", "public", "--vision", known), f"{known} is not the model's: hidden_size is 1024, not 32"),
        (place.ours, ("--to", "public", "--vision", other), "hidden_size is 64, not 32, image_size is 28, not 56; --v"),
        (place.ours, ("--align-mode", "none"), "--align-mode is none; only a LLaVA takes it"),
        (place.ours, ("--template", "chat"), "the tokenizer needs a chat template"),
        (place.public, (), "is 'clip', neither a local folder nor one of openai/clip"),
        (bare, tower, "bare has no tokenizer that can be read"),
        (place.stage_1, (), "--llm and --vision need to name the folders"),
        (place.stage_1, ("--llm", place.tower, *tower), "llm has model_type 'clip_vision_model'; it needs to be"),
        (place.stage_1, ("--llm", place.ours, *tower), "llm has model_type 'aligngpt'; it needs to be"),
        (place.stage_1, ("--llm", place.llm, "--vision", place.llm), "vision has model_type 'llama'"),
        (place.llm, (), "holds a 'llama' model"),
        (llava, ("--to", "stage-1"), "align_mode is 'none': the model has no alignment table"),
        (stretched, (), "do_center_crop is False, size is"),
        (first, (), "the layout of the first LLaVA code"),
        (quantised, (), "holds quantised weights"),
        (tmp_path / "nowhere", (), "which is no folder and no file"),
        (misfit, (), f"the processor of {misfit} has rows_per_image 99; the model's config needs 16"),
        (wordy, tower, "has a tokenizer of 330 tokens; the LLM has 320, it needs its own (--llm)"),
        (place.ours, ("--max-shard-gb", "0"), "--max-shard-gb is 0.0"),
        (place.ours, ("--max-shard-gb", "inf"), "--max-shard-gb is inf"),
        (place.ours, ("--llm", tmp_path / "nowhere"), "which is no folder"),
        (place.ours, ("--llm", llava), "whose tokenizer is not the one of"),
    ]:
        assert main(["convert", str(source), str(tmp_path / "out"), *map(str, options)]) == 2
        said = capsys.readouterr().err
        assert message in said, said
        assert left_nothing(tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert main(["convert", str(place.ours), str(tmp_path / "out")]) == 2
    assert "which exists; it needs a new name" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("file", ["config", "tokenizer_config", "tokenizer", "processor_config", "generation_config"])
def test_a_damaged_json_file_is_said_in_a_sentence(file, place, tmp_path, capsys):
    for content in ("{", "[1]", '{"text_config": 3, "image_processor": 3, "model": 3, "model_type": "aligngpt"}'):
        source = tmp_path / "source"
        shutil.copytree(place.ours, source, dirs_exist_ok=True)
        (source / f"{file}.json").write_text(content)
        code = main(["convert", str(source), str(tmp_path / "out")])
        said = capsys.readouterr().err
        if code == 0:  # unknown keys are no damage where nothing reads them
            assert "config" in file
            assert content.endswith("}")
            shutil.rmtree(tmp_path / "out")
        else:
            assert code == 2
            assert str(source) in said
        assert left_nothing(tmp_path / "out")


def test_an_interrupted_conversion_says_so_and_leaves_nothing(place, tmp_path, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sync_to_disk", interrupted)
    assert main(["convert", str(place.ours), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.endswith("aligngpt convert: interrupted\n")
    assert left_nothing(tmp_path / "out")


class Dropper:
    """Unpickling it writes a file: what a loader that unpickles would run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("layout", ["public", "ours", "llava", "stage_1"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_fault_51_a_pickle_posing_as_a_checkpoint_is_refused(layout, file, place, llava, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llava if layout == "llava" else getattr(place, layout), source)
    trace = tmp_path / "ran"
    content = pickle.dumps({"lm_head.weight": Dropper(trace)})
    (source / "model.safetensors").unlink(missing_ok=True)
    file = STAGE_1_FILE if layout == "stage_1" else file
    (source / file).write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole file of plain tensors") as refusal:
        convert(source, tmp_path / "out", options=place.options)
    assert "weights_only" not in str(refusal.value)  # PyTorch's advice is to run it
    assert not trace.exists()
    assert left_nothing(tmp_path / "out")
    if layout == "ours":
        with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
            AlignGPTForConditionalGeneration.from_pretrained(source)
        assert not trace.exists()


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("config.json", lambda code: code),
        ("config.json", lambda code: {"text_config": {"rope": [code]}}),
        ("tokenizer_config.json", lambda code: code),
        ("processor_config.json", lambda code: {"image_processor": code}),
        ("generation_config.json", lambda code: code),
    ],
)
def test_fault_52_a_folder_that_brings_code_is_refused(file, wrap, place, tmp_path):
    """By the command, by the model and by the processor alike; a vocabulary may have the word."""
    source = tmp_path / "source"
    shutil.copytree(place.ours, source)
    (source / "vocab.json").write_text('{"auto_map": 1}')
    path = source / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(
        json.dumps(content | wrap({"auto_map": {"AutoConfig": "code.C", "AutoTokenizer": ["code.T", None]}}))
    )
    (source / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass T: pass\n")
    for read in (
        lambda: convert(source, tmp_path / "out"),
        lambda: AlignGPTForConditionalGeneration.from_pretrained(source),
        lambda: AlignGPTProcessor.from_pretrained(source),
        lambda: convert(place.stage_1, tmp_path / "out", options=Options(llm=source, vision=str(place.tower))),
    ):
        with pytest.raises(ValueError, match=f"{file} has auto_map, which names code to run; AlignGPT runs none"):
            read()
    public = tmp_path / "public"
    shutil.copytree(place.public, public)
    fields = json.loads((public / "config.json").read_text())
    (public / "config.json").write_text(json.dumps(fields | {"mm_vision_tower": str(source)}))
    with pytest.raises(ValueError, match=f"{file} has auto_map, which names code to run; AlignGPT runs none"):
        convert(public, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert left_nothing(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no table", r"1 missing: model\.align_table$"),
        (
            "fewer words",
            r"2 of another shape: lm_head\.weight is \(320, 64\), the config says \(352, 64\), model\.lang",
        ),
        ("more layers", r"9 missing: model\.language_model\.layers\.2\.input_layernorm\.weight, "),
        ("a stranger", r"1 weights with an unknown name: stranger\.weight$"),
        ("one more layer's", r"1 left over: model\.language_model\.layers\.7\.mlp\.up_proj\.weight$"),
        ("both styles", r"holds model\.align_table twice, once as model\.align_indicators\.indicator_embs$"),
    ],
)
def test_fault_53_another_models_weights_are_refused_with_their_keys(change, message, place, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(place.public, source)
    config, weights = json.loads((source / "config.json").read_text()), weights_of(source)
    table = weights["align_indicators.indicator_embs"]
    match change:
        case "no table":
            del weights["align_indicators.indicator_embs"]
        case "fewer words":
            config["vocab_size"] = 352
        case "more layers":
            config["num_hidden_layers"] = 3
        case "a stranger":
            weights["stranger.weight"] = table.clone()
        case "one more layer's":
            weights["model.layers.7.mlp.up_proj.weight"] = table.clone()
        case "both styles":
            weights["model.align_indicators.indicator_embs"] = table.clone()
    (source / "config.json").write_text(json.dumps(config))
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", options=place.options)
    assert left_nothing(tmp_path / "out")


def test_fault_53_a_llava_of_other_sizes_is_refused_with_its_keys(llava, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llava, source)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"9 left over: model\.language_model\.layers\.1\.input_layernorm\.weight, "):
        convert(source, tmp_path / "out")
    weights = weights_of(source)
    head = weights["language_model.lm_head.weight"]
    save_file(weights | {"lm_head.weight": head.clone()}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds lm_head\.weight twice"):
        convert(source, tmp_path / "out")


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(llava, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llava, source)
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"says that lm_head\.weight is tied to .*, but holds different ones"):
        convert(source, tmp_path / "out")
    weights = weights_of(source)
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out")
    assert "lm_head.weight" not in weights_of(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- the output


@pytest.mark.parametrize("to", ["aligngpt", "stage-1"])
def test_a_full_disk_leaves_nothing(to, place, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the system's own refusal to write on
    try:
        with pytest.raises(OSError, match=r"OUT is .*, which could not be written \(.*\); nothing of it is left"):
            convert(place.ours, tmp_path / "out", to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_nothing(tmp_path / "out")


def test_a_disk_without_room_is_found_before(place, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for to in ("aligngpt", "stage-1"):
        with pytest.raises(ValueError, match=r"it needs 0\.0 GB, and .* has 0\.0 GB left"):
            convert(place.ours, tmp_path / "new" / "out", to=to)
    assert not (tmp_path / "new").exists()


def test_an_unfinished_conversion_is_replaced_and_a_running_one_left_alone(place, tmp_path):
    temporary = tmp_path / ".out.converting"
    (temporary / "deep").mkdir(parents=True)
    (temporary / "model.safetensors").write_text("half")
    running = os.open(temporary, os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="which another conversion is writing"):
        convert(place.ours, tmp_path / "out")
    os.close(running)
    assert (temporary / "model.safetensors").exists()
    convert(place.ours, tmp_path / "out", max_shard_bytes=100_000)
    assert not temporary.exists()
    assert not (tmp_path / "out/deep").exists()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert equal(loaded, AlignGPTForConditionalGeneration.from_pretrained(place.ours).state_dict())


def test_a_type_is_given_and_half_precision_must_hold_it(place, tmp_path):
    convert(place.ours, tmp_path / "half", options=Options(dtype=torch.float16))
    half, whole = weights_of(tmp_path / "half"), weights_of(place.ours)
    assert equal(half, {name: value.half() for name, value in whole.items()})
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16
    source = tmp_path / "source"
    shutil.copytree(place.ours, source)
    whole["lm_head.weight"][0] = torch.nan
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "nan", options=Options(dtype=torch.float16))  # which it can hold
    whole["model.align_table"] = whole["model.align_table"] + 1e5
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.align_table holds values beyond 65504"):
        convert(source, tmp_path / "out", options=Options(dtype=torch.float16))
    assert left_nothing(tmp_path / "out")


# The resident set's highest level. (ru_maxrss would begin at the level of the process that started this one.)
_MEASURED = """
import sys
import aligngpt.convert, transformers.models.llama.modeling_llama, transformers.models.clip.modeling_clip
from aligngpt.cli import main
def highest():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = highest()
code = main(["convert", *sys.argv[1:]])
print(highest() - before)
sys.exit(code)
"""


def test_memory_is_bounded_by_a_shard(place, tmp_path):
    """A model of 236 MB passes through 32 MiB shards: beside a shard there are 64 MiB of mapped file and a tensor."""
    public = json.loads((place.public / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "vocab_size": 16000}
    (tmp_path / "public").mkdir()
    shutil.copytree(place.public, tmp_path / "public", dirs_exist_ok=True)
    (tmp_path / "public/config.json").write_text(json.dumps(public | sizes))
    vision = json.loads((place.tower / "config.json").read_text())
    config = AlignGPTConfig.from_dict(public | sizes, vision_config=vision)
    header, end = {}, 0
    for name, weight in wanted_weights(config)[0].items():
        size = 2 * weight.numel()
        shape = list(weight.shape)
        header[new_name(name, TO_PUBLIC)] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "public/model.safetensors").open("wb") as file:  # zeros that take no room on the disk
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    arguments = (tmp_path / "public", tmp_path / "out", "--vision", place.tower, "--max-shard-gb", 1 / 32)
    command = [sys.executable, "-c", _MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert end > 230e6
    shutil.rmtree(tmp_path / "out")
    assert int(done.stdout.split()[-1]) < 180 * 1024


# ---------------------------------------------------------------------------------------------------- the card


def front_matter(folder: Path) -> tuple[dict, str]:
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize("layout", ["aligngpt", "public", "after stage 1", "llava", "llava, llama_2"])
def test_the_card_is_true_and_its_code_runs(layout, place, llava, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    if layout in ("aligngpt", "public"):
        convert(place.public, out, to=layout, options=place.options)
    elif layout == "after stage 1":
        convert(place.stage_1, out, options=place.options)
    else:
        convert(llava, tmp_path / "ours", options=Options(template="llama_2" if "llama_2" in layout else None))
        convert(tmp_path / "ours", out, to="llava")
    head, body = front_matter(out)
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert "base_model" not in head  # this tower is nobody's
    assert "license" not in head
    assert ("alignment token" in body) == ("llava" not in layout)
    assert f"| image token | {IMAGE_ID if 'llava' in layout else 321} |" in body
    assert ("[INST]" in body) == ("llama_2" in layout)
    assert ("caption" in body) == (layout == "after stage 1")
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    picture().save(out / "picture.jpg")
    monkeypatch.chdir(out)
    exec(code, {})
    assert capsys.readouterr().out


def test_a_known_tower_is_named_and_an_unused_table_too(make_llm, make_tower, place, tmp_path):
    config = AlignGPTConfig.from_parts(make_llm().config, make_tower().config, align_mode="none")
    processor = AlignGPTProcessor.from_parts(place.llm, place.tower, config)
    name = "openai/clip-vit-large-patch14-336"
    write_card(tmp_path, config, processor, origin="Made here.", base_models=[name])
    head, body = front_matter(tmp_path)
    assert head["base_model"] == [name]
    assert "The alignment table and the gate in the folder are not used" in " ".join(body.split())
    assert "alignment token |" not in body
