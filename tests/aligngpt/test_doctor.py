"""aligngpt.doctor: it runs wherever Python does, and says of each package what is true."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from aligngpt import doctor
from aligngpt.cli import main
from aligngpt.doctor import PACKAGES, TORCH, Finding, diagnose, examine, fits, report

SETUP = Path(__file__).parents[2] / "setup.py"
BY_NAME = {package.name: package for package in (TORCH, *PACKAGES)}
OPTIONAL = [package for package in PACKAGES if not package.required]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a package on the path, made of files by name; it hides an installed one until the test ends."""

    def make(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        for top in {name.split("/")[0] for name in files}:
            for module in [m for m in sys.modules if m == top or m.startswith(f"{top}.")]:
                monkeypatch.delitem(sys.modules, module)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield make
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run_without(*modules: str, script: str) -> subprocess.CompletedProcess:
    """Run Python in which importing `modules` fails as if they were not installed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"
    return subprocess.run([sys.executable, "-c", block + script], capture_output=True, text=True)


REFERENCE = """
import json, torch, aligngpt
from aligngpt_kernels import fused_projector
ones = torch.ones(2, 2)
assert fused_projector(ones, ones, ones[0], ones, ones[0]).shape == (2, 2)
"""
DOCTOR = """
from aligngpt.cli import main
status = main(["doctor", "--json"])
assert main(["doctor"]) == status
sys.exit(status)
"""


def facts_of(done: subprocess.CompletedProcess) -> tuple[dict, str]:
    """The JSON and the text of `DOCTOR`, which may exit with 0 or 1."""
    assert done.returncode in (0, 1), done.stderr
    facts, end = json.JSONDecoder().raw_decode(done.stdout)
    assert done.returncode == (0 if facts["ok"] else 1)
    return facts | {"status": {package["name"]: package["status"] for package in facts["packages"]}}, done.stdout[end:]


def test_fault_60_every_optional_package_missing():
    done = run_without(*(p.module.split(".")[0] for p in OPTIONAL if "dali" not in p.name), "nvidia.dali",
                       script=REFERENCE + DOCTOR)  # fmt: skip
    facts, text = facts_of(done)
    assert done.returncode == 0, "optional packages are not needed"
    assert {facts["status"][package.name] for package in OPTIONAL} == {"missing"}
    for package in OPTIONAL:
        assert re.search(rf"^  missing  {package.name} .*; instead: {re.escape(package.instead)}$", text, re.MULTILINE)
        advised = re.search(rf"^  {re.escape(package.install)}  # .*\b{package.name}\b", text, re.MULTILINE)
        assert bool(advised) == (package.name != "apex"), package.name  # not to be installed
    why = "no GPU" if facts["no_gpu"] else "the package triton does not work"
    assert facts["choices"]["Triton"].startswith(f"runs no kernel here: {why}")
    assert {row["runs"] for row in facts["ops"][:-1]} == {"reference"}


@pytest.mark.parametrize("missing", ["transformers", "PIL", "safetensors"])
def test_fault_60_a_package_of_training_missing(missing):
    """The ops run, the names and the commands that need the package say so, and the exit status is 1."""
    script = f"""
try:
    aligngpt.AlignGPTProcessor
except ImportError as error:
    assert "pip install 'aligngpt[train]'" in str(error) and {missing!r} in str(error), error
else:
    raise AssertionError("a processor without {missing}")
from aligngpt.cli import main
assert main(["chat", "folder"]) == 2
"""
    done = run_without(missing, script=REFERENCE + script + DOCTOR)
    facts, text = facts_of(done)
    assert done.returncode == 1
    name = {"PIL": "pillow"}.get(missing, missing)
    assert facts["status"][name] == "missing"
    assert facts["status"]["torch"] == "ok"
    assert re.search(rf"^To repair\n(.*\n)*?  pip install -e '\.\[train\]'  # .*\b{name}\b", text, re.MULTILINE)
    assert "Not all that is needed works" in text
    assert "aligngpt doctor says what to do" in done.stderr


def test_fault_60_torch_missing():
    facts, text = facts_of(run_without("torch", script="import json, aligngpt" + DOCTOR))
    assert facts["status"]["torch"] == "missing"
    assert facts["status"]["transformers"] == "broken"
    assert facts["no_gpu"] == "torch is missing"
    assert facts["ops"] == []
    assert "  pip install torch  # torch\n" in text


@pytest.mark.parametrize("package", OPTIONAL, ids=lambda package: package.name)
def test_fault_60_each_optional_package_in_turn(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.module, None)
    assert examine(package) == Finding(package, "missing", repair=package.install)


def test_fault_60_the_wrong_apex_is_not_even_imported(fake):
    fake({"apex/__init__.py": "raise SystemExit('the web toolkit ran')", "apex/models.py": ""})
    finding = examine(BY_NAME["apex"])
    assert finding.status == "wrong"
    assert "unrelated web toolkit" in finding.detail
    assert finding.repair == "pip uninstall apex"
    assert "apex" not in sys.modules


@pytest.mark.parametrize(
    ("optimizers", "status", "detail"),
    [
        ("class FusedAdam: ...", "ok", ""),
        ("", "broken", "apex.optimizers has no FusedAdam"),
        ("raise ImportError('undefined symbol:\\n _ZN3c10')", "broken", "ImportError: undefined symbol: _ZN3c10"),
        ("import a_package_nobody_has", "broken", "ModuleNotFoundError: No module named 'a_package_nobody_has'"),
    ],
)
def test_fault_60_the_right_apex(fake, optimizers, status, detail):
    fake({"apex/__init__.py": "__version__ = '0.1'", "apex/optimizers/__init__.py": optimizers})
    finding = examine(BY_NAME["apex"])
    assert (finding.status, finding.detail) == (status, detail)
    assert finding.version == "0.1" or status == "broken"


def test_fault_60_dalis_placeholder(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    fake({"nvidia_dali-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: nvidia-dali\nVersion: 0.1\n"})
    finding = examine(BY_NAME["nvidia-dali"])
    assert (finding.status, finding.version) == ("wrong", "0.1")
    assert finding.repair == "pip uninstall nvidia-dali; pip install 'nvidia-dali-cuda130>=2.4'"


def test_a_broken_package_and_an_old_one(fake, capsys):
    fake(
        {
            "flash_attn/__init__.py": "print('noise')\nraise OSError('libcudart.so.12: cannot open')",
            "xformers/__init__.py": "__version__ = '0.0.9+cu118'",
            "xformers/ops.py": "print('noise')",
            "apex/__init__.py": "",
            "apex/optimizers/__init__.py": "raise SystemExit('no licence')",
        }
    )
    assert main(["doctor"]) == 0  # neither is needed
    out = capsys.readouterr().out
    assert re.search(r"^  broken   flash-attn +OSError: libcudart.so.12: cannot open$", out, re.MULTILINE)
    assert re.search(r"^  wrong    xformers +0\.0\.9\+cu118 +needs >=0\.0\.35$", out, re.MULTILINE)
    assert re.search(
        r"^To repair\n(.*\n)*?  pip uninstall flash-attn; pip install .*  # flash-attn$", out, re.MULTILINE
    )
    assert re.search(r"^  broken   apex +SystemExit: no licence$", out, re.MULTILINE)
    assert "noise" not in out


def test_an_old_package_that_lacks_a_module_is_not_called_missing(fake):
    fake(
        {
            "xformers/__init__.py": "",
            "xformers-0.0.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.9\n",
        }
    )
    package = replace(BY_NAME["xformers"], module="xformers.ops.fmha")
    assert examine(package)[1:4] == ("wrong", "0.0.9", "needs >=0.0.35")


def test_a_broken_transformers_does_not_stop_the_doctor(tmp_path):
    """What a torchvision made for another torch does: transformers is there and its import raises."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text("raise RuntimeError('operator torchvision::nms')")
    commands = """
from aligngpt.cli import main
for command in ("score", "preview", "chat"):
    assert main([command, "--help"]) == 2
import aligngpt.doctor
def diagnose(work=aligngpt.doctor.diagnose):
    raise RuntimeError("a bug of ours")
aligngpt.doctor.diagnose, work = diagnose, aligngpt.doctor.diagnose
try:
    main(["doctor"])
except RuntimeError as error:
    assert str(error) == "a bug of ours"
else:
    raise AssertionError("the bug is hidden")
aligngpt.doctor.diagnose = work
"""
    script = f"sys.path.insert(0, {str(tmp_path)!r})\n" + REFERENCE + commands + DOCTOR
    done = run_without(script=script)
    facts, _ = facts_of(done)
    broken = "a package that it needs is broken (RuntimeError: operator torchvision::nms)"
    for command in ("score", "preview", "chat"):
        assert f"aligngpt {command}: {broken}; aligngpt doctor says what to do\n" in done.stderr
    assert done.returncode == 1
    assert facts["status"]["transformers"] == "broken"
    assert "only the ops work: RuntimeError: operator torchvision::nms" in done.stderr


@pytest.mark.parametrize(
    ("version", "versions", "expected"),
    [
        ("5.16.1", ">=5.16.1,<6", True),
        ("5.16.0", ">=5.16.1,<6", False),
        ("6.0.0", ">=5.16.1,<6", False),
        ("5.100", ">=5.16.1,<6", True),
        ("2.11.0+cu130", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("2.14.0.dev20261101", ">=2.11", True),
        ("7", ">=4", True),
        ("anything", "", True),
    ],
)
def test_version_ranges(version, versions, expected):
    assert fits(version, versions) is expected


def test_what_training_is_installed_with_is_needed():
    train = SETUP.read_text(encoding="utf-8").split("TRAIN = [")[1].split("\n]")[0]
    names = {"transformers", *re.findall(r"""["']([a-z0-9-]+)>""", train)}
    assert names >= {"pyarrow", "matplotlib"}
    assert names <= {package.name for package in PACKAGES if package.required}


def test_the_ranges_are_those_of_setup():
    found = re.findall(r"""["']([a-z0-9-]+)((?:[<>]=?[\d.]+,?)+)""", SETUP.read_text(encoding="utf-8"))
    stated = dict(reversed(found))  # the first of each: lmms-eval narrows some
    for package in (TORCH, *PACKAGES):
        name = package.distributions[0] if package.distributions else package.name
        assert stated.get(name, "") == package.versions, name
        assert not package.versions or package.install == doctor.TRAIN or name in package.install


def fake_torch(cuda="13.0", count=1, sum_error=None, init_error=None):
    def ones(*args, **kwargs):
        if sum_error:
            raise sum_error
        return SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: 2.0))

    def init():
        if init_error:
            raise init_error

    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda, hip=None),
        ones=ones,
        cuda=SimpleNamespace(
            is_available=lambda: count > 0,
            device_count=lambda: count,
            get_device_properties=lambda index: gpu,
            is_bf16_supported=lambda including_emulation: True,
            init=init,
        ),
        distributed=SimpleNamespace(is_available=lambda: True, is_nccl_available=lambda: True),
    )


