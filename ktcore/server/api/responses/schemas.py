"""Requests of OpenAI's Responses API, as far as it keeps nothing: each holds its whole conversation."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ktcore.errors import FieldError
from ktcore.server.api.chat import AUTO, Chat, Form
from ktcore.server.api.openai.messages import MAX_TOOLS, Name, TextPart

INPUT = "input"
"""The one argument of a custom tool, as the model sees it."""


class MessageItem(BaseModel):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": text_of(self.content)}


def text_of(content: str | list[TextPart]) -> str:
    """Text, or its parts as one."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class CallItem(BaseModel):
    """A call that the assistant made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": spelled(self.namespace, self.name), "arguments": self.arguments}
        call = {"id": self.call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}


class CustomCallItem(BaseModel):
    """A call of a custom tool that the assistant made earlier: its input is text."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "arguments": json.dumps({INPUT: self.input}, ensure_ascii=False)}
        call = {"id": self.call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}


class ResultItem(BaseModel):
    """What a call has given: a text, or a list of texts."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | list[TextPart]

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": text_of(self.output)}


class ReasoningItem(BaseModel):
    """Thoughts of an earlier turn, which are not repeated."""

    type: Literal["reasoning"]


class FunctionTool(BaseModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"type": "function", "function": self.model_dump(exclude_none=True, exclude={"type"})}


class CustomTool(BaseModel):
    """A tool that takes text: offered as a function with one argument, and called by the kind of its own."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: dict[str, Any] | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it; a grammar that the text should follow is told to the model, not enforced."""
        grammar = (self.format or {}).get("definition")
        told = "\n\n".join(filter(None, (self.description, grammar and f"The input follows this grammar:\n{grammar}")))
        properties = {INPUT: {"type": "string"}}
        parameters = {"type": "object", "properties": properties, "required": [INPUT], "additionalProperties": False}
        described = {"description": told} if told else {}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": parameters}}


class Namespace(BaseModel):
    """Functions under a common name."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]

    @property
    def plain(self) -> list[dict[str, Any]]:
        """As chat templates take them, each under both names."""
        made = [tool.plain["function"] for tool in self.tools]
        return [{"type": "function", "function": {**tool, "name": spelled(self.name, tool["name"])}} for tool in made]


class HostedTool(BaseModel):
    """A tool that OpenAI's servers run, or that its own models alone are trained for: this server cannot offer it."""

    type: Literal[
        "web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11", "file_search",
        "code_interpreter", "image_generation", "computer", "computer_use_preview", "mcp", "local_shell", "shell",
        "apply_patch", "tool_search",
    ]  # fmt: skip


AnyTool = Annotated[FunctionTool | CustomTool | Namespace | HostedTool, Field(discriminator="type")]


def spelled(namespace: str | None, name: str) -> str:
    """A function's name as the model sees it."""
    return f"{namespace}__{name}" if namespace else name


class NamedTool(BaseModel):
    """Demands a call of one tool."""

    type: Literal["function", "custom"]
    name: str


class Format(BaseModel):
    """The form of the text."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    made: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> Format:
        if self.type == "json_schema" and self.made is None:
            raise ValueError("schema is missing")
        return self

    @property
    def form(self) -> Form | None:
        """As the engine takes it."""
        if self.type == "text":
            return None
        return Form("json", {"type": "object"} if self.type == "json_object" else self.made, "text")


class TextSettings(BaseModel):
    """What the text is like."""

    format: Format | None = None


class Reasoning(BaseModel):
    """How much is thought before the answer."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


Item = MessageItem | CallItem | CustomCallItem | ResultItem | ReasoningItem


class ResponsesAsk(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None

    # what would need a memory of earlier requests, or is not supported
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    truncation: Literal["disabled"] | None = None

    @property
    def offered(self) -> list[FunctionTool | CustomTool | Namespace]:
        """Tools that the model is told of: those that run elsewhere are left out, of the answer's list too."""
        return [tool for tool in self.tools or () if not isinstance(tool, HostedTool)]

    @property
    def functions(self) -> list[dict[str, Any]]:
        """As chat templates take them.

        Raises:
            FieldError: two have one name.
        """
        made: list[dict[str, Any]] = []
        for tool in self.offered:
            made += tool.plain if isinstance(tool, Namespace) else [tool.plain]
        names = [tool["function"]["name"] for tool in made]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise FieldError("tools", f"two tools are named {twice!r}")
        return made

    def called(self, name: str) -> tuple[str | None, str, bool]:
        """(namespace, name, whether it is a custom tool) of the function that the model has called."""
        for tool in self.offered:
            if isinstance(tool, Namespace):
                found = next((each.name for each in tool.tools if spelled(tool.name, each.name) == name), None)
                if found is not None:
                    return tool.name, found, False
        return None, name, any(isinstance(tool, CustomTool) and tool.name == name for tool in self.offered)

    @property
    def chat(self) -> Chat:
        """What is asked, in no API's words."""
        said = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else _merged(self.input)
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        effort = self.reasoning.effort if self.reasoning else None
        choice = self.tool_choice
        return Chat(
            messages=[*system, *said],
            tools=self.functions,
            choice=choice.name if isinstance(choice, NamedTool) else choice or AUTO,
            several=self.parallel_tool_calls is not False,
            form=self.text.format.form if self.text and self.text.format else None,
            variables={} if effort is None else {"enable_thinking": effort != "none", "reasoning_effort": effort},
        )


def _merged(items: list[Item]) -> list[dict[str, Any]]:
    """Messages of the items; calls that follow each other, or the assistant's text, are one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, ReasoningItem):
            continue
        made = item.plain
        if isinstance(item, (CallItem, CustomCallItem)) and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(made["tool_calls"])
        else:
            messages.append(made)
    return messages
