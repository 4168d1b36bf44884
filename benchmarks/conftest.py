"""What every benchmark starts from: a fixed seed, memory that stays, and device and versions beside each saved time."""

import ctypes
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.case import Case, run_case


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


@pytest.fixture
def in_turns(benchmark) -> Callable[[Case], None]:
    """Checks a case's contenders, times them in turns, prints each, and asserts that ours was right.

    pytest-benchmark's own table has ours alone, by wall time. On a CPU ours is the PyTorch reference.
    """

    def run(case: Case) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        results = run_case(case, device, seconds=0.5)
        path = "GPU time" if device.type == "cuda" else "CPU time, ours by the reference path"
        print(f"\n{case.name}, {path}", end="")
        for name, result in results.items():
            said = f"{result['us']:.1f} µs" if "us" in result else "; ".join(f"{k}: {v}" for k, v in result.items())
            print(f"\n  {name:<32}{said}", end="")
            benchmark.extra_info[name] = result
        benchmark.group = f"{case.name}, {path}"
        ours = next(name for name in case.contenders if name.startswith("ours"))
        assert "us" in results[ours], results[ours]
        benchmark.pedantic(case.contenders[ours].prepare(case.make(device)), rounds=5, warmup_rounds=2)

    return run


def pytest_report_header() -> str:
    return f"device: {device_name()}, torch {torch.__version__}"
