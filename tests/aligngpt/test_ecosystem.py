"""What people put around a model of transformers: auto classes, pipelines, adapters, quantisation, offloading, Trainer.

Each is used as its own documentation says, and must give the numbers of the model alone.
"""

import base64
import copy
import functools
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

import aligngpt.model
from aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from aligngpt.attention import NAME
from aligngpt.data.llava_json import Sample
from aligngpt.data.records import RecordList
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.text import Turn

VOCAB, WIDTH = 320, 64


@pytest.fixture(scope="module")
def folder(make_llm, make_tower, tokenizer, tmp_path_factory):
    """A saved model and processor. Widths are multiples of 64, a block of bitsandbytes; weights large enough that an
    answer hangs on its prompt.
    """
    folder = tmp_path_factory.mktemp("model")
    llm = make_llm("llama", intermediate_size=128, initializer_range=0.1)
    model = AlignGPTForConditionalGeneration.from_parts(llm, make_tower("clip"))
    model.generation_config.eos_token_id = None  # a random model must not stop at chance
    model.save_pretrained(folder)
    AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return AlignGPTForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AlignGPTProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(processor):
    """A prompt with a picture, one with two, and one without."""
    texts = ["What is <image>\nthis?", "<image><image> Two.", "No picture, only words"]
    return processor([picture("red"), picture("navy"), picture("olive")], texts)


@pytest.fixture(scope="module")
def plain_text(processor):
    """Ids that are not words: with them left out an answer's text does not depend on what stands before it."""
    tokenizer = processor.tokenizer
    return [token for token in range(len(tokenizer)) if not tokenizer.convert_ids_to_tokens(token).isalpha()]


def picture(colour="red"):
    image = Image.new("RGB", (60, 40), colour)
    image.putpixel((5, 7), (255, 255, 255))
    return image


def message(text, *items):
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def answers(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, **kwargs)


def said(caplog):
    return [r.getMessage() for r in caplog.records if "is called instead of the fused op" in r.getMessage()]


@pytest.fixture
def fallbacks(caplog):
    """What the model says of ops that it leaves out, once in a process."""
    aligngpt.model._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger="aligngpt.model")
    return functools.partial(said, caplog)


# ---- loading and asking --------------------------------------------------------------------------------------------


def test_auto_classes_read_a_saved_folder(folder, model, processor, inputs):
    assert type(AutoConfig.from_pretrained(folder)) is AlignGPTConfig
    again, its_processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert (type(again), type(its_processor)) == (AlignGPTForConditionalGeneration, AlignGPTProcessor)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert its_processor.to_dict() == processor.to_dict()
    assert not any(parameter.requires_grad for parameter in again.model.vision_tower.parameters())
    rows = processor.decode(inputs["input_ids"][1:], skip_special_tokens=True)
    assert rows == [processor.decode(row, skip_special_tokens=True) for row in inputs["input_ids"][1:].tolist()]
    assert rows[1] == "No picture, only words"
    last = inputs["input_ids"][2]
    for ids in (last, last.numpy(), list(last), list(last.numpy())):
        assert processor.decode(ids, skip_special_tokens=True) == rows[1]
    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    moved = its_processor(picture(), "<image> What?", return_tensors="pt").to("cpu", torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in moved.items()}
    assert kinds["pixel_values"] == half.dtype == torch.bfloat16
    assert (kinds["input_ids"], kinds["gate_mask"]) == (torch.int64, torch.bool)
    assert logits(half, moved).isfinite().all()


