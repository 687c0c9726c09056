"""What a conversation must look like: what chat templates take passes, anything else is named with its place."""

from __future__ import annotations

from typing import Any

import pytest

from ktcore.errors import RequestError
from ktcore.text.messages import check_messages

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "user", "content": []},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ],
)
def test_messages_of_openais_reference_are_taken(message: dict[str, Any]) -> None:
    assert check_messages((message, message)) == [message, message]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Hi", r"messages\[1\] must be a mapping, not str"),
        ({"content": "Hi"}, r"messages\[1\] has no role"),
        ({"role": 3, "content": "Hi"}, r"messages\[1\]: role must be a name, not 3"),
        ({"role": "user"}, r"messages\[1\] has no content"),
        ({"role": "user", "content": None, "name": "Ann"}, r"messages\[1\] has no content"),
        ({"role": "user", "content": 3}, r"messages\[1\]: content must be a text or a list of parts, not int"),
        ({"role": "user", "content": b"Hi"}, "not bytes"),
        ({"role": "user", "content": ["Hi"]}, r"messages\[1\]\.content\[0\] must be a part with a type"),
        ({"role": "user", "content": [{"text": "Hi"}]}, r"content\[0\] must be a part with a type"),
        ({"role": "user", "content": [{"type": None, "text": "Hi"}]}, r"content\[0\] must be a part with a type"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content\[0\]: image_url parts cannot be taken"),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\]: a part of type text must have a text"),
    ],
)
def test_other_messages_are_refused_with_their_place(message: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        check_messages([{"role": "user", "content": "Hi"}, message])


@pytest.mark.parametrize(("length", "shown"), [(40, "x" * 40), (41, "x" * 37 + "..."), (400, "x" * 37 + "...")])
def test_a_text_is_shown_as_the_message_it_could_be_and_a_long_one_is_cut(length: int, shown: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_messages("x" * length)
    assert (caught.value.hint or "").startswith(f'give [{{"role": "user", "content": {shown!r}}}]; ')
