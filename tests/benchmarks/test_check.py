"""When benchmarks.check fails, and when not: on made-up samples of made-up cases."""

import json
import sys
from collections.abc import Sequence
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import check
from benchmarks.case import Case


def drawn(ratio: float, spread: float, rounds: int = 100) -> np.ndarray:
    """Ratios of pairs of rounds, whose logarithms lie as those of a normal distribution, around this median."""
    places = (np.arange(rounds) + 0.5) / rounds
    return ratio * np.exp([spread * NormalDist().inv_cdf(place) for place in places])


def contenders(samples: Sequence[float], **ours: Any) -> dict[str, Any]:
    """What run_case records of a peer with these ratios."""
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75])
    peer = {"us": median, "rounds": len(samples), "ratio": {"median": median, "low": low, "high": high}}
    return {"ours": {"us": 1.0, **ours}, "peer": peer}


class Measured:
    """A measuring function that gives one record after the other, the last again and again."""

    def __init__(self, *records: dict[str, Any]):
        self.records, self.asked = list(records), []

    def __call__(self, case: Case, seconds: float) -> dict[str, Any]:
        self.asked.append(seconds)
        return self.records.pop(0) if len(self.records) > 1 else self.records[0]


def run(measured: Measured, recorded: dict[str, Any] | None = None, **more: Any) -> tuple[list[check.Verdict], str]:
    said: list[str] = []
    recorded = recorded or {"peer": {"ratios": [2.0, 2.02, 1.98], "stable": True}}
    content = {"checks": {"cases": {"a case": recorded}}}
    cases: Any = [SimpleNamespace(name="a case")]
    again = more.pop("again", measured)
    return check.check(content, more.pop("cases", cases), measured, again, said.append, **more), "\n".join(said)


def test_a_ratio_that_held_is_measured_once():
    measured = Measured(contenders(drawn(1.95, 0.1)))
    failed, said = run(measured)
    assert failed == []
    assert measured.asked == [check.SECONDS]
    assert "a case: peer: 1.9" in said
    assert said.endswith("recorded 2: held")


def test_a_fallen_ratio_fails_after_it_was_measured_for_longer():
    measured, again = (Measured(contenders(drawn(1.7, 0.05))) for _ in range(2))
    failed, said = run(measured, again=again)
    assert [(verdict.case, verdict.contender) for verdict in failed] == [("a case", "peer")]
    assert measured.asked == [check.SECONDS]
    assert again.asked == list(check.LONGER)
    assert "1.7" in said
    assert said.endswith("recorded 2: FELL")


def test_a_ratio_that_only_looked_fallen_does_not_fail():
    measured = Measured(contenders(drawn(1.7, 0.02)), contenders(drawn(2.0, 0.02)))
    failed, said = run(measured)
    assert failed == []
    assert measured.asked == [check.SECONDS, check.LONGER[0]]
    assert said.endswith("held")


def test_noise_is_told_of_and_no_failure():
    failed, said = run(Measured(contenders(drawn(1.75, 0.5, rounds=9))))
    assert failed == []
    assert said.endswith("too noisy to say")
    noisy = {"ours": {"noisy": "its middle half spreads", "rounds": 9}, "peer": {"us": 1.0}}
    failed, said = run(Measured(noisy))
    assert failed == []
    assert "ours: noisy: its middle half spreads" in said


def test_the_interval_holds_the_median_as_often_as_it_says():
    """Also where neighbouring rounds are disturbed together: 600 of them, in nine spells."""
    held = 0
    random = np.random.default_rng(0)
    for _ in range(400):
        rounds = np.repeat(random.normal(2.0, 0.2, check.INDEPENDENT), 67) + random.normal(0, 0.05, 603)
        low, median, high = np.quantile(rounds, [0.25, 0.5, 0.75])
        found = check.interval({"rounds": 603, "ratio": {"median": median, "low": low, "high": high}})
        held += found.low <= 2.0 <= found.high
    assert 0.9 <= held / 400 <= 0.98
    few, many = (check.interval({"rounds": n, "ratio": {"median": 2, "low": 1.9, "high": 2.1}}) for n in (4, 9))
    assert few.high - few.low == pytest.approx(1.5 * (many.high - many.low))


def test_who_is_gone_is_named():
    failed, said = run(Measured({"ours": {"us": 1.0}, "peer": {"absent": "it is not installed"}}))
    assert failed == []
    assert "peer: not checked, absent: it is not installed" in said
    failed, said = run(Measured(), cases=[])
    assert failed == []
    assert "there is no such case any more" in said
    failed, said = run(Measured(), budget=-1)
    assert failed == []
    assert "-1 seconds are over" in said


def test_ours_being_wrong_fails():
    failed, _ = run(Measured({"ours": {"wrong": "result 0 is off"}, "peer": {"us": 1.0}}))
    assert [verdict.said for verdict in failed] == ["wrong: result 0 is off"]


def test_waits_and_bytes_may_not_grow():
    kept = {"syncs": 0, "peak_bytes": 1000}
    right = contenders(drawn(2.0, 0.01), syncs=0, peak_bytes=1050)
    assert run(Measured(right), kept)[0] == []
    more = contenders(drawn(2.0, 0.01), syncs=1, peak_bytes=1200)
    failed = [(verdict.contender, verdict.said) for verdict in run(Measured(more), kept)[0]]
    assert failed == [("ours, syncs", "1, recorded 0"), ("ours, peak_bytes", "1200, recorded 1000")]


