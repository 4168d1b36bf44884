"""A plan's hours beside a run's: the machine's rates are measured, a run is predicted with them, and then it is run.

The rates are those of `--calibrate`, by as many processes as the run has, on drawn samples. The run is the ordinary
command on files: LLaVA's lengths divided, photographs, a tokenizer. Its steps differ from those that were measured in
what they hold, not in kind. What is timed is planning itself; it counts as wrong unless each step has the tokens that
the run's metrics.jsonl says, and the micro-batches.

    predicted_us, measured_us   of a step; the median of the run's, but for its first and last ones
    error                       predicted / measured - 1, of a step: a share, below 0 where too little was predicted
    total_error                 the same of all those steps together

On a GPU the model has the width of 7B. The quick case plans a run and does not run it.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aligngpt.data.llava_json import Sample
from aligngpt.model import AlignGPTForConditionalGeneration
from benchmarks import lengths
from benchmarks.bench_step import LLAMA_7B, SMALL_TOWER, SMALLEST, Size
from benchmarks.case import Case, Contender
from benchmarks.measure import Outputs, Run
from benchmarks.results import ROOT
from training import cluster, loop, sharding
from training.calibrate import Calibration, calibrate
from training.config import Stage, TrainConfig, read_command_line
from training.loader import Order, Part, Samples
from training.metrics import FILE
from training.plan import Lengths, Plan, plan_run, sample_lengths
from training.plan_lines import of_step

# Of the run's steps those between count: in the first ones the loader fills what it keeps in hand, in the last ones it
# has nothing left to do, and neither is so in most of a long run.
STEPS, WARM_UP, LAST = 36, 12, 8
TIMEOUT = 300.0  # seconds of a run
SMALL = Size(4, 4096, 192, 512, 3, 4, SMALL_TOWER, 8, STEPS * 8, 4, 2048, 8)


@dataclass
class Planned:
    """A run on files, what is known of it before, and what it said of its steps."""

    config: TrainConfig
    stage: Stage
    model: Any
    lengths: Lengths
    order: Order
    processes: int
    calibrated: Calibration | None = None
    lines: tuple[dict[str, Any], ...] = ()

    def plan(self) -> Plan:
        return plan_run(
            self.config, self.model, self.lengths, self.order, processes=self.processes, total_steps=self.total_steps
        )

    @property
    def total_steps(self) -> int:
        return self.config.max_steps or self.order.steps_per_epoch

    def predicted(self, plan: Plan | None = None) -> cluster.Prediction:
        found = cluster.predict_run(
            self.config,
            self.stage,
            plan or self.plan(),
            of_step(self.lengths, self.order, self.total_steps),
            self.processes,
            device="this one",
            network=cluster.ASSUMED,
            calibrated=self.calibrated,
        )
        assert found is not None
        return found

    def tokens(self) -> list[int]:
        """Of each step."""
        return [int(self.lengths.tokens[batch].sum()) for batch in self.order.steps(0, self.total_steps)]


def write_files(size: Size, stage: Stage, folder: Path) -> list[str]:
    """A model, its tokenizer, records and photographs; the flags that name them."""
    make = lengths.captions if stage == "pretrain" else lengths.conversations
    samples = make(size.samples, vocabulary=size.vocabulary, scale=size.scale)
    (folder / "photos").mkdir()
    lengths.with_photos(samples, folder / "photos")
    (folder / "records.json").write_text(json.dumps(list(map(record, samples))), encoding="utf-8")
    config, template = size.config(), "plain" if stage == "pretrain" else "chat"
    torch.manual_seed(0)
    AlignGPTForConditionalGeneration(config).to(torch.bfloat16 if GPU else torch.float32).save_pretrained(
        folder / "model"
    )
    lengths.processor(size.vocabulary, scale=size.scale, image_size=size.image_size, template=template).save_pretrained(
        folder / "model"
    )
    flags: dict[str, Any] = {
        "model.init": folder / "model",
        "data.path": folder / "records.json",
        "data.image-folder": folder / "photos",
        "data.template": template,
        "data.max-length": lengths.MAX_LENGTH // size.scale,
        "global-batch-size": size.global_batch,
        "token-budget": size.token_budget,
        "max-steps": size.samples // size.global_batch,
        "save-every": 10**6,
        "run-dir": folder / "run",
    }
    return ["aligngpt-7b" if GPU else "tiny", *(str(word) for name in flags for word in (f"--{name}", flags[name]))]


def record(sample: Sample) -> dict[str, Any]:
    who = {"user": "human", "assistant": "gpt"}
    said = [{"from": who[turn.role], "value": turn.text} for turn in sample.turns]
    image = {"image": sample.images[0]} if sample.images else {}
    return {"id": sample.id, "conversations": said, "align_level": sample.level} | image


def read(stage: Stage, flags: list[str], processes: int) -> tuple[Planned, Samples]:
    """What --dry-run knows of the run that these flags start."""
    config = read_command_line(stage, flags)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, decoder="pil"))
    model = sharding.starting_config(config.model, image_aspect_ratio=config.data.image_aspect_ratio)
    processor = loop.make_processor(config, model)
    samples = loop.read_samples(config, model, processor, rank=0, num_processes=processes)
    order = loop.make_order(config, samples)
    return Planned(config, stage, model, sample_lengths(samples), order, processes), samples


def start(stage: Stage, flags: list[str], processes: int) -> tuple[dict[str, Any], ...]:
    """The run, to its end; its lines of metrics."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    status, output = ended([*command, f"training/{stage}.py", *flags, "--data.decoder", "pil"], environment)
    if status:
        raise RuntimeError(f"the run ended with status {status}: {output[-300:]}")
    file = Path(flags[flags.index("--run-dir") + 1]) / FILE
    return tuple(json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())


