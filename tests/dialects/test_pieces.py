"""Every family's answers cut in two at every place: text, thoughts and calls come out as from the whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.calls import Calls
from ktcore.dialects.dialect import _calls_one
from ktcore.dialects.known import (
    _KNOWN,
    ACTION,
    BARE,
    DSML,
    GLM,
    HERMES,
    INVOKE,
    KIMI,
    LISTED,
    LLAMA3,
    MISTRAL,
    QWEN3_CODER,
    SEED,
    TOOLCALL,
)
from ktcore.dialects.thoughts import ThoughtMarks, Thoughts

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = {"get_weather": SCHEMA, "now": {}}
ARGUMENTS = {"city": 'Os\\lo "north" {x}', "days": 3}
FORMATS = list({made.name: made for made in (*(made for _, made in _KNOWN), BARE)}.values())


def written(made: ToolFormat, name: str = "get_weather", arguments: dict[str, Any] = ARGUMENTS) -> str:
    """A call as the family's forced answers write it."""
    if made.pairs is None:
        body = made.forced.replace("{name}", name).replace("{arguments}", json.dumps(arguments))
        return made.section[0] + body + made.section[1]
    pairs, line = made.pairs, "\n" if made.pairs.lines else ""
    told = ""
    for key, value in arguments.items():
        typed = f' string="{"true" if isinstance(value, str) else "false"}"' if pairs.typed else ""
        text = value if isinstance(value, str) else json.dumps(value)
        told += pairs.opens + key + pairs.named + typed + pairs.gap + pairs.begins + line + text + line
        told += pairs.closes + pairs.after
    return made.section[0] + made.forced.replace("{name}", name).replace("{pairs}", told) + made.section[1]


def read(made: ToolFormat, *pieces: str) -> tuple[str, list[tuple[str, Any]]]:
    calls = Calls(made, TOOLS)
    said, found = "", []
    for text, more in (*map(calls.push, pieces), calls.flush()):
        said += text
        found += [(call.name, json.loads(call.arguments)) for call in more]
    return said, found


@pytest.mark.parametrize("made", FORMATS, ids=lambda made: made.name)
def test_a_call_cut_anywhere_is_the_call(made: ToolFormat) -> None:
    whole = written(made)
    for at in range(len(whole) + 1):
        assert read(made, whole[:at], whole[at:]) == ("", [("get_weather", ARGUMENTS)]), whole[:at]
    assert read(made, *whole) == ("", [("get_weather", ARGUMENTS)])


MARKED = [made for made in FORMATS if made.marks]


@pytest.mark.parametrize("made", MARKED, ids=lambda made: made.name)
def test_a_mark_in_prose_is_text_at_once_and_a_later_call_counts(made: ToolFormat) -> None:
    for mark in made.marks:
        prose = f"One writes {mark} and then some.\n\n"
        calls = Calls(made, TOOLS)
        said, found = calls.push(prose + "More")
        assert (said, found) == (prose + "More", [])
        behind = " text. " + ("" if made.bare else written(made))
        expected = [] if made.bare else [("get_weather", ARGUMENTS)]
        for at in range(len(prose)):
            text, found = read(made, prose[:at], prose[at:], behind)
            assert (text, found) == ((prose + " text. ").rstrip() if expected else prose + behind, expected), prose[:at]


@pytest.mark.parametrize("made", [m for m in MARKED if m.pairs is None and not m.bare], ids=lambda made: made.name)
def test_a_malformed_call_takes_nothing_with_it(made: ToolFormat) -> None:
    broken = written(made).replace('"days":', '"days"')
    assert read(made, broken) == (broken, [])
    said, found = read(made, *(broken + "\n" + written(made)))
    assert found == [("get_weather", ARGUMENTS)]
    assert said.rstrip() == broken.rstrip()


@pytest.mark.parametrize("made", MARKED, ids=lambda made: made.name)
def test_an_answer_cut_off_within_a_call_is_told_whole(made: ToolFormat) -> None:
    whole = written(made)
    cut = whole[: whole.index("Os")]
    assert read(made, *cut) == (cut, [])
    assert read(made, "Hm.\n\n" + cut) == ("Hm.\n\n" + cut, [])


@pytest.mark.parametrize("made", [LISTED, TOOLCALL, ACTION, MISTRAL], ids=lambda made: made.name)
def test_what_stands_in_a_list_of_calls_and_is_none_is_text(made: ToolFormat) -> None:
    whole = written(made)
    begin, call, end = whole.partition(whole[len(made.section[0]) : len(whole) - len(made.section[1])])
    for inside in (f'{{"a": 1}}, {call}', f'{call}, {{"a": 1}}'):
        assert read(made, begin + inside + end) == ('{"a": 1}', [("get_weather", ARGUMENTS)])


def test_bare_objects_are_calls_of_offered_tools_alone() -> None:
    for made in (BARE, LLAMA3):
        text = '{"name": "Bob", "age": 5}'
        assert read(made, *text) == (text, [])


@pytest.mark.parametrize("made", [GLM, INVOKE, DSML, SEED, QWEN3_CODER], ids=lambda made: made.name)
@pytest.mark.parametrize("value", ["\n    if x:\n        return 1\n", "\n\n", "", " a ", "a < b > c & </x>"])
def test_text_arguments_keep_both_ends(made: ToolFormat, value: str) -> None:
    told = {"city": value}
    assert read(made, written(made, arguments=told)) == ("", [("get_weather", told)])


def test_only_one_newline_on_each_side_is_the_formats_own() -> None:
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\n\nx\n\n</parameter>\n</function>\n</tool_call>"
    assert read(QWEN3_CODER, text) == ("", [("get_weather", {"city": "\nx\n"})])


ENDING = [made for made in MARKED if made.ends_thoughts]


@pytest.mark.parametrize("made", ENDING, ids=lambda made: made.name)
def test_a_call_ends_open_thoughts_and_a_mention_does_not(made: ToolFormat) -> None:
    mention = f"I could write {made.marks[0]} here."
    whole = mention + "\n" + written(made)
    for at in range(len(whole)):
        thoughts = Thoughts(
            ThoughtMarks("<think>", "</think>"), True, made.marks, lambda text: _calls_one(made, TOOLS, text)
        )
        calls = Calls(made, TOOLS)
        pieces = [thoughts.push(whole[:at]), thoughts.push(whole[at:]), thoughts.flush()]
        assert "".join(thought for thought, _ in pieces) == mention
        _, found = calls.push("".join(said for _, said in pieces))
        assert [(call.name, json.loads(call.arguments)) for call in found] == [("get_weather", ARGUMENTS)]


def test_thoughts_that_close_keep_calls_of_tools_that_are_not_offered() -> None:
    said = f"As in {written(KIMI, 'other')} hm.</think>Yes."
    for size in (1, 5, 1000):
        thoughts = Thoughts(
            ThoughtMarks("<think>", "</think>"), True, KIMI.marks, lambda text: _calls_one(KIMI, TOOLS, text)
        )
        pieces = [thoughts.push(said[at : at + size]) for at in range(0, len(said), size)] + [thoughts.flush()]
        assert tuple(map("".join, zip(*pieces, strict=True))) == (said.split("</think>")[0], "Yes.")


def test_text_streams_up_to_a_mark_that_begins_no_call() -> None:
    calls = Calls(HERMES, TOOLS)
    assert calls.push("The tag <tool_call>") == ("The tag", [])
    assert calls.push(" is") == (" <tool_call> is", [])
