"""A model over HTTP, in OpenAI's words: `app(engine, name)` is an ASGI application on a started engine.

    POST /v1/chat/completions   an answer, whole or (`"stream": true`) as server-sent events that end in `data: [DONE]`
    GET  /v1/models             the one model
    GET  /health                200 while the engine runs, else 503; how many requests are open

A request's pictures come inside it, as data URLs: nothing is fetched and no file is opened. `align_level` fixes the
alignment level, `repetition_penalty` is the engine's, and an answer has `align_weights`, the gate's weights of the
local levels. What is left out means what it means to `Sampling`, but for the seed, which is then drawn. Fields that
would be ignored are refused, unless they ask for what is done anyway (`"n": 1`).

What is refused gets OpenAI's error object with a sentence: 400 what was asked, 404 another model, 408 a body that does
not come, 413 a body that is too large, 415 a body that is not called JSON, 421 an unknown host, 503 with Retry-After
where more requests are open than the engine's rows and `max_waiting`. A failure of ours is a 500 and the server's log
says why; in the middle of a stream it is an event.

Reading a request (JSON, base64, decoding, tokens) happens in a few threads, answering in the engine's; the event loop
only passes text on, and no thread waits for a client. A client that leaves, or takes nothing for `PATIENCE` seconds,
has its answer cancelled, whatever state that is in.

A page of another origin can neither read answers (no CORS headers) nor ask (JSON bodies need a preflight), and one
whose name was rebound to this address is no known host.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import json
import logging
import os
import reprlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from .generate import Answer, Engine, Sampling
from .generate import Request as Question
from .image import MAX_PIXELS, ImageError, opened

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds for a body to come, and for a client to take an event
MAX_STOPS, MAX_STOP = 16, 256  # stop strings, characters of one: all are looked for at every token
_READERS = min(4, os.cpu_count() or 1)  # requests that are decoded at a time: each may take 256 MiB a picture
_BODIES = 4  # largest bodies that may wait to be read together
_FINISH = {"end": "stop", "stop": "stop", "length": "length"}
_NEUTRAL: dict[str, Any] = {  # fields of OpenAI's that may be there if they ask for nothing
    "n": 1,
    "logprobs": False,
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "tools": [],
    "store": False,
}
_NUMBERS = ("temperature", "top_p", "repetition_penalty")
_LENGTHS = ("max_tokens", "max_completion_tokens")
_FIELDS = (
    "model", "messages", "stream", "stream_options", *_LENGTHS, *_NUMBERS, "seed", "stop", "align_level", "user"
)  # fmt: skip


def app(
    engine: Engine, name: str, *, max_waiting: int = 64, max_body_bytes: int = 32 << 20, hosts: Sequence[str] = ()
) -> FastAPI:
    """The application.

    Args:
        engine: started, by whoever closes it after the server has ended.
        name: of the model, in what is asked and answered.
        max_waiting: requests that may be open beyond the engine's rows.
        max_body_bytes: of a request.
        hosts: names by which the server may be called, beside IP addresses and localhost; "*" allows all.
    """
    completions, began = _Completions(engine, name, max_waiting, max_body_bytes), int(time.time())

    async def models() -> Response:
        entry = {"id": name, "object": "model", "created": began, "owned_by": "aligngpt"}
        return _Json({"object": "list", "data": [entry]})

    async def health() -> Response:
        runs = engine.is_serving
        status = {"status": "ok" if runs else "the engine does not run", "open_requests": completions.num_open}
        return _Json(status, 200 if runs else 503)

    # No pages of documentation: FastAPI's load scripts from elsewhere.
    api = FastAPI(title="AlignGPT", docs_url=None, redoc_url=None, openapi_url=None)
    api.add_middleware(_KnownHosts, hosts=hosts)
    api.add_exception_handler(HTTPException, _no_such_route)
    api.router.routes.append(Route("/v1/chat/completions", completions, methods=["POST"]))
    api.add_api_route("/v1/models", models, methods=["GET"])
    api.add_api_route("/health", health, methods=["GET"])
    return api


class Refused(Exception):
    """A request that is not answered: the status, a sentence, and OpenAI's words for what is wrong and where."""

    def __init__(self, status: int, sentence: str, *, param: str | None = None, code: str | None = None):
        super().__init__(sentence)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        return _Json(self.body, self.status, headers={"Retry-After": "1"} if self.status == 503 else None)


class _Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return _dumped(content).encode()


def _dumped(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))  # ASCII: what is quoted may hold half a surrogate pair


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response


class _KnownHosts:
    """Answers only those who call the server by an IP address, localhost, or a name it was given.

    A page of another site whose name is rebound to our address would be of our origin, but sends its own name.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        self.app, self.hosts = app, {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not self._knows(host):
                sentence = f"the host {host!r} is not known here; call the server by its address, localhost or its name"
                await Refused(421, sentence).response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts or "*" in self.hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


# ---- a request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a body asks for."""

    question: Question
    streams: bool
    with_usage: bool  # a stream ends with an event of token counts


