"""What every benchmark starts from: a fixed seed, memory that stays, and device and versions beside each saved time."""

import ctypes
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.case import Case, run_case
from benchmarks.requirements import describe


def device_name() -> str:
    """The device that times were taken on, for example "AMD EPYC, 2 threads"."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def pytest_configure() -> None:
    """Keep freed memory. Otherwise every large array is new from the system, whose page faults cost several times the
    work that is timed, and whether a contender pays them is chance."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        m_mmap_max, m_trim_threshold = -4, -1  # <malloc.h>
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


@pytest.fixture(autouse=True)
def _seed_and_device(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    if "benchmark" in request.fixturenames:
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info |= {"device": device_name(), "torch": torch.__version__}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the smallest cases: that all can be measured, in a minute")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test's `case` is each of its file's: 7B's shapes on a GPU, `cpu_cases` on a CPU, `small_cases` for --quick."""
    if "case" not in metafunc.fixturenames:
        return
    file: Any = metafunc.module
    if metafunc.config.getoption("quick"):
        cases = file.small_cases()
    elif torch.cuda.is_available():
        cases = file.cases()
    else:
        cases = getattr(file, "cpu_cases", file.small_cases)()
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture
def in_turns(benchmark) -> Callable[[Case], None]:
    """Checks a case's contenders, times them in turns, prints each, and asserts that ours was right."""

    def run(case: Case) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        results = run_case(case, device, seconds=0.5)
        record = {"bytes": case.bytes, "flops": case.flops, "contenders": results}
        print(f"\n{describe(case.name, record)}", end="")
        benchmark.extra_info |= results
        benchmark.group = case.stage
        ours = next(name for name in case.contenders if name.startswith("ours"))
        assert "us" in results[ours], results[ours]
        benchmark.pedantic(case.contenders[ours].prepare(case.make(device)), rounds=5, warmup_rounds=2)

    return run


def pytest_report_header() -> str:
    return f"device: {device_name()}, torch {torch.__version__}"
