"""The results file of a device: what it holds, when a case in it still counts, and writing it so that it is never half.

A case counts while the code is the same that it depends on: the kernels, its own file of benchmarks with what that
imports from this folder, the packages beneath, and for one that trains the model and training too. Records from before
files were told apart name no file; they count while `code` of their file is theirs, and each names its commit.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case

HERE = Path(__file__).parent
ROOT = HERE.parent
SHOWING = {"conftest", "requirements", "results", "run"}  # say how results are asked for, kept and shown
# Beside torch: what a time, or who contends, may depend on.
PACKAGES = (
    "triton", "transformers", "numpy", "pillow", "nvidia_dali_cuda130", "nvidia_dali_cuda120",
    "flash_attn", "xformers", "liger_kernel", "apex",
)  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """Replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def code_hash(root: Path = ROOT, file: str = "") -> str:
    """Of what a case of this file of benchmarks depends on, or one of none, made by hand, beside model and training."""
    folder = root / "benchmarks"
    names = imported(folder, file) if file else {"case", "measure", "shapes"}
    files = sorted(root.glob("kernels/aligngpt_kernels/**/*.py")) + [folder / f"{name}.py" for name in sorted(names)]
    return _hash(root, files, repr(sorted(versions().items())))


def imported(folder: Path, name: str) -> set[str]:
    """The module and all of the folder that it imports, however late, but those that only show."""
    found, new = set[str](), {name}
    while new:
        module = new.pop()
        found.add(module)
        for node in ast.walk(ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            parts = [name.split(".") for name in names]
            new |= {p[1] for p in parts if p[0] == "benchmarks" and (folder / f"{p[1]}.py").exists()}
        new -= found | SHOWING
    return found


def training_hash(root: Path = ROOT) -> str:
    """Of model, training and its data's lengths, which a case that trains depends on besides."""
    files = [file for folder in ("aligngpt", "training") for file in sorted(root.glob(f"{folder}/**/*.py"))]
    return _hash(root, [*files, *(root / "benchmarks" / name for name in ("lengths.py", "plain.py"))])


def _hash(root: Path, files: Sequence[Path], more: str = "") -> str:
    digest = hashlib.sha256(more.encode())
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit(root: Path = ROOT) -> str:
    """The commit's name, with a plus sign if files but results differ from it; "unknown" outside a repository."""
    git = ["git", "-C", str(root)]
    status = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed.strip() else "")


def device_name() -> str:
    """The device that times are taken on, for example "AMD EPYC, 2 threads"."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


class Results:
    """The file of one device, read when it is there."""

    def __init__(self, folder: Path, device_name: str, capability: str) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
        self.path, self.training_code = folder / f"{slug}.json", training_hash()
        self.content: dict[str, Any] = {"cases": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        self.content |= {"device": device_name, "capability": capability, "versions": versions(), "commit": commit()}
        self.content |= {"training_code": self.training_code}
        self.codes: dict[str, str] = self.content.setdefault("codes", {})  # of each file of benchmarks
        self.codes |= {file: code_hash(file=file) for file in self.codes if not file or (HERE / f"{file}.py").exists()}

    def save(self) -> None:
        write_json(self.path, self.content)

    def code(self, case: Case) -> str:
        if case.file not in self.codes:
            self.codes[case.file] = code_hash(file=case.file)
        return self.codes[case.file]

    def is_current(self, case: Case, record: Mapping[str, Any]) -> bool:
        """Whether the case was measured with the code that is here."""
        training = self.training_code if case.trains else None
        return (record["code"], record.get("training_code")) == (self.code(case), training)

    def record(self, case: Case) -> dict[str, Any]:
        """The record of a case, emptied if it was made with other code, to be finished if it was noisy."""
        found = self.content["cases"].get(case.name)
        if found is None or not self.is_current(case, found):
            found = {"code": self.code(case), "file": case.file, "contenders": {}, "finished": False}
            if case.trains:
                found["training_code"] = self.training_code
            self.content["cases"][case.name] = found
        elif is_noisy(found):
            found["finished"] = False
        names = ("stage", "group", "items", "unit", "sweep", "bytes", "flops", "dispatch", "clock")
        about = {name: getattr(case, name) for name in names}
        found |= about | {"commit": self.content["commit"]} if not found["finished"] else about
        return found

    def left(self, cases: Sequence[Case]) -> list[Case]:
        """The cases still to be run; last those that were too noisy or that an earlier run ended inside."""
        known = self.content["cases"]
        records = {c.name: known[c.name] for c in cases if c.name in known and self.is_current(c, known[c.name])}
        done = {name for name, record in records.items() if record["finished"] and not is_noisy(record)}
        left = [case for case in cases if case.name not in done]
        return sorted(left, key=lambda case: bool(records.get(case.name, {}).get("contenders")))


def is_noisy(record: Mapping[str, Any]) -> bool:
    return any({"noisy", "noisy_wall"} & found.keys() for found in record["contenders"].values())


def is_current(record: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    """Whether a case was measured with the code of its file's last writer, who may have run other cases only.

    One that names no file is older than any that does.
    """
    codes = content.get("codes", {})
    code = codes.get(record["file"]) if "file" in record else None if codes else content.get("code")
    return record["code"] == code and record.get("training_code") in (None, content.get("training_code"))
