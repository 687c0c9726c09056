"""Requests of the OpenAI API. What would change an answer and is not served is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from ktcore.engine.draft.asked import MOST
from ktcore.engine.output import Output
from ktcore.errors import FieldError
from ktcore.server.api.chat import Chat
from ktcore.server.api.fields import IDLE, REFUSED, Body, Refusals, Refused
from ktcore.server.api.openai.forms import Forms
from ktcore.server.api.openai.messages import ChatMessage
from ktcore.server.api.openai.tools import AnyTools, CustomTool, ToolChoice, allowed_by, choice_of

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_LOGPROBS = 20

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]


class StreamOptions(Body):
    """What a stream tells besides the text."""

    idle: ClassVar[Mapping[str, str]] = {"include_obfuscation": "noise against listeners, which no answer needs"}
    refused: ClassVar[Refusals] = {"continuous_usage_stats": Refused()}

    include_usage: bool | None = None


class Ask(Forms):
    """What chats and completions have in common."""

    idle: ClassVar[Mapping[str, str]] = IDLE
    refused: ClassVar[Refusals] = REFUSED

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    typical_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Id, Bias], Field(max_length=1024)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    prompt_lookup: int | None = Field(None, ge=0, le=64)
    draft: int | None = Field(None, ge=0, le=MOST)
    user: Annotated[str, StringConstraints(max_length=1000)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: float | None = Field(None, gt=0, le=1e6)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with its counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def output(self) -> Output:
        """What is wanted besides text, and what ends it."""
        return Output(
            frozenset(self.stop_token_ids or ()),
            bool(self.ignore_eos),
            self.top,
            prompt_lookup=self.prompt_lookup,
            draft=self.draft,
        )

    @property
    def top(self) -> int | None:
        """How many likeliest tokens to tell at each place; None tells no logprobs."""
        return None


class ChatAsk(Ask):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None

    tools: AnyTools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    verbosity: Verbosity | None = None
    separate_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def custom(self) -> frozenset[str]:
        """Names of the tools that take text."""
        return frozenset(tool.name for tool in self.tools or () if isinstance(tool, CustomTool))

    @property
    def chat(self) -> Chat:
        """What is asked, in no API's words."""
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            thinks = {"enable_thinking": self.reasoning_effort != "none", "reasoning_effort": self.reasoning_effort}
            variables = {**thinks, **variables}
        if self.verbosity is not None:
            variables = {"verbosity": self.verbosity, **variables}
        return Chat(
            messages=[message.plain for message in self.messages],
            tools=[tool.plain for tool in self.tools or ()],
            choice=choice_of(self.tool_choice),
            allowed=allowed_by(self.tool_choice),
            several=self.parallel_tool_calls is not False,
            form=self.form,
            separate=self.separate_reasoning is not False,
            variables=variables,
        )

    @property
    def top(self) -> int | None:
        """How many likeliest tokens to tell at each place; None tells no logprobs.

        Raises:
            FieldError: a number is given, and logprobs are not asked for.
        """
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "needs logprobs to be true")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionAsk(Ask):
    """POST /v1/completions; prompts are texts or token ids."""

    refused: ClassVar[Refusals] = {**REFUSED, "add_special_tokens": Refused((None, True))}

    prompt: (
        str
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )

    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def top(self) -> int | None:
        """How many likeliest tokens to tell at each place; None tells no logprobs."""
        return self.logprobs
