"""LLaVA-Bench's files to questions, questions to a judge's prompts, and its words to numbers worked out by hand."""

import json
from pathlib import Path

import pytest

from aligngpt.evaluation import llava_bench
from aligngpt.evaluation.judge import Judge
from aligngpt.evaluation.task import Answered

FOLDER = "llava-bench-in-the-wild"
ASKED = [  # category, our answer, what the judge says
    ("conv", "A hill.", "8 6\nThe first is better."),
    ("detail", "Green land.", "Assistant 1: 8\nAssistant 2: 7"),  # counts as -1 -1
    ("complex", "A volcano was here.", "10 7"),
    ("conv", "Three.", "9,8.5\n"),
]
SAID = {"llava-bench": [answer for _, answer, _ in ASKED]}


def make_reply():
    """The judge's, by our answer."""
    return lambda request: next(words for _, answer, words in ASKED if answer in request["messages"][1]["content"])


def write_files(write, draw) -> Path:
    for name in ("001.jpg", "002.jpg"):
        draw(f"{FOLDER}/images/{name}")
    write(
        f"{FOLDER}/context.jsonl",
        [{"id": "001", "image": "001.jpg", "caption": "Ab"}, {"image": "002.jpg", "caption": ["Two", "lines"]}],
        lines=True,
    )
    numbered = list(enumerate(ASKED))
    write(
        f"{FOLDER}/answers_gpt4.jsonl",
        [{"question_id": number, "text": f"GPT-4 on {number}", "answer_id": f"g{number}"} for number, _ in numbered],
        lines=True,
    )
    return write(
        f"{FOLDER}/questions.jsonl",
        [
            {"question_id": number, "image": f"00{1 + number // 3}.jpg", "text": f"What is {number}?", "category": kind}
            for number, (kind, _, _) in numbered
        ],
        lines=True,
    )


def answered(root: Path, judge: Judge | None = None) -> Answered:
    questions = llava_bench.questions(root)
    answers = {question.key: answer for question, answer in zip(questions, SAID["llava-bench"], strict=True)}
    return Answered(root, questions, answers, root, judge)


def test_numbers_by_hand(files: Path, root: Path, evaluate, judge_server) -> None:
    questions = llava_bench.questions(root)
    assert [question.prompt for question in questions] == [f"What is {number}?" for number in range(4)]
    assert questions[3].image == root / FOLDER / "images/002.jpg"
    assert {question.max_new_tokens for question in questions} == {1024}
    assert llava_bench.TASKS[0].credit(questions[0], "") is None
    judge_server.reply = make_reply()
    outcome = evaluate(
        "llava-bench", SAID["llava-bench"], "--judge-url", judge_server.url, "--judge-model", "gpt-4-0314"
    )
    # GPT-4's: (8 - 1 + 10 + 9) / 4, ours: (6 - 1 + 7 + 8.5) / 4
    wanted = {
        "all": {"questions": 4, "gpt4": 6.5, "ours": 5.125, "relative": 78.8, "unparsed": 1},
        "conv": {"questions": 2, "gpt4": 8.5, "ours": 7.25, "relative": 85.3, "unparsed": 0},
        "detail": {"questions": 1, "gpt4": -1, "ours": -1, "relative": 100, "unparsed": 1},
        "complex": {"questions": 1, "gpt4": 10, "ours": 7, "relative": 70, "unparsed": 0},
    }
    assert outcome.metrics == wanted
    assert outcome.headline == 78.8
    assert outcome.needs == ""
    reviews = [json.loads(line) for line in outcome.files["llava-bench-reviews.jsonl"].splitlines()]
    assert [review["tuple"] for review in reviews] == [[8, 6], [-1, -1], [10, 7], [9, 8.5]]
    assert [(review["id"], review["answer1_id"], review["category"]) for review in reviews][2] == (
        3,
        "g2",
        "llava_bench_complex",
    )


