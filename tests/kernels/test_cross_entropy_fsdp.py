"""linear_cross_entropy with a weight cut over two processes equals the whole one. This file is also what they run."""

import gc
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from aligngpt_kernels import LinearCrossEntropy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WORDS, WIDTH = 37, 8  # 37: the processes hold 19 and 18 rows of the weight
SUPERVISED = [5, 0]  # rows of each process: the second one has nothing to learn from, and stays in step


def test_fault_42_two_processes_with_a_sharded_head_equal_one():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("runs on CPUs, in Triton's interpreter")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["sum", "mean", "none"]


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, labels and supervised rows of a process."""
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(9, WIDTH, generator=generator, requires_grad=True)
    labels = torch.full((9,), -100)
    rows = torch.randperm(9, generator=generator)[: SUPERVISED[rank]]
    labels[rows] = torch.randint(WORDS, rows.shape, generator=generator)
    return hidden, labels, rows


def results(module: torch.nn.Module, rank: int) -> list[Tensor]:
    """Loss, token losses and the gradient of hidden; the weight's is added to its own."""
    hidden, labels, rows = batch(rank)
    loss, each = module(hidden, labels, rows=rows)
    loss.backward(torch.linspace(0.5, 1.5, loss.numel()).view_as(loss))
    assert hidden.grad is not None
    return [loss.detach(), each, hidden.grad]


def check(reduction: str, *, trains: bool, reshard: bool) -> None:
    torch.manual_seed(0)
    whole = LinearCrossEntropy(torch.nn.Parameter(torch.randn(WORDS, WIDTH)), reduction=reduction, impl="triton")
    whole.requires_grad_(trains)
    sharded = LinearCrossEntropy(torch.nn.Parameter(whole.weight.detach().clone()), reduction=reduction, impl="triton")
    sharded.requires_grad_(trains)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=reshard)
    wanted = [results(whole, rank) for rank in range(2)][dist.get_rank()]
    for got, want in zip(results(sharded, dist.get_rank()), wanted, strict=True):
        assert torch.equal(got, want)
    if trains:
        assert torch.equal(2 * sharded.weight.grad.full_tensor(), whole.weight.grad)  # FSDP takes the mean
    else:
        assert sharded.weight.grad is None


def main() -> None:
    dist.init_process_group("gloo")
    for reduction in ("sum", "mean", "none"):
        for trains in (True, False):
            for reshard in (True, False):
                check(reduction, trains=trains, reshard=reshard)
        if dist.get_rank() == 0:
            print(reduction)
    gc.collect()  # else a thread of gloo may free the last collective's tensor while the interpreter ends, and abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
