"""MME's files to questions, and answers to its numbers, worked out by hand."""

from pathlib import Path

import pytest

from aligngpt.evaluation import mme
from aligngpt.evaluation.task import Answered

FOLDER = "MME/MME_Benchmark_release_version"
ASKED = {  # picture: the answers to its two questions, of which the first should be yes
    "OCR/0001.jpg": ("Yes", "No."),  # both right
    "OCR/0002.jpg": ("yes\tit is", "Yes"),
    "OCR/0003.jpg": ("I think yes", "So no"),  # other and other: "i th" and "so n"
    "OCR/0004.png": ("Oh, yes", "Not at all"),  # other: "oh, "; no
    "celebrity/images/tt01.v2.jpg": ("It's yes", "  NO"),  # other: "it's"; no
    "code_reasoning/0001.png": ("Yes", "no"),
    "text_translation/0001.png": ("Know", "I no"),  # no: "know"; no: "i no"
}
SAID = {"mme": [answer for pair in ASKED.values() for answer in pair]}


def write_files(write, draw) -> Path:
    rows = []
    for number, name in enumerate(ASKED):
        category, *_, file = name.split("/")
        stem = file.split(".")[0]
        space = " " * (1 + number % 2)  # before "Please", one or two
        asked = (f"Is it {number}?", f'Is it "{number}"?')
        apart = "questions_answers_YN/" * (category == "celebrity")
        labels = zip(asked, ("Yes", "No"), strict=True)
        draw(f"{FOLDER}/{name}")
        write(
            f"{FOLDER}/{category}/{apart}{stem}.txt",
            "".join(f"{text}{space}Please answer yes or no.\t{label}\n" for text, label in labels) + "\n",
        )
        for text in asked:
            text += f"{space}Please answer yes or no." * (number == 2)
            text += "\nAnswer the question using a single word or phrase."
            rows.append({"question_id": f"{category}/{file}", "image": name, "text": text, "category": category})
    return write("MME/llava_mme.jsonl", rows, lines=True)


def test_numbers_by_hand(files: Path, root: Path, evaluate) -> None:
    questions = mme.questions(root)
    assert len({question.key for question in questions}) == 2 * len(ASKED)
    assert questions[9].image == root / FOLDER / "celebrity/images/tt01.v2.jpg"
    assert questions[0].prompt == "Is it 0?\nAnswer the question using a single word or phrase."
    outcome = evaluate("mme", SAID["mme"])
    wanted = {
        "perception": {  # of 8 answers 4 are right; of 4 pictures one; of 2 answers one, and no picture
            "OCR": {"score": 75, "acc": 50, "acc_plus": 25, "questions": 8, "other": 3},
            "celebrity": {"score": 50, "acc": 50, "acc_plus": 0, "questions": 2, "other": 1},
            "score": 125,
        },
        "cognition": {
            "code_reasoning": {"score": 200, "acc": 100, "acc_plus": 100, "questions": 2, "other": 0},
            "text_translation": {"score": 50, "acc": 50, "acc_plus": 0, "questions": 2, "other": 0},
            "score": 250,
        },
    }
    assert outcome.metrics == wanted
    assert outcome.headline == 125
    assert sum(map(mme.credit, questions, SAID["mme"])) == 4 + 1 + 2 + 1
    assert set(outcome.files) == {"OCR.txt", "celebrity.txt", "code_reasoning.txt", "text_translation.txt"}
    lines = outcome.files["OCR.txt"].decode().splitlines()
    assert lines[2] == "0002.txt\tIs it 1?  Please answer yes or no.\tYes\tyes it is"
    assert lines[5] == '0003.txt\tIs it "2"? Please answer yes or no.\tNo\tSo no'
    assert outcome.files["celebrity.txt"].decode().startswith("tt01.txt\t")


def test_a_part_has_no_half_pictures(files: Path, root: Path) -> None:
    questions = mme.questions(root)[:3]
    outcome = mme.score(Answered(root, questions, {question.key: "Yes" for question in questions}, root, partly=True))
    assert outcome.metrics["perception"]["OCR"] == {
        "score": pytest.approx(200 / 3),
        "acc": pytest.approx(200 / 3),
        "acc_plus": 0,  # of the one picture with both questions
        "questions": 3,
        "other": 0,
    }
    assert not outcome.files
    questions = mme.questions(root)[-2:]
    outcome = mme.score(Answered(root, questions, {question.key: "Yes" for question in questions}, root, partly=True))
    assert outcome.headline is None
    assert "perception" in outcome.needs


def test_archives_with_one_more_folder(files: Path, root: Path) -> None:
    inner = root / FOLDER / "MME_Benchmark"
    moved = list((root / FOLDER).iterdir())
    inner.mkdir()
    for path in moved:
        path.rename(inner / path.name)
    assert mme.questions(root)[0].image == inner / "OCR/0001.jpg"


def test_what_is_wrong_is_named(files: Path, root: Path) -> None:
    text = files.read_text()
    for broken, said in (
        (text.replace("Is it 0?", "Is it 1?"), r"llava_mme.jsonl: line 1: 'text' asks 'Is it 1\?'; needs a .*0001.txt"),
        (text.replace('"OCR/0001', '"ocr/0001', 1), r"line 1: 'question_id' is of 'ocr'; needs one of existence"),
        (text[: text.rstrip().rindex("\n") + 1], r"jsonl: text_translation/0001 has 1 questions; needs 2"),
    ):
        files.write_text(broken)
        with pytest.raises(ValueError, match=said):
            mme.questions(root)
    files.write_text(text)
    labels = root / FOLDER / "OCR/0002.txt"
    labels.write_text(labels.read_text().replace("\tNo", " No"))
    with pytest.raises(ValueError, match=r"OCR/0002.txt: line 2: .*; needs a question, a tab, and Yes or No"):
        mme.questions(root)
