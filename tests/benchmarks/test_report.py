"""What the page and the README say of results files: a made-up one, an old one, and those that are committed."""

import json
import re
from typing import Any

import pytest
import torch

from benchmarks import claims, readings, report
from benchmarks.claims import CPU, GPU, Claim
from benchmarks.run import all_cases

TOP = {"bytes_per_second": 1e9, "flops_per_second": 1e10}


def timed(us: float, **more: Any) -> dict[str, Any]:
    return {"us": us, "quartiles_us": [us * 0.9, us * 1.1], "rounds": 9, "error_in_plain_errors": 0.5, **more}


def record(stage: str, contenders: dict[str, Any], **more: Any) -> dict[str, Any]:
    about = {"stage": stage, "group": stage, "items": 0, "unit": "", "sweep": None, "bytes": 0, "flops": 0}
    kept = {"finished": True, "code": "new", "file": "bench", "commit": "0123456789abcdef", "ceilings": TOP}
    return about | kept | {"contenders": contenders} | more


def peer(us: float, ratio: float) -> dict[str, Any]:
    return timed(us, ratio={"median": ratio, "low": ratio * 0.95, "high": ratio * 1.05})


def swept(what: str, x: int, us: float) -> dict[str, Any]:
    ours = timed(us, grows={"us": [1, "each row is read"]}) | {"quartiles_us": [us, us]}
    return record("loss", {"ours": ours}, group="scaling", sweep=[what, x], bytes=1e9)


