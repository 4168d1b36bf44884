"""What the page says of made-up results, and that the committed one says what the committed results give."""

import copy
import io
import re
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aligngpt.data.scenes import KINDS, read_scenes, write_scenes
from experiments import charts, report
from experiments.charts import Drawing

WAYS = ("sampled", "greedy")
SEEDS = range(3)


def measures(facts: float, random: Random) -> dict[str, float]:
    found = {
        f"{way} {key}": facts + random.uniform(-0.001, 0.001) for way in WAYS for key in ("fact precision", "object F1")
    }
    found |= {f"{way} hallucination": 1 - facts + random.uniform(-0.001, 0.001) for way in WAYS}
    return found | {"clean caption NLL": 2 - facts}


def caption_arm(facts: list[float], random: Random, *, token: bool = True) -> dict[str, Any]:
    names = [str(n) for n in range(len(facts))] if token else ["none"]
    parts = ("validation", "test")
    return {part: {n: measures(of, random) for n, of in zip(names, facts, strict=True)} for part in parts}


def answer_arm(right: float, bits: float) -> dict[str, Any]:
    by_kind = dict.fromkeys(KINDS, right)
    return {
        "questions": dict.fromkeys(KINDS, 10),
        "accuracy": by_kind,
        "another picture": by_kind,
        "any object": dict.fromkeys(KINDS[:5], 0.5),
        "majority": by_kind,
        "presence": {"precision": right, "recall": right, "F1": right, "yes share": 0.5},
        "answer NLL": 1 - right,
        "answer NLL by level": [0.1 * n for n in range(8)],
        "accuracy by level": [right] * 8,
        "gate": {
            "weights": {kind: [1 / 7] * 7 for kind in KINDS},
            "mutual information": bits,
            "entropy": 2.8,
            "dots std": 0.1,
            "logits std": 0.01,
            "table distance": 1.2,
        },
    }


def made_up(seed: int, bits: float = 0.001) -> dict[str, Any]:
    """8 levels beat no token, differ from the top quarter by chance alone, and lose to true levels."""
    random = Random(seed)
    rising = [0.40 + 0.07 * n for n in range(8)]
    arms = {
        "8 levels": caption_arm(rising, random),
        "no token": caption_arm([0.53], random, token=False),
        "top quarter": caption_arm([0.89 + (0.02, -0.02, 0.0)[seed]], random, token=False),
        "true levels": caption_arm([of + 0.05 for of in rising], random),
        "one constant token": {part: {"1": measures(0.53, random)} for part in ("validation", "test")},
        "2 levels": caption_arm([0.45, 0.80], random),
        "8 levels, biased 0.5": caption_arm(rising, random),
        "top quarter, biased 0.5": caption_arm([0.95], random, token=False),
    }
    noise = {"rank correlation": 0.9, "mean true alignment": [0.1 * n for n in range(8)]}
    answered = {"adaptive": answer_arm(0.9, bits), "global": answer_arm(0.9, bits), "no token": answer_arm(0.91, bits)}
    del answered["global"]["gate"]
    scene = [["small", "red", "circle", "top", "left"], ["large", "blue", "star", "middle", "right"]]
    said = {"0": "large red circle top left", "7": "large red circle top left"}
    return {
        "seed": seed,
        "sizes": {"train": 100},
        "commit": "0123456789abcdef",
        "device": "made up",
        "minutes": 30.0 + seed,
        "runs": 33,
        "noise": {"uniform 0.5": noise, "biased 0.5": noise},
        "stage 1": {name: {"noise": "…", **of} for name, of in arms.items()},
        "stage 2": {name: {"validation": of, "test": of} for name, of in answered.items()},
        "samples": [{"scene": scene, "picture": 4, "captions": said}],
    }


