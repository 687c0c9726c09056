"""What a request's fields may hold, at both ends, and that each reaches the engine as it was sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("httpx", reason="the test's HTTP client")
pytest.importorskip("openai", reason="its neighbour's tests need it")
pytest.importorskip("ollama", reason="its neighbour's tests need it")

import ktcore
from ktcore.engine.schedule.pooling import LAST, MEAN
from ktcore.engine.service import Request, Service
from ktcore.errors import RequestError
from ktcore.ops.sampling import SamplingParams
from ktcore.server.http.app import build_app
from ktcore.server.http.config import read_config
from ktcore.server.http.settings import Settings

from .test_fields import CHAT, LEAST, PLAIN, _complaint
from .test_http import Client

RESPONSES, EMBEDDINGS, GENERATE = "/v1/responses", "/v1/embeddings", "/api/generate"
COMMON: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0, 0.5, 100], [-0.01, 100.1]),
    ("top_p", [0, 0.5, 1], [-0.01, 1.01]),
]
OURS: list[tuple[str, list[Any], list[Any]]] = [
    *COMMON,
    ("max_tokens", [1, 2**40], [0]),
    ("top_k", [-1, 0, 2**31], [-2, 2**31 + 1]),
    ("min_p", [0, 0.5, 1], [-0.01, 1.01]),
    ("repetition_penalty", [0.01, 100], [0, 100.1]),
    ("typical_p", [0.01, 1], [0, 1.01]),
    ("presence_penalty", [-2, 0.5, 2], [-2.01, 2.01]),
    ("frequency_penalty", [-2, 0.5, 2], [-2.01, 2.01]),
    ("seed", [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63]),
    ("n", [1, 16], [0, 17]),
    ("stop", ["x", "x" * 1000, [], ["x"] * 16], ["", "x" * 1001, ["x"] * 17, [""]]),
    ("logit_bias", [{}, {"0": -100}, {"5": 100}], [{"5": 100.1}, {"5": -100.1}, {"-1": 1}, {str(2**31): 1}]),
    ("stop_token_ids", [[], [0], [2**31 - 1], [1] * 64], [[-1], [2**31], [1] * 65]),
    ("prompt_lookup", [0, 64], [-1, 65]),
    ("draft", [0], [-1, 17]),
    ("timeout", [0.001, 1e6], [0, 1e6 + 1]),
    ("user", ["", "x" * 1000], ["x" * 1001]),
    ("guided_choice", [["a"], ["a"] * 1000], [[], ["a"] * 1001]),
    ("guided_regex", ["", "a" * 10_000], ["a" * 10_001]),
    ("guided_grammar", ["", "a" * 100_000], ["a" * 100_001]),
]
TOOL = {"type": "function", "function": {"name": "f"}}
NAMED = [[{"type": "function", "function": {"name": name}}] for name in ("a.b-C_9", "x" * 64, "", "a b", "ä", "x" * 65)]
BOUNDS: dict[str, list[tuple[str, list[Any], list[Any]]]] = {
    CHAT: [
        *OURS,
        ("messages", [LEAST[CHAT]["messages"]], [[]]),
        ("max_completion_tokens", [1], [0]),
        ("top_logprobs", [0, 20], [-1, 21]),
        ("tools", [[], [TOOL] * 128, *NAMED[:2]], [[TOOL] * 129, *NAMED[2:]]),
    ],
    PLAIN: [
        *OURS,
        ("logprobs", [0, 20], [-1, 21]),
        ("prompt", ["", [0], ["a"] * 64, [[1]] * 64], [[], ["a"] * 65, [[1]] * 65, [[]]]),
    ],
    RESPONSES: [
        *COMMON,
        ("max_output_tokens", [1], [0]),
        ("timeout", [0.001, 1e6], [0, 1e6 + 1]),
        ("user", ["x" * 1000], ["x" * 1001]),
        ("input", ["", [{"role": "user", "content": "x"}]], [[]]),
    ],
    EMBEDDINGS: [
        ("input", ["x", [0], ["x"] * 2048, [[2**31 - 1]]], ["", [], [""], ["x"] * 2049, [[]], [[1]] * 2049, [-1]]),
        ("dimensions", [1], [0]),
        ("pooling", ["mean", "last"], ["cls"]),
    ],
    GENERATE: [
        ("top_logprobs", [0, 20], [-1, 21]),
        ("keep_alive", ["1h30m", "-1", "5ms", "1.5s", 0, -1, 2.5], ["", "h", "5 m", "x5s", "1h" * 21, "nan", "inf"]),
        ("think", [True, "low", "high"], ["max"]),
    ],
}
OPTIONS: list[tuple[str, list[Any], list[Any]]] = [
    *COMMON,
    ("num_predict", [-2, -1, 0, 2**40], [-3]),
    ("top_k", [-1, 0, 2**31], [-2, 2**31 + 1]),
    ("min_p", [0, 1], [-0.01, 1.01]),
    ("typical_p", [0.01, 1], [0, 1.01]),
    ("repeat_penalty", [0.01, 100], [0, 100.1]),
    ("repeat_last_n", [-1, 0, 64], [-2]),
    ("presence_penalty", [-2, 2], [-2.01, 2.01]),
    ("stop", ["x", ["x"] * 16], ["", ["x"] * 17]),
    ("seed", [-(2**63), 2**63 - 1], [2**63]),
]
EVERY = [(route, *bound) for route, bounds in BOUNDS.items() for bound in bounds]


@pytest.mark.parametrize(("route", "field", "inside", "outside"), EVERY, ids=lambda each: str(each)[:20])
def test_a_field_holds_what_lies_within_its_bounds(
    route: str, field: str, inside: list[Any], outside: list[Any]
) -> None:
    for value in inside:
        assert _complaint(route, **{field: value}) is None, value
    for value in outside:
        told = _complaint(route, **{field: value})
        assert told is not None, value
        assert str(told[0]).startswith(field)


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_no_field_takes_what_is_no_number(number: str) -> None:
    for route, field, inside, _ in EVERY:
        if any(isinstance(value, float) for value in inside) and field != "keep_alive":
            assert _complaint(route, **{field: float(number)}) is not None, (route, field)
    assert _complaint(CHAT, logit_bias={"5": float(number)}) is not None
    assert _complaint("/api/chat", options={"temperature": float(number)}) is not None


@pytest.mark.parametrize(("field", "inside", "outside"), OPTIONS, ids=lambda each: str(each)[:20])
def test_an_option_of_ollamas_holds_what_lies_within_its_bounds(
    field: str, inside: list[Any], outside: list[Any]
) -> None:
    for value in inside:
        assert _complaint("/api/chat", options={field: value}) is None, value
    for value in outside:
        told = _complaint("/api/chat", options={field: value})
        assert told is not None, value
        assert str(told[0]).startswith(f"options.{field}")


Asked = Callable[..., list[Request]]


@pytest.fixture
def asked(opened: Callable[..., ktcore.Model]) -> Iterator[Asked]:
    """asked(route, **fields): what the engine is asked, which is not computed."""
    with Service(opened("dense")) as service:
        client = Client(build_app(service, Settings("tiny", default_tokens=77, timeout_s=60, prompt_lookup=3)))
        seen: list[Request] = []

        def submit(requests: Any) -> Any:
            seen.extend(request for request, _ in requests)
            raise RequestError("seen")

        service.submit = submit  # type: ignore[method-assign]

        def ask(route: str, **fields: Any) -> list[Request]:
            seen.clear()
            done = client("POST", route, json={**LEAST[route], **fields})
            assert "seen" in done.text, done.text
            return list(seen)

        yield ask


GIVEN: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 7,
    "min_p": 0.1,
    "typical_p": 0.9,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "seed": 5,
}


@pytest.mark.parametrize("route", [CHAT, PLAIN])
def test_openais_fields_reach_the_engine(asked: Asked, route: str) -> None:
    more = {"repetition_penalty": 1.1, "logit_bias": {"5": 1.5}}
    ends = {
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "prompt_lookup": 2,
        "draft": 0,
        "max_tokens": 9,
    }
    logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": 4} if route == CHAT else {"logprobs": 4}
    made = asked(route, **GIVEN, **more, **ends, **logprobs, n=3, timeout=2.5, user="u")
    plain = {**GIVEN, "repetition_penalty": 1.1, "logit_bias": {5: 1.5}}
    assert [each.params for each in made] == [SamplingParams(**{**plain, "seed": seed}) for seed in (5, 6, 7)]
    for each in made:
        assert (each.max_new_tokens, each.stop, each.timeout_s) == (9, ("a", "b"), 2.5)
        assert each.user.endswith(" u")
        output = each.output
        assert (output.stop_ids, output.ignore_eos, output.logprobs) == (frozenset((7,)), True, 4)
        assert (output.prompt_lookup, output.draft) == (2, 0)
    (least,) = asked(route, max_tokens=None)
    assert least.params == SamplingParams(temperature=1.0)
    assert (least.max_new_tokens, least.timeout_s, least.output.prompt_lookup) == (77, 60, 3)
    assert least.output.logprobs is None
    (last,) = asked(route, n=1, seed=2**63 - 1)
    assert last.params.seed == 2**63 - 1
    assert [each.params.seed for each in asked(route, n=2, seed=2**63 - 1)] == [2**63 - 1, -(2**63)]


def test_a_prompt_is_text_or_ids_or_several_of_either(asked: Asked) -> None:
    def ids(prompt: Any) -> list[list[int]]:
        return [each.ids for each in asked(PLAIN, prompt=prompt)]

    for prompt in ([5], [5, 6]):
        assert ids(prompt) == [prompt]
    for several in ([[5]], [[5], [6, 7]]):
        assert ids(several) == several
    one, two = ids("a") + ids("bc")
    assert (len(one), len(two)) == (1, 2)
    assert ids(["a"]) == [one]
    assert ids(["a", "bc"]) == [one, two]


def test_chats_and_responses_have_words_of_their_own_for_the_length(asked: Asked) -> None:
    (chat,) = asked(CHAT, max_tokens=5, max_completion_tokens=6)
    assert chat.max_new_tokens == 6
    (made,) = asked(RESPONSES, max_output_tokens=4, temperature=0.7, top_p=0.8, user="u", timeout=3)
    assert (made.max_new_tokens, made.timeout_s, made.user[-2:]) == (4, 3, " u")
    assert made.params == SamplingParams(temperature=0.7, top_p=0.8)
    (least,) = asked(RESPONSES)
    assert (least.params, least.max_new_tokens) == (SamplingParams(temperature=1.0), 77)


@pytest.mark.parametrize("route", ["/api/generate", "/api/chat"])
def test_ollamas_options_reach_the_engine(asked: Asked, route: str) -> None:
    (made,) = asked(route, options={**GIVEN, "repeat_penalty": 1.1, "num_predict": 9, "stop": "a"}, top_logprobs=2)
    assert made.params == SamplingParams(**GIVEN, repetition_penalty=1.1)
    assert (made.max_new_tokens, made.stop, made.output.logprobs) == (9, ("a",), 2)
    (least,) = asked(route)
    assert least.params == SamplingParams(temperature=0.8, top_k=40, top_p=0.9)
    assert (least.max_new_tokens, least.timeout_s, least.output.logprobs) == (77, 60, None)
    assert asked(route, options={"num_predict": 0})[0].max_new_tokens == 0
    assert asked(route, options={"num_predict": -1})[0].max_new_tokens == 1024
    assert asked(route, logprobs=True)[0].output.logprobs == 0


def test_vectors_draw_no_tokens(asked: Asked) -> None:
    made = asked(EMBEDDINGS, input=["ab", "c"])
    assert [len(each.ids) for each in made] == [2, 1]
    assert [each.ids for each in asked(EMBEDDINGS, input=[1, 2])] == [[1, 2]]
    assert [each.ids for each in asked(EMBEDDINGS, input=[[1, 2], [3]])] == [[1, 2], [3]]
    for each in made:
        assert (each.max_new_tokens, each.timeout_s, each.output.pool) == (0, 60, MEAN)
        assert each.params.temperature == 0
    assert asked(EMBEDDINGS, pooling="last")[0].output.pool == LAST


FILE: dict[str, Any] = {"models": {"m": {"path": "x"}}}
IN_FILE: list[tuple[str, list[Any], list[Any]]] = [
    ("port", [1, 65535], [0, 65536, "8000"]),
    ("queue", [1], [0]),
    ("stretch", [0, 2.5, 3], [-0.1]),
    ("timeout", [0.5, 3], [0]),
    ("drain", [0], [-1]),
    ("max_body", [1, "1KiB"], [0, "much"]),
    ("memory", ["8GiB", {"cpu:0": "1GiB"}], [0, {"cpu:0": 0}]),
    ("max_loaded", [1], [0]),
    ("idle_unload", [0.5], [0]),
    ("hsot", [], ["x"]),
    ("models", [{"a.b-c/d:e": {"path": "x"}}], [{}, {"a b": {"path": "x"}}, {"m:latest": {"path": "x"}}]),
]
OF_A_MODEL: list[tuple[str, list[Any], list[Any]]] = [
    ("threads", [1], [0]),
    ("context", [1], [0]),
    ("memory", [1, "1GiB"], [0]),
    ("prefix_cache_memory", [1], [0]),
    ("prefix_cache_disk", [1], [0]),
    ("prompt_lookup", [0, 64], [-1, 65]),
    ("max_new_tokens", [1], [0]),
    ("graphs", [False], ["no"]),
    ("draft", ["mtp:2", "x.gguf"], [2]),
    ("kepe", [], [True]),
]
FILES = [(False, *each) for each in IN_FILE] + [(True, *each) for each in OF_A_MODEL]


@pytest.mark.parametrize(("model", "field", "inside", "outside"), FILES, ids=lambda each: str(each)[:20])
def test_a_servers_file_holds_what_lies_within_its_bounds(
    tmp_path: Path, model: bool, field: str, inside: list[Any], outside: list[Any]
) -> None:
    def read(value: Any) -> Any:
        given = {"models": {"m": {"path": "x", field: value}}} if model else {**FILE, field: value}
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(given))
        made = read_config(tmp_path / "serve.yaml")
        return getattr(made.models["m"] if model else made, field)

    for value in inside:
        found = read(value)
        if isinstance(value, int | float | bool):
            assert found == value
    for value in outside:
        with pytest.raises(RequestError, match=field) as error:
            read(value)
        assert not any(word in error.value.message for word in ("Input", "Value error", "valid integer"))


def test_a_servers_file_has_the_commands_defaults_and_paths_beside_it(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("rules: []")
    given = {"path": "x", "rules": "own.yaml", "experts_from": "e", "packed_cache": "p", "prefix_cache": "c"}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"models": {"m": given, "n": {"path": "x"}}}))
    made = read_config(tmp_path / "serve.yaml")
    assert (made.host, made.port, made.queue, made.drain, made.max_body) == ("127.0.0.1", 8000, 64, 30, 4 * 2**20)
    assert (made.timeout, made.memory, made.max_loaded, made.idle_unload) == (None, None, None, None)
    loading = made.models["m"].loading(tmp_path)
    assert loading["rules"] == str(tmp_path / "own.yaml")
    assert (loading["experts_from"], loading["packed_cache"]) == (tmp_path / "e", tmp_path / "p")
    assert loading["prefix"].folder == tmp_path / "c"
    least = made.models["n"].loading(tmp_path)
    assert (least["backend"], least["rules"], least["experts_from"], least["packed_cache"]) == ("auto",) + (None,) * 3
    assert (least["graphs"], least["context"], least["memory"], least["prefix"].folder) == (True, None, None, None)
    assert (made.models["n"].max_new_tokens, made.models["n"].keep) == (1024, False)
