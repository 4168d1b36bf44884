"""VizWiz: questions that blind people asked about pictures they took (arXiv 1802.08218).

`vizwiz` is the paper's, whose labels are with its server:

    vizwiz/llava_test.jsonl     question_id, image, text
    vizwiz/test/                pictures

`vizwiz-val` is the labelled split:

    vizwiz/val.json             image, question, answers, answer_type
    vizwiz/val/                 pictures

What is scored is what would be uploaded: the answers after EvalAI's processing, as LLaVA converts them. The number is
the accuracy of VizWiz's own toolkit in percent, also by type of answer, "unanswerable" among them. Unlike VQA's, that
one compares with the humans' answers as they stand. (It mends most contractions with curly quotes; EvalAI's processing
has mended them with straight ones before.) Its scores of captions, and of the probability that a question can be
answered, which is asked of no model here, are left out.
"""

import json
from pathlib import Path

from .files import json_rows, jsonl_rows, picture
from .short_answers import PROMPT_END, averages, human_answers, process_evalai, vizwiz_accuracy
from .task import Answered, Outcome, Question, Task, no_credit

_SUBMISSION = "vizwiz_test_answers.json"
_SERVER = "https://eval.ai/web/challenges/challenge-page/1911"
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def test_questions(root: Path) -> list[Question]:
    found = []
    for row in jsonl_rows(root / "vizwiz/llava_test.jsonl"):
        name = row.text("image")
        image = picture(root / "vizwiz/test", name, row)
        found.append(Question(row.id("question_id"), row.text("text"), image, 128, {"image": name}))
    return found


def test_score(answered: Answered) -> Outcome:
    metrics = {"questions": len(answered.questions)}
    if answered.partly:
        return Outcome(None, metrics, f"its server: upload answers to all questions to {_SERVER}")
    rows = [
        {"image": question.facts["image"], "answer": process_evalai(answered.answers[question.key])}
        for question in answered.questions
    ]
    files = {_SUBMISSION: json.dumps(rows).encode()}
    return Outcome(None, metrics, f"its server: upload {_SUBMISSION} to {_SERVER}", files)


def val_questions(root: Path) -> list[Question]:
    found = []
    for row in json_rows(root / "vizwiz/val.json"):
        name = row.text("image")
        facts = {"answers": human_answers(row), "answer_type": row.text("answer_type")}
        prompt = row.text("question") + _UNANSWERABLE + PROMPT_END
        found.append(Question(name, prompt, picture(root / "vizwiz/val", name, row), 128, facts))
    return found


def val_credit(question: Question, answer: str) -> float:
    return vizwiz_accuracy(process_evalai(answer), question.facts["answers"])


def val_score(answered: Answered) -> Outcome:
    metrics = averages(answered, val_credit, "answer_type")
    return Outcome(metrics["accuracy"], metrics)


TASKS = (
    Task("vizwiz", "VizWiz", "VizWiz", test_questions, no_credit, test_score),
    Task("vizwiz-val", "VizWiz (val)", "", val_questions, val_credit, val_score, is_extra=True),
)
