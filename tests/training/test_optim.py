"""The learning rate's schedule, the groups of AdamW, and apex's FusedAdam by a stand-in with its interface."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import distribute_tensor
from transformers import get_cosine_schedule_with_warmup

from training import sharding
from training.config import OptimConfig, read_command_line
from training.optim import make_optimizer, rate, set_rate

# What apex's FusedAdam takes and does, in plain PyTorch: the step's number is the group's, zero_grad has no argument.
FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    made = []

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        FusedAdam.made.append(self)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.dtype != torch.float32 or not self.adam_w_mode:
                    raise RuntimeError("this stand-in does AdamW on fp32 alone")
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                size = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] * (mean / size + group["weight_decay"] * p))
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """`install(files)` puts a package called apex in front of whatever is installed."""

    def put(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "packages/apex" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        for name in ("apex", "apex.optimizers"):
            monkeypatch.setitem(sys.modules, name, None)  # puts back what was there
            del sys.modules[name]

    return put


def flags(parts: Any, **more: object) -> list[object]:
    words: list[object] = ["--model.llm", parts.llms["llama"], "--model.vision", parts.vision, "--data.workers", 0]
    words += ["--data.path", parts.chats, "--data.image-folder", parts.images, "--data.decoder", "pil"]
    words += ["--global-batch-size", 13, "--max-steps", 3, "--save-every", 2, "--optim.weight-decay", 0.1]
    return words + [word for name, value in more.items() for word in (f"--{name.replace('__', '.')}", value)]


@pytest.mark.parametrize(("total", "ratio"), [(100, 0.03), (20, 0.03), (7, 0.5), (5, 0.0), (1, 0.03)])
def test_rate_is_transformers_cosine_one_step_on_while_it_rises(total: int, ratio: float) -> None:
    warmup = -(-total * ratio // 1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(warmup), total)
    theirs = [schedule.lr_lambdas[0](step) for step in range(total + 1)]
    ours = [rate(step, total, ratio) for step in range(total)]
    assert ours == pytest.approx([theirs[step + 1] if step < warmup else theirs[step] for step in range(total)])
    assert min(ours) > 0
    assert max(ours) == 1


def test_each_group_has_its_rate_and_what_has_one_dimension_does_not_decay(parts: Any) -> None:
    """Of the whole model, with a frozen embedding; groups without a member are left out."""
    model_config = sharding.starting_config(
        sharding.ModelConfig(llm=str(parts.llms["llama"]), vision=str(parts.vision)), image_aspect_ratio="pad"
    )
    model = sharding.build(model_config)
    sharding.freeze(model, ("llm", "projector", "gate", "table"))
    model.get_input_embeddings().requires_grad_(False)
    config = OptimConfig(lr=1e-2, projector_lr=1e-3, align_lr=2e-3, weight_decay=0.1)
    optimizer = make_optimizer(model.named_parameters(), config)
    set_rate(optimizer, 0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        (group["lr"], group["weight_decay"], [names[parameter] for parameter in group["params"]])
        for group in optimizer.param_groups
    ]
    assert [(lr, decay) for lr, decay, _ in groups] == [
        (lr, decay) for lr in (5e-3, 5e-4, 1e-3) for decay in (0.1, 0.0)
    ]
    llm, llm_norms, projector, projector_biases, align, gate_biases = (members for *_, members in groups)
    assert len(llm) == 2 * 7 + 1  # 7 linear layers in each decoder layer, and the head
    assert "lm_head.weight" in llm
    assert len(llm_norms) == 2 * 2 + 1
    assert all("norm" in name for name in llm_norms)
    linear = ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
    assert (projector, projector_biases) == ([f"{x}.weight" for x in linear], [f"{x}.bias" for x in linear])
    linear = ("model.align_gate.linear_1", "model.align_gate.linear_2")
    assert align == ["model.align_table", *(f"{x}.weight" for x in linear)]
    assert gate_biases == [f"{x}.bias" for x in linear]

    sharding.freeze(model, ("table",))
    (only,) = make_optimizer(model.named_parameters(), OptimConfig(lr=1e-2)).param_groups
    assert (only["lr"], only["peak_lr"], only["params"]) == (1e-2, 1e-2, [model.model.align_table])


def test_a_run_with_apex_is_the_run_with_torch_unsharded(
    parts: Any, install: Callable[..., None], train_here: Callable[..., Any], tmp_path: Path
) -> None:
    """fp32: the same losses and weights; after a stop the same bits. bf16: autocast follows FSDP2's own casts."""
    install({"__init__.py": "", "optimizers/__init__.py": FUSED_ADAM})
    ours, apex = (
        train_here("finetune", tmp_path / kind, *flags(parts, optim__kind=kind, optim__projector_lr=1e-3))
        for kind in ("torch", "apex")
    )
    from apex.optimizers import FusedAdam

    (made,) = FusedAdam.made
    assert made.adam_w_mode is True
    assert {(group["peak_lr"], group["weight_decay"]) for group in made.param_groups} == {
        (lr, decay) for lr in (2e-4, 1e-3) for decay in (0.1, 0.0)
    }
    assert all(type(parameter) is nn.Parameter for group in made.param_groups for parameter in group["params"])
    assert apex.losses == pytest.approx(ours.losses, abs=1e-5)
    theirs = load_file(ours.run_dir / "model/model.safetensors")
    before = load_file(parts.llms["llama"] / "model.safetensors")["lm_head.weight"]
    for name, found in load_file(apex.run_dir / "model/model.safetensors").items():
        assert (found - theirs[name]).abs().max() <= 2e-6, name  # a hundredth of a step
    assert (theirs["lm_head.weight"] - before).abs().max() > 2e-4
    config = (apex.run_dir / "model/config.json").read_text()
    assert config == (ours.run_dir / "model/config.json").read_text()

    stopped = tmp_path / "stopped"
    shutil.copytree(apex.run_dir, stopped, ignore=shutil.ignore_patterns("model", "step-00000003"))
    (stopped / "LATEST").write_text("step-00000002\n")
    resumed = train_here("finetune", stopped, *flags(parts, optim__kind="apex", optim__projector_lr=1e-3))
    assert resumed.losses == apex.losses
    file = "model/model.safetensors"
    assert (stopped / file).read_bytes() == (apex.run_dir / file).read_bytes()

    halves = [
        train_here("finetune", tmp_path / f"bf16-{kind}", *flags(parts, optim__kind=kind, precision="bf16"))
        for kind in ("torch", "apex")
    ]
    assert halves[1].losses == pytest.approx(halves[0].losses, rel=2e-3)
    assert abs(halves[1].losses[0] - apex.losses[0]) > 1e-6


