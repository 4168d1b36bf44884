"""aligngpt doctor DATA: the list of what training would drop is exactly the bad samples, each with its reason."""

import json
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligngpt import data_doctor
from aligngpt.cli import main
from aligngpt.data.records import open_records
from aligngpt.data_doctor import facts, scan
from aligngpt.processor import AlignGPTImageProcessor, AlignGPTProcessor

ROWS = 16  # <image> tokens per picture of the model below
MAX_LENGTH = 400


def jpeg(path: Path, width: int = 80, height: int = 60) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=90)
    return path.read_bytes()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header is whole and whose pixels are not there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1 << 20) + b"IDAT" + bytes(100)


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


SEE = talk("<image>\nWhat is it?", "a red car")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.json with a sample of each fault and good ones, images/, and model/, a processor.

    A bad sample's id is its fault's number, and what its reason must hold follows in reasons.json.
    """
    root = tmp_path_factory.mktemp("doctor")
    images = root / "images"
    images.mkdir()
    whole = jpeg(images / "good.jpg")
    Image.new("L", (7, 5)).save(images / "gray.png")
    Image.new("P", (64, 48)).save(images / "7.jpg", format="GIF")  # fault 7: it decodes, whatever its name
    (images / "1.jpg").write_bytes(b"")
    (images / "2.jpg").write_bytes(whole[:20])
    (images / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "3b.jpg").write_bytes(whole[: len(whole) * 99 // 100])
    (images / "4.jpg").write_bytes(b"\x07" + np.random.default_rng(1).bytes(999))
    (images / "5.jpg").write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    Image.new("RGB", (1, 20000)).save(images / "10.png")  # nothing is wrong with it until it is resized
    (images / "11.png").write_bytes(bomb(10_000, 10_001))
    jpeg(root / "secret.jpg")
    (images / "16.jpg").symlink_to(root / "secret.jpg")

    good = [
        {"id": "a", "image": "good.jpg", "conversations": SEE},
        {"id": "a", "image": "7.jpg", "conversations": SEE},  # fault 22
        {"id": 99, "conversations": talk("Why?", "Because of \x1b[2J.")},
        {"id": "two", "image": ["gray.png", "good.jpg"], "align_level": 3,
         "conversations": talk("<image>\n<image>\nCompare.", "one is gray")},
        {"id": "long", "image": "good.jpg", "conversations": talk("<image>\nTell.", "word " * 200)},
    ]  # fmt: skip
    opens = {
        "1": ("1.jpg", "1.jpg: not an image (it is empty); "),
        "2": ("2.jpg", "2.jpg: "),
        "3": ("3.jpg", "3.jpg: can't be decoded (OSError: image file is truncated"),
        "3b": ("3b.jpg", "3b.jpg: can't be decoded (OSError: image file is truncated"),
        "4": ("4.jpg", "4.jpg: not an image (it begins with b'\\x07"),
        "5": ("5.jpg", "5.jpg: not an image (it begins with b'<!DOCTYPE html><'); "),
        "11": ("11.png", "11.png: 10000×10001 pixels; at most "),
        "13": ("13.jpg", "13.jpg: no such file"),
        "15": ("../secret.jpg", "image name '../secret.jpg' leaves the image folder; "),
        "15b": ("/etc/passwd", "image name '/etc/passwd' leaves the image folder; "),
        "16": ("16.jpg", "image name '16.jpg' is a link out of the image folder; "),
        "17": ("https://x.org/a.jpg", "image name 'https://x.org/a.jpg' is a URL; "),
    }
    bad = [{"id": id, "image": name, "conversations": SEE} for id, (name, _) in opens.items()]
    bad += [
        {"id": "25", "conversations": []},
        {"id": "25b", "conversations": talk("Hello?")},
        # with a model only:
        {"id": "10", "image": "10.png", "conversations": SEE},
        {"id": "26", "conversations": talk("word " * 200, "too late")},
        {"id": "27", "image": ["good.jpg"] * 30, "conversations": talk("<image>\n" * 30 + "Look.", "too late")},
    ]
    reasons = {id: reason for id, (_, reason) in opens.items()}
    reasons |= {
        "25": "the conversation is empty",
        "25b": "the turns are from ['human']; ",
        "10": "10.png: 1×20000 is too long: ",
        "26": "nothing of its answers is within max_length, 400 tokens",
        "27": "nothing of its answers is within max_length, 400 tokens",
    }
    mixed = [record for pair in zip(bad, good * 4, strict=False) for record in pair]
    (root / "data.json").write_text(json.dumps(mixed), encoding="utf-8")
    (root / "good.json").write_text(json.dumps(good * 20), encoding="utf-8")
    (root / "reasons.json").write_text(json.dumps(reasons), encoding="utf-8")
    processor(max_length=MAX_LENGTH).save_pretrained(root / "model")
    return root


def processor(**fields: int) -> AlignGPTProcessor:
    from transformers import AutoTokenizer

    oracle = Path(__file__).parents[1] / "data" / "oracle"
    return AlignGPTProcessor(
        AlignGPTImageProcessor(size=56),
        AutoTokenizer.from_pretrained(oracle),
        rows_per_image=ROWS,
        align_token_id=320,
        image_token_id=321,
        **fields,
    )


def doctor(place: Path, *more: object, data: str = "data.json") -> int:
    command = ["doctor", place / data, "--image-folder", place / "images", "--workers", "0", *more]
    return main([str(word) for word in command])


ONLY_WITH_A_MODEL = ("10", "26", "27")


@pytest.mark.parametrize("with_model", [False, True])
def test_faults_1_to_27_the_list_is_exactly_the_bad_samples(place, tmp_path, capsys, with_model):
    reasons = json.loads((place / "reasons.json").read_text(encoding="utf-8"))
    if not with_model:
        reasons = {id: reason for id, reason in reasons.items() if id not in ONLY_WITH_A_MODEL}
    model = ("--model", place / "model") if with_model else ()
    assert doctor(place, "--out", tmp_path, *model) == 1
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal

    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()]
    records = json.loads((place / "data.json").read_text(encoding="utf-8"))
    assert [line["id"] for line in lines] == list(reasons)
    for line in lines:
        assert line.keys() == {"record", "id", "reason", "kind"}
        assert records[line["record"]]["id"] == line["id"]
        assert line["reason"].startswith(reasons[line["id"]])
        assert f"\n  record {line['record']} (id {line['id']}): {line['reason']}\n" in out
    assert f"Training would drop {len(reasons)} of 34 samples ({'50.0' if with_model else '41.2'} %):" in out
    assert "It would stop: more than 1 % are dropped (--data.max-drop-rate)." in out
    assert ("were not checked: they need --model" in out) is not with_model
    assert "\n  repeated ids              4  at 17 samples, such as a; allowed" in out  # fault 22


def test_any_number_of_workers_gives_the_same(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_doctor, "SAMPLES_A_PART", 3)
    outputs = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        assert doctor(place, "--workers", workers, "--model", place / "model", "--out", out) == 1
        outputs.append((capsys.readouterr().out, (out / "bad_samples.jsonl").read_bytes()))
    assert outputs[0] == outputs[1]


def test_the_numbers_are_those_of_the_data(place):
    """Counts, sizes and lengths, by hand; lengths beyond the limit are those before the cut."""
    model = processor(max_length=MAX_LENGTH)
    records = open_records(place / "good.json", place / "images")
    findings = scan(records, model)
    found = facts(findings, 0.01)
    assert found["ok"]
    assert found["dropped"] == 0
    assert (found["samples"], found["text_only"], found["one_image"], found["several_images"]) == (100, 20, 60, 20)
    assert (found["levels"], found["without_level"]) == ({"3": 20}, 60)
    assert found["duplicate_ids"] == {"ids": 4, "samples": 100, "example": "a"}
    assert findings.sizes.tolist() == [[80, 60], [64, 48], [7, 5], [80, 60], [80, 60]] * 20
    assert (found["smallest_image"], found["largest_image"]) == ([7, 5], [80, 60])
    whole = processor(max_length=100_000)
    lengths = [len(whole.text(sample).input_ids) for sample in records]
    assert findings.lengths.tolist() == lengths
    assert lengths[4] > MAX_LENGTH
    assert found["longer_than_max_length"] == 20
    assert found["longest_text"] == max(lengths)


def test_a_good_set_and_the_limit(place, tmp_path, capsys):
    assert doctor(place, "--json", data="good.json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["drops"], found["max_length"]) == (True, [], None)
    assert doctor(place, "--max-drop-rate", "0.42") == 0  # 14 of 34 are 0.412
    assert "It would go on: the limit is 42.0 %" in capsys.readouterr().out
    assert doctor(place, "--max-drop-rate", "0.41", "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["drops"]) == 14


def test_flags_change_what_the_model_reads(place, capsys):
    model = ("--model", place / "model", "--max-drop-rate", 1)
    assert doctor(place, *model, "--max-length", 2000, "--json") == 0
    ids = {drop["id"] for drop in json.loads(capsys.readouterr().out)["drops"]}
    assert ids & set(ONLY_WITH_A_MODEL) == {"10"}  # long enough for all answers
    assert doctor(place, *model, "--template", "plain", "--json", data="good.json") == 0
    lengths = json.loads(capsys.readouterr().out)["longest_text"]
    assert doctor(place, *model, "--json", data="good.json") == 0
    assert json.loads(capsys.readouterr().out)["longest_text"] > lengths  # v1 has a system prompt


def test_many_drops_are_shown_by_kind(place, tmp_path, capsys):
    gone = [{"id": f"g{n}\x1b[2J", "image": f"gone{n}.jpg", "conversations": SEE} for n in range(25)]
    (tmp_path / "gone.json").write_text(json.dumps(gone), encoding="utf-8")
    assert doctor(place, "--out", tmp_path, data=tmp_path / "gone.json") == 1
    out = capsys.readouterr().out
    assert "  25 × no such file; for example record 0 (id g0\\x1b[2J): gone0.jpg: no such file\n" in out
    assert f"All of them: {tmp_path / 'bad_samples.jsonl'}\n" in out
    assert out.count("no such file") == 2
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == 25
    assert doctor(place, data=tmp_path / "gone.json") == 1
    assert "--out DIR or --json lists all of them." in capsys.readouterr().out


def test_a_tar_needs_no_image_folder(place, tmp_path, capsys):
    """A WebDataset tar, of which one image is damaged."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, name in (("0", "good.jpg"), ("1", "3.jpg"), ("2", "good.jpg")):
            record = {"id": key, "image": f"{key}.jpg", "conversations": SEE}
            (tmp_path / "talk.json").write_text(json.dumps(record), encoding="utf-8")
            tar.add(place / "images" / name, f"{key}.jpg")
            tar.add(tmp_path / "talk.json", f"{key}.json")
    assert main(["doctor", str(tmp_path / "a.tar"), "--workers", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["images_decoded"]) == (3, 2)
    (drop,) = found["drops"]
    assert (drop["record"], drop["id"]) == (1, "1")
    assert "can't be decoded (OSError: image file is truncated" in drop["reason"]


@pytest.mark.parametrize("data", ["data.json", "good.json", "text.json"])
def test_the_picture_says_what_the_numbers_say(place, tmp_path, data, capsys):
    """It is drawn for any data, also without images or drops, and its words and bars are the facts."""
    talks = [{"id": f"{n}", "conversations": talk("Why?", "Because $x$.")} for n in range(3)]
    (place / "text.json").write_text(json.dumps(talks), encoding="utf-8")
    model = ("--model", place / "model") if data == "data.json" else ()
    doctor(place, "--out", tmp_path, *model, data=data)
    with Image.open(tmp_path / "summary.png") as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
        assert image.width > 1200
    assert pixels.std() > 10  # bars and words, not an empty page

    records = open_records(place / data, place / "images")
    findings = scan(records, processor(max_length=MAX_LENGTH) if model else None)
    found = facts(findings, 0.01)
    figure = data_doctor.summary(findings, found)
    kinds, sizes, lengths, counts = figure.axes[:4]
    assert f"{found['dropped']} of {found['samples']} samples would be dropped" in figure.get_suptitle()
    bars = sum(bar.get_width() for bar in kinds.patches)
    assert bars == found["dropped"]
    assert sum(bar.get_height() for bar in lengths.patches) == (findings.lengths > 0).sum() if model else len(records)
    assert [bar.get_width() for bar in counts.patches][:3] == [
        found["text_only"], found["one_image"], found["several_images"],
    ]  # fmt: skip
    if len(findings.sizes):
        assert sizes.collections[0].get_array().sum() == len(findings.sizes)
    assert capsys.readouterr().err == ""


def test_an_interrupted_scan_leaves_nothing(place, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for name in ("scan", "summary"):  # at work, and while the files are written
        monkeypatch.setattr(data_doctor, name, interrupt)
        assert doctor(place, "--out", tmp_path / name) == 130
        assert not any(path.suffix in (".tmp", ".png") for path in (tmp_path / name).iterdir())
        monkeypatch.undo()
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("aligngpt doctor: interrupted")
    assert not list((tmp_path / "scan").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workers", "-1"), "--workers is -1; it needs"),
        (("--max-drop-rate", "2"), "--max-drop-rate is 2.0; it needs a share of 0 to 1"),
        (("--image-folder", "/nowhere"), "--image-folder is /nowhere; it needs a folder that exists"),
        (("--template", "v1"), "--template is v1; it needs --model"),
        (("--max-length", "9"), "--max-length is 9; it needs --model"),
        (("--max-length", "0", "--model", "MODEL"), "--max-length is 0; it needs"),
        (("--template", "v9", "--model", "MODEL"), "template is 'v9'; it must be one of"),
        (("--model", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_flags_are_one_sentence(place, capsys, flags, message):
    assert doctor(place, *(str(place / "model") if flag == "MODEL" else flag for flag in flags)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("aligngpt doctor: ")
    assert message in err


def test_fault_21_data_that_cannot_be_read(place, tmp_path, capsys):
    for content, message in (
        ("[", "line 1, column 2: "),
        ("[]", "holds no samples; it needs at least one"),
        ('[{"id": "a"}]', "has no 'conversations'"),
        (json.dumps([{"image": "good.jpg", "conversations": SEE}]), "--image-folder is missing; "),
    ):
        file = tmp_path / "data.json"
        file.write_text(content, encoding="utf-8")
        assert main(["doctor", str(file)]) == 2
        assert message in capsys.readouterr().err
    assert main(["doctor", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("aligngpt doctor: ")


def test_flags_of_the_data_need_data(capsys):
    assert main(["doctor", "--out", "somewhere"]) == 2
    assert "--out is somewhere; it needs DATA" in capsys.readouterr().err


def test_without_a_model_transformers_is_not_needed(place):
    script = f"""
import sys
sys.modules["transformers"] = None
from aligngpt.cli import main
sys.exit(main(["doctor", {str(place / "good.json")!r}, "--image-folder", {str(place / "images")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Training would drop 0 of 100 samples (0 %)." in done.stdout
