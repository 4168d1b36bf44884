"""MM-Vet: free answers to questions that need several capabilities, which a judge compares with the truth
(arXiv 2308.02490).

    mm-vet/llava-mm-vet.jsonl    question_id, image, text: LLaVA's form of the questions
    mm-vet/mm-vet.json           "v1_<question_id>": question, answer, capability; from MM-Vet's own mm-vet.zip
    mm-vet/images/               pictures, from there too

mm-vet.zip may also be unpacked in mm-vet/ or in mmvet/, with its own folder or without.

The judge gets a table of examples, then the question, the truth and the answer, and completes its last column, from
0.0 to 1.0. What begins with no such number is asked for again, with a hint and at rising temperatures; after five such
replies it counts as 0 (`unparsed` says how often). The paper's number is the mean in percent; so are those of each
capability and of each set of capabilities that a question needs. One run is judged, as the official script does unless
told otherwise; the benchmark's authors report the mean of five.

Pictures are padded, as in training; AlignGPT's public script cuts the middle out of them here.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .files import Row, json_row, jsonl_rows, picture
from .judge import NO_JUDGE, Ask, judge_all
from .task import Answered, Outcome, Question, Task, no_credit, percent

_FOLDERS = ("mm-vet", "mm-vet/mm-vet", "mmvet", "mmvet/mm-vet")
_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland "
    "is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
    "countries do not accurately represent their landscapes. | "
)
_TABLE = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n"
    "\n"
    "Question | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"{_MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not "
    "very icy and Greenland isn't very green. | 0.4\n"
    f"{_MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
    "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is "
    "why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. "
    "The humor in this meme is derived from the unexpected contrast between the names of the countries and their "
    "actual physical characteristics. | 1.0\n"
    "\n"
)
_HINT = "\nPredict the correctness of the answer (digit): "
_TRIES = (("", 0.0), (_HINT, 0.0), (_HINT, 0.5), (_HINT, 1.0), (_HINT, 1.5))  # what is added, temperature


def questions(root: Path) -> list[Question]:
    folder = next((root / name for name in _FOLDERS if (root / name / "mm-vet.json").is_file()), root / _FOLDERS[0])
    truths = json_row(folder / "mm-vet.json")
    found = []
    for row in jsonl_rows(root / "mm-vet/llava-mm-vet.jsonl"):
        key = f"v1_{row.id('question_id')}"
        if key not in truths:
            raise row.wrong("question_id", f"is {row.id('question_id')}", f"one of which {truths.where} holds {key!r}")
        truth = truths.row(key)
        facts = {
            "question": truth.text("question"),
            "answer": truth.text("answer"),
            "capabilities": _capabilities(truth),
        }
        found.append(Question(key, row.text("text"), picture(folder / "images", row.text("image"), row), 1024, facts))
    if unasked := truths.content.keys() - {question.key for question in found}:
        raise ValueError(
            f"{truths.where}: llava-mm-vet.jsonl has no question for {min(unasked)!r}; needs one for each truth"
        )
    return found


def _capabilities(truth: Row) -> tuple[str, ...]:
    """Those that the question needs, in alphabetical order."""
    found = tuple(sorted(set(truth.texts("capability"))))
    if not found or set(found) - set(_CAPABILITIES):
        raise truth.wrong("capability", f"is {list(found)}", f"one or more of {', '.join(_CAPABILITIES)}")
    return found


def _grade(question: Question, answer: str, ask: Ask) -> tuple[str, float | None]:
    """The judge's last reply, and the score in it, None if it is none."""
    truth = question.facts["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{_TABLE}{question.facts['question']} | {truth} | {answer} | "
    for end, temperature in _TRIES:
        reply = ask([{"role": "user", "content": prompt + end}], temperature, 3)
        if (found := parse_score(reply)) is not None:
            break
    return reply, found


def parse_score(reply: str) -> float | None:
    """The number from 0 to 1 before the first blank, None if there is none."""
    try:
        found = float(reply.split(" ")[0])
    except ValueError:
        return None
    return found if 0 <= found <= 1 else None


def score(answered: Answered) -> Outcome:
    results = {question.key: answered.answers[question.key] for question in answered.questions}
    files = {"mmvet-results.json": _json(results)}
    if answered.judge is None:
        return Outcome(None, {"questions": len(results)}, NO_JUDGE, files)
    grades = judge_all(
        answered.judge,
        answered.folder,
        answered.questions,
        lambda question, ask: _grade(question, results[question.key], ask),
    )
    files["mmvet-grades.json"] = _json(
        {
            question.key: {"model": [answered.judge.model], "content": [reply], "score": [found or 0.0]}
            for question, (reply, found) in zip(answered.questions, grades, strict=True)
        }
    )
    scored = [
        (question.facts["capabilities"], found or 0.0)
        for question, (_, found) in zip(answered.questions, grades, strict=True)
    ]
    needed = {capability for capabilities, _ in scored for capability in capabilities}
    total = _mean(found for _, found in scored)
    metrics = {
        "questions": len(scored),
        "total": total,
        "unparsed": sum(found is None for _, found in grades),
        "capabilities": {
            capability: _mean(found for capabilities, found in scored if capability in capabilities)
            for capability in _CAPABILITIES
            if capability in needed
        },
        "combinations": {
            "_".join(combination): _mean(found for capabilities, found in scored if capabilities == combination)
            for combination in sorted({capabilities for capabilities, _ in scored})
        },
    }
    return Outcome(total, metrics, files=files)


def _mean(scores: Iterable[float]) -> float:
    """In percent."""
    found = list(scores)
    return percent(sum(found), len(found))


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


TASKS = (Task("mmvet", "MM-Vet", "MM-Vet", questions, no_credit, score),)
