"""What a server reuses and counts: prompts that begin alike, guesses, experts; and whose turn it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("httpx", reason="the test's HTTP client")

import ktcore
from ktcore.engine.prefix.cache import PrefixOptions
from ktcore.server.http.settings import Keys

from .test_http import CHAT, served

Opened = Callable[..., ktcore.Model]
LONG = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4


def _ask(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0, **more}


def _metrics(client: Any) -> dict[str, float]:
    lines = client("GET", "/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_reused_prompts_show_in_usage_and_metrics(opened: Opened) -> None:
    model = opened(prefix=PrefixOptions(memory=2**24))
    count = len(model.tokenizer.encode_chat([{"role": "user", "content": LONG}]))
    with served(model) as client:
        first = client("POST", CHAT, json=_ask(LONG)).json()
        second = client("POST", CHAT, json=_ask(LONG)).json()
        assert second["choices"] == first["choices"]
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)]
        assert cached == [0, (count - 1) // 64 * 64]
        answer = client("POST", "/v1/responses", json={"model": "tiny", "input": LONG, "max_output_tokens": 4}).json()
        assert answer["usage"]["input_tokens_details"]["cached_tokens"] == cached[1]
        found = _metrics(client)
    assert found["ktcore_prefix_asked_tokens_total"] == 3 * count
    assert found['ktcore_prefix_reused_tokens_total{tier="device"}'] == 2 * cached[1]
    assert found['ktcore_prefix_reused_tokens_total{tier="disk"}'] == 0
    assert found['ktcore_prefix_bytes{tier="memory"}'] > 0
    assert found['ktcore_prefix_bytes{tier="disk"}'] == 0
    assert found["ktcore_kv_pages_kept"] > 0
    assert found["ktcore_kv_pages_free"] == found["ktcore_kv_pages"]


def test_what_the_disk_holds_is_counted_from_the_start(opened: Opened, tmp_path: Path) -> None:
    options = PrefixOptions(memory=0, folder=tmp_path)
    with opened(prefix=options) as model, served(model) as client:
        assert client("POST", CHAT, json=_ask(LONG)).status_code == 200
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.kv"))
    with served(opened(prefix=options)) as client:
        found = _metrics(client)
    assert found['ktcore_prefix_bytes{tier="disk"}'] == written > 0
    assert found['ktcore_prefix_bytes{tier="memory"}'] == 0


def test_choices_of_one_prompt_compute_it_once(opened: Opened) -> None:
    with served(opened()) as client:
        several = client("POST", CHAT, json=_ask(LONG, n=4, temperature=1, seed=3)).json()
        found = _metrics(client)
        assert len({choice["message"]["content"] for choice in several["choices"]}) > 1
        prompt = several["usage"]["prompt_tokens"]
        assert found['ktcore_prefix_reused_tokens_total{tier="device"}'] == 3 * ((prompt - 1) // 64 * 64)


def test_prompt_lookup_is_a_field_and_an_operators_default(opened: Opened) -> None:
    model = opened()
    ask = _ask(LONG, max_tokens=40)
    with served(model) as client:
        expected = client("POST", CHAT, json=ask).json()["choices"]
        assert client("POST", CHAT, json={**ask, "prompt_lookup": 5}).json()["choices"] == expected
        assert client("POST", CHAT, json={**ask, "prompt_lookup": 65}).status_code == 400
        assert client("POST", CHAT, json={**ask, "prompt_lookup": -1}).status_code == 400
    with served(model, prompt_lookup=4) as client:
        assert client("POST", CHAT, json=ask).json()["choices"] == expected


def test_drafts_are_counted_by_what_made_them_and_a_request_may_have_fewer(
    opened: Opened, folders: dict[str, Path]
) -> None:
    ask = _ask(LONG, max_tokens=20)
    with served(opened()) as client:
        expected = client("POST", CHAT, json=ask).json()["choices"]
        assert client("POST", CHAT, json={**ask, "draft": 0}).json()["choices"] == expected
        refused = client("POST", CHAT, json={**ask, "draft": 1})
        assert refused.status_code == 400
        assert "this model drafts no tokens" in refused.json()["error"]["message"]
    with served(opened(draft=f"{folders['moe']}:3")) as client:
        assert client("POST", CHAT, json={**ask, "draft": 0}).json()["choices"] == expected
        assert _metrics(client)['ktcore_guessed_tokens_total{by="model"}'] == 0
        assert client("POST", CHAT, json=ask).json()["choices"] == expected
        found = _metrics(client)
        assert found['ktcore_guessed_tokens_total{by="model"}'] >= 12
        assert 0.8 < found['ktcore_guessed_right_tokens_total{by="model"}'] / 15 <= 1
        assert found['ktcore_guessed_tokens_total{by="lookup"}'] == 0
        forms = {"response_format": {"type": "json_object"}}
        guided = [client("POST", CHAT, json={**ask, **forms, "draft": n}).json()["choices"] for n in (0, 3)]
        assert guided[0] == guided[1]


def test_experts_are_counted_by_layer(opened: Opened) -> None:
    model = opened(rules=None)
    with served(model) as client:
        answer = client("POST", CHAT, json=_ask("Hello", max_tokens=5)).json()
        found = _metrics(client)
    # two experts a token; the last drawn token was not run
    ran = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"] - 1
    for layer in ("0", "1"):
        assert found[f'ktcore_expert_tokens_total{{layer="{layer}"}}'] == 2 * ran
        assert 2 / 8 / 2 < found[f'ktcore_expert_busiest_share{{layer="{layer}"}}'] <= 1 / 2
        assert 2 <= found[f'ktcore_experts_used{{layer="{layer}"}}'] <= 8


def test_one_user_with_many_requests_does_not_hold_up_another(opened: Opened) -> None:
    model = opened(context=256)
    order: list[str] = []
    with served(model, keys=Keys(("first", "second"))) as client:

        def ask(key: str, text: str) -> None:
            reply = client("POST", CHAT, json=_ask(text, max_tokens=60), headers={"Authorization": f"Bearer {key}"})
            assert reply.status_code == 200
            order.append(key)

        asks = [("first", f"{i}{LONG[:150]}") for i in range(8)]
        threads = [threading.Thread(target=ask, args=a) for a in asks]
        for thread in threads:
            thread.start()
        scheduler = model.engine.scheduler
        ends = time.monotonic() + 60
        while len(scheduler.waiting) < 6:
            assert time.monotonic() < ends
            time.sleep(0.001)
        late = threading.Thread(target=ask, args=("second", f"x{LONG[:150]}"))
        late.start()
        for thread in (*threads, late):
            thread.join()
    # not behind the six that were waiting when it came
    assert order.index("second") <= 4