def test_what_sittings_agree_on_is_stable():
    sittings = [
        {
            "long": {"seconds": 31.0, "peer": 3.0},
            "a": {"seconds": 10.0, "steady": 2.0 + wobble, "jumping": 2.0 + 3 * wobble, "syncs": 0, "peak_bytes": n},
            "b": {"seconds": 1.0, "peer": 1.0},
        }
        for n, wobble in enumerate((0.0, 0.08, -0.08))
    ]
    del sittings[2]["b"]
    said: list[str] = []
    found = check.merged(sittings, said.append)
    assert said == [
        "b: left out, not every sitting could time it",
        "long: left out, the cases before it take 40 seconds",
    ]
    assert found == {
        "a": {
            "steady": {"ratios": [2.0, 2.08, 1.92], "stable": True},
            "jumping": {"ratios": [2.0, 2.24, 1.76], "stable": False},
            "syncs": 0,
        }
    }
    assert "not checked, sittings differed: jumping" in run(Measured(contenders(drawn(2, 0.1))), found["a"])[1]


def test_a_sitting_leaves_out_what_takes_long():
    cases: Any = [SimpleNamespace(name=name) for name in ("short", "long", "wrong")]
    slow = {"ours": {"us": 2e5}, "peer": {"us": 4e5, "ratio": {"median": 2.0}}}
    records = [contenders([2.0, 2.0, 2.0], syncs=0), slow, {"ours": {"wrong": "off"}}]
    said: list[str] = []
    found = check.sitting(cases, Measured(*records), said.append)
    assert found == {"short": {"peer": 2.0, "syncs": 0, "seconds": pytest.approx(0, abs=10)}}
    assert said == ["long: left out, a call takes 200 ms", "wrong: left out, wrong: off"]


def test_sittings_are_recorded_and_what_was_recorded_elsewhere_is_not_checked(tmp_path, monkeypatch, capsys):
    """`--record`, then a fall on that device, then another device."""
    found = json.dumps({"a case": {"seconds": 1.0, "peer": 2.0, "syncs": 0}})
    monkeypatch.setattr(check, "sit", lambda file: file.write_text(found, encoding="utf-8"))
    monkeypatch.setattr(check, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(check, "device_name", lambda: "a machine, 2 threads")
    monkeypatch.setattr(check, "candidates", lambda device: [SimpleNamespace(name="a case")])
    fallen = Measured(contenders(drawn(1.5, 0.01), syncs=0))
    monkeypatch.setattr(check, "measurer", lambda device: fallen)
    monkeypatch.setattr(check, "apart", fallen)
    arguments = ["check", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--record", "3"])
    assert check.main() == 0
    path = tmp_path / "a-machine-2-threads.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    checks = recorded["checks"]
    assert checks["cases"] == {"a case": {"peer": {"ratios": [2.0] * 3, "stable": True}, "syncs": 0}}
    assert checks["machine"] == check.machine(torch.device("cpu"))
    assert recorded["cases"] == {}
    assert "1 of 1 ratios are stable" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", arguments)
    assert check.main() == 1
    out = capsys.readouterr().out
    assert "FAILED: a case: peer: 1." in out
    with monkeypatch.context() as patched:
        patched.setattr(check, "machine", lambda device: {"torch": "9.9", "model": "3"})
        assert check.main() == 0
    out = capsys.readouterr().out
    assert "nothing is checked" in out
    assert "this is {'torch': '9.9', 'model': '3'}" in out
    monkeypatch.setattr(check, "device_name", lambda: "another machine")
    assert check.main() == 0
    assert "no ratio was recorded on 'another machine' (recorded: a machine, 2 threads)" in capsys.readouterr().out


def test_candidates_are_short_stages_of_this_device():
    cases = check.candidates(torch.device("cpu"))
    assert {case.stage for case in cases} == set(check.STAGES)
    contenders = {name for case in cases for name in case.contenders}
    assert "reference" not in contenders  # there it is our own code
    assert "concatenating" in contenders
    assert not any("torch.compile" in name for name in contenders)


def test_a_case_is_measured_again_in_a_process_of_its_own(monkeypatch, tmp_path):
    """Here with the process's arguments taken by this one."""
    measured = Measured({"ours": {"us": 1.0}})
    monkeypatch.setattr(check, "candidates", lambda device: [SimpleNamespace(name=name) for name in ("a", "b")])
    monkeypatch.setattr(check, "measurer", lambda device: measured)
    monkeypatch.setattr(check, "keep_freed_memory", lambda: None)

    def run(command: Sequence[str], check: bool) -> None:
        monkeypatch.setattr(sys, "argv", command[2:])
        assert main() == 0

    main = check.main
    monkeypatch.setattr(check.subprocess, "run", run)
    case: Any = SimpleNamespace(name="b")
    assert check.apart(case, 2.0) == {"ours": {"us": 1.0}}
    assert measured.asked == [2.0]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (check.Interval(1.0, 0.95, 1.05), "held"),
        (check.Interval(0.95, 0.80, 1.1), "held"),
        (check.Interval(0.85, 0.80, 0.91), "noisy"),
        (check.Interval(0.85, 0.80, 0.89), "fell"),
        (check.Interval(3.0, 2.9, 3.1), "held"),
    ],
)
def test_a_fall_is_one_of_the_whole_interval(found, said):
    assert check.judge(1.0, found) == said