def ended(command: list[str], environment: dict[str, str], timeout: float = TIMEOUT) -> tuple[int, str]:
    """Status and output of a command, when it has ended; with what it started it ends after `timeout` seconds, or when
    this process does.

    Raises:
        TimeoutExpired: it did not end by itself.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # until nobody holds its output any more
        raise
    return process.returncode, said


def end_with_parent() -> None:
    """SIGTERM when the parent is gone, at which torchrun ends its processes and training itself."""
    pr_set_pdeathsig = 1  # <sys/prctl.h>
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def planned_and_run(size: Size, stage: Stage, processes: int) -> Planned:
    """With what the run said; it takes some ten seconds."""
    with tempfile.TemporaryDirectory() as folder:
        flags = write_files(size, stage, Path(folder))
        planned, _ = read(stage, flags, processes)
        pictures = [str(file) for file in sorted(Path(folder, "photos").iterdir())]
        planned.calibrated = calibrate(
            planned.config, stage, planned.model, planned.lengths, processes=processes, pictures=pictures
        )
        planned.lines = start(stage, flags, processes)
    return planned


def planned_and_read(size: Size, stage: Stage) -> Planned:
    """With what the run's loader makes of the data, in the place of a run."""
    with tempfile.TemporaryDirectory() as folder:
        planned, samples = read(stage, write_files(size, stage, Path(folder)), 1)
        parts = [Part(0, batch.tolist()) for batch in planned.order.steps(0, planned.total_steps)]
        loaded = [found.batches or [] for found in map(samples.__getitem__, parts)]
    planned.calibrated = Calibration(cluster.Cost(0.1, 0, 1e-4, 0, 1e-3, communicates=True), {}, 1, 1)
    planned.lines = tuple(
        {"tokens": sum(batch.num_tokens for batch in batches), "micro_batches": len(batches)} for batches in loaded
    )
    return planned


def counts(tokens: list[int], micro_batches: int) -> Outputs:
    return [torch.tensor([*tokens, micro_batches], dtype=torch.float64)]


def plan_again(planned: Planned) -> Run:
    def run() -> Outputs:
        plan = planned.plan()
        planned.predicted(plan)
        return counts(planned.tokens(), plan.batches.micro_batches)

    return run


def of_the_run(planned: Planned) -> Outputs:
    return counts([line["tokens"] for line in planned.lines], max(line["micro_batches"] for line in planned.lines))


def compared(run: Run, planned: Planned, seconds: float) -> dict[str, Any]:
    """Of the prediction and what came."""
    predicted, spent = planned.predicted().seconds, [line["seconds"] for line in planned.lines[WARM_UP:-LAST]]
    measured = statistics.median(spent)
    calibrated = planned.calibrated
    assert calibrated is not None
    return {
        "predicted_us": round(1e6 * predicted, 1),
        "measured_us": round(1e6 * measured, 1),
        "error": round(predicted / measured - 1, 4),
        "total_error": round(predicted * len(spent) / sum(spent) - 1, 4),
        "calibration_error": round(calibrated.error, 4),
        "threads": calibrated.threads,
    }


def plan_case(size: Size, stage: Stage, processes: int, *, run: bool = True) -> Case:
    name = f"plan of {stage}, {processes} process{'es' if processes > 1 else ''}"
    if not run:
        name += ", not run"

    @functools.cache
    def make() -> Planned:
        return planned_and_run(size, stage, processes) if run else planned_and_read(size, stage)

    return Case(
        name=name,
        make=lambda device: make(),
        contenders={"ours": Contender(plan_again, details=compared if run else None)},
        exact=of_the_run,
        plain=of_the_run,
        equal=True,
        stage="plan",
        items=1,
        unit="plans",
        group="plan",
        clock="host",
        rounds=3,
        trains=True,
        one_copy=True,
    )


GPU = torch.cuda.is_available()


def cases() -> list[Case]:
    return [plan_case(LLAMA_7B._replace(layers=2, samples=STEPS * 32), stage, 1) for stage in ("pretrain", "finetune")]


def cpu_cases() -> list[Case]:
    return [plan_case(SMALL, "finetune", 2)]


def full_cases() -> list[Case]:
    return [plan_case(SMALL, "pretrain", 1), *cpu_cases()]


def small_cases() -> list[Case]:
    return [plan_case(SMALLEST._replace(samples=64), "pretrain", 1, run=False)]


def test_plan(in_turns: Callable[[Case], None], case: Case) -> None:
    in_turns(case)
