"""Reports read back: every number that went in stands in them, beside the paper's."""

import json
import re
from pathlib import Path
from typing import Any

from aligngpt.evaluation import report

PAPER = """VQAv2 GQA VizWiz SQA TextVQA POPE MME MMB MMB-CN SEED LLaVA-W MM-Vet
79.1 62.9 54.2 68.5 58.4 86.0 1527.4 67.3 59.9 66.5 68.4 30.8
80.0 63.6 56.4 70.3 60.2 86.2 1572.0 69.5 63.7 67.8 75.2 35.6
78.5 62.0 50.0 66.8 58.2 85.9 1510.7 64.3 58.3 66.2 63.4 30.5"""
ABOUT = {
    "model": "tiny_a|b",
    "model_sha256": {"model.safetensors": "ab12"},
    "align_mode": "adaptive",
    "level": None,
    "versions": {"torch": "2.13.0"},
    "limit": 100,
}


def result(task: str, column: str, headline: float | None, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = {"task": task, "title": f"The {task}", "column": column, "headline": headline, "metrics": metrics}
    return {
        **made,
        "needs": "",
        "questions": 8910,
        "partly": False,
        "credit": None,
        "seconds": 810.0,
        "files": [],
        **more,
    }


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, the header's first; bold and the thousands' commas are gone."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
        elif not re.fullmatch(r"[|: -]+", line):
            cells = [cell.strip().replace("**", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not inside:
                found.append([])
            found[-1].append([re.sub(r"(?<=\d),(?=\d)", "", cell) for cell in cells])
            inside = True
    return found


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


POPE = {"adversarial": {"accuracy": 84.25, "f1": 83.5}, "random": {"accuracy": 88.125, "f1": 87.0}}
MME = {
    "perception": {"score": 1510.664, "existence": {"acc": 95.0, "acc_plus": 90.0, "score": 185.0}},
    "cognition": {"score": 300.5, "code": {"acc": 55.0, "acc_plus": 15.25, "score": 70.25}},
}
GQA = {"accuracy": 61.25, "questions": 12578, "by_type": {"choose": 70.5, "query|2": None}}
RESULTS = [
    result("mme", "MME", 1510.664, MME, seconds=0.0),
    result("textvqa", "", 45.678, {"accuracy": 45.678}),
    result("pope", "POPE", 85.949, POPE, credit={"mean": 86.1875, "standard_error": 0.365}),
    result("vqav2", "VQAv2", None, {}, needs="its server: upload a.json to B", files=["a.json"]),
    result("llava-bench", "LLaVA-W", None, {}, needs="a judge: name one", answered=60, seconds=12.0),
    result("gqa", "GQA", 61.25, GQA, partly=True, questions=100),
    result("mmbench", "MMB", None, {}, partly=True),  # what needs all questions
]


def test_numbers_stand_in_the_report(tmp_path: Path) -> None:
    path = report.write_report(tmp_path, ABOUT, RESULTS)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "report.json", path]
    text = path.read_text()
    (header, ours, *others), *rest = tables(text)
    columns, *paper = [line.split() for line in PAPER.splitlines()]
    assert header == ["", *columns]
    assert others == [
        [name, *row] for name, row in zip(("AlignGPT-7B", "AlignGPT-13B", "LLaVA-1.5-7B"), paper, strict=True)
    ]
    assert ours[0] == "tiny_a\\|b (this run)"
    assert dict(zip(columns, ours[1:], strict=True)) == {
        **dict.fromkeys(columns, "–"),
        "VQAv2": "server",
        "GQA": "61.2 †",
        "POPE": "85.9",
        "MME": "1510.7",
        "MMB": "– †",
        "LLaVA-W": "judge",
    }
    assert "- † a part of the questions (The gqa 100, The mmbench 8,910), which must not be compared" in text
    assert "- The vqav2 needs its server: upload a.json to B\n- The llava-bench needs a judge: name one\n" in text

    assert tables(section(text, "The pope")) == [
        [["", "accuracy", "f1"], ["adversarial", "84.25", "83.50"], ["random", "88.12", "87.00"]]
    ]
    assert "**85.9** (F1, %), 8,910 questions in 810.0 s: 11.00 answers/s\n" in section(text, "The pope")
    assert "\n86.19 % of answers are right, standard error 0.36.\n" in section(text, "The pope")
    assert tables(section(text, "The mme")) == [
        [["", "score"], ["perception", "1510.66"], ["cognition", "300.50"]],
        [
            ["", "acc", "acc_plus", "score"],
            ["perception / existence", "95.00", "90.00", "185.00"],
            ["cognition / code", "55.00", "15.25", "70.25"],
        ],
    ]
    assert "8,910 questions\n" in section(text, "The mme")  # all answers were there: no speed
    assert tables(section(text, "The gqa")) == [
        [["", "value"], ["accuracy", "61.25"], ["questions", "12578"]],
        [["by_type", "value"], ["choose", "70.50"], ["query\\|2", "–"]],
    ]
    assert "8,910 questions; last answered: 60 in 12.0 s: 5.00 answers/s\n" in section(text, "The llava-bench")
    assert "Files: `a.json`" in section(text, "The vqav2")
    assert "**45.7** (accuracy, %)," in section(text, "The textvqa")
    assert rest[-1] == [
        ["setting", "value"],
        *[["model", "tiny_a\\|b"], ["align mode", "adaptive"], ["limit", "100"]],
        *[["model sha256 / model.safetensors", "ab12"], ["versions / torch", "2.13.0"]],
    ]

    found = json.loads((tmp_path / "report.json").read_text())
    assert found["about"] == ABOUT
    assert sorted(found["results"], key=lambda one: one["task"]) == sorted(RESULTS, key=lambda one: one["task"])
    numbers = {**dict.fromkeys(columns), "GQA": 61.25, "POPE": 85.949, "MME": 1510.664}  # as they are, not rounded
    assert found["rows"][0] == {"name": "tiny_a|b", "paper": False, "numbers": numbers}
    for row, wanted in zip(found["rows"][1:], paper, strict=True):
        assert row["paper"]
        assert list(row["numbers"].items()) == list(zip(columns, map(float, wanted), strict=True))


def test_the_terminal_gets_a_line_each() -> None:
    assert report.console(RESULTS).splitlines() == [
        "The vqav2          server   8,910 questions in 810.0 s: 11.00 answers/s",
        "The gqa            61.2 †   100 questions in 810.0 s: 0.12 answers/s",
        "The pope             85.9   8,910 questions in 810.0 s: 11.00 answers/s",
        "The mme            1510.7   8,910 questions",
        "The mmbench           – †   8,910 questions in 810.0 s: 11.00 answers/s",
        "The llava-bench     judge   8,910 questions; last answered: 60 in 12.0 s: 5.00 answers/s",
        "The textvqa          45.7   8,910 questions in 810.0 s: 11.00 answers/s",
        "† a part of the questions (The gqa 100, The mmbench 8,910), which must not be compared with other numbers",
        "The vqav2 needs its server: upload a.json to B",
        "The llava-bench needs a judge: name one",
    ]
