"""The choice of an implementation, the refusal of DTensors, and the table that `python -m aligngpt_kernels` prints."""

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aligngpt_kernels
import pytest
import torch
import torch.distributed as dist
from aligngpt_kernels import KernelUnavailable, dispatch, injection_plan
from aligngpt_kernels.__main__ import OPS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

IDS = torch.tensor([1, 9, 8, 8, 3])
PLAN = injection_plan(IDS, image_token_id=8, align_token_id=9)
EMBED, ROWS, MEAN = torch.randn(8, 4), torch.randn(1, 2, 4), torch.randn(1, 4)
GATE = {"w1": torch.randn(3, 2), "b1": torch.randn(3), "w2": torch.randn(2, 3), "b2": torch.randn(2)}
PROJECTOR = {"w1": torch.randn(4, 5), "b1": torch.randn(4), "w2": torch.randn(4, 4), "b2": torch.randn(4)}
CACHE = torch.randn(1, 2, 3, 4)

CALLS: dict[str, dict[str, Any]] = {  # a good call of every op
    "fused_projector": {"x": torch.randn(2, 5), **PROJECTOR},
    "text_mean": {"token_ids": IDS, "embed_weight": EMBED, "gate_mask": torch.ones(5).bool(), "plan": PLAN},
    "align_gate": {
        "image_rows": ROWS,
        **GATE,
        "text_mean": MEAN,
        "table": torch.randn(3, 4),
        "image_sample": torch.tensor([0]),
        "mode": "adaptive",
    },
    "inject": {"token_ids": IDS, "embed_weight": EMBED, "image_rows": ROWS, "align_rows": MEAN, "plan": PLAN},
    "project_and_inject": {
        "features": torch.randn(1, 2, 5),
        **PROJECTOR,
        "token_ids": IDS,
        "embed_weight": EMBED,
        "text_mean": MEAN,
        "plan": PLAN,
    },
    "linear_cross_entropy": {"hidden": torch.randn(3, 4), "weight": EMBED, "labels": torch.tensor([1, -100, 2])},
    "flash_decode": {"q": torch.randn(1, 4, 1, 4), "k": CACHE, "v": CACHE, "lengths": torch.tensor([3])},
}


def op_named(name: str) -> Callable[..., Any]:
    return getattr(aligngpt_kernels, name)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = Path(tmp_path_factory.mktemp("mesh")) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_every_op_has_a_call_here_a_line_in_the_table_and_a_reference():
    assert set(CALLS) == set(OPS)
    for name in OPS:
        assert callable(op_named(f"{name}_reference"))
    assert sorted(aligngpt_kernels.__all__) == aligngpt_kernels.__all__


@pytest.mark.parametrize("name", CALLS)
def test_auto_is_the_reference_on_a_cpu(name):
    def first(result: Any) -> torch.Tensor:
        return result[0] if isinstance(result, tuple) else result

    op, reference, call = op_named(name), op_named(f"{name}_reference"), CALLS[name]
    assert torch.equal(first(op(**call, impl="reference")), first(reference(**call)))
    auto = first(op(**call, impl="auto"))
    if name == "flash_decode":  # by PyTorch's own attention
        torch.testing.assert_close(auto, first(reference(**call)))
    else:
        assert torch.equal(auto, first(reference(**call)))
    with pytest.raises(ValueError, match=f"impl is 'cuda'; {name} needs"):
        op(**call, impl="cuda")


