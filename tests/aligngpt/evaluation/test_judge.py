"""A judge's server at its best and worst, and judgements that outlive their run."""

import json
import threading
from pathlib import Path

import pytest

from aligngpt.evaluation.judge import JUDGEMENTS, Judge, judge_all

KEY = "sk-secret-of-mine"


def prompt(text):
    return [{"role": "user", "content": text}]


def ask_each(judge, folder, texts):
    return judge_all(judge, folder, texts, lambda text, ask: ask(prompt(text), 0.5, 7))


def test_what_is_sent_and_when_again(judge_server) -> None:
    """Busy, failing and silent servers are asked again, as late as they say; then the words of the answer come back."""
    waited: list[float] = []
    answers = iter(
        [
            (429, "slow down", {"Retry-After": "7"}),
            (503, "", {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}),
            (200, "{", {"Content-Length": "100"}),  # the connection ends in the middle
            (429, "", {"Retry-After": "86400"}),
            "ja ✓",
        ]
    )
    judge_server.reply = lambda request: next(answers)
    judge = Judge(judge_server.url + "/", "judge-1", KEY, sleep=waited.append)
    assert judge.ask(prompt("Is it?"), 0.2, 1024) == "ja ✓"
    assert waited == [7, 2, 4, 60]
    wanted = {"model": "judge-1", "messages": prompt("Is it?"), "temperature": 0.2, "max_tokens": 1024}
    assert judge_server.requests == [wanted | {"path": "/v1/chat/completions"}] * 5
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in judge_server.headers)
    judge_server.reply = lambda request: (200, '{"choices": [{"message": {"content": null}}]}', {})
    assert Judge(judge_server.url, "judge-1").ask(prompt("?"), 0, 3) == ""
    assert "Authorization" not in judge_server.headers[-1]


def test_refusals_are_named_without_the_key(judge_server) -> None:
    waited: list[float] = []
    judge = Judge(judge_server.url, "judge-1", KEY, waits=(1, 2), sleep=waited.append)
    where = f"judge {judge_server.url}/chat/completions: "
    for answer, said in (
        (
            (401, f"bad\n key {KEY}", {}),
            "status 401: bad key (the key); needs a key that it takes in the environment v",
        ),
        ((404, "no such\x1b[2J model", {}), "status 404: no such\\x1b[2J model; needs the base URL of an OpenAI-comp"),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), "status 302: (nothing); needs the base URL"),
        ((400, "x" * 1000, {}), f"status 400: {'x' * 199}…; needs the base URL"),
        ((200, "<html>", {}), "answered <html>; needs choices[0].message.content"),
        ((200, '{"choices": []}', {}), 'answered {"choices": []}; needs choices[0].message.content'),
    ):
        judge_server.reply = lambda request, answer=answer: answer
        with pytest.raises(ValueError) as caught:
            judge.ask(prompt("?"), 0, 3)
        assert str(caught.value).startswith(where + said)
        assert KEY not in str(caught.value)
    assert not waited
    judge_server.reply = lambda request: (500, "broken", {})
    with pytest.raises(ValueError, match=r"status 500: broken, 3 times; needs a server that answers"):
        judge.ask(prompt("?"), 0, 3)
    assert waited == [1, 2]
    assert KEY not in repr(judge)
    assert judge.describe() == {"model": "judge-1", "host": judge_server.url[7:-3]}


def test_a_killed_run_asks_only_what_is_missing(judge_server, tmp_path: Path) -> None:
    texts = [f"answer {number}" for number in range(9)]
    asked: list[str] = []

    def reply(request):
        asked.append(request["messages"][0]["content"])
        return f"{request['model']} on {asked[-1]}: {len(asked)}"

    judge_server.reply = lambda request: reply(request) if len(asked) < 5 else (400, "enough", {})
    judge = Judge(judge_server.url, "judge-1", KEY, at_once=1)
    with pytest.raises(ValueError, match="status 400: enough"):
        ask_each(judge, tmp_path, texts)
    path = tmp_path / JUDGEMENTS
    kept = path.read_bytes()
    path.write_bytes(kept[:-9])  # killed within the fifth line
    asked.clear()
    judge_server.reply = reply
    said = ask_each(Judge(judge_server.url, "judge-1", KEY, at_once=4), tmp_path, texts)
    assert sorted(asked) == texts[4:]
    assert said[:4] == [f"judge-1 on {text}: {number}" for number, text in enumerate(texts[:4], 1)]
    assert [words.split(":")[0] for words in said[4:]] == [f"judge-1 on {text}" for text in texts[4:]]
    assert path.read_bytes().startswith(b"".join(kept.splitlines(keepends=True)[:4]))
    asked.clear()
    assert ask_each(judge, tmp_path, texts) == said
    assert not asked
    other = ask_each(Judge(judge_server.url, "judge-2", at_once=1), tmp_path, [*texts, "answer 0 changed"])
    assert [words.split()[0] for words in other] == ["judge-2"] * 10
    assert asked == [*texts, "answer 0 changed"]
    assert ask_each(judge, tmp_path, texts) == said
    assert KEY.encode() not in path.read_bytes()


def test_what_is_under_way_at_an_error_is_kept(judge_server, tmp_path: Path) -> None:
    both, refused = threading.Barrier(2, timeout=60), threading.Event()

    def reply(request):
        both.wait()
        if request["messages"] == prompt("bad"):
            refused.set()
            return 400, "no", {}
        refused.wait(60)
        return "slow, but paid for"

    judge_server.reply = reply
    judge = Judge(judge_server.url, "judge-1", at_once=2)
    with pytest.raises(ValueError, match="status 400: no"):
        ask_each(judge, tmp_path, ["slow", "bad"])
    judge_server.reply = lambda request: (400, "nothing is asked", {})
    assert ask_each(judge, tmp_path, ["slow"]) == ["slow, but paid for"]


def test_one_request_has_one_judgement(judge_server, tmp_path: Path) -> None:
    """Also when it is made by several threads at once, each of which gets other words."""
    judge_server.reply = lambda request: str(len(judge_server.requests))
    judge = Judge(judge_server.url, "judge-1", at_once=8)
    first = ask_each(judge, tmp_path, ["the same"] * 16)
    assert len(set(first)) == 1
    assert len((tmp_path / JUDGEMENTS).read_text().splitlines()) == 1
    assert ask_each(judge, tmp_path, ["the same"]) == first[:1]


def test_damage_and_bad_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / JUDGEMENTS).write_text(json.dumps({"key": "0"}) + "\n")
    with pytest.raises(ValueError, match=r"judgements.jsonl: line 1: 'said' is missing; needs a string"):
        ask_each(Judge("http://127.0.0.1:9", "judge-1"), tmp_path, ["?"])
    for url in ("ftp://a/v1", "api.openai.com/v1", "http://", "http://a:b/v1", "http://a/ v1", "http://[", ""):
        with pytest.raises(ValueError, match=r"url is .*; it needs to be http://… or https://…"):
            Judge(url, "judge-1")
    for url in (f"https://me:{KEY}@a/v1", f"ftp://a/v1?key={KEY}"):
        with pytest.raises(ValueError, match=r"url holds '@', .* a key belongs in JUDGE_API_KEY") as caught:
            Judge(url, "judge-1")
        assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match="api_key holds blanks") as caught:
        Judge("http://a/v1", "judge-1", KEY + "\n")
    assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match="model is empty"):
        Judge("http://a/v1", "")
    with pytest.raises(ValueError, match="at_once is 0"):
        Judge("http://a/v1", "judge-1", at_once=0)
