"""What clients of other servers are used to: choices in order, usage of streams, seeds and filters at their ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("httpx", reason="the test's HTTP client")

import ktcore
from ktcore.errors import LogitsError
from ktcore.server.api.sampling import params_for
from ktcore.server.http.errors import dumps, problem_of

from .test_http import CHAT, Client, _events, served

PLAIN = "/v1/completions"
LEAST: dict[str, Any] = {"model": "tiny", "max_tokens": 4}
ASKS = {CHAT: {**LEAST, "messages": [{"role": "user", "content": "x"}]}, PLAIN: {**LEAST, "prompt": "x"}}


@pytest.fixture
def client(opened: Callable[..., ktcore.Model]) -> Iterator[Client]:
    with served(opened("dense")) as made:
        yield made


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_all_choices_of_a_stream_are_opened_in_order_first(client: Client, path: str) -> None:
    pieces = _events(client("POST", path, json={**ASKS[path], "stream": True, "n": 3, "seed": 4}).text)
    assert [piece["choices"][0]["index"] for piece in pieces[:3]] == [0, 1, 2]
    said = [piece["choices"][0].get("delta", {"content": piece["choices"][0].get("text")}) for piece in pieces[:3]]
    assert [each["content"] for each in said] == ["", "", ""]


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_usage_is_null_until_the_last_piece_and_absent_where_nobody_asked(client: Client, path: str) -> None:
    counted = {**ASKS[path], "stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = _events(client("POST", path, json=counted).text)
    assert [piece["usage"] for piece in pieces] == [None] * len(pieces)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert all(
        "usage" not in piece for piece in _events(client("POST", path, json={**ASKS[path], "stream": True}).text)
    )


def test_minus_one_is_a_fresh_seed_and_other_negative_ones_are_kept() -> None:
    assert params_for(9, seed=-1).seed is None
    assert params_for(9, seed=-2).seed == -2


@pytest.mark.parametrize("change", [{"top_p": 0}, {"min_p": 1}])
def test_filters_at_their_ends_keep_one_token(client: Client, change: dict[str, Any]) -> None:
    greedy = client("POST", PLAIN, json={**ASKS[PLAIN], "temperature": 0}).json()["choices"][0]["text"]
    assert (
        client("POST", PLAIN, json={**ASKS[PLAIN], "temperature": 2, **change}).json()["choices"][0]["text"] == greedy
    )


def test_nulls_among_ollamas_options_are_its_defaults(client: Client) -> None:
    def said(options: dict[str, Any]) -> str:
        ask = {"model": "tiny", "prompt": "x", "stream": False, "options": {"seed": 3, "num_predict": 6, **options}}
        done = client("POST", "/api/generate", json=ask)
        assert done.status_code == 200, done.text
        return str(done.json()["response"])

    assert said({"temperature": None, "top_k": None, "top_p": None, "min_p": None}) == said({})


def test_what_was_computed_in_vain_is_not_to_be_asked_again(client: Client) -> None:
    late = client("POST", CHAT, json={**ASKS[CHAT], "max_tokens": 900, "timeout": 1e-4})
    assert (late.status_code, late.headers["x-should-retry"]) == (504, "false")
    assert problem_of(LogitsError("no numbers")).response("/v1/x").headers["x-should-retry"] == "false"
    long = client("POST", PLAIN, json={**ASKS[PLAIN], "prompt": [1] * 2000})
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_no_answer_holds_what_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps({"logprob": float("nan")})
