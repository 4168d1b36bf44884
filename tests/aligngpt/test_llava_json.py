"""aligngpt.data.llava_json: LLaVA's files and JSON lines as they are, and messages that lead to the broken record."""

import json
import os

import pytest

from aligngpt.data.llava_json import Sample, image_path, read_llava_json, read_llava_jsonl
from aligngpt.text import Turn


def talk(*words):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(words)]


GOOD = {"id": "good", "image": "a.png", "conversations": talk("<image>\nWhat?", "A bus.")}


def write(tmp_path, content):
    path = tmp_path / "data.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(tmp_path, records):
    path = tmp_path / "data.jsonl"
    lines = (json.dumps(record, ensure_ascii=place % 2 == 0) for place, record in enumerate(records))
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return path


def test_fault_22_records_as_llavas_files_have_them(tmp_path):
    """Numbers as ids, ids that repeat (22), no image, a list of images, unknown keys, a conversation's tail."""
    system = {"from": "system", "value": "Be brief."}
    records = [
        GOOD | {"id": "000000033471", "align_level": 7},
        {"id": 33471, "model": "", "conversations": talk("Hi 日本 🙂", "Hello", "Bye", "")},
        GOOD | {"id": "000000033471", "image": None, "conversations": [system, *talk("a", "b")]},
        GOOD | {"image": ["a.png", "b/c.png"], "conversations": talk("<image>", "one", "<image> and?", "two", "Why?")},
        {"conversations": talk("", "x", "y", "z")[1:]},
    ]
    assert read_llava_jsonl(write_lines(tmp_path, records)) == read_llava_json(write(tmp_path, records))
    assert read_llava_json(write(tmp_path, records)) == [
        Sample("000000033471", ("a.png",), (Turn("user", "<image>\nWhat?"), Turn("assistant", "A bus.")), 7, 0),
        Sample(
            "33471",
            (),
            (Turn("user", "Hi 日本 🙂"), Turn("assistant", "Hello"), Turn("user", "Bye"), Turn("assistant", "")),
            None,
            1,
        ),
        Sample("000000033471", (), (Turn("system", "Be brief."), Turn("user", "a"), Turn("assistant", "b")), None, 2),
        Sample(
            "good",
            ("a.png", "b/c.png"),
            (
                Turn("user", "<image>"),
                Turn("assistant", "one"),
                Turn("user", "<image> and?"),
                Turn("assistant", "two"),
                Turn("user", "Why?"),
            ),
            None,
            3,
        ),
        Sample("4", (), (Turn("user", "y"), Turn("assistant", "z")), None, 4),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": "a",\n "b" 1}]', r"line 2, column 6: .*; needs a JSON list"),
        (b"", "line 1, column 1"),
        (b"\xef\xbb\xbf[]", "line 1, column 1: Unexpected UTF-8 BOM"),
        (b'[\n{"id": "\xff"}]', "line 2: byte 10 is not UTF-8"),
        (b'[{"id": "a\x00"}]', "line 1, column 11: Invalid control character"),
        (b"[\n" * 100_000, "maximum recursion depth"),
        (b'[{"id": ' + b"9" * 5000 + b"}]", "line 1: Exceeds the limit"),
        ({"id": "a"}, "holds an object of 1; needs a JSON list of records; JSON lines must be called .jsonl$"),
        (
            b'{"id": 1}\n{"id": 2}',
            "line 2, column 1: Extra data; needs a JSON list .* JSON lines must be called .jsonl$",
        ),
    ],
)
def test_fault_21_malformed_file(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read_llava_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": \n', "line 3, column 7: Expecting value; needs a JSON object"),
        (b'{"id": "\xff"}', "line 3: byte 8 is not UTF-8"),
        (b'\xef\xbb\xbf{"id": 1}', "line 3, column 1: Unexpected UTF-8 BOM"),
        (b"[" * 200_000, "line 3: maximum recursion depth"),
        (b"[1]", "line 3: record 1 is a list of 1; needs an object"),
        (b'{"id": "a"}', r"line 3: record 1 \(id 'a'\) has no 'conversations'"),
    ],
)
def test_fault_21_malformed_line(tmp_path, content, message):
    """A line is named by its number in the file, a record by its place: the second line here is blank."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n \n" + content)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read_llava_jsonl(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": None}, r"'conversations' is null; needs a list"),
        ({"conversations": ["hi"]}, 'turn 0 is "hi"; needs an object'),
        (
            {"conversations": [{"from": "user", "value": "a"}]},
            "turn 0 is from 'user'; needs 'human', 'gpt' or 'system'",
        ),
        ({"conversations": [{"from": "human"}]}, "'value' of turn 0 is null; needs a string"),
        ({"conversations": talk("<image>a\0", "b")}, r"'value' of turn 0 holds U\+0000 at 8"),
        ({"conversations": talk("<image>a\udc00", "b")}, r"'value' of turn 0 holds U\+DC00 at 8"),
        ({"image": 3}, "'image' is 3; needs a name"),
        ({"image": ["a.png", ""]}, "'image' is a list of 2; needs a name"),
        ({"align_level": -1}, "'align_level' is -1; needs a whole number from 0"),
        ({"align_level": 10**20}, "'align_level' is 1000.*; needs a whole number from 0 to"),  # no array holds it
        ({"align_level": True}, "'align_level' is true"),
        ({"align_level": 3.0}, "'align_level' is 3.0"),
        ({"align_level": "3"}, "'align_level' is \"3\""),
    ],
)
def test_fault_21_malformed_record_is_named(tmp_path, change, message):
    records = [GOOD, GOOD | {"id": "bad"} | change]
    for read, path in ((read_llava_json, write(tmp_path, records)), (read_llava_jsonl, tmp_path / "data.jsonl")):
        path.with_name("data.jsonl").write_text("\n".join(map(json.dumps, records)))
        with pytest.raises(ValueError, match=rf"^{path}: (line 2: )?record 1 \(id 'bad'\).*{message}"):
            read(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"conversations": []}, "the conversation is empty"),
        ({"conversations": talk("<image>")}, "the turns are from ['human']; needs human and gpt in turn"),
        ({"conversations": talk("<image>", "b") + talk("c", "d")[1:]}, "the turns are from ['human', 'gpt', 'gpt']"),
        ({"conversations": talk("", "b", "<image>", "d")[1:3]}, "the turns are from ['gpt', 'human']"),
        (
            {"conversations": talk("<image>a<image>", "b")},
            "the text has 2 <image> marks; needs one for each of 1 images",
        ),
        ({"conversations": talk("a", "<image>")}, "the text has 0 <image> marks; needs one for each of 1 images"),
    ],
)
def test_fault_23_fault_25_a_conversation_that_teaches_nothing_is_a_problem(tmp_path, change, problem):
    """It is no error: the others are read, and training drops it."""
    first, second, third = read_llava_json(write(tmp_path, [GOOD, GOOD | change, GOOD]))
    assert (first.problem, third.problem) == (None, None)
    assert second.problem.startswith(problem)
    assert (second.images, second.record) == (("a.png",), 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], " is a list of 0; needs an object"),
        ({"id": 1.5}, ": 'id' is 1.5"),
        ({"id": "a"}, ".* has no 'conversations'"),
    ],
)
def test_fault_21_record_without_a_name(tmp_path, record, message):
    path = write(tmp_path, [GOOD, record])
    with pytest.raises(ValueError, match=f"^{path}: record 1{message}"):
        read_llava_json(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "coco").mkdir(parents=True)
    (root / "coco" / "1.png").write_bytes(b"1")
    (tmp_path / "secret.png").write_bytes(b"2")
    (tmp_path / "images-other").mkdir()
    (root / "inner.png").symlink_to(root / "coco" / "1.png")
    (root / "outer.png").symlink_to(tmp_path / "secret.png")
    (root / "outer").symlink_to(tmp_path)
    return root


def test_image_path_stays_in_the_folder(folder):
    assert image_path(folder, "coco/1.png").read_bytes() == b"1"
    assert image_path(folder, "inner.png").read_bytes() == b"1"
    assert not image_path(folder, "coco/missing.png").exists()  # open_image names it
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert image_path(link, "coco/1.png").read_bytes() == b"1"  # the folder itself may be a link


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", "leaves the image folder"),  # fault 15
        ("coco/../../secret.png", "leaves the image folder"),
        ("../../etc/passwd", "leaves the image folder"),
        ("/etc/passwd", "leaves the image folder"),
        ("..\\secret.png", "leaves the image folder"),
        ("outer.png", "is a link out of the image folder"),  # 16
        ("outer/secret.png", "is a link out of the image folder"),
        ("outer/images-other/x.png", "is a link out of the image folder"),
        ("https://example.org/a.png", "is a URL"),  # 17
        ("", "must be a path below the image folder"),
        ("a\0.png", "must be a path below the image folder"),
    ],
)
def test_fault_15_fault_16_fault_17_names_that_lead_out(folder, name, message):
    with pytest.raises(ValueError, match=message):
        image_path(folder, name)


def test_what_is_no_plain_file(folder):
    """A pipe would block who opens it. Links that lead to themselves are for `open_image` to refuse, as missing."""
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to(folder / "pipe.png")
    for name in ("pipe.png", "device.png", "coco"):
        with pytest.raises(ValueError, match=f"image name '{name}' is no plain file; it must not be a folder, a pipe"):
            image_path(folder, name)
    (folder / "a.png").symlink_to("b.png")
    (folder / "b.png").symlink_to("a.png")
    (folder / "long.png").symlink_to("x" * 255)
    for name in ("a.png", "a.png/secret.png", "long.png", "y" * 300, "coco/1.png/z"):
        with pytest.raises(OSError, match=r"symbolic links|No such file|too long|Not a directory"):
            image_path(folder, name).open()
    (folder.parent / "round").symlink_to("round")
    assert not image_path(folder.parent / "round", "1.png").exists()


def test_fault_24_a_mark_that_stands_for_no_image_is_a_word(tmp_path):
    """In a record without images, and in what is not a human turn. At an edge of a human turn an image was meant."""
    code = "Why does <image> in my SVG fail?"
    records = [
        {"conversations": talk(code, "Use <image> so.")},
        GOOD | {"conversations": talk("<image>What is written here?", "It says <image>.")},
        {"conversations": talk("What is this?\n<image>", "A bus.")},
    ]
    words, sign, lost = read_llava_json(write(tmp_path, records))
    assert (words.images, words.turns[0].text, words.problem) == ((), code, None)
    assert (sign.images, sign.turns[1].text, sign.problem) == (("a.png",), "It says <image>.", None)
    assert lost.problem == "the text has 1 <image> marks; needs one for each of 0 images"
