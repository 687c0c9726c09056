"""A chat, whichever API asks for it: messages, tools and forms become a prompt, and what reads the answer."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from ktcore.dialects.base import Call
from ktcore.dialects.dialect import Dialect, Reader, dialect_of, thought_before
from ktcore.dialects.earlier_calls import earlier_calls
from ktcore.dialects.forced import beside_grammar, forced_grammar
from ktcore.dialects.harmony import FINAL
from ktcore.engine.model import Model
from ktcore.errors import FieldError, RequestError
from ktcore.text.chat_template import RESERVED
from ktcore.text.guides import Structure, Thought
from ktcore.text.tokenizer import Tokenizer


class Choice(Enum):
    """What `tool_choice` says without naming a tool; apart from names, for a tool may be called "auto"."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True)
class Form:
    """The form that a request demands of its answer.

    Attributes:
        kind: "json", "regex" or "grammar".
        field: the request's field, for errors.
    """

    kind: str
    source: Any
    field: str


@dataclass(frozen=True)
class Chat:
    """What is asked.

    Attributes:
        messages: as chat templates take them; arguments of calls are JSON text.
        tools: as chat templates take them.
        choice: a mode, or the name of the one tool to be called.
        allowed: names of the tools that are left; None: all are.
        several: whether one answer may hold several calls.
        separate: whether thoughts are told apart from the content.
        variables: of the chat template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    choice: Choice | str = Choice.AUTO
    allowed: Sequence[str] | None = None
    several: bool = True
    form: Form | None = None
    separate: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What is given to the engine, and how its answers are read."""

    ids: list[int]
    tokenizer: Tokenizer
    dialect: Dialect = field(default_factory=Dialect)
    tools: Mapping[str, Any] = field(default_factory=dict)
    separate: bool = False
    structure: Structure | None = None
    several: bool = True

    @property
    def shown(self) -> frozenset[int]:
        """Control tokens that the reader must see."""
        return self.dialect.shown(self.tokenizer) if self.separate or self.tools else frozenset()

    def reader(self) -> Reader:
        """What reads one answer."""
        return Reader(self.dialect, self.tokenizer, self.ids, self.separate, self.tools, self.several)


def prompt_of(model: Model, chat: Chat) -> Prompt:
    """Takes its time: templates are the checkpoint's code, texts may be long, and forms are compiled.

    Raises:
        RequestError: the template refuses the messages, knows no tools, or a form or a tool's schema is no good.
        TokenizerError: there is no chat template.
    """
    tokenizer = model.tokenizer
    offered = _offered(chat)
    named = tokenizer.chat_templates
    source = named["tool_use"] if offered and "tool_use" in named else tokenizer.chat_template
    dialect = dialect_of(source)
    if offered and dialect.tools is None:
        raise FieldError("tools", "the model's chat template knows no tools", "take a model that was trained for them")
    variables = {key: value for key, value in chat.variables.items() if key not in RESERVED}
    messages = earlier_calls(source or "", chat.messages, tokenizer.special_names)
    ids = tokenizer.encode_chat(messages, tools=offered or None, **variables)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in offered}
    thought = thought_before(dialect, tokenizer, ids)
    structure = _forced(model, chat, dialect, schemas, thought)
    if thought is not None and dialect.harmony:
        thought = replace(thought, lead=FINAL)
    if structure is None:
        beside = beside_grammar(dialect.tools, schemas, chat.several) if schemas and dialect.tools else None
        structure = structure_of(model, chat.form, thought, beside)
    return Prompt(ids, tokenizer, dialect, schemas, chat.separate, structure, chat.several)


def _offered(chat: Chat) -> list[Mapping[str, Any]]:
    names = [tool["function"]["name"] for tool in chat.tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FieldError("tools", f"two tools are named {twice!r}")
    unknown = next((name for name in chat.allowed or () if name not in names), None)
    if unknown is not None:
        raise FieldError("tool_choice", f"there is no tool {unknown!r}")
    if chat.choice is Choice.NONE:
        return []
    return [tool for tool in chat.tools if chat.allowed is None or tool["function"]["name"] in chat.allowed]


def structure_of(
    model: Model, form: Form | None, thought: Thought | None = None, calls: str | None = None
) -> Structure | None:
    """A form, compiled.

    Args:
        calls: the grammar of calls that may be said in its place.

    Raises:
        FieldError: it cannot be enforced; the message says why.
    """
    if form is None:
        return None
    made = model.structures
    try:
        if form.kind == "json":
            return made.json(form.source, thought, calls)
        return (made.regex if form.kind == "regex" else made.grammar)(form.source, thought, calls)
    except RequestError as error:
        raise FieldError(form.field, error.message, error.hint or "") from error


def call_id(dialect: Dialect, call: Call) -> str:
    """The model's own id for a call, or a new one; Mistral's templates take nine letters and digits."""
    if call.id:
        return call.id
    made = uuid.uuid4().hex
    short = dialect.tools is not None and dialect.tools.name.startswith("mistral")
    return made[:9] if short else f"call_{made[:24]}"


def _forced(
    model: Model, chat: Chat, dialect: Dialect, schemas: Mapping[str, Any], thought: Thought | None
) -> Structure | None:
    if chat.choice in (Choice.AUTO, Choice.NONE):
        return None
    if not schemas:
        said = chat.choice.value if isinstance(chat.choice, Choice) else chat.choice
        raise FieldError("tool_choice", f"{said} needs tools")
    if chat.form is not None:
        raise FieldError(chat.form.field, "an answer that must call a tool cannot have another form")
    if isinstance(chat.choice, str) and chat.choice not in schemas:
        raise FieldError("tool_choice", f"there is no tool {chat.choice!r}")
    wanted = {chat.choice: schemas[chat.choice]} if isinstance(chat.choice, str) else schemas
    assert dialect.tools is not None
    several = chat.several and chat.choice is Choice.REQUIRED
    try:
        return model.structures.lark(forced_grammar(dialect.tools, wanted, several), thought)
    except RequestError as error:
        raise FieldError("tools", error.message, error.hint or "") from error
