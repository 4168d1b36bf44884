"""`aligngpt doctor`: what this machine has, what AlignGPT does with it, and what to install.

`aligngpt doctor DATA` looks at a data set instead: see `aligngpt.data_doctor`.

Every package is imported to learn whether it works, and ends up as one of

    ok        it is there and works
    missing   it is not installed
    wrong     another package of that name, or a version outside the range
    broken    it is installed, and importing it fails

Nothing beyond the standard library is imported to begin with, so this runs where torch or transformers is missing or
broken. The exit status is 0 if all that training and answering need is ok, else 1; optional packages do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "missing", "wrong", "broken"]
TRAIN = "pip install -e '.[train]'"  # in a clone
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Package:
    """A package AlignGPT can make use of.

    name: what people call it; also its name for pip, unless `distributions` lists others.
    module: imported to see whether it works.
    use: what it is for in this version; instead: what happens without it.
    versions: as in setup.py.
    """

    name: str
    module: str
    use: str
    install: str = TRAIN
    instead: str = ""
    versions: str = ""
    required: bool = False
    distributions: tuple[str, ...] = ()


PACKAGES = (
    Package("numpy", "numpy", "arrays of pictures and files", versions=">=1.26", required=True),
    Package(
        "transformers",
        "transformers.models.llava.modeling_llava",  # the package alone imports lazily, and so nearly always
        "the LLM, the vision tower, generate",
        versions=">=5.16.1,<6",
        required=True,
    ),
    Package("accelerate", "accelerate", "transformers' device_map", versions=">=1.1", required=True),
    Package("safetensors", "safetensors.torch", "files of weights", versions=">=0.5", required=True),
    Package("sentencepiece", "sentencepiece", "tokenizer.model of Vicuna and Llama-2", versions=">=0.2", required=True),
    Package("protobuf", "google.protobuf", "converting tokenizer.model", versions=">=4", required=True),
    Package("pillow", "PIL.Image", "decoding and resizing pictures", versions=">=10", required=True),
    Package("tqdm", "tqdm", "progress bars", versions=">=4.66", required=True),
    Package("pyarrow", "pyarrow.parquet", "files of scores and levels", versions=">=17", required=True),
    Package("matplotlib", "matplotlib", "pictures of levels and of data sets", versions=">=3.9", required=True),
    Package("peft", "peft", "adapters in training (--lora.rank)", versions=">=0.18", required=True),
    Package("tyro", "tyro", "command lines of training", versions=">=0.9", required=True),
    Package(
        "triton",
        "triton",
        "kernels of the ops on NVIDIA GPUs",
        "pip install 'triton>=3.6'",
        "PyTorch references",
        versions=">=3.6",
    ),
    Package(
        "nvidia-dali",
        "nvidia.dali",
        "decoding pictures in training (--data.decoder)",
        "pip install 'nvidia-dali-cuda130>=2.4'",  # of torch's CUDA 13; see `_for_cuda`
        "PIL decodes them",
        versions=">=2.4",
        distributions=("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    ),
    Package(
        "flash-attn",
        "flash_attn",
        "attention in training on GPUs; elsewhere where attn_implementation asks for it",
        "pip install --no-build-isolation 'flash-attn>=2.8'",
        "PyTorch's attention",
        versions=">=2.8",
    ),
    Package(
        "xformers",
        "xformers.ops",
        "attention in training on GPUs, where flash-attn and torch's own cannot run",
        "pip install 'xformers>=0.0.35'",
        "PyTorch's attention",
        versions=">=0.0.35",
    ),
    Package(
        "apex",
        "apex.optimizers",
        "its FusedAdam in training, where asked for (--optim.kind apex)",
        "# nothing to install: torch's fused AdamW is its equal (NVIDIA's apex is built from its source)",
        "torch.optim.AdamW(fused=True)",
    ),
    Package(
        "tensorboard",
        "tensorboard",
        "curves of training (--log.tensorboard)",
        "pip install 'tensorboard>=2.15'",
        "metrics.jsonl and training/plot.py",
        versions=">=2.15",
    ),
    Package(
        "wandb",
        "wandb",
        "curves of training on a server (--log.wandb)",
        "pip install 'wandb>=0.17'",
        "metrics.jsonl and training/plot.py",
        versions=">=0.17",
    ),
    Package(
        "gradio",
        "gradio",
        "the page and the HTTP API of aligngpt chat --web",
        "pip install 'gradio>=6'",
        "aligngpt chat in the terminal",
        versions=">=6",
    ),
    Package(
        "openpyxl",
        "openpyxl",
        "MMBench in aligngpt eval",
        "pip install 'openpyxl>=3.1'",
        "all other benchmarks",
        versions=">=3.1",
    ),
)
TORCH = Package(
    "torch",
    "torch",
    "everything (https://pytorch.org has the build for each machine)",
    "pip install torch",
    versions=">=2.11",
    required=True,
)


_EMPTY_DALI = "PyPI's nvidia-dali is an empty placeholder"


class Finding(NamedTuple):
    """What became of one package. `detail` says what is wrong with it, `repair` what to do."""

    package: Package
    status: Status
    version: str | None = None
    detail: str = ""
    repair: str = ""


def examine(package: Package) -> Finding:
    """Import a package, and say what came of it."""
    version, top = _version(package), package.module.split(".")[0]
    if package.name == "apex" and _is_web_toolkit():
        what = "this is the unrelated web toolkit that PyPI calls apex, not NVIDIA's (which has apex.optimizers)"
        return Finding(package, "wrong", version, what, "pip uninstall apex")
    try:
        with _quiet():
            import_module(top)
            module = import_module(package.module)
    except (Exception, SystemExit) as error:  # a broken package raises whatever it trips over
        if not isinstance(error, ModuleNotFoundError) or error.name not in (top, package.module):
            if version and not fits(version, package.versions):  # transformers 4 lacks modules that 5 has
                return Finding(package, "wrong", version, f"needs {package.versions}", package.install)
            return Finding(package, "broken", version, _one_line(error), _install_anew(package))
        if package.name == "nvidia-dali" and (version := _distribution_version("nvidia-dali")):
            repair = f"pip uninstall nvidia-dali; {package.install}"
            return Finding(package, "wrong", version, _EMPTY_DALI, repair)
        return Finding(package, "missing", repair=package.install)
    if package.name == "apex" and not hasattr(module, "FusedAdam"):
        return Finding(package, "broken", version, "apex.optimizers has no FusedAdam", _install_anew(package))
    version = version or getattr(sys.modules[top], "__version__", None)
    if version and not fits(version, package.versions):
        return Finding(package, "wrong", version, f"needs {package.versions}", package.install)
    return Finding(package, "ok", version)


def why_not(name: str) -> str | None:
    """Why one of `PACKAGES` can't be used here; None if it can."""
    found = examine(next(package for package in PACKAGES if package.name == name))
    return None if found.status == "ok" else found.detail or "it is not installed"