def test_gpus_and_the_reasons_for_none(monkeypatch, tmp_path):
    working, none = doctor._gpus(fake_torch(count=2))
    assert none is None
    assert [gpu["capability"] for gpu in working] == ["9.0", "9.0"]
    assert {gpu["status"] for gpu in working} == {"ok"}
    (broken,), _ = doctor._gpus(fake_torch(sum_error=RuntimeError("no kernel image is available")))
    assert (broken["status"], broken["detail"]) == ("broken", "RuntimeError: no kernel image is available")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    no_driver = fake_torch(count=0, init_error=RuntimeError("Found no NVIDIA driver\non your system"))
    assert doctor._gpus(no_driver) == ([], "RuntimeError: Found no NVIDIA driver on your system")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor._gpus(fake_torch(count=0)) == ([], "CUDA_VISIBLE_DEVICES hides them all")

    for driver in (True, False):
        monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
        _, reason = doctor._gpus(fake_torch(cuda=None))
        assert reason.startswith("this torch is a CPU build")
        assert ("install a CUDA build" in reason) is driver


def test_what_is_used_follows_gpu_and_packages():
    torch = fake_torch()
    there = [Finding(BY_NAME["triton"], "ok"), Finding(BY_NAME["nvidia-dali"], "ok")]
    on_gpu = doctor._choices(torch, doctor._gpus(torch)[0], None, there)
    assert (on_gpu["device"], on_gpu["processes"]) == ("cuda", "NCCL, one process a GPU")
    assert on_gpu["Triton"].startswith("runs the ops marked triton above")
    assert on_gpu["image decoding"].startswith("DALI in training, on the GPU")
    on_cpu = doctor._choices(torch, [], "none", there)
    assert (on_cpu["device"], on_cpu["processes"]) == ("cpu (none)", "gloo")
    assert on_cpu["Triton"].startswith("runs no kernel here: no GPU")
    assert on_cpu["image decoding"].startswith("DALI in training, on CPU threads")
    neither = [Finding(BY_NAME["triton"], "broken"), Finding(BY_NAME["nvidia-dali"], "missing")]
    without = doctor._choices(torch, doctor._gpus(torch)[0], None, neither)
    assert without["Triton"].startswith("runs no kernel here: the package triton does not work")
    assert without["image decoding"] == "PIL"
    for status, version, detail, decoding in (
        ("broken", None, "OSError: no", "PIL; training would take the DALI that is broken here, unless told"),
        ("wrong", "1.9", "needs >=2.4", "PIL; training would take the DALI that needs >=2.4 and is 1.9 here, unless"),
        ("wrong", "0.1", doctor._EMPTY_DALI, "PIL"),
    ):
        found = [there[0], Finding(BY_NAME["nvidia-dali"], status, version, detail)]
        choice = doctor._choices(torch, [], "none", found)["image decoding"]
        assert choice.startswith(decoding)
        assert ("--data.decoder pil" in choice) is (decoding != "PIL")
    dali = {cuda: next(p for p in doctor._for_cuda(fake_torch(cuda)) if p.module == "nvidia.dali").install
            for cuda in ("12.8", "13.0")}  # fmt: skip
    assert dali == {cuda: f"pip install 'nvidia-dali-cuda{cuda[:2]}0>=2.4'" for cuda in dali}


def test_the_report_is_plain_text_about_this_machine(capsys):
    facts = diagnose()
    text = report(facts)
    assert main(["doctor", "--json"]) == (0 if facts["ok"] else 1)
    assert json.loads(capsys.readouterr().out) == facts
    import torch
    import transformers

    assert re.search(rf"^  ok       torch +{re.escape(torch.__version__)} ", text, re.MULTILINE)
    assert re.search(rf"^  ok       transformers +{re.escape(transformers.__version__)} ", text, re.MULTILINE)
    assert text.isascii()
    for row in facts["ops"]:
        assert re.search(rf"^  {row['op']} +{row['runs']} +{re.escape(row['why'])}$", text, re.MULTILINE)
    assert (facts["no_gpu"] is None) == torch.cuda.is_available()
