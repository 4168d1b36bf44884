"""A language model that judges answers, at any server that speaks OpenAI's chat completions.

    judge = Judge("http://localhost:8000/v1", "gpt-4-0613", os.environ.get(KEY_VARIABLE))
    grades = judge_all(judge, folder, questions, lambda question, ask: parse(ask(messages(question), 0.0, 3)))

What it says is appended to judgements.jsonl in the folder as it comes, under a hash of the judge's model and the
request, so that a run that was killed asks again only what was under way. Another judge, another prompt or another
answer is another request. What is there already is never replaced: judged again, a run has the same numbers.

A server that is busy (429), fails (5xx, 408) or can't be reached is asked again after growing waits. Redirects are not
followed, since they would carry the key elsewhere. The key is in no error, no report and no file.
"""

import hashlib
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..data.llava_json import printable
from .files import jsonl_rows

KEY_VARIABLE = "JUDGE_API_KEY"
JUDGEMENTS = "judgements.jsonl"
NO_JUDGE = (
    "a judge: --judge-url and --judge-model name a model at an OpenAI-compatible server; "
    f"its key, if it wants one, belongs in the environment variable {KEY_VARIABLE}"
)
_MOST_SECONDS_ASKED = 60  # of the waits that servers ask for

Messages = Sequence[Mapping[str, str]]
Ask = Callable[[Messages, float, int], str]
Item = TypeVar("Item")
Verdict = TypeVar("Verdict")


class _Later(Exception):
    """The server may answer if it is asked again, after `seconds` if it said so."""

    def __init__(self, why: str, seconds: float = 0):
        super().__init__(why)
        self.seconds = seconds


@dataclass(frozen=True)
class Judge:
    """A model at a server.

    Fields:
        url: the base, as in "https://api.openai.com/v1".
        api_key: sent as a bearer token, if there is one.
        timeout: in seconds, of silence.
        at_once: how many requests are under way at a time.
        waits: in seconds, before each further try.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120
    at_once: int = 8
    waits: tuple[float, ...] = (1, 2, 4, 8, 16, 32)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        if set("@?#") & set(self.url):  # it is shown in errors and reports
            raise ValueError(
                f"url holds '@', '?' or '#'; it needs a server and a path; a key belongs in {KEY_VARIABLE}"
            )
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and _plain(self.url)
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"url is {self.url!r}; it needs to be http://… or https://…, as https://api.openai.com/v1")
        if not self.model:
            raise ValueError("model is empty; it needs the name of a model that the server has")
        if self.api_key and not _plain(self.api_key):
            raise ValueError("api_key holds blanks, line breaks or letters beyond ASCII; it needs a key without them")
        if self.at_once < 1:
            raise ValueError(f"at_once is {self.at_once}; it needs to be at least 1")

    def describe(self) -> dict[str, str]:
        """What a report says of it."""
        return {"model": self.model, "host": urlsplit(self.url).netloc}

    def request(self, messages: Messages, temperature: float, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }

    def ask(self, messages: Messages, temperature: float, max_tokens: int) -> str:
        """What the model says. ValueError: the server refuses, or still fails after all waits."""
        body = json.dumps(self.request(messages, temperature, max_tokens)).encode()
        for pause in self.waits:
            try:
                return self._post(body)
            except _Later as later:
                self.sleep(max(pause, later.seconds))
        try:
            return self._post(body)
        except _Later as later:
            raise ValueError(f"{later}, {len(self.waits) + 1} times; needs a server that answers") from later

    def _post(self, body: bytes) -> str:
        address = f"{self.url.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json", "User-Agent": "aligngpt"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            request = urllib.request.Request(address, body, headers)
            with _opener().open(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(address, error) from error
        except (OSError, HTTPException) as error:
            why = error.reason if isinstance(error, urllib.error.URLError) else error
            raise _Later(f"judge {address}: {self._shown(str(why) or type(why).__name__)}") from error
        try:
            said = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"judge {address}: answered {self._shown(content.decode(errors='replace'))}; "
                "needs choices[0].message.content, as OpenAI's chat completions have it"
            ) from error
        return said if isinstance(said, str) else ""  # null: reasoning models that had too few tokens

    def _refusal(self, address: str, error: urllib.error.HTTPError) -> Exception:
        content = b""
        with suppress(OSError, HTTPException), error:
            content = error.read()
        what = f"judge {address}: status {error.code}: {self._shown(content.decode(errors='replace'))}"
        if error.code in (408, 429) or error.code >= 500:
            asked = error.headers.get("Retry-After", "")
            return _Later(what, min(int(asked), _MOST_SECONDS_ASKED) if re.fullmatch("[0-9]{1,9}", asked) else 0)
        if error.code in (401, 403):
            return ValueError(f"{what}; needs a key that it takes in the environment variable {KEY_VARIABLE}")
        return ValueError(
            f"{what}; needs the base URL of an OpenAI-compatible server (…/v1) and a model that it has, "
            f"which is {self.model!r} now"
        )

    def _shown(self, text: str) -> str:
        """The first words of what a server says, without the key, should it repeat that."""
        text = " ".join((text.replace(self.api_key, "(the key)") if self.api_key else text).split())
        return printable(text if len(text) <= 200 else f"{text[:199]}…") or "(nothing)"


def _plain(text: str) -> bool:
    """Whether it can stand in a request's head as it is."""
    return re.fullmatch("[!-~]+", text) is not None


def _opener() -> urllib.request.OpenerDirector:
    """http and https, by proxies if the environment names some, without redirects."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def judge_all(
    judge: Judge, folder: Path, items: Sequence[Item], decide: Callable[[Item, Ask], Verdict]
) -> list[Verdict]:
    """`decide` of each item, several at a time; its `ask` gives what the folder holds, and asks the judge for the rest.

    The first error ends it, once the requests under way are answered and kept.
    """
    from tqdm import tqdm

    ask = _Judgements(judge, folder).ask
    with ThreadPoolExecutor(judge.at_once) as pool:
        futures = [pool.submit(decide, item, ask) for item in items]
        try:
            for future in tqdm(
                as_completed(futures), f"judge {judge.model}", len(futures), unit="answer", disable=None
            ):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


class _Judgements:
    """What a judge said, as a folder holds it."""

    def __init__(self, judge: Judge, folder: Path):
        self._judge, self._path = judge, folder / JUDGEMENTS
        self._lock = threading.Lock()
        self._said: dict[str, str] = {}
        if self._path.exists():
            content = self._path.read_bytes()
            if not content.endswith(b"\n"):  # its writer was killed
                os.truncate(self._path, content.rfind(b"\n") + 1)
            for row in jsonl_rows(self._path):
                self._said.setdefault(row.text("key"), row.text("said"))

    def ask(self, messages: Messages, temperature: float, max_tokens: int) -> str:
        request = self._judge.request(messages, temperature, max_tokens)
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if key not in self._said:
            self._keep(key, self._judge.ask(messages, temperature, max_tokens))
        return self._said[key]

    def _keep(self, key: str, said: str) -> None:
        line = json.dumps({"key": key, "judge": self._judge.model, "said": said}).encode() + b"\n"
        with self._lock, self._path.open("ab", buffering=0) as file:
            if key in self._said:  # two threads had the same request
                return
            start = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(start)  # or the next line would be a part of this one
                raise
            self._said[key] = said