def fits(version: str, versions: str) -> bool:
    """Whether a version lies in a range such as ">=5.16.1,<6". Letters (dev, rc, +cpu) are not looked at."""

    def numbers(text: str) -> tuple[int, ...]:
        release = re.match(r"[\d.]*", text)
        found = [int(number) for number in release[0].split(".") if number] if release else []
        return tuple(found + [0] * (4 - len(found)))

    for bound in filter(None, versions.split(",")):
        least = bound.startswith(">=")
        if (numbers(version) >= numbers(bound.lstrip(">=<"))) != least:
            return False
    return True


def _is_web_toolkit() -> bool:
    """Whether the apex that is installed lacks NVIDIA's optimizers. It is not imported to find out."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False
    inside = spec.submodule_search_locations or []
    return importlib.machinery.PathFinder.find_spec("apex.optimizers", list(inside)) is None


def _version(package: Package) -> str | None:
    found = (_distribution_version(name) for name in package.distributions or (package.name,))
    return next(filter(None, found), None)


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install_anew(package: Package) -> str:
    names = [name for name in package.distributions if _distribution_version(name)] or [package.name]
    return f"pip uninstall {names[0]}; {package.install}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What packages print and warn while they are imported is not ours to show."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _one_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 200 else text[:199] + "..."


# ---- the machine ---------------------------------------------------------------------------------------------------


def diagnose() -> dict[str, Any]:
    """All facts, as plain JSON values; `report` writes them as text."""
    torch_finding = examine(TORCH)
    torch = sys.modules["torch"] if torch_finding.status == "ok" else None
    gpus, no_gpu = _gpus(torch) if torch else ([], f"torch is {torch_finding.status}")
    findings = [torch_finding, *map(examine, _for_cuda(torch))]
    python_ok = sys.version_info >= (3, 11)
    return {
        "ok": python_ok
        and all(finding.status == "ok" for finding in findings if finding.package.required)
        and all(gpu["status"] == "ok" for gpu in gpus),
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "python_status": "ok" if python_ok else "wrong",
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "torch_build": _build(torch) if torch else None,
        "gpus": gpus,
        "no_gpu": no_gpu,
        "packages": [
            {
                "name": finding.package.name,
                "status": finding.status,
                "version": finding.version,
                "required": finding.package.required,
                "use": finding.package.use,
                "instead": finding.package.instead,
                "detail": finding.detail,
                "repair": finding.repair,
            }
            for finding in findings
        ],
        "ops": _ops(bool(gpus)) if torch else [],
        "choices": _choices(torch, gpus, no_gpu, findings) if torch else {},
    }


def _for_cuda(torch: ModuleType | None) -> list[Package]:
    """The optional packages, with DALI's build for torch's CUDA."""
    cuda = getattr(getattr(torch, "version", None), "cuda", None) or ""
    if not cuda.startswith("12."):
        return list(PACKAGES)
    return [replace(package, install=package.install.replace("cuda130", "cuda120")) for package in PACKAGES]


def _build(torch: ModuleType) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if getattr(torch.version, "hip", None) else "CPU"


def _gpus(torch: ModuleType) -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that torch sees, each tried with one small sum, and why there are none."""
    if _build(torch) == "CPU":
        has_driver = NVIDIA_DRIVER.exists()
        hint = (
            "; this machine has an NVIDIA driver: install a CUDA build from https://pytorch.org" if has_driver else ""
        )
        return [], f"this torch is a CPU build{hint}"
    with _quiet():
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return [], "CUDA_VISIBLE_DEVICES hides them all"
        try:
            with _quiet():
                torch.cuda.init()
        except Exception as error:
            return [], _one_line(error)
        return [], "torch.cuda finds no device"
    gpus: list[dict[str, Any]] = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "status": "ok",
            "detail": "",
        }
        try:
            torch.ones(2, device=f"cuda:{index}").sum().item()
        except Exception as error:
            gpu |= {"status": "broken", "detail": _one_line(error)}
        gpus.append(gpu)
    return gpus, None