def test_messages_as_users_of_transformers_write_them(processor, tmp_path):
    picture().save(tmp_path / "a.png")
    file = io.BytesIO()
    picture().save(file, "PNG")
    coded = base64.b64encode(file.getvalue()).decode()
    path, data = str(tmp_path / "a.png"), f"data:image/png;base64,{coded}"
    usual = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    expected = processor.apply_chat_template([message("What?", {"type": "image", "image": picture()})], **usual)
    for item in (
        {"type": "image", "image": path},
        {"type": "image", "image": np.array(picture())},
        {"type": "image", "path": path},
        {"type": "image", "url": path},
        {"type": "image", "url": data},
        {"type": "image", "base64": coded},
        {"type": "image_url", "image_url": {"url": data}},
    ):
        padding = {"processor_kwargs": {"padding": True}}
        found = processor.apply_chat_template([[message("What?", item)], [message("Why?", item)]], **usual, **padding)
        first = found["attention_mask"][0].bool()
        assert torch.equal(found["input_ids"][0][first], expected["input_ids"][0])
        assert torch.equal(found["pixel_values"], expected["pixel_values"].repeat(2, 1, 1, 1))
    for item in ({"type": "image", "url": "https://x/a.png"}, {"type": "image_url", "image_url": {"url": "http://x"}}):
        with pytest.raises(ValueError, match="is a URL; it needs to be downloaded first"):
            processor.apply_chat_template([message("What?", item)], **usual)

    # The older way: text first, its pictures beside it.
    prompt = processor.apply_chat_template([message("What?", {"type": "image"})], add_generation_prompt=True)
    for images in (picture(), [picture()], [[picture()]]):
        found = processor(text=prompt, images=images, return_tensors="pt", padding=True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("template", ["v1", "llama_2", "plain", "chat"])
def test_an_answer_that_is_to_go_on_ends_as_in_training(processor, template):
    processor = copy.copy(processor)
    processor.template = template
    if template == "chat":
        processor.tokenizer = copy.deepcopy(processor.tokenizer)
        processor.tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    begun = {"role": "assistant", "content": "A red car in"}
    asked = [message("What?", {"type": "image", "image": picture()})]
    found = processor.apply_chat_template([*asked, begun], tokenize=True, continue_final_message=True)
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A red car in"))
    learned = processor.text(Sample("x", ("a.png",), turns, None, 0))
    length = found["input_ids"].shape[1]
    assert torch.equal(found["input_ids"][0], learned.input_ids[:length])
    assert torch.equal(found["gate_mask"][0], learned.gate_mask[:length])
    assert (learned.labels[length:] >= 0).all()
    assert 0 < len(learned.labels[length:]) <= 3  # </s>, a blank or a newline
    assert processor.decode(found["input_ids"][0]).endswith("A red car in")


@pytest.mark.parametrize("source", ["folder", "objects"])
def test_pipeline_answers_as_generate(folder, model, processor, plain_text, source, tmp_path):
    objects = {"model": model, "processor": processor}
    pipe = pipeline("image-text-to-text", **({"model": str(folder)} if source == "folder" else objects))
    picture("navy").save(tmp_path / "b.png")
    red, navy = {"type": "image", "image": picture()}, {"type": "image", "path": str(tmp_path / "b.png")}
    chats = [[message("What is red?", red)], [message("And this?", navy, red)], [message("Only words?")]]
    greedy = {"suppress_tokens": plain_text, "do_sample": False}

    def expected(inputs):
        ids = answers(model, inputs, suppress_tokens=plain_text)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(ids, skip_special_tokens=True)

    def ask(**given):  # the pipeline writes into what it is given
        return pipe(**given, generate_kwargs=dict(greedy), max_new_tokens=5)

    wanted = [expected(processor.apply_chat_template(chat, tokenize=True))[0] for chat in chats]
    assert len(set(wanted)) == 3
    for skip in (True, False):
        found = ask(text=chats, return_full_text=False, skip_special_tokens=skip)
        assert [answer[0]["generated_text"] for answer in found] == wanted
    assert ask(text=chats[0])[0]["generated_text"] == [*chats[0], {"role": "assistant", "content": wanted[0]}]
    together = ask(text=chats[:2], batch_size=2, return_full_text=False)
    assert [answer[0]["generated_text"] for answer in together] == wanted[:2]

    prompts, images = ["USER: <image> What is this?", "Say <image>"], [picture(), picture("navy")]
    spoken = expected(processor(text=prompts, images=images))
    found = ask(images=images, text=prompts)
    assert [answer["generated_text"] for answer in found] == [p + a for p, a in zip(prompts, spoken, strict=True)]

    begun = [*chats[0], {"role": "assistant", "content": [{"type": "text", "text": "A red car in"}]}]
    spoken = expected(processor.apply_chat_template(begun, tokenize=True, continue_final_message=True))
    went_on = ask(text=begun)[0]["generated_text"][-1]["content"][-1]["text"]
    assert went_on == "A red car in" + spoken[0]
    with pytest.raises(ValueError, match="takes no max_length=3"):
        ask(text=chats[0], processor_kwargs={"max_length": 3})


# ---- adapters ------------------------------------------------------------------------------------------------------


def adapted(model, **kwargs):
    """A LoRA of the LLM that changes something from the start."""
    target = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **({"target_modules": target} | kwargs))
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return adapted


def learned(inputs):
    """Labels of the last tokens of each prompt."""
    return inputs["input_ids"].masked_fill(inputs["input_ids"] >= VOCAB, -100).index_fill(1, torch.arange(20), -100)


