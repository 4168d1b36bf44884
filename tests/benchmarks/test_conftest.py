"""`pytest benchmarks` as users run it: twice, the second time beside the first."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.measure import Ceilings
from benchmarks.results import commit, device_name, versions

WHICH = "align_gate and forward and not text_mean and not backward"
ROOT = Path(__file__).parents[2]
# Whether a loaded machine is too noisy is not this test's matter.
SCRIPT = """
import math, sys
import pytest
from benchmarks import measure

measure.NOISY = math.inf
options = ["benchmarks/bench_gate.py", "--quick", "--probe-seconds=0.05", "-p", "no:cacheprovider", *sys.argv[1:]]
sys.exit(pytest.main(options) or pytest.main([*options, "--benchmark-compare"]))
"""


def test_a_run_is_saved_and_the_next_one_compared_with_it(tmp_path):
    case = "align_gate forward, 16 samples"
    command = [sys.executable, "-c", SCRIPT, "-k", WHICH, f"--benchmark-storage=file://{tmp_path}"]
    # Beside other tests on several cores pytest-benchmark would save nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [*command, f"--benchmark-json={tmp_path}/all.json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    first, second = result.stdout.split("test session starts")[1:]
    saved = sorted(tmp_path.glob("*/*.json"))
    assert [file.name[:5] for file in saved] == ["0001_", "0002_"]

    content = json.loads((tmp_path / "all.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert content["machine_info"]["device"] == json.loads(saved[0].read_text())["machine_info"]["device"]
    assert content["machine_info"]["versions"] == versions()
    assert content["commit_info"]["commit"] == commit()
    assert content["ceilings"].keys() == set(Ceilings._fields)
    assert device.type == "cuda" or content["machine_info"]["device"] == device_name()

    rows = {row["extra_info"]["contender"]: row for row in content["benchmarks"]}
    assert rows.keys() == {"ours", "reference"}
    for name, row in rows.items():
        found, samples = row["extra_info"], row["stats"]["data"]
        assert (row["group"], row["name"], found["case"]) == ("gate", f"{case}: {name}", case)
        assert len(samples) == found["rounds"] == row["stats"]["rounds"]
        assert abs(statistics.median(samples) * 1e6 - found["us"]) < 1e-3
        assert {"bytes", "flops", "items", "unit", "syncs", "peak_bytes", "share_of_ceiling"} <= found.keys()
    pairs = zip(rows["reference"]["stats"]["data"], rows["ours"]["stats"]["data"], strict=True)
    ratio = rows["reference"]["extra_info"]["ratio"]["median"]
    assert abs(ratio - statistics.median(theirs / own for theirs, own in pairs)) < 1e-4
    assert "ratio" not in rows["ours"]["extra_info"]

    assert "this device copies" in first
    assert "reference, torch.compile: absent: it would compile for longer than the rest takes" in first
    assert second.count("(NOW)") == second.count("(0001_") == len(rows)
    for complaint in ("machine_info is different", "was not used", "Can't compare"):
        assert complaint not in said
