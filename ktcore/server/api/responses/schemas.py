"""Requests of OpenAI's Responses API, as far as it keeps nothing: each holds its whole conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from ktcore.server.api.chat import Chat, Choice, Form
from ktcore.server.api.complaints import UNKNOWN_KIND
from ktcore.server.api.custom_tools import earlier_call, offered
from ktcore.server.api.fields import IDLE, REFUSED, Body, Refusals, Refused
from ktcore.server.api.openai.messages import TextPart, text_of
from ktcore.server.api.openai.schemas import Effort, Verbosity
from ktcore.server.api.openai.tools import MAX_TOOLS, Name


class MessageItem(Body):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": text_of(self.content)}


class CallItem(Body):
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


class CustomCallItem(Body):
    """A call of a custom tool that the assistant made earlier: its input is text."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        call = earlier_call(self.call_id, self.name, self.input)
        return {"role": "assistant", "content": None, "tool_calls": [call]}


class ResultItem(Body):
    """What a call has given: a text, or a list of texts."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | list[TextPart]

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": text_of(self.output)}


class ReasoningItem(Body):
    """Thoughts of an earlier turn, which are not repeated."""

    type: Literal["reasoning"]


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"type": "function", "function": self.model_dump(exclude_none=True, exclude={"type"})}


class CustomTool(Body):
    """A tool that takes text: offered as a function with one argument, and called by the kind of its own."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: dict[str, Any] | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it; a grammar that the text should follow is told to the model, not enforced."""
        return offered(self.name, self.description, (self.format or {}).get("definition"))


class Namespace(Body):
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


class HostedTool(Body):
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


class NamedTool(Body):
    """Demands a call of one tool."""

    type: Literal["function", "custom"]
    name: str


class AllowedTools(Body):
    """Leaves some of the tools, of which one may (auto) or must (required) be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class Format(Body):
    """The form of the text."""

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


class TextSettings(Body):
    """What the text is like; the template is told of `verbosity`."""

    format: Format | None = None
    verbosity: Verbosity | None = None


class Reasoning(Body):
    """How much is thought before the answer. Thoughts are told whole, so that there is nothing to summarise."""

    idle: ClassVar[Mapping[str, str]] = dict.fromkeys(("summary", "generate_summary"), "thoughts are told whole")
    refused: ClassVar[Refusals] = {"context": Refused((None, "auto")), "mode": Refused((None, "standard"))}

    effort: Effort | None = None


class StreamOptions(Body):
    """What a stream tells besides the answer."""

    idle: ClassVar[Mapping[str, str]] = {"include_obfuscation": "noise against listeners, which no answer needs"}
    refused: ClassVar[Refusals] = dict.fromkeys(
        ("include_usage", "continuous_usage_stats"), Refused(instead="a response ends with its usage")
    )


def _kind(item: Any) -> Any:
    return (item.get("type") or "message") if isinstance(item, Mapping) else getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ResultItem, Tag("custom_tool_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type=UNKNOWN_KIND,
        custom_error_message="should be 'message', 'function_call', 'function_call_output', 'custom_tool_call', "
        "'custom_tool_call_output' or 'reasoning'",
    ),
]
# What could be told besides of tools that are not offered, of media, and of thoughts, which are not encrypted here.
Included = Literal[
    "reasoning.encrypted_content", "web_search_call.action.sources", "web_search_call.results",
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url",
]  # fmt: skip
_KEPT = Refused(instead="nothing is kept: send the whole conversation")


class ResponsesAsk(Body):
    """POST /v1/responses."""

    idle: ClassVar[Mapping[str, str]] = IDLE
    refused: ClassVar[Refusals] = {
        **REFUSED,
        "previous_response_id": _KEPT,
        "conversation": _KEPT,
        "background": _KEPT,
        "truncation": Refused((None, "disabled"), "too long prompts are refused"),
    }

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Literal["auto", "none", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")] | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[Included] | None = None
    metadata: dict[str, Any] | None = None
    user: Annotated[str, StringConstraints(max_length=1000)] | None = None
    timeout: float | None = Field(None, gt=0, le=1e6)

    @property
    def offered(self) -> list[FunctionTool | CustomTool | Namespace]:
        """Tools that the model is told of: those that run elsewhere are left out, of the answer's list too."""
        return [tool for tool in self.tools or () if not isinstance(tool, HostedTool)]

    @property
    def functions(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        made: list[dict[str, Any]] = []
        for tool in self.offered:
            made += tool.plain if isinstance(tool, Namespace) else [tool.plain]
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
        variables: dict[str, Any] = {}
        if effort is not None:
            variables = {"enable_thinking": effort != "none", "reasoning_effort": effort}
        if self.text is not None and self.text.verbosity is not None:
            variables["verbosity"] = self.text.verbosity
        return Chat(
            messages=[*system, *said],
            tools=self.functions,
            choice=_choice(choice),
            allowed=[tool.name for tool in choice.tools] if isinstance(choice, AllowedTools) else None,
            several=self.parallel_tool_calls is not False,
            form=self.text.format.form if self.text and self.text.format else None,
            variables=variables,
        )


def _choice(choice: str | NamedTool | AllowedTools | None) -> Choice | str:
    if isinstance(choice, NamedTool):
        return choice.name
    return Choice(choice.mode if isinstance(choice, AllowedTools) else choice or "auto")


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
