"""What is measured of a model is what a second computation gives: by hand, one text at a time, or by generating."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from aligngpt.batch import Example
from aligngpt.data.scenes import Thing, caption, read_scenes, write_scenes
from aligngpt.processor import AlignGPTImageProcessor
from demo import language
from demo.evaluate import Speaker, evaluate_answers, evaluate_captions, read_questions
from demo.miniature import CHAT_TEMPLATE, word_tokenizer
from experiments import measure
from experiments.choosing import measure_choice
from experiments.measure import (
    hallucination,
    mean_accuracy,
    mean_nll,
    measure_answers,
    measure_captions,
    mutual_information,
    read,
    score_presence,
    with_pictures,
)

LEVELS = 4
SCENE = (Thing("large", "red", "circle", "top", "left"), Thing("small", "blue", "star", "middle", "right"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for split in ("validation", "test"):
        list(write_scenes(folder / split, 24, seed=split))
    return folder


def make_speaker(template: str, mode: str = "adaptive") -> Speaker:
    """A random model whose levels and gate make a difference."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(language.WORDS, chat_template=CHAT_TEMPLATE)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=72, patch_size=24))
    model = AlignGPTForConditionalGeneration.from_parts(
        language.build(tokenizer), tower, num_align_levels=LEVELS, align_mode=mode
    )
    with torch.no_grad():
        model.model.align_table *= 4
    image_processor = AlignGPTImageProcessor(72)
    return Speaker(model, AlignGPTProcessor.for_model(model.config, image_processor, tokenizer, template, 512))


def nats(speaker: Speaker, words: list[tuple[Path, str, str]], level: int | None) -> float:
    """Per token of the second texts after picture and first text, each alone in its batch."""
    model, tokenizer = speaker.model, speaker.processor.tokenizer
    found = []
    for picture, before, after in words:
        before_ids, after_ids = (
            tokenizer.convert_tokens_to_ids(text.split(" ")) if text else [] for text in (before, after)
        )
        start = [tokenizer.bos_token_id, model.config.align_token_id, *[model.config.image_token_id] * 9, *before_ids]
        ids = torch.tensor([start + after_ids])
        pixels = speaker.processor.image_processor.pixels([picture])
        levels = None if level is None else torch.tensor([level])
        gate_mask = torch.zeros_like(ids, dtype=torch.bool)
        gate_mask[0, 11 : len(start)] = True
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels, align_levels=levels, gate_mask=gate_mask).logits[0]
        chances = logits.double().log_softmax(-1)
        found += [-chances[len(start) - 1 + place, id].item() for place, id in enumerate(after_ids)]
    return sum(found) / len(found)


def test_captions_score_as_the_demos_and_the_true_ones_have_the_models_likelihood(scenes):
    speaker = make_speaker("plain")
    found = measure_captions(speaker, scenes)
    assert found["validation"].keys() == found["test"].keys() == {"0", "1", "2", "3"}
    truth = {place: scene for place, scene in enumerate(read_scenes(scenes / "test")) if len(scene) > 1}
    words = [(scenes / f"test/images/{place:05d}.jpg", "", f"{caption(scene)} \n") for place, scene in truth.items()]
    for level in (0, 3):
        scores = found["test"][str(level)]
        assert scores.items() >= evaluate_captions(speaker, scenes / "test", level=level).items()
        assert scores["clean caption NLL"] == pytest.approx(nats(speaker, words, level), rel=1e-5)
    assert found["test"]["0"] != found["test"]["3"]
    sample = found["samples"][1]
    assert tuple(Thing(*facts) for facts in sample["scene"]) == truth[sample["picture"]]
    assert sample["captions"].keys() == {"0", "2", "3"}
    assert sample["captions"]["2"] == speaker.say([words[1][0]], [""], level=2)[0]


