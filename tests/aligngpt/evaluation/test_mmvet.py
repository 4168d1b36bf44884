"""MM-Vet's files to questions, questions to a judge's prompts, and its words to numbers worked out by hand."""

import json
from pathlib import Path

import pytest

from aligngpt.evaluation import mmvet
from aligngpt.evaluation.judge import Judge
from aligngpt.evaluation.task import Answered

ASKED = [  # truth, capabilities, our answer, what the judge says, again and again
    ("-1<AND>-5", ["ocr", "math"], "x = -1 or x = -5", ["1.0"]),
    ("lamp<OR>light", ["rec"], "A lamp.", ["0.5 because"]),
    ("It is a joke.", ["rec", "know", "gen"], "It is art.", ["good", "nan", "-1", "1.1", ""]),  # counts as 0
    ("14", ["math", "ocr"], "13", ["0.9.", "0.3\n"]),
]
SAID = {"mmvet": [answer for _, _, answer, _ in ASKED]}


def make_reply():
    """The judge's, by our answer."""
    replies = {answer: iter(said) for _, _, answer, said in ASKED}

    def reply(request):
        row = request["messages"][0]["content"].splitlines()[-1 - request["messages"][0]["content"].count("(digit)")]
        return next(replies[row.split(" | ")[2]])

    return reply


def write_files(write, draw, folder: str = "mm-vet") -> Path:
    truths, rows = {}, []
    for number, (truth, capabilities, _, _) in enumerate(ASKED):
        image = draw(f"{folder}/images/v1_{number - number % 2}.png").name
        truths[f"v1_{number}"] = {
            "imagename": image,
            "question": f"What  is {number}?",
            "answer": truth,
            "imagesource": "",
            "capability": capabilities,
        }
        rows.append({"question_id": number, "image": image, "text": f"What is {number}?", "category": "conv"})
    write(f"{folder}/mm-vet.json", truths)
    return write("mm-vet/llava-mm-vet.jsonl", rows, lines=True)


def answered(root: Path, judge: Judge | None = None) -> Answered:
    questions = mmvet.questions(root)
    answers = {question.key: answer for question, answer in zip(questions, SAID["mmvet"], strict=True)}
    return Answered(root, questions, answers, root, judge)


def test_numbers_by_hand(files: Path, root: Path, evaluate, judge_server) -> None:
    questions = mmvet.questions(root)
    assert [question.prompt for question in questions] == [f"What is {number}?" for number in range(4)]
    assert questions[3].image == root / "mm-vet/images/v1_2.png"
    assert {question.max_new_tokens for question in questions} == {1024}
    assert mmvet.TASKS[0].credit(questions[0], "") is None
    judge_server.reply = make_reply()
    judge = "--judge-url", judge_server.url, "--judge-model", "gpt-4-0613"
    outcome = evaluate("mmvet", SAID["mmvet"], *judge)
    assert outcome.metrics["capabilities"] == pytest.approx({"rec": 25, "ocr": 65, "know": 0, "gen": 0, "math": 65})
    assert outcome.metrics["combinations"] == pytest.approx({"math_ocr": 65, "rec": 50, "gen_know_rec": 0})
    assert (outcome.metrics["questions"], outcome.metrics["unparsed"]) == (4, 1)
    assert outcome.headline == outcome.metrics["total"] == pytest.approx(45)
    grades = json.loads(outcome.files["mmvet-grades.json"])
    assert grades["v1_3"] == {"model": ["gpt-4-0613"], "content": ["0.3\n"], "score": [0.3]}
    assert grades["v1_2"]["score"] == [0]
    assert evaluate("mmvet", [], *judge) == outcome  # answers and replies are kept: nothing is asked again


def test_the_judge_reads_the_official_prompt(files: Path, root: Path, judge_server) -> None:
    judge_server.reply = lambda request: "no number"
    mmvet.score(answered(root, Judge(judge_server.url, "gpt-4-0613", at_once=1)))
    tries = judge_server.requests[:5]
    assert len(judge_server.requests) == 4 * 5
    assert {(request["model"], request["max_tokens"], len(request["messages"])) for request in tries} == {
        ("gpt-4-0613", 3, 1)
    }
    assert [request["temperature"] for request in tries] == [0, 0, 0.5, 1, 1.5]
    contents = [request["messages"][0]["content"] for request in tries]
    assert contents[1:] == [contents[0] + "\nPredict the correctness of the answer (digit): "] * 4
    lines = contents[0].split("\n")
    assert lines[0].startswith("Compare the ground truth and prediction from AI models, to give a correctness score")
    assert lines[2:5] == [
        "Question | Ground truth | Prediction | Correctness",
        "--- | --- | --- | ---",
        "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0",
    ]
    assert [line.rpartition(" | ")[2] for line in lines[4:11]] == ["0.0", "0.5", "0.5", "0.5", "1.0", "0.4", "1.0"]
    assert lines[11:] == ["", "What  is 0? | -1 <AND> -5 | x = -1 or x = -5 | "]
    assert "| lamp <OR> light | A lamp. | " in judge_server.requests[5]["messages"][0]["content"]


@pytest.mark.parametrize("folder", ["mm-vet/mm-vet", "mmvet", "mmvet/mm-vet"])
def test_without_a_judge_the_answers_are_written(folder: str, evaluate, write, draw) -> None:
    """The benchmark's own archive may lie where its users put it."""
    write_files(write, draw, folder)
    outcome = evaluate("mmvet", SAID["mmvet"])
    assert outcome.headline is None
    assert outcome.needs.startswith("a judge: --judge-url and --judge-model")
    (content,) = outcome.files.values()
    assert json.loads(content) == {f"v1_{number}": asked[2] for number, asked in enumerate(ASKED)}


def test_what_is_wrong_is_named(files: Path, root: Path) -> None:
    path = root / "mm-vet/mm-vet.json"
    text, truths = files.read_text(), path.read_text()
    for rows, broken, said in (
        (text + text.splitlines()[0].replace(": 0", ": 9"), truths, r"line 5: 'question_id' is 9; needs one of which"),
        (text[: text.rstrip().rindex("\n") + 1], truths, r"mm-vet.json: llava-mm-vet.jsonl has no question for 'v1_3'"),
        (
            text,
            truths.replace('"rec"', '"see"', 1),
            r"mm-vet.json: 'v1_1': 'capability' is \['see'\]; needs one or mor",
        ),
        (text, truths.replace('"answer"', '"truth"', 1), r"'v1_0': 'answer' is missing; needs a string"),
        (text.replace("v1_2.png", "v1_9.png"), truths, r"line 3: its picture .*v1_9.png is no file"),
    ):
        files.write_text(rows)
        path.write_text(broken)
        with pytest.raises(ValueError, match=said):
            mmvet.questions(root)
    path.unlink()
    with pytest.raises(ValueError, match=r"mm-vet/mm-vet.json is no file"):
        mmvet.questions(root)
