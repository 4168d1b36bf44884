"""`--resume` and `--stop-after` of tests/conftest.py: what passed is not run again, what failed runs last."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os

def test_a(): assert "FAIL" not in os.environ
def test_b(): pass
def test_c(): os.environ.get("DIE") and os._exit(1)
def test_d(): pass
"""


@pytest.mark.slow
def test_a_stopped_run_goes_on(tmp_path):
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path / "tests/conftest.py")
    file = tmp_path / "tests/kernels/test_x.py"
    file.write_text(TESTS)

    def pytest_there(*options: str, **environment: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/kernels", "--resume=done"]
        command += options
        result = subprocess.run(command, cwd=tmp_path, env={"PATH": "", **environment}, capture_output=True, text=True)
        return result.returncode, result.stdout

    def ran(output: str) -> str:
        return "".join(re.findall(r"^tests/kernels/test_x.py::test_(\w)", output, re.MULTILINE))

    status, output = pytest_there("--stop-after=0", FAIL="1")
    assert (status, ran(output)) == (2, "a")
    assert "time is up with 3 tests left: run again, and it goes on from here" in output

    status, output = pytest_there(DIE="1")  # with test_c the process ends
    assert (status, ran(output)) == (1, "bc")

    status, output = pytest_there("--stop-after=1000")  # first what has not begun yet
    assert (status, ran(output)) == (0, "dac")

    status, output = pytest_there()  # nothing is left
    assert (status, ran(output)) == (0, "")

    file.write_text(TESTS + "\n")
    status, output = pytest_there()
    assert (status, ran(output)) == (0, "abcd")
