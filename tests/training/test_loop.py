"""Both commands end to end, against a plain loop on one unsharded model.

Stage 1 and stage 2 run as a user runs them, with one and with two processes, on a Llama and on a Gemma (tied head,
scaled embedding). In both stages some micro-batches of one process hold text alone while the other's hold images.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig

from aligngpt.batch import Batch
from aligngpt.cli import main
from aligngpt.model import AlignGPTForConditionalGeneration, fresh_align_weights
from aligngpt.processor import AlignGPTProcessor
from training import optim
from training.checkpoints import Checkpoints
from training.config import TrainConfig, read_command_line, tiny
from training.loader import Cut, Loaded, Part, micro_batches
from training.loop import make_order, make_processor, read_samples
from training.processes import Terminated
from training.run_folder import create_run
from training.sharding import starting_config

ROOT = Path(__file__).parents[2]
Launch = Callable[..., Any]
TABLE = "model.align_table"
GATE = "gated_weight_layer.mlp.0.weight"  # as public folders call it


@dataclass(frozen=True)
class Stages:
    """What the two stages of one LLM left."""

    stage_1: list[Any]  # with 1 and with 2 processes
    stage_2: list[Any]
    flags_2: list[object]


@pytest.fixture(scope="module", params=["llama", "gemma"])
def stages(
    request: pytest.FixtureRequest, parts: Any, launch: Launch, tmp_path_factory: pytest.TempPathFactory
) -> Stages:
    root: Path = tmp_path_factory.mktemp(request.param)
    common = [
        "--data.image-folder",
        parts.images,
        "--global-batch-size",
        4,
        "--save-every",
        3,
        "--optim.clip-norm",
        0.05,
    ]
    flags_1 = [*common, "--model.llm", parts.llms[request.param], "--model.vision", parts.vision]
    flags_1 += ["--data.path", parts.captions, "--data.workers", 0, "--epochs", 2]
    flags_1 += ["--data.max-length", 30, "--token-budget", 30]
    stage_1 = [launch("pretrain", root / "s1-1", *flags_1), launch("pretrain", root / "s1-2", *flags_1, processes=2)]
    flags_2 = [*common, "--model.init", root / "s1-1/model", "--data.path", parts.chats]
    flags_2 += ["--data.max-length", 180, "--token-budget", 180, "--data.workers", 1, "--epochs", 2]
    flags_2 += ["--optim.projector-lr", 1e-3]
    stage_2 = [launch("finetune", root / f"s2-{n}", *flags_2, processes=n) for n in (1, 2)]
    for run in (*stage_1, *stage_2):
        assert run.status == 0, run.output
    return Stages(stage_1, stage_2, flags_2)


def config_of(run: Any) -> TrainConfig:
    """A run's config as its folder states it."""
    stated = json.loads((run.run_dir / "config.json").read_text())["config"]
    base = tiny("pretrain")
    groups = {name: type(getattr(base, name))(**stated.pop(name)) for name in ("model", "data", "optim")}
    return TrainConfig(**stated, **groups)


