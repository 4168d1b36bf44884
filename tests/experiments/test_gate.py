"""A gate that is drawn larger has so many times the weights, and nothing else of its model differs."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments import gate

WEIGHTS = {"model.align_gate.linear_1.weight": (6, 9), "model.align_gate.linear_2.weight": (7, 6)}
OTHERS = {"model.align_gate.linear_1.bias": (6,), "model.align_gate.linear_2.bias": (7,), "model.align_table": (8, 4)}


def test_weights_are_times_as_large_and_all_else_is_equal(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    tensors = {name: torch.randn(shape) for name, shape in (WEIGHTS | OTHERS).items()}
    tensors["lm_head.weight"] = torch.randn(11, 4, dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt", "of": "a test"})
    (model / "config.json").write_text("{ }\n")
    (model / "tokenizer.bin").write_bytes(bytes(range(256)))

    monkeypatch.setattr("sys.argv", ["gate", str(model), str(out), "--times", "4"])
    gate.main()
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.bin"]
    for name in ("config.json", "tokenizer.bin"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    found = load_file(out / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], 4 * tensor if name in WEIGHTS else tensor), name
    with safe_open(out / "model.safetensors", framework="pt") as header:
        assert header.metadata() == {"format": "pt", "of": "a test"}

    del tensors["model.align_gate.linear_2.weight"]
    save_file(tensors, model / "model.safetensors")
    monkeypatch.setattr("sys.argv", ["gate", str(model), str(tmp_path / "other"), "--times", "4"])
    with pytest.raises(SystemExit, match=r"error: MODEL is .*linear_1\.weight'\]; it needs .*, .*linear_2\.weight"):
        gate.main()
    assert not (tmp_path / "other").exists()
