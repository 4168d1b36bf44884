"""Official files of benchmarks, small and made here, `aligngpt eval` on them, and a judge's server."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
from PIL import Image

from aligngpt import AlignGPTProcessor
from aligngpt.cli import main
from aligngpt.evaluation import runner
from aligngpt.evaluation.task import Outcome
from aligngpt.generate import Engine
from aligngpt.processor import AlignGPTImageProcessor
from aligngpt.sampling import Sampling


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder that --data names."""
    return tmp_path / "eval"


@pytest.fixture
def write(root: Path) -> Callable[..., Path]:
    """Write a file below `root`: text and bytes as they are, anything else as JSON, or with `lines` as JSON lines."""

    def write(name: str, content: Any, *, lines: bool = False) -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            rows = content if lines else [content]
            text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in rows)
            path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def draw(root: Path) -> Callable[..., Path]:
    """Write a small picture below `root`, in a colour of its own."""

    def draw(name: str) -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), tuple(crc32(name.encode()).to_bytes(4, "big")[:3])).save(path)
        return path

    return draw


@pytest.fixture
def files(request: pytest.FixtureRequest, write: Callable[..., Path], draw: Callable[..., Path]) -> Any:
    """What `write_files` of the test's own file makes."""
    return request.module.write_files(write, draw)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, talker, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "tiny"
    talker.save_pretrained(folder)
    AlignGPTProcessor.for_model(talker.config, AlignGPTImageProcessor(56), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def command(model_folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`aligngpt eval` with a tiny model, two tokens an answer; returns --out.

    said: what the answers are taken to be, in the order of the questions, once the model has given its own.
    """
    monkeypatch.setattr(runner, "Sampling", lambda most, **more: Sampling(min(most, 2), **more))
    run = Engine.run

    def command(tasks: str, *more: object, said: Iterable[str] | None = None) -> Path:
        out = tmp_path / "out"
        words = [model_folder, "--task", tasks, "--data", root, "--out", out, "--device", "cpu", "--workers", 2, *more]
        with monkeypatch.context() as patched:
            if said is not None:
                left = iter(said)
                patched.setattr(Engine, "run", lambda *given: (SimpleNamespace(text=next(left)) for _ in run(*given)))
            assert main(["eval", *map(str, words)]) == 0
        assert said is None or not list(left)
        return out

    return command


@pytest.fixture
def evaluate(command: Callable[..., Path]) -> Callable[..., Outcome]:
    """What `aligngpt eval` writes of a task to whose questions this is `said`."""

    def evaluate(task: str, said: Iterable[str], *more: object) -> Outcome:
        folder = command(task, *more, said=said) / task
        found = json.loads((folder / "metrics.json").read_text())
        files = {name: (folder / name).read_bytes() for name in found["files"]}
        return Outcome(found["headline"], found["metrics"], found["needs"], files)

    return evaluate


class JudgeServer:
    """Chat completions at `url`. `reply` makes of a request its words, or a status, a body and headers."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[dict[str, Any]], str | tuple[int, str, dict[str, str]]] = lambda request: "1.0"
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append(request | {"path": handler.path})
        self.headers.append(dict(handler.headers))
        said = self.reply(request)
        if isinstance(said, str):
            said = 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}), {}
        status, text, headers = said
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())


@pytest.fixture
def judge_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("no_proxy", "*")
    found = JudgeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()
