"""`pytest benchmarks`: every case of every file, its contenders timed in turns, as rows of pytest-benchmark.

A row is a contender of a case, made of the very samples that run_case took in turns (on a GPU those of CUDA events),
in the group of its case's stage, with its record beside it. Who is absent, wrong or too noisy is no row; the summary
names them, and every contender that is faster than ours.

Runs are saved into .benchmarks, those of --quick into .benchmarks/quick, with device, versions, commit and what the
device reaches, so that --benchmark-compare shows the last run beside this one.
"""

import gc
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from benchmarks.case import Case, InTurns, run_case
from benchmarks.measure import Ceilings, Timing, ceilings, keep_freed_memory
from benchmarks.requirements import describe, described, exceptions
from benchmarks.results import commit, device_name, versions

STORAGE = "file://./.benchmarks"
COLUMNS = ["median", "iqr", "min", "rounds"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECORDS, TOP = pytest.StashKey[dict[str, dict[str, Any]]](), pytest.StashKey[Ceilings]()
BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the smallest cases: that all can be measured, in a minute")
    parser.addoption(
        "--probe-seconds", type=float, help="of streams and products at the start; otherwise 20, or 1 with --quick"
    )
    parser.addoption("--seconds", type=float, default=540, help="after which no further case begins; default: 540")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()
    config.stash[RECORDS] = {}
    option = config.option
    option.benchmark_columns = option.benchmark_columns or COLUMNS
    if option.benchmark_sort == "min":
        option.benchmark_sort = "name"  # contenders of a case stand together
    if option.benchmark_storage == STORAGE and option.quick:
        option.benchmark_storage += "/quick"
    if option.benchmark_autosave is None and option.benchmark_save is None:
        name = commit()
        option.benchmark_autosave = name[:12] + ("-changed" if name.endswith("+") else "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test's `case` is each of its file's: 7B's shapes on a GPU, `cpu_cases` on a CPU, `small_cases` for --quick."""
    if "case" not in metafunc.fixturenames:
        return
    file: Any = metafunc.module
    if metafunc.config.getoption("quick"):
        cases = file.small_cases()
    elif DEVICE.type == "cuda":
        cases = file.cases()
    else:
        cases = getattr(file, "cpu_cases", file.small_cases)()
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported: cases collect garbage, and would look through it each time


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def top(request: pytest.FixtureRequest) -> Ceilings:
    """What the device reaches, measured before the first case."""
    config = request.config
    seconds = config.getoption("probe_seconds")
    if seconds is None:
        seconds = 1.0 if config.getoption("quick") else 20.0
    config.stash[TOP] = ceilings(DEVICE, seconds)
    return config.stash[TOP]


@pytest.fixture
def in_turns(benchmark: Any, top: Ceilings, request: pytest.FixtureRequest) -> InTurns:
    """Checks a case's contenders, times them in turns, makes a row of each, and asserts that those of ours were right.

    Returns their records.
    """

    def run(case: Case) -> dict[str, dict[str, Any]]:
        if time.monotonic() - BEGAN > (seconds := request.config.getoption("seconds")):
            pytest.skip(f"--seconds {seconds:g} are over; make bench-record measures every case, and goes on")
        timings: dict[str, Timing] = {}
        seconds = 0.05 if request.config.getoption("quick") else 0.3
        results = run_case(case, DEVICE, top, seconds=seconds, timings=timings)
        about = ("stage", "group", "items", "unit", "sweep", "bytes", "flops", "clock")
        record = {name: getattr(case, name) for name in about} | {"ceilings": top._asdict(), "contenders": results}
        request.config.stash[RECORDS][case.name] = record
        print(f"\n{describe(case.name, record)}", end="")
        add_rows(benchmark, case, results, timings)
        assert_ours(results)
        return results

    return run


def assert_ours(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Each of ours was right and could be timed, or can't be here; and one was."""
    ours = {name: found for name, found in results.items() if name.startswith("ours")}
    bad = {name: found for name, found in ours.items() if not {"us", "noisy", "absent"} & found.keys()}
    assert not bad, bad
    assert any("absent" not in found for found in ours.values()), ours


def add_rows(
    benchmark: Any, case: Case, results: Mapping[str, Mapping[str, Any]], timings: Mapping[str, Timing]
) -> None:
    """A row of pytest-benchmark for each contender that has a time, from the samples it was taken of.

    Through its fixture's private `_make_stats`, since what is public times calls by itself, one contender at a time.
    """
    benchmark._mode = "in turns"
    if not benchmark.enabled:
        return
    about = {name: getattr(case, name) for name in ("stage", "items", "unit", "sweep", "bytes", "flops")}
    for name, timing in timings.items():
        row = benchmark._make_stats(iterations=1)
        row.group = case.stage
        row.name, row.fullname = f"{case.name}: {name}", f"{benchmark.fullname}: {name}"
        row.extra_info = {**about, "case": case.name, "contender": name, **results[name]}
        for seconds in timing.samples:
            row.update(seconds)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Without what differs from run to run on the same machine, such as the clock's present rate."""
    cpu = machine_info["cpu"]
    machine_info["cpu"] = {name: value for name, value in cpu.items() if not name.startswith("hz_actual")}
    machine_info |= {"device": device_name(), "versions": versions()}


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    commit_info["commit"] = commit()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    if TOP in config.stash:
        output_json["ceilings"] = config.stash[TOP]._asdict()


def pytest_report_header() -> str:
    return f"device: {device_name()}, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if TOP not in config.stash:
        return
    records = config.stash[RECORDS]
    terminalreporter.section("beside ours")
    terminalreporter.line(f"{device_name()}: {described(config.stash[TOP], DEVICE)}")
    for line in exceptions(records):
        terminalreporter.line(line)
