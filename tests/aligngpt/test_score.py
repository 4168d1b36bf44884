"""aligngpt.score: the numbers against float64 by another way, and what becomes of pairs that cannot be scored."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, GemmaTokenizer, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from aligngpt.cli import main
from aligngpt.data.llava_json import read_llava_json
from aligngpt.data.tables import data_hash, read_table
from aligngpt.score import PairBatches, load_model, model_hash, pair_text, score_pairs, write_scores

SIZE, LENGTH = 32, 24
MEAN, STD = {"clip": (0.4, 0.5, 0.6), "siglip": (0.5, 0.5, 0.5)}, (0.2, 0.3, 0.4)
BOS, EOS, PAD = 0, 1, 2
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def byte_tokenizer(kind):
    """A token for each byte, after BOS (CLIP alone) and before EOS."""
    vocab = {
        token: id for id, token in enumerate(["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    frame = "<s> $A </s>" if kind == "clip" else "$A </s>"
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=LENGTH
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random model of each kind, with the pre-processing its kind has."""
    made = {}
    for kind, model_class, config_class in (("clip", CLIPModel, CLIPConfig), ("siglip", SiglipModel, SiglipConfig)):
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(3)
        text = WIDTHS | {"vocab_size": 259, "max_position_embeddings": LENGTH, "eos_token_id": EOS, "pad_token_id": PAD}
        vision = WIDTHS | {"image_size": SIZE, "patch_size": 8}
        model_class(config_class(text_config=text | {"bos_token_id": BOS}, vision_config=vision)).save_pretrained(
            folder
        )
        byte_tokenizer(kind).save_pretrained(folder)
        stated = {"image_mean": MEAN[kind], "image_std": STD}
        if kind == "clip":
            stated |= {"do_center_crop": True, "size": {"shortest_edge": SIZE}, "crop_size": SIZE, "resample": 3}
        else:  # SigLIP 2's filter
            stated |= {"size": {"height": SIZE, "width": SIZE}, "resample": 2}
        (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return made


def conversation(*answers, marks=1):
    turns = [{"from": "human", "value": "<image>" * marks + "\nWhat is shown?"}]
    for number, answer in enumerate(answers):
        turns += [{"from": "human", "value": "And?"}] * (number > 0) + [{"from": "gpt", "value": answer}]
    return turns


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven pairs and a sample of text: shapes wide, tall and square, two images in one sample, ids that repeat."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(
        [(40, 60), (70, 33), (32, 32), (90, 20), (20, 90), (50, 51), (64, 48), (9, 9)]
    ):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    records = [
        {"id": "a", "image": "0.png", "conversations": conversation("a red car")},
        {"id": "b", "image": "1.png", "conversations": conversation("été")},
        {"id": "a", "conversations": conversation("only words", marks=0)},
        {"id": 7, "image": ["2.png", "3.png"], "conversations": conversation("two images", marks=2)},
        {"id": "d", "image": "4.png", "conversations": conversation("a turn", "and more")},
        {"id": "e", "image": "5.png", "conversations": conversation("x")},
        {"id": "f", "image": "6.png", "conversations": conversation("words </s> more")},
        {"id": "g", "image": "7.png", "conversations": conversation("far too many words to be read as a whole")},
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def rows(samples, folder, model_folder, **options):
    """All rows of `score_pairs`, joined."""
    model, preparation = load_model(model_folder)
    parts = list(score_pairs(samples, folder, model, preparation, **options))
    joined = {name: [x for part in parts for x in getattr(part, name)] for name in vars(parts[0])}
    return joined | {"scores": np.array(joined["scores"])}


def by_another_way(kind, folder, sample, images, dtype):
    """A pair's score from the towers themselves, in `dtype`: no batch, no padding beyond the model's own."""
    model_class = {"clip": CLIPModel, "siglip": SiglipModel}[kind]
    model = model_class.from_pretrained(folder, dtype=dtype).eval()
    vocab = byte_tokenizer(kind).get_vocab()
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(pair_text(sample))[0][
        0
    ]
    ids = [BOS] * (kind == "clip") + [vocab[letter] for letter in letters]
    ids = [*ids[: LENGTH - 1], EOS]
    if kind == "siglip":
        ids += [PAD] * (LENGTH - len(ids))
    with torch.no_grad():
        text = model.text_model(input_ids=torch.tensor([ids])).pooler_output
        text = model.text_projection(text) if kind == "clip" else text
        cosines = []
        for name in sample.images:
            image = Image.open(images / name)
            if kind == "clip":
                short = min(image.size)
                width, height = (int(SIZE * side / short) for side in image.size)
                image = image.resize((width, image.height), Image.Resampling.BICUBIC)  # widths first in every Pillow
                image = image.resize((width, height), Image.Resampling.BICUBIC)
                left, top = ((side - SIZE) // 2 for side in image.size)
                image = image.crop((left, top, left + SIZE, top + SIZE))
            else:
                image = image.resize((SIZE, image.height), Image.Resampling.BILINEAR)
                image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            pixels = (np.asarray(image) / 255 - MEAN[kind]) / STD
            found = model.vision_model(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=dtype)).pooler_output
            found = model.visual_projection(found) if kind == "clip" else found
            cosines.append((found @ text.T / found.norm() / text.norm()).item())
    return np.mean(cosines)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_scores_are_those_of_float64(kind, folders, data):
    samples = read_llava_json(data / "data.json")
    pairs = [sample for sample in samples if sample.images]
    truth, plain = (
        np.array([by_another_way(kind, folders[kind], sample, data, dtype) for sample in pairs])
        for dtype in (torch.float64, torch.float32)
    )
    found = rows(samples, data, folders[kind])
    assert found["records"] == [0, 1, 3, 4, 5, 6, 7]
    assert found["ids"] == ["a", "b", "7", "d", "e", "f", "g"]
    assert found["problems"] == [None] * 7
    assert np.ptp(truth) > 0.01  # the pairs can be told apart
    plain_error = abs(plain.astype(np.float32) - truth).max()
    assert plain_error < 1e-6  # the other way is one way
    rounding = np.finfo(np.float32).eps / 2  # of a number near 1; on seven pairs plain PyTorch may be luckier
    assert abs(found["scores"] - truth).max() <= 2 * max(plain_error, rounding)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_batch_size_and_workers_change_nothing(kind, folders, data):
    samples = read_llava_json(data / "data.json")
    whole = rows(samples, data, folders[kind], batch_size=64)
    for options in ({"batch_size": 1}, {"batch_size": 3, "workers": 2}):
        other = rows(samples, data, folders[kind], **options)
        assert abs(other["scores"] - whole["scores"]).max() < 1e-6
        assert [other[name] for name in ("records", "ids", "truncated")] == [
            whole[name] for name in ("records", "ids", "truncated")
        ]
    assert np.array_equal(rows(samples, data, folders[kind], batch_size=64, workers=1)["scores"], whole["scores"])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_fault_33_a_longer_text_is_cut_and_flagged(kind, folders, data):
    sample = read_llava_json(data / "data.json")[7]
    room = LENGTH - (2 if kind == "clip" else 1)
    text = pair_text(sample)
    assert len(text) > room

    def with_text(words):
        return replace(sample, turns=(sample.turns[0], replace(sample.turns[1], text=words)))

    found = rows([sample, with_text(text[:room]), with_text(text[: room - 1])], data, folders[kind], batch_size=1)
    assert found["truncated"] == [True, False, False]
    assert found["scores"][0] == found["scores"][1] != found["scores"][2]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_fault_24_special_tokens_in_a_text_stay_characters(kind, folders, data):
    samples = read_llava_json(data / "data.json")
    _, preparation = load_model(folders[kind])
    batch = PairBatches(samples, data, preparation)[[6]]  # "words </s> more"
    ids = batch.token_ids[0, batch.attention_mask[0].bool()].tolist()
    assert ids.count(EOS) == 1
    assert ids[-1] == EOS
    assert len(ids) == len("words </s> more") + (2 if kind == "clip" else 1)


def test_what_cannot_be_scored_is_a_row_that_says_why(folders, data, tmp_path):
    """Faults 3, 13, 15 and 16, a text without words, and a model that gives NaN; the other rows are as they were."""
    images = tmp_path / "images"
    shutil.copytree(data, images)
    (images / "0.png").unlink()
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:300])
    (images / "4.png").unlink()
    (images / "4.png").symlink_to("/etc/hostname")
    samples = read_llava_json(data / "data.json")
    samples[5] = replace(samples[5], images=("../5.png",))
    samples[6] = replace(samples[6], turns=(samples[6].turns[0], replace(samples[6].turns[1], text=" ")))
    for batch_size in (1, 64):
        found = rows(samples, images, folders["clip"], batch_size=batch_size)
        whole = rows(read_llava_json(data / "data.json"), data, folders["clip"], batch_size=batch_size)
        assert np.isnan(found["scores"]).tolist() == [True, True, False, True, True, True, False]
        assert found["problems"][0] == "0.png: no such file"
        for place, said in ((1, "1.png: can't be decoded"), (3, "link out of"), (4, "leaves the"), (5, "no words")):
            assert said in found["problems"][place]
        assert found["scores"][[2, 6]] == pytest.approx(whole["scores"][[2, 6]], abs=1e-6)
        assert found["truncated"] == [False] * 6 + [True]

    model, preparation = load_model(folders["clip"])
    with torch.no_grad():
        model.visual_projection.weight[:] = torch.nan
    (broken,) = score_pairs(samples, data, model, preparation)
    assert np.isnan(broken.scores).all()
    assert broken.problems[2] == "the model's score is not finite"


