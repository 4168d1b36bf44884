"""aligngpt.web: in a browser what a visitor sees; by HTTP what one may not do who writes requests himself."""

import html
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

import aligngpt.web
from aligngpt import AlignGPTProcessor
from aligngpt.chat import Chat
from aligngpt.cli import main
from aligngpt.generate import Engine
from aligngpt.processor import AlignGPTImageProcessor
from demo.page import browser, served

TOKENS = 40  # of an answer in the browser
LONG = 3000  # tokens of an answer that nobody waits for
ANSWER = r"class=\"answer"  # in a message of the page
SHOWN = ("words", "ask", "stop", "again")  # last of what an event changes
HEARTBEAT = "gradio_api/heartbeat/somebody"


@pytest.fixture(scope="module")
def make_processor(talker, tokenizer):
    return lambda template="v1": AlignGPTProcessor.for_model(
        talker.config, AlignGPTImageProcessor(56), tokenizer, template
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory, talker, make_processor) -> Path:
    """A model folder, "model", and two pictures."""
    folder = tmp_path_factory.mktemp("web")
    talker.save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    Image.new("RGB", (64, 48), "red").save(folder / "car.png")
    return folder


# ---- in the browser ------------------------------------------------------------------------------------------------


def test_a_visit(place, talker, make_processor):
    """Load, upload, ask, see text stream and both plots; fix a level and see the answer change; then everything else.

    What is shown is what `Chat` says and the model's `alignment`, and no request of the browser leaves this machine.
    """
    chat = Chat(Engine(talker, make_processor(), max_batch_size=1), max_new_tokens=TOKENS)
    chat.show(place / "noise.png")
    answer = "".join(chat.answer("What is it?"))
    dots, weights = chat.alignment()
    chat.fix_level(0)
    other = "".join(chat.again())
    assert other != answer

    options = ("--max-new-tokens", str(TOKENS), "--max-length", "512", "--device", "cpu")
    with served(place / "model", *options) as (url, process), browser() as page:
        page.open(url)
        page.show(place / "noise.png")
        page.driver.execute_script("""
            window.states = [];
            new MutationObserver(() => window.states.push(document.querySelector("#talk .answer p")?.textContent))
                .observe(document.body, {subtree: true, childList: true, characterData: true});""")
        page.ask("What is it?")
        assert page.answers() == [("gate", answer)]
        assert page.one("#talk .question").text == "What is it?"
        states = set(filter(None, page.driver.execute_script("return window.states")))
        assert all(answer.startswith(state) for state in states)
        assert len(states) > 2  # it came piece by piece

        squares = page.driver.execute_script(
            "return [...document.querySelectorAll('#heat rect')].map(r => [r.textContent, r.getAttribute('fill')])"
        )
        assert [float(dot) for dot, _ in squares] == pytest.approx(dots[0].tolist(), rel=1e-2)
        fills = [fill for _, fill in squares]
        assert fills[dots[0].argmax()] == "rgb(249 115 22 / 0.65)"
        assert fills[dots[0].argmin()] == "rgb(30 41 59 / 0.65)"
        bars = page.driver.execute_script(
            "return [...document.querySelectorAll('#weights li')]"
            ".map(l => [l.querySelector('b').textContent, l.querySelector('i').offsetHeight])"
        )
        assert [float(weight) for weight, _ in bars[:7]] == pytest.approx(weights.tolist(), abs=6e-3)
        heights = [height / bars[7][1] for _, height in bars[:7]]  # the global level is added whole
        assert heights == pytest.approx(weights.tolist(), abs=0.05)

        page.fix_level(0)
        assert page.answers() == [("gate", answer), ("level 0", other)]
        assert "Level 0 was fixed" in page.one("#weights").text
        page.fix_level(None)
        assert page.answers()[2] == ("gate", answer)
        assert "was fixed" not in page.one("#weights").text

        above, below = page.driver.execute_script(
            "return ['.answer:last-child', '.talk'].map("
            "s => document.querySelector('#talk ' + s).getBoundingClientRect().bottom)"
        )
        assert above <= below < page.one("#words").rect["y"]  # the last answer is in sight

        long = "a b " * 300  # is refused in a sentence, and all is as it was
        page.one("#words textarea").send_keys(long)
        page.one("#ask").click()
        problem = page.wait(lambda: page.one(".toast-body").text)
        assert "tokens; the model reads 1 to 512, its answer included: ask something shorter or start anew" in problem
        page.wait(lambda: page.one("#words textarea").get_attribute("value") == long)
        assert len(page.answers()) == 3

        page.one("#anew").click()
        page.wait(lambda: page.answers() == [])
        assert page.all("#heat rect") == []
        page.one("#words textarea").clear()
        page.ask("<b>Now?</b>")
        assert page.one("#talk .question").text == "<b>Now?</b>"  # as it was typed

        log = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
        urls = {entry["params"]["request"]["url"] for entry in log if entry["method"] == "Network.requestWillBeSent"}
        assert len(urls) > 20
        local = (url, "data:", "blob:", "chrome:")  # the last: the tab that Chromium begins with
        assert [address for address in urls if not address.startswith(local)] == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def raise_unknown(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_ctrl_c_ends_it_and_a_port_in_use_is_one_sentence(place, monkeypatch, capsys):
    arguments = ["chat", str(place / "model"), "--device", "cpu", "--web"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*arguments, "--port", str(port)]) == 2
        why = f"--host 127.0.0.1 --port {port} cannot be served on (Address already in use); name another port"
        assert capsys.readouterr().err.endswith(f"aligngpt chat: {why}\n")
    assert main([*arguments, "--port", "65536"]) == 2
    assert "--port 65536 cannot be served on" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_server", raise_unknown)
        with pytest.raises(ValueError, match="Name or service not known"):
            aligngpt.web._listening("nowhere.invalid", 0)

    said: SimpleQueue[str] = SimpleQueue()
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=said.put, flush=lambda: None, isatty=lambda: False))
    status = []

    def visit() -> None:
        while not (found := re.search(r" at (http://\S+) until Ctrl-C", said.get())):
            pass
        with httpx.Client(trust_env=False, timeout=120) as http, http.stream("GET", found[1] + HEARTBEAT) as open_page:
            status.append(open_page.status_code)
            status.append(http.get(found[1] + "v1/models").status_code)  # programs are served beside the page
            status.append(http.get(found[1], headers={"Host": "elsewhere.example"}).status_code)
            os.kill(os.getpid(), signal.SIGINT)
            open_page.read()  # a page that is still open keeps nothing up

    visitor = threading.Thread(target=visit)
    visitor.start()
    before = signal.getsignal(signal.SIGINT)
    assert main([*arguments, "--port", "0"]) == 0
    visitor.join()
    assert status == [200, 200, 421]
    assert [said.get() for _ in range(said.qsize())] in ([], ["\n"])
    assert signal.getsignal(signal.SIGINT) is before
    assert [thread.name for thread in threading.enumerate() if thread.name == "generation engine"] == []


