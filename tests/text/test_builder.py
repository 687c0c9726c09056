"""Stop strings over a stream of pieces."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktcore.text.builder import TextBuilder


class _Letters:
    """A tokenizer whose ids are code points."""

    def stream_decoder(self, shown: frozenset[int]) -> _Letters:
        return self

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


def _run(text: str, stop: Sequence[str]) -> tuple[str, bool, list[str]]:
    builder = TextBuilder(_Letters(), stop)  # type: ignore[arg-type]
    pieces = []
    for letter in text:
        pieces.append(builder.push(ord(letter)))
        if builder.stopped:
            break
    pieces.append(builder.flush())
    return "".join(pieces), builder.stopped, pieces


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("hello world", [], "hello world", False),
        ("hello END world", ["END"], "hello ", True),
        ("hello EN", ["END"], "hello EN", False),
        ("aab", ["aab"], "", True),
        ("aaab", ["aab"], "a", True),
        ("x\n\ny", ["\n\n", "y"], "x", True),
    ],
)
def test_text_ends_before_the_stop_string(text: str, stop: list[str], expected: str, stopped: bool) -> None:
    out, ended, _ = _run(text, stop)
    assert (out, ended) == (expected, stopped)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_equals_a_search_over_the_whole_text(text: str, stop: list[str]) -> None:
    out, _, _ = _run(text, stop)
    # the stream ends at the first moment any stop string is complete
    for end in range(len(text) + 1):
        starts = [text[:end].find(s) for s in stop if s in text[:end]]
        if starts:
            assert out == text[: min(starts)]
            return
    assert out == text


@pytest.mark.parametrize("stop", [[], ["END"]])
def test_characters_of_stop_strings_and_behind_them_are_counted(stop: list[str]) -> None:
    builder = TextBuilder(_Letters(), stop)  # type: ignore[arg-type]
    text = "hello END x"
    for count, letter in enumerate(text, 1):
        builder.push(ord(letter))
        assert builder.received == count