KILLED = """
import os, signal, sys
import torch
import aligngpt.score as score
from aligngpt.data.llava_json import read_llava_json

torch.set_num_threads(1)
score.PAIRS_PER_CHUNK = 2
write = score.write_table
def die_in_the_third(path, *rest):
    if path.name == "000002.parquet":
        path.with_name(path.name + ".tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *rest)
score.write_table = die_in_the_third
data, model, out = sys.argv[1:]
score.write_scores(out, read_llava_json(data + "/data.json"), data, model, batch_size=2)
"""


def test_fault_32_a_killed_scoring_goes_on_and_ends_with_the_same_bytes(folders, data, tmp_path, monkeypatch):
    import aligngpt.score as score

    monkeypatch.setattr(score, "PAIRS_PER_CHUNK", 2)
    samples = read_llava_json(data / "data.json")
    scored = []
    cosines = score._cosines
    monkeypatch.setattr(score, "_cosines", lambda *rest: scored.append(1) or cosines(*rest))
    out, straight = tmp_path / "killed/scores.parquet", tmp_path / "straight.parquet"
    out.parent.mkdir()
    arguments = [str(path) for path in (data, folders["clip"], out)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()

    write_scores(straight, samples, data, folders["clip"], batch_size=2)
    assert len(scored) == 4
    write_scores(out, samples, data, folders["clip"], batch_size=2)
    assert len(scored) == 4 + 2  # chunks 0 and 1 were there
    assert out.read_bytes() == straight.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]

    subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    write_scores(out, samples[1:], data, folders["clip"], batch_size=2)  # other data: its chunks are not these
    assert read_table(out, "scores")[0].num_rows == 6
    assert len(scored) == 6 + 3


