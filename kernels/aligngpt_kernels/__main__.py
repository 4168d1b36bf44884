"""`python -m aligngpt_kernels`: which implementation each op takes on this machine, and why."""

import importlib.metadata

import torch

from .dispatch import why_not_triton

OPS = (
    "fused_projector",
    "text_mean",
    "align_gate",
    "inject",
    "project_and_inject",
    "linear_cross_entropy",
    "flash_decode",
)


def op_table(device: torch.device) -> list[tuple[str, str, str]]:
    """Rows (op, what runs it, why) for inputs on `device`."""
    rows = []
    for op in OPS:
        reason = why_not_triton(op, device)
        rows.append((op, "triton", f"the inputs are on {device}") if reason is None else (op, "reference", reason))
    return [*rows, ("injection_plan", "torch", "index arithmetic on the ids' device")]


def main() -> None:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} · triton {triton} · {name}\n")
    print(f"{'op':<22}{'runs':<12}why")
    for op, runs, why in op_table(device):
        print(f"{op:<22}{runs:<12}{why}")


if __name__ == "__main__":
    main()
