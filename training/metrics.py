"""What a run says about itself, once a step: RUN/metrics.jsonl, a progress bar, TensorBoard and W&B, all from rank 0.

A line of metrics.jsonl is a JSON object; a number that does not exist, or is not finite, is null:

    step                    from 1
    epoch, lr
    loss                    sum over supervised tokens / their number, over the global batch
    grad_norm               before clipping
    tokens                  all but padding; supervised_tokens of them carry loss
    tokens_per_second
    mfu                     FLOPs of the step / (seconds x the devices' peak); null on a CPU
    seconds, data_seconds   of the step; rank 0 waited for its loader for so much of it
    peak_memory_bytes       of rank 0's device so far, or of its process on a CPU
    dropped_samples, skipped_steps      so far
    micro_batches           of each process
    loss_by_level           [N] mean loss of the samples of each level, with tokens_by_level [N]; null without levels
    gate_weights            [N-1] mean weights of the local levels, over samples; null where no gate ran

The numbers that lie on the devices are summed there by `StepSums` and cross to the host once a step.
"""

import importlib
import json
import math
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from aligngpt.batch import Batch
from aligngpt.data.tables import whole_file
from aligngpt.model import AlignGPTOutput
from training.config import LogConfig, TrainConfig, to_json
from training.sharding import World

FILE = "metrics.jsonl"

# Dense bf16 by the words of a device's name, the narrower name first. From NVIDIA's data sheets, which for the newer
# ones state the double, with sparsity.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "GH200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "A10": 125,
    "L4": 121,
}

Writer = Callable[[int, dict[str, float]], None]  # takes a step (from 1) and its numbers by tag


class StepSums:
    """A step's sums over its micro-batches, kept on the device: `add` never waits for it, `reduce` does, once."""

    def __init__(self, num_levels: int, device: torch.device | str):
        self.num_levels = num_levels
        self.sums = torch.zeros(3 * num_levels + 1, dtype=torch.float64, device=device)
        sizes = 1, num_levels, num_levels, num_levels - 1, 1
        self.loss, self.level_loss, self.level_tokens, self.gate_weights, self.gate_samples = self.sums.split(sizes)

    @torch.no_grad()
    def add(self, batch: Batch, output: AlignGPTOutput) -> None:
        """Take in a micro-batch, on the device, and what the model made of it. A text alone counts in the loss only."""
        plan, token_loss = batch.plan, output.token_loss  # (R,) of the supervised rows
        assert output.loss is not None
        self.loss += output.loss
        if batch.align_levels is not None:
            assert token_loss is not None
            # A row's sample is -1 in a text alone, which picks the -1 at the end: no level.
            row_level = F.pad(batch.align_levels, (0, 1), value=-1)[plan.token_sample[batch.rows].long()]
            of_level = row_level == torch.arange(self.num_levels, device=row_level.device)[:, None]  # (N, R)
            self.level_loss += torch.where(of_level, token_loss, 0).sum(1, dtype=torch.float64)
            self.level_tokens += of_level.sum(1)
        if output.align_weights is not None:
            exists = plan.align_place >= 0  # (S,)
            self.gate_weights += torch.where(exists[:, None], output.align_weights, 0).sum(0, dtype=torch.float64)
            self.gate_samples += exists.sum()

    def reduce(self, world: World, *more: float) -> tuple[Any, ...]:
        """The means over all micro-batches and processes, as a metrics line has them, and the sums of `more`.

        One copy, one all-reduce. It is the host's: the numbers must come there anyway, and no GPU waits for another.
        The loss is taken as the model gives it when `num_items_in_batch` is a process's mean count.
        """
        added = world.add(*more, *self.sums.tolist())
        sums = torch.tensor(added[len(more) :], dtype=torch.float64)
        sizes = [part.numel() for part in (self.loss, self.level_loss, self.level_tokens, self.gate_weights)]
        loss, level_loss, level_tokens, weights, samples = sums.split([*sizes, 1])
        tokens = [int(count) for count in level_tokens.tolist()]
        by_level = [total / count if count else None for total, count in zip(level_loss.tolist(), tokens, strict=True)]
        means = {
            "loss": loss.item() / world.size,
            "loss_by_level": by_level if any(tokens) else None,
            "tokens_by_level": tokens if any(tokens) else None,
            "gate_weights": (weights / samples).tolist() if samples else None,
        }
        return means, *added[: len(more)]