@pytest.fixture(scope="module")
def results():
    return [made_up(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def page(results):
    return report.page({"small": results})


def rows(page: str, name: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def bullet(page: str, start: str) -> str:
    (line,) = (line for line in page.splitlines() if line.startswith(f"- **{start}"))
    return line


def test_a_verdict_follows_from_its_interval(page):
    """No token: 0.89 − 0.53 in every seed. Top quarter: differences of −0.02, 0.02 and 0."""
    said = bullet(page, "8 levels against no token")
    assert re.search(
        r"sampled, at level 7, 0\.8(89|90|91) against 0\.5(29|30|31), \*\*better\*\* \(difference \+0\.3", said
    )
    assert said.count("3 seeds") == 2
    said = bullet(page, "8 levels against top quarter")
    assert said.count("no difference seen") == 2
    assert "better" not in said
    assert "worse" not in said
    assert "unmeasured" in bullet(page, "8 levels against random levels")
    assert bullet(page, "Is the level obeyed?").startswith("- **Is the level obeyed?** Yes: ")
    assert "in 3 of 3 seeds" in bullet(page, "Is the level obeyed?")
    assert "2 levels: worse; 4 levels: unmeasured" in bullet(page, "Instead of")
    assert "uniform 0.5: better / no difference seen; biased 0.5: unmeasured / worse" in bullet(
        page, "Under each noise"
    )
    said = bullet(page, "Stage 2")
    assert "against global 0.900 against 0.900, **no difference seen** (difference +0.000" in said
    assert "against no token 0.900 against 0.910, **worse**" in said
    said = bullet(page, "Which to use")
    assert "Levels or no token, for true captions: the levels (sampled), the levels (greedy)." in said
    assert (
        "Levels or top quarter, for true captions: no difference seen (sampled), no difference seen (greedy)." in said
    )
    assert "No difference is seen between `adaptive` and `global`" in said


def test_less_is_better_where_it_is(page):
    by_head = {head: rows(page, head) for head in ("facts, sampled", "not there, greedy", "NLL")}
    better = by_head["facts, sampled"][0][1]
    assert better.startswith("+0.3")
    assert better.endswith("▲")
    for head in ("not there, greedy", "NLL"):
        assert by_head[head][0][1].startswith("−0.3")
        assert by_head[head][0][1].endswith("▲")  # fewer, and likelier
    assert rows(page, r"*seeds*")[0][1:] == ["3", "3", "3", "0", "3"]


def test_the_level_is_chosen_on_validation(results):
    arm = results[0]["stage 1"]["8 levels"]
    other = {**arm, "validation": {**arm["validation"], "5": measures(0.99, Random(0))}}
    changed = [results[0] | {"stage 1": {"8 levels": other}}]
    assert report.levels(changed, "8 levels") == "5"
    at_5 = arm["test"]["5"]
    assert report.captions(changed, "8 levels", report.SAMPLED) == {0: at_5["sampled fact precision"]}
    assert report.captions(changed, "8 levels", report.MEASURES[4]) == {0: at_5["sampled hallucination"]}
    assert report.levels([*changed, *results[1:]], "8 levels") == "5 or 7"


def test_tables_hold_means_and_spreads(results, page):
    cells = rows(page, "top quarter")[0]
    assert cells[1:3] == ["3", "—"]
    mean, deviation = map(float, cells[3].split(" ± "))
    found = [of["stage 1"]["top quarter"]["test"]["none"]["sampled fact precision"] for of in results]
    assert (mean, deviation) == pytest.approx((np.mean(found), np.std(found, ddof=1)), abs=5.1e-4)
    assert rows(page, "random levels")[0] == ["random levels", "0", "—", *["—"] * 7]
    assert rows(page, "small")[0][:3] == ["small", "0, 1, 2", "99"]
    assert rows(page, "small")[0][3:] == ["31 ± 1", "made up", "`0123456789`"]
    assert rows(page, "the pairs' own")[0][2:] == [f"{0.1 * n:.3f}" for n in range(8)]
    assert rows(page, "*any object*")[0][1:] == ["3", *["0.500 ± 0.000"] * 5, "—", "—", ""]
    assert rows(page, "true levels")[1][1:] == ["3", "3", "1.00 ± 0.00", "3", "1.00 ± 0.00"]
    assert rows(page, "adaptive")[-1][1:] == [
        "3",
        *(f"{x:.4f} ± 0.0000" for x in (0.001, 2.8, 0.1, 0.01, 1.2)),
        "2.81 ± 0.00",
    ]


def test_the_gate_is_inert_where_training_it_changes_nothing_that_is_seen():
    def said(*right_where_frozen: float) -> str:
        results = [made_up(seed, bits=0.3) for seed in range(len(right_where_frozen))]
        for result, right in zip(results, right_where_frozen, strict=True):
            result["stage 2"]["gate frozen"] = {"test": answer_arm(right, bits=0.2)}
        return report.gate_said(results)

    assert "**inert**" in said(0.91, 0.89, 0.9)
    assert "0.300 ± 0.000 bits about the kind of question, and 0.200 ± 0.000 where" in said(0.91, 0.89, 0.9)
    assert said(0.81, 0.79, 0.8).startswith("is **not inert**")
    assert "0.900 against 0.800, **better**" in said(0.81, 0.79, 0.8)
    assert "**not inert**" in said(0.96, 0.97, 0.95), "training it does harm"
    assert "**undecided**" in said(0.8)
    assert report.gate_said([made_up(0)]) == "is unmeasured."


def test_emoji_have_a_table_where_they_were_measured(results, page):
    assert "Emoji" not in page
    for number, result in enumerate(with_emoji := copy.deepcopy(results)):
        lower, highest = ({"name NLL": nll, "another picture": 4.0} for nll in (9.0, 1.0 + number))
        result["stage 1"]["8 levels"]["emoji"] = {"6": lower, "7": highest}
    (row,) = (row for row in rows(report.page({"smollm2": with_emoji}), "8 levels") if len(row) == 5)
    assert row[2:4] == ["2.000 ± 1.000", "4.000 ± 0.000"]
    assert row[4].startswith("−2.000")


def test_what_is_missing_is_a_dash():
    nothing = report.page({"small": [{"seed": 3}], "large": [made_up(0)]})
    small, large = nothing.split("\nOf large, 1 seed:\n")
    assert "better" not in small
    assert "**better**" not in large
    assert "undecided: one seed" in large
    assert "no interval" in large
    assert "| small | 3 | — | — |" in large
    assert "Larger sizes, on a GPU: unmeasured." not in nothing
    report.drawings({"small": [{"seed": 3}]})[report.PICTURES / "small-levels.svg"].content()


def test_a_page_or_picture_of_other_results_is_found(tmp_path, results):
    files = {"small": results}
    (tmp_path / "README.md").write_text(f"{report.OPENING}{report.CLOSING}\n", encoding="utf-8")
    written = report.write(files, tmp_path)
    assert report.differences(files, tmp_path) == []
    for path in re.findall(r"\]\((evidence/[^)]+)\)", (tmp_path / report.PAGE).read_text(encoding="utf-8")):
        assert (tmp_path / "docs" / path).exists(), path
    before = {path: (tmp_path / path).read_bytes() for path in written}
    report.write(files, tmp_path)
    assert before == {path: (tmp_path / path).read_bytes() for path in written}
    assert b"prefers-color-scheme: dark" in before[report.PICTURES / "small-noise.svg"]

    (tmp_path / report.PAGE).write_bytes(before[report.PAGE].replace(b"**better**", b"**worse**", 1))
    (tmp_path / report.PICTURES / "small-noise.svg").unlink()
    (tmp_path / report.PICTURES / "old.svg").touch()
    other = report.drawings({"small": results[:2]})[report.PICTURES / "small-levels.svg"]
    (tmp_path / report.PICTURES / "small-levels.svg").write_bytes(other.content())
    page, levels, noise, old = report.differences(files, tmp_path)
    line = next(n for n, said in enumerate(before[report.PAGE].decode().splitlines(), 1) if "**better**" in said)
    assert page == f"docs/evidence.md differs from the results files from line {line}"
    assert levels == "docs/evidence/small-levels.svg does not show what the results files hold"
    assert noise == "docs/evidence/small-noise.svg does not show what the results files hold"
    assert old == "docs/evidence/old.svg is of no results file"
    with pytest.raises(ValueError, match=r"README\.md has 0 blocks of evidence; it needs one"):
        report.fill("no marks", "new")


def test_a_sample_is_shown_as_it_was_asked_about(tmp_path, page):
    """The picture that the test set has, but for JPEG; and its captions judged by hand."""
    list(write_scenes(tmp_path / "test", 3, seed="5 test"))
    scene = read_scenes(tmp_path / "test")[2]
    drawn = Image.open(io.BytesIO(Drawing(charts.picture, (scene, "5 test 2")).content()))
    kept = Image.open(tmp_path / "test/images/00002.jpg").resize(drawn.size)
    assert np.abs(np.asarray(drawn, float) - np.asarray(kept, float)).mean() < 3
    (line,) = (line for line in page.splitlines() if "small-sample-0.png" in line)
    assert line.count("large red circle top left (4 of 5)") == 2


def test_the_pages_say_what_the_committed_files_give(capsys):
    files = report.load()
    assert report.differences(files) == []
    assert (report.ROOT / report.PAGE).exists() == bool(files)
    assert report.main(["--check"]) == (0 if files else 1)
    assert files or "holds no <sizes>/seed-<n>.json" in capsys.readouterr().out