def read_request(body: bytes | bytearray, engine: Engine, name: str) -> Asked:
    """Check, decode and tokenise the body of a request. Refused says what is wrong with it."""
    fields = _fields(body, name)
    streams, options = fields.get("stream", False), fields.get("stream_options", {})
    if not isinstance(streams, bool):
        raise _wrong("stream", streams, "true or false")
    if not isinstance(options, dict) or not all(
        key == "include_usage" and isinstance(value, bool) for key, value in options.items()
    ):
        raise _wrong("stream_options", options, 'an object with "include_usage": true or false')
    if options and not streams:
        raise Refused(400, "stream_options is given without stream; it needs stream to be true", param="stream_options")
    level = _level(fields.get("align_level"), engine)
    sampling = _sampling(fields)
    messages = _messages(fields.get("messages"), engine)
    if engine.processor.template == "plain":
        sampling, level = _captioning(messages, sampling, level, engine)
    try:
        inputs = engine.processor.apply_chat_template(messages, tokenize=True)
    except ValueError as error:
        raise Refused(400, str(error), param="messages") from error
    return Asked(Question(inputs, sampling, level), streams, options.get("include_usage", False))


def _wrong(field: str, value: Any, needs: str, code: str | None = None) -> Refused:
    return Refused(400, f"{field} is {reprlib.repr(value)}; it needs to be {needs}", param=field, code=code)


