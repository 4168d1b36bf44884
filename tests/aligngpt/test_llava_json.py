"""aligngpt.data.llava_json: LLaVA's files as they are, and messages that lead to the broken record."""

import json

import pytest

from aligngpt.data.llava_json import Sample, image_path, read_llava_json
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


def test_records_as_llavas_files_have_them(tmp_path):
    """Numbers as ids, ids that repeat (fault 22), no image, a list of images, unknown keys, a conversation's tail."""
    system = {"from": "system", "value": "Be brief."}
    records = [
        GOOD | {"id": "000000033471", "align_level": 7},
        {"id": 33471, "model": "", "conversations": talk("Hi 日本 🙂", "Hello", "Bye", "")},
        GOOD | {"id": "000000033471", "image": None, "conversations": [system, *talk("a", "b")]},
        GOOD | {"image": ["a.png", "b/c.png"], "conversations": talk("<image>", "one", "<image> and?", "two", "Why?")},
        {"conversations": talk("", "x", "y", "z")[1:]},
    ]
    assert read_llava_json(write(tmp_path, records), num_levels=8) == [
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
        (b"[" * 200_000, "maximum recursion depth"),
        (b'[{"id": ' + b"9" * 5000 + b"}]", "Exceeds the limit"),
        ({"id": "a"}, "holds an object of 1; needs a list"),
    ],
)
def test_fault_21_malformed_file(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read_llava_json(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": None}, r"'conversations' is null; needs a list"),
        ({"conversations": []}, "'conversations' is empty"),  # fault 25
        ({"conversations": ["hi"]}, 'turn 0 is "hi"; needs an object'),
        (
            {"conversations": [{"from": "user", "value": "a"}]},
            "turn 0 is from 'user'; needs 'human', 'gpt' or 'system'",
        ),
        ({"conversations": [{"from": "human"}]}, "'value' of turn 0 is null; needs a string"),
        ({"conversations": talk("<image>")}, r"from \['human'\]; needs human and gpt in turn"),
        ({"conversations": talk("<image>", "b") + talk("c", "d")[1:]}, r"from \['human', 'gpt', 'gpt'\]"),
        ({"conversations": talk("<image>a<image>", "b")}, "2 <image> marks; needs one for each of 1 images"),  # 23
        ({"image": None}, "1 <image> marks; needs one for each of 0 images"),
        ({"conversations": talk("a", "<image>")}, r"turn 1 \(gpt\) holds <image>"),
        ({"conversations": talk("<image>a\0", "b")}, r"'value' of turn 0 holds U\+0000 at 8"),  # 21
        ({"conversations": talk("<image>a\udc00", "b")}, r"'value' of turn 0 holds U\+DC00 at 8"),
        ({"image": 3}, "'image' is 3; needs a name"),
        ({"image": ["a.png", ""]}, "'image' is a list of 2; needs a name"),
        ({"align_level": 8}, "'align_level' is 8; needs a whole number in 0..7"),  # 35
        ({"align_level": -1}, "'align_level' is -1"),
        ({"align_level": True}, "'align_level' is true"),
        ({"align_level": 3.0}, "'align_level' is 3.0"),
        ({"align_level": "3"}, "'align_level' is \"3\""),
    ],
)
def test_malformed_record_is_named(tmp_path, change, message):
    path = write(tmp_path, [GOOD, GOOD | {"id": "bad"} | change])
    with pytest.raises(ValueError, match=rf"^{path}: record 1 \(id 'bad'\).*{message}"):
        read_llava_json(path, num_levels=8)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], " is a list of 0; needs an object"),
        ({"id": 1.5}, ": 'id' is 1.5"),
        ({"id": "a"}, ".* has no 'conversations'"),
    ],
)
def test_record_without_a_name(tmp_path, record, message):
    path = write(tmp_path, [GOOD, record])
    with pytest.raises(ValueError, match=f"^{path}: record 1{message}"):
        read_llava_json(path)


def test_levels_are_whole_numbers_from_0_without_num_levels(tmp_path):
    assert read_llava_json(write(tmp_path, [GOOD | {"align_level": 300}]))[0].level == 300
    with pytest.raises(ValueError, match="needs a whole number from 0"):
        read_llava_json(write(tmp_path, [GOOD | {"align_level": -1}]))


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


def test_fault_24_a_mark_in_a_text_only_record_is_a_word(tmp_path):
    code = "Why does <image> in my SVG fail?"
    (sample,) = read_llava_json(write(tmp_path, [{"conversations": talk(code, "Use <image> so.")}]))
    assert (sample.images, sample.turns[0].text) == ((), code)
    with pytest.raises(ValueError, match="1 <image> marks; needs one for each of 0 images"):
        read_llava_json(write(tmp_path, [{"conversations": talk("What is this?\n<image>", "A bus.")}]))
