"""aligngpt.score, similarity and team: the numbers against float64 by another way, what becomes of pairs that cannot be
scored, and processes that share the work, are killed, or fail."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, GemmaTokenizer, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from aligngpt import score, similarity
from aligngpt.cli import main
from aligngpt.data import tables
from aligngpt.data.llava_json import read_llava_json
from aligngpt.data.records import RecordList, open_records
from aligngpt.data.tables import (
    alone,
    data_hash,
    part_name,
    read_manifest,
    read_part,
    read_table,
    table_file,
    write_table,
)
from aligngpt.pack import pack, read_source
from aligngpt.similarity import PairBatches, batches_by_size, load_model, model_hash, model_revision, pair_text
from aligngpt.team import Team

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As under torchrun: on a CPU the last bits may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def rows(records, model_folder, *, batch_size=64, dtype=torch.float32, workers=0):
    """All rows of `score_pairs`, joined, in the data's order."""
    model, preparation = load_model(model_folder, dtype=dtype)
    pairs = np.flatnonzero(records.num_images)
    batches = batches_by_size(pairs, records.num_characters, records.num_images, batch_size)
    parts = list(similarity.score_pairs(records, batches, model, preparation, workers=workers))
    order = np.argsort([place for part in parts for place in part.places])
    joined = {name: [x for part in parts for x in getattr(part, name)] for name in vars(parts[0])}
    joined = {name: [values[row] for row in order] for name, values in joined.items()}
    return joined | {"scores": np.array(joined["scores"])}


def run(data, model, out, *more):
    """`aligngpt score` in this process, on the CPU; returns its status."""
    words = ["score", data / "data.json", "--model", model, "--image-folder", data, "--out", out, "--workers", 0]
    return main([str(word) for word in [*words, "--device", "cpu", "--batch-size", 2, "--chunk-size", 2, *more]])


def left(folder, files, *, finished=True):
    """Make the folder anew, with files of another one."""
    folder.mkdir()
    for name, written in files.items():
        if finished or name != "manifest.json":
            (folder / name).write_bytes(written)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_scores_are_those_of_float64(kind, dtype, folders, data):
    """At most twice the error of plain PyTorch in the same type, or of a rounding of a number near 1."""
    records = open_records(data / "data.json", data)
    pairs = [sample for sample in records if sample.images]
    truth, plain = (
        np.array([by_another_way(kind, folders[kind], sample, data, way) for sample in pairs])
        for way in (torch.float64, dtype)
    )
    found = rows(records, folders[kind], dtype=dtype)
    assert found["places"] == [0, 1, 3, 4, 5, 6, 7]
    assert found["ids"] == ["a", "b", "7", "d", "e", "f", "g"]
    assert found["problems"] == [None] * 7
    assert found["scores"].dtype == np.float32
    eps = torch.finfo(dtype).eps
    assert np.ptp(truth) > 0.01  # the pairs can be told apart
    plain_error = abs(plain.astype(np.float32) - truth).max()
    assert plain_error < 8 * eps  # the other way is one way
    assert abs(found["scores"] - truth).max() <= 2 * max(plain_error, eps / 2)  # plain PyTorch may be luckier
    if dtype != torch.float32:
        fp32 = rows(records, folders[kind])["scores"]
        assert 0 < abs(found["scores"] - fp32).max() <= 2 * eps


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_batch_size_and_workers_change_nothing(kind, folders, data):
    records = open_records(data / "data.json", data)
    whole = rows(records, folders[kind], batch_size=64)
    for options in ({"batch_size": 1}, {"batch_size": 3, "workers": 2}):
        other = rows(records, folders[kind], **options)
        assert abs(other["scores"] - whole["scores"]).max() < 1e-6
        assert [other[name] for name in ("places", "ids", "truncated")] == [
            whole[name] for name in ("places", "ids", "truncated")
        ]
    assert np.array_equal(rows(records, folders[kind], workers=1)["scores"], whole["scores"])