@pytest.mark.parametrize("name", CALLS)
def test_triton_says_why_it_cannot_run(name, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    op, call = op_named(name), CALLS[name]
    in_double = {
        argument: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for argument, value in call.items()
    }
    with pytest.raises(KernelUnavailable, match=f"{name} cannot run on Triton: its inputs are torch.float64, and the"):
        op(**in_double, impl="triton")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(KernelUnavailable, match=f"{name} cannot run on Triton: its inputs are on cpu, and Triton"):
        op(**call, impl="triton")
    monkeypatch.setattr(dispatch.triton, "__version__", None)
    with pytest.raises(KernelUnavailable, match="the package triton is not installed"):
        op(**call, impl="triton")


def test_auto_goes_by_what_was_measured(monkeypatch):
    """What replaces a tuned library waits for a measurement; below 1 the reference runs; each bucket by itself."""
    gpu = torch.device("cuda")
    measured = {"sm_90": {"inject": 0.9, "fused_projector M>1152": 1.06, "flash_decode": 1.3}}
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_measured", lambda: measured)
    with dispatch.assume_chip(dispatch.H100):
        assert not dispatch.use_triton("inject", "auto", gpu)
        assert dispatch.why_not_auto("inject", gpu) == "its kernels measured 0.90 × the speed of what they replace"
        assert dispatch.use_triton("inject", "triton", gpu)
        assert dispatch.use_triton("flash_decode", "auto", gpu)
        assert dispatch.use_triton("linear_cross_entropy", "auto", gpu)
        assert dispatch.use_triton("fused_projector", "auto", gpu, bucket="M>1152")
        assert not dispatch.use_triton("fused_projector", "auto", gpu, bucket="M<=1152")
    with dispatch.assume_chip(dispatch.A100):
        assert not dispatch.use_triton("fused_projector", "auto", gpu, bucket="M>1152")
        assert dispatch.why_not_auto("fused_projector", gpu) == "its kernels are not measured on sm_80 yet"
    with dispatch.assume_chip(dispatch.Chip(75, 40, 65_536)):
        assert "has compute capability 7.5, and the kernels need 8.0" in dispatch.why_not_triton("inject", gpu)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_two_devices_are_refused_by_name(name):
    call = CALLS[name]
    tensors = [argument for argument, value in call.items() if isinstance(value, torch.Tensor)]
    for argument in tensors[1:]:
        with pytest.raises(ValueError, match=f"{argument} is on meta; {name} needs cpu, the device of "):
            op_named(name)(**{**call, argument: call[argument].to("meta")})


@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_argument_refuses_a_dtensor_by_name(name, mesh):
    call = CALLS[name]
    for argument, value in call.items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=f"{argument} is a DTensor placed .*{name} needs a plain tensor"):
                op_named(name)(**{**call, argument: distribute_tensor(value, mesh)})


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_every_reference_by_finite_differences(name):
    call, reference = CALLS[name], op_named(f"{name}_reference")
    names = [a for a, value in call.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]

    def differentiable(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = reference(**{**call, **dict(zip(names, tensors, strict=True))})
        results = result if isinstance(result, tuple) else (result,)
        return tuple(r for r in results if r.requires_grad)

    assert torch.autograd.gradcheck(differentiable, [call[a].double().requires_grad_() for a in names])


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton takes the current device, which is another one for most layers of a model spread over several GPUs."""
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(entered.append(device)))
    with FakeTensorMode():
        device = torch.device("cuda", max(torch.cuda.device_count() - 1, 0))  # the last one there is
        tensor = torch.empty(1, device=device)
    launch = dispatch._on_its_device(lambda *args: len(args))
    assert launch(tensor, 2) == 2
    assert entered == [device]
    assert launch(torch.empty(1, device="cpu")) == 1
    assert len(entered) == 1


def test_the_fall_back_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "aligngpt_kernels"):
        for _ in range(3):
            op_named("flash_decode")(**CALLS["flash_decode"])
    assert [r.getMessage() for r in caplog.records] == [
        "flash_decode runs its PyTorch reference: its inputs are on cpu, where Triton's interpreter is for tests"
    ]


def test_the_table_names_every_op_and_a_reason():
    done = subprocess.run([sys.executable, "-m", "aligngpt_kernels"], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}  # by op
    assert f"torch {torch.__version__}" in done.stdout
    for name in (*OPS, "injection_plan"):
        assert len(lines[name]) > 4, name