def test_lora_trains_is_kept_and_merges(folder, model, inputs, tmp_path):
    whole = ["align_gate", "multi_modal_projector"]
    lora = adapted(model, modules_to_save=whole).train()
    lora(**inputs, labels=learned(inputs)).loss.backward()
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert {name.split(".modules_to_save.")[0].split(".")[-1] for name in trained if "modules_to" in name} == set(whole)
    for name, parameter in lora.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name

    lora.eval()
    expected, spoken = logits(lora, inputs), answers(lora, inputs)
    assert not torch.allclose(expected, logits(AutoModelForImageTextToText.from_pretrained(folder), inputs), atol=1e-2)
    lora.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path).eval()
    assert torch.equal(logits(again, inputs), expected)
    by_transformers = AutoModelForImageTextToText.from_pretrained(folder)
    by_transformers.load_adapter(tmp_path)
    assert torch.equal(logits(by_transformers, inputs), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(answers(merged, inputs), spoken)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(
        logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), inputs), logits(merged, inputs)
    )


def test_lora_of_embedding_and_head_goes_by_the_modules(model, inputs, fallbacks):
    lora = adapted(model, target_modules=["embed_tokens", "lm_head"]).train()
    lora(**inputs, labels=learned(inputs)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in lora.named_parameters() if "lora_" in name)
    assert sorted(text.split(":")[0] for text in fallbacks()) == ["Embedding", "Linear"]
    lora.eval()
    expected, spoken = logits(lora, inputs), answers(lora, inputs)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(answers(merged, inputs), spoken)


def test_adapters_that_cannot_learn_are_refused(model, inputs):
    lora = adapted(copy.deepcopy(model), target_modules=["q_proj"]).train()
    with pytest.raises(ValueError, match=r"vision_tower\.encoder\..*lora_A.* is to be trained; the tower is frozen"):
        lora(**inputs, labels=learned(inputs))
    lora = adapted(copy.deepcopy(model), target_modules="all-linear", exclude_modules=r".*vision_tower.*").train()
    lora(**inputs, labels=learned(inputs)).loss.backward()
    prefix = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=WIDTH, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="past_key_values holds 3 tokens in front of an image"):
        get_peft_model(copy.deepcopy(model), prefix)(**inputs)
    with pytest.raises(ValueError, match="peft's prompt and prefix tuning"):
        answers(get_peft_model(model, prefix), inputs)


