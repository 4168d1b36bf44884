"""ScienceQA's files to questions, and answers to its numbers, worked out by hand."""

from pathlib import Path

import pytest

from aligngpt.evaluation import scienceqa

ASKED = {  # subject, grade, hint, picture; choices, the right one; the answer, and whether it is right
    "4": ("natural science", "grade6", "A hint.", True, 3, 1, "B", True),
    "5": ("natural science", "grade7", "A hint.", True, 2, 0, "A. the sun", True),
    "11": ("language science", "grade1", "A hint.", False, 2, 1, "I see. The answer is B.", True),
    "12": ("language science", "grade12", "", False, 2, 1, "The answer is B", False),  # nothing stands after it
    "13": ("social science", "grade2", "", True, 2, 1, "B.", False),  # neither the letter alone nor "B. …"
    "14": ("social science", "grade2", "", True, 2, 0, "C", False),  # a letter, but not of two choices
    "15": ("social science", "grade3", "", False, 2, 0, "B", False),  # the only wrong one that says a choice
    "16": ("social science", "grade3", "", False, 4, 2, "The answer is Cork", True),
}
SAID = {"scienceqa": [answer for *_, answer, _ in ASKED.values()]}


def write_files(write, draw) -> Path:
    problems, records = {}, []
    for name, (subject, grade, hint, pictured, choices, answer, *_) in ASKED.items():
        problems[name] = {"subject": subject, "grade": grade, "hint": hint, "answer": answer}
        problems[name] |= {"image": "image.png" if pictured else None, "choices": [f"c{n}" for n in range(choices)]}
        turns = [{"from": "human", "value": f"What is {name}?\nOptions: …" + "\n<image>" * pictured}]
        turns.append({"from": "gpt", "value": "The answer is A."})
        records.append({"id": name, "conversations": turns})
        if pictured:
            draw(f"scienceqa/images/test/{name}/image.png")
            records[-1]["image"] = f"{name}/image.png"
    write("scienceqa/problems.json", problems | {"17": problems["16"]})
    write("scienceqa/pid_splits.json", {"train": ["17"], "test": list(ASKED)})
    return write("scienceqa/llava_test_CQM-A.json", records)


def test_numbers_by_hand(files: Path, root: Path, evaluate) -> None:
    questions = scienceqa.questions(root)
    line = "Answer with the option's letter from the given choices directly."
    assert [question.prompt for question in questions] == [f"What is {name}?\nOptions: …\n{line}" for name in ASKED]
    assert questions[0].image == root / "scienceqa/images/test/4/image.png"
    assert questions[2].image is None
    assert list(map(scienceqa.credit, questions, SAID["scienceqa"])) == [right for *_, right in ASKED.values()]
    outcome = evaluate("scienceqa", SAID["scienceqa"])
    assert outcome.headline == 50  # of 4, 5, 13 and 14
    assert outcome.metrics == {
        "questions": 8,
        "accuracy": 50,
        "image": {"questions": 4, "accuracy": 50},
        "unparsed": 3,  # 12, 13 and 14
        "classes": {
            "natural": 100,
            "language": 50,
            "social": 25,
            "text context": 100,  # 4, 5 and 11
            "image context": 50,
            "no context": pytest.approx(100 / 3),  # 12, 15 and 16
            "grades 1-6": 50,  # 4, 11 and 16 of 4, 11, 13, 14, 15 and 16
            "grades 7-12": 50,
        },
    }


def test_letters() -> None:
    for answer, index in (
        (" E \n", 4),
        ("E. it", 4),
        ("F. The answer is D.", 3),
        ("The answer is A. Not B: the answer is B.", 0),  # the second is another wording
        ("The answer is A. The answer is B.", None),
        ("The answer is F.", None),
        ("b", None),
        ("AB", None),
        ("", None),
    ):
        assert scienceqa.choice(answer, 5) == index, answer


def test_what_is_wrong_is_named(files: Path, root: Path, write) -> None:
    text = files.read_text()
    for broken, said in (
        (text.replace('"value"', '"text"', 1), r"CQM-A.json: record 0: 'conversations': 'value' is missing"),
        (text.replace('"id": "5"', '"id": "17"'), r"record 1: 'id' is '17'; needs each id of pid_splits.json's 'test'"),
        (text.replace('"id": "5"', '"id": "4"'), r"record 1: 'id' is '4'; needs each id of .* once"),
        ("[]", r"pid_splits.json: 'test' has '4'; needs a question"),
    ):
        files.write_text(broken)
        with pytest.raises(ValueError, match=said):
            scienceqa.questions(root)
    files.write_text(text)
    problems = root / "scienceqa/problems.json"
    for old, new, said in (
        ('"answer": 1', '"answer": 3', r"problems.json: '4': 'answer' is 3 of 3 choices; needs an index"),
        ('"grade6"', '"grade0"', r"problems.json: '4': 'grade' is 'grade0'; needs one of grade1"),
    ):
        whole = problems.read_text()
        problems.write_text(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match=said):
            scienceqa.questions(root)
        problems.write_text(whole)
    (root / "scienceqa/images/test/5/image.png").unlink()
    with pytest.raises(ValueError, match=r"record 1: its picture .* is no file"):
        scienceqa.questions(root)