def _fields(body: bytes | bytearray, name: str) -> dict[str, Any]:
    """What a body says; null is as if it was not there."""
    try:
        fields = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON ({error}); it needs to be an object with messages") from error
    if not isinstance(fields, dict):
        raise Refused(400, f"the body is {reprlib.repr(fields)}; it needs to be an object with messages")
    fields = {field: value for field, value in fields.items() if value is not None}
    for field, value in fields.items():
        if field in _NEUTRAL and value == _NEUTRAL[field]:
            continue
        if field in _NEUTRAL:
            raise _wrong(field, value, f"{json.dumps(_NEUTRAL[field])} or left out", "unsupported_value")
        if field not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise Refused(
                400,
                f"{reprlib.repr(field)} is no field that is known here; the fields are {known}",
                param=field[:80],
                code="unknown_parameter",
            )
    if (model := fields.get("model", name)) != name:
        raise Refused(
            404, f"model is {reprlib.repr(model)}; this server has {name!r}", param="model", code="model_not_found"
        )
    return fields


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _level(level: Any, engine: Engine) -> int | None:
    config = engine.model.config
    if level is None:
        return None
    if config.align_mode == "none":
        raise _wrong("align_level", level, "null: this model has align_mode 'none' and no alignment token")
    if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level < config.num_align_levels:
        raise _wrong("align_level", level, f"a whole number from 0 to {config.num_align_levels - 1}, or null")
    return level


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    values: dict[str, Any] = {"seed": fields.get("seed", secrets.randbits(63))}
    for field in _NUMBERS:
        if field in fields:
            value = fields[field]
            if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e30:
                raise _wrong(field, value, "a number")
            values[field] = float(value)
    lengths = [(field, fields[field]) for field in _LENGTHS if field in fields]
    for field, value in lengths:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _wrong(field, value, "a whole number of at least 0")
        if value != lengths[0][1]:
            raise _wrong(field, value, f"as max_tokens, {lengths[0][1]}, or left out")
        values["max_new_tokens"] = value
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS:
        raise _wrong("stop", stop, f"a string or a list of up to {MAX_STOPS}")
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP:
            raise _wrong("stop", text, f"strings of 1 to {MAX_STOP} characters")
    seed = values["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise _wrong("seed", seed, "a whole number from 0 to 2^63 - 1")
    for field, value in values.items():  # each by itself, so that the one that is wrong is known
        try:
            Sampling(**{field: value})
        except ValueError as error:
            raise Refused(400, str(error), param=field) from error
    return Sampling(**values, stop=stop)


def _messages(value: Any, engine: Engine) -> list[dict[str, Any]]:
    """Messages as the processor takes them, their pictures decoded."""
    if not isinstance(value, list) or not value:
        raise _wrong("messages", value, "a list of at least one message")
    processor, longest = engine.processor, engine.max_length
    if len(value) > longest:
        raise _too_long(f"{len(value)} messages", longest)
    messages = [_message(message, f"messages[{number}]") for number, message in enumerate(value)]
    items = [item for message in messages for item in message["content"]]
    pictures = [item for item in items if item["type"] == "image"]
    if len(pictures) * processor.rows_per_image >= longest:
        raise _too_long(f"{len(pictures)} pictures of {processor.rows_per_image} tokens", longest)
    characters = sum(len(item["text"]) for item in items if item["type"] == "text")
    if characters > longest and characters > longest * max(map(len, processor.tokenizer.get_vocab())):
        raise _too_long(f"{characters} characters", longest)  # whatever the tokens are
    room = MAX_PIXELS
    try:
        for number, item in enumerate(pictures):  # all of them before the first is decoded
            with opened(item["image"], name=f"picture {number}") as image:
                room -= image.width * image.height
                if room < 0:
                    raise ImageError(f"picture {number}", f"with those before it more than {MAX_PIXELS} pixels")
        for number, item in enumerate(pictures):
            pixels = processor.image_processor.read(item["image"], f"picture {number}")
            item["image"] = Image.fromarray(pixels.permute(1, 2, 0).numpy())  # of the model's size: it stays as it is
    except ImageError as error:
        raise Refused(400, str(error), param="messages", code="invalid_image") from error
    return messages


def _too_long(what: str, longest: int) -> Refused:
    sentence = f"messages has {what}; the model reads {longest} tokens in all: ask something shorter"
    return Refused(400, sentence, param="messages", code="context_length_exceeded")


def _message(message: Any, where: str) -> dict[str, Any]:
    """Its role and its content as items; pictures are bytes still."""
    if not isinstance(message, dict):
        raise _wrong(where, message, "an object with role and content")
    for field in message:
        if field not in ("role", "content"):
            raise Refused(
                400,
                f"{where} has {reprlib.repr(field)}; a message has a role and content",
                param=where,
                code="unknown_parameter",
            )
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise _wrong(f"{where}.role", role, "system, developer, user or assistant")
    if not isinstance(content, str | list):
        raise _wrong(f"{where}.content", content, "a string or a list of parts")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    items = [_item(part, f"{where}.content[{number}]") for number, part in enumerate(parts)]
    if role != "user" and any(item["type"] == "image" for item in items):
        raise Refused(400, f"{where} has the role {role} and a picture; pictures are a user's", param=where)
    return {"role": "system" if role == "developer" else role, "content": items}


def _item(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
        try:
            part["text"].encode()
        except UnicodeEncodeError as error:
            raise Refused(400, f"{where}.text is no Unicode text: {error.reason}", param=where) from error
        return {"type": "text", "text": part["text"]}
    if kind == "image_url" and set(part) == {"type", "image_url"} and isinstance(part["image_url"], dict):
        return {"type": "image", "image": _data(part["image_url"], f"{where}.image_url")}
    needs = '{"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": "data:image/…;base64,…"}}'
    raise Refused(400, f"{where} is {reprlib.repr(part)}; it needs to be {needs}", param=where)


def _data(image_url: Mapping[str, Any], where: str) -> bytes:
    """The bytes in a data URL; nothing else is opened. `detail` is a hint, and the tower has one size."""
    url = image_url.get("url")
    if not isinstance(url, str) or not set(image_url) <= {"url", "detail"}:
        raise _wrong(where, image_url, 'an object with "url"')
    head, comma, payload = url.partition(",")
    words = head.lower().split(";")
    if not comma or not words[0].startswith("data:") or words[-1] != "base64":
        raise Refused(
            400,
            f"{where}.url is {reprlib.repr(url)}; it needs to be data:image/…;base64,… with the picture itself, since "
            "nothing is fetched and no file is opened",
            param=where,
            code="invalid_image_url",
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"{where}.url is no base64: {error}", param=where, code="invalid_image_url") from error


def _captioning(
    messages: list[dict[str, Any]], sampling: Sampling, level: int | None, engine: Engine
) -> tuple[Sampling, int | None]:
    """As `aligngpt chat` asks a model that only captions: a line, at the best level, since its gate is not trained."""
    if not any(item["type"] == "image" for message in messages for item in message["content"]):
        raise Refused(400, "messages has no picture; this model captions pictures: show it one", param="messages")
    config = engine.model.config
    if level is None and config.align_mode != "none":
        level = config.num_align_levels - 1
    return replace(sampling, stop=[*sampling.stop, "\n"]), level


# ---- an answer -----------------------------------------------------------------------------------------------------


class _Completions:
    """The ASGI application that answers, and how much is open."""

    def __init__(self, engine: Engine, name: str, max_waiting: int, max_body_bytes: int):
        self.engine, self.name, self.max_body_bytes = engine, name, max_body_bytes
        self.max_open = engine.max_batch_size + max_waiting
        self.num_open = 0  # requests
        self.num_held = 0  # bytes of bodies that wait to be read
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="request reader")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            with self._counted():
                await self._complete(request, send)
        except Refused as refused:
            await refused.response(scope, receive, send)
        except (ClientDisconnect, TimeoutError):
            pass  # nobody listens
        except Exception as error:
            logger.exception("a request failed")
            await Refused(500, f"the server failed ({type(error).__name__})").response(scope, receive, send)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._check_runs()
        if self.num_open >= self.max_open:
            raise Refused(503, f"{self.num_open} requests are open and no more are taken: ask again later")
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    def _check_runs(self) -> None:
        if not self.engine.is_serving:
            raise Refused(503, "the engine does not run: the server is ending")

    async def _complete(self, request: Request, send: Send) -> None:
        asked = await self._asked(request)
        try:
            answer = self.engine.submit(asked.question)
        except ValueError as error:
            raise Refused(400, str(error), param="messages", code="context_length_exceeded") from error
        gone = asyncio.ensure_future(_gone(request))
        try:
            self._check_runs()  # again: it may have ended in the meantime, and then nobody takes what was submitted
            async with aclosing(_pieces(answer, gone)) as pieces:
                if asked.streams:
                    await _send_events(self._events(asked, answer, pieces), send)
                    return
                async for _ in pieces:
                    pass
            await _Json(self._whole(answer))(request.scope, request.receive, send)
        finally:
            gone.cancel()
            answer.cancel()

    async def _asked(self, request: Request) -> Asked:
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, f"Content-Type is {kind[:80]!r}; it needs to be application/json")
        too_large = Refused(413, f"the body has more than {self.max_body_bytes} bytes, which is as many as are read")
        if int(request.headers.get("content-length", 0)) > self.max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(PATIENCE):
                async for chunk in request.stream():
                    body += chunk
                    self.num_held += len(chunk)
                    if len(body) > self.max_body_bytes:
                        raise too_large
                    if self.num_held > _BODIES * self.max_body_bytes:
                        raise Refused(503, f"{self.num_held} bytes of requests wait to be read: ask again later")
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.readers, read_request, body, self.engine, self.name)
        except TimeoutError as error:
            raise Refused(408, f"the body did not come within {PATIENCE:.0f} seconds") from error
        finally:
            self.num_held -= len(body)

    def _whole(self, answer: Answer) -> dict[str, Any]:
        assert answer.finish_reason is not None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "finish_reason": _FINISH[answer.finish_reason],
            "logprobs": None,
        }
        return self._head("chat.completion") | {
            "choices": [choice],
            "usage": _usage(answer),
            "align_weights": _weights(answer),
        }

    async def _events(
        self, asked: Asked, answer: Answer, pieces: AsyncIterator[str]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What a stream says. The last event with a choice has the reason of the end and the weights."""
        head = self._head("chat.completion.chunk")

        def event(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
            return head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]}

        role = {"role": "assistant"}
        async for piece in pieces:
            yield event(role | {"content": piece})
            role = {}
        assert answer.finish_reason is not None
        yield event(role, _FINISH[answer.finish_reason]) | {"align_weights": _weights(answer)}
        if asked.with_usage:
            yield head | {"choices": [], "usage": _usage(answer)}

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{secrets.token_hex(12)}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.name}


async def _gone(request: Request) -> None:
    """Until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _pieces(answer: Answer, gone: asyncio.Future[None]) -> AsyncGenerator[str, None]:
    """An answer's text as it comes, all that there is at a time.

    ClientDisconnect: the client has left. Refused: the answer was not finished, which is not the client's fault.
    """
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:  # in the engine's thread
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(changed.set)

    answer.watch(wake)
    gone.add_done_callback(lambda _: changed.set())
    num_said = 0
    while True:
        await changed.wait()
        changed.clear()
        if gone.done():
            raise ClientDisconnect
        has_ended = answer.finish_reason is not None  # before the text: what comes in between is said next time
        if piece := answer.text[num_said:]:
            num_said += len(piece)
            yield piece
        if has_ended:
            break
    if answer.finish_reason == "cancelled":
        raise Refused(503, "the engine has ended: the server is ending")
    try:
        answer.wait()
    except BaseException as error:  # the engine's, whatever it is
        raise Refused(500, f"the model failed ({type(error).__name__}); the server's log has more") from error


async def _send_events(events: AsyncGenerator[dict[str, Any], None], send: Send) -> None:
    """Server-sent events. A failure before the first one is raised; later it is an event, and the last."""
    async with aclosing(events):
        first = await anext(events)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def tell(data: str, *, more: bool = True) -> None:
            async with asyncio.timeout(PATIENCE):
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        await tell(_dumped(first))
        try:
            async for event in events:
                await tell(_dumped(event))
        except Refused as refused:
            await tell(_dumped(refused.body))
        await tell("[DONE]", more=False)


def _usage(answer: Answer) -> dict[str, int]:
    asked, said = answer.num_prompt_tokens, len(answer.tokens)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _weights(answer: Answer) -> list[float] | None:
    return None if answer.align_weights is None else answer.align_weights.tolist()