STEP = {
    "whole_us": 1000.0,
    "whole_peak_bytes": 3e6,
    "whole_syncs": 4,
    "stages": [
        {"stage": "LLM forward", "us": 300.0, "items": 30, "unit": "tokens", "bytes": 1e5, "flops": 1e6, "syncs": 0},
        {"stage": "backward", "us": 600.0, "items": 30, "unit": "tokens", "bytes": 0, "flops": 3e6, "syncs": 2},
    ],
    "rest": {"between the stages": 70.0, "data wait": 30.0},
}
CONTENT = {
    "device": "A made-up chip",
    "capability": "sm_90",
    "versions": {"torch": "2.13", "apex": "not installed"},
    "codes": {"bench": "new"},
    "checks": {
        "commit": "89abcdef0123456789",
        "machine": {"torch": "2.13", "model": "17"},
        "cases": {
            "a gate": {
                "slow peer": {"ratios": [2.4, 2.5, 2.6], "stable": True},
                "fast peer": {"ratios": [0.7, 0.8, 0.9], "stable": False},
                "syncs": 0,
            }
        },
    },
    "cases": {
        "stages of a step": record("training step", {"ours": timed(1000.0, **STEP)}),
        "a small gate": record("gate", {"ours": timed(1.0), "peer": peer(3.0, 3.0)}, bytes=10),
        "a gate": record(
            "gate",
            {
                "ours": timed(100.0, peak_bytes=2e6, syncs=0),
                "slow peer": peer(250.0, 2.52),
                "fast peer": peer(80.0, 0.8),
                "missing": {"absent": "apex is not installed"},
                "unsteady": {"noisy": "its middle half spreads", "quartiles_us": [1, 9], "rounds": 9},
            },
            items=8, unit="images", bytes=50_000, flops=100_000,
        ),
        "a noisy gate": record("gate", {"ours": {"noisy": "too loud"}, "peer": {"noisy": "too loud"}}),
        "an old loss": record("loss", {"ours": timed(10.0), "peer": peer(20.0, 2.0)}, code="older"),
        "not through": record("loss", {"ours": timed(10.0)}, finished=False),
        "a plan": record("plan", {"ours": timed(5.0, predicted_us=210.0, measured_us=200.0, total_error=-0.02)}),
        **{f"scaling: rows, {n}": swept("rows", n, 10.0 * n) for n in (1, 2, 4, 8)},
        **{f"scaling: pairs, {n}": swept("pairs", n, 10.0 * n * n) for n in (1, 2, 4, 8)},
        "broken": record("optimizer", {"ours": {"wrong": "result 0 is off"}, "peer": timed(5.0)}),
    },
}  # fmt: skip
OLD = {  # as files were: no stage, items or ratio
    "device": "An older chip",
    "capability": "sm_80",
    "code": "a",
    "cases": {
        "decode B=1": {
            "code": "a", "finished": True, "group": "decode", "bytes": 10, "flops": 10,
            "contenders": {"SDPA": timed(30.0), "ours": timed(20.0), "ours, in a graph": timed(10.0)},
        },
        "step": {
            "code": "b", "finished": True, "group": "step at 7B", "bytes": 0, "flops": 0,
            "contenders": {"ours": timed(1e6, stages_ms={"backward": 600.0, "LLM forward": 390.0, "the rest": 10.0})},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    return report.page({"chip": CONTENT})


def rows(page: str, start: str) -> list[list[str]]:
    """Cells of the table rows whose first cell is `start`."""
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line] for line in lines]


def test_a_stage_has_its_largest_case_with_every_number(page):
    (gate,) = rows(page, "gate")
    work = ["80.0 k images/s", "50.0 kB", "100 k", "50 %", "2.00 MB", "0"]  # 50 µs for the bytes, of 100
    assert gate == ["gate", "a gate", "100 µs", *work, "slow peer 2.52, fast peer **0.800**"]
    assert "| loss | an old loss † |" in page
    assert "| optimizer | broken | wrong: result 0 is off |" in page
    assert "not through" not in page
    assert rows(page, "sampling") == [["sampling", "unmeasured", *["—"] * 8]]
    assert rows(page, "backward")[0][1] == "unmeasured by itself; below, in a whole"
    lines = page.partition("### Stages")[2].partition("\n#")[0].splitlines()
    stages = list(dict.fromkeys(line.split(" | ")[0][2:] for line in lines if line.startswith("| ")))
    assert stages == ["stage", "---", *(stage for stage in readings.TABLE if stage != "plan")]
    only_swept = {"scaling: rows, 1": CONTENT["cases"]["scaling: rows, 1"] | {"stage": "checkpoint"}}
    (line,) = rows(report.page({"chip": CONTENT | {"cases": only_swept}}), "checkpoint")
    assert line[1] == "measured as it grows, below"


def test_every_peer_has_its_ratio_or_the_reason_why_not(page):
    (slow,), (fast,) = ([line for line in page.splitlines() if f"|  | {name} |" in line] for name in PEERS)
    assert "2.52 (2.39 to 2.65)" in slow
    assert "**0.800** (0.760 to 0.840)" in fast
    assert "|  | missing | absent: apex is not installed |" in page
    assert "|  | unsteady | noisy: its middle half spreads |" in page
    assert rows(page, "a noisy gate") == [["a noisy gate", "ours, peer", "noisy: too loud", "", "", "", ""]]
    assert "4 times of contenders divided by ours, 1 of them below 1" in page


PEERS = ("slow peer", "fast peer")


def test_stages_of_a_step_stand_beside_the_whole(page):
    assert rows(page, "LLM forward")[1][:4] == ["LLM forward", "300 µs", "30 %", "100 k tokens/s"]
    assert rows(page, "backward")[1][6] == "50 %"  # 3e6 FLOPs are 300 µs of the ceiling
    assert rows(page, "*sum of the stages*")[0][1:3] == ["900 µs", "90 %"]
    assert rows(page, "rest: between the stages")[0][1:3] == ["70.0 µs", "7 %"]
    assert rows(page, "rest: data wait")[0][1:3] == ["30.0 µs", "3 %"]
    assert rows(page, "**the whole**")[0][1:] == ["1.00 ms", "100 %", "—", "—", "—", "—", "3.00 MB", "4"]


def test_a_plan_stands_beside_what_was_measured(page):
    assert rows(page, "a plan") == [["a plan", "210 µs", "200 µs", "+5.0%", "-2.0%"]]


def test_growth_stands_beside_what_is_allowed(page):
    (line,) = rows(page, "rows")
    assert line[1:3] == ["rows", "1: 10.0 µs, 2: 20.0 µs, 4: 40.0 µs, 8: 80.0 µs"]
    assert line[3].startswith("1.00 (")
    assert line[4:] == ["1", "each row is read", "as it must"]
    (line,) = rows(page, "pairs")
    assert line[3].startswith("2.00 (")
    assert line[-1] == "**faster than it must**"
    assert "scaling: " not in page.partition("### Ours against peers")[0]  # a point of a curve is no row of the stages


def test_what_is_checked_is_said(page):
    assert rows(page, "a gate")[-1] == ["a gate", "slow peer 2.50, syncs 0", "fast peer"]
    assert "Recorded at `89abcdef01`; checked where the machine is the same: torch 2.13, model 17." in page


def test_on_a_cpu_the_reference_is_chance_and_no_peer():
    found = {"ours": timed(100.0), "reference": peer(98.0, 0.98), "reference, torch.compile": peer(40.0, 0.4)}
    content = {"device": "A CPU", "codes": {"bench": "new"}, "cases": {"a gate": record("gate", found)}}
    page = report.page({"cpu": content})
    assert report.CHANCE in page
    assert rows(page, "gate")[0][-1] == "reference, torch.compile **0.400**"
    (line,) = (line for line in page.splitlines() if "|  | reference |" in line)
    assert "| 0.980 (0.931 to 1.03) |" in line
    assert report.spread(content) == {"gate": {"reference, torch.compile": [0.4]}}
    page = report.page({"gpu": content | {"capability": "sm_90"}})
    assert report.CHANCE not in page
    assert rows(page, "gate")[0][-1] == "reference **0.980**, reference, torch.compile **0.400**"


def test_curves_and_plans_of_older_code_are_marked():
    older = {name: dict(of) for name, of in CONTENT["cases"].items()}
    for name in ("scaling: rows, 4", "a plan"):
        older[name]["code"] = "older"
    page = report.page({"chip": CONTENT | {"cases": older}})
    assert rows(page, "rows †")
    assert rows(page, "pairs")
    assert rows(page, "a plan †")


def test_a_file_of_older_benchmarks_is_read(tmp_path):
    page = report.page({"old": OLD})
    assert rows(page, "decode step")[0][-1] == "SDPA 1.50"
    assert "**step** †" in page
    assert rows(page, "*sum of the stages*") == [["*sum of the stages*", "990 ms", "99 %"]]
    assert report.page({"empty": {"device": "x", "cases": {}}}).count("## x\n") == 1


def test_charts_are_the_same_whenever_the_numbers_are(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        report.draw("chip", CONTENT, folder)
    drawn = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert drawn == [f"chip-{kind}.svg" for kind in ("peers", "roofline", "scaling", "stages")]
    for name in drawn:
        text = (tmp_path / "a" / name).read_text(encoding="utf-8")
        assert text == (tmp_path / "b" / name).read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in text
    assert "slow peer" in (tmp_path / "a/chip-peers.svg").read_text(encoding="utf-8")
    report.draw("empty", {"device": "x", "cases": {}}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_claim_is_the_files_number():
    said = [
        Claim("gates", GPU, "gate", "slow peer", "a gate"),
        Claim("gates", GPU, "gate", "fast peer"),
        Claim("gates", GPU, "gate", "", "a gate", "peak_bytes", shown_as="bytes"),
        Claim("nowhere", GPU, "none", "peer"),
        Claim("on a CPU", CPU, "gate", "peer"),
    ]
    lines = claims.tables([CONTENT], said).splitlines()
    assert lines[0] == "| A made-up chip | times as fast as |"
    assert lines[2:4] == [
        "| gates | slow peer 2.52 · fast peer **0.800** · 2,000,000 bytes |",
        "| nowhere | unmeasured |",
    ]
    assert lines[-1] == "On a CPU: unmeasured."
    two = two_ratios()
    assert "peer **0.500** to 1.50" in claims.tables([two], [Claim("x", GPU, "gate", "peer")])
    assert "| x | 10.0 to 20.0 % MFU |" in claims.tables(
        [two], [Claim("x", GPU, "gate", "", "", "mfu", shown_as="MFU")]
    )


def test_a_claim_of_older_code_is_marked():
    said = [Claim("loss", GPU, "loss", "peer"), Claim("gate", GPU, "gate", "slow peer")]
    lines = claims.tables([CONTENT], said).splitlines()
    assert lines[2:4] == ["| loss † | peer 2.00 |", "| gate | slow peer 2.52 |"]
    assert lines[-1] == "† measured with older code."
    assert "†" not in claims.tables([CONTENT], said[1:])


@pytest.mark.parametrize(("where", "device"), [(GPU, "cuda"), (CPU, "cpu")])
def test_every_claim_is_of_a_case_that_is_there(where, device):
    cases = all_cases(torch.device(device), full=True)
    for claim in claims.CLAIMS:
        if claim.where == where:
            chosen = [case for case in cases if case.group == claim.group and claim.part in case.name]
            assert chosen, claim
            assert {claim.ours, claim.contender or claim.ours} <= {name for case in chosen for name in case.contenders}


def two_ratios() -> dict[str, Any]:
    ours = {0.5: timed(1.0, mfu=0.1), 1.5: timed(1.0, mfu=0.2)}
    cases = {str(n): record("gate", {"ours": of, "peer": peer(n, n)}) for n, of in ours.items()}
    return CONTENT | {"cases": cases}


def test_the_readme_is_filled_between_its_marks():
    text = f"before\n{report.OPENING}\nold\n{report.CLOSING}\nafter"
    filled = report.fill(text, "new")
    assert filled == f"before\n{report.OPENING}\n\nnew\n\n{report.CLOSING}\nafter"
    assert report.fill(filled, "new") == filled
    with pytest.raises(ValueError, match=r"README\.md has 0 blocks of numbers; it needs one"):
        report.fill("no marks", "new")


def test_a_page_typed_by_hand_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"{report.OPENING}{report.CLOSING}\n", encoding="utf-8")
    for path, text in report.texts({"chip": CONTENT}, tmp_path).items():
        path.write_text(text, encoding="utf-8")
    report.draw("chip", CONTENT, tmp_path / report.CHARTS)
    assert report.differences({"chip": CONTENT}, tmp_path) == []

    page = (tmp_path / report.PAGE).read_text(encoding="utf-8")
    (tmp_path / report.PAGE).write_text(page.replace("2.52", "3.52"), encoding="utf-8")
    (tmp_path / report.CHARTS / "chip-roofline.svg").unlink()
    other = report.drawings("chip", two_ratios())["chip-peers.svg"]
    report.charts.save(other.draw(*other.arguments), tmp_path / report.CHARTS / "chip-peers.svg", other.mark)
    differing, missing, drawn = report.differences({"chip": CONTENT}, tmp_path)
    line = next(n for n, said in enumerate(page.splitlines(), 1) if "2.52" in said)
    assert differing == f"docs/performance.md differs from the results files from line {line}"
    assert missing == "docs/performance/chip-roofline.svg is missing"
    assert drawn == "docs/performance/chip-peers.svg does not draw what the results files hold"


def test_the_pages_say_what_the_committed_files_give(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_the_readme_types_no_performance_by_hand():
    """Ratios, rates, times and utilisation stand between the marks alone; the demo's section is of its own run."""
    text = (report.ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(report.OPENING)
    prose = before + rest.partition(report.CLOSING)[2]
    _, _, after_demo = prose.partition("\n## Why this implementation\n")
    assert after_demo
    ratios = r" × (as|the|`|of|padding)|\d ×(?! <image>)|(\d|several|many) times as|(twice|half) as (fast|much)"
    for typed in (ratios, r"\d (images|tokens|pictures|answers|samples)( a second|/s)", r"MFU"):
        assert not re.search(typed, prose), typed
    assert not re.search(r"\d (ms|µs|s|seconds)\b", after_demo)


def test_files_are_read_gpus_first(tmp_path):
    for slug, content in {"a-cpu": {"capability": "x86_64"}, "z-gpu": CONTENT, "b-gpu": OLD}.items():
        (tmp_path / f"{slug}.json").write_text(json.dumps(content), encoding="utf-8")
    assert list(readings.load(tmp_path)) == ["b-gpu", "z-gpu", "a-cpu"]