def test_batches_are_of_like_size():
    """Pairs once each, at most 64 images a batch, and a twentieth of the padding that the data's order would need."""
    rng = np.random.default_rng(0)
    length, images = rng.integers(8, 78, 9000), rng.choice([0, 1, 1, 1, 2, 70], 9000)
    places = np.flatnonzero(images)[1000:5000]

    def padding(batches):
        return sum(int(length[batch].max() * len(batch) - length[batch].sum()) for batch in batches)

    batches = batches_by_size(places, length, images, 64)
    assert sorted(place for batch in batches for place in batch) == places.tolist()
    assert all(images[batch].sum() <= 64 or len(batch) == 1 for batch in batches)
    assert padding(batches) < 0.05 * padding(batches_by_size(places, np.zeros(9000), images, 64))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_fault_33_a_longer_text_is_cut_and_flagged(kind, folders, data):
    sample = read_llava_json(data / "data.json")[7]
    room = LENGTH - (2 if kind == "clip" else 1)
    text = pair_text(sample)
    assert len(text) > room

    def with_text(words):
        return replace(sample, turns=(sample.turns[0], replace(sample.turns[1], text=words)))

    samples = [sample, with_text(text[:room]), with_text(text[: room - 1])]
    found = rows(RecordList(samples, data), folders[kind], batch_size=1)
    assert found["truncated"] == [True, False, False]
    assert found["scores"][0] == found["scores"][1] != found["scores"][2]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_fault_24_special_tokens_in_a_text_stay_characters(kind, folders, data):
    records = open_records(data / "data.json", data)
    _, preparation = load_model(folders[kind])
    batch = PairBatches(records, preparation)[[6]]  # "words </s> more"
    ids = batch.token_ids[0, batch.attention_mask[0].bool()].tolist()
    assert ids.count(EOS) == 1
    assert ids[-1] == EOS
    assert len(ids) == len("words </s> more") + (2 if kind == "clip" else 1)


class OneLost(RecordList):
    """Records of which one is damaged where it lies."""

    def __getitem__(self, index):
        if index == 3:
            raise ValueError("record 3 is damaged")
        return super().__getitem__(index)


def test_fault_3_fault_13_fault_15_fault_16_fault_25_what_cannot_be_scored_says_why(folders, data, tmp_path):
    """Also a text without words, a damaged record, and a model that gives NaN; the other rows are as they were."""
    images = tmp_path / "images"
    shutil.copytree(data, images)
    (images / "0.png").unlink()
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:300])
    (images / "4.png").unlink()
    (images / "4.png").symlink_to("/etc/hostname")
    samples = read_llava_json(data / "data.json")
    samples[5] = replace(samples[5], images=("../5.png",))
    samples[6] = replace(samples[6], turns=(samples[6].turns[0], replace(samples[6].turns[1], text=" ")))
    samples.append(replace(samples[7], problem="the conversation is empty"))
    for batch_size in (1, 64):
        found = rows(OneLost(samples, images), folders["clip"], batch_size=batch_size)
        whole = rows(open_records(data / "data.json", data), folders["clip"], batch_size=batch_size)
        assert np.isnan(found["scores"]).tolist() == [True] * 6 + [False, True]
        assert found["problems"][0] == "0.png: no such file"
        for place, said in (
            (1, "1.png: can't be decoded"), (2, "record 3 is damaged"), (3, "link out of"), (4, "leaves the"),
            (5, "no words"), (7, "the conversation is empty"),
        ):  # fmt: skip
            assert said in found["problems"][place]
        assert found["ids"] == ["a", "b", "", "d", "e", "f", "g", "g"]
        assert found["scores"][6] == pytest.approx(whole["scores"][6], abs=1e-6)
        assert found["truncated"] == [False] * 6 + [True, False]

    model, preparation = load_model(folders["clip"])
    with torch.no_grad():
        model.visual_projection.weight[:] = torch.nan
    (broken,) = similarity.score_pairs(open_records(data / "data.json", data), [[7, 0]], model, preparation)
    assert np.isnan(broken.scores).all()
    assert broken.problems == ["the model's score is not finite"] * 2


# ---------------------------------------------------------------------------------------------------- many processes