def _ops(has_gpu: bool) -> list[dict[str, str]]:
    import torch
    from aligngpt_kernels.__main__ import op_table

    table = op_table(torch.device("cuda" if has_gpu else "cpu"))
    return [{"op": op, "runs": runs, "why": why} for op, runs, why in table]


def _choices(
    torch: ModuleType, gpus: list[dict[str, Any]], no_gpu: str | None, findings: list[Finding]
) -> dict[str, str]:
    """What this version does here, part by part."""
    by_name = {finding.package.name: finding for finding in findings}
    triton_works = by_name["triton"].status == "ok"
    why_not = "no GPU" if not gpus else "" if triton_works else "the package triton does not work"
    triton = f"runs no kernel here: {why_not}" if why_not else "runs the ops marked triton above"
    processes = "NCCL, one process a GPU" if gpus else "gloo"
    if not torch.distributed.is_available():
        processes = "one process only: this torch is built without torch.distributed"
    elif gpus and not torch.distributed.is_nccl_available():
        processes = "training does not run: this torch is built without NCCL"
    decoding, dali = "PIL", by_name["nvidia-dali"]
    if dali.status == "ok":
        decoding = (
            f"DALI in training, on {'the GPU' if gpus else 'CPU threads'}; PIL for what it does not take, and elsewhere"
        )
    elif dali.status != "missing" and dali.detail != _EMPTY_DALI:  # training takes what it finds
        what = "is broken" if dali.status == "broken" else f"{dali.detail} and is {dali.version}"
        decoding = f"PIL; training would take the DALI that {what} here, unless told --data.decoder pil"
    precision = "arithmetic in bf16 (--precision), in fp32 with the preset tiny; trained weights in fp32"
    if gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        precision += "; this GPU only emulates bf16"
    return {
        "device": "cuda" if gpus else f"cpu ({no_gpu})",
        "Triton": triton,
        "image decoding": decoding,
        "attention": "PyTorch's scaled_dot_product_attention, chosen by transformers; in training "
        + ("the first of flash-attn, torch-varlen, xformers and flex that can run" if gpus else "sequence by sequence")
        + "; the log says which; in answering flash_decode",
        "optimizer": "torch.optim.AdamW(fused=True)",
        "processes": processes,
        "precision": precision,
    }


