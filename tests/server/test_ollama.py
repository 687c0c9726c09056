"""The Ollama routes: the ollama client over a socket, what curl sends, figures that are true; and the metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("httpx", reason="the test's HTTP client")
pytest.importorskip("openai", reason="its neighbour's server fixture needs it")
ollama = pytest.importorskip("ollama", reason="the client is what this tests")

import ktcore  # noqa: E402

from .test_clients import HELLO, Server, server  # noqa: E402, F401
from .test_http import served  # noqa: E402

Opened = Callable[..., ktcore.Model]
GREEDY = {"temperature": 0, "num_predict": 9, "top_k": 0, "top_p": 1.0}


def test_the_ollama_client_works_unmodified(server: Server) -> None:  # noqa: F811
    client = ollama.Client(host=server.url, headers={"Authorization": "Bearer right"})
    (card,) = client.list().models
    assert card.model == "tiny"
    assert card.size > 10_000
    assert client.ps().models[0].context_length == 4096
    assert client.show("tiny:latest").details.family == "qwen3_moe"
    chat = client.chat("tiny", HELLO, options=GREEDY)
    assert chat.message.content
    assert (chat.done, chat.done_reason, chat.eval_count) == (True, "length", 9)
    assert chat.prompt_eval_count == len(server.service.model.tokenizer.encode_chat(HELLO))
    assert 0 < chat.prompt_eval_duration + chat.eval_duration <= chat.total_duration
    pieces = list(client.chat("tiny", HELLO, options=GREEDY, stream=True))
    assert "".join(p.message.content for p in pieces) == chat.message.content
    assert [p.done for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert client.generate("tiny", "Hello", options=GREEDY).response == chat.message.content
    pieces = list(client.generate("tiny", "Hello", raw=True, options=GREEDY, stream=True))
    assert "".join(p.response for p in pieces) != chat.message.content
    with pytest.raises(ollama.ResponseError) as error:
        client.chat("other", HELLO)
    assert error.value.status_code == 404


def test_a_system_message_a_seed_and_a_stop(opened: Opened) -> None:
    model = opened()
    messages = [{"role": "system", "content": "Be kind."}, *HELLO]
    expected = model.chat(messages, 12, temperature=0.8, top_k=40, top_p=0.9, seed=3)
    ask = {"model": "tiny", "stream": False, "prompt": "Hello", "system": "Be kind."}
    with served(model) as client:

        def said(**options: Any) -> Any:
            return client("POST", "/api/generate", json={**ask, "options": {"num_predict": 12, "seed": 3, **options}})

        assert said().json()["response"] == expected
        cut = said(stop=expected[4:6]).json()
        assert cut["response"] == expected[: expected.index(expected[4:6])]
        assert cut["done_reason"] == "stop"


def test_what_curl_sends_is_understood_and_nonsense_is_not(opened: Opened) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    with served(opened()) as client:
        body = json.dumps({"model": "tiny", "messages": HELLO, "options": GREEDY})
        began = time.perf_counter_ns()
        done = client("POST", "/api/chat", content=body, headers=form)
        took = time.perf_counter_ns() - began
        lines = [json.loads(line) for line in done.text.splitlines()]
        assert done.headers["content-type"] == "application/x-ndjson"
        assert lines[-1]["eval_count"] == 9
        assert 0 < lines[-1]["load_duration"] < lines[-1]["total_duration"] < took
        assert client("GET", "/api/version").json() == {"version": "0.12.11"}
        loaded = client("POST", "/api/generate", json={"model": "tiny"}).json()
        assert loaded["done_reason"] == "load"
        silent = client("POST", "/api/chat", json={"model": "tiny", "keep_alive": "5m"}).json()
        assert (silent["message"], silent["done_reason"]) == ({"role": "assistant", "content": ""}, "load")
        # a model that the server was started with stays, whatever a request says
        assert "expires_at" not in client("GET", "/api/ps").json()["models"][0]
        for change in (
            {"format": "xml"},
            {"options": {"temperature": "hot"}},
            {"tools": [{}]},
            {"think": True},
            {"messages": 3},
        ):
            done = client("POST", "/api/chat", json={"model": "tiny", "messages": HELLO, **change})
            assert done.status_code == 400
            assert isinstance(done.json()["error"], str)
        for broken in (b"", b"{", b"[" * 5000, b'{"model": "\xff"}'):
            assert client("POST", "/api/chat", content=broken).status_code == 400


@pytest.mark.parametrize(("route", "said"), [("chat", {"messages": HELLO}), ("generate", {"prompt": "Hello"})])
def test_whether_to_think_is_told_to_the_template(opened: Opened, route: str, said: dict[str, Any]) -> None:
    with served(opened("thinks")) as client:

        def counted(**more: Any) -> int:
            ask = {"model": "tiny", "stream": False, "options": {"num_predict": 1}, **said, **more}
            return int(client("POST", f"/api/{route}", json=ask).json()["prompt_eval_count"])

        assert counted() == counted(think=True)
        assert counted(think=False) == counted() + len("<think></think>")  # a byte is a token


def test_metrics_add_up(opened: Opened) -> None:
    model = opened()
    count = len(model.tokenizer.encode_chat(HELLO))
    with served(model) as client:
        ask = {"model": "tiny", "messages": HELLO, "options": GREEDY, "stream": False}
        for _ in range(3):
            assert client("POST", "/api/chat", json=ask).status_code == 200
        late = {"model": "tiny", "messages": HELLO, "max_tokens": 900, "temperature": 0, "timeout": 0.001}
        assert client("POST", "/v1/chat/completions", json=late).status_code == 504
        text = client("GET", "/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(found['ktcore_answers_total{finish="length"}']) == 3
    assert float(found['ktcore_answers_total{finish="deadline"}']) == 1
    assert float(found["ktcore_prompt_tokens_total"]) == 4 * count
    assert float(found["ktcore_generated_tokens_total"]) >= 27
    assert float(found["ktcore_first_text_seconds_count"]) >= 3
    assert float(found["ktcore_running"]) == float(found["ktcore_waiting"]) == 0
    assert found["ktcore_kv_pages_free"] == found["ktcore_kv_pages"]
