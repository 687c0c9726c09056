"""Requests of the Ollama API. What would change an answer and is not served is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ktcore.server.api.chat import Form
from ktcore.server.api.complaints import FIELD
from ktcore.server.api.fields import (
    OLLAMA_IDLE,
    OLLAMA_REFUSED,
    OPTIONS_IDLE,
    OPTIONS_REFUSED,
    Body,
    Refusals,
)
from ktcore.server.api.openai.messages import TEXT_ALONE
from ktcore.server.api.openai.schemas import MAX_LOGPROBS, Penalty, Seed, Stop
from ktcore.server.api.openai.tools import Tools

_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


class OllamaBody(Body):
    """A request of Ollama's, or an object in one: what is null is not there, as in Go."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_defaults(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class Options(OllamaBody):
    """Sampling, with Ollama's own defaults; `num_predict` below 0 is as long as the context allows."""

    idle: ClassVar[Mapping[str, str]] = OPTIONS_IDLE
    refused: ClassVar[Refusals] = OPTIONS_REFUSED

    num_predict: int | None = Field(None, ge=-2)
    temperature: float = Field(0.8, ge=0, le=100)
    top_k: int = Field(40, ge=-1, le=2**31)
    top_p: float = Field(0.9, ge=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repeat_penalty: float = Field(1.0, ge=0.01, le=100)
    repeat_last_n: int | None = Field(None, ge=-1)
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None

    typical_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    @model_validator(mode="after")
    def _penalties_are_over_the_whole_text(self) -> Options:
        if self.repeat_last_n == 0:  # over nothing
            self.repeat_penalty, self.presence_penalty, self.frequency_penalty = 1.0, None, None
        if (self.repeat_last_n or -1) > 0 and self.penalises:
            told = "bounds penalties, which are over the whole text here: -1 is that, and 0 turns them off"
            raise PydanticCustomError("refused", "{told}", {FIELD: "repeat_last_n", "told": told})
        return self

    @property
    def penalises(self) -> bool:
        """Whether what was said before has a say."""
        return self.repeat_penalty != 1 or bool(self.presence_penalty) or bool(self.frequency_penalty)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class KeptAsk(OllamaBody):
    """What all requests that need a model have in common."""

    model: str
    keep_alive: Annotated[str, Field(pattern=r"^-?(\d+(\.\d+)?(ms|s|m|h)?)+$", max_length=40)] | float | None = None

    @property
    def kept_s(self) -> float | None:
        """Seconds that the model stays loaded after this; None: for ever."""
        given = self.keep_alive
        if isinstance(given, str):
            parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", given)
            given = sum(float(n) * _SECONDS[unit or "s"] for n, unit in parts) * (-1 if given.startswith("-") else 1)
        return None if given is None or given < 0 else min(given, 1e8)


class OllamaAsk(KeptAsk):
    """What generate and chat have in common."""

    idle: ClassVar[Mapping[str, str]] = OLLAMA_IDLE
    refused: ClassVar[Refusals] = {**OLLAMA_REFUSED, "images": TEXT_ALONE}

    stream: bool = True
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None

    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def emptied(self) -> str:
        """Why an answer to nothing is done: it loaded the model, or unloads it."""
        return "unload" if self.kept_s == 0 else "load"

    @property
    def form(self) -> Form | None:
        """The form that the answer must have."""
        if not self.format:
            return None
        return Form("json", {"type": "object"} if self.format == "json" else self.format, "format")

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the chat template that `think` sets."""
        if self.think is None:
            return {}
        level = {"reasoning_effort": self.think} if isinstance(self.think, str) else {}
        return {"enable_thinking": bool(self.think), **level}

    @property
    def top(self) -> int | None:
        """How many likeliest tokens to tell at each place; None tells no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None


class GenerateAsk(OllamaAsk):
    """POST /api/generate."""

    prompt: str = ""
    system: str = ""
    raw: bool = False


class OllamaFunction(OllamaBody):
    """A function that a call names."""

    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict)


class OllamaCall(OllamaBody):
    """A call that the assistant made earlier."""

    function: OllamaFunction

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it, with arguments as text."""
        given = self.function.arguments
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        return {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class OllamaMessage(OllamaBody):
    """A turn of the conversation."""

    refused: ClassVar[Refusals] = {"images": TEXT_ALONE}

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        more: dict[str, Any] = {"reasoning_content": self.thinking, "name": self.tool_name}
        if self.tool_calls:
            more["tool_calls"] = [call.plain for call in self.tool_calls]
        kept = {key: value for key, value in more.items() if value is not None}
        return {"role": self.role, "content": self.content, **kept}


class OllamaChatAsk(OllamaAsk):
    """POST /api/chat."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: Tools | None = None


class ShowAsk(OllamaBody):
    """POST /api/show; `name` is the older word."""

    idle: ClassVar[Mapping[str, str]] = {"verbose": "longer lists, which are not told"}

    model: str = ""
    name: str = ""
