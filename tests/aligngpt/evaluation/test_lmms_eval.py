"""lmms-eval's model: the engine's own answers in the order of the requests, losses as defined, refusals by name.

Where lmms-eval is not installed, what the plugin uses of it stands in for it, as release 0.7.3 has it.
"""

import gc
import importlib
import importlib.util
import sys
import weakref
from dataclasses import dataclass, field, replace
from distutils.core import run_setup
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from aligngpt import AlignGPTProcessor
from aligngpt.data.llava_json import Sample
from aligngpt.generate import Engine
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.sampling import Sampling
from aligngpt.text import Turn

ROOT = Path(__file__).parents[3]
RED, NAVY = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (30, 50), "navy")
DOCUMENTS = [{"pictures": [RED]}, {"pictures": None}, {"pictures": [NAVY, RED]}, {"pictures": [NAVY]}]


class Lmms:
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self):
        return self._rank

    def clean(self):
        gc.collect()


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: Any
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.task_name, self.doc_id = self.metadata["task"], self.metadata["doc_id"]

    @property
    def args(self):
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None


@pytest.fixture(scope="module")
def lmms_eval():
    """The names of lmms-eval by which requests are made; the plugin can be imported meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lmms_eval") is None:
            for module, names in {
                "": {},
                ".api": {},
                ".api.model": {"lmms": Lmms},
                ".api.instance": {
                    "GenerationResult": GenerationResult,
                    "Instance": Instance,
                    "TokenCounts": TokenCounts,
                },
                ".models": {},
                ".models.registry_v2": {"ModelManifest": ModelManifest},
            }.items():
                stand_in = ModuleType(f"lmms_eval{module}")
                vars(stand_in).update(names)
                patch.setitem(sys.modules, stand_in.__name__, stand_in)
        yield importlib.import_module("lmms_eval.api.instance")
        sys.modules.pop("aligngpt.evaluation.lmms_eval", None)


@pytest.fixture(scope="module")
def plugin(lmms_eval):
    return importlib.import_module("aligngpt.evaluation.lmms_eval")


@pytest.fixture(scope="module")
def folder(talker, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    talker.save_pretrained(folder)
    AlignGPTProcessor.for_model(talker.config, AlignGPTImageProcessor(56), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load(plugin, folder):
    def load(**arguments):
        model = plugin.AlignGPT(str(folder), device="cpu", max_length=256, **arguments)
        model.task_dict["quiz"] = {"test": DOCUMENTS}
        return model

    return load


@pytest.fixture(scope="module")
def model(load):
    return load(batch_size="3")


@pytest.fixture(scope="module")
def make(lmms_eval):
    """A request about a document: its words, and settings or a continuation."""

    def make(document: int, words: str, second: Any, kind: str = "generate_until"):
        arguments = (words, second, lambda doc: doc["pictures"], document, "quiz", "test")
        return lmms_eval.Instance(kind, arguments, 0, {"task": "quiz", "doc_id": document, "repeats": 1})

    return make


def image(picture):
    return {"type": "image", "image": picture}


def text(words):
    return {"type": "text", "text": words}


QUESTIONS = (  # document, words, the message that they are, and its words with marks
    (0, "What is this?", [image(RED), text("What is this?")], "<image>\nWhat is this?"),
    (1, "Only words and <image>", [text("Only words and <image>")], "Only words and <image>"),
    (
        2,
        "From <image> to <image>: what changed?",
        [text("From "), image(NAVY), text(" to "), image(RED), text(": what changed?")],
        "From <image>\n to <image>\n: what changed?",
    ),
    (2, "One <image> for two", [image(NAVY), image(RED), text("One  for two")], "<image>\n<image>\nOne  for two"),
    (3, "<image>And this?", [image(NAVY), text("And this?")], "<image>\nAnd this?"),
)


@pytest.mark.parametrize("level", [None, 2])
def test_the_answers_are_the_engines_in_order(load, make, talker, folder, level):
    """More requests than rows, with other lengths and stops, against an engine that answers one at a time."""
    engine = Engine(talker, AlignGPTProcessor.from_pretrained(folder), max_batch_size=1, max_length=256)

    def ask(message, sampling):
        pictured = any(item["type"] == "image" for item in message)
        return engine.ask([{"role": "user", "content": message}], sampling, level=level if pictured else None).wait()

    requests, expected = [], []
    for number, (document, words, message, _) in enumerate(QUESTIONS * 2):
        asked = Sampling(6 + number, repetition_penalty=1.5)  # it would say one word again and again
        settings = {"max_new_tokens": 6 + number, "repetition_penalty": 1.5, "num_beams": 1, "until": []}
        answer = ask(message, asked)
        if number % 3 == 0:
            whole, stop = answer.text, answer.text[3:5]
            settings["until"] = ["\n\n", stop]
            answer = ask(message, replace(asked, stop=[stop]))
            assert answer.text == whole[: whole.index(stop)]
        requests.append(make(document, words, settings))
        expected.append((answer.text, answer.num_prompt_tokens, len(answer.tokens)))
    results = load(batch_size=3, level=level).generate_until(requests)
    counts = [result.token_counts for result in results]
    assert [r.text for r in results] == [answer for answer, _, _ in expected]
    assert [(c.input_tokens, c.output_tokens) for c in counts] == [(asked, said) for _, asked, said in expected]
    assert len({answer for answer, _, _ in expected}) > 5


def test_losses_are_those_of_each_alone(model, make, talker, folder):
    """Mean over the continuation and its end, whatever shares the batch; and whether each token is the likeliest."""
    processor = AlignGPTProcessor.from_pretrained(folder)
    said = (" red", " a blue square", " no", " it is", " two of them")
    requests, expected, labels = [], [], []
    for (document, words, _, turn), continuation in zip(QUESTIONS, said, strict=True):
        pictures = DOCUMENTS[document]["pictures"] or []
        turns = (Turn("user", turn), Turn("assistant", continuation.strip()))
        sample = processor.text(Sample("", tuple(map(str, pictures)), turns, None, 0))
        pixels = {"pixel_values": processor.image_processor.pixels(pictures)} if pictures else {}
        with torch.no_grad():
            rows = {name: getattr(sample, name)[None] for name in ("input_ids", "labels", "gate_mask")}
            expected.append(talker(**rows, **pixels).loss.item())
        labels.append(sample.labels[sample.labels != -100])
        requests.append(make(document, words, continuation, "loglikelihood"))
    pairs = [result.text for result in model.loglikelihood(requests)]
    torch.testing.assert_close([loss for loss, _ in pairs], expected, rtol=1e-4, atol=1e-5)
    assert not any(right for _, right in pairs)

    batches = iter((labels[:3], labels[3:]))

    def all_but_the_first_end(head, inputs, logits):
        """The likeliest tokens of a batch are its labels, but for the last of the first continuation."""
        spoken = next(batches)
        likeliest = torch.cat(spoken)
        likeliest[len(spoken[0]) - 1] += 1
        return torch.nn.functional.one_hot(likeliest, logits.shape[1]).float()

    with model.engine.model.lm_head.register_forward_hook(all_but_the_first_end):
        rights = [result.text[1] for result in model.loglikelihood(requests)]
    assert rights == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Sampling(1024)),
        ({"until": "\n\n", "max_new_tokens": 8, "image_aspect_ratio": "original"}, Sampling(8)),
        ({"until": ["\n\n", "Q:", ""], "top_p": 0, "temperature": 0, "top_k": 1}, Sampling(1024, stop=("Q:",))),
        ({"until": None, "do_sample": False, "temperature": 0.7, "num_beams": None}, Sampling(1024)),
        ({"temperature": 0.5, "top_p": 0.9}, Sampling(1024, 0.5, 0.9)),
        ({"do_sample": True, "top_p": None, "repetition_penalty": 1.2}, Sampling(1024, 1.0, repetition_penalty=1.2)),
        ({"do_sample": True, "temperature": 0}, Sampling(1024)),
    ],
)
def test_settings_of_tasks(model, make, settings, expected):
    request, again = (model._request(make(1, "Hm?", settings)).sampling for _ in range(2))
    assert (request.seed != again.seed) == (expected.temperature > 0)  # a repeated draw is another one
    assert vars(request) | {"seed": 0} == vars(expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 5}, "task quiz sets num_beams=5 in generation_kwargs"),
        ({"top_k": 20, "temperature": 0.7}, "task quiz sets top_k=20"),
        ({"stop_sequences": ["\n"]}, r"task quiz sets stop_sequences=\['\\n'\]"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'; it needs to be a whole number"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0; it needs to be a share"),
    ],
)
def test_settings_that_the_engine_lacks(model, make, settings, words):
    with pytest.raises(ValueError, match=words):
        model.generate_until([make(1, "Hm?", settings)])
    assert model.generate_until([make(1, "Hm?", {"max_new_tokens": 1})])[0].text


def test_requests_that_cannot_be_answered(model, make, monkeypatch):
    monkeypatch.setitem(model.task_dict, "quiz", {"test": [{"pictures": ["clip.mp4"]}]})
    with pytest.raises(ValueError, match="task quiz, document 0 shows a str; aligngpt needs pictures"):
        model.generate_until([make(0, "What happens?", {})])
    monkeypatch.setitem(model.task_dict, "quiz", {"test": DOCUMENTS})
    with pytest.raises(ValueError, match="document 1 has 1634 tokens with its continuation; max_length is 256"):
        model.loglikelihood([make(1, "word " * 300, "yes", "loglikelihood")])
    with pytest.raises(NotImplementedError, match="task quiz asks in several rounds"):
        model.generate_until_multi_round([make(0, "First?", {}, "generate_until_multi_round")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it needs to be one of auto, float32"),
        ({"batch_size": "many"}, "batch_size is 'many'; it needs to be a whole number"),
        ({"level": 1.5}, "level is 1.5; it needs to be a whole number"),
        ({"batch_size": 0}, "max_batch_size is 0"),
    ],
)
def test_arguments_that_mean_nothing(load, arguments, words):
    with pytest.raises(ValueError, match=words):
        load(**arguments)


def test_rows_and_types_of_the_command_line(load):
    """As lmms-eval reads them: numbers of --model_args are numbers, --batch_size is a string."""
    model = load(batch_size="auto", dtype="bfloat16")
    assert (model.engine.max_batch_size, model.engine.model.dtype) == (16, torch.bfloat16)
    model = load(batch_size="auto:4", max_batch_size=2)
    assert (model.engine.max_batch_size, model.engine.model.dtype) == (2, torch.float32)
    loaded = weakref.ref(model.engine.model)
    model.clean()
    assert loaded() is None  # nothing else holds the weights


def test_the_entry_point_leads_to_the_model(plugin):
    distribution = run_setup(str(ROOT / "setup.py"), stop_after="init")
    assert "aligngpt.evaluation" in distribution.packages
    (entry,) = distribution.entry_points["lmms_eval.models"]
    name, value = entry.split(" = ")
    manifest = EntryPoint(name, value, "lmms_eval.models").load()()
    assert manifest.model_id == "aligngpt"
    module, _, attribute = manifest.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), attribute) is plugin.AlignGPT
    assert plugin.AlignGPT.is_simple
