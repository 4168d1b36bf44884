"""The benchmark of plans starts a run, and does not leave it behind."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks import bench_plan


def test_a_run_that_does_not_end_is_ended_with_all_it_started():
    """Its output is read to the end, which comes when nobody holds it any more."""
    child = "import time; time.sleep(200)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        bench_plan.ended([sys.executable, "-c", script], dict(os.environ), timeout=1.0)
    assert time.monotonic() - started < 150


def test_status_and_output_of_a_run_are_said():
    assert bench_plan.ended([sys.executable, "-c", "print(3); exit(5)"], dict(os.environ)) == (5, "3\n")