def parts_of(config: TrainConfig, cut: Cut) -> Iterator[Loaded]:
    """What a process loads in each step of a run."""
    model_config = starting_config(config.model, image_aspect_ratio=config.data.image_aspect_ratio)
    processor = make_processor(config, model_config)
    samples = read_samples(config, model_config, processor, rank=0, num_processes=1)
    samples.cut = cut
    order = make_order(config, samples)
    steps = order.steps(0, config.epochs * order.steps_per_epoch)
    parts = [Part(step // order.steps_per_epoch, batch.tolist()) for step, batch in enumerate(steps)]
    return micro_batches(samples, parts, workers=0, device=torch.device("cpu"), prefetch=1)


def kind_of(batch: Batch) -> str:
    assert batch.cu_seqlens is not None
    samples = batch.plan.token_sample[batch.cu_seqlens[:-1].long()].tolist() if batch.ids else []
    return "".join("i" if sample >= 0 else "t" for sample in samples)


def kinds_of_micro_batches(config: TrainConfig) -> set[tuple[str, str]]:
    """What two processes hold at the same time: an "i" or a "t" for each sample with or without an image."""
    kinds = set()
    both = [parts_of(config, Cut(rank, 2, config.token_budget)) for rank in (0, 1)]
    for loaded in zip(*both, strict=True):
        for batches in zip(*(item.batches or [] for item in loaded), strict=True):
            first, second = (kind_of(batch) for batch in batches)
            kinds.add((first, second))
    return kinds


def whole_batches(config: TrainConfig) -> list[Batch]:
    """The global batches of a run, each padded as one."""
    found = list(parts_of(config, Cut(per_device=config.global_batch_size)))
    assert not any(loaded.dropped for loaded in found)
    return [batch for loaded in found for batch in loaded.batches or []]


def plain_run(model: AlignGPTForConditionalGeneration, config: TrainConfig) -> list[float]:
    """The reference: one model, one batch a step, torch.optim.AdamW. Changes `model`; returns the losses."""
    model.train()
    for name, parameter in model.named_parameters():
        trains = {
            "llm": ("language_model", "lm_head"),
            "projector": ("projector",),
            "gate": ("gate",),
            "table": ("table",),
        }
        parameter.requires_grad_(any(mark in name for part in config.model.train for mark in trains[part]))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = [
        config.optim.projector_lr or config.optim.lr if "projector" in name else config.optim.lr for name, _ in named
    ]
    groups = [{"params": [parameter], "peak": rate} for (_, parameter), rate in zip(named, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False)
    batches = whole_batches(config)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * optim.rate(step, len(batches), config.optim.warmup_ratio)
        optimizer.zero_grad()
        loss = model(**batch.model_inputs()).loss  # divided by the number of supervised tokens in the batch
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], config.optim.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights_of(run: Any) -> dict[str, Tensor]:
    return load_file(run.run_dir / "model/model.safetensors")


def assert_same_updates(ours: dict[str, Tensor], theirs: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Each tensor moved as the reference's: the two ends differ by at most a thousandth of the way from the start."""
    assert ours.keys() <= theirs.keys()
    for name, end in ours.items():
        way = torch.linalg.norm(theirs[name] - before[name]).item()
        apart = torch.linalg.norm(end - theirs[name]).item()
        assert apart <= 1e-3 * way, f"{name}: {apart} apart after a way of {way}"


def test_stage_1_equals_a_plain_loop_and_trains_projector_and_table_alone(stages: Stages) -> None:
    one, two = stages.stage_1
    assert one.losses == pytest.approx(two.losses, abs=1e-5)
    assert len(one.losses) == 6  # two epochs of twelve samples in fours
    config = config_of(one)
    assert kinds_of_micro_batches(config) & {("t", "i"), ("i", "t")}

    fresh = AlignGPTForConditionalGeneration.from_parts(config.model.llm, config.model.vision, seed=config.seed)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    assert one.losses == pytest.approx(plain_run(fresh, config), abs=1e-5)
    after = weights_of(one)
    assert_same_updates(after, fresh.state_dict(), before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "projector" in name or name == TABLE}


def test_stage_2_equals_a_plain_loop_from_the_folder_that_stage_1_left(stages: Stages) -> None:
    one, two = stages.stage_2
    assert one.losses == pytest.approx(two.losses, abs=1e-5)
    config = config_of(two)

    kinds = kinds_of_micro_batches(config)
    assert kinds >= {("t", "i"), ("i", "t"), ("i", "i")}
    assert any("" in kind for kind in kinds)  # 13 samples in fours: the last step leaves a process without any

    model = AlignGPTForConditionalGeneration.from_pretrained(config.model.init)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert one.losses == pytest.approx(plain_run(model, config), abs=1e-5)
    after = weights_of(two)
    assert_same_updates(after, model.state_dict(), before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    frozen = {name for name in after if "vision_tower" in name or name == TABLE}
    assert changed == after.keys() - frozen


def test_fault_42_stage_2_on_tritons_kernels_over_two_processes(stages: Stages, launch: Launch, tmp_path: Path) -> None:
    """Projector, gate, sequence and loss by kernels, their gradients through FSDP2: the losses of the references."""
    run = launch("finetune", tmp_path / "run", *stages.flags_2, processes=2, on_triton=True)
    assert run.status == 0, run.output
    assert run.losses == pytest.approx(stages.stage_2[1].losses, abs=1e-5)
    assert "on Triton: align_gate fused_projector inject linear_cross_entropy text_mean\n" in run.output


def test_result_is_read_by_from_pretrained_and_answers(stages: Stages, parts: Any) -> None:
    folder = stages.stage_2[1].run_dir / "model"
    model = AlignGPTForConditionalGeneration.from_pretrained(folder).eval()
    processor = AlignGPTProcessor.from_pretrained(folder)
    assert (processor.template, processor.image_processor.image_aspect_ratio) == ("v1", "pad")
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
    inputs = processor(images=[parts.images / "3.png"], text="<image>\nWhat is it?")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, inputs["input_ids"].shape[1] + 3)
    assert "Written by a training run of aligngpt" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("stages", ["llama"], indirect=True)
def test_fault_58_resume_is_bit_equal_for_20_steps(stages: Stages, launch: Launch, tmp_path: Path) -> None:
    """From the checkpoint of step 4, as a run leaves it that dies in the next save; over another number of processes
    the losses are those to 1e-6."""
    flags = [*stages.flags_2, "--epochs", 6, "--save-every", 4, "--keep-last", 6]
    whole = launch("finetune", tmp_path / "whole", *flags, processes=2)
    assert whole.status == 0, whole.output
    for processes in (2, 1):
        interrupted = tmp_path / f"run-{processes}"
        shutil.copytree(whole.run_dir, interrupted, ignore=shutil.ignore_patterns("model", "step-000000[12]?"))
        (interrupted / "checkpoints/step-00000008").rename(interrupted / "checkpoints/step-00000008.tmp")
        (interrupted / "LATEST").write_text("step-00000004\n")
        with (interrupted / "metrics.jsonl").open("a") as file:
            file.write('{"step": 25, "lo')  # torn
        resumed = launch("finetune", interrupted, *flags, "--profile", processes=processes)
        assert resumed.status == 0, resumed.output
        assert resumed.output.count("3 training steps on a CPU") == 1  # of the first process, and nothing else changes
        assert sorted(file.name for file in (interrupted / "profile").iterdir()) == ["summary.txt", "trace.json.gz"]
        assert len(resumed.losses) == 24
        assert resumed.losses == pytest.approx(whole.losses, rel=1e-6)
        if processes == 2:
            assert resumed.losses == whole.losses
            ours, theirs = (run.run_dir / "model/model.safetensors" for run in (resumed, whole))
            assert ours.read_bytes() == theirs.read_bytes()
        steps = [f"step-{step:08}" for step in range(4, 25, 4)]
        assert sorted(path.name for path in (interrupted / "checkpoints").iterdir()) == steps


def test_bf16_with_recomputed_layers_follows_fp32(stages: Stages, launch: Launch, tmp_path: Path, parts: Any) -> None:
    """Frozen weights are held in bf16 then, trained ones in fp32: the result's frozen ones are the source's still."""
    config = config_of(stages.stage_1[0])
    flags: list[object] = [
        "--model.llm",
        config.model.llm,
        "--model.vision",
        config.model.vision,
        "--data.path",
        config.data.path,
    ]
    flags += [
        "--data.image-folder",
        parts.images,
        "--global-batch-size",
        4,
        "--data.max-length",
        30,
        "--token-budget",
        30,
        "--epochs",
        2,
        "--optim.clip-norm",
        0.05,
    ]
    run = launch(
        "pretrain",
        tmp_path / "run",
        *flags,
        "--precision",
        "bf16",
        "--sharding.activation-checkpointing",
        "full",
        processes=2,
    )
    assert run.status == 0, run.output
    assert "instead of the fused op" not in run.output
    assert run.losses == pytest.approx(stages.stage_1[0].losses, rel=2e-3)
    assert max(abs(a - b) for a, b in zip(run.losses, stages.stage_1[0].losses, strict=True)) > 1e-5  # it was bf16
    ours, theirs = weights_of(run), weights_of(stages.stage_1[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "projector" not in name and name != TABLE)
    assert not torch.equal(ours[TABLE], ours[TABLE].bfloat16().float())  # its master is fp32
    fresh = fresh_align_weights(AlignGPTForConditionalGeneration.from_pretrained(run.run_dir / "model").config, 0)
    assert not torch.equal(ours[TABLE], fresh[TABLE])


def test_stage_2_starts_from_a_public_folder(launch: Launch, tmp_path: Path, parts: Any, tower_config: Any) -> None:
    """Public weights, their tower named by a local path: the table stays theirs to the bit, the rest is trained."""
    public = tmp_path / "public"
    shutil.copytree(Path(__file__).parents[1] / "data/oracle", public)
    (public / "p16_model.safetensors").rename(public / "model.safetensors")
    tower = tmp_path / "tower"
    CLIPVisionConfig(**tower_config).save_pretrained(tower)
    config = json.loads((public / "p16_config.json").read_text())
    (public / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(tower)}))
    flags = ["--model.init", public, "--data.path", parts.chats, "--data.image-folder", parts.images]
    done = launch("finetune", tmp_path / "run", *flags, "--max-steps", 1, "--data.workers", 0)
    assert done.status == 0, done.output
    before = load_file(public / "model.safetensors")
    after = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "run/model")
    weights = after.state_dict()
    assert after.config.gate_text == AlignGPTProcessor.from_pretrained(tmp_path / "run/model").gate_text == "all"
    assert torch.equal(weights[TABLE], before["align_indicators.indicator_embs"])
    for ours, theirs in (("lm_head.weight", "lm_head.weight"), ("model.align_gate.linear_1.weight", GATE)):
        assert not torch.equal(weights[ours], before[theirs])


def stage_1_flags(parts: Any) -> list[object]:
    flags: list[object] = ["--model.llm", parts.llms["llama"], "--model.vision", parts.vision, "--data.workers", 0]
    return [*flags, "--data.path", parts.captions, "--data.image-folder", parts.images]


def test_fault_28_a_gate_trains_beside_levels_when_one_process_has_text_alone(
    launch: Launch, tmp_path: Path, parts: Any
) -> None:
    """Levels are looked up where there are images; the gate's gradient must be zero there, not absent."""
    flags = [*stage_1_flags(parts), "--model.train", "projector", "table", "gate"]
    flags += ["--global-batch-size", 4, "--data.max-length", 30, "--token-budget", 30]
    runs = [launch("pretrain", tmp_path / str(n), *flags, processes=n) for n in (1, 2)]
    for run in runs:
        assert run.status == 0, run.output
    assert runs[0].losses == pytest.approx(runs[1].losses, abs=1e-5)


def test_training_from_shards_is_training_from_json(launch: Launch, tmp_path: Path, parts: Any) -> None:
    """`aligngpt pack`, then the same command with the shards in place of file and folder: the same bits."""
    command = ["pack", parts.captions, "--image-folder", parts.images, "--out", tmp_path / "packed"]
    assert main([str(word) for word in [*command, "--records-per-shard", 5, "--workers", 0]]) == 0
    flags: list[object] = ["--model.llm", parts.llms["llama"], "--model.vision", parts.vision, "--max-steps", 2]
    flags += ["--global-batch-size", 8, "--token-budget", 512, "--data.workers", 2]
    sources = ["--data.path", tmp_path / "packed"], ["--data.path", parts.captions, "--data.image-folder", parts.images]
    runs = [launch("pretrain", tmp_path / str(n), *flags, *source) for n, source in enumerate(sources)]
    for run in runs:
        assert run.status == 0, run.output
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(value, weights_of(runs[1])[name]) for name, value in weights_of(runs[0]).items())


