"""What every benchmark starts from: a fixed seed, and the device and versions beside each time in the saved JSON."""

import platform
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


@pytest.fixture(autouse=True)
def _seed_and_device(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    if "benchmark" in request.fixturenames:
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info |= {"device": device_name(), "torch": torch.__version__}


def pytest_report_header() -> str:
    return f"device: {device_name()}, torch {torch.__version__}"
