"""Chat templates: which of a checkpoint's templates to take, and rendering it without trusting what messages say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktcore.errors import RequestError, TokenizerError

DEFAULT = "default"
RESERVED = frozenset({"self", "messages", "add_generation_prompt", "tools", "documents", "template"})
"""Names that callers cannot give a template's variable: they are arguments of their own."""
# Taken for conversations with tools where a checkpoint has it; transformers chooses so too.
_WITH_TOOLS = "tool_use"

# Code points that are no characters: text has no use for them, so one is free to mark a place.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# What these say is the application's or the model's own; a reasoning model's template looks for tokens in it.
_TRUSTED_ROLES = frozenset(("assistant",))


@dataclass(frozen=True)
class ChatTemplates:
    """The Jinja sources that a checkpoint carries, by name.

    Args:
        named: sources by name; `default` is the one taken when nothing else is asked for.
        where: the checkpoint, for error messages.
    """

    named: Mapping[str, str]
    where: str

    @property
    def default(self) -> str | None:
        """The source taken when none is asked for; None where there is none, or no telling which."""
        if DEFAULT in self.named or len(self.named) != 1:
            return self.named.get(DEFAULT)
        return next(iter(self.named.values()))

    def choose(self, asked: str | None, with_tools: bool) -> str:
        """A source by name; a text with braces is a source itself.

        Raises:
            TokenizerError: there is none, none of that name, or several and none is the default.
        """
        if asked is not None and "{" in asked:
            return asked
        if not self.named:
            raise TokenizerError(
                f"{self.where}: has no chat template",
                "use an instruction-tuned model, send a plain prompt, or give the template's Jinja source: "
                "template=Path('chat_template.jinja').read_text()",
            )
        names = ", ".join(sorted(self.named))
        if asked is not None:
            if asked not in self.named:
                raise TokenizerError(f"{self.where}: has no chat template named {asked!r}", f"it has: {names}")
            return self.named[asked]
        if with_tools and _WITH_TOOLS in self.named:
            return self.named[_WITH_TOOLS]
        if self.default is None:
            raise TokenizerError(
                f"{self.where}: has several chat templates and none is the default", f"choose by template=: {names}"
            )
        return self.default


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    where: str,
) -> str:
    """The conversation as the text that the model expects, by transformers' sandboxed Jinja.

    Args:
        variables: what the template sees besides the messages: `tools`, `documents`, `add_generation_prompt`,
            special tokens, and what a family's template knows, such as `enable_thinking`.

    Raises:
        TokenizerError: the template is broken.
        RequestError: the template refuses these messages.
    """
    # Costs a second and only chats need it. Templates are untrusted code: they run in Jinja's sandbox.
    from jinja2.exceptions import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            conversations=[[dict(message) for message in messages]], chat_template=source, **variables
        )
    except TemplateSyntaxError as error:
        raise TokenizerError(f"{where}: its chat template is broken: {error}") from error
    except Exception as error:  # a template can fail in any way that Python code can
        raise RequestError(f"the model's chat template cannot render these messages: {error}") from error
    text: str = texts[0]
    return text


class ControlTokens:
    """The spellings that mean control in a rendered conversation, and how to take that meaning from a message.

    Args:
        spellings: of all control tokens.
    """

    def __init__(self, spellings: Iterable[str]) -> None:
        # falling: of two of which one begins with the other the longer is tried first
        falling = sorted((s for s in spellings if s), reverse=True)
        self._any = re.compile("|".join(map(re.escape, falling)) or r"(?!)")
        # Every place where one could begin: a match of the whole cannot see one that overlaps it.
        self._first = re.compile(f"(?={self._any.pattern}).", re.DOTALL)

    def disarm(self, value: Any) -> tuple[Any, str | None]:
        """Breaks every control token inside strings with a mark; None for the mark where there was nothing to break.

        Messages of the assistant's role stay as they are: what the model said, with the tokens its template knows.

        Args:
            value: strings inside mappings and sequences, such as messages.
        """
        texts = list(_strings(value))
        if not any(self._any.search(text) for text in texts):
            return value, None
        mark = next((mark for mark in _NONCHARACTERS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise RequestError("a message holds every noncharacter from U+FDD0 to U+FDEF and control tokens besides")
        return self._broken(value, mark), mark

    def split(self, text: str, mark: str) -> list[tuple[str, bool]]:
        """A marked text in stretches, without its marks, and whether control tokens count in each."""
        stretches: list[tuple[str, bool]] = []

        def add(part: str, counts: bool) -> None:
            if stretches and stretches[-1][1] and counts:
                stretches[-1] = (stretches[-1][0] + part, True)
            elif part:
                stretches.append((part, counts))

        at = 0
        for found in re.finditer(f"(?:{self._any.pattern})(?!{mark})", text):
            between = text[at : found.start()]
            add(between.replace(mark, ""), mark not in between)
            add(found[0], True)
            at = found.end()
        add(text[at:].replace(mark, ""), mark not in text[at:])
        return stretches

    def _broken(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._first.sub(lambda found: found[0] + mark, value)
        if isinstance(value, Mapping):
            if value.get("role") in _TRUSTED_ROLES:
                return value
            return {key: self._broken(item, mark) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
            return [self._broken(item, mark) for item in value]
        return value


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if value.get("role") not in _TRUSTED_ROLES:
            for item in value.values():
                yield from _strings(item)
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        for item in value:
            yield from _strings(item)
