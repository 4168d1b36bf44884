"""LLaVA-Bench (in the wild): free answers, which a judge compares with GPT-4's (arXiv 2304.08485).

    llava-bench-in-the-wild/questions.jsonl       question_id, image, text, category: conv, detail or complex
    llava-bench-in-the-wild/context.jsonl         image, caption: what the judge is told of the picture
    llava-bench-in-the-wild/answers_gpt4.jsonl    question_id, text, answer_id: in the order of the questions
    llava-bench-in-the-wild/images/               pictures
    llava-bench-in-the-wild/rule.json             optional: LLaVA's llava/eval/table/rule.json; the same words are here

The judge gives both answers a score from 1 to 10 in its first line. The paper's number is the mean of ours as
percentage of the mean of GPT-4's, the means rounded to three places, the percentage to one. As in the official script,
a first line that isn't two numbers with one blank or comma between counts as -1 for both (`unparsed` says how many).

Its prompts are the official ones letter by letter. That includes the captions, which are strings where that script
expects lists: it puts each of their letters on a line of its own, and the published numbers come from it.

Pictures are padded, as in training; AlignGPT's public script cuts the middle out of them here.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import Row, json_row, jsonl_rows, picture
from .judge import NO_JUDGE, Ask, judge_all
from .task import Answered, Outcome, Question, Task, no_credit

_CATEGORIES = ("conv", "detail", "complex")
_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_ROLE = "Assistant"
_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)
_UNPARSED = (-1.0, -1.0)


def questions(root: Path) -> list[Question]:
    folder = root / "llava-bench-in-the-wild"
    rules = _rules(folder)
    captions = {row.text("image"): _caption(row) for row in jsonl_rows(folder / "context.jsonl")}
    rivals = jsonl_rows(folder / "answers_gpt4.jsonl")
    found = []
    for row in jsonl_rows(folder / "questions.jsonl"):
        key, category, image = row.id("question_id"), row.text("category"), row.text("image")
        if category not in _CATEGORIES:
            raise row.wrong("category", f"is {category!r}", f"one of {', '.join(_CATEGORIES)}")
        if image not in captions:
            raise row.wrong("image", f"is {image!r}", f"one that {folder / 'context.jsonl'} describes")
        rival = next(rivals, None)
        if rival is None or rival.id("question_id") != key:
            other = "has no such line" if rival is None else f"has {rival.id('question_id')} in {rival.where}"
            raise row.wrong(
                "question_id", f"is {key}, for which answers_gpt4.jsonl {other}", "the same order in both files"
            )
        facts = {
            "question_id": row.content["question_id"],
            "category": category,
            "caption": captions[image],
            "rival": rival.text("text"),
            "rival_id": rival.id("answer_id" if "answer_id" in rival else "question_id"),
            "role": rules[category][0],
            "rule": rules[category][1],
        }
        found.append(Question(key, row.text("text"), picture(folder / "images", image, row), 1024, facts))
    return found


def _rules(folder: Path) -> dict[str, tuple[str, str]]:
    """What the judge calls the answers' authors, and what it is asked to do, by category."""
    if not (folder / "rule.json").exists():
        return dict.fromkeys(_CATEGORIES, (_ROLE, _RULE))
    rules = json_row(folder / "rule.json")
    rows = {category: rules.row(f"llava_bench_{category}") for category in _CATEGORIES}
    return {category: (row.text("role"), row.text("prompt")) for category, row in rows.items()}


def _caption(row: Row) -> str:
    lines = row.texts("caption") if isinstance(row.content.get("caption"), list) else row.text("caption")
    return "\n".join(lines)


def _review(question: Question, answer: str, ask: Ask) -> str:
    facts = question.facts
    role = facts["role"]
    content = (
        f"[Context]\n{facts['caption']}\n\n[Question]\n{question.prompt}\n\n"
        f"[{role} 1]\n{facts['rival']}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{answer}\n\n[End of {role} 2]\n\n"
        f"[System]\n{facts['rule']}\n\n"
    )
    return ask([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}], 0.2, 1024)


def parse_scores(review: str) -> tuple[float, float]:
    """GPT-4's and ours, -1 for both where the first line isn't two numbers."""
    try:
        theirs, ours = (float(word) for word in review.split("\n")[0].replace(",", " ").split(" "))
    except ValueError:
        return _UNPARSED
    return (theirs, ours) if math.isfinite(theirs) and math.isfinite(ours) else _UNPARSED


def score(answered: Answered) -> Outcome:
    answers = [_official_answer(question, answered.answers[question.key]) for question in answered.questions]
    files = {"llava-bench-answers.jsonl": _json_lines(answers)}
    if answered.judge is None:
        return Outcome(None, {"questions": len(answers)}, NO_JUDGE, files)
    reviews = judge_all(
        answered.judge,
        answered.folder,
        answered.questions,
        lambda question, ask: _review(question, answered.answers[question.key], ask),
    )
    files["llava-bench-reviews.jsonl"] = _json_lines(
        {
            "id": number,
            "question_id": question.facts["question_id"],
            "answer1_id": question.facts["rival_id"],
            "answer2_id": answer["answer_id"],
            "category": f"llava_bench_{question.facts['category']}",
            "content": review,
            "tuple": parse_scores(review),
        }
        for number, (question, answer, review) in enumerate(zip(answered.questions, answers, reviews, strict=True), 1)
    )
    pairs = [
        (question.facts["category"], parse_scores(review))
        for question, review in zip(answered.questions, reviews, strict=True)
    ]
    metrics = {"all": _relative([pair for _, pair in pairs])}
    for category in _CATEGORIES:
        if of_it := [pair for other, pair in pairs if other == category]:
            metrics[category] = _relative(of_it)
    return Outcome(metrics["all"]["relative"], metrics, files=files)


def _relative(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    theirs, ours = (round(sum(scores) / len(pairs), 3) for scores in zip(*pairs, strict=True))
    return {
        "questions": len(pairs),
        "relative": round(ours / theirs * 100, 1) if theirs else 0.0,
        "ours": ours,
        "gpt4": theirs,
        "unparsed": sum(pair == _UNPARSED for pair in pairs),
    }


def _official_answer(question: Question, answer: str) -> dict[str, Any]:
    """A line of the file that LLaVA's own reviewing script takes."""
    return {
        "question_id": question.facts["question_id"],
        "prompt": question.prompt,
        "text": answer,
        "answer_id": hashlib.sha256(f"{question.key}\n{answer}".encode()).hexdigest()[:22],
        "model_id": "aligngpt",
        "metadata": {},
    }


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TASKS = (Task("llava-bench", "LLaVA-Bench (in the wild)", "LLaVA-W", questions, no_credit, score),)
