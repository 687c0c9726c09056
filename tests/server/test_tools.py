"""Tools, thoughts and forms by the real openai and ollama clients, over a model that says what the test tells it to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("llguidance", reason="needs the extra `server`")
openai = pytest.importorskip("openai", reason="the SDK is what this tests")
ollama = pytest.importorskip("ollama", reason="the client is what this tests")

import ktcore  # noqa: E402
from ktcore.engine.service import Service  # noqa: E402
from ktcore.errors import FieldError  # noqa: E402
from ktcore.server.api.chat import Chat, Choice, _offered  # noqa: E402
from ktcore.server.api.openai.tools import CustomTool  # noqa: E402

from .test_clients import HELLO, Server, listening  # noqa: E402

Opened = Callable[..., ktcore.Model]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
def tools(opened: Opened) -> Iterator[Server]:
    with listening(opened("tools", context=4096)) as made:
        yield made


@pytest.fixture
def thinks(opened: Opened) -> Iterator[Server]:
    with listening(opened("thinks", context=4096)) as made:
        yield made


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({}, ["get_weather", "now"]),
        ({"allowed": ["now"]}, ["now"]),
        ({"allowed": []}, []),
        ({"choice": Choice.NONE}, []),
        ({"choice": Choice.REQUIRED, "allowed": ["get_weather"]}, ["get_weather"]),
    ],
)
def test_the_model_is_told_of_tools_that_it_may_call(more: dict[str, Any], names: list[str]) -> None:
    assert [tool["function"]["name"] for tool in _offered(Chat([], [WEATHER, NOW], **more))] == names


@pytest.mark.parametrize(
    ("chat", "field", "told"),
    [
        (Chat([], [NOW, WEATHER, NOW]), "tools", "two tools are named 'now'"),
        (Chat([], [NOW], allowed=["now", "then"]), "tool_choice", "there is no tool 'then'"),
    ],
)
def test_tools_of_one_name_and_names_of_no_tool_are_refused(chat: Chat, field: str, told: str) -> None:
    with pytest.raises(FieldError, match=told) as error:
        _offered(chat)
    assert error.value.param == field


def _says(service: Service, text: str) -> None:
    """Every answer is this text; forms and everything else after the sampler stay as they are."""
    ids = [*service.model.tokenizer.encode(text, add_special=False), 256]

    def sampler(row: Any, params: Any, seen: Any, generator: Any, prompt_len: int) -> int:
        return ids[len(seen) - prompt_len]

    object.__setattr__(service.model.engine.model, "sampler", sampler)


def _streamed(chunks: Any) -> tuple[str, str, list[dict[str, str]], str | None]:
    content, thoughts, finish = "", "", None
    calls: list[dict[str, str]] = []
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        thoughts += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls)
                calls.append({"name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments
        finish = choice.finish_reason or finish
    return content, thoughts, calls, finish


def test_calls_go_there_and_back_through_the_template(tools: Server) -> None:
    sdk = tools.sdk()
    _says(tools.service, f"I look.\n{CALL}\n{CALL.replace('Paris', 'Oslo')}")
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER, NOW]}
    (choice,) = sdk.chat.completions.create(**ask).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("get_weather", {"city": "Paris"}),
        ("get_weather", {"city": "Oslo"}),
    ]
    assert len({c.id for c in calls}) == 2
    content, _, streamed, finish = _streamed(sdk.chat.completions.create(**ask, stream=True))
    assert (content, finish) == ("I look.", "tool_calls")
    assert streamed == [{"name": c.function.name, "arguments": c.function.arguments} for c in calls]
    results = [{"role": "tool", "tool_call_id": c.id, "content": "sunny <|end|>"} for c in calls]
    _says(tools.service, "It is sunny.")
    again = sdk.chat.completions.create(**{**ask, "messages": [*HELLO, choice.message, *results]})
    assert again.choices[0].message.content == "It is sunny."
    tokenizer = tools.service.model.tokenizer
    said = {"role": "assistant", "content": "I look.", "tool_calls": [c.model_dump() for c in calls]}
    for call in said["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    expected = tokenizer.encode_chat([*HELLO, said, *results], tools=[WEATHER, NOW])
    assert again.usage.prompt_tokens == len(expected)


def test_one_call_where_one_is_wanted(tools: Server) -> None:
    _says(tools.service, f"{CALL}\n{CALL.replace('Paris', 'Oslo')}")
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "parallel_tool_calls": False}
    (call,) = tools.sdk().chat.completions.create(**ask).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert len(_streamed(tools.sdk().chat.completions.create(**ask, stream=True))[2]) == 1


def test_without_tools_or_with_none_calls_are_text(tools: Server) -> None:
    _says(tools.service, CALL)
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        (choice,) = tools.sdk().chat.completions.create(model="tiny", messages=HELLO, **more).choices
        assert (choice.message.content, choice.finish_reason) == (CALL, "stop")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_random_model_calls_a_tool_when_it_must(tools: Server, choice: Any, stream: bool) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "seed": 5}
    ask |= {"max_tokens": 200, "parallel_tool_calls": False, "temperature": 1}
    done = tools.sdk().chat.completions.create(**ask, stream=stream)
    if stream:
        content, _, calls, finish = _streamed(done)
    else:
        message, finish = done.choices[0].message, done.choices[0].finish_reason
        content = message.content or ""
        calls = [{"name": c.function.name, "arguments": c.function.arguments} for c in message.tool_calls]
    assert (content, finish) == ("", "tool_calls")
    ((name, arguments),) = [(c["name"], json.loads(c["arguments"])) for c in calls]
    assert name == "get_weather"
    assert arguments["city"] in ("Paris", "Oslo")
    assert arguments.get("days", 0) <= 9


@pytest.mark.parametrize("name", ["auto", "none", "required"])
def test_a_chosen_tool_may_have_the_name_of_a_mode(tools: Server, name: str) -> None:
    made = {**WEATHER["function"], "name": name}
    ask: dict[str, Any] = {"model": "tiny", "temperature": 1}
    chat = tools.sdk().chat.completions.create(
        **ask,
        messages=HELLO,
        tools=[{"type": "function", "function": made}, NOW],
        tool_choice={"type": "function", "function": {"name": name}},
        max_tokens=200,
    )
    assert [call.function.name for call in chat.choices[0].message.tool_calls] == [name]
    told = tools.sdk().responses.create(
        **ask,
        input="Hello",
        tools=[{"type": "function", **made}, {"type": "function", **NOW["function"], "parameters": {}}],
        tool_choice={"type": "function", "name": name},
        max_output_tokens=200,
    )
    assert [item.name for item in told.output] == [name]


def test_thoughts_come_apart_and_need_not(thinks: Server) -> None:
    sdk = thinks.sdk()
    _says(thinks.service, f"<think>\nHm.\n</think>\n\nYes.\n{CALL}")
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER]}
    message = sdk.chat.completions.create(**ask).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
    assert message.tool_calls[0].function.name == "get_weather"
    content, thoughts, calls, _ = _streamed(sdk.chat.completions.create(**ask, stream=True))
    assert (content, thoughts, len(calls)) == ("Yes.", "Hm.", 1)
    plain = (
        sdk.chat.completions.create(model="tiny", messages=HELLO, extra_body={"separate_reasoning": False})
        .choices[0]
        .message
    )
    assert plain.content == f"<think>\nHm.\n</think>\n\nYes.\n{CALL}"
    assert not hasattr(plain, "reasoning_content")


def test_forms_leave_thoughts_free(thinks: Server) -> None:
    text = '<think>\nWhat "ok"? {\n</think>\n\n{"ok": true, "kind": "b"}'
    _says(thinks.service, text)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    message = (
        thinks.sdk().chat.completions.create(model="tiny", messages=HELLO, response_format=form).choices[0].message
    )
    assert json.loads(message.content) == {"ok": True, "kind": "b"}
    assert message.reasoning_content == 'What "ok"? {'


@pytest.mark.parametrize("stream", [True, False])
def test_a_random_model_keeps_to_a_schema(server_dense: Server, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "response_format": form, "max_tokens": 200, "seed": 1}
    done = server_dense.sdk().chat.completions.create(**ask, stream=stream)
    content = _streamed(done)[0] if stream else done.choices[0].message.content
    found = json.loads(content)
    assert isinstance(found["ok"], bool)
    assert found["kind"] in ("a", "b")


@pytest.fixture
def server_dense(opened: Opened) -> Iterator[Server]:
    with listening(opened("dense", context=4096)) as made:
        yield made


def test_guided_fields_and_their_errors(server_dense: Server) -> None:
    sdk = server_dense.sdk()

    def said(**fields: Any) -> str:
        made = sdk.completions.create(model="tiny", prompt="x", max_tokens=500, seed=1, extra_body=fields)
        text: str = made.choices[0].text
        return text

    assert said(guided_choice=["yes, sir", "no/never"]) in ("yes, sir", "no/never")
    assert len(said(guided_regex="[a-f]{7}")) == 7
    assert said(guided_grammar='root ::= "a" ("b" | "c") "d"') in ("abd", "acd")
    assert set(json.loads(said(guided_json=SCHEMA))) == {"ok", "kind"}
    many = sdk.completions.create(
        model="tiny", prompt=["x", "y"], n=2, max_tokens=60, extra_body={"guided_regex": "[0-9]{3}"}
    )
    assert all(len(c.text) == 3 and c.text.isdigit() and c.finish_reason == "stop" for c in many.choices)
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as error:
        said(guided_json={"type": "array", "uniqueItems": True})
    assert error.value.body["param"] == "guided_json"


def test_the_ollama_client_calls_thinks_and_keeps_to_schemas(thinks: Server) -> None:
    client = ollama.Client(host=thinks.url, headers={"Authorization": "Bearer right"})
    assert {"tools", "thinking"} <= set(client.show("tiny").capabilities)
    _says(thinks.service, f"<think>\nHm.\n</think>\n\n{CALL}")
    message = client.chat("tiny", HELLO, tools=[WEATHER], think=True).message
    assert message.thinking == "Hm."
    assert message.tool_calls[0].function.arguments == {"city": "Paris"}
    pieces = [p.message for p in client.chat("tiny", HELLO, tools=[WEATHER], stream=True)]
    assert "".join(p.thinking or "" for p in pieces) == "Hm."
    assert [c.function.name for p in pieces for c in p.tool_calls or []] == ["get_weather"]
    _says(thinks.service, "Sunny.")
    result = {"role": "tool", "tool_name": "get_weather", "content": "sunny"}
    assert client.chat("tiny", [*HELLO, message, result], tools=[WEATHER]).message.content == "Sunny."
    _says(thinks.service, '{"ok": false, "kind": "a"}')
    assert json.loads(client.chat("tiny", HELLO, format=SCHEMA, think=False).message.content)["kind"] == "a"
    assert json.loads(client.generate("tiny", "Hello", format="json").response) == {"ok": False, "kind": "a"}
    with pytest.raises(ollama.ResponseError, match="bogus"):
        client.chat("tiny", HELLO, format={"type": "bogus"})


FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def test_a_form_beside_tools_binds_the_message_and_a_call_stays_possible(tools: Server) -> None:
    sdk = tools.sdk()
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "response_format": FORM}
    flat = {"type": "function", **WEATHER["function"]}
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    client = ollama.Client(host=tools.url, headers={"Authorization": "Bearer right"})
    _says(tools.service, CALL)
    (call,) = sdk.chat.completions.create(**ask).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert len(_streamed(sdk.chat.completions.create(**ask, stream=True))[2]) == 1
    (item,) = sdk.responses.create(model="tiny", input="x", tools=[flat], text=text).output
    assert item.type == "function_call"
    assert client.chat("tiny", HELLO, tools=[WEATHER], format=SCHEMA).message.tool_calls
    _says(tools.service, '{"ok": true, "kind": "b"}')
    said = sdk.chat.completions.create(**ask).choices[0].message.content
    assert json.loads(said)["kind"] == "b"
    _says(tools.service, "Words that are neither.")
    with pytest.raises(openai.BadRequestError, match="form"):
        sdk.chat.completions.create(**ask)


def test_arguments_that_are_no_object_come_back_as_they_are(tools: Server) -> None:
    _says(tools.service, "Again.")
    for arguments in ('{"city": "he said "hi""}', "[1]", "words"):
        call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        told = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "no"}]
        ask: dict[str, Any] = {"model": "tiny", "messages": [*HELLO, *told], "tools": [WEATHER]}
        assert tools.sdk().chat.completions.create(**ask).choices[0].message.content == "Again."
        items = [{"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": arguments}]
        assert tools.sdk().responses.create(model="tiny", input=items).output_text == "Again."


def test_advice_that_no_request_can_follow_is_not_given(tools: Server) -> None:
    form = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    with pytest.raises(openai.BadRequestError, match="anyOf") as error:
        tools.sdk().chat.completions.create(model="tiny", messages=HELLO, extra_body={"guided_json": form})
    assert "coerce_one_of" not in str(error.value)


PATCH = {"type": "custom", "custom": {"name": "apply_patch", "description": "Patches files."}}
PATCHES = '<tool_call>\n{"name": "apply_patch", "arguments": {"input": "*** Begin\\n"}}\n</tool_call>'


def test_custom_tools_are_called_with_text_whole_and_streamed_and_come_back(tools: Server) -> None:
    sdk = tools.sdk()
    _says(tools.service, PATCHES)
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER, PATCH]}
    message = sdk.chat.completions.create(**ask).choices[0].message
    (call,) = message.tool_calls
    assert (call.type, call.custom.name, call.custom.input) == ("custom", "apply_patch", "*** Begin\n")
    pieces = [chunk.choices[0].delta for chunk in sdk.chat.completions.create(**ask, stream=True)]
    streamed = [made for piece in pieces for made in piece.tool_calls or []]
    assert [made.index for made in streamed] == [0, 0]
    assert streamed[0].type == "custom"
    assert "".join(made.custom["input"] for made in streamed) == "*** Begin\n"
    _says(tools.service, "Done.")
    result = {"role": "tool", "tool_call_id": call.id, "content": "ok"}
    again = sdk.chat.completions.create(**{**ask, "messages": [*HELLO, message, result]})
    assert again.choices[0].message.content == "Done."
    function = {"name": "apply_patch", "arguments": {"input": "*** Begin\n"}}
    said = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    parameters = {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
        "additionalProperties": False,
    }
    offered = {"name": "apply_patch", "description": "Patches files.", "parameters": parameters}
    expected = tools.service.model.tokenizer.encode_chat(
        [*HELLO, said, result], tools=[WEATHER, {"type": "function", "function": offered}]
    )
    assert again.usage.prompt_tokens == len(expected)
    _says(tools.service, PATCHES)
    forced = {"type": "custom", "custom": {"name": "apply_patch"}}
    (made,) = sdk.chat.completions.create(**ask, tool_choice=forced).choices[0].message.tool_calls
    assert made.custom.input == "*** Begin\n"


def test_a_custom_tools_grammar_is_told_to_the_model() -> None:
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /x+/"}}
    made = CustomTool.model_validate({"type": "custom", "custom": {"name": "c", "format": grammar}}).plain
    assert made["function"]["description"] == "The input follows this grammar:\nstart: /x+/"
    plain = CustomTool.model_validate({"type": "custom", "custom": {"name": "c", "format": {"type": "text"}}}).plain
    assert "description" not in plain["function"]


def test_allowed_tools_are_those_that_are_offered(tools: Server) -> None:
    sdk = tools.sdk()
    named = {"type": "function", "function": {"name": "get_weather"}}

    def allowed(mode: str, *kept: Any) -> dict[str, Any]:
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(kept)}}

    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER, NOW], "max_tokens": 200}
    alone = sdk.chat.completions.create(**{**ask, "tools": [WEATHER]}, temperature=0)
    some = sdk.chat.completions.create(**ask, tool_choice=allowed("auto", named), temperature=0)
    assert some.usage.prompt_tokens == alone.usage.prompt_tokens
    for seed in range(3):
        must = sdk.chat.completions.create(**ask, tool_choice=allowed("required", named), seed=seed)
        assert {call.function.name for call in must.choices[0].message.tool_calls} == {"get_weather"}
    listed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    flat = [{"type": "function", **tool["function"]} for tool in (WEATHER, NOW)]
    found = sdk.responses.create(model="tiny", input="x", tools=flat, tool_choice=listed, max_output_tokens=200)
    assert {item.name for item in found.output if item.type == "function_call"} == {"get_weather"}
    for wrong in (allowed("auto", {"type": "function", "function": {"name": "other"}}), {"type": "allowed_tools"}):
        with pytest.raises(openai.BadRequestError):
            sdk.chat.completions.create(**ask, tool_choice=wrong)
    with pytest.raises(openai.BadRequestError, match="two tools are named 'now'"):
        sdk.chat.completions.create(**{**ask, "tools": [NOW, NOW]})