class Metrics:
    """Writes a step's line, moves the bar and feeds the writers, as a context. On ranks other than 0 it does nothing.

    Raises:
        ValueError: W&B does not take the run, or `check_log` was not asked and a package is missing.
    """

    def __init__(self, config: TrainConfig, *, first_step: int, total_steps: int, world: World, bar: bool = True):
        self.held = ExitStack()
        self.enabled = world.rank == 0
        self.peak_tflops = config.log.peak_tflops or peak_tflops(world.device)
        self.num_devices = world.size
        self.writers: list[Writer] = []
        if not self.enabled:
            return
        from tqdm import tqdm

        run_dir = Path(config.run_dir)
        rewrite(run_dir / FILE, lines_until(run_dir / FILE, first_step))
        self.file = self.held.enter_context((run_dir / FILE).open("a", encoding="utf-8"))
        if config.log.tensorboard:
            self.writers.append(self.held.enter_context(to_tensorboard(run_dir, first_step)))
        if config.log.wandb:
            self.writers.append(self.held.enter_context(to_wandb(config.log.wandb, run_dir, to_json(config))))
        self.bar = self.held.enter_context(
            tqdm(
                total=total_steps,
                initial=first_step,
                unit="step",
                dynamic_ncols=True,
                disable=not bar,
                file=sys.stderr,
                mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; in a file each drawing is a line
            )
        )

    def step(self, *, step: int, loss: float, tokens: int, seconds: float, flops: float | None, **more: Any) -> None:
        """One optimizer step's values. flops, tokens: of all processes; `more`: the other fields, already numbers."""
        if not self.enabled:
            return
        mfu = None
        if flops is not None and self.peak_tflops is not None:
            mfu = flops / (seconds * self.peak_tflops * 1e12 * self.num_devices)
        rates = {"tokens_per_second": tokens / seconds, "mfu": mfu}
        line = finite({"step": step, "loss": loss, "tokens": tokens, "seconds": seconds, **rates, **more})
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()
        shown = f"loss {loss:.4f}, {rates['tokens_per_second']:.0f} tok/s" + (f", MFU {mfu:.1%}" if mfu else "")
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        for write in self.writers:
            write(step, scalars(line))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: Any) -> None:
        self.held.__exit__(*error)


def finite(value: Any) -> Any:
    """The same JSON value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """A line's numbers by tag: `train/loss`, and `loss_by_level/3` for what a list holds; nulls are left out."""
    tags: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            tags |= {f"{name}/{place}": item for place, item in enumerate(value) if item is not None}
        elif value is not None and name != "step":
            tags[f"train/{name}"] = value
    return tags


# ---------------------------------------------------------------------------------------------------- writers


def check_log(log: LogConfig, world: World) -> None:
    """Refuse, before the weights are read, what rank 0 cannot write.

    Raises:
        ValueError: in every process, when a flag needs a package that is not there.
    """
    problem = None
    if world.rank == 0:
        wanted = {"tensorboard": log.tensorboard, "wandb": log.wandb}
        problem = next((why for package, value in wanted.items() if value and (why := why_not(package, value))), None)
    problem = world.gather(problem)[0]
    if problem:
        raise ValueError(problem)


def why_not(package: str, value: Any) -> str | None:
    """What keeps `--log.PACKAGE` from working, if the package is missing."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return f"--log.{package} is {value!r}; it needs the package {package}: pip install {package}"
    return None


@contextmanager
def to_tensorboard(run_dir: Path, first_step: int) -> Iterator[Writer]:
    """Curves in RUN/tensorboard; what an earlier process wrote there beyond `first_step` is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1, flush_secs=10) as summary:

        def write(step: int, values: dict[str, float]) -> None:
            for tag, value in values.items():
                summary.add_scalar(tag, value, step)

        yield write


@contextmanager
def to_wandb(project: str, run_dir: Path, config: dict[str, Any]) -> Iterator[Writer]:
    """Curves in a W&B run that is this run folder's: its id is kept in RUN/wandb/id, so a run goes on in it.

    Steps are an axis of their own, because W&B drops what is logged at a step of its own that is past, as the steps
    are that a resumed run takes again.
    """
    import wandb

    file = run_dir / "wandb/id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex, encoding="utf-8")
    try:
        run = wandb.init(
            project=project,
            name=run_dir.name,
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config=config,
        )
    except wandb.Error as error:
        raise ValueError(f"--log.wandb is {project!r}; it needs a W&B that takes the run: {error}") from error
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    try:
        yield lambda step, values: run.log({"step": step, **values})
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


# ---------------------------------------------------------------------------------------------------- devices and files


def peak_tflops(device: torch.device) -> float | None:
    """The device's peak in dense bf16; None for a CPU, a slice of a GPU and what the table does not know."""
    return peak_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_by_name(name: str) -> float | None:
    """The same by the device's name, such as "NVIDIA H100 80GB HBM3"."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((peak for known, peak in PEAK_TFLOPS.items() if words.issuperset(known.split())), None)


def lines_until(path: Path, step: int) -> list[str]:
    """The lines of the steps up to `step` (from 1), which a run that goes on after it keeps; [] without a file.

    A line that a crash cut off or garbled is left out.
    """
    kept: list[str] = []
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                try:
                    text = line.decode()
                    keep = text.endswith("\n") and json.loads(text)["step"] <= step
                except (ValueError, KeyError, TypeError):
                    keep = False
                if keep:
                    kept.append(text)
    return kept


def rewrite(path: Path, lines: list[str]) -> None:
    """Put these lines in the file's place."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