# ---- text ----------------------------------------------------------------------------------------------------------


def report(facts: dict[str, Any]) -> str:
    """The facts of `diagnose` as aligned text."""
    machine = facts["machine"]
    lines = [
        "Machine",
        _row(
            machine["python_status"],
            f"Python {machine['python']}",
            "" if machine["python_status"] == "ok" else "needs 3.11 or newer",
        ),
        _row("", f"{machine['system']}, {machine['cpus']} CPUs, {_gib(machine['memory_bytes'])} of memory"),
    ]
    for index, gpu in enumerate(facts["gpus"]):
        what = f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, compute capability {gpu['capability']}"
        lines.append(_row(gpu["status"], f"GPU {index}: {what}", gpu["detail"]))
    if facts["no_gpu"]:
        lines.append(_row("", f"no GPU: {facts['no_gpu']}"))

    name_width = max(len(package["name"]) for package in facts["packages"])
    version_width = max(len(package["version"] or "") for package in facts["packages"])
    for title, required in (("Needed", True), ("Optional", False)):
        lines += ["", title]
        for package in facts["packages"]:
            if package["required"] == required:
                name = f"{package['name']:{name_width}}  {package['version'] or '':{version_width}}"
                lines.append(_row(package["status"], name, _remark(package, facts["torch_build"])))

    if facts["ops"]:
        lines += ["", "Ops of aligngpt_kernels"]
        lines += [f"  {row['op']:28}{row['runs']:11}{row['why']}" for row in facts["ops"]]
    if facts["choices"]:
        lines += ["", "What is used here"]
        lines += [f"  {part:16}{choice}" for part, choice in facts["choices"].items()]

    for title, chosen in (
        ("To repair", [p for p in facts["packages"] if p["repair"] and (p["required"] or p["status"] != "missing")]),
        (
            "Could be added, nothing needs it",
            [
                p
                for p in facts["packages"]
                if not (p["required"] or p["repair"].startswith("#")) and p["status"] == "missing"
            ],
        ),
    ):
        if chosen:
            lines += ["", title]
            for repair in dict.fromkeys(package["repair"] for package in chosen):
                names = ", ".join(package["name"] for package in chosen if package["repair"] == repair)
                lines.append(f"  {repair}  # {names}")
    verdict = "All that is needed works." if facts["ok"] else "Not all that is needed works; see above."
    return "\n".join([*lines, "", verdict])


def _remark(package: dict[str, Any], torch_build: str | None) -> str:
    if package["status"] == "ok":
        return f"{torch_build} build" if package["name"] == "torch" else package["use"]
    if package["status"] == "missing":
        return "; instead: ".join(filter(None, (package["use"], package["instead"])))
    return package["detail"]


def _row(status: str, what: str, remark: str = "") -> str:
    return f"  {status:9}{what}  {remark}".rstrip()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


# ---- the command ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt doctor`."""
    parser.add_argument("--json", action="store_true", help="the same facts as JSON")
    data = parser.add_argument_group("a data set instead of the machine")
    data.add_argument(
        "data", metavar="DATA", nargs="?", help="LLaVA JSON file, JSON lines or shards: every sample is tried"
    )
    data.add_argument("--image-folder", metavar="DIR", help="what the data's image names start from")
    data.add_argument("--model", metavar="FOLDER", help="a model folder, whose processor counts and cuts tokens")
    data.add_argument("--template", metavar="T", help="conversation template, instead of the model's own")
    data.add_argument("--max-length", type=int, metavar="N", help="tokens of a sample, instead of the model's own")
    data.add_argument("--max-drop-rate", type=float, metavar="R", help="share dropped that is too much (default 0.01)")
    data.add_argument("--workers", type=int, metavar="N", help="processes (default: as many as there are cores)")
    data.add_argument("--out", metavar="DIR", help="write bad_samples.jsonl and summary.png there")


def run(args: argparse.Namespace) -> int:
    """`aligngpt doctor`: 0 if all that is needed works, else 1; with DATA, 0 if training would go on with it."""
    if args.data is not None:
        from . import data_doctor

        return data_doctor.run(args)
    for name in ("image_folder", "model", "template", "max_length", "max_drop_rate", "workers", "out"):
        if (value := getattr(args, name)) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it needs DATA, the data set it is about")
    facts = diagnose()
    text = json.dumps(facts, indent=2) if args.json else report(facts)
    print(text.encode("ascii", "replace").decode())
    return 0 if facts["ok"] else 1
