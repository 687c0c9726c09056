"""Messages, tools and forms of answers in the OpenAI API's chats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ktcore.server.api.chat import AUTO, Form

MAX_TOOLS = 128

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextPart(BaseModel):
    """Text inside of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(BaseModel):
    """A function that a call names; its arguments are JSON as text."""

    name: str
    arguments: str = "{}"


class MessageCall(BaseModel):
    """A call that the assistant made earlier."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """A turn of the conversation; `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _holds_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.reasoning_content)):
            raise ValueError("a message needs content")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        more: dict[str, Any] = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
            "tool_calls": [call.model_dump() for call in self.tool_calls] if self.tool_calls else None,
        }
        return {"role": role, "content": content, **{key: value for key, value in more.items() if value is not None}}


class Function(BaseModel):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool: functions are the one kind."""

    type: Literal["function"]
    function: Function

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class NamedFunction(BaseModel):
    """The function that must be called."""

    name: str


class NamedChoice(BaseModel):
    """Demands a call of one tool."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["auto", "none", "required"] | NamedChoice
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def choice_of(choice: ToolChoice | None) -> str:
    """The name of a tool, or one of auto, none and required."""
    return choice.function.name if isinstance(choice, NamedChoice) else choice or AUTO


class NamedSchema(BaseModel):
    """A JSON schema with a name."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = ""
    made: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """Free text, any JSON object, or JSON of a schema, which is enforced whether `strict` or not."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self

    @property
    def form(self) -> Form | None:
        """As the engine takes it."""
        if self.type == "json_object":
            return Form("json", {"type": "object"}, "response_format")
        if self.json_schema is not None and self.type == "json_schema":
            return Form("json", self.json_schema.made, "response_format")
        return None