# ---- by HTTP -------------------------------------------------------------------------------------------------------


class Site:
    """A page that is served here, and its engine's answers."""

    def __init__(self, url: str, engine: Engine, uploads: Path):
        self.url, self.engine, self.uploads = url, engine, uploads
        self.http = httpx.Client(base_url=url, timeout=120, trust_env=False)
        self.given: list = []
        submit = engine.submit
        engine.submit = lambda request: self.given.append(submit(request)) or self.given[-1]
        config = self.http.get("/config").json()
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.events = {
            names.get(target): (event["id"], event["inputs"])
            for event in config["dependencies"]
            for target, _ in event["targets"]
        }
        self.visitors = count()

    def upload(self, data: bytes, name: str = "a.png") -> httpx.Response:
        return self.http.post("/gradio_api/upload", files={"files": (name, data)})

    def join(self, part: str, *values: object, visitor: str | None = None) -> tuple[httpx.Response, str]:
        """Trigger what a click on a part triggers. The first input is the visitor's state; None: a new visitor."""
        visitor = visitor or f"visitor{next(self.visitors)}"
        body = {"fn_index": self.events[part][0], "data": [None, *values], "session_hash": visitor}
        headers = {"content-type": "application/json"}
        return self.http.post("/gradio_api/queue/join", content=json.dumps(body), headers=headers), visitor

    def messages(self, visitor: str) -> Iterator[dict]:
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": visitor}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def said(self, part: str, *values: object) -> str:
        """Everything that the page would be told, to the event's end."""
        response, visitor = self.join(part, *values)
        assert response.status_code == 200
        return json.dumps(list(self.messages(visitor)))


@contextmanager
def site_of(engine: Engine, uploads: Path) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setattr(aligngpt.web, "MAX_WAITING", 3)
        app = aligngpt.web.mounted(FastAPI(), lambda: Chat(engine, max_new_tokens=LONG))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        engine.start()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, uploads)
        server.should_exit = True
        thread.join()
        engine.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory, talker, make_processor) -> Iterator[Site]:
    with site_of(Engine(talker, make_processor(), max_batch_size=2), tmp_path_factory.mktemp("uploads")) as site:
        yield site


