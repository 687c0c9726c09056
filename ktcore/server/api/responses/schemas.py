"""Requests of OpenAI's Responses API, as far as it keeps nothing: each holds its whole conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ktcore.server.api.chat import AUTO, Chat, Form
from ktcore.server.api.openai.messages import MAX_TOOLS, Name, TextPart


class MessageItem(BaseModel):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class CallItem(BaseModel):
    """A call that the assistant made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": self.call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}


class ResultItem(BaseModel):
    """What a call has given."""

    type: Literal["function_call_output"]
    call_id: str
    output: str

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}


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


class NamedTool(BaseModel):
    """Demands a call of one function."""

    type: Literal["function"]
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


Item = MessageItem | CallItem | ResultItem | ReasoningItem


class ResponsesAsk(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
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
    def chat(self) -> Chat:
        """What is asked, in no API's words."""
        said = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else _merged(self.input)
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        effort = self.reasoning.effort if self.reasoning else None
        choice = self.tool_choice
        return Chat(
            messages=[*system, *said],
            tools=[tool.plain for tool in self.tools or ()],
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
        if isinstance(item, CallItem) and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(made["tool_calls"])
        else:
            messages.append(made)
    return messages
