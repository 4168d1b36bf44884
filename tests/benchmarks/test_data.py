"""Sweeps over records: the sets are alike in all their forms, points are right, and a full run goes on to a million."""

import gc
from collections import defaultdict

import pytest
import torch

from aligngpt.data.records import open_records
from aligngpt.data.shards import scan_tars
from benchmarks import bench_data, sets
from benchmarks.case import check
from benchmarks.run import all_cases

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    gc.freeze()  # each case collects garbage
    yield
    gc.unfreeze()


def test_sets_hold_the_same_records(monkeypatch):
    monkeypatch.setattr(sets, "PER_SHARD", 64)
    packed, plain = open_records(sets.packed_folder(130)), open_records(sets.json_file(130))
    assert list(packed) == list(plain)
    assert packed.num_characters.sum() == plain.num_characters.sum() == sets.characters(130)
    # The tars themselves, without the index.
    assert [found.record["id"] for found in scan_tars(sets.packed_folder(130))] == [sample.id for sample in plain]


def by_sweep(cases):
    found = defaultdict(list)
    for case in cases:
        found[case.name.rpartition(", ")[0]].append(case)
    return found


@pytest.mark.parametrize(
    "case", [cases[-1] for cases in by_sweep(bench_data.small_cases()).values()], ids=lambda case: case.name
)
def test_each_point_is_right_before_it_is_timed(case):
    inputs = case.make(CPU)
    ((name, contender),) = case.contenders.items()
    run = contender.prepare(inputs)
    assert "wrong" not in (found := check(case, name, inputs, run, case.plain(inputs), case.exact(inputs))), found
    found = contender.details(run, inputs, 1.0)
    assert all(field == "us" or found[field] > 0 for field in found["grows"])


def test_a_full_run_goes_on_to_a_million():
    usual, full = (
        by_sweep(case for case in all_cases(CPU, full) if case.file == "bench_data") for full in (False, True)
    )
    assert usual.keys() == full.keys() == by_sweep(bench_data.small_cases()).keys()
    for name, cases in full.items():
        points = [case.sweep[1] for case in cases]
        assert points == sorted(set(points))
        assert len(points) >= 4
        assert points[-1] == 10**6 or "JSON" in name or "packing" in name
        assert {case.name for case in usual[name]} <= {case.name for case in cases}