def processes(size, log, work):
    """Fork `size` processes as torchrun would start them, each to end with the status of `work(rank)`.

    They meet in a file, as no port stays free until it is opened. What a process says goes to LOG/<rank>.txt, the
    places of each batch that it scores to LOG/<rank>.jsonl. Returns the statuses and all that was said.
    """
    log.mkdir()

    def child(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        dist.rendezvous = lambda *_, **__: iter([(dist.FileStore(str(log / "store"), size), rank, size)])
        said = os.open(log / f"{rank}.txt", os.O_CREAT | os.O_WRONLY)
        sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)
        cosines = similarity._cosines

        def logged(model, batch, padded):
            with (log / f"{rank}.jsonl").open("a") as file:
                file.write(json.dumps(batch.places) + "\n")
            return cosines(model, batch, padded)

        similarity._cosines = logged
        try:
            status = work(rank)
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
        os._exit(status)

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=child, args=(rank,)) for rank in range(size)]
    for process in children:
        process.start()
    for process in children:
        process.join(timeout=60)
        process.kill()  # one that hangs has status -9
        process.join()
    said = "".join((log / f"{rank}.txt").read_text() for rank in range(size))
    return [process.exitcode for process in children], said


def scored(log, rank):
    path = log / f"{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def straight(folders, data, tmp_path_factory):
    """What a scoring in one process leaves: four parts, of places [0, 1], [3, 4], [5, 6] and [7]."""
    out = tmp_path_factory.mktemp("straight") / "scores"
    assert run(data, folders["clip"], out) == 0
    assert sorted(content(out)) == ["manifest.json", *(f"part-{part:06d}.parquet" for part in range(4))]
    return content(out)


