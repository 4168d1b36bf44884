"""What the documents tell a reader to type."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("document", ["README.md", "kernels/README.md"])
def test_the_ops_snippet_runs_alone(document):
    (snippet,) = (block for block in blocks(document, "python") if "aligngpt_kernels" in block)
    assert len([line for line in snippet.splitlines() if line]) <= 6 or document != "README.md"
    names: dict[str, object] = {}
    exec(snippet, names)
    result = names["embeddings" if document == "README.md" else "inputs_embeds"]
    assert tuple(result.shape) == (1, 21, 64)


@pytest.fixture(scope="module")
def workplace(talker, tokenizer, tmp_path_factory):
    """A folder in which the snippets' paths exist: a model and the picture of a cat."""
    from aligngpt import AlignGPTProcessor
    from aligngpt.processor import AlignGPTImageProcessor

    folder = tmp_path_factory.mktemp("workplace")
    model = folder / "runs/stage-2/model"
    talker.save_pretrained(model)
    AlignGPTProcessor.for_model(talker.config, AlignGPTImageProcessor(56), tokenizer).save_pretrained(model)
    Image.new("RGB", (64, 48), "gray").save(folder / "cat.jpg")
    return folder


@pytest.mark.parametrize("document", ["README.md", "docs/answering.md", "docs/ecosystem.md"])
def test_the_model_snippet_answers(document, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    (snippet,) = (block for block in blocks(document, "python") if "runs/stage-2/model" in block)
    asked = [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What?"}]}]
    names: dict[str, Any] = {"conversations": [asked, asked]}
    exec(snippet, names)
    if "tokens" in names:
        assert names["tokens"].shape == (1, names["inputs"]["input_ids"].shape[1] + 64)
    if "print(" in snippet:
        assert capsys.readouterr().out.strip()
    if "requests" in names:
        assert names["answer"].text


def test_links_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels/README.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.slow
def test_the_real_run_works_as_written(tmp_path, emoji_like):
    """Every command of docs/real-run.md up to the full-size part, in order, on data made here."""
    small = (ROOT / "docs/real-run.md").read_text(encoding="utf-8").split("## The full-size run")[0]
    commands = re.findall(r"^```bash\n(.*?)^```", small, re.MULTILINE | re.DOTALL)
    assert len(commands) == 4
    for name in ("training", "aligngpt", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"DATA": str(emoji_like), "PATH": path, "OMP_NUM_THREADS": "1"}
    output = ""
    for command in commands:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        output += result.stdout
    assert re.search(r"^answer: +\S", output, re.MULTILINE)
    assert "<image>×16" in output