def test_the_judge_reads_the_official_prompt(files: Path, root: Path, write, judge_server) -> None:
    """A caption that is a string has a letter in each line, as the official script makes it; rule.json is taken."""
    judge_server.reply = lambda request: "1 1"
    outcome = llava_bench.score(answered(root, Judge(judge_server.url, "gpt-4-0314", at_once=1)))
    first, last = judge_server.requests[0], judge_server.requests[3]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("gpt-4-0314", 0.2, 1024)
    system, user = first["messages"]
    assert system == {
        "role": "system",
        "content": "You are a helpful and precise assistant for checking the quality of the answer.",
    }
    before, after = user["content"].split("[System]\n")
    assert user["role"] == "user"
    assert before == (
        "[Context]\nA\nb\n\n[Question]\nWhat is 0?\n\n[Assistant 1]\nGPT-4 on 0\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nA hill.\n\n[End of Assistant 2]\n\n"
    )
    assert after.startswith("We would like to request your feedback on the performance of two AI assistants")
    assert after.endswith("does not affect your judgment.\n\n")
    assert last["messages"][1]["content"].startswith("[Context]\nTwo\nlines\n\n[Question]\nWhat is 3?")
    assert outcome.headline == 100
    rules = {f"llava_bench_{kind}": {"role": "Author", "prompt": f"Rule of {kind}."} for kind, _, _ in ASKED}
    write(f"{FOLDER}/rule.json", rules)
    llava_bench.score(answered(root, Judge(judge_server.url, "gpt-4-0314", at_once=1)))
    assert len(judge_server.requests) == 8
    assert judge_server.requests[5]["messages"][1]["content"].endswith(
        "[Author 2]\nGreen land.\n\n[End of Author 2]\n\n[System]\nRule of detail.\n\n"
    )


def test_without_a_judge_the_answers_are_written(files: Path, evaluate) -> None:
    outcome = evaluate("llava-bench", SAID["llava-bench"])
    assert outcome.headline is None
    assert outcome.needs.startswith("a judge: --judge-url and --judge-model")
    (content,) = outcome.files.values()
    rows = [json.loads(line) for line in content.splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3]
    assert [row["text"] for row in rows] == [answer for _, answer, _ in ASKED]
    assert rows[1].keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert len({row["answer_id"] for row in rows}) == 4


@pytest.mark.parametrize(
    ("line", "scores"),
    [
        ("7 9\nwhy", (7, 9)),
        ("7,9", (7, 9)),
        ("7.5 10", (7.5, 10)),
        ("7, 9", (-1, -1)),  # as the official script has it
        (" 7 9", (-1, -1)),
        ("7 9 8", (-1, -1)),
        ("7", (-1, -1)),
        ("nan 9", (-1, -1)),
        ("", (-1, -1)),
    ],
)
def test_scores_of_a_first_line(line: str, scores: tuple[float, float]) -> None:
    assert llava_bench.parse_scores(line) == scores


def test_what_is_wrong_is_named(files: Path, root: Path, write) -> None:
    text = files.read_text()
    for broken, said in (
        (text.replace("conv", "talk", 1), r"questions.jsonl: line 1: 'category' is 'talk'; needs one of conv, detail"),
        (text.replace("002.jpg", "003.jpg"), r"line 4: 'image' is '003.jpg'; needs one that .*context.jsonl describes"),
        (text.replace('"question_id": 2', '"question_id": 7'), r"line 3: 'question_id' is 7, .* has 2 in .*: line 3;"),
        (text + text.splitlines()[0], r"line 5: 'question_id' is 0, for which answers_gpt4.jsonl has no such line"),
        (text.replace('"text"', '"prompt"', 1), r"line 1: 'text' is missing; needs a string"),
    ):
        files.write_text(broken)
        with pytest.raises(ValueError, match=said):
            llava_bench.questions(root)
    files.write_text(text)
    write(f"{FOLDER}/rule.json", {"llava_bench_conv": {"role": "A", "prompt": "B"}})
    with pytest.raises(ValueError, match=r"rule.json: 'llava_bench_detail' is missing; needs an object"):
        llava_bench.questions(root)
