"""Messages of the OpenAI API's chats, and the parts of their texts, which other APIs have too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from ktcore.server.api.complaints import FIELD
from ktcore.server.api.custom_tools import earlier_call
from ktcore.server.api.fields import Body, Refusals, Refused

_MEDIA: Mapping[str, str] = {
    **dict.fromkeys(("image_url", "input_image", "image"), "an image"),
    **dict.fromkeys(("input_audio", "audio_url", "audio"), "audio"),
    **dict.fromkeys(("video_url", "input_video", "video"), "a video"),
    **dict.fromkeys(("file", "input_file"), "a file"),
}
TEXT_ALONE = Refused(instead="this model takes text alone")


class TextPart(Body):
    """Text inside of a message, a refusal that the assistant has given among it."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kind = given.get("type")
        if isinstance(kind, str) and kind in _MEDIA:
            raise PydanticCustomError("media", "is {what}, and this model takes text alone", {"what": _MEDIA[kind]})
        return {"text": given["refusal"], **given} if kind == "refusal" and "refusal" in given else given


def text_of(content: str | list[TextPart]) -> str:
    """Text, or its parts as one."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class CalledFunction(Body):
    """A function that a call names; its arguments are JSON as text."""

    name: str
    arguments: str = "{}"


class CalledCustom(Body):
    """A custom tool that a call names, and the text that it gives."""

    name: str
    input: str


class MessageCall(Body):
    """A call that the assistant made earlier."""

    id: str = ""
    type: Literal["function", "custom"] = "function"
    function: CalledFunction | None = None
    custom: CalledCustom | None = None

    @model_validator(mode="after")
    def _names_its_tool(self) -> MessageCall:
        if (self.function if self.type == "function" else self.custom) is None:
            raise PydanticCustomError("missing_kind", "is missing", {FIELD: self.type})
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        if self.type == "custom" and self.custom is not None:
            return earlier_call(self.id, self.custom.name, self.custom.input)
        assert self.function is not None
        return {"id": self.id, "type": "function", "function": self.function.model_dump()}


class ChatMessage(Body):
    """A turn of the conversation; `developer` is another word for `system`, `reasoning` for `reasoning_content`."""

    refused: ClassVar[Refusals] = {
        "audio": TEXT_ALONE,
        "images": TEXT_ALONE,
        "function_call": Refused(instead="calls are in tool_calls"),
        "prefix": Refused(),
        "partial": Refused(),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    refusal: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _holds_something(self) -> ChatMessage:
        said = self.tool_calls or self.reasoning_content or self.reasoning or self.refusal
        if self.content is None and not (self.role == "assistant" and said):
            raise PydanticCustomError("no_content", "is missing", {FIELD: "content"})
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.refusal if self.content is None else text_of(self.content)
        role = "system" if self.role == "developer" else self.role
        more: dict[str, Any] = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning if self.reasoning_content is None else self.reasoning_content,
            "tool_calls": [call.plain for call in self.tool_calls] if self.tool_calls else None,
        }
        return {"role": role, "content": content, **{key: value for key, value in more.items() if value is not None}}
