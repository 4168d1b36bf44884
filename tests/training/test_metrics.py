"""What a run says about itself: sums by level and of the gate against samples one by one, the lines, the writers."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aligngpt.batch import Batch, Example, collate
from aligngpt.model import AlignGPTForConditionalGeneration, AlignGPTOutput
from aligngpt.text import TokenIds, Tokenized
from training.config import LogConfig, TrainConfig
from training.metrics import PEAK_TFLOPS, Metrics, StepSums, check_log, lines_until, peak_by_name

NUM_LEVELS = 8


@dataclass
class FakeWorld:
    """One process of `size`; `others` are the numbers that the others bring to the one sum."""

    rank: int = 0
    size: int = 1
    others: list[list[float]] = field(default_factory=list)
    sums: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def add(self, *values: float) -> list[float]:
        self.sums += 1
        return [sum(column) for column in zip(values, *self.others, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


@pytest.fixture(scope="module")
def model(parts: Any) -> AlignGPTForConditionalGeneration:
    torch.manual_seed(0)
    model = AlignGPTForConditionalGeneration.from_parts(parts.llms["llama"], parts.vision)
    assert model.config.num_align_levels == NUM_LEVELS
    model.model.align_table.data.normal_()  # so that levels, and through the gate's weights samples, differ
    model.model.align_gate.linear_2.weight.data.normal_(std=20)
    return model.train()


def batch_of(model: AlignGPTForConditionalGeneration, *examples: Example) -> Batch:
    config = model.config
    ids = TokenIds(config.image_token_id, config.align_token_id, 0)
    size = config.vision_config.image_size
    return collate(examples, token_ids=ids, rows_per_image=config.image_seq_length, image_size=size)


def make_example(
    model: AlignGPTForConditionalGeneration, seed: int, *, images: int, answer: int, level: int | None
) -> Example:
    """Random text with `answer` supervised tokens at its end."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    words = torch.randint(3, config.text_config.vocab_size, (4 + answer,), generator=rng).tolist()
    media = [config.align_token_id] + [config.image_token_id] * config.image_seq_length * images if images else []
    ids = torch.tensor([1, *media, *words])
    labels = torch.where(torch.arange(len(ids)) < len(ids) - answer, -100, ids)
    gate_mask = (ids < config.text_config.vocab_size) & (labels == -100) & (torch.arange(len(ids)) > 0)
    pixels = torch.randn(images, 3, 28, 28, generator=rng)
    return Example(str(seed), Tokenized(ids, labels, gate_mask, images), pixels, level)


def run_model(model: AlignGPTForConditionalGeneration, batch: Batch, num_items: float) -> AlignGPTOutput:
    return model(**batch.model_inputs(), num_items_in_batch=num_items, use_cache=False)


def reduced(
    model: AlignGPTForConditionalGeneration, ranks: list[list[list[Example]]], num_items: float
) -> dict[str, Any]:
    """What rank 0 has for a step of these ranks' micro-batches."""
    steps = []
    for micro_batches in ranks:
        sums = StepSums(NUM_LEVELS, "cpu")
        for examples in micro_batches:
            batch = batch_of(model, *examples)
            sums.add(batch, run_model(model, batch, num_items))
        steps.append(sums)
    world = FakeWorld(size=len(ranks), others=[sums.sums.tolist() for sums in steps[1:]])
    (means,) = steps[0].reduce(world)  # type: ignore[arg-type]
    assert world.sums == 1
    return means


def test_losses_by_level_are_those_of_the_samples_alone(model: AlignGPTForConditionalGeneration) -> None:
    """Ragged samples, two of one level, one of two images, texts alone beside and instead of them, a dummy."""
    first = make_example(model, 0, images=1, answer=3, level=0)
    text = make_example(model, 1, images=0, answer=5, level=None)
    two_images = make_example(model, 2, images=2, answer=1, level=3)
    other_text = make_example(model, 3, images=0, answer=2, level=None)
    same_level = make_example(model, 4, images=1, answer=6, level=3)
    last = make_example(model, 5, images=1, answer=2, level=7)
    dummy = make_example(model, 6, images=0, answer=0, level=None)
    ranks = [[[first, text, two_images], [other_text]], [[same_level, last], [dummy]]]

    tokens, losses, total = [0] * NUM_LEVELS, [0.0] * NUM_LEVELS, 0.0
    for example in (first, text, two_images, other_text, same_level, last):
        output = run_model(model, batch_of(model, example), 1)
        assert output.loss is not None
        total += output.loss.item()
        if example.level is not None:
            tokens[example.level] += int((example.text.labels != -100).sum())
            losses[example.level] += output.loss.item()
    num_supervised = 3 + 5 + 1 + 2 + 6 + 2
    means = reduced(model, ranks, num_supervised / 2)
    assert means["loss"] == pytest.approx(total / num_supervised, rel=1e-6)
    assert means["tokens_by_level"] == tokens == [3, 0, 0, 7, 0, 0, 0, 2]
    for got, loss, count in zip(means["loss_by_level"], losses, tokens, strict=True):
        assert got == (pytest.approx(loss / count, rel=1e-6) if count else None)
    assert means["gate_weights"] is None  # the texts alone went by the gate, and had none

    only_texts = reduced(model, [[[other_text]], [[dummy]]], 1)
    assert only_texts["loss_by_level"] is only_texts["tokens_by_level"] is only_texts["gate_weights"] is None
    assert reduced(model, [[[dummy]]], 1)["loss"] == 0


