"""The house rules: who may import whom, which names files may have, and what the base install needs.

torch, triton  <-  aligngpt_kernels  <-  aligngpt  <-  training

The demo imports aligngpt and runs training by its commands, and so do the experiments, which import the demo too; tests
and benchmarks import the others.
"""

import ast
import re
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "aligngpt_kernels": ROOT / "kernels/aligngpt_kernels",
    "aligngpt": ROOT / "aligngpt",
    "training": ROOT / "training",
    "demo": ROOT / "demo",
    "experiments": ROOT / "experiments",
    "benchmarks": ROOT / "benchmarks",
    "tests": ROOT / "tests",
}
# What each package may import of the others.
MAY_IMPORT = {
    "aligngpt_kernels": set(),
    "aligngpt": {"aligngpt_kernels"},
    "training": {"aligngpt_kernels", "aligngpt"},
    "demo": {"aligngpt_kernels", "aligngpt"},
    "experiments": {"aligngpt_kernels", "aligngpt", "demo"},
    "benchmarks": {"aligngpt_kernels", "aligngpt", "training"},
    "tests": {"aligngpt_kernels", "aligngpt", "training", "demo", "experiments", "benchmarks"},
}


def imports(file: Path) -> set[str]:
    """Top-level names of every absolute import in a file, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for file in files:
        strangers = (imports(file) & PACKAGES.keys()) - MAY_IMPORT[package] - {package}
        assert not strangers, f"{file.relative_to(ROOT)} imports {', '.join(strangers)}"


def test_the_kernels_need_only_torch_and_triton():
    for file in PACKAGES["aligngpt_kernels"].rglob("*.py"):
        foreign = imports(file) - set(sys.stdlib_module_names) - {"torch", "triton", "aligngpt_kernels"}
        assert not foreign, f"{file.relative_to(ROOT)} imports {', '.join(foreign)}"


def test_the_folder_of_the_kernels_is_no_package():
    """A top-level package `kernels` would shadow the unrelated one that transformers looks for."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_no_script_hides_a_module():
    """`python training/x.py` puts training/ first on the path: a file `x.py` there hides any module `x`."""
    taken = set(sys.stdlib_module_names) | packages_distributions().keys() | {"datasets", "profile", "logging"}
    hidden = {file.stem for file in PACKAGES["training"].glob("*.py")} & taken
    assert not hidden


@pytest.mark.parametrize("entry", ["pretrain", "finetune"])
def test_entry_points_import_by_full_name(entry):
    """`torchrun training/pretrain.py` and `torchrun -m training.pretrain` must see one copy of each module."""
    siblings = {file.stem for file in PACKAGES["training"].glob("*.py")}
    assert not imports(ROOT / f"training/{entry}.py") & siblings


def closure(names: list[str]) -> set[str]:
    """Distributions that the named ones need, extras left aside."""
    found: set[str] = set()
    while names:
        name = re.split(r"[^\w.-]", names.pop())[0].lower().replace("_", "-")
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            names += [requirement for requirement in requires if "extra ==" not in requirement]
    return found


def test_the_base_wheel_runs_the_ops_without_transformers(tmp_path):
    """The wheel in a clean environment that holds the base dependencies, linked from this one, and nothing else."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("aligngpt-*.whl")
    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean/bin/python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (tmp_path / "clean/lib").glob("python*/site-packages")
    for name in closure(["torch", "triton", "numpy"]):
        for top in {Path(str(path)).parts[0] for path in distribution(name).files or []} - {"..", "__pycache__"}:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    script = """
import importlib.util, torch
assert importlib.util.find_spec("transformers") is None
import aligngpt, training
from aligngpt_kernels import fused_projector, injection_plan, inject
ids = torch.tensor([[1, 10, 5, 11, 11, 6]])
plan = injection_plan(ids, image_token_id=11, align_token_id=10)
rows = fused_projector(torch.ones(1, 2, 3), torch.ones(4, 3), torch.ones(4), torch.ones(4, 4), torch.ones(4))
out = inject(ids, torch.zeros(10, 4), rows, torch.full((1, 4), 7.0), plan=plan)
assert out[0, :, 0].round().tolist() == [0, 7, 0, 17, 17, 0], out  # gelu(4) = 4 - 1e-4
try:
    aligngpt.AlignGPTProcessor
except ImportError as error:
    assert "pip install 'aligngpt[train]'" in str(error)
else:
    raise AssertionError("aligngpt.AlignGPTProcessor without transformers")
"""
    result = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert result.returncode == 0, result.stderr
    table = subprocess.run(
        [python, "-m", "aligngpt_kernels"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert table.returncode == 0, table.stderr
    assert "fused_projector" in table.stdout