def test_a_dropped_client_ends_his_answer_and_a_full_queue_says_so(site):
    """Two answers at a time and three that wait; then all clients are gone, and so are the answers."""
    accepted, refused = [], None
    while refused is None:
        response, visitor = site.join("words", None, "Go on?", -1)
        if response.status_code == 200:
            accepted.append(visitor)
        else:
            refused = response
    assert refused.status_code == 503
    assert "Queue is full. Max size is 3" in refused.text
    assert 3 <= len(accepted) <= 5  # less where the queue's own thread was late
    for visitor in accepted:
        messages = site.messages(visitor)
        for message in messages:
            if ANSWER in json.dumps(message):
                break
        messages.close()
    for answer in site.given:
        answer.wait()
    assert {answer.finish_reason for answer in site.given} == {"cancelled"}
    assert len(site.given) == len(accepted)
    assert max(len(answer.tokens) for answer in site.given) < LONG


@pytest.mark.parametrize(("part", "kept"), [("stop", True), ("anew", False)])
def test_an_answer_can_be_ended(site, part, kept):
    """Until then the visitor can begin no other; what was said stays, unless he wanted a new conversation."""
    _, visitor = site.join("words", None, "Go on?", -1)
    steps = iter([(ANSWER, lambda: site.join("again", -1, visitor=visitor)), ("is being answered", None)])
    sign, act = next(steps)
    ended: list[list] = []
    for message in site.messages(visitor):
        if sign in json.dumps(message):
            if act is None:
                event, inputs = site.events[part]
                body = {"fn_index": event, "data": [None] * len(inputs), "session_hash": visitor}
                assert site.http.post("/gradio_api/run/predict", json=body).status_code == 200
                sign = "nothing more"
            else:
                act()
                sign, act = next(steps)
        if message["msg"] == "process_completed":
            ended.append(message["output"]["data"])
    last = json.dumps(ended[-1])
    answer = site.given[-1].wait()
    assert answer.finish_reason == "cancelled"
    assert 0 < len(answer.tokens) < LONG
    assert (ANSWER in last, "The conversation will stand here" in last) == (kept, not kept)
    refused, ended_by_him = (dict(zip(SHOWN, parts[-4:], strict=True)) for parts in ended)
    assert refused["stop"]["visible"]  # the first one goes on
    assert not ended_by_him["stop"]["visible"]
    assert "value" not in ended_by_him["words"]  # what he typed meanwhile stays


def test_a_question_that_is_refused_takes_nothing_from_the_one_before(site, talker):
    visitor, begins, may_begin = "hasty", threading.Event(), threading.Event()
    body = {"fn_index": site.events["anew"][0], "data": [None], "session_hash": visitor}
    assert site.http.post("/gradio_api/run/predict", json=body).status_code == 200  # from now on he is known

    def hold(*_: object) -> None:
        begins.set()
        may_begin.wait(60)

    with talker.lm_head.register_forward_pre_hook(hold):
        site.join("words", None, "First?", -1, visitor=visitor)
        assert begins.wait(60)
        site.join("words", None, "Second?", -1, visitor=visitor)
        for message in site.messages(visitor):
            said = json.dumps(message)
            if "is being answered" in said:
                may_begin.set()
            elif ANSWER in said:
                break
    assert "First?" in said
    assert site.given[-1].wait().finish_reason == "cancelled"


@pytest.mark.parametrize("path", ["/etc/passwd", "MODEL/config.json", "MODEL/model.safetensors", "CODE/web.py"])
def test_fault_52_no_file_is_readable_from_the_page(site, place, path):
    path = path.replace("MODEL", str(place / "model")).replace("CODE", str(Path(aligngpt.web.__file__).parent))
    assert Path(path).is_file()
    for address in (f"file={path}", f"file/{path}", f"file=../../{path}", f"proxy=file://{path}", f"file=%2F{path}"):
        response = site.http.get(f"/gradio_api/{address}", follow_redirects=True)
        assert response.status_code in (400, 403, 404), address
    (site.uploads / "link").unlink(missing_ok=True)
    (site.uploads / "link").symlink_to(path)
    for named in (path, f"{site.uploads}/../../../../../../../..{path}", str(site.uploads / "link")):
        for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):  # gradio looks at files with this mark alone
            said = site.said("picture", {"path": named} | meta)
            assert "no other file or address is read" in said
            assert "begins with" not in said


def test_no_address_is_fetched(site):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/a.png"
        named = ({"path": address, "url": address}, {"path": "a.png", "url": address}, {"url": address})
        for payload in (*named, {"path": "a\0.png"}):
            for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
                said = site.said("picture", payload | meta)
                assert "no other file or address is read" in said
        trap.settimeout(0)
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_uploads_have_limits(site):
    """Too large, cut short, no picture at all, and a bomb: a refusal or a sentence, and nothing is decoded."""
    assert site.upload(b"0" * (aligngpt.web.MAX_UPLOAD + 1)).status_code == 413
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = site.uploads / "whole.png"
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    bomb = bytearray(whole)
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2
    for data, sentence in (
        (whole[:2000], "the picture: can't be decoded"),
        (b"%!PS <script>", "the picture: not an image (it begins with"),
        (bytes(bomb), "the picture: "),
        (whole, None),
    ):
        (path,) = site.upload(data).json()
        said = site.said("picture", {"path": path, "meta": {"_type": "gradio.FileData"}})
        assert '"success": true' in said
        assert "<script>" not in said
        assert (sentence is None) == ('"level": "warning"' not in said)
        assert sentence is None or sentence in said.replace("&#x27;", "'")