def test_torchrun_makes_the_same_bytes(folders, data, tmp_path, straight):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["score", data / "data.json", "--model", folders["clip"], "--image-folder", data, "--out", tmp_path / "out"]
    words += ["--device", "cpu", "--batch-size", 2, "--chunk-size", 2, "--workers", 1]
    done = subprocess.run(
        [*torchrun, "-m", "aligngpt", *map(str, words)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 pairs scored") == 1
    assert content(tmp_path / "out") == straight


def test_shards_have_the_scores_of_their_json(folders, data, tmp_path, straight):
    assert pack(read_source(data / "data.json", data), tmp_path / "shards", records_per_shard=3) == []
    words = ["--model", folders["clip"], "--out", tmp_path / "out", "--device", "cpu", "--workers", 2]
    words += ["--batch-size", 2, "--chunk-size", 2]
    assert main(["score", str(tmp_path / "shards"), *map(str, words)]) == 0
    found = content(tmp_path / "out")
    manifests = [json.loads(files.pop("manifest.json")) for files in (found, dict(straight))]
    assert [manifest["data"].pop("name") for manifest in manifests] == ["shards", "data.json"]
    assert manifests[0] == manifests[1]
    assert found == {name: part for name, part in straight.items() if name != "manifest.json"}


@pytest.mark.parametrize("others", [1, 3])
def test_fault_32_a_killed_scoring_goes_on_and_ends_with_the_same_bytes(others, folders, data, tmp_path, straight):
    """Process 1 of 2 is killed in its second part; then one process, or three, give the command again."""
    out = tmp_path / "scores"

    def killed(rank):
        write = score.write_table

        def die(path, *rest):
            if path.name == "part-000003.parquet":
                path.with_name(f"{path.name}.1.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, *rest)

        score.write_table = die
        return run(data, folders["clip"], out)

    statuses, said = processes(2, tmp_path / "first", killed)
    assert statuses == [1, -signal.SIGKILL], said
    assert [scored(tmp_path / "first", rank) for rank in (0, 1)] == [[[1, 0], [5, 6]], [[3], [4], [7]]]
    left = content(out)
    assert sorted(left) == [
        *(f"part-{part:06d}.parquet" for part in range(3)),
        "part-000003.parquet.1.tmp",
        "scoring.json",
    ]

    statuses, said = processes(others, tmp_path / "second", lambda rank: run(data, folders["clip"], out))
    assert statuses == [0] * others, said
    again = [batch for rank in range(others) for batch in scored(tmp_path / "second", rank)]
    assert again == [[7]]  # the one part that the killed process was in
    assert content(out) == straight


def test_a_finished_scoring_is_not_done_again(folders, data, tmp_path, straight, capsys, monkeypatch):
    out = tmp_path / "scores"
    left(out, straight)
    monkeypatch.setattr(similarity, "_cosines", None)
    assert run(data, folders["clip"], out) == 0
    assert f"7 pairs scored into {out}, finished already\n" in capsys.readouterr().out
    assert content(out) == straight


def waits_for_the_failure():
    """Process 0, which scores, hears of process 1 before its own first part is whole."""
    failed = Team.failed.fget

    def waits(self):
        while not failed(self):
            pass
        return True

    Team.failed = property(waits)


def full_disk(rank):
    def write(*_):
        assert rank == 1
        raise OSError(errno.ENOSPC, "No space left on device")

    score.write_table = write
    if rank == 0:
        waits_for_the_failure()
    return []


def killed_worker(rank):
    if rank == 0:
        waits_for_the_failure()
        return []
    PairBatches.__getitem__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return ["--workers", 1]


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (full_disk, "process 1 of 2: [Errno 28] No space left on device"),
        (killed_worker, "process 1 of 2: a process that loads samples was killed or crashed"),
        (
            "--model",
            "model.sha256.added_tokens.json is missing there, 44136fa355b3… here; all need the same",
        ),
        ("--out", "is not the folder that the first process sees; machines need to share it"),
        ("--image-folder", "process 1 of 2: --image-folder is /nowhere; it needs a folder that exists"),
    ],
)
def test_where_one_process_fails_all_end_with_one_message(fails, says, folders, data, tmp_path):
    other = {"--model": shutil.copytree(folders["clip"], tmp_path / "model"), "--out": tmp_path / "other"}
    (tmp_path / "model/added_tokens.json").write_text("{}")

    def work(rank):
        if callable(fails):
            more = fails(rank)
        else:
            more = [fails, other.get(fails, "/nowhere")] if rank else []
        return run(data, folders["clip"], tmp_path / "scores", *more)

    statuses, said = processes(2, tmp_path / "log", work)
    assert statuses == [2, 2], said
    errors = [line for line in said.splitlines() if line.startswith("aligngpt score: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert not list((tmp_path / "scores").glob("part-*"))


def test_a_bug_in_one_process_is_raised_and_told_to_the_others():
    ours, theirs = (Team(rank, 2, rank, store) for store in [dist.HashStore()] for rank in (0, 1))
    assert not theirs.failed
    with pytest.raises(ZeroDivisionError):
        ours.agree(lambda: 1 // 0)
    assert theirs.failed


def test_under_torchrun_a_cpu_has_one_thread(folders, data, tmp_path, straight, capsys):
    """As two processes have, so one can go on with their folder; a command without torchrun hears what it takes."""
    left(tmp_path / "scores", straight, finished=False)

    def work(_):
        os.environ.pop("OMP_NUM_THREADS", None)
        torch.set_num_threads(2)
        return run(data, folders["clip"], tmp_path / "scores")

    statuses, said = processes(1, tmp_path / "log", work)
    assert statuses == [0], said
    assert content(tmp_path / "scores") == straight
    torch.set_num_threads(2)
    try:
        assert run(data, folders["clip"], tmp_path / "scores") == 2
    finally:
        torch.set_num_threads(1)
    assert "threads is 1 there, 2 here; OMP_NUM_THREADS=1 goes on with these" in capsys.readouterr().err


def test_two_scorings_into_one_folder(folders, data, tmp_path, straight, capsys):
    """The second is refused as long as the first lives; what the first forked may live on."""
    out = tmp_path / "scores"
    left(out, {}, finished=False)
    (ready, say_ready), (wait, go) = os.pipe(), os.pipe()

    def first():
        with alone("--out", out):
            if os.fork() == 0:
                os.close(go)
                os.read(wait, 1)
                os._exit(0)
            os.write(say_ready, b"1")
            signal.pause()

    process = multiprocessing.get_context("fork").Process(target=first)
    process.start()
    os.read(ready, 1)
    assert run(data, folders["clip"], out) == 2
    assert f"--out {out} is being written by another process; it needs to end first" in capsys.readouterr().err
    assert list(content(out)) == ["lock"]
    process.kill()
    process.join()
    assert run(data, folders["clip"], out) == 0
    assert content(out) == straight
    for descriptor in (ready, say_ready, wait, go):
        os.close(descriptor)


def test_two_processes_may_write_the_same_part(tmp_path, monkeypatch):
    """Where one of a killed scoring lives on: here it writes while the other is about to give its file the name."""
    path, table, replace_file = tmp_path / part_name(0), pyarrow.table({"score": [0.5]}), os.replace

    def late(*names):
        monkeypatch.undo()
        process = multiprocessing.get_context("fork").Process(target=write_table, args=(path, table, {}))
        process.start()
        process.join()
        replace_file(*names)

    monkeypatch.setattr(tables.os, "replace", late)
    write_table(path, table, {})
    assert content(tmp_path) == {path.name: table_file(table, {}).to_pybytes()}


# ---------------------------------------------------------------------------------------------------- the folder


def half(chunk):
    chunk.write_bytes(chunk.read_bytes()[:-9])


def spoiled_page(chunk):
    content = chunk.read_bytes()
    chunk.write_bytes(content[:4] + b"\xff" * 40 + content[44:])


def flipped_bit(part):
    """In a score, which stays a number."""
    content = bytearray(part.read_bytes())
    content[content.index(read_table(part, "scores")[0]["score"].to_numpy()[0].tobytes())] ^= 1
    part.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "finished"),
    [
        (lambda part: part.write_bytes(b""), False),
        (half, False),
        (spoiled_page, False),
        (flipped_bit, False),
        (flipped_bit, True),
        (Path.unlink, True),
    ],
)
def test_a_damaged_part_is_scored_again(damage, finished, folders, data, tmp_path, straight):
    out = tmp_path / "scores"
    left(out, straight, finished=finished)
    damage(out / "part-000001.parquet")
    assert run(data, folders["clip"], out) == 0
    assert content(out) == straight


def test_one_flipped_bit_anywhere_is_damage(folders, data, tmp_path, straight):
    """Headers and footer too, which no checksum covers."""
    scoring = score.start(
        data / "data.json", tmp_path, folders["clip"],
        image_folder=data, precision="fp32", batch_size=2, chunk_size=2, device=torch.device("cpu"),
    )  # fmt: skip
    part, path = straight["part-000001.parquet"], tmp_path / "part-000001.parquet"
    path.write_bytes(part)
    assert scoring.is_whole(1)
    for place, byte in enumerate(part):
        path.write_bytes(part[:place] + bytes([byte ^ 1 << place % 8]) + part[place + 1 :])
        assert not scoring.is_whole(1), place


def test_a_scoring_without_any_score_is_refused_and_made_good(folders, data, tmp_path, straight, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "scores"
    assert run(data, folders["clip"], out, "--image-folder", tmp_path / "empty") == 2
    assert "none of the 7 pairs for" in (said := capsys.readouterr().err)
    assert "has a score, for example: 0.png: no such file; it needs one at least" in said
    assert "manifest.json" not in content(out)
    assert run(data, folders["clip"], out) == 0
    assert content(out) == straight


def test_parts_beyond_the_last_are_removed(folders, data, tmp_path, straight):
    out = tmp_path / "scores"
    left(out, straight | {"part-000009.parquet": straight["part-000000.parquet"], "part-of-mine": b""}, finished=False)
    assert run(data, folders["clip"], out) == 0
    assert content(out) == straight | {"part-of-mine": b""}


def test_parts_of_no_scoring_are_left_alone(folders, data, tmp_path, capsys):
    out = tmp_path / "scores"
    left(out, {})
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), out / "part-000000.parquet")
    before = content(out)
    assert run(data, folders["clip"], out) == 2
    assert "holds part-000000.parquet, which is of no scoring; it needs a folder of its own" in capsys.readouterr().err
    assert content(out) == before


@pytest.mark.parametrize("known_by", ["manifest.json", "scoring.json", "parts"])
def test_a_folder_of_another_scoring_is_left_alone(known_by, folders, data, tmp_path, straight, capsys):
    out = tmp_path / "scores"
    left(out, straight, finished=known_by == "manifest.json")
    if known_by == "scoring.json":
        about = read_table(out / "part-000000.parquet", "scores")[1]
        (out / "scoring.json").write_text(json.dumps(about))
    before = content(out)
    other = shutil.copytree(data, tmp_path / "data")
    (other / "data.json").write_text(json.dumps(json.loads((data / "data.json").read_text())[1:]))
    for arguments, says in (
        ((other, folders["clip"], out), "data.samples is 8 there, 7 here"),
        ((data, folders["siglip"], out), "model.sha256.config.json is "),
        ((data, folders["clip"], out, "--batch-size", 3), "batch_size is 2 there, 3 here"),
        ((data, folders["clip"], out, "--precision", "bf16"), "precision is fp32 there, bf16 here"),
    ):
        assert run(*arguments) == 2
        said = capsys.readouterr().err
        assert "holds scores that were made otherwise: " in said
        assert says in said
        assert content(out) == before


def test_differences_name_the_file_of_the_model():
    """One that is missing here too; a manifest's own entries are none."""
    here = {"data": {"samples": 8}, "model": {"sha256": {"config.json": "1" * 64}}}
    there = {
        "data": {"samples": 8, "name": "data.json"},
        "model": {"sha256": {"config.json": "2" * 64, "merges.txt": "3" * 64}, "revision": None},
        "rows": 7,
    }
    assert score.differences(here, there) == [
        "model.sha256.config.json is 222222222222… there, 111111111111… here",
        "model.sha256.merges.txt is 333333333333… there, missing here",
    ]


def test_every_file_of_the_tokenizer_counts(folders, tmp_path):
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
    capitals, small = PairBatches(RecordList(samples, data), preparation)[[0, 1]].token_ids
    assert preparation.lower
    assert torch.equal(capitals, small)
    read = preparation.tokenizer.convert_ids_to_tokens(small)
    assert "".join(read).startswith("a▁red▁car") or "".join(read).startswith("<bos>a▁red▁car")
    assert not load_model(folders["siglip"])[1].lower


def test_the_data_is_never_overwritten(folders, data, tmp_path, capsys):
    mine = shutil.copytree(data, tmp_path / "data")
    before = content(mine)
    (tmp_path / "link").symlink_to(mine)
    for out, says in (
        (mine, "which is read here; it needs another name"),
        (tmp_path / "link", "which is read here; it needs another name"),
        (mine / "data.json", "which is read here; it needs another name"),
        (mine / "0.png", "which is a file; it needs the name of a folder"),
        (mine / "0.png/scores", "but it takes no files (Not a directory); it needs a folder that can be written to"),
    ):
        assert run(mine, "/nowhere", out) == 2  # refused before the model is looked for
        assert f"aligngpt score: --out would write into {out}" in (said := capsys.readouterr().err)
        assert says in said
        assert content(mine) == before


def test_command_writes_scores_and_where_they_come_from(folders, data, tmp_path, capsys):
    out, revision = tmp_path / "new/scores", "5" * 40
    model = shutil.copytree(folders["siglip"], tmp_path / "snapshots" / revision)
    images = shutil.copytree(data, tmp_path / "images")
    (images / "5.png").unlink()
    assert run(images, model, out, "--chunk-size", 5) == 0
    said = capsys.readouterr()
    assert "6 pairs scored" in said.out
    assert "1 text cut, being longer" in said.out
    assert "1 sample without an image" in said.out
    assert said.err.endswith(
        "1 pair without a score (column problem):\n  record 5 (id e): 5.png: no such file\n"
        f"to score them again, remove {out}\n"
    )
    table, about = read_table(out / "part-000000.parquet", "scores")
    assert {field.name: str(field.type) for field in table.schema} == {
        "record": "int64",
        "id": "string",
        "score": "float",
        "truncated": "bool",
        "problem": "string",
    }
    manifest = read_manifest(out)
    assert manifest["data"] == {
        "sha256": data_hash(read_llava_json(data / "data.json")), "samples": 8, "name": "data.json"
    }  # fmt: skip
    weights, words = {"config.json", "model.safetensors"}, {"tokenizer.json", "tokenizer_config.json"}
    assert manifest["model"]["sha256"].keys() == weights | words
    assert (manifest["model"]["folder"], manifest["model"]["revision"]) == (revision, revision)
    assert manifest["image"] == {
        "size": SIZE,
        "aspect": "stretch",
        "resample": "bilinear",
        "mean": list(MEAN["siglip"]),
        "std": list(STD),
    }
    assert manifest["text"] == {"tokens": LENGTH, "padded": True, "lower": False, "truncated": 1}
    assert (manifest["precision"], manifest["batch_size"], manifest["chunk_size"]) == ("fp32", 2, 5)
    assert (manifest["rows"], manifest["problems"]) == (7, 1)
    assert [part["rows"] for part in manifest["parts"]] == [5, 2]
    assert read_part(out, manifest, 1, ["record"])["record"].to_pylist() == [6, 7]
    for said_of in (about, manifest):
        assert str(tmp_path.parent) not in json.dumps(said_of)  # names, no paths of this machine
    shutil.move(out / "part-000001.parquet", out / "part-000000.parquet")
    with pytest.raises(ValueError, match=r"part-000000.parquet is not the file that manifest.json names"):
        read_part(out, manifest, 0, ["record"])


def test_a_revision_is_what_the_hub_calls_it(tmp_path):
    note = tmp_path / ".cache/huggingface/download/config.json.metadata"
    note.parent.mkdir(parents=True)
    assert model_revision(tmp_path) is None
    note.write_text("0123456789abcdef" * 2 + "01234567\netag\n1700000000.0\n")
    assert model_revision(tmp_path) == "0123456789abcdef" * 2 + "01234567"
    note.write_text("main\n")
    assert model_revision(tmp_path) is None
    assert model_revision(tmp_path / "snapshots/main") is None


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickle_of_code(folder):
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"logit_scale": Evil(folder / "touched")}, file, protocol=2)