def test_fault_13_25_dropped_samples_are_written_down_and_the_run_goes_on(
    launch: Launch, tmp_path: Path, parts: Any
) -> None:
    """Over one and two processes, with and without a stop: the same samples go, the same stand in, the same is learned.

    Record 5 has no image file, record 9 no conversation.
    """
    images = Path(shutil.copytree(parts.images, tmp_path / "images"))
    (images / "5.png").unlink()
    records = json.loads(parts.captions.read_text())
    records[9]["conversations"] = []
    records[9]["id"] = "s\u20289"  # no line of the file ends in it
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = [*stage_1_flags(parts), "--data.path", tmp_path / "data.json", "--data.image-folder", images]
    flags += ["--global-batch-size", 4, "--data.max-length", 30, "--token-budget", 30]
    flags += ["--data.workers", 1, "--data.max-drop-rate", 0.5]
    flags += ["--data.decoder", "pil", "--epochs", 4, "--save-every", 5, "--keep-last", 9]
    runs = [launch("pretrain", tmp_path / str(n), *flags, processes=n) for n in (1, 2)]
    for run in runs:
        assert run.status == 0, run.output

    def dropped(run: Any) -> list[dict[str, Any]]:
        lines = map(json.loads, (run.run_dir / "bad_samples.jsonl").read_text().splitlines())
        return sorted(lines, key=lambda line: (line["step"], line["record"]))

    lines = dropped(runs[0])
    assert lines == dropped(runs[1])
    assert sum(line["attempt"] == 0 for line in lines) == 8  # each in each of four epochs
    assert runs[0].losses == pytest.approx(runs[1].losses, abs=1e-5)
    assert {line["record"] for line in lines} == {5, 9}
    named = {(line["record"], line["id"], line["reason"], line["kind"]) for line in lines}
    empty = "the conversation is empty"
    assert named == {(5, "s5", "5.png: no such file", "no such file"), (9, "s\u20289", empty, empty)}
    metrics = [json.loads(line) for line in (runs[0].run_dir / "metrics.jsonl").read_text().splitlines()]
    for step in metrics:
        assert step["data_seconds"] <= step["seconds"]
        assert step["dropped_samples"] == sum(line["step"] <= step["step"] and line["attempt"] == 0 for line in lines)

    shutil.rmtree(runs[0].run_dir / "model")  # as if it had been stopped after step 5
    (runs[0].run_dir / "LATEST").write_text("step-00000005\n")
    for step in (10, 12):
        shutil.rmtree(runs[0].run_dir / f"checkpoints/step-{step:08d}", ignore_errors=True)
    again = launch("pretrain", runs[0].run_dir, *flags)
    assert again.status == 0, again.output
    assert dropped(again) == lines
    assert again.losses == [step["loss"] for step in metrics]


