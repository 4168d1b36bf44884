"""VQAv2: open questions about pictures of COCO (arXiv 1612.00837).

`vqav2` is the paper's, test-dev; its labels are with its server, which takes answers to all of test2015, "" for none:

    vqav2/llava_vqav2_mscoco_test-dev2015.jsonl     question_id, image, text
    vqav2/llava_vqav2_mscoco_test2015.jsonl         question_id
    vqav2/test2015/                                 pictures

`vqav2-val` is the labelled split:

    vqav2/v2_OpenEnded_mscoco_val2014_questions.json    questions: question_id, image_id, question
    vqav2/v2_mscoco_val2014_annotations.json            annotations: question_id, question_type, answer_type, answers
    vqav2/val2014/                                      pictures

What is scored is what would be uploaded: the answers after EvalAI's processing, as LLaVA converts them. The number is
the VQA toolkit's accuracy in percent, also by type of question and of answer.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from .files import Row, json_row, jsonl_rows, picture
from .short_answers import PROMPT_END, averages, human_answers, process_evalai, vqa_accuracy
from .task import Answered, Outcome, Question, Task, no_credit

_SUBMISSION = "vqa_OpenEnded_mscoco_test2015_aligngpt_results.json"
_SERVER = "https://eval.ai/web/challenges/challenge-page/830, phase Test-Dev"


def test_questions(root: Path) -> list[Question]:
    wanted = {str(row.whole("question_id")) for row in _test_rows(root)}
    found = []
    for row in jsonl_rows(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"):
        key = row.id("question_id")
        if key not in wanted:
            raise row.wrong("question_id", f"is {key}", "one of llava_vqav2_mscoco_test2015.jsonl")
        found.append(Question(key, row.text("text"), picture(root / "vqav2/test2015", row.text("image"), row), 128))
    return found


def _test_rows(root: Path) -> Iterator[Row]:
    return jsonl_rows(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl")


def test_score(answered: Answered) -> Outcome:
    metrics = {"questions": len(answered.questions)}
    if answered.partly:
        return Outcome(None, metrics, f"its server: upload answers to all questions to {_SERVER}")
    rows = [
        {
            "question_id": row.whole("question_id"),
            "answer": process_evalai(answered.answers.get(row.id("question_id"), "")),
        }
        for row in _test_rows(answered.root)
    ]
    files = {_SUBMISSION: json.dumps(rows).encode()}
    return Outcome(None, metrics, f"its server: upload {_SUBMISSION} to {_SERVER}", files)


def val_questions(root: Path) -> list[Question]:
    labels = {
        row.id("question_id"): row
        for row in json_row(root / "vqav2/v2_mscoco_val2014_annotations.json").rows("annotations")
    }
    found = []
    for row in json_row(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json").rows("questions"):
        key = row.id("question_id")
        if key not in labels:
            raise row.wrong("question_id", f"is {key}", "one of v2_mscoco_val2014_annotations.json")
        label = labels[key]
        facts = {
            "answers": human_answers(label),
            "question_type": label.text("question_type"),
            "answer_type": label.text("answer_type"),
        }
        image = picture(root / "vqav2/val2014", f"COCO_val2014_{row.whole('image_id'):012}.jpg", row)
        found.append(Question(key, row.text("question") + PROMPT_END, image, 128, facts))
    return found


def val_credit(question: Question, answer: str) -> float:
    return vqa_accuracy(process_evalai(answer), question.facts["answers"])


def val_score(answered: Answered) -> Outcome:
    metrics = averages(answered, val_credit, "question_type", "answer_type")
    return Outcome(metrics["accuracy"], metrics)


TASKS = (
    Task("vqav2", "VQAv2", "VQAv2", test_questions, no_credit, test_score),
    Task("vqav2-val", "VQAv2 (val)", "", val_questions, val_credit, val_score, is_extra=True),
)
