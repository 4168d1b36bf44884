"""The results file of a GPU: what it holds, when a case in it still counts, and writing it so that it is never half."""

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

ROOT = Path(__file__).parents[1]
MEASURING = (
    "case.py",
    "measure.py",
    "shapes.py",
    "stages.py",
    "work.py",
)  # with bench_*.py, the files that a number depends on
PEERS = ("flash_attn", "xformers", "liger_kernel", "apex")


def write_json(path: Path, content: Any) -> None:
    """Replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def code_hash(root: Path = ROOT) -> str:
    """Of the kernels, of what measures them, and of the packages beneath: a case measured with other code is stale."""
    folder = root / "benchmarks"
    files = sorted(root.glob("kernels/aligngpt_kernels/**/*.py")) + sorted(folder.glob("bench_*.py"))
    return _hash(root, [*files, *(folder / name for name in MEASURING)], repr(sorted(versions().items())))


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
    for name in ("triton", *PEERS):
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


class Results:
    """The file of one device, read when it is there."""

    def __init__(self, folder: Path, device_name: str, capability: str) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
        self.path, self.code, self.training_code = folder / f"{slug}.json", code_hash(), training_hash()
        self.content: dict[str, Any] = {"cases": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        self.content |= {"device": device_name, "capability": capability, "versions": versions(), "commit": commit()}
        self.content |= {"code": self.code, "training_code": self.training_code}

    def save(self) -> None:
        write_json(self.path, self.content)

    def record(self, case: Case) -> dict[str, Any]:
        """The record of a case, emptied if it was made with other code."""
        found = self.content["cases"].get(case.name)
        if found is None or not is_current(found, vars(self)):
            found = {"code": self.code, "contenders": {}, "finished": False}
            if case.trains:
                found["training_code"] = self.training_code
            self.content["cases"][case.name] = found
        names = ("stage", "group", "items", "unit", "sweep", "bytes", "flops", "dispatch")
        about = {name: getattr(case, name) for name in names}
        found |= about | {"commit": self.content["commit"]} if not found["finished"] else about
        return found

    def left(self, cases: Sequence[Case]) -> list[Case]:
        """The cases still to be run; last those that an earlier run ended inside."""
        records = {name: r for name, r in self.content["cases"].items() if is_current(r, vars(self))}
        left = [case for case in cases if not records.get(case.name, {}).get("finished")]
        return sorted(left, key=lambda case: bool(records.get(case.name, {}).get("contenders")))


def is_current(record: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a case was measured with the code of a file's last writer."""
    return all(record[kind] == now[kind] for kind in ("code", "training_code") if kind in record)