def test_words_have_limits(site):
    assert "the question has 4001 characters; at most 4000 are read" in site.said("words", None, "a" * 4001, -1)
    assert "?aaaa" in site.said("words", None, "\ud83d" + "a" * 4000, -1)  # half an emoji does not break the page
    assert "the question is empty" in site.said("words", None, " ", -1)
    assert "the question holds &lt;image&gt;" in site.said("words", None, "<image>", -1)
    assert "no question was asked yet" in site.said("again", 3)
    assert "is less than minimum value" in site.said("words", None, "Hm?", -2)


def test_nothing_is_offered_to_programs(site):
    """They have an interface of their own; and nobody is told who visits."""
    info = site.http.get("/gradio_api/info").json()
    assert info["named_endpoints"] == info["unnamed_endpoints"] == {}
    config = site.http.get("/config").json()
    assert not config["analytics_enabled"]
    assert not config["footer_links"]
    assert "https://" not in re.sub(
        r"<meta[^>]*>", "", site.http.get("/").text.split("<script>window.gradio_config")[0]
    )


# ---- other models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "template", "shown"),
    [
        ("adaptive", "v1", {"heat", "weights", "level", "words"}),
        ("local", "v1", {"heat", "weights", "level", "words"}),
        ("average", "v1", {"level", "words"}),
        ("none", "v1", {"words"}),
        ("adaptive", "plain", {"level"}),
    ],
)
def test_a_model_gets_the_page_that_it_can_fill(talker, make_processor, monkeypatch, mode, template, shown):
    monkeypatch.setattr(talker.config, "align_mode", mode)
    engine = Engine(talker, make_processor(template), max_batch_size=1)
    config = aligngpt.web.page(lambda: Chat(engine)).get_config_file()
    parts = {part["id"]: part for part in config["components"]}

    def visible(node: dict, above: bool = True) -> Iterator[str]:
        props = parts[node["id"]]["props"]
        here = above and props.get("visible", True)
        if here and props.get("elem_id"):
            yield props["elem_id"]
        for child in node.get("children", []):
            yield from visible(child, here)

    seen = {name for node in config["layout"]["children"] for name in visible(node)}
    assert seen & {"heat", "weights", "level", "words"} == shown
    if "level" in seen:
        level = next(part["props"] for part in parts.values() if part["props"].get("elem_id") == "level")
        assert (level["minimum"], level["value"]) == ((0, 7) if template == "plain" else (-1, -1))


def test_a_captioning_model_takes_a_picture_and_a_level(talker, make_processor, place, tmp_path):
    """Words it has none: there is no box for them, and nothing of the plots."""
    engine = Engine(talker, make_processor("plain"), max_batch_size=1, max_length=40)
    chat = Chat(Engine(talker, make_processor("plain"), max_batch_size=1, max_length=40), max_new_tokens=LONG)
    chat.show(place / "noise.png")
    with site_of(engine, tmp_path) as site:
        assert "this model captions pictures; show it one" in site.said("ask", None, None, 7)
        (path,) = site.upload((place / "noise.png").read_bytes()).json()
        for level in (7, 0):
            chat.fix_level(level)
            caption = html.escape("".join(chat.answer("")))
            said = site.said("ask", {"path": path}, None, level)
            assert json.dumps(f"<small>level {level}</small><p>{caption}</p>")[1:-1] in said
            assert "<rect" not in said


def test_the_picture_on_the_page_is_what_the_model_would_read(place, make_processor):
    """It is kept after pre-processing, which leaves it as it is."""
    for aspect in ("pad", "square"):
        processor = make_processor()
        processor.image_processor.image_aspect_ratio = aspect
        visit = aligngpt.web._Visit(SimpleNamespace(processor=processor, reset=lambda: None))
        visit.look_at(str(place / "noise.png"))
        read = processor.image_processor.pixels([str(place / "noise.png")])
        assert torch.equal(processor.image_processor.pixels([visit.picture]), read)


def test_dots_that_form_no_square_have_no_map():
    assert "form no square" in aligngpt.web.heat_map(Image.new("RGB", (8, 8)), torch.ones(6))
    flat = aligngpt.web.heat_map(Image.new("RGB", (8, 8)), torch.ones(4))
    assert flat.count("<rect") == 4
    assert "nan" not in flat
