"""What came of an evaluation, beside the paper's numbers, for people and for programs.

    write_report(out, about, results)    report.md and report.json in `out`
    console(results)                     the same in a few lines

A result is what a task's metrics.json holds: task, title, column, headline, metrics, needs, questions, partly, credit,
seconds, files. `about` is what run.json holds. The task whose `column` is a column of the paper's table fills it in
this run's row. A headline that a server or a judge has yet to give reads "server" or "judge", a column not run "–", and
what was run on a part of the questions has a †, since it must not be compared.

The paper's numbers are those of AlignGPT (arXiv 2405.14129), with the row of LLaVA-1.5 that it compares itself with.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..data.tables import whole_file, write_json

COLUMNS = {  # of the paper's table, in its order, and what their numbers are
    "VQAv2": "accuracy, %",
    "GQA": "accuracy, %",
    "VizWiz": "accuracy, %",
    "SQA": "accuracy, %",
    "TextVQA": "accuracy, %",
    "POPE": "F1, %",
    "MME": "points of 2,000",
    "MMB": "accuracy, %",
    "MMB-CN": "accuracy, %",
    "SEED": "accuracy, %",
    "LLaVA-W": "% of the reference's points",
    "MM-Vet": "points of 100",
}
ELSE = "accuracy, %"  # what a task without a column is measured by
PAPER = {
    "AlignGPT-7B": (79.1, 62.9, 54.2, 68.5, 58.4, 86.0, 1527.4, 67.3, 59.9, 66.5, 68.4, 30.8),
    "AlignGPT-13B": (80.0, 63.6, 56.4, 70.3, 60.2, 86.2, 1572.0, 69.5, 63.7, 67.8, 75.2, 35.6),
    "LLaVA-1.5-7B": (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 66.2, 63.4, 30.5),
}
NOTHING = "–"
PART = "†"
_WAITS_FOR = {"a judge": "judge", "its server": "server"}  # how `needs` begins


def write_report(out: Path, about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Path:
    """Write report.json and report.md, each whole or not at all; returns the latter's path."""
    results = in_order(results)
    by_column = {result["column"]: result for result in results if result["column"]}
    ours = {column: by_column[column]["headline"] if column in by_column else None for column in COLUMNS}
    paper = {name: dict(zip(COLUMNS, numbers, strict=True)) for name, numbers in PAPER.items()}
    rows = [{"name": about["model"], "paper": False, "numbers": ours}]
    rows += [{"name": name, "paper": True, "numbers": numbers} for name, numbers in paper.items()]
    write_json(out / "report.json", {"about": about, "rows": rows, "results": results}, indent=1)

    compared = [
        [
            f"**{about['model']}** (this run)",
            *[shown(by_column[column]) if column in by_column else NOTHING for column in COLUMNS],
        ],
        *[[name, *map(one_decimal, numbers)] for name, numbers in PAPER.items()],
    ]
    parts = [
        f"# {about['model']} beside the paper",
        table(["", *COLUMNS], compared),
        "Percentages, but for MME, where perception has up to 2,000 points. Other rows: arXiv 2405.14129. "
        f"{NOTHING}: not run.",
        *bullets(notes(results)),
        *[_section(result) for result in results],
        "## How it was run",
        settings(about),
    ]
    path = out / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def console(results: Sequence[Mapping[str, Any]]) -> str:
    """A line for each result, then what is still needed."""
    results = in_order(results)
    width = max((len(result["title"]) for result in results), default=0)
    lines = [f"{result['title']:{width}}  {shown(result):>8}   {_speed(result)}" for result in results]
    return "\n".join([*lines, *notes(results)])


# ---------------------------------------------------------------------------------------------------- results


