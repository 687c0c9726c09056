"""The Responses API by the real openai client, whole and as events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("llguidance", reason="needs the extra `server`")
openai = pytest.importorskip("openai", reason="the SDK is what this tests")

import ktcore  # noqa: E402
from ktcore.errors import LogitsError  # noqa: E402

from .test_clients import Server, listening  # noqa: E402
from .test_tools import CALL, SCHEMA, WEATHER, _says  # noqa: E402

TOOL = {"type": "function", **WEATHER["function"]}


@pytest.fixture
def server(opened: Callable[..., ktcore.Model]) -> Iterator[Server]:
    with listening(opened("thinks", context=2048)) as made:
        yield made


def test_text_and_instructions_as_a_chat_has_them(server: Server) -> None:
    sdk = server.sdk()
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
    found = sdk.responses.create(**ask, input="Hello", instructions="Be kind.")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    chat = sdk.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    assert found.output_text == chat.choices[0].message.content
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    assert (found.usage.input_tokens, found.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    parts = [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]
    items = [{"role": "developer", "content": "Be kind."}, {"type": "message", "role": "user", "content": parts}]
    assert sdk.responses.create(**ask, input=items).output_text == found.output_text


def test_events_tell_how_thoughts_text_and_calls_grow(server: Server) -> None:
    sdk = server.sdk()
    _says(server.service, f"<think>\nHm, hm.\n</think>\n\nI look.\n{CALL}")
    ask: dict[str, Any] = {"model": "tiny", "input": "Weather?", "tools": [TOOL]}
    whole = sdk.responses.create(**ask)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert (whole.output[0].content[0].text, whole.output_text) == ("Hm, hm.", "I look.")
    assert json.loads(whole.output[2].arguments) == {"city": "Paris"}
    assert whole.status == "completed"
    events = list(sdk.responses.create(**ask, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [events[0].type, events[1].type, events[-1].type] == [
        *("response.created", "response.in_progress", "response.completed")
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "I look."
    assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "Hm, hm."
    last = events[-1].response
    assert [i.type for i in last.output] == [i.type for i in whole.output]
    done = [e for e in events if e.type == "response.output_item.done"]
    assert [e.output_index for e in done] == [0, 1, 2]
    assert [e.item.model_dump() for e in done] == [i.model_dump() for i in last.output]
    # the SDK's own accumulation of events
    with sdk.responses.stream(**ask) as stream:
        assert stream.get_final_response().output_text == "I look."


def test_results_of_calls_go_back(server: Server) -> None:
    sdk = server.sdk()
    _says(server.service, CALL)
    first = sdk.responses.create(model="tiny", input="Weather?", tools=[TOOL])
    call = first.output[0]
    _says(server.service, "Sunny.")
    items = [{"role": "user", "content": "Weather?"}, call]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    again = sdk.responses.create(model="tiny", input=items, tools=[TOOL])
    assert again.output_text == "Sunny."
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    expected = server.service.model.tokenizer.encode_chat(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": "sunny"},
        ],
        tools=[WEATHER],
    )
    assert again.usage.input_tokens == len(expected)


def test_forms_and_what_is_refused(server: Server) -> None:
    sdk = server.sdk()
    _says(server.service, '{"ok": true, "kind": "a"}')
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    assert json.loads(sdk.responses.create(model="tiny", input="x", text=form).output_text)["kind"] == "a"
    wrong: list[dict[str, Any]] = [
        {"previous_response_id": "resp_1"},
        {"input": []},
        {"input": [{"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "bogus"}}}},
        {"tool_choice": "required"},
        {"max_output_tokens": 0},
        {"background": True},
    ]
    for fields in wrong:
        with pytest.raises(openai.BadRequestError):
            sdk.responses.create(**{"model": "tiny", "input": "x", **fields})


def test_tools_of_other_kinds_and_results_as_lists(server: Server) -> None:
    sdk = server.sdk()
    patch = {"type": "custom", "name": "apply_patch", "description": "d", "format": {"type": "text"}}
    tools: list[Any] = [TOOL, {"type": "web_search"}, patch, {"type": "namespace", "name": "files", "tools": [TOOL]}]
    wrote = '<tool_call>{"name": "apply_patch", "arguments": {"input": "*** Begin\\n"}}</tool_call>'
    _says(server.service, wrote + CALL.replace("get_weather", "files__get_weather"))
    found = sdk.responses.create(model="tiny", input="x", tools=tools)
    custom, named = found.output
    assert (custom.type, custom.name, custom.input) == ("custom_tool_call", "apply_patch", "*** Begin\n")
    assert (named.name, named.namespace) == ("get_weather", "files")
    # what runs elsewhere is not offered, and the answer says so
    assert [tool.type for tool in found.tools] == ["function", "custom", "namespace"]
    events = [e.type for e in sdk.responses.create(model="tiny", input="x", tools=tools, stream=True)]
    assert "response.custom_tool_call_input.done" in events
    _says(server.service, "Done.")
    listed = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    results = [
        {"type": "custom_tool_call_output", "call_id": custom.call_id, "output": "ok"},
        {"type": "function_call_output", "call_id": named.call_id, "output": listed},
    ]
    told = [{"role": "user", "content": "x"}, custom.model_dump(), named.model_dump(), *results]
    assert sdk.responses.create(model="tiny", input=told, tools=tools).output_text == "Done."
    for wrong in ([{"type": "fucntion", "name": "f"}], [TOOL, TOOL]):
        with pytest.raises(openai.BadRequestError):
            sdk.responses.create(model="tiny", input="x", tools=wrong)


def test_tokens_of_thoughts_are_counted(server: Server) -> None:
    _says(server.service, "<think>\nHm, hm.\n</think>\n\nYes.")
    assert server.sdk().responses.create(model="tiny", input="x").usage.output_tokens_details.reasoning_tokens == 7
    _says(server.service, "Yes.")
    assert server.sdk().responses.create(model="tiny", input="x").usage.output_tokens_details.reasoning_tokens == 0


def test_a_stream_that_fails_ends_with_the_response_as_far_as_it_came(server: Server) -> None:
    import httpx
    from openai.types.responses import ResponseErrorEvent, ResponseFailedEvent

    model = server.service.model
    ids = model.tokenizer.encode("<think>\nHm.\n</think>\n\nOn and on.", add_special=False)

    def sampler(row: Any, params: Any, seen: Any, generator: Any, prompt_len: int) -> int:
        if len(seen) - prompt_len == len(ids):
            raise LogitsError("no numbers")
        return ids[len(seen) - prompt_len]

    object.__setattr__(model.engine.model, "sampler", sampler)
    ask = {"model": "tiny", "input": "Say much.", "stream": True}
    told = httpx.post(f"{server.url}/v1/responses", json=ask, headers={"Authorization": "Bearer right"}).text
    *_, error, failed = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: ")]
    ResponseErrorEvent.model_validate(error, strict=True)
    ended = ResponseFailedEvent.model_validate(failed, strict=True).response
    assert (error["type"], error["code"], error["message"]) == ("error", "not_numbers", "no numbers")
    assert failed["sequence_number"] == error["sequence_number"] + 1
    assert (ended.status, ended.error.code, ended.error.message) == ("failed", "server_error", "no numbers")
    assert [item.status for item in ended.output] == ["completed", "incomplete"]
    assert ended.output_text.startswith("On and")  # the last letters may wait for what follows