def test_fault_57_a_killed_loader_process_ends_the_run_which_goes_on_as_if_nothing_was(
    launch: Launch, tmp_path: Path, parts: Any
) -> None:
    flags = [*stage_1_flags(parts), "--data.workers", 1, "--max-steps", 80, "--save-every", 2]
    command = [sys.executable, "training/pretrain.py", "tiny", "--run-dir", tmp_path / "run", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert run.poll() is None
    # Of the process's children the loader's process is the one that runs the same program.
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    (worker,) = (pid for pid in children if "pretrain.py" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(int(worker), signal.SIGKILL)
    _, output = run.communicate(timeout=120)
    assert run.returncode == 1, output
    (said,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "a process that loads samples was killed or crashed" in said
    assert "(--data.workers). The same command goes on from the last checkpoint." in said
    again, straight = (launch("pretrain", tmp_path / name, *flags) for name in ("run", "straight"))
    assert again.status == straight.status == 0, again.output + straight.output
    assert again.losses == straight.losses


def test_fault_37_steps_that_are_not_finite_are_skipped_until_they_are_too_many(
    launch: Launch, tmp_path: Path, parts: Any
) -> None:
    broken = Path(shutil.copytree(parts.llms["llama"], tmp_path / "llm"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = launch("pretrain", tmp_path / "run", *stage_1_flags(parts), "--model.llm", broken, "--epochs", 3)
    assert run.status == 1
    assert "error: --guard.max-skipped is 5, and so many steps in a row are not finite: step 1 (loss nan" in run.output
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert not (tmp_path / "run/model").exists()


def test_fault_55_sigterm_during_the_last_save_counts(
    train_here: Launch, tmp_path: Path, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step follows that would ask. The run ends when the checkpoint is there; the same command writes the model."""
    save = Checkpoints.save

    def save_and_terminate(self: Checkpoints, *args: Any) -> None:
        save(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    flags = [*stage_1_flags(parts), "--max-steps", 1]
    with monkeypatch.context() as changed:
        changed.setattr(Checkpoints, "save", save_and_terminate)
        with pytest.raises(Terminated):
            train_here("pretrain", tmp_path / "run", *flags)
    assert (tmp_path / "run/LATEST").read_text() == "step-00000001\n"
    assert not (tmp_path / "run/model").exists()
    train_here("pretrain", tmp_path / "run", *flags)
    assert (tmp_path / "run/model").is_dir()


def test_a_run_goes_on_with_the_data_it_began_with_alone(train_here: Launch, tmp_path: Path, parts: Any) -> None:
    """Another number of samples would be another order of them, and another learning rate."""
    data = Path(shutil.copy(parts.captions, tmp_path / "data.json"))
    flags = [*stage_1_flags(parts), "--data.path", data, "--max-steps", 1]
    train_here("pretrain", tmp_path / "run", *flags)
    shutil.rmtree(tmp_path / "run/model")
    data.write_text(json.dumps(json.loads(data.read_text())[1:]))
    with pytest.raises(ValueError, match=r"data.json, which gives 11 samples; the run in .* began with 12 and needs"):
        train_here("pretrain", tmp_path / "run", *flags)


def test_fault_49_a_second_run_in_the_folder_is_refused(launch: Launch, tmp_path: Path, parts: Any) -> None:
    flags = [*stage_1_flags(parts), "--data.decoder", "pil"]
    config = read_command_line("pretrain", ["tiny", "--run-dir", str(tmp_path / "run"), *map(str, flags)])
    with create_run(config, "pretrain"):
        run = launch("pretrain", tmp_path / "run", *flags)
        assert run.status == 1
        assert "in which another run is at work" in run.output
    assert launch("pretrain", tmp_path / "run", *flags).status == 0


def test_going_back_to_an_earlier_checkpoint_keeps_what_is_written_then(
    launch: Launch, tmp_path: Path, parts: Any
) -> None:
    flags = [*stage_1_flags(parts), "--max-steps", 4, "--save-every", 1]
    run = launch("pretrain", tmp_path / "run", *flags, "--keep-last", 4)
    assert run.status == 0, run.output
    shutil.rmtree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")
    (tmp_path / "run/LATEST").write_text("step-00000002\n")
    again = launch("pretrain", tmp_path / "run", *flags, "--keep-last", 1)
    assert again.status == 0, again.output
    assert again.losses == run.losses
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