def test_apex_is_refused_where_it_cannot_work(
    parts: Any, install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["tiny", "--run-dir", str(tmp_path / "run"), *map(str, flags(parts, optim__kind="apex"))]
    with pytest.raises(ValueError, match=r"--optim\.kind is 'apex'; it needs NVIDIA's apex, .*: it is not installed"):
        read_command_line("finetune", command)
    # PyPI's apex, whose own import fails without the web framework that it is made for.
    install({"__init__.py": "raise SystemExit('the web toolkit ran')", "models.py": ""})
    with pytest.raises(ValueError, match=r"built from its source with CUDA: this is the unrelated web toolkit"):
        read_command_line("finetune", command)
    install({"__init__.py": "", "optimizers/__init__.py": FUSED_ADAM})
    read_command_line("finetune", command)
    with pytest.raises(ValueError, match=r"--sharding\.offload is True; it needs --optim\.kind torch"):
        read_command_line("finetune", [*command, "--sharding.offload"])

    sentence = r"apex's FusedAdam takes no sharded weights \(DTensors\); it needs one process"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=rf"--optim\.kind is 'apex', in 2 processes; {sentence}"):
        read_command_line("finetune", command)
    monkeypatch.delenv("WORLD_SIZE")
    with sharding.world() as world:
        sharded = nn.Parameter(distribute_tensor(torch.zeros(4, 2), world.mesh))
        with pytest.raises(ValueError, match=rf"--optim\.kind is 'apex'; {sentence}"):
            make_optimizer([("model.x", sharded)], OptimConfig(kind="apex"))
    assert not dist.is_initialized()
