"""What several tests need: the oracle, tiny random backbones, and folders made of them."""

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ORACLE = Path(__file__).parent / "data" / "oracle"
ROWS = 16  # image rows of the oracle's tower: 56 px, patches of 14
VOCAB = 320
ALIGN, IMAGE = VOCAB, VOCAB + 1
WIDTH = 64

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a kernel is defined, so before `aligngpt_kernels`


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stop and go on")
    group.addoption("--resume", type=Path, metavar="FILE", help="leave out what passed before with the same code")
    group.addoption("--stop-after", type=float, metavar="SECONDS", help="end after the test that is then running")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("resume"):
        config.pluginmanager.register(_Resume(config.getoption("resume"), config.getoption("stop_after")))


class _Resume:
    """Keeps in a file which tests passed or were skipped with this code; they are not run again.

    Each line is a mark and a test's name: "?" it began, "+" it passed. One that began and did not pass, because it
    failed or took its process with it, runs last next time, so that it is in nobody's way.
    """

    def __init__(self, file: Path, seconds: float | None) -> None:
        self.file, self.deadline = file, math.inf if seconds is None else time.monotonic() + seconds
        self.left, self.done, self.failed = 0, 0, False
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        current = lines[:1] == [self.code()]
        self.passed = {line[1:] for line in lines if line.startswith("+")} if current else set()
        self.began = {line[1:] for line in lines if line.startswith("?")} if current else set()
        if not current:
            file.write_text(self.code() + "\n", encoding="utf-8")

    @staticmethod
    def code() -> str:
        """Of the kernels, their tests, the packages beneath and the device."""
        root = Path(__file__).parents[1]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        packages = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton")]
        digest = hashlib.sha256(repr([device, *packages]).encode())
        for file in sorted([*root.glob("kernels/**/*.py"), *root.glob("tests/kernels/**/*.py")]):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
        return f"code {digest.hexdigest()[:16]}"

    def note(self, mark: str, nodeid: str) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(f"{mark}{nodeid}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self.passed]
        config.hook.pytest_deselected(items=done)
        rest = [item for item in items if item.nodeid not in self.passed]
        items[:] = sorted(rest, key=lambda item: item.nodeid in self.began)
        self.left, self.done = len(items), len(done)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.failed = False
        self.note("?", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        outcome = yield
        self.left -= 1
        if not self.failed:
            self.note("+", item.nodeid)
        if self.left and time.monotonic() > self.deadline:
            item.session.shouldstop = f"time is up with {self.left} tests left: run again, and it goes on from here"
        return outcome

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.done:
            session.exitstatus = pytest.ExitCode.OK  # all passed before


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `impl="auto"` runs: the references, or Triton's kernels (in its interpreter where there is no GPU)."""
    if request.param == "triton":
        from aligngpt_kernels import dispatch

        monkeypatch.setattr(dispatch, "why_not_auto", lambda op, device, bucket="": None)
    return request.param


@pytest.fixture(scope="session")
def oracle() -> Path:
    return ORACLE


@pytest.fixture(scope="session")
def tower_config() -> dict[str, Any]:
    return json.loads((ORACLE / "p16_clip_config.json").read_text())


@pytest.fixture(scope="session")
def public_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as the public AlignGPT ones, with the oracle's weights."""
    folder = tmp_path_factory.mktemp("public")
    shutil.copy(ORACLE / "p16_model.safetensors", folder / "model.safetensors")
    shutil.copy(ORACLE / "p16_config.json", folder / "config.json")
    return folder


@pytest.fixture(scope="session")
def load_case():
    """An oracle case by name: its arrays, and its inputs as our model takes them."""

    def load(name: str) -> SimpleNamespace:
        arrays = dict(np.load(ORACLE / f"{name}.npz"))
        input_ids = torch.from_numpy(arrays["input_ids"])
        labels = torch.from_numpy(arrays.get("labels", np.full(input_ids.shape, -100)))
        mask = torch.from_numpy(arrays.get("attention_mask", np.ones(input_ids.shape))).long()
        has_image = bool((input_ids == -200).any())
        inputs: dict[str, Any] = dict(
            zip(("input_ids", "labels", "attention_mask"), expand(input_ids, labels, mask), strict=True)
        )
        if has_image:
            inputs["pixel_values"] = torch.from_numpy(arrays["pixel_values"])
        return SimpleNamespace(arrays=arrays, inputs=inputs, has_image=has_image)

    return load


def expand(input_ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Ids with -200 for an image, as ours: <align> after BOS where a row has an image, P <image> for each one."""
    columns: list[list[list[int]]] = [[], [], []]
    for row, row_labels, row_mask in zip(input_ids.tolist(), labels.tolist(), mask.tolist(), strict=True):
        new: list[list[int]] = [[], [], []]
        for place, triple in enumerate(zip(row, row_labels, row_mask, strict=True)):
            repeat = ROWS if triple[0] == -200 else 1
            for column, value in zip(new, (IMAGE if triple[0] == -200 else triple[0], *triple[1:]), strict=True):
                column += [value] * repeat
            if place == 0 and -200 in row:
                for column, value in zip(new, (ALIGN, -100, 1), strict=True):
                    column.append(value)
        for column, values in zip(columns, new, strict=True):
            column.append(values)
    return [torch.tensor(column) for column in columns]


@pytest.fixture(scope="session")
def make_llm():
    """A tiny random causal LM by model type."""

    def make(kind: str = "llama", vocab_size: int = VOCAB, **overrides: Any) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab_size,
            "head_dim": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = AutoConfig.for_model(kind, **(fields | overrides))
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def make_tower(tower_config):
    """A tiny random vision tower: "clip" has 16 rows per image and a CLS token, "siglip" 4 rows and none.

    As in SigLIP at 384 pixels, the size of the latter is no multiple of its patches.
    """

    def make(kind: str = "clip") -> Any:
        from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

        with torch.random.fork_rng():
            torch.manual_seed(2)
            if kind == "clip":
                return CLIPVisionModel(CLIPVisionConfig(**tower_config)).eval()
            size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
            return SiglipVisionModel(SiglipVisionConfig(**size, image_size=30, patch_size=14)).eval()

    return make


@pytest.fixture(scope="session")
def talker(make_llm, make_tower):
    """A model that goes on talking, in words, of which the alignment level decides many."""
    from aligngpt import AlignGPTForConditionalGeneration

    llm = make_llm("llama", max_position_embeddings=4096)
    model = AlignGPTForConditionalGeneration.from_parts(llm, make_tower("clip"))
    model.generation_config.eos_token_id = None  # a random model must not stop at chance
    model.generation_config.suppress_tokens = list(range(259))  # words only: its bytes would make no characters
    with torch.no_grad():
        for layer in model.model.decoder_layers:
            layer.self_attn.v_proj.weight *= 8
            layer.self_attn.o_proj.weight *= 8
    return model


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ORACLE)


@pytest.fixture(scope="session")
def emoji_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as docs/real-run.md wants it: pretrain.json, finetune.json, and pictures of plain shapes."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    pairs, questions = [], []
    for number, (colour, shape) in enumerate(
        (c, s) for c in ("red", "green", "blue", "black") for s in ("disc", "square")
    ):
        for copy in range(8):
            image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            corner = 4 + 2 * copy
            draw = ImageDraw.Draw(image)
            (draw.ellipse if shape == "disc" else draw.rectangle)((corner, corner, corner + 36, corner + 36), colour)
            name = f"images/{number}-{copy}.png"
            image.save(folder / name)
            talk = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": f"{colour} {shape}"}]
            pairs.append({"id": f"{number}-{copy}", "image": name, "conversations": talk})
            turns = [("human", "<image>\nWhat is shown?"), ("gpt", shape), ("human", "Which colour?"), ("gpt", colour)]
            talk = [{"from": speaker, "value": value} for speaker, value in turns]
            questions.append({"id": f"q-{number}-{copy}", "image": name, "conversations": talk})
    (folder / "pretrain.json").write_text(json.dumps(pairs))
    (folder / "finetune.json").write_text(json.dumps(questions))
    return folder
