"""What the page says of made-up results, and that the committed one says what the committed results give."""

import copy
import io
import json
import re
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aligngpt.data.scenes import KINDS, read_scenes, write_scenes
from experiments import charts, report, verdicts
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
        "presence": {"precision": right, "recall": right, "F1": right, "yes share": 0.5, "yes among answers": 0.6},
        "answer NLL": 1 - right,
        "by level": {
            "NLL": [0.1 * n for n in range(8)],
            "accuracy": [right] * 8,
            "own NLL": 0.05,
            "own accuracy": right,
        },
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
    """8 levels beat no token, differ from the top quarter by chance alone, and lose to true levels; true captions are
    likeliest at level 7."""
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
    arms |= {"8 levels, plain LLM": caption_arm([0.5] * 8, random), "no token, plain LLM": arms["top quarter"]}
    own = {"mean true alignment": [0.1 * n for n in range(8)], "mean true facts": [0.4 + 0.05 * n for n in range(8)]}
    noise = {"rank correlation": 0.9} | own
    answered = {"adaptive": answer_arm(0.9, bits), "global": answer_arm(0.9, bits), "no token": answer_arm(0.91, bits)}
    answered["random table"] = answer_arm(0.8, bits)
    choice = {
        arm: {"own row NLL": 0.1, "mean row NLL": same, "rows apart": 0.25, "table norm": 1.5}
        | {"own row accuracy": 0.9, "mean row accuracy": 0.9}
        for arm, same in (("adaptive", 0.3), ("gate frozen", 0.1))
    }
    del answered["global"]["gate"]
    scene = [["small", "red", "circle", "top", "left"], ["large", "blue", "star", "middle", "right"]]
    said = {"0": "large red circle top left", "7": "large red circle top left"}
    return {
        "seed": seed,
        "sizes": {"train": 100},
        "commits": ["0123456789abcdef", "9876543210+"],
        "device": "made up",
        "job minutes": 30.0 + seed,
        "measured": {
            "pictures": {"validation": 200, "test": 600},
            "questions": {"test": 2400},
            "questions by level": 800,
        },
        "runs": 33,
        "noise": {"uniform 0.5": noise, "biased 0.5": noise},
        "stage 1": {name: {"noise": "…", **of} for name, of in arms.items()},
        "stage 2": {name: {"test": of} for name, of in answered.items()},
        "choosing": choice,
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
    (found,) = (of for of in re.split(r"\n(?!  )", page) if of.startswith(f"- **{start}"))
    return re.sub(r"\n  ", " ", found)


def test_a_verdict_follows_from_its_interval(page):
    """No token: 0.89 − 0.53 in every seed. Top quarter: differences of −0.02, 0.02 and 0."""
    count, *cells = rows(page, "no token")[0][1:]
    assert count == "3"
    for cell, sign in zip(cells, (r"\+", r"\+", "−"), strict=True):
        assert re.fullmatch(rf"{sign}0\.3\d\d \({sign}0\.3\d\d to {sign}0\.3\d\d\) ▲", cell)
    assert all(cell.endswith(") ▼") for cell in rows(page, "no token, both with the plain LLM")[0][2:])
    for cell in rows(page, "top quarter")[0][2:]:
        assert re.fullmatch(r"[+−]0\.00\d \(−0\.0\d\d to \+0\.0\d\d\)", cell)
    assert rows(page, "top quarter, both with the plain LLM")[0][1:] == ["0", "—", "—", "—"]
    assert "unmeasured" in bullet(page, "Levels against random levels")
    assert "2 levels: worse; 4 levels: unmeasured" in bullet(page, "Instead of")
    shown = "greedy facts: uniform 0.5: better / no difference seen; biased 0.5: unmeasured / worse."
    assert any(line.startswith("- **Under each noise**") and line.endswith(shown) for line in page.splitlines())
    assert ": size 0.800 to 0.910, color" in bullet(page, "By kind of question")


def test_obeyed_is_said_by_rank_in_both_ways(page, results):
    said = bullet(page, "Is the level obeyed?")
    assert said.startswith("- **Is the level obeyed?** Yes, by the rank correlation of sampled facts with the level: ")
    for way in WAYS:
        assert re.search(
            way + r" facts go from 0\.(399|400|401) at the lowest level to 0\.8(89|90|91) at the highest", said
        )
    assert said.count("fall nowhere between in 3 of 3 seeds (rank correlation 1.00)") == 2
    assert said.endswith("facts in training captions is 0.400 in the lowest level and 0.750 in the highest.")
    fallen = copy.deepcopy(results)
    for result in fallen:
        greedy = result["stage 1"]["8 levels"]["test"]
        greedy["3"]["greedy fact precision"] = 0.9
        for level in "12":
            greedy[level]["sampled fact precision"] = 0.3
    found = verdicts.obeyed(fallen)
    assert found.count("fall nowhere between in 0 of 3 seeds") == 2
    assert found.startswith("Yes")


def test_advice_names_the_best_and_what_is_not_told_from_it(page):
    said = bullet(page, "Which to use")
    assert re.search(r"under uniform 0.5: (levels or top quarter|top quarter or levels) \(sampled\), ", said)
    assert "under biased 0.5: not known (sampled, greedy)." in said  # there is no arm without a token
    assert "under uniform 0.5 with the plain LLM: not known (sampled, greedy)" in said
    assert said.endswith("Answers, of all arms of stage 2, by NLL: *no token*.")
    alike = [made_up(seed) for seed in SEEDS]
    for result in alike:
        result["stage 2"] = {arm: {"test": answer_arm(0.9, bits=0.1)} for arm in ("adaptive", "local", "no token")}
    assert verdicts.advice(alike).endswith("by NLL: *adaptive*, from which none of the other 2 is told.")
    a, b, c = ({seed: of + 0.001 * seed for seed in SEEDS} for of in (0.7, 0.6, 0.8))
    near = {0: 0.69, 1: 0.72, 2: 0.70}
    assert verdicts.best({"levels": a, "no token": b, "top quarter": c}) == ["top quarter"]
    assert verdicts.best({"levels": a, "no token": b, "top quarter": c}, -1) == ["no token"]
    assert verdicts.best({"levels": a, "no token": near, "top quarter": b}) == ["no token", "levels"]
    assert verdicts.best({"levels": a, "no token": {0: 0.6}}) == []
    assert verdicts.best({"levels": a, "no token": {}}) == []


def test_the_gate_stands_beside_the_same_without_it(page):
    """Own rows 0.1, the mean row 0.3 and 0.1 where it was never trained; a random table is worse."""
    cells = rows(page, "the mean of its rows for all questions")[0][1:]
    assert cells == ["3", "−0.200 (−0.200 to −0.200) ▲", "+0.000 (+0.000 to +0.000)"]
    cells = rows(page, "a table of random numbers")[0][1:]
    assert cells == ["3", "−0.100 (−0.100 to −0.100) ▲", "+0.100 (+0.100 to +0.100) ▲"]
    assert rows(page, "no token, from the same stage 1")[0][1:] == ["0", "—", "—"]
    cells = rows(page, "gate frozen")[-1][1:]
    assert cells == ["3", "0.250 ± 0.000", "1.500 ± 0.000", *["0.100 ± 0.000"] * 2, "+0.000 (+0.000 to +0.000)"]


def test_less_is_better_where_it_is(page):
    by_head = {head: rows(page, head) for head in ("facts, sampled", "not there, greedy", "NLL")}
    better = by_head["facts, sampled"][0][1]
    assert better.startswith("+0.3")
    assert better.endswith("▲")
    for head in ("not there, greedy", "NLL"):
        assert by_head[head][0][1].startswith("−0.3")
        assert by_head[head][0][1].endswith("▲")  # fewer, and likelier
    assert rows(page, r"*seeds*")[0][1:] == ["3", "3", "3", "0", "3"]


def test_one_level_is_chosen_on_validation_by_the_true_captions(results):
    """Level 5's captions are the worst, but the true ones are likeliest there; on test pictures they are not."""
    arm = results[0]["stage 1"]["8 levels"]
    other = {**arm, "validation": {**arm["validation"], "5": measures(0.0, Random(0)) | {"clean caption NLL": 0.1}}}
    changed = [results[0] | {"stage 1": {"8 levels": other}}]
    assert report.levels(changed, "8 levels") == "5"
    for measure in report.MEASURES:
        assert report.captions(changed, "8 levels", measure) == {0: arm["test"]["5"][measure.key]}
    assert report.levels([*changed, *results[1:]], "8 levels") == "5 or 7"


def test_tables_hold_means_and_spreads(results, page):
    cells = rows(page, "top quarter")[1]
    assert cells[1:3] == ["3", "—"]
    mean, deviation = map(float, cells[3].split(" ± "))
    found = [of["stage 1"]["top quarter"]["test"]["none"]["sampled fact precision"] for of in results]
    assert (mean, deviation) == pytest.approx((np.mean(found), np.std(found, ddof=1)), abs=5.1e-4)
    assert rows(page, "random levels")[0] == ["random levels", "0", "—", *["—"] * 7]
    assert rows(page, "small")[0][:3] == ["small", "0, 1, 2", "99"]
    assert rows(page, "small")[0][3:] == ["31 ± 1", "made up", "`0123456789`, `9876543210` with changes"]
    assert rows(page, "the pairs' own")[0][2:] == [f"{0.4 + 0.05 * n:.3f}" for n in range(8)]
    assert rows(page, "true alignment")[0][2:] == [f"{0.1 * n:.3f}" for n in range(8)]
    # "yes" is right of 0.6: F1 is 2 · 0.6 / 1.6.
    cells = rows(page, "*always yes*")[0][1:]
    assert cells == ["3", "0.600 ± 0.000", "1.000 ± 0.000", "0.750 ± 0.000", "1.000", ""]
    assert rows(page, "adaptive, NLL")[0][1:] == ["3", *(f"{0.1 * n:.3f}" for n in range(8)), "0.050 ± 0.000"]
    assert "200 validation and 600 test pictures, 2400 test questions (at fixed levels the first 800)" in page
    assert rows(page, "*any object*")[0][1:] == ["3", *["0.500 ± 0.000"] * 5, "—", "—", ""]
    assert rows(page, "true levels")[1][1:] == ["3", "3", "1.00 ± 0.00", "3", "1.00 ± 0.00"]
    assert rows(page, "adaptive")[-2][1:] == [
        "3",
        *(f"{x:.3f} ± 0.000" for x in (0.001, 2.8, 0.1, 0.01, 1.2)),
        "2.81 ± 0.00",
    ]


def test_the_gate_is_inert_where_training_it_changes_nothing_that_is_seen():
    def said(*right_where_frozen: float, accuracy: float | None = None, **others: float) -> str:
        results = [made_up(seed, bits=0.3) for seed in range(len(right_where_frozen))]
        for result, right in zip(results, right_where_frozen, strict=True):
            arm = answer_arm(right, bits=0.2)
            if accuracy is not None:
                arm["accuracy"] = dict.fromkeys(KINDS, accuracy)
            result["stage 2"] |= {"gate frozen": {"test": arm}}
            result["stage 2"] |= {name: {"test": answer_arm(of, bits=0.2)} for name, of in others.items()}
        return f"{verdicts.gate_said(results)} {report.gate_why(results)}"

    inert = said(0.91, 0.89, 0.9, **{"gate drawn x 4": 0.8})
    assert inert.startswith("**inert** as far as is seen, training it makes no difference that is told from chance. ")
    assert "left as it was drawn: 0.100 against 0.100, **no difference seen** (+0.000; −0.025 to +0.025; 3 se" in inert
    assert "question, with both: 0.300 ± 0.000 and 0.200 ± 0.000 (+0.100; +0.100 to +0.100; 3 seeds)." in inert
    assert "as drawn, the gate turns dots of 0.10 ± 0.00 into logits of 0.01 ± 0.00 between questions" in inert
    assert "four times as large: logits 0.01 ± 0.00, answers' NLL 0.200 against 0.100, **worse**" in inert
    assert "ten times as high: logits —, answers' NLL unmeasured." in inert
    assert "No gain" not in inert  # one of the two was not measured
    both = {"gate drawn x 4": 0.9, "gate rate x 10": 0.8}
    assert "No gain from a higher rate or a larger initialisation is told from chance." in said(0.91, 0.89, 0.9, **both)
    more = said(0.91, 0.89, 0.9, **{"gate drawn x 4": 0.95, "gate rate x 10": 0.95})
    assert "seen to be likelier with gate rate x 10 and with gate drawn x 4. `--optim.align-lr` is the" in more
    assert "align-lr" not in said(0.91, 0.89, 0.9, **{"gate drawn x 4": 0.95, "gate rate x 10": 0.9})
    assert said(0.91, 0.89, 0.9, accuracy=0.5).startswith("**inert**"), "accuracy decides nothing"
    helps = said(0.81, 0.79, 0.8)
    assert helps.startswith("**not inert**, training it is seen to help. ")
    assert "0.100 against 0.200, **better**" in helps
    assert "accuracy, which does not decide: 0.900 against 0.800, **better**" in helps
    assert said(0.96, 0.97, 0.95).startswith("**not inert**, training it is seen to harm. ")
    assert said(0.8).startswith("**undecided**, one seed. ")
    assert verdicts.gate_said([made_up(0)]) == "Unmeasured."


def test_results_of_different_sizes_are_refused(tmp_path, results):
    for seed, sizes in enumerate(({"train": 100}, {"train": 100}, {"train": 99})):
        (tmp_path / "small").mkdir(exist_ok=True)
        (tmp_path / f"small/seed-{seed}.json").write_text(json.dumps(results[seed] | {"sizes": sizes}))
    with pytest.raises(
        ValueError, match=r"small/seed-2\.json and .*small/seed-0\.json have different sizes; .* the same"
    ):
        report.load(tmp_path)
    (tmp_path / "small/seed-2.json").unlink()
    assert report.load(tmp_path) == {"small": results[:2]}


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
    assert "**better**" not in small
    assert small.count("▲") == 1
    assert "**better**" not in large
    assert "undecided: one seed" in large
    assert "no interval" in large
    assert "| small | 3 | — | — |" in large
    assert "Of large: unmeasured" not in nothing
    assert 'Of smollm2: unmeasured; `make evidence EVIDENCE="--sizes smollm2 --llm FOLDER --emoji FOLDER"`.' in nothing
    report.drawings({"small": [{"seed": 3}]})[report.PICTURES / "small-levels.svg"].content()


def test_a_seed_in_which_a_level_has_no_captions_to_count_is_left_out(results):
    uncounted = copy.deepcopy(results)
    uncounted[1]["noise"]["uniform 0.5"]["mean true facts"][0] = None
    assert rows(report.page({"small": uncounted}), "the pairs' own")[0][1:3] == ["2", "0.400"]
    assert report.drawings({"small": uncounted})[report.PICTURES / "small-levels.svg"].content()


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

    (tmp_path / report.PAGE).write_bytes(before[report.PAGE].replace(b"3 seeds", b"4 seeds", 1))
    (tmp_path / report.PICTURES / "small-noise.svg").unlink()
    (tmp_path / report.PICTURES / "old.svg").touch()
    other = report.drawings({"small": results[:2]})[report.PICTURES / "small-levels.svg"]
    (tmp_path / report.PICTURES / "small-levels.svg").write_bytes(other.content())
    page, levels, noise, old = report.differences(files, tmp_path)
    line = next(n for n, said in enumerate(before[report.PAGE].decode().splitlines(), 1) if "3 seeds" in said)
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
