"""The OpenAI routes over a tiny model: shapes, limits, keys, and what clients do wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
httpx = pytest.importorskip("httpx", reason="the test's HTTP client")

import ktcore  # noqa: E402
from ktcore.engine.service import Service  # noqa: E402
from ktcore.server.http.app import build_app  # noqa: E402
from ktcore.server.http.settings import Keys, Settings  # noqa: E402

Opened = Callable[..., ktcore.Model]
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
CHAT = "/v1/chat/completions"


class Client:
    """Asks the application itself, without a socket; every call is an event loop of its own."""

    def __init__(self, app: Any, headers: dict[str, str] | None = None, host: str = "127.0.0.1") -> None:
        self._app, self._headers, self._host = app, headers or {}, host

    def __call__(self, method: str, path: str, **options: Any) -> Any:
        async def ask() -> Any:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url=f"http://{self._host}", headers=self._headers
            ) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())


@contextmanager
def served(model: ktcore.Model, headers: dict[str, str] | None = None, **settings: Any) -> Iterator[Client]:
    with Service(model, settings.pop("queue", 64)) as service:
        yield Client(build_app(service, Settings("tiny", **settings)), headers)


@pytest.fixture
def client(opened: Opened) -> Iterator[Client]:
    with served(opened(), max_body=20_000) as made:
        yield made


def _events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def _messages(text: str = "Hello") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_chat_answers_as_the_model_does(opened: Opened) -> None:
    model = opened()
    expected = model.chat(_messages(), 8, temperature=0)
    with served(model) as client:
        found = client("POST", CHAT, json=ASK).json()
    assert found["object"] == "chat.completion"
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    count = len(model.tokenizer.encode_chat(_messages()))
    assert found["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": 8,
        "total_tokens": count + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_adds_up_to_the_whole_answer(client: Client, path: str) -> None:
    said_by = {"messages": _messages()} if path == CHAT else {"prompt": "Hello"}
    ask = {"model": "tiny", "max_tokens": 8, **said_by, "n": 2, "temperature": 1, "seed": 5}
    whole = client("POST", path, json=ask).json()
    done = client("POST", path, json={**ask, "stream": True, "stream_options": {"include_usage": True}})
    assert done.headers["content-type"].startswith("text/event-stream")
    *pieces, last = _events(done.text)
    texts = ["", ""]
    for piece in pieces:
        (choice,) = piece["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
    said = [c["message"]["content"] if path == CHAT else c["text"] for c in whole["choices"]]
    assert texts == said
    assert texts[0] != texts[1]
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert [c["finish_reason"] for p in pieces for c in p["choices"] if c["finish_reason"]] == ["length"] * 2


def test_completions_take_texts_and_token_ids(client: Client, opened: Opened) -> None:
    base = {"model": "tiny", "max_tokens": 6, "temperature": 0}

    def texts(prompt: Any) -> list[str]:
        return [c["text"] for c in client("POST", "/v1/completions", json={**base, "prompt": prompt}).json()["choices"]]

    tokenizer = opened().tokenizer
    one, two = tokenizer.encode("one"), tokenizer.encode("two")
    both = texts(["one", "two"])
    assert texts("one") + texts("two") == both
    assert texts(one) + texts(two) == both
    assert texts([one, two]) == both


def test_stop_strings_and_seeds(client: Client) -> None:
    def said(**more: Any) -> Any:
        return client("POST", CHAT, json={**ASK, "max_tokens": 24, **more}).json()["choices"][0]

    whole = said()["message"]["content"]
    stop = whole[8:10]
    cut = said(stop=[stop])
    assert cut["finish_reason"] == "stop"
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    first, same, other = (said(temperature=1, seed=seed)["message"]["content"] for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "gpt-9"}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": "Hi"}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 10**9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 10**40}, "seed"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": float("1e300")}, "frequency_penalty"),
        ({"typical_p": 0}, "typical_p"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"hot": 1}}, "logit_bias.hot"),
        ({"logit_bias": {"264": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, None),
    ],
)
def test_what_cannot_be_served_is_refused_in_openais_shape(client: Client, change: Any, param: str | None) -> None:
    done = client("POST", CHAT, json={**ASK, **change})
    assert done.status_code == (404 if change == {"model": "gpt-9"} else 400)
    error = done.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"].startswith(param)


LONE_SURROGATE = b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}'
NOT_A_NUMBER = b'{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}'


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 15000, b'{"model": "\xff"}', LONE_SURROGATE, NOT_A_NUMBER, b"null", b"7"]
)
def test_bad_bodies_are_the_clients_fault(client: Client, body: bytes) -> None:
    done = client("POST", CHAT, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= done.status_code < 500
    assert set(done.json()["error"]) == {"message", "type", "param", "code"}


NAMES = {"chat_template_kwargs": {"self": 1, "messages": 2, "tools": 3, "loop": 4, "add_generation_prompt": False}}


def test_extreme_values_that_are_allowed_work(client: Client) -> None:
    for change in (
        {"temperature": 1e-40},
        {"max_tokens": 10**12},
        {"top_p": 1e-300},
        {"top_k": 10**9},
        {"seed": -7},
        NAMES,
    ):
        done = client("POST", CHAT, json={**ASK, "temperature": 1, **change, "timeout": 60})
        assert done.status_code == 200, (change, done.text)


def test_the_models_are_listed(client: Client) -> None:
    (card,) = client("GET", "/v1/models").json()["data"]
    assert card["id"] == "tiny"
    assert client("GET", "/v1/models/tiny").json() == card
    assert client("GET", "/v1/models/../../etc/passwd").status_code == 404
    assert client("GET", "/health").json() == {"status": "ok"}
    assert client("GET", "/nothing").json()["error"]["message"] == "Not Found"


def test_text_becomes_tokens_and_text_again(client: Client) -> None:
    text = "Größe: 5 €<|end|>"
    found = client("POST", "/tokenize", json={"prompt": text}).json()
    # a byte is a token here, and a control token is one
    assert found["count"] == len(found["tokens"]) == len("Größe: 5 €".encode()) + 1
    assert client("POST", "/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    assert client("POST", "/detokenize", json={"tokens": [-1]}).status_code == 400
    assert client("POST", "/detokenize", json={"tokens": [2**31 - 1]}).json() == {"prompt": ""}


def test_a_body_beyond_the_limit_is_refused(client: Client) -> None:
    async def drops() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    assert client("POST", CHAT, content=b" " * 20_001).status_code == 413
    assert client("POST", CHAT, content=drops()).status_code == 413
    assert client("POST", CHAT, content=drops(), headers={"Content-Length": "few"}).status_code == 413
    assert client("POST", CHAT, json=ASK).status_code == 200


def test_without_a_key_only_health_answers(opened: Opened) -> None:
    with served(opened(), keys=Keys(("right", "other"))) as client:
        paths = ("/v1/models", "/openapi.json", "/nothing", "/", "/health/..", "/v1/chat/completions")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            for path in paths:
                done = client("GET", path, headers=headers)
                assert done.status_code == 401, path
                assert done.json()["error"]["code"] == "invalid_api_key"
            assert client("GET", "/health", headers=headers).status_code == 200
        for key in ("right", "other"):
            assert client("POST", CHAT, json=ASK, headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_without_keys_only_loopback_names_answer(opened: Opened) -> None:
    with Service(opened()) as service:
        app = build_app(service, Settings("tiny"))
        for host, status in (("localhost:8000", 200), ("[::1]:8000", 200), ("evil.example", 403)):
            assert Client(app, host=host)("GET", "/v1/models").status_code == status
        for origin, status in (("http://localhost:3000", 200), ("https://evil.example", 403), ("null", 403)):
            assert Client(app)("GET", "/v1/models", headers={"Origin": origin}).status_code == status


def test_more_than_may_wait_is_told_to_come_later(opened: Opened) -> None:
    with served(opened(), queue=2) as client:
        done = client("POST", CHAT, json={**ASK, "n": 3})
    assert done.status_code == 429
    assert done.headers["retry-after"] == "1"
    assert done.json()["error"]["type"] == "rate_limit_error"


def test_a_deadline_is_an_error_whole_and_streamed(opened: Opened) -> None:
    with served(opened(), timeout_s=0.05) as client:
        ask = {**ASK, "max_tokens": 900, "timeout": 100}
        assert client("POST", CHAT, json=ask).status_code == 504
        events = _events(client("POST", CHAT, json={**ask, "stream": True}).text)
    assert events[-1]["error"]["type"] == "timeout_error"


def test_an_engine_that_fails_is_a_500_without_details(opened: Opened) -> None:
    model = opened()

    def broken(*words: Any) -> int:
        raise ArithmeticError("secret detail")

    with served(model) as client:
        object.__setattr__(model.engine.model, "sampler", broken)
        done = client("POST", CHAT, json=ASK)
    assert done.status_code == 500
    assert done.json()["error"]["type"] == "server_error"
    assert "secret" not in done.text
