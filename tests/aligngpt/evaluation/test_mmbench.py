"""MMBench's files to questions, and answers to its numbers, worked out by hand."""

import base64
import csv
import io
from pathlib import Path

import openpyxl
import pytest
from PIL import Image

from aligngpt.evaluation import mmbench
from aligngpt.evaluation.task import Answered

ENGLISH, CHINESE = mmbench.TASKS
LINE = "Answer with the option's letter from the given choices directly."
COLUMNS = [
    *("index", "question", "hint", "A", "B", "C", "D"),
    *("answer", "category", "image", "source", "l2-category", "comment", "split"),
]
ROWS = [  # as pandas reads it, "nan" and "None" are empty
    [
        "7",
        'Which "one"?\nSay.',
        "A\thint\u2028here",
        "red",
        "green",
        "blue",
        "sky",
        "B",
        "color",
        "",
        "",
        "fine",
        "",
        "dev",
    ],
    ["9", "Is it?", "nan", "=yes", "no", "None", "", "A", "shape", "", "", "fine", "", "dev"],
    ["12", "Who?", "", "a man", "a dog", "a cat", "", "C", "who", "", "", "coarse", "", "dev"],
]
ROTATED = [  # a file with rotations: the second of row 9, whose picture it has; row 12 has no other
    *ROWS[1:],
    ["1000009", "Is it?", "", "no", "=yes", "", "", "B", "shape", "9", "", "fine", "", "dev"],
]
SAID = {
    "mmbench": ["B", "A.", "(D)", "sky", "=yes", "B", "C", "b", "The answer is A"],
    "mmbench-cn": ["A", "C", "A"],
}


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (24, 16), "red").save(data, "PNG")
    return data.getvalue()