# ---- quantisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_quantised_models_answer_as_their_rounded_weights(folder, device, tmp_path):
    packages = Path(sys.prefix) / "quantisers"  # not in site-packages: it makes every import of transformers slow
    assert packages.is_dir(), f"{packages} is missing; make install puts torchao and bitsandbytes there"
    path = os.pathsep.join([str(packages), *sys.path])
    script = Path(__file__).with_name("quantised_checks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(tmp_path), device],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- offloading ----------------------------------------------------------------------------------------------------


BY_HAND = {
    "model.vision_tower": "disk",
    "model.multi_modal_projector": "cpu",
    "model.align_table": "cpu",
    "model.align_gate": "disk",
    "model.language_model": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize(
    "placed",
    [
        pytest.param({"device_map": "auto", "max_memory": {"cpu": 330_000}}, id="half on disk"),
        pytest.param({"device_map": "auto", "max_memory": {"cpu": 10}}, id="all on disk"),  # the table too
        pytest.param({"device_map": BY_HAND}, id="by hand"),
        pytest.param({"device_map": "auto", "max_memory": {0: 500_000, "cpu": "1GB"}}, id="gpu", marks=pytest.mark.gpu),
    ],
)
def test_device_map(folder, model, inputs, placed, fallbacks, tmp_path):
    """Whatever lies elsewhere is fetched, also where `generate` embeds the prompt without the model's `forward`."""
    spread = AutoModelForImageTextToText.from_pretrained(folder, offload_folder=tmp_path, **placed)
    where = spread.hf_device_map
    assert {"disk", "cpu"} & {str(device) for device in where.values()}
    for layer in ("model.language_model.layers.0", "model.vision_tower.encoder.layers.0"):  # these stay whole
        assert not any(name.startswith(layer + ".") for name in where)
    device = "cuda" if 0 in where.values() else "cpu"
    there = {name: tensor.to(device) for name, tensor in inputs.items()}
    torch.testing.assert_close(logits(spread, there).cpu(), logits(model, inputs), atol=1e-4, rtol=1e-4)
    assert torch.equal(answers(spread, there).cpu(), answers(model, inputs))
    levels = torch.tensor([0, 7])
    fixed = logits(spread, {**there, "align_levels": levels.to(device)}).cpu()
    torch.testing.assert_close(fixed, logits(model, {**inputs, "align_levels": levels}), atol=1e-4, rtol=1e-4)
    assert fallbacks()


# ---- Trainer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(processor, tmp_path_factory):
    """Eight samples of different lengths, every third without a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    samples = []
    for number in range(8):
        names = () if number % 3 == 2 else (f"{number}.png",)
        for name in names:
            picture(("red", "navy", "olive", "black", "white")[number % 5]).save(folder / name)
        ask = "<image>\nWhat is this?" if names else "Say it."
        turns = (Turn("user", ask), Turn("assistant", "so it is " * (1 + number % 4)))
        samples.append(Sample(str(number), names, turns, None, number))
    records = RecordList(samples, folder)
    return [processor.example(sample, records) for sample in samples]


def for_stage_2(model):
    """Tower and table frozen."""
    model.model.align_table.requires_grad_(False)
    return model


def trainer(model, processor, examples, folder, seen=None, packed=False, **kwargs):
    def collator(some):
        if seen is not None:
            seen.append([example.id for example in some])
        return processor.collate(some, packed=packed).trainer_inputs()

    fields = {
        "output_dir": folder,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": True,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**(fields | kwargs))
    return Trainer(
        model,
        arguments,
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=collator,
        processing_class=processor,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_as_our_loss_says(folder, model, processor, examples, tmp_path):
    """Each step is that of one batch of its four samples, in which tokens count alike; a checkpoint goes on."""
    seen = []
    straight = trainer(for_stage_2(model), processor, examples, tmp_path, seen)
    straight.train()
    steps = [seen[2 * step] + seen[2 * step + 1] for step in range(6)]

    own = for_stage_2(AutoModelForImageTextToText.from_pretrained(folder)).train()
    trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    expected = []
    for names in steps:
        assert len(names) <= 4
        batch = processor.collate([example for name in names for example in examples if example.id == name])
        loss = own(**batch.model_inputs()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses(straight)), torch.tensor(expected), atol=1e-4, rtol=0)
    assert losses(straight)[-1] < 0.8 * losses(straight)[0]
    untouched = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, own.get_parameter(name), atol=1e-4, rtol=0)
        assert torch.equal(parameter, untouched[name]) == ("vision_tower" in name or "align_table" in name), name

    half = tmp_path / "checkpoint-3"
    again = AutoModelForImageTextToText.from_pretrained(half)
    assert AutoProcessor.from_pretrained(half).to_dict() == processor.to_dict()
    resumed = trainer(for_stage_2(again), processor, examples, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(half))
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_trainer_evaluates(model, processor, examples, tmp_path):
    found = trainer(model, processor, examples, tmp_path).predict(examples)
    batches = [processor.collate(examples[start : start + 3]) for start in (0, 3, 6)]
    with torch.no_grad():
        expected = [model.eval()(**batch.model_inputs()) for batch in batches]
    mean = sum(output.loss * len(batch.ids) for output, batch in zip(expected, batches, strict=True)) / len(examples)
    assert found.metrics["test_loss"] == pytest.approx(mean.item(), rel=1e-5)
    for start, output, batch in zip((0, 3, 6), expected, batches, strict=True):
        rows, length = batch.input_ids.shape
        assert torch.equal(torch.from_numpy(found.predictions)[start : start + rows, :length], output.logits)
        assert torch.equal(torch.from_numpy(found.label_ids)[start : start + rows, :length], batch.labels)


def test_trainer_takes_packed_batches(folder, model, processor, examples, tmp_path):
    """With checkpointed layers too; the numbers are those of padded batches."""
    padded = trainer(for_stage_2(model), processor, examples, tmp_path / "a", max_steps=2, save_strategy="no")
    padded.train()
    model = for_stage_2(AutoModelForImageTextToText.from_pretrained(folder))
    model.model.language_model.set_attn_implementation(NAME)
    kwargs = {"max_steps": 2, "save_strategy": "no", "gradient_checkpointing": True}
    packed = trainer(model, processor, examples, tmp_path / "b", packed=True, **kwargs)
    packed.train()
    torch.testing.assert_close(torch.tensor(losses(packed)), torch.tensor(losses(padded)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="DataParallel is asked for"):
        model._replicate_for_data_parallel()
