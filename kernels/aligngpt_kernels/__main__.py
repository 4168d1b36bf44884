"""`python -m aligngpt_kernels`: which implementation each op takes on this machine, and why."""

import importlib.metadata

import torch

from .dispatch import chip, measured_ratio, why_not_auto, why_not_triton

OPS = {  # by op, the parts of its shapes that are measured on their own
    "fused_projector": ("M<=1152", "M>1152"),
    "text_mean": ("",),
    "align_gate": ("",),
    "inject": ("",),
    "project_and_inject": ("",),
    "linear_cross_entropy": ("",),
    "flash_decode": ("",),
}


def op_table(device: torch.device) -> list[tuple[str, str, str]]:
    """Rows (op, what `impl="auto"` runs, why) for inputs on `device`."""
    rows = []
    for op, buckets in OPS.items():
        for bucket in buckets:
            reason = why_not_triton(op, device) or why_not_auto(op, device, bucket)
            runs = "triton" if reason is None else "reference"
            rows.append((f"{op} {bucket}".strip(), runs, reason or _speed(op, device, bucket)))
    return [*rows, ("injection_plan", "torch", "index arithmetic on the ids' device")]


def _speed(op: str, device: torch.device, bucket: str) -> str:
    ratio, gpu = measured_ratio(op, device, bucket), f"sm_{chip(device).capability}"
    return f"its speed is not measured on {gpu}" if ratio is None else f"measured {ratio:.2f} × the reference on {gpu}"


def main() -> None:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} · triton {triton} · {name}\n")
    print(f"{'op':<28}{'runs':<12}why")
    for op, runs, why in op_table(device):
        print(f"{op:<28}{runs:<12}{why}")


if __name__ == "__main__":
    main()
