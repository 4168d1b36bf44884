"""The kernels compiled for chips that are not there: no spill, shared memory that fits, tensor cores used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CHECK = Path(__file__).with_name("compile_check.py")
FAMILIES = sorted(path.stem for path in (CHECK.parent / "compiled").glob("*.py"))
WITH_DOTS = {"cross_entropy", "decode", "project_and_inject", "projector"}


def compile_family(family: str, *arguments: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, CHECK, family, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(family: str, rows: list[dict]) -> None:
    assert any(row["dot"] for row in rows) == (family in WITH_DOTS)
    assert {row["capability"] for row in rows} >= {80, 90, 100}
    for row in rows:
        assert row["STACK"] + row["LOCAL"] == 0, f"registers are spilled: {row}"
        assert row["REG"] <= 255, row
        assert row["shared"] <= row["shared_limit"], row
        assert not row["dot"] or row["tensor_core"], f"a dot without tensor cores: {row}"


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_fit_their_chips(family):
    check(family, compile_family(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_the_tile_tables_fits_its_chip(family):
    check(family, compile_family(family, "--all"))
