"""Answers as the official scorers process and score them; values worked out from the rules that these follow."""

import pytest

from aligngpt.evaluation.short_answers import (
    m4c_accuracy,
    process_evalai,
    process_vqa,
    vizwiz_accuracy,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("text", "vqa", "evalai"),
    [
        (" A man, the dog\tand AN owl\n", "man dog and owl", "man dog and owl"),  # articles, case, space
        ("None of Ten", "0 of 10", "0 of 10"),  # number words
        ("none,ten", "0 10", "noneten"),  # a comma with no space beside it is a space; M4C drops commas first
        ("red,blue", "red blue", "redblue"),
        ("1,000", "1000", "1000"),  # between digits it is nothing …
        ("1,000 10-20 a/b", "1000 1020 ab", "1000 10 20 b"),  # … nor is any other mark then; to M4C no comma is left
        ("x-y z -w", "xy z w", "xy z w"),  # one mark with a space beside it: all of its kind go
        ("x-\ny-z", "x yz", "x yz"),  # a new line is a space
        ("x-y;z", "x y z", "x y z"),
        ("really?yes", "really yes", "reallyyes"),  # M4C drops "?" first
        ("a.m. at 3.5. .5", "am at 3.5 .5", "am at 3.5 .5"),  # periods before a digit stay
        ("3.", "3", "3"),
        ("." * 33 + "x", ".x", ".x"),  # 32 periods at most
        ("dont, THERES", "don't there's", "don't there's"),  # contractions without their apostrophe
        ("couldnt've couldn'tve couldntve", "couldn't've couldn't've couldntve", "couldn't've couldn't've couldntve"),
        ("yall'd've y'alld've y'all'dve", "y'all'd've y'all'd've y'all'd've", "y'all'd've y'all'd've y'all'd've"),
        (
            "lets shes hell somebody'd",
            "lets shes hell somebodyd",
            "lets shes hell somebodyd",
        ),  # not in the table, or so
        ("world's", "world's", "world 's"),  # M4C splits this off
        ("9:30 o`clock", "9:30 o clock", "9:30 o clock"),  # colons stay
    ],
)
def test_processing(text: str, vqa: str, evalai: str) -> None:
    assert process_vqa(text) == vqa
    assert process_evalai(text) == evalai


@pytest.mark.parametrize(
    ("answer", "humans", "m4c", "vqa", "vizwiz"),
    [
        # Of 10 humans k say so: k of 10 sets of 9 leave k - 1 of these, the others k, each worth a third up to 1.
        ("two", ["1"] * 10, 0, 0, 0),
        ("2", ["1"] * 9 + ["2"], 9 / 30, 9 / 30, 9 / 30),
        ("2", ["1"] * 8 + ["2"] * 2, (2 * 1 + 8 * 2) / 30, 0.6, 0.6),
        ("2", ["1"] * 7 + ["2"] * 3, (3 * 2 + 7 * 3) / 30, 0.9, 0.9),
        ("2", ["1"] * 6 + ["2"] * 4, 1, 1, 1),
        # Who is compared as processed: both; both where humans differ; the answer alone.
        ("Two", ["2"] * 10, 1, 0, 1),
        ("Two", ["2"] * 9 + ["many"], 1, 1, 1),
        ("Two", ["two"] * 10, 1, 0, 0),
        ("Two", ["Two"] * 10, 1, 1, 0),
        ("Two", ["two", "2", " 2\n"] + ["many"] * 7, 0.9, 0.9, 0.3),
        # To VQA these all agree, since space around them counts for nothing.
        ("a dog\n", ["a dog", " a dog"] * 5, 1, 1, 0),
        ("dog", ["a dog", " a dog"] * 5, 1, 0, 0),
        ("red,blue", ["red blue"] * 5 + ["red, blue"] * 5, 0, 1, 1),
        ("red, blue", ["red blue"] * 5 + ["red"] * 5, 1, 1, 1),
    ],
)
def test_accuracies(answer: str, humans: list[str], m4c: float, vqa: float, vizwiz: float) -> None:
    assert m4c_accuracy(answer, humans) == pytest.approx(m4c, abs=1e-12)
    assert vqa_accuracy(answer, humans) == pytest.approx(vqa, abs=1e-12)
    assert vizwiz_accuracy(answer, humans) == pytest.approx(vizwiz, abs=1e-12)
