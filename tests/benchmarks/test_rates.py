"""Rates give a recorded step its time back, whichever form its record has."""

import json
from typing import Any

import pytest

from benchmarks import rates
from benchmarks.results import ROOT
from training import cluster, sharding
from training.cluster import Rates
from training.config import aligngpt_7b
from training.flops import count_flops

CASE = "step at 7B shapes, finetune, 16384 tokens, checkpointing selective"


def recorded() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results/nvidia-h200.json").read_text(encoding="utf-8"))


def test_a_recorded_step_is_predicted_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    results = recorded()
    found = rates.rates(results)
    assert found is not None
    name = results["device"]
    monkeypatch.setattr(cluster, "known_rates", lambda: {name: Rates(device=name, **found)})
    steps = [(match, case) for at, case in results["cases"].items() if (match := rates.NAME.match(at))]
    assert steps
    for match, case in steps:
        ours, stage = case["contenders"]["ours"], match["stage"]
        model = sharding.build(rates.LLAMA_7B._replace(layers=ours["layers"]).config())
        sharding.freeze(model, aligngpt_7b(stage).model.train)  # type: ignore[arg-type]
        flops = count_flops(model)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        predicted = cluster.cost_on(name, stage, match["checkpointing"], flops, trained)  # type: ignore[arg-type]
        assert predicted is not None
        tokens, images = ours["tokens"], ours["images"]
        but_head = flops.of(tokens=tokens, supervised_tokens=0, images=images)
        supervised = (ours["flops"] - but_head) / flops.supervised_token
        assert 0 < supervised < tokens
        seconds = predicted[0].of(cluster.Work(1, tokens, supervised, images))
        assert seconds == pytest.approx(sum(rates.stage_seconds(ours).values()), rel=0.02)
        assert seconds == pytest.approx(ours["us"] / 1e6, rel=0.06)


def test_both_forms_of_a_record_say_the_same() -> None:
    old = {"stages_ms": {"vision tower": 2.0, "backward": 4.0, "the rest": 1.0}}
    rows = [{"stage": "vision tower", "us": 2000.0, "syncs": 0}, {"stage": "backward", "us": 4000.0}]
    assert rates.stage_seconds(old) == rates.stage_seconds({"stages": rows, "rest": {"the rest": 1000.0}})
    assert rates.read("step lengths, 8 samples", {"flops": 1, "images": 1, "layers": 1} | old) is None
    assert rates.read(CASE, {"flops": 1} | old) is None


def test_other_devices_keep_their_rates() -> None:
    results = recorded()
    without = results | {"device": "another", "cases": {}}
    merged = rates.merge({"another": {"tower": 1.0}}, [results, without])
    assert merged["another"] == {"tower": 1.0}
    assert set(merged) == {"another", results["device"]}


def test_the_shipped_rates_are_those_of_all_recorded_results() -> None:
    """Else: python -m benchmarks.rates benchmarks/results/*.json."""
    files = sorted((ROOT / "benchmarks/results").glob("*.json"))
    shipped = json.loads(rates.RATES.read_text(encoding="utf-8"))
    assert rates.merge({}, [json.loads(file.read_text(encoding="utf-8")) for file in files]) == shipped
    assert set(cluster.known_rates()) == set(shipped)