def in_order(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By the paper's columns; what has none comes last, as it came."""
    columns = list(COLUMNS)
    return sorted(results, key=lambda result: columns.index(result["column"]) if result["column"] else len(columns))


def shown(result: Mapping[str, Any]) -> str:
    """The headline as a cell: a number, or who has yet to give it; with a † where questions were left out."""
    if result["headline"] is not None:
        text = one_decimal(result["headline"])
    else:
        text = _WAITS_FOR.get(result["needs"].partition(":")[0], NOTHING)
    return f"{text} {PART}" if result["partly"] else text


def notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must be known of the headlines, a sentence each."""
    parts = [f"{result['title']} {result['questions']:,}" for result in results if result["partly"]]
    lines = [f"{result['title']} needs {result['needs']}" for result in results if result["needs"]]
    if parts:
        of = ", ".join(parts)
        lines.insert(0, f"{PART} a part of the questions ({of}), which must not be compared with other numbers")
    return lines


def _section(result: Mapping[str, Any]) -> str:
    parts = [
        f"## {result['title']}",
        f"**{shown(result)}** ({COLUMNS.get(result['column'], ELSE)}), {_speed(result)}",
        *metric_tables(result["metrics"]),
    ]
    if credit := result["credit"]:
        parts.insert(2, f"{credit['mean']:.2f} % of answers are right, standard error {credit['standard_error']:.2f}.")
    if result["files"]:
        parts.append(f"Files: {', '.join(f'`{name}`' for name in result['files'])}")
    return "\n\n".join(parts)


def _speed(result: Mapping[str, Any]) -> str:
    number, seconds = result["questions"], result["seconds"]
    answered = result.get("answered", number)  # in these seconds
    if not seconds:
        return f"{number:,} questions"
    of_all = "" if answered == number else f"; last answered: {answered:,}"
    return f"{number:,} questions{of_all} in {seconds:,.1f} s: {answered / seconds:,.2f} answers/s"


def metric_tables(metrics: Mapping[str, Any]) -> list[str]:
    """All numbers in Markdown. What shares half of its names is a row each of one table, the rest has two columns."""
    groups: list[tuple[dict[str, None], list[tuple[tuple[str, ...], Mapping[str, Any]]]]] = []
    for path, numbers in leaves(metrics):
        for names, rows in groups:
            both = names.keys() & numbers.keys()
            if 2 * len(both) >= max(len(names), len(numbers)):
                names.update(dict.fromkeys(numbers))
                rows.append((path, numbers))
                break
        else:
            groups.append((dict.fromkeys(numbers), [(path, numbers)]))
    tables = []
    for names, rows in groups:
        same = takewhile(lambda names: len(set(names)) == 1, zip(*[path for path, _ in rows], strict=False))
        shared = [names[0] for names in same]
        above = " / ".join(shared)
        if len(rows) == 1:
            tables.append(table([above, "value"], [[name, number(value)] for name, value in rows[0][1].items()]))
        else:
            body = [
                [
                    " / ".join(path[len(shared) :]) or "all",
                    *[number(numbers[name]) if name in numbers else NOTHING for name in names],
                ]
                for path, numbers in rows
            ]
            tables.append(table([above, *names], body))
    return tables


def leaves(metrics: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each mapping in the nest that holds values itself, as its path and these values."""
    own = {name: value for name, value in metrics.items() if not isinstance(value, Mapping)}
    if own:
        yield path, own
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, name))


# ---------------------------------------------------------------------------------------------------- Markdown


def settings(about: Mapping[str, Any]) -> str:
    """A table of `about`, nested names behind their parents'."""
    rows = [
        [" / ".join(map(_plain, (*path, name))), value if isinstance(value, str) else number(value)]
        for path, values in leaves(about)
        for name, value in values.items()
        if value is not None
    ]
    return table(["setting", "value"], rows, align=":--")


def _plain(name: str) -> str:
    """The name of a setting in words, that of a file as it is."""
    return name if "." in name else name.replace("_", " ")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "--:") -> str:
    """A table; all columns but the first are aligned to the right."""
    lines = [header, [":--", *[align] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def bullets(lines: Sequence[str]) -> list[str]:
    """A list as one part of a text; none where there are no lines."""
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def cell(text: str) -> str:
    """Text that stays in one cell and one line."""
    return " ".join(text.replace("|", "\\|").split())


def one_decimal(value: float) -> str:
    return f"{value:.1f}"


def number(value: Any) -> str:
    """Whole numbers as they are, others with two decimals."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
