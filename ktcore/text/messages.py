"""A conversation as callers give it: what it must look like before a chat template sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ktcore.errors import RequestError

_EXAMPLE = '[{"role": "user", "content": "Hello"}]'
_NO_TEXT = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file")


def check_messages(messages: Any) -> list[Mapping[str, Any]]:
    """The messages of a conversation as a list.

    Args:
        messages: mappings with `role`, and `content`: text, a list of parts such as `{"type": "text", "text": "Hi"}`,
            or None beside `tool_calls`.

    Raises:
        RequestError: it is something else; says which message, and what it should be.
    """
    if isinstance(messages, str):
        raise RequestError("a chat takes messages, not a text", f"{_said(messages)}; generate() continues a text")
    if isinstance(messages, Mapping):
        wanted = "put the message into a list: [message]" if "role" in messages else f"give {_EXAMPLE}"
        raise RequestError(f"a chat takes a list of messages, not one {type(messages).__name__}", wanted)
    if not isinstance(messages, Sequence) or isinstance(messages, (bytes, bytearray)):
        raise RequestError(f"a chat takes a list of messages, not {type(messages).__name__}", f"give {_EXAMPLE}")
    if not messages:
        raise RequestError("the conversation is empty", f"give {_EXAMPLE}")
    for number, message in enumerate(messages):
        _check(f"messages[{number}]", message)
    return list(messages)


def _said(text: str) -> str:
    short = text if len(text) <= 40 else text[:37] + "..."
    return f'give [{{"role": "user", "content": {short!r}}}]'


def _check(where: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        advice = _said(message) if isinstance(message, str) else f"give {_EXAMPLE}"
        raise RequestError(f"{where} must be a mapping, not {type(message).__name__}", advice)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(
            f"{where} has no role" if role is None else f"{where}: role must be a name, not {role!r}",
            "roles are system, user, assistant, tool, and what else the model's template knows",
        )
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None:
        # what else a message may hold (calls, thoughts) is the template's to know
        if not message.keys() - {"role", "content", "name"}:
            raise RequestError(f"{where} has no content", 'give a text: {"role": ..., "content": "Hello"}')
        return
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise RequestError(
            f"{where}: content must be a text or a list of parts, not {type(content).__name__}",
            'give a text: {"role": ..., "content": "Hello"}',
        )
    for number, part in enumerate(content):
        _check_part(f"{where}.content[{number}]", part)


def _check_part(where: str, part: Any) -> None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise RequestError(f"{where} must be a part with a type", 'such as {"type": "text", "text": "Hello"}')
    if part["type"] in _NO_TEXT:
        raise RequestError(f"{where}: {part['type']} parts cannot be taken", "ktcore runs language models: text alone")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise RequestError(f"{where}: a part of type text must have a text", '{"type": "text", "text": "Hello"}')
