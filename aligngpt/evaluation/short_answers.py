"""Short answers, processed and scored as VQA and its kin do: VQAv2, VizWiz, TextVQA.

Two official ways to process an answer, which look alike and are not:

    process_vqa       the VQA toolkit's (vqaEval.py): a comma between digits glues together what any mark separates
    process_evalai    M4C's, "as EvalAI does" (m4c_evaluator.py), with which LLaVA scores TextVQA and prepares what it
                      uploads for VQAv2 and VizWiz: in lower case and without commas and "?" first, and "'s" split off

and one accuracy: an answer that k of the other humans gave is worth min(1, k / 3), averaged over whom of them to leave
out. The benchmarks differ in what is compared:

    m4c_accuracy      both sides processed as M4C does
    vqa_accuracy      both as the toolkit does, but only where the humans differ; where all agree, as they stand
    vizwiz_accuracy   the answer as the toolkit does, the humans' as they stand
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from .files import Row
from .task import Answered, Question, average

PROMPT_END = "\nAnswer the question using a single word or phrase."

_MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Misspelt: one apostrophe is missing. The official table has no others, and one entry the wrong way round.
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTED.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


@lru_cache(1 << 16)  # most of what people answer is the same few words
def process_vqa(text: str) -> str:
    text = _one_line(text)
    glue = re.search(r"\d,\d", text) is not None
    found = text
    for mark in _MARKS.intersection(text):
        found = found.replace(mark, "" if glue or f"{mark} " in text or f" {mark}" in text else " ")
    # The official pattern is meant to spare decimals like "3." too but does not; its flag `re.UNICODE` is its count.
    found = re.sub(r"\.(?!\d)", "", found, count=32)
    words = [_DIGITS.get(word, word) for word in found.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def process_evalai(text: str) -> str:
    return process_vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def m4c_accuracy(answer: str, humans: Sequence[str]) -> float:
    return _leave_one_out(process_evalai(answer), [process_evalai(human) for human in humans])


def vqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    answer, humans = _one_line(answer), [_one_line(human) for human in humans]
    if len(set(humans)) > 1:
        answer, humans = process_vqa(answer), [process_vqa(human) for human in humans]
    return _leave_one_out(answer, humans)


def vizwiz_accuracy(answer: str, humans: Sequence[str]) -> float:
    return _leave_one_out(process_vqa(answer), humans)


def _leave_one_out(answer: str, humans: Sequence[str]) -> float:
    same = [human == answer for human in humans]
    return sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / len(humans)


def human_answers(row: Row) -> tuple[str, ...]:
    """The texts of the field `answers`, a list of objects with an `answer` each. ValueError: there is none."""
    found = tuple(answer.text("answer") for answer in row.rows("answers"))
    if not found:
        raise row.wrong("answers", "is []", "an answer at least")
    return found


def averages(answered: Answered, credit: Callable[[Question, str], float], *facts: str) -> dict[str, Any]:
    """The mean credit in percent: of all questions, and for each of these facts of those that share it."""
    scores = [(question, credit(question, answered.answers[question.key])) for question in answered.questions]
    metrics = average([found for _, found in scores])
    for fact in facts:
        groups = defaultdict(list)
        for question, found in scores:
            groups[question.facts[fact]].append(found)
        metrics[fact] = {name: average(groups[name]) for name in sorted(groups)}
    return metrics