def test_gate_weights_are_the_mean_over_samples(model: AlignGPTForConditionalGeneration) -> None:
    with_image = [make_example(model, seed, images=1 + seed % 2, answer=seed, level=None) for seed in (1, 2, 3)]
    text = make_example(model, 4, images=0, answer=2, level=None)
    alone = [run_model(model, batch_of(model, example), 1).align_weights for example in with_image]
    expected = torch.cat([weights.detach().double() for weights in alone if weights is not None]).mean(0)
    assert expected.max() - expected.min() > 0.05
    means = reduced(model, [[[with_image[0], text, with_image[1]], [text]], [[text], [with_image[2]]]], 5)
    assert means["gate_weights"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert math.fsum(means["gate_weights"]) == pytest.approx(1, rel=1e-6)
    assert means["loss_by_level"] is means["tokens_by_level"] is None


def test_adding_never_waits_for_the_device(model: AlignGPTForConditionalGeneration) -> None:
    """A meta tensor has no value, so whatever would bring one to the host fails."""
    levelled = batch_of(model, make_example(model, 0, images=1, answer=3, level=0))
    gated = batch_of(model, make_example(model, 0, images=1, answer=3, level=None))
    sums = StepSums(NUM_LEVELS, "meta")
    for batch in (levelled, gated):
        output = run_model(model, batch, 1)
        tensors = {name: output[name].to("meta") for name in ("loss", "token_loss", "align_weights") if name in output}
        sums.add(batch.to("meta"), AlignGPTOutput(**tensors))
    assert sums.sums.shape == (3 * NUM_LEVELS + 1,)
    with pytest.raises(NotImplementedError):
        sums.sums.tolist()


# ---- the lines, and who else gets them -------------------------------------------------------------------------------

STEP: dict[str, Any] = {"loss": 2.5, "tokens": 1000, "seconds": 0.5, "flops": 3e13, "lr": 1e-3}


def metrics_of(run_dir: Path, first_step: int = 0, *, world: FakeWorld | None = None, **log: Any) -> Metrics:
    config = TrainConfig(run_dir=str(run_dir), log=LogConfig(**log))
    return Metrics(config, first_step=first_step, total_steps=9, world=world or FakeWorld())  # type: ignore[arg-type]


def test_lines_are_json_whatever_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    with metrics_of(tmp_path, world=FakeWorld(size=2), peak_tflops=300) as metrics:
        skipped = STEP | {"loss": math.nan, "flops": None, "lr": -math.inf}
        metrics.step(step=1, **skipped, loss_by_level=[1.5, math.nan, None], tokens_by_level=[3, 1, 0])
        metrics.step(step=2, **STEP, gate_weights=None)
    first, second = (
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    rates = {"tokens_per_second": 2000, "mfu": pytest.approx(3e13 / (0.5 * 2 * 300e12))}
    assert (first["loss"], first["lr"], first["mfu"]) == (None, None, None)
    assert (first["loss_by_level"], first["tokens_by_level"]) == ([1.5, None, None], [3, 1, 0])
    assert second == {"step": 2, "loss": 2.5, "tokens": 1000, "seconds": 0.5, "lr": 1e-3, "gate_weights": None, **rates}
    bar = capsys.readouterr().err
    assert "2/9" in bar
    assert "loss 2.5000, 2000 tok/s, MFU 10.0%" in bar

    with metrics_of(tmp_path / "none", world=FakeWorld(rank=1)) as metrics:
        metrics.step(step=1, **STEP)
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_keeps_the_lines_of_the_steps_that_stand(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": None, "id": "é"}) + "\n" for step in (1, 2, 3, 4)]
    file = tmp_path / "metrics.jsonl"
    for garbage in (b"", b"\0\0\0\n", b"\xff\xfe\n", b"[3]\n", b"{}\n", b'{"step": "x"}\n'):
        file.write_bytes("".join(lines[:2]).encode() + garbage + "".join(lines[2:]).encode())
        assert lines_until(file, 3) == lines[:3]
        assert lines_until(file, 0) == []
    torn = '{"step": 3, "lo'  # by a crash; what follows on the same line is lost with it
    file.write_text("".join([*lines[:2], torn, *lines[2:]]))
    assert lines_until(file, 9) == [*lines[:2], lines[3]]
    file.write_text("".join([*lines[:3], torn]))
    assert lines_until(file, 9) == lines[:3]
    with metrics_of(tmp_path, first_step=2) as metrics:
        metrics.step(step=3, **STEP)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert lines_until(tmp_path / "no", 3) == []


def test_tensorboard_shows_a_step_that_was_taken_again_once(tmp_path: Path) -> None:
    def take(first_step: int, last_step: int, loss: float) -> None:
        with metrics_of(tmp_path, first_step, tensorboard=True) as metrics:
            for step in range(first_step + 1, last_step + 1):
                more = {"gate_weights": [0.25, 0.75], "loss_by_level": [None, loss], "mfu": None}
                metrics.step(step=step, **(STEP | {"loss": loss}), **more)

    take(0, 5, 1.0)
    take(3, 6, 2.0)  # from the checkpoint of step 3
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag in ("train/loss", "loss_by_level/1"):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == list(
            zip(range(1, 7), [1.0] * 3 + [2.0] * 3, strict=True)
        )
    assert events.Scalars("gate_weights/1")[-1].value == 0.75
    assert {"loss_by_level/0", "train/mfu", "train/step"}.isdisjoint(events.Tags()["scalars"])


class FakeWandb(SimpleNamespace):
    """As much of W&B as is used; `refusal` is what `init` raises."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.inits: list[dict[str, Any]] = []
        self.calls: list[tuple[Any, ...]] = []

    def init(self, **options: Any) -> Any:
        if self.refusal:
            raise self.refusal
        self.inits.append(options)

        def note(name: str) -> Callable[..., None]:
            return lambda *args, **options: self.calls.append((name, *args, options))

        return SimpleNamespace(define_metric=note("define"), log=note("log"), finish=note("finish"))


def test_wandb_goes_on_in_the_run_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "a").mkdir()
    with metrics_of(tmp_path / "a", wandb="align") as metrics:
        metrics.step(step=1, **(STEP | {"loss": math.nan}), gate_weights=[0.5])
    tags = {"train/tokens": 1000, "train/seconds": 0.5, "train/tokens_per_second": 2000.0, "train/lr": 1e-3}
    assert fake.calls == [
        ("define", "step", {}),
        ("define", "*", {"step_metric": "step"}),
        ("log", {"step": 1, **tags, "gate_weights/0": 0.5}, {}),
        ("finish", {}),
    ]
    (tmp_path / "a").rename(tmp_path / "moved")
    with pytest.raises(SystemExit), metrics_of(tmp_path / "moved", first_step=1, wandb="align"):
        raise SystemExit(143)
    assert fake.calls[-1] == ("finish", {"exit_code": 1})
    (tmp_path / "a").mkdir()  # the same name is another run now
    with metrics_of(tmp_path / "a", wandb="align"):
        pass
    first, again, other = fake.inits
    assert (first["project"], first["name"], first["resume"]) == ("align", "a", "allow")
    assert first["config"]["log"]["wandb"] == "align"
    assert first["id"] == again["id"] != other["id"]

    fake.refusal = fake.Error("no API key")
    with pytest.raises(ValueError, match=r"--log.wandb is 'align'; it needs .*: no API key"):
        metrics_of(tmp_path / "a", wandb="align")


@pytest.mark.parametrize(("package", "value"), [("wandb", "align"), ("tensorboard", True)])
def test_a_missing_package_is_named_with_its_flag(package: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogConfig(**{package: value})
    monkeypatch.setitem(sys.modules, package, None)
    check_log(LogConfig(), FakeWorld())  # type: ignore[arg-type]
    message = rf"--log.{package} is {value!r}; it needs the package {package}: pip install {package}"
    with pytest.raises(ValueError, match=message):
        check_log(log, FakeWorld())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, package, SimpleNamespace())
    check_log(log, FakeWorld())  # type: ignore[arg-type]


def test_peaks_by_device_name() -> None:
    peaks = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A10": 125,
        "NVIDIA A10G": None,  # is another chip than the A10
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "Tesla T4": None,
    }
    assert {name: peak_by_name(name) for name in peaks} == peaks
    assert all(peak_by_name(f"NVIDIA {name}") == peak for name, peak in PEAK_TFLOPS.items())