def test_names_are_read_with_their_picture_and_with_another(scenes, tmp_path):
    speaker, names = make_speaker("plain"), ("red circle", "blue star", "small square")
    pictures = [scenes / f"test/images/{place:05d}.jpg" for place in range(3)]
    records = [
        {
            "id": name,
            "image": str(picture.relative_to(scenes)),
            "conversations": [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": name}],
        }
        for name, picture in zip(names, pictures, strict=True)
    ]
    file = scenes / "names.json"
    file.write_text(json.dumps(records))
    found = measure.measure_names(speaker, file, {"2": 2})["2"]
    words = [f"{name} \n" for name in names]
    for measured, shown in (("name NLL", pictures), ("another picture", [pictures[1], pictures[2], pictures[0]])):
        expected = nats(speaker, [(picture, "", text) for picture, text in zip(shown, words, strict=True)], 2)
        assert found[measured] == pytest.approx(expected, rel=1e-5)


def test_a_model_without_a_token_has_one_level(scenes, tmp_path, monkeypatch):
    """The command, on a folder; the number of pictures is cut."""
    speaker = make_speaker("plain", "none")
    speaker.model.save_pretrained(tmp_path / "model")
    speaker.processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(measure, "PICTURES", {"validation": 3, "test": 2})
    out = tmp_path / "measures/out.json"
    arguments = ["measure", "stage-1", str(tmp_path / "model"), str(scenes), str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    measure.main()
    found = json.loads(out.read_text())
    assert found["validation"].keys() == found["test"].keys() == {"none"}
    assert len(found["samples"]) == 2
    out.unlink()
    arguments[1] = "stage-2"
    with pytest.raises(SystemExit, match="template 'plain'; stage 2 needs"):
        measure.main()
    assert not out.exists()


def test_things_that_are_not_there_are_hallucinated():
    """Red star and blue circle are not there, a star without a color is no thing, and a thing twice is one."""
    captions = ["large red circle top left and small red star middle right and star and red star", "blue circle", ""]
    assert hallucination(captions, [SCENE] * 3) == 2 / 3
    assert hallucination([caption(SCENE)], [SCENE]) == 0
    assert hallucination(["middle right"], [SCENE]) == 0


def test_answers_read_in_one_pass_are_those_that_are_generated(scenes, monkeypatch):
    """Of a model that has learned some of them, so that some are right, some wrong."""
    monkeypatch.setattr(measure, "QUESTIONS_BY_LEVEL", 30)
    speaker = make_speaker("chat")
    model, processor = speaker.model, speaker.processor
    asked = read_questions(scenes / "test")
    pixels = processor.image_processor.pixels([question.picture for question in asked])
    examples = [Example("", processor.text(q.sample), image[None]) for q, image in zip(asked, pixels, strict=True)]
    with torch.no_grad():  # a random tower's pictures are nearly alike: what they share is taken away
        last = model.model.multi_modal_projector.linear_2
        last.weight *= 20
        last.bias.zero_()
        last.bias -= model.model.project(model.model.image_features(pixels)).mean((0, 1))
    batch = processor.collate(examples[:40])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(25):
        model(**batch.model_inputs()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    processor.gate_text = "all"  # in training; an answer that is read here is not for the gate to see
    (found,) = measure_answers(speaker, scenes).values()  # of the test split alone
    generated = evaluate_answers(speaker, scenes / "test")
    assert 0.2 < sum(found["accuracy"].values()) / 7 < 0.9  # seven kinds were asked
    assert found["another picture"] != found["accuracy"]
    for kind, row in generated.items():
        assert found["accuracy"][kind] == row["accuracy"]
        assert found["another picture"][kind] == row["another picture"]
        assert found["any object"].get(kind, found["majority"][kind]) == row["reference"]
    assert found["questions"] == {kind: row["questions"] for kind, row in generated.items()}

    said = speaker.say([q.picture for q in asked], [q.prompt for q in asked])
    pairs = [(text == "yes", q.answer == "yes") for text, q in zip(said, asked, strict=True) if q.kind == "presence"]
    assert found["presence"] == score_presence(pairs)
    words = [(q.picture, f"\n {q.prompt} :", f"{q.answer} </s>") for q in asked]
    assert found["answer NLL"] == pytest.approx(nats(speaker, words, None), rel=1e-5)
    few = asked[:30]
    for level in (0, 2, None):
        nll, right = (found["by level"][f"own {key}" if level is None else key] for key in ("NLL", "accuracy"))
        if level is not None:
            nll, right = nll[level], right[level]
        assert nll == pytest.approx(nats(speaker, words[:30], level), rel=1e-5)
        said = speaker.say([q.picture for q in few], [q.prompt for q in few], level=level)
        by_kind: dict[str, list[bool]] = {}
        for text, q in zip(said, few, strict=True):
            by_kind.setdefault(q.kind, []).append(text == q.answer)
        presence = [
            [text == q.answer for text, q in zip(said, few, strict=True) if (q.kind, q.answer) == ("presence", answer)]
            for answer in ("yes", "no")
        ]
        shares = {kind: sum(of) / len(of) for kind, of in by_kind.items()}
        shares["presence"] = sum(sum(of) / len(of) for of in presence) / 2
        assert right == pytest.approx(sum(shares.values()) / len(shares))


def test_the_gate_is_described_by_its_own_dots(scenes):
    speaker = make_speaker("chat", "local")
    asked = read_questions(scenes / "test")
    found = measure_answers(speaker, scenes)["test"]["gate"]
    weights = speaker.gate([q.picture for q in asked], [q.prompt for q in asked])
    for kind, mean in found["weights"].items():
        rows = [row for row, question in enumerate(asked) if question.kind == kind]
        assert mean == pytest.approx(weights[rows].mean(0).tolist(), rel=1e-5)

    model, tokenizer = speaker.model.model, speaker.processor.tokenizer
    dots = []
    with torch.no_grad():
        for question in asked:
            ids = tokenizer.convert_tokens_to_ids(f"\n {question.prompt} :".split(" "))
            mean = model.get_input_embeddings().weight[ids].mean(0)
            pixels = speaker.processor.image_processor.pixels([question.picture])
            dots.append(model.project(model.image_features(pixels))[0] @ mean)
        hidden = F.gelu(torch.stack(dots) @ model.align_gate.linear_1.weight.T + model.align_gate.linear_1.bias)
        logits = hidden @ model.align_gate.linear_2.weight.T + model.align_gate.linear_2.bias
        assert found["dots std"] == pytest.approx(torch.stack(dots).std().item(), rel=1e-5)
        assert found["logits std"] == pytest.approx(logits.std(0).mean().item(), rel=1e-4)
        shares = logits.softmax(-1)
        bits = -(shares * shares.log2()).sum() / len(asked)
        assert found["entropy"] == pytest.approx(bits.item(), rel=1e-5)
        table = model.align_table
        apart = [(table[a] - table[b]).norm().item() for a in range(LEVELS) for b in range(a)]
        norm = sum(row.norm().item() for row in table) / LEVELS
        assert found["table distance"] == pytest.approx(sum(apart) / len(apart) / norm, rel=1e-5)


@pytest.mark.parametrize("mode", ["adaptive", "local"])
def test_the_mean_row_takes_the_choice_away_and_nothing_else(scenes, mode):
    speaker = make_speaker("chat", mode)
    model, table = speaker.model.model, speaker.model.model.align_table
    with torch.no_grad():
        model.align_gate.linear_1.weight *= 20
        model.align_gate.linear_2.weight *= 20
    asked = read_questions(scenes / "test")
    before = table.clone()
    speaker.processor.gate_text = "all"  # in training; an answer that is read here is not for the gate to see
    found = measure_choice(speaker, asked)
    assert torch.equal(table, before)

    weights = speaker.gate([q.picture for q in asked], [q.prompt for q in asked])
    rows = weights @ table[:-1] + (table[-1] if mode == "adaptive" else 0)
    mean = rows.mean(0)
    examples = with_pictures(speaker, [q.sample for q in asked], [q.picture for q in asked])
    own = read(speaker, examples)
    with torch.no_grad():  # a gate that says the mean whatever it sees
        model.align_gate.linear_2.weight.zero_()
        model.align_gate.linear_2.bias.copy_(weights.mean(0).log())
    same = read(speaker, examples)
    for name, answers in (("own row", own), ("mean row", same)):
        assert found[f"{name} NLL"] == pytest.approx(mean_nll(answers), rel=1e-5)
        assert found[f"{name} accuracy"] == mean_accuracy(asked, answers)
    assert abs(found["own row NLL"] - found["mean row NLL"]) > 1e-4, "the choice makes a difference here"
    assert found["rows apart"] == pytest.approx(((rows - mean).norm(dim=1).mean() / mean.norm()).item(), rel=1e-4)
    assert found["table norm"] == pytest.approx(before.norm(dim=1).mean().item())


def test_a_model_that_chooses_nothing_is_refused(scenes):
    with pytest.raises(ValueError, match="model has align_mode 'average'; it needs one of adaptive, local"):
        measure_choice(make_speaker("chat", "average"), read_questions(scenes / "test"))


def test_the_mutual_information_of_a_known_joint():
    """Kind a is a quarter of the questions and always has level 0; b has it in one of three: the levels are even."""
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1 / 3, 2 / 3], [2 / 3, 1 / 3]])
    within_b = math.log2(3) - 2 / 3
    assert mutual_information(weights, ["a", "b", "b", "b"]) == pytest.approx(1 - 0.75 * within_b)
    assert mutual_information(torch.eye(2), ["a", "b"]) == pytest.approx(1)
    assert mutual_information(weights[2:], ["a", "a"]) == pytest.approx(0, abs=1e-7)


def test_presence_as_pope_scores_it():
    """Said "yes" five times, three of them rightly; "yes" is right four times."""
    pairs = [(True, True)] * 3 + [(True, False)] * 2 + [(False, True)] + [(False, False)] * 4
    found = score_presence(pairs)
    shares = {"yes share": 0.5, "yes among answers": 0.4}
    assert found == pytest.approx({"precision": 0.6, "recall": 0.75, "F1": 2 / 3} | shares)
    assert set(score_presence([(False, False)]).values()) == {0}
