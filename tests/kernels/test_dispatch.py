"""The choice of an implementation, the refusal of DTensors, and the table that `python -m aligngpt_kernels` prints."""

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
from aligngpt_kernels import KernelUnavailable, injection_plan
from aligngpt_kernels.__main__ import OPS
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
        **GATE,
        "image_rows": ROWS,
        "text_mean": MEAN,
        "table": torch.randn(3, 4),
        "image_sample": torch.tensor([0]),
        "mode": "adaptive",
    },
    "inject": {"token_ids": IDS, "embed_weight": EMBED, "image_rows": ROWS, "align_rows": MEAN, "plan": PLAN},
    "project_and_inject": {
        **PROJECTOR,
        "features": torch.randn(1, 2, 5),
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
def test_auto_is_the_reference_here_and_triton_says_why_not(name):
    def first(result: Any) -> torch.Tensor:
        return result[0] if isinstance(result, tuple) else result

    op, reference, call = op_named(name), op_named(f"{name}_reference"), CALLS[name]
    for impl in ("auto", "reference"):
        assert torch.equal(first(op(**call, impl=impl)), first(reference(**call)))
    with pytest.raises(KernelUnavailable, match=f"{name} cannot run on Triton: .{{20}}"):
        op(**call, impl="triton")
    with pytest.raises(ValueError, match=f"impl is 'cuda'; {name} needs"):
        op(**call, impl="cuda")


@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_argument_refuses_a_dtensor_by_name(name, mesh):
    call = CALLS[name]
    for argument, value in call.items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=f"{argument} is a DTensor placed .*{name} needs a plain tensor"):
                op_named(name)(**{**call, argument: distribute_tensor(value, mesh)})


def test_the_fall_back_is_said_once(caplog):
    from aligngpt_kernels.dispatch import _say_once

    _say_once.cache_clear()
    with caplog.at_level(logging.INFO, "aligngpt_kernels"):
        for _ in range(3):
            op_named("flash_decode")(**CALLS["flash_decode"])
    assert [r.getMessage() for r in caplog.records] == [
        "flash_decode runs its PyTorch reference: this version has no Triton kernel for it"
    ]


def test_the_table_names_every_op_and_a_reason():
    done = subprocess.run([sys.executable, "-m", "aligngpt_kernels"], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert f"torch {torch.__version__}" in done.stdout
    for name in (*OPS, "injection_plan"):
        assert len(lines[name]) > 4, name
