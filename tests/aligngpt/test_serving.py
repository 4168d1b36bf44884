"""The HTTP interface: what it answers, what it refuses, what it holds on to, and 32 clients that behave badly."""

import asyncio
import base64
import ctypes
import gc
import io
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from aligngpt.generate import Answer, Engine, Sampling
from aligngpt.processor import AlignGPTImageProcessor

uvicorn = pytest.importorskip("uvicorn")
serving = pytest.importorskip("aligngpt.serving")

MAX_BODY = 1 << 20
LONG = {"timeout": 120.0}  # a loaded machine is slow, not wrong


@pytest.fixture(scope="module")
def model(make_llm, make_tower):
    return AlignGPTForConditionalGeneration.from_parts(
        make_llm("llama", max_position_embeddings=512), make_tower("clip")
    ).eval()


@pytest.fixture(scope="module")
def processor(model, tokenizer):
    return AlignGPTProcessor.for_model(model.config, AlignGPTImageProcessor(56), tokenizer)


@pytest.fixture(scope="module")
def engine(model, processor) -> Iterator[Engine]:
    engine = Engine(model, processor, max_batch_size=8)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with served(serving.app(engine, "tiny", max_waiting=64, max_body_bytes=MAX_BODY)) as url:
        yield url


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def picture(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def large(number: int) -> bytes:
    """9 MB when decoded."""
    file = io.BytesIO()
    Image.linear_gradient("L").rotate(90 * number).resize((2000, 1500)).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def data_url(raw: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def shown(raw: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(raw)}}


def asked(text: str = "What is it?", *pictures: bytes, **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    content = [*map(shown, pictures), {"type": "text", "text": text}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12} | fields


def post(url: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(url + "/v1/chat/completions", json=body, headers=headers, **LONG)


def events(lines: Any) -> list[Any]:
    """The data of server-sent events."""
    found = [line.removeprefix("data: ") for line in lines if line]
    assert found.pop() == "[DONE]"
    return [json.loads(event) for event in found]


def said(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def alone(model, processor, *requests: tuple[list[dict[str, Any]], Sampling, int | None]) -> list[Answer]:
    """The answers of an engine that has one row."""
    engine = Engine(model, processor, max_batch_size=1)
    return [engine.ask(messages, sampling, level=level).wait() for messages, sampling, level in requests]


def pil(raw: bytes) -> dict[str, Any]:
    return {"type": "image", "image": Image.open(io.BytesIO(raw)).convert("RGB")}


# ---- what is answered ----------------------------------------------------------------------------------------------


def test_an_answer_and_its_stream_are_what_the_engine_says(url, model, processor):
    first, second = picture(1), picture(2, "JPEG")
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [shown(first), {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A thing."},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, shown(second)]},
    ]
    fields = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 11, "max_completion_tokens": 20}
    plain = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [pil(first), {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A thing."},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, pil(second)]},
    ]
    sampling = Sampling(20, temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=11)
    expected, at_level = alone(model, processor, (plain, sampling, None), (plain, sampling, 3))
    num_prompt = processor.apply_chat_template(plain, tokenize=True)["input_ids"].shape[1]

    neutral = {"n": 1, "tools": [], "frequency_penalty": 0.0, "user": "me", "stop": None, "top_logprobs": None}
    whole = post(url, {"messages": messages, **fields, **neutral}).json()
    assert whole["choices"][0]["message"]["content"] == expected.text
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(expected.tokens),
        "total_tokens": num_prompt + len(expected.tokens),
    }
    torch.testing.assert_close(torch.tensor(whole["align_weights"]), expected.align_weights)
    assert (whole["object"], whole["model"]) == ("chat.completion", "tiny")

    body = {"messages": messages, **fields, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, **LONG) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response.iter_lines())
    assert said(chunks) == expected.text
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-2]["align_weights"] == whole["align_weights"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1

    fixed = post(url, {"messages": messages, **fields, "align_level": 3}).json()
    assert fixed["choices"][0]["message"]["content"] == at_level.text != expected.text
    assert fixed["align_weights"] is None

    stop = expected.text[4:6]
    short = post(url, {"messages": messages, **fields, "stop": stop}).json()["choices"][0]
    assert short["message"]["content"] == expected.text[: expected.text.index(stop)]
    assert short["finish_reason"] == "stop"
    empty = post(url, asked(max_tokens=0)).json()
    assert (empty["choices"][0]["message"]["content"], empty["usage"]["completion_tokens"]) == ("", 0)


def test_the_seed_is_drawn_unless_it_is_given(url):
    answers = [post(url, asked("Go on.", temperature=3.0)).json() for _ in range(3)]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) > 1


def test_settings_that_round_to_nothing_on_the_device_hit_nobody_else(url):
    likeliest = post(url, asked()).json()["choices"]
    for settings in ({"top_p": 1e-300}, {"temperature": 1e-300}):
        assert post(url, asked(**({"temperature": 2} | settings))).json()["choices"] == likeliest
    assert post(url, asked(temperature=1, repetition_penalty=1e-300)).status_code == 200


def test_models_and_health(url):
    models = httpx.get(url + "/v1/models", **LONG).json()
    assert [entry["id"] for entry in models["data"]] == ["tiny"]
    assert httpx.get(url + "/health", **LONG).json() == {"status": "ok", "open_requests": 0}


def test_a_captioning_model_is_asked_as_in_chat(model, processor, monkeypatch):
    monkeypatch.setattr(processor, "template", "plain")
    line, level = [{"role": "user", "content": [pil(picture(4))]}], model.config.num_align_levels - 1
    (caption,) = alone(model, processor, (line, Sampling(12, stop=["\n"]), level))
    engine = Engine(model, processor, max_batch_size=1)
    engine.start()
    with served(serving.app(engine, "tiny")) as url:
        answer = post(url, asked("Describe it.", picture(4))).json()
        assert answer["choices"][0]["message"]["content"] == caption.text
        assert answer["align_weights"] is None
        assert "show it one" in refused(post(url, asked("Describe it.")), 400)["message"]
    engine.close()


# ---- what is refused -----------------------------------------------------------------------------------------------


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert len(error["message"].split()) >= 4
    assert len(error["message"]) < 600
    return error


def bomb(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def with_url(url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return asked() | {"messages": [{"role": "user", "content": [part]}]}


WRONG_FIELDS = [  # what is asked, what is named, what the sentence says
    ({"n": 2}, "n", "n is 2; it needs to be 1"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is"),
    ({"logprobs": True}, "logprobs", "left out"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format is"),
    ({"top_k": 4}, "top_k", "'top_k' is no field"),
    ({"\ud800": 4}, "\ud800", "is no field"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options", "include_usage"),
    ({"align_level": 8}, "align_level", "0 to 7"),
    ({"align_level": True}, "align_level", "0 to 7"),
    ({"temperature": -1}, "temperature", "temperature is -1"),
    ({"temperature": "hot"}, "temperature", "'hot'; it needs to be a number"),
    ({"temperature": 10**400}, "temperature", "a number"),
    ({"top_p": 0}, "top_p", "top_p is 0"),
    ({"top_p": True}, "top_p", "a number"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"seed": -1}, "seed", "seed is -1"),
    ({"seed": 1.5}, "seed", "whole number"),
    ({"seed": 2**63}, "seed", "2^63"),
    ({"seed": 10**4000}, "seed", "2^63"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "as max_tokens, 1"),
    ({"stop": ["a", ""]}, "stop", "1 to 256 characters"),
    ({"stop": ["a"] * 17}, "stop", "up to 16"),
    ({"stop": "a" * 257}, "stop", "256 characters"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": None}, "messages", "messages is None"),
    ({"messages": ["hello"]}, "messages[0]", "role and content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "is 5"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0]", "'name'"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]", "image_url"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0]", "Unicode"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
     "messages[0].content[0]", "image_url"),
    ({"messages": [{"role": "user", "content": ""}] * 513}, "messages", "513 messages"),
    ({"messages": [{"role": "system", "content": [shown(picture(1))]}]}, "messages[0]", "a user's"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "user"),
    (asked("an <image> word", picture(1)), "messages", "<image>"),
    (asked("x" * 100_000), "messages", "100000 characters"),
    (asked("a b c d e f g " * 60), "messages", "the model reads"),
    (asked("", *[picture(1)] * 33), "messages", "33 pictures"),
    (asked("", picture(1), b""), "messages", "picture 1: not an image (it is empty)"),
    (asked("", picture(1)[:-30]), "messages", "picture 0"),
    (asked("", b"<html>" * 9), "messages", "not an image"),
    (asked("", bomb(9_500)), "messages", "pixels; at most"),
    (asked("", bomb(7_000), bomb(7_000)), "messages", "picture 1: with those before it"),
    (with_url("http://127.0.0.1:1/cat.png"), "messages[0].content[0].image_url", "nothing is fetched"),
    (with_url("file:///etc/passwd"), "messages[0].content[0].image_url", "no file is opened"),
    (with_url("/etc/passwd"), "messages[0].content[0].image_url", "no file is opened"),
    (with_url("data:image/png,raw"), "messages[0].content[0].image_url", "base64"),
    (with_url("data:image/png;base64,\u00e9"), "messages[0].content[0].image_url", "no base64"),
    (with_url("data:image/png;base64,abc"), "messages[0].content[0].image_url", "no base64"),
    (with_url(None), "messages[0].content[0].image_url", "url"),
]  # fmt: skip


def test_what_is_wrong_with_a_request_is_said(url):
    with httpx.Client(base_url=url, **LONG) as client:

        def raw(content: Any, kind: str = "application/json; charset=utf-8") -> httpx.Response:
            return client.post("/v1/chat/completions", content=content, headers={"content-type": kind})

        for fields, param, words in WRONG_FIELDS:
            error = refused(raw(json.dumps(asked() | fields)), 400)
            assert words in error["message"]
            assert error["param"] == param

        for content in (b"", b"{", b"\xff\xfe\xfd", b"[" * 100_000, b'{"seed": NaN}', b"[1]", b"1" * 9000):
            assert "the body is" in refused(raw(content), 400)["message"]
        whole = json.dumps(asked()).encode()
        assert "application/json" in refused(raw(whole, "text/plain"), 415)["message"]
        assert refused(client.post("/v1/chat/completions", json=asked(model="gpt")), 404)["code"] == "model_not_found"
        assert f"{MAX_BODY} bytes" in refused(raw(b" " * (MAX_BODY + 1)), 413)["message"]
        in_chunks = (b" " * 65536 for _ in range(MAX_BODY // 65536 + 1))  # its length is not known before
        assert f"{MAX_BODY} bytes" in refused(raw(in_chunks), 413)["message"]
        refused(client.get("/v1/chat/completions"), 405)
        refused(client.get("/v1/nothing"), 404)
        assert raw(whole).status_code == 200


def test_only_known_hosts_are_answered(url, engine):
    port = url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", f"LOCALHOST:{port}", f"[::1]:{port}", "192.168.1.5"):
        assert httpx.get(url + "/health", headers={"host": host}, **LONG).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[::1", "localhost.evil.example"):
        assert "not known" in refused(httpx.get(url + "/health", headers={"host": host}, **LONG), 421)["message"]
        assert post(url, asked(), host=host).status_code == 421
    response = post(url, asked(), origin="https://evil.example")
    assert not [name for name in response.headers if name.startswith("access-control")]
    with served(serving.app(engine, "tiny", hosts=["Vision.example"])) as named:
        assert httpx.get(named + "/health", headers={"host": "vision.example"}, **LONG).status_code == 200
        assert httpx.get(named + "/health", headers={"host": "evil.example"}, **LONG).status_code == 421


# ---- who waits, leaves and fails -----------------------------------------------------------------------------------


class Held:
    """Lets an engine's thread take some steps, then waits to be opened; keeps the answers that were asked for."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, num_steps: int = 0):
        self.opened, self.num_steps, self.answers = threading.Event(), num_steps, []
        self.step, self.submit = engine.step, engine.submit
        monkeypatch.setattr(engine, "step", self.held_step)
        monkeypatch.setattr(engine, "submit", self.noting_submit)

    def held_step(self) -> bool:
        self.num_steps -= 1
        if self.num_steps < 0:
            assert self.opened.wait(60)
        return self.step()

    def noting_submit(self, request: Any) -> Answer:
        self.answers.append(self.submit(request))
        return self.answers[-1]


@pytest.fixture
def one_row(model, processor) -> Iterator[Engine]:
    engine = Engine(model, processor, max_batch_size=1)
    engine.start()
    yield engine
    engine.close()


async def open_requests(client: httpx.AsyncClient, number: int) -> None:
    """Until that many are open."""
    deadline = time.monotonic() + 60
    while (await client.get("/health")).json()["open_requests"] != number:
        assert time.monotonic() < deadline


def test_requests_are_counted_and_those_whose_client_leaves_are_cancelled(one_row, monkeypatch):
    held = Held(one_row, monkeypatch)

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, **LONG) as client:
            ask = [client.post("/v1/chat/completions", json=asked(stream=streams)) for streams in (False, True, True)]
            begun = [asyncio.create_task(one) for one in ask]
            await open_requests(client, 3)
            response = await client.post("/v1/chat/completions", json=asked())
            assert "3 requests are open" in refused(response, 503)["message"]
            assert response.headers["retry-after"] == "1"
            for left in (0, 1):
                begun[left].cancel()
                await open_requests(client, 2 - left)
            held.opened.set()
            assert events((await begun[2]).text.splitlines())
            await open_requests(client, 0)

    with served(serving.app(one_row, "tiny", max_waiting=2)) as url:
        asyncio.run(scenario(url))
        until(lambda: all(answer.finish_reason for answer in held.answers))
    assert sorted(answer.finish_reason for answer in held.answers) == ["cancelled", "cancelled", "length"]
    assert [answer.tokens for answer in held.answers if answer.finish_reason == "cancelled"] == [[], []]


def test_leaving_in_mid_answer_frees_the_row(one_row, monkeypatch):
    held = Held(one_row, monkeypatch, num_steps=6)

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, **LONG) as client:
            body = asked(stream=True, max_tokens=200)
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                await anext(response.aiter_lines())
            await open_requests(client, 0)
            held.opened.set()
            assert (await client.post("/v1/chat/completions", json=asked())).status_code == 200

    with served(serving.app(one_row, "tiny")) as url:
        asyncio.run(scenario(url))
    assert [answer.finish_reason for answer in held.answers] == ["cancelled", "length"]
    assert len(held.answers[0].tokens) <= 7


def test_a_prompt_that_cannot_be_read_leaves_its_neighbours_alone(model, processor, monkeypatch):
    engine = Engine(model, processor, max_batch_size=4)
    read, failing = engine._read, []

    def read_one(rows: Any) -> None:
        if len(rows) > 1:
            raise torch.OutOfMemoryError("too little for them together")
        if rows[0].answer in failing:
            raise RuntimeError("too little for this one")
        read(rows)

    monkeypatch.setattr(engine, "_read", read_one)
    asks = [([{"role": "user", "content": f"Say {number}."}], Sampling(6), None) for number in range(4)]
    begun = [engine.ask(*ask[:2]) for ask in asks]
    failing.append(begun[1])
    with pytest.raises(RuntimeError, match="this one"):
        begun.pop(1).wait()
    del asks[1]
    assert [answer.wait().tokens for answer in begun] == [one.tokens for one in alone(model, processor, *asks)]


async def call(app: Any, body: bytes, *, more_body: bool, send: Callable[[Any], Any]) -> None:
    """A request without a server, from a client that does nothing after it sent a body or part of one."""
    messages = [{"type": "http.request", "body": body, "more_body": more_body}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    place = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": ""}
    await app({**place, "headers": headers}, receive, send)


def test_nobody_is_waited_for_without_end(one_row, monkeypatch):
    monkeypatch.setattr(serving, "PATIENCE", 0.05)
    app, held, sent = serving.app(one_row, "tiny"), Held(one_row, monkeypatch, num_steps=10**9), []

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and message["body"].startswith(b"data"):
            await asyncio.Event().wait()

    async def five_slow_clients() -> None:
        small = serving.app(one_row, "tiny", max_body_bytes=100)
        await asyncio.gather(*(call(small, b" " * 100, more_body=True, send=send) for _ in range(5)))

    asyncio.run(five_slow_clients())
    assert sorted(message["status"] for message in sent if "status" in message) == [408] * 4 + [503]
    sent.clear()
    asyncio.run(call(app, json.dumps(asked(stream=True)).encode(), more_body=False, send=send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    until(lambda: held.answers[0].finish_reason)
    assert not one_row.step()


@pytest.mark.parametrize("num_forwards", [0, 4])
def test_a_failing_model_is_said_and_the_next_request_works(one_row, num_forwards):
    """At the prompt, and in mid-answer."""
    calls = iter(range(num_forwards))

    def fail(*_: Any) -> None:
        if next(calls, None) is None:
            raise RuntimeError("a secret of the server")

    def failing(body: dict[str, Any]) -> httpx.Response:
        nonlocal calls
        calls = iter(range(num_forwards))
        with one_row.model.lm_head.register_forward_hook(fail):
            return post(url, body)

    with served(serving.app(one_row, "tiny")) as url:
        good = post(url, asked()).json()["choices"][0]["message"]["content"]
        error = refused(failing(asked()), 500)
        assert "the model failed (RuntimeError)" in error["message"]
        assert "secret" not in error["message"]
        response = failing(asked(stream=True))
        if num_forwards == 0:
            refused(response, 500)
        else:
            *chunks, last = events(response.text.splitlines())
            assert good.startswith(said(chunks))
            assert said(chunks)
            assert last == {"error": error}
        assert post(url, asked()).json()["choices"][0]["message"]["content"] == good


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_said(one_row, monkeypatch):
    held = Held(one_row, monkeypatch)

    def die(*_: Any) -> None:
        raise SystemExit

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, **LONG) as client:
            ask = [client.post("/v1/chat/completions", json=asked()) for _ in range(2)]
            begun = [asyncio.create_task(one) for one in ask]
            await open_requests(client, 2)
            held.opened.set()
            statuses = [response.status_code for response in await asyncio.gather(*begun)]
            assert sorted(statuses) == [500, 503]
            assert (await client.get("/health")).status_code == 503

    with served(serving.app(one_row, "tiny")) as url, one_row.model.lm_head.register_forward_hook(die):
        asyncio.run(scenario(url))


def test_a_closed_engine_is_said(one_row, monkeypatch):
    held = Held(one_row, monkeypatch, num_steps=2)
    closing = threading.Thread(target=one_row.close)

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, **LONG) as client:
            ask = [client.post("/v1/chat/completions", json=asked()) for _ in range(2)]
            begun = [asyncio.create_task(one) for one in ask]
            await open_requests(client, 2)
            closing.start()
            until(lambda: one_row._is_closing)
            held.opened.set()
            for response in await asyncio.gather(*begun):
                assert "ending" in refused(response, 503)["message"]
            closing.join()
            assert "ending" in refused(await client.post("/v1/chat/completions", json=asked()), 503)["message"]
            assert (await client.get("/health")).status_code == 503

    with served(serving.app(one_row, "tiny")) as url:
        asyncio.run(scenario(url))


def test_an_engine_that_closes_while_a_request_is_read_is_said(one_row, monkeypatch):
    submit = one_row.submit
    monkeypatch.setattr(one_row, "submit", lambda question: one_row.close() or submit(question))
    with served(serving.app(one_row, "tiny")) as url:
        assert "ending" in refused(post(url, asked()), 503)["message"]


# ---- load ----------------------------------------------------------------------------------------------------------


class _InUse(ctypes.Structure):
    """glibc's `mallinfo2`."""

    _fields_ = tuple((f"field_{number}", ctypes.c_size_t) for number in range(10))


def num_bytes() -> int:
    """Held by this process, which is the server and its clients. Its RSS has what the allocator keeps for later too,
    up to 30 MB for each thread that decodes."""
    gc.collect()
    count = ctypes.CDLL(None).mallinfo2
    count.restype = _InUse
    in_use = count()
    return in_use.field_7 + in_use.field_4  # uordblks, of the heaps, and hblkhd, mapped


def test_32_clients_that_leave_and_send_rubbish(url, engine, model, processor, monkeypatch):
    """Whoever is answered gets the answer that he would get alone; whatever was held is let go."""
    chance = random.Random(7)
    pictures = [picture(number, kind) for number in range(5) for kind in ("PNG", "JPEG")] + [large(0), large(1)]
    bodies, requests = [], []
    for number in range(32):
        text, chosen = f"Question {number}: what is it?", chance.sample(pictures, chance.choice((0, 1, 1, 1, 2)))
        fields = {"max_tokens": chance.randint(4, 16), "seed": number, "stop": chance.choice([[], ["e"], ["the", "a"]])}
        if number % 2:
            fields |= {"temperature": 1.2, "top_p": 0.9}
        if number % 3 == 0:
            fields["repetition_penalty"] = 1.5
        level = chance.choice((None, None, 0, 3, 7))
        sampling = Sampling(**{"max_new_tokens" if key == "max_tokens" else key: fields[key] for key in fields})
        bodies.append(asked(text, *chosen, **fields, align_level=level))
        content = [*map(pil, chosen), {"type": "text", "text": text}]
        requests.append(([{"role": "user", "content": content}], sampling, level))
    expected = alone(model, processor, *requests)
    assert len({answer.text for answer in expected}) > 24
    rubbish = [
        (json.dumps(asked("", picture(1)[:-40])), 400),
        (json.dumps(asked("", b"GIF89a" + bytes(99))), 400),
        (json.dumps(asked("", bomb(9_500))), 400),
        (json.dumps(asked(top_k=3)), 400),
        (json.dumps(asked("x" * 20_000)), 400),
        ("{", 400),
        (" " * (MAX_BODY + 1), 413),
        (None, 413),
    ]

    answers: WeakSet[Answer] = WeakSet()
    submit = engine.submit

    def noting_submit(request: Any) -> Answer:
        answers.add(answer := submit(request))
        return answer

    monkeypatch.setattr(engine, "submit", noting_submit)

    async def in_chunks() -> Any:
        for _ in range(MAX_BODY // 65536 + 1):
            yield b" " * 65536

    async def good(client: httpx.AsyncClient, number: int, *, streams: bool, leaves: int | None) -> None:
        body, answer = bodies[number], expected[number]
        if not streams:
            try:
                async with asyncio.timeout(None if leaves is None else leaves / 100):
                    response = await client.post("/v1/chat/completions", json=body)
            except TimeoutError:
                return
            whole = response.json()
            text, reason = whole["choices"][0]["message"]["content"], whole["choices"][0]["finish_reason"]
            assert whole["usage"]["completion_tokens"] == len(answer.tokens)
        else:
            async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
                lines = []
                async for line in response.aiter_lines():
                    lines.append(line)
                    if leaves is not None and len(lines) > 2 * leaves:
                        break
                if leaves is not None:
                    assert answer.text.startswith(said([json.loads(line[6:]) for line in lines if line[6:7] == "{"]))
                    return
                chunks = events(lines)
            whole, text, reason = chunks[-1], said(chunks), chunks[-1]["choices"][0]["finish_reason"]
        assert text == answer.text
        assert reason == ("length" if answer.finish_reason == "length" else "stop")
        assert (whole["align_weights"] is None) == (answer.align_weights is None)
        if answer.align_weights is not None:
            torch.testing.assert_close(torch.tensor(whole["align_weights"]), answer.align_weights)

    async def bad(client: httpx.AsyncClient, number: int) -> None:
        content, status = rubbish[number]
        headers = {"content-type": "application/json"}
        content = in_chunks() if content is None else content
        refused(await client.post("/v1/chat/completions", content=content, headers=headers), status)

    async def round_of_requests() -> None:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=url, limits=limits, verify=False, **LONG) as client:
            jobs = [good(client, number, streams=number % 4 > 1, leaves=None) for number in range(32)]
            for number in chance.sample(range(32), 16):
                jobs.append(good(client, number, streams=number % 4 > 1, leaves=chance.randint(0, 6)))
            jobs += [bad(client, number) for number in range(len(rubbish))]
            chance.shuffle(jobs)
            waiting = iter(jobs)

            async def ask_one_after_another() -> None:
                for job in waiting:
                    await job

            await asyncio.gather(*(ask_one_after_another() for _ in range(32)))
            await open_requests(client, 0)

    def num_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    files = num_files()
    for number in range(3):
        asyncio.run(round_of_requests())
        until(lambda: not engine.step())  # no row is taken, nobody waits
        until(lambda: num_files() <= files)  # the server has noticed that its clients have gone
        if number == 0:  # threads have begun, allocators have what they keep
            before, threads = num_bytes(), threading.active_count()
    assert threading.active_count() == threads
    # A round decodes more than 100 MB of pictures and reads 5 MB of bodies.
    assert num_bytes() - before < 2 << 20
    assert not answers  # of 144 that were begun
