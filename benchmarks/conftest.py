"""What every benchmark starts from: a fixed seed, memory that stays, and device and versions beside each saved time."""

import ctypes
import platform
import sys
from pathlib import Path

import pytest
import torch


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


def pytest_report_header() -> str:
    return f"device: {device_name()}, torch {torch.__version__}"