def half(chunk):
    chunk.write_bytes(chunk.read_bytes()[:-9])


def spoiled_page(chunk):
    content = chunk.read_bytes()
    chunk.write_bytes(content[:4] + b"\xff" * 40 + content[44:])


@pytest.mark.parametrize("damage", [lambda chunk: chunk.write_bytes(b""), half, spoiled_page])
def test_a_damaged_chunk_is_scored_again(damage, folders, data, tmp_path, monkeypatch):
    import aligngpt.score as score

    monkeypatch.setattr(score, "PAIRS_PER_CHUNK", 2)
    samples = read_llava_json(data / "data.json")
    straight, out = tmp_path / "straight.parquet", tmp_path / "scores.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(score.shutil, "rmtree", lambda folder: None)
        write_scores(straight, samples, data, folders["clip"], batch_size=2)
    (tmp_path / "straight.parquet.chunks").rename(tmp_path / "scores.parquet.chunks")
    damage(tmp_path / "scores.parquet.chunks/000001.parquet")
    write_scores(out, samples, data, folders["clip"], batch_size=2)
    assert out.read_bytes() == straight.read_bytes()


def test_chunks_of_another_tokenizer_are_not_used(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "model")
    before = model_hash(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    after = model_hash(folder)
    assert {name for name in before if before[name] != after[name]} == {"tokenizer.json"}
    for name in ("vocab.json", "merges.txt", "spiece.model"):
        (folder / name).write_text("words")
        assert name in model_hash(folder)


def test_a_siglip_2_reads_small_letters(folders, data, tmp_path):
    """Its folder has the type "siglip" and Gemma's tokenizer, which leaves capitals as they are."""
    folder = shutil.copytree(folders["siglip"], tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    GemmaTokenizer({word: id for id, word in enumerate(words)}).save_pretrained(folder)
    sample = read_llava_json(data / "data.json")[0]
    texts = ("A Red CAR", "a red car")
    samples = [replace(sample, turns=(sample.turns[0], replace(sample.turns[1], text=text))) for text in texts]
    _, preparation = load_model(folder)
    capitals, small = PairBatches(samples, data, preparation)[[0, 1]].token_ids
    assert preparation.lower
    assert torch.equal(capitals, small)
    read = preparation.tokenizer.convert_ids_to_tokens(small)
    assert "".join(read).startswith("a▁red▁car") or "".join(read).startswith("<bos>a▁red▁car")
    assert not load_model(folders["siglip"])[1].lower


def test_the_data_is_never_overwritten(folders, data, tmp_path, capsys):
    mine = shutil.copytree(data, tmp_path / "data") / "data.json"
    before = mine.read_bytes()
    (tmp_path / "link.json").symlink_to(mine)
    for out, says in (
        (mine, "data.json, which is read here; it needs another name"),
        (tmp_path / "link.json", "link.json, which is read here; it needs another name"),
        (tmp_path, "which is a folder; it needs the name of a file"),
        (mine / "scores.parquet", "data.json takes no files (File exists); it needs a folder that can be written to"),
    ):
        words = ["--model", "/nowhere", "--image-folder", data, "--out", out]  # refused before the model is looked for
        assert main(["score", str(mine), *map(str, words)]) == 2
        assert f"aligngpt score: --out would write {out}" in (said := capsys.readouterr().err)
        assert says in said
        assert mine.read_bytes() == before


def test_command_writes_scores_and_where_they_come_from(folders, data, tmp_path, capsys):
    out = tmp_path / "new/scores.parquet"
    words = ["--model", folders["siglip"], "--image-folder", data, "--out", out, "--workers", 0, "--device", "cpu"]
    assert main(["score", str(data / "data.json"), *map(str, words)]) == 0
    said = capsys.readouterr().out
    assert "7 pairs scored" in said
    assert "1 of them have a text longer" in said
    assert "1 samples without an image" in said
    table, metadata = read_table(out, "scores")
    assert {field.name: str(field.type) for field in table.schema} == {
        "record": "int64",
        "id": "string",
        "score": "float",
        "truncated": "bool",
        "problem": "string",
    }
    assert metadata["data"] == {"sha256": data_hash(read_llava_json(data / "data.json")), "samples": 8}
    weights, words = {"config.json", "model.safetensors"}, {"tokenizer.json", "tokenizer_config.json"}
    assert metadata["model"]["sha256"].keys() == weights | words
    assert metadata["image"] == {
        "size": SIZE,
        "aspect": "stretch",
        "resample": "bilinear",
        "mean": list(MEAN["siglip"]),
        "std": list(STD),
    }
    assert metadata["text"] == {"tokens": LENGTH, "padded": True, "lower": False}
    assert str(tmp_path.parent) not in json.dumps(metadata)  # names, no paths of this machine


def vision_tower_alone(folder):
    CLIPModel.from_pretrained(folder).vision_model.save_pretrained(folder)


def weights_missing(folder):
    CLIPModel.from_pretrained(folder).vision_model.save_pretrained(folder / "tower")
    (folder / "tower/model.safetensors").rename(folder / "model.safetensors")


def larger_resize(folder):
    stated = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(stated | {"size": {"shortest_edge": 40}}))


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (vision_tower_alone, {}, "model of type 'clip_vision_model'; scoring needs one of clip, siglip"),
        (weights_missing, {}, "scoring needs the whole clip"),
        (larger_resize, {}, "makes images of 32, 40 pixels; the model's vision tower needs 32"),
        (None, {"--model": "/nowhere"}, "/nowhere is not a model folder"),
        (None, {"--image-folder": "/nowhere"}, "--image-folder is /nowhere"),
        (None, {"--batch-size": 0}, "--batch-size is 0; it needs a whole number of at least 1"),
    ],
)
def test_refused(folders, data, tmp_path, capsys, spoil, options, says):
    folder = shutil.copytree(folders["clip"], tmp_path / "model")
    if spoil:
        spoil(folder)
    flags = {"--model": folder, "--image-folder": data, "--out": tmp_path / "out/x.parquet", "--workers": 0} | options
    assert main(["score", str(data / "data.json"), *(str(word) for flag in flags.items() for word in flag)]) == 2
    assert says in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*") if (tmp_path / "out").exists() else [])
