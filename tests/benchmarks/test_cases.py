"""Every contender of ours, called as the cases call it, by Triton's interpreter on small shapes in float32.

What the cases assert on a GPU is asserted here: within twice the plain path's error of float64, or equal.
"""

import dataclasses

import pytest
import torch

from benchmarks import bench_chain, bench_decode, bench_gate, bench_injection, bench_loss, bench_projector
from benchmarks.case import Case, check, simple
from benchmarks.measure import compare

FILES = (bench_chain, bench_decode, bench_loss)
SMALL = [(file, case) for file in FILES for case in file.small_cases()]
# Of those that come forward and forward + backward, the latter.
SMALL += [(bench_projector, bench_projector.small_cases()[-1]), (bench_gate, bench_gate.small_cases()[-1])]
SMALL += [(bench_injection, case) for case in bench_injection.small_cases() if "backward, packed" in case.name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="`make bench-gpu` checks them at full size")
@pytest.mark.parametrize(("file", "case"), SMALL, ids=[case.name for _, case in SMALL])
def test_ours_is_right_by_triton(file, case: Case, monkeypatch):
    monkeypatch.setattr(file, "our_impl", lambda x: "triton")
    device = torch.device("cpu")
    inputs = case.make(device)
    exact, plain = case.exact(inputs), case.plain(inputs)
    for name, contender in case.contenders.items():
        if name.startswith("ours") and not contender.gpu_only:
            assert "wrong" not in (found := check(case, name, inputs, contender.prepare(inputs), plain, exact)), found


def test_a_peer_may_add_one_by_one_and_ours_may_not():
    exact = [torch.full((100,), 1.0, dtype=torch.float64)]
    plain, off = [torch.full((100,), 1.0)], [torch.full((100,), 1.0 + 2e-6)]
    assert compare(off, plain, exact, 8)[1] is not None
    assert compare(off, plain, exact, 8, terms=2000)[1] is None
    assert compare([off[0] + 2e-6], plain, exact, 8, terms=2000)[1] is not None
    case = Case("sums", lambda device: None, {}, lambda x: exact, lambda x: plain, 0, 0, terms=2000)
    for name, is_wrong in (("peer", False), ("ours", True)):
        one = dataclasses.replace(case, contenders={name: simple(lambda x: off)})
        assert ("wrong" in check(one, name, None, lambda: off, plain, exact)) == is_wrong
