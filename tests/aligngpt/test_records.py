"""aligngpt.data.records: JSON, JSON lines, packed shards and plain tars of the same data give the same samples."""

import io
import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligngpt.cli import main
from aligngpt.data.records import NO_LEVEL, check_levels, is_tar, open_records
from aligngpt.image import open_image

SPEAKERS = ("human", "gpt")
KINDS = ("data.json", "data.jsonl", "packed", "tars", "repacked")


def talk(*words):
    return [{"from": SPEAKERS[place % 2], "value": text} for place, text in enumerate(words)]


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 6 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG" if number % 2 else "JPEG")
    return file.getvalue()


RECORDS = [
    {"id": "a", "image": "x/0.jpg", "align_level": 3, "conversations": talk("<image>\nWhat?", "A bus.")},
    {"id": 7, "model": "", "conversations": talk("Hi 日本 🙂", "Hello\u2028there", "Bye", "")},  # no image
    {"id": "a", "image": "x/0.jpg", "conversations": talk("<image>", "the id and the picture again")},  # fault 22
    {"image": ["1.PNG", "x/0.jpg", "straße/2.jpeg"], "conversations": talk("<image><image>", "b", "<image>?", "d")},
    {"id": "none", "image": "1.PNG", "conversations": []},  # fault 25
    {"id": "order", "image": "1.PNG", "conversations": talk("<image>", "b") + talk("c", "d")[1:]},
    {"id": "gone", "image": "x/gone.jpg", "conversations": talk("<image>", "b")},  # fault 13
    {"id": "one of two", "image": ["gone.png", "1.PNG"], "conversations": talk("<image><image>", "b")},
    {"id": "out", "image": "../secret.jpg", "conversations": talk("<image>", "b")},  # fault 15
    {"id": "odd", "image": "no-extension", "align_level": 0, "conversations": talk("<image>", "b")},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All kinds of the same data, in the order of `KINDS`."""
    folder = tmp_path_factory.mktemp("records")
    for number, name in enumerate(("x/0.jpg", "1.PNG", "straße/2.jpeg", "no-extension")):
        path = folder / "images" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(picture(number))
    (folder / "secret.jpg").write_bytes(picture(9))
    (folder / "data.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    (folder / "data.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    options = ["--records-per-shard", "3", "--workers", "0", "--out"]
    images = ["--image-folder", str(folder / "images")]
    assert main(["pack", str(folder / "data.jsonl"), *images, *options, str(folder / "packed")]) == 0
    (folder / "tars").mkdir()
    for shard in (folder / "packed").glob("*.tar"):
        (folder / "tars" / shard.name).write_bytes(shard.read_bytes())
    assert main(["pack", str(folder / "tars"), *options, str(folder / "repacked")]) == 0
    return folder


def opened(folder, kind):
    return open_records(folder / kind, folder / "images" if kind.startswith("data") else None)


def content(records, sample, number):
    """The bytes of an image, or None where it can't be had."""
    try:
        source = records.image(sample, number)
        return source if isinstance(source, bytes) else source.read_bytes()
    except (ValueError, FileNotFoundError):
        return None


def test_fault_13_fault_15_fault_22_fault_25_all_kinds_give_the_same(folder):
    expected = opened(folder, "data.json")
    contents = [
        [content(expected, sample, number) for number in range(len(sample.images))] for sample in expected.samples
    ]
    one, two, three, four = (picture(number) for number in range(4))
    assert contents == [[one], [], [one], [two, one, three], [two], [two], [None], [None, two], [None], [four]]
    assert [sample.problem is None for sample in expected.samples] == [place not in (4, 5) for place in range(10)]
    for kind in KINDS:
        records = opened(folder, kind)
        assert len(records) == len(RECORDS)
        assert [records[place] for place in range(len(records))] == list(expected)
        assert records.sha256 == expected.sha256
        assert records.num_images.tolist() == [1, 0, 1, 3, 1, 1, 1, 2, 1, 1]
        assert records.num_characters.tolist() == expected.num_characters.tolist()
        assert records.levels.tolist() == [3, *[NO_LEVEL] * 8, 0]
        assert contents == [[content(records, s, k) for k in range(len(s.images))] for s in records]
        with pytest.raises(ValueError, match=r"record 2 \(id a\) has no align_level; it needs one in 0..7"):
            check_levels(records, 8)
        sample = records[3]
        for number in range(3):
            assert open_image(records.image(sample, number), name=sample.images[number]).size[1] == 8


def test_places_are_those_of_a_list(folder):
    for kind in KINDS:
        records = opened(folder, kind)
        assert records[-1] == records[9]
        assert list(records[8:2:-3]) == [records[8], records[5]]
        assert list(records[10:]) == []
        for place in (10, -11):
            with pytest.raises(IndexError):
                records[place]


def test_packing_gives_the_same_bytes_from_every_kind(folder, tmp_path):
    """JSON and tars, two processes and none. A record's own keys stay: data_hash does not cover them."""
    images = ["--image-folder", str(folder / "images")]
    options = ["--records-per-shard", "3", "--workers", "2", "--out", str(tmp_path / "packed")]
    assert main(["pack", str(folder / "data.json"), *images, *options]) == 0
    for path in (folder / "packed").iterdir():
        assert (tmp_path / "packed" / path.name).read_bytes() == path.read_bytes()
        if path.suffix == ".tar":  # the other files say which images were missing too
            assert (folder / "repacked" / path.name).read_bytes() == path.read_bytes()
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "packed", capture_output=True, text=True)
    assert sums.returncode == 0
    assert sums.stdout.count(": OK") == 4 + 3
    shard = (tmp_path / "packed" / "shard-000000.tar").read_bytes()
    assert b'"model":""' in shard


