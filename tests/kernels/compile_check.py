"""Compiles the kernels for chips that are not there, and reads what came out: `compile_check.py FAMILY [--all]`.

A launcher is called as in training, with meta tensors of AlignGPT-7B's shapes, and every kernel it launches is
compiled for the chip instead, specialised as the JIT would. Prints one JSON line a kernel. Runs in a process of its
own: Triton's interpreter, which the other tests use, and its compiler cannot share one.

`compiled/FAMILY.py` lists the calls: `calls(chip)` gives `(name, call, default)`, in the order of their worth. Without
`--all`, 12 at most: sm_90's first eight, and of sm_80 and sm_100 the first two defaults. With it, also the defaults for
two chips with less than half the shared memory.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from aligngpt_kernels.dispatch import A100, B200, H100, Chip, assume_chip
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

RTX_4090, RTX_5090 = Chip(89, 128, 101_376), Chip(120, 170, 101_376)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORE = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")


class AbsentGpu:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, chip: Chip):
        self.target = GPUTarget("cuda", chip.capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # the JIT keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a kernel; a stack means that registers were spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def has_tensor_core_dot(ttir: str) -> bool:
    """Whether a `tl.dot` takes 16-bit operands, or 32-bit ones in tf32."""
    dots = [line for line in ttir.splitlines() if "tt.dot" in line]
    return any("bf16" in dot or "xf16" in dot or "inputPrecision = tf32" in dot for dot in dots)


def compile_call(chip: Chip, name: str, call: Any) -> list[dict[str, Any]]:
    """The kernels that `call` launches, compiled for `chip`."""
    compiled: list[Any] = []

    def instead_of_running(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    run = JITFunction.run
    JITFunction.run = instead_of_running
    try:
        driver.set_active(AbsentGpu(chip))
        with assume_chip(chip):
            call()
    finally:
        JITFunction.run = run
    assert compiled, f"{name} launches no kernel"
    return [
        {
            "call": name,
            "capability": chip.capability,
            "kernel": kernel.metadata.name,
            "shared": kernel.metadata.shared,
            "shared_limit": chip.shared_bytes,
            **resources(kernel.asm["cubin"]),
            "dot": has_tensor_core_dot(kernel.asm["ttir"]),
            "tensor_core": [word for word in TENSOR_CORE if word in kernel.asm["ptx"]],
        }
        for kernel in compiled
    ]


def main() -> None:
    family, everything = sys.argv[1], "--all" in sys.argv
    spec = importlib.util.spec_from_file_location(family, Path(__file__).parent / "compiled" / f"{family}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for chip in (H100, A100, B200, *([RTX_4090, RTX_5090] if everything else [])):
        calls = module.calls(chip)
        defaults = [call for call in calls if call[2]]
        if chip in (RTX_4090, RTX_5090):
            calls = defaults
        elif not everything:
            calls = calls[:8] if chip is H100 else defaults[:2]
        for name, call, _ in calls:
            with torch.device("meta"):
                for row in compile_call(chip, name, call):
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