def zipped_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Evil(folder / "touched")}, folder / "pytorch_model.bin")


def cut_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def vision_tower_alone(folder):
    CLIPModel.from_pretrained(folder).vision_model.save_pretrained(folder)


def weights_missing(folder):
    CLIPModel.from_pretrained(folder).vision_model.save_pretrained(folder / "tower")
    (folder / "tower/model.safetensors").rename(folder / "model.safetensors")


def larger_resize(folder):
    stated = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(stated | {"size": {"shortest_edge": 40}}))


def test_too_little_memory_on_the_gpu_is_one_sentence(folders, data, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(similarity, "_cosines", full)
    assert run(data, folders["clip"], tmp_path / "out") == 2
    assert "--batch-size is 2, for which the GPU's memory is too small; it needs fewer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (vision_tower_alone, {}, "model of type 'clip_vision_model'; scoring needs one of clip, siglip"),
        (weights_missing, {}, "scoring needs the whole clip"),
        (pickle_of_code, {}, "a file of weights is not whole, or not of plain tensors alone"),
        (zipped_code, {}, "a file of weights is not whole, or not of plain tensors alone"),
        (cut_weights, {}, "a file of weights is not whole, or not of plain tensors alone"),
        (larger_resize, {}, "makes images of 32, 40 pixels; the model's vision tower needs 32"),
        (None, {"--model": "/nowhere"}, "/nowhere is not a model folder"),
        (None, {"--image-folder": "/nowhere"}, "--image-folder is /nowhere"),
        (None, {"--batch-size": 0}, "--batch-size is 0; it needs a whole number of at least 1"),
        (None, {"--chunk-size": 0}, "--chunk-size is 0; it needs a whole number of at least 1"),
    ],
)
def test_refused(folders, data, tmp_path, capsys, spoil, options, says):
    folder = shutil.copytree(folders["clip"], tmp_path / "model")
    if spoil:
        spoil(folder)
    more = [word for flag in options.items() for word in flag]
    assert run(data, folder, tmp_path / "out", *more) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (folder / "touched").exists()