READ = """
import pickle, sys
records = pickle.load(sys.stdin.buffer)
found = [[s, [records.image(s, k) for k in range(len(s.images))]] for s in records[:6]]
shared = [line.split()[1] for line in open("/proc/self/maps") if line.rstrip().endswith(("records.npy", "images.npy"))]
sys.stdout.buffer.write(pickle.dumps((found, shared)))
"""


@pytest.mark.parametrize("kind", ["packed", "tars"])
def test_processes_read_the_same(folder, kind):
    """A forked process inherits what is open, as loader workers do; a new one gets it pickled. Pages are shared."""
    records = opened(folder, kind)
    first = [[sample, [records.image(sample, k) for k in range(len(sample.images))]] for sample in records[:6]]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def read():
        places = [4, 0, 3, 5, 2, 1] * 20
        for place in places:
            sample = records[place]
            assert [sample, [records.image(sample, k) for k in range(len(sample.images))]] == first[place]
        sender.send(len(places))

    processes = [context.Process(target=read) for _ in range(2)]
    for process in processes:
        process.start()
    for place in [1, 2, 3, 4, 5, 0] * 20:  # at the same time
        assert records[place] == first[place][0]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [receiver.recv(), receiver.recv()] == [120, 120]
    if kind == "packed":
        root = Path(__file__).parents[2]
        new = subprocess.run(
            [sys.executable, "-c", READ], input=pickle.dumps(records), stdout=subprocess.PIPE, cwd=root
        )
        found, shared = pickle.loads(new.stdout)
        assert found == first
        assert shared == ["r--s", "r--s"]


def test_names_of_tars(folder, tmp_path):
    """What lies beside tars is none: it is not read, or read as the JSON that it is."""
    (tmp_path / "set").mkdir()
    tar = next((folder / "tars").iterdir())
    (tmp_path / "set" / "0.tar").write_bytes(tar.read_bytes())
    for name in ("0.tar.md5", "0.tar.idx", "0.tar.sha256", "0.tar.partial"):
        (tmp_path / "set" / name).write_bytes(b"0")
    assert len(open_records(tmp_path / "set")) > 0
    (tmp_path / "x.tar.json").write_text(json.dumps(RECORDS))
    assert list(open_records(tmp_path / "x.tar.json", folder)) == list(opened(folder, "data.json"))
    assert all(is_tar(f"a.{kind}") for kind in ("tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst", "tar.lz4", "tgz"))


def test_an_image_folder_is_for_json_alone(folder, tmp_path):
    with pytest.raises(ValueError, match=r"image folder is x; .*packed are shards, which hold their images"):
        open_records(folder / "packed", "x")
    records = open_records(folder / "data.json")
    with pytest.raises(ValueError, match=r"x/0.jpg: no image folder was given; .*data.json needs one"):
        records.image(records[0], 0)
    with pytest.raises(ValueError, match=r"holds neither manifest.json nor a .tar"):
        open_records(tmp_path)