def table(rows: list[list[str]]) -> str:
    """Rows as in an official file; those without a picture get one."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    image = base64.b64encode(picture()).decode()
    writer.writerows([COLUMNS, *([*row[:9], row[9] or image, *row[10:]] for row in rows)])
    return text.getvalue()


def write_files(write, draw) -> None:
    write("mmbench/mmbench_dev_20230712.tsv", table(ROWS))
    write("mmbench_cn/mmbench_dev_cn_20231003.tsv", table(ROTATED))


def test_rotations_by_hand(files: None, root: Path, evaluate) -> None:
    questions = ENGLISH.questions(root)
    keys = [f"{index}-{rotation}" for index, number in ((7, 4), (9, 2), (12, 3)) for rotation in range(number)]
    assert [question.key for question in questions] == keys
    start = 'A\thint\u2028here\nWhich "one"?\nSay.\n'
    assert questions[0].prompt == f"{start}A. red\nB. green\nC. blue\nD. sky\n{LINE}"
    assert questions[1].prompt == f"{start}A. green\nB. blue\nC. sky\nD. red\n{LINE}"
    assert questions[5].prompt == f"Is it?\nA. no\nB. =yes\n{LINE}"
    assert questions[3].image == picture()
    # 7: green is B, A, D, C, but "sky" is A of the last; 9: both; 12: C, and then B and A, but "b" says none.
    rights = [1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert list(map(ENGLISH.credit, questions, SAID["mmbench"])) == rights
    outcome = evaluate("mmbench", SAID["mmbench"])
    circular = {"questions": 3, "accuracy": pytest.approx(100 / 3), "l2-category": {"coarse": 0, "fine": 50}}
    single = {"questions": 3, "accuracy": 100, "l2-category": {"coarse": 100, "fine": 100}}
    assert outcome.metrics == {
        "circular": circular | {"category": {"color": 0, "shape": 100, "who": 0}},
        "single": single | {"category": {"color": 100, "shape": 100, "who": 100}},
        "unparsed": 1,
    }
    assert outcome.headline == pytest.approx(100 / 3)
    sheet = openpyxl.load_workbook(io.BytesIO(outcome.files["mmbench_dev_20230712.xlsx"])).active
    assert list(sheet.values) == [
        ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split"),
        (7, 'Which "one"?\nSay.', "red", "green", "blue", "sky", "B", "B", "dev"),
        (9, "Is it?", "=yes", "no", None, None, "=yes", "A", "dev"),
        (12, "Who?", "a man", "a dog", "a cat", None, "C", "C", "dev"),
    ]
    assert sheet["G3"].data_type == "s"  # no formula


def test_files_with_rotations(files: None, root: Path, evaluate) -> None:
    questions = CHINESE.questions(root)
    assert [question.key for question in questions] == ["9", "12", "1000009"]
    assert questions[2].prompt == "Is it?\nA. no\nB. =yes\n请直接回答选项字母。"
    assert questions[2].image == picture()
    outcome = evaluate("mmbench-cn", SAID["mmbench-cn"])
    assert outcome.metrics["circular"] == {
        "questions": 2,
        "accuracy": 50,  # 12 has no other rotation
        "l2-category": {"coarse": 100, "fine": 0},
        "category": {"shape": 0, "who": 100},
    }
    assert outcome.metrics["single"]["accuracy"] == 100
    sheet = openpyxl.load_workbook(io.BytesIO(outcome.files["mmbench_dev_cn_20231003.xlsx"])).active
    assert [row[0] for row in sheet.values] == ["index", 9, 12, 1000009]  # all rows of the file
    outcome = CHINESE.score(Answered(root, questions[:1], {"9": "A"}, root, partly=True))
    assert outcome.headline is None
    assert "rotations" in outcome.needs
    assert outcome.metrics["single"]["accuracy"] == 100
    assert not outcome.files


def test_a_part_is_of_whole_questions(files: None, evaluate) -> None:
    """6 of 9: two of the three questions with all their rotations, the first and the second."""
    outcome = evaluate("mmbench", SAID["mmbench"][:6], "--limit", 6)
    assert outcome.metrics["circular"]["questions"] == 2
    assert outcome.headline == 50


def test_an_option_that_reads_none_is_never_right(write, root: Path) -> None:
    """LLaVA leaves it out of the prompt, and MMBench knows it as the answer."""
    write("mmbench/mmbench_dev_20230712.tsv", table([[*ROWS[1][:7], "C", *ROWS[1][8:]]]))
    questions = ENGLISH.questions(root)
    assert len(questions) == 2
    for question in questions:
        assert not any(ENGLISH.credit(question, said) for said in ("A", "B", "C", "None"))


def test_letters() -> None:
    options = {"A": "a teddy bear", "B": "rabbit", "C": "cat"}
    for answer, letter in (
        ("A", "A"),
        ("(C).", "C"),
        ("Answer: {B}!", "B"),
        ("b", None),
        ("A or B", None),
        ("A cat it is", "A"),  # the letter goes before the text
        ("A bear, a small one", None),  # too far before the end, and no option's text
        ("A rabbit, a small one", "B"),  # the text, then
        ("It is a CAT.", "C"),
        ("a cat, no rabbit", None),
        ("D", None),
        ("Z cat", None),  # says that none is right
        ("Cannot determine the answer: C", None),
        ("cat" + " and so on" * 4, None),  # 43 characters; the options have 21 and are 42 twice
        ("cat" + " and so on" * 3, "C"),
        ("", None),
    ):
        assert mmbench.letter(answer, options) == letter, answer


def test_what_is_wrong_is_named(write, root: Path) -> None:
    row, file = ROWS[0], "mmbench/mmbench_dev_20230712.tsv"
    for broken, said in (
        (["x", *row[1:]], r"mmbench_dev_20230712.tsv: line 3: 'index' is 'x'; needs a whole number"),
        ([*row[:1], "", *row[2:]], r"line 2: 'question' is missing; needs a string"),
        ([*row[:7], "AB", *row[8:]], r"line 3: 'answer' is 'AB'; needs one of A, B, C, D"),
        ([*row[:9], "no picture!", *row[10:]], r"line 3: 'image' is 'no picture!'…; needs a picture in base64"),
        ([*row, "more"], r"line 3: has more cells than"),
    ):
        write(file, table([broken]))
        with pytest.raises(ValueError, match=said):
            ENGLISH.questions(root)
    path = write(file, table([row]))
    path.write_bytes(path.read_bytes().replace(b"green", b"gr\xffn"))
    with pytest.raises(ValueError, match=r"tsv: after line \d: .* can't decode byte 0xff .*; needs UTF-8"):
        ENGLISH.questions(root)
    with pytest.raises(ValueError, match=r"mmbench_dev_cn_20231003.tsv is no file; --data needs"):
        CHINESE.questions(root)
