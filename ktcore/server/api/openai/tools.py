"""Tools that a chat offers, functions and custom ones, and which of them may or must be called."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from ktcore.server.api.chat import Choice
from ktcore.server.api.custom_tools import offered
from ktcore.server.api.fields import Body

MAX_TOOLS = 128

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Body):
    """A function that the model may call; its arguments follow the schema, whether `strict` or not."""

    idle: ClassVar[dict[str, str]] = {"strict": "arguments of forced calls follow the schema anyway"}

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A function."""

    type: Literal["function"]
    function: Function

    @property
    def name(self) -> str:
        """As calls name it."""
        return self.function.name

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class TextGrammar(Body):
    """A grammar, in whichever syntax: the model reads it."""

    definition: str


class CustomFormat(Body):
    """What a custom tool's text is like."""

    type: Literal["text", "grammar"]
    grammar: TextGrammar | None = None


class Custom(Body):
    """A tool that takes text."""

    name: Name
    description: str | None = None
    format: CustomFormat | None = None


class CustomTool(Body):
    """A tool that takes text: offered as a function with one argument, and called by the kind of its own."""

    type: Literal["custom"]
    custom: Custom

    @property
    def name(self) -> str:
        """As calls name it."""
        return self.custom.name

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        made = self.custom.format.grammar if self.custom.format else None
        return offered(self.name, self.custom.description, made.definition if made else None)


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
AnyTool = Annotated[Tool | CustomTool, Field(discriminator="type")]
AnyTools = Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)]


class Named(Body):
    """The name of a tool."""

    name: str


class NamedFunction(Body):
    """Demands a call of one function."""

    type: Literal["function"]
    function: Named

    @property
    def name(self) -> str:
        """Of the tool."""
        return self.function.name


class NamedCustom(Body):
    """Demands a call of one custom tool."""

    type: Literal["custom"]
    custom: Named

    @property
    def name(self) -> str:
        """Of the tool."""
        return self.custom.name


AnyNamed = Annotated[NamedFunction | NamedCustom, Field(discriminator="type")]


class AllowedTools(Body):
    """Some of the tools, of which one may (auto) or must (required) be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AnyNamed], Field(min_length=1, max_length=MAX_TOOLS)]


class Allowed(Body):
    """Leaves some of the tools, as if the others were not offered."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["auto", "none", "required"] | Annotated[NamedFunction | NamedCustom | Allowed, Field(discriminator="type")]
)


def choice_of(choice: ToolChoice | None) -> Choice | str:
    """The name of a tool, or a mode."""
    if isinstance(choice, NamedFunction | NamedCustom):
        return choice.name
    return Choice(choice.allowed_tools.mode if isinstance(choice, Allowed) else choice or "auto")


def allowed_by(choice: ToolChoice | None) -> list[str] | None:
    """Names of the tools that are left; None: all are."""
    return [tool.name for tool in choice.allowed_tools.tools] if isinstance(choice, Allowed) else None
