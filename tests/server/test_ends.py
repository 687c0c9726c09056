"""Answers that end otherwise than by their model's will: too late, no numbers, cancelled, calls without arguments."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")
openai = pytest.importorskip("openai", reason="the SDK is what this tests")
pytest.importorskip("ollama", reason="its neighbour's tests need it")

from openai.types.responses import ResponseStreamEvent  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import ktcore  # noqa: E402
from ktcore.dialects.base import Call  # noqa: E402
from ktcore.dialects.dialect import Dialect, Part  # noqa: E402
from ktcore.engine.schedule.sequence import Finish  # noqa: E402
from ktcore.engine.service import Delta  # noqa: E402
from ktcore.engine.stream import Stats  # noqa: E402
from ktcore.errors import LogitsError  # noqa: E402
from ktcore.server.api.custom_tools import earlier_call, text_of_call  # noqa: E402
from ktcore.server.api.ollama.routes import _said  # noqa: E402
from ktcore.server.api.responses.items import Building  # noqa: E402
from ktcore.server.api.responses.schemas import ResponsesAsk  # noqa: E402
from ktcore.server.http.metrics import Metrics  # noqa: E402
from ktcore.server.models.answers import Answers  # noqa: E402

from .test_clients import HELLO, listening  # noqa: E402
from .test_http import _events, served  # noqa: E402

LONG: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 900},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 900},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 900},
    "/v1/embeddings": {"input": "Hello " * 100},
    "/api/generate": {"prompt": "Hello", "stream": False},
    "/api/chat": {"messages": HELLO, "stream": False},
    "/api/embed": {"input": "Hello " * 100},
    "/api/embeddings": {"prompt": "Hello " * 100},
}


def test_what_was_too_late_is_not_to_be_asked_for_again_on_any_route(opened: Callable[..., ktcore.Model]) -> None:
    with served(opened("dense"), timeout_s=1e-4) as client:
        for route, ask in LONG.items():
            late = client("POST", route, json={"model": "tiny", **ask})
            assert (late.status_code, late.headers["x-should-retry"]) == (504, "false"), route
            assert "retry-after" not in late.headers


def test_openais_client_asks_once_for_what_was_too_late_and_again_for_what_was_too_much(
    opened: Callable[..., ktcore.Model],
) -> None:
    with listening(opened("dense"), timeout_s=1e-4) as server:
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="right", timeout=60)
        submit, asked = server.service.submit, []

        def counted(requests: Any) -> Any:
            asked.append(requests)
            return submit(requests)

        server.service.submit = counted  # type: ignore[method-assign]
        for make in (
            lambda: sdk.chat.completions.create(model="tiny", messages=HELLO, max_tokens=900),
            lambda: sdk.completions.create(model="tiny", prompt="Hello", max_tokens=900),
            lambda: sdk.responses.create(model="tiny", input="Hello", max_output_tokens=900),
            lambda: sdk.embeddings.create(model="tiny", input="Hello " * 100),
        ):
            asked.clear()
            with pytest.raises(openai.InternalServerError) as error:
                make()
            assert (error.value.status_code, len(asked)) == (504, 1)


@pytest.fixture
def damaged(folders: dict[str, Path], tmp_path: Path) -> Iterator[ktcore.Model]:
    """A model of which one letter's embedding is no number."""
    folder = shutil.copytree(folders["dense"], tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    with ktcore.load(folder, backend="cpu", rules="reference", context=512) as whole:
        (z,) = whole.tokenizer.encode("z")
    weights["model.embed_tokens.weight"][z] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with ktcore.load(folder, backend="cpu", rules="reference", context=512) as model:
        yield model


def test_vectors_of_what_is_no_number_are_an_error_and_no_nan(damaged: ktcore.Model) -> None:
    with served(damaged) as client:
        for encoding in ("float", "base64"):
            ask = {"model": "tiny", "encoding_format": encoding}
            done = client("POST", "/v1/embeddings", json={**ask, "input": ["a", "az"]})
            assert (done.status_code, done.json()["error"]["code"]) == (500, "not_numbers")
            assert client("POST", "/v1/embeddings", json={**ask, "input": ["a", "b"]}).status_code == 200
        for route, ask in (("/api/embed", {"input": "z"}), ("/api/embeddings", {"prompt": "z"})):
            done = client("POST", route, json={"model": "tiny", **ask})
            assert (done.status_code, "not numbers" in done.json()["error"]) == (500, True)


def test_what_is_no_number_is_raised_by_generate_and_told_by_every_route(damaged: ktcore.Model) -> None:
    for fails in (
        lambda: damaged.generate("z", 4),
        lambda: damaged.generate(["a", "z"], 4),
        lambda: list(damaged.stream("z", 4)),
        lambda: damaged.chat([{"role": "user", "content": "z"}], 4),
    ):
        with pytest.raises(LogitsError, match="not numbers"):
            fails()
    assert damaged.generate("a", 4, temperature=0) is not None
    chat = [{"role": "user", "content": "z"}]
    with served(damaged) as client:
        for route, ask in (
            ("/v1/chat/completions", {"messages": chat}),
            ("/v1/completions", {"prompt": "z"}),
            ("/v1/responses", {"input": "z"}),
            ("/api/chat", {"messages": chat}),
            ("/api/generate", {"prompt": "z"}),
        ):
            whole = client("POST", route, json={"model": "tiny", **ask, "stream": False})
            assert (whole.status_code, whole.headers["x-should-retry"]) == (500, "false"), route
            text = client("POST", route, json={"model": "tiny", **ask, "stream": True}).text
            assert "not numbers" in _last(route, text)


def _last(route: str, text: str) -> str:
    if route.startswith("/api/"):
        return str(json.loads(text.splitlines()[-1])["error"])
    if route == "/v1/responses":
        told = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
        assert [each["type"] for each in told[-2:]] == ["error", "response.failed"]
        assert told[-2]["code"] == "not_numbers"
        return str(told[-2]["message"])
    return str(_events(text)[-1]["error"]["message"])


def test_what_was_drawn_before_its_client_went_is_told_to_nobody() -> None:
    delivers: list[Any] = []
    cancelled: list[str] = []
    stats = Stats(prompt_tokens=3, new_tokens=2)

    def submit(requests: Any) -> list[Any]:
        delivers.extend(deliver for _, deliver in requests)
        return [SimpleNamespace(cancel=lambda: cancelled.append("now"))]

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def told() -> list[str]:
        service, http = SimpleNamespace(submit=submit), SimpleNamespace(receive=receive)
        answers = Answers(service, [None], http, Metrics(), [None])  # type: ignore[arg-type,list-item]
        while not cancelled:
            await asyncio.sleep(0)
        delivers[0](Delta("drawn", stats))
        delivers[0](Delta("", stats, Finish.CANCELLED))
        return [delta.text async for _, delta, _ in answers]

    assert asyncio.run(told()) == [""]


TOOLS = [{"type": "function", "name": "f"}, {"type": "custom", "name": "c"}]


def _built(finish: Finish, *parts: Part) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    tokenizer = SimpleNamespace(encode=lambda text, add_special: text.split())
    ask = ResponsesAsk.model_validate({"model": "m", "input": "x", "tools": TOOLS})
    building = Building("m", ask, SimpleNamespace(dialect=Dialect(), tokenizer=tokenizer))  # type: ignore[arg-type]
    events = list(building.opening())
    for part in parts:
        events += building.add(part)
    events += building.end(finish, Stats(prompt_tokens=3, new_tokens=9, prefill_s=0.1, decode_s=0.1))
    return building.body, events


SAID = (Part(reasoning="Well now,"), Part(reasoning=" hm."), Part(content="Yes"), Part(content=", it is."))


@pytest.mark.parametrize(
    ("finish", "status", "item", "reason", "event"),
    [
        (Finish.STOP, "completed", "completed", None, "response.completed"),
        (Finish.LENGTH, "incomplete", "incomplete", "max_output_tokens", "response.incomplete"),
        (Finish.CANCELLED, "cancelled", "incomplete", None, "response.incomplete"),
    ],
)
def test_how_an_answer_ended_is_its_status_and_that_of_what_was_open(
    finish: Finish, status: str, item: str, reason: str | None, event: str
) -> None:
    body, events = _built(finish, *SAID)
    assert body["status"] == status
    assert (body["incomplete_details"] or {}).get("reason") == reason
    assert [each["status"] for each in body["output"]] == ["completed", item]
    assert [each["content"][0]["text"] for each in body["output"]] == ["Well now, hm.", "Yes, it is."]
    assert events[-1] == {"type": event, "response": body}
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"], body["usage"]["total_tokens"]) == (3, 9, 12)


def test_thoughts_that_were_cut_off_are_incomplete_and_counted() -> None:
    body, _ = _built(Finish.LENGTH, *SAID[:2])
    assert [each["status"] for each in body["output"]] == ["incomplete"]
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
    body, _ = _built(Finish.CANCELLED)
    assert (body["output"], body["usage"]["output_tokens_details"]["reasoning_tokens"]) == ([], 0)


def test_items_have_ids_of_their_kind_and_events_name_them() -> None:
    calls = (Call("f", '{"a": 1}'), Call("c", '{"input": "text"}'), Call("c", "no json", "own"))
    body, events = _built(Finish.STOP, *SAID, Part(calls=calls), Part(content="Done."))
    kinds = ["reasoning", "message", "function_call", "custom_tool_call", "custom_tool_call", "message"]
    assert [item["type"] for item in body["output"]] == kinds
    ids = [item["id"] for item in body["output"]]
    assert [each.split("_")[0] for each in ids] == ["rs", "msg", "fc", "ctc", "ctc", "msg"]
    assert len(set(ids)) == len(ids)
    assert [item["input"] for item in body["output"][3:5]] == ["text", "no json"]
    assert body["output"][4]["call_id"] == "own"
    assert body["output"][2]["call_id"].startswith("call_")
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for number, event in enumerate(events):
        known.validate_python({**event, "sequence_number": number}, strict=True)
        if "output_index" in event:
            named = event.get("item_id", event.get("item", {}).get("id"))
            assert named == ids[event["output_index"]], event["type"]


def test_text_of_a_custom_tool_is_shown_as_it_is_and_comes_back() -> None:
    text = 'Größe: "5"\n'
    arguments = earlier_call("c1", "c", text)["function"]["arguments"]
    assert "Größe" in arguments
    assert text_of_call(arguments) == text


def test_templates_see_of_a_tool_what_was_said_of_it() -> None:
    ask = ResponsesAsk.model_validate({"model": "m", "input": "x", "tools": [{**TOOLS[0], "description": None}]})
    assert ask.functions == [{"type": "function", "function": {"name": "f"}}]


def test_ollamas_clients_get_calls_without_objects_as_text() -> None:
    calls = (Call("f", '{"a": 1}'), Call("g", "a, b"), Call("h", "[1]"))
    assert _said(True, "Look.", "Hm.", calls)["message"] == {
        "role": "assistant",
        "content": "Look.\ng(a, b)\nh([1])",
        "thinking": "Hm.",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
    }
    assert _said(True, "", "", calls[1:])["message"] == {"role": "assistant", "content": "\ng(a, b)\nh([1])"}
