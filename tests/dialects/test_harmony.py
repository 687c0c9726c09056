"""gpt-oss' answers cut at every place: channels, calls, and marks that are merely spoken of."""

from __future__ import annotations

import json

import pytest

from ktcore.dialects.harmony import _MARKS, Harmony

THINKS = "<|channel|>analysis<|message|>"
SAYS = "<|start|>assistant<|channel|>final<|message|>"
CALLS = '<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": "<|end|> b"}'
EVERY = (*_MARKS, "<|message|>", "<|constrain|>")


def read(*pieces: str, separate: bool = True, tools: bool = True) -> tuple[str, str, list[tuple[str, str]]]:
    harmony = Harmony(separate, tools)
    parts = [*map(harmony.push, pieces), harmony.flush()]
    calls = [(call.name, call.arguments) for part in parts for call in part[2]]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts), calls


def everywhere(text: str, expected: tuple[str, str, list[tuple[str, str]]]) -> None:
    assert read(*text) == expected
    for at in range(len(text) + 1):
        assert read(text[:at], text[at:]) == expected, text[:at]


NOW = [("now", '{"a": "<|end|> b"}')]


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", "<|return|>", ""])
def test_thoughts_text_and_calls_come_apart_wherever_they_are_cut(end: str) -> None:
    everywhere(f"{THINKS}Hm.{end}{SAYS}Yes.{end}{CALLS}<|call|>", ("Yes.", "Hm.", NOW))
    everywhere(f"{THINKS}Hm.<|end|>{CALLS}<|call|>{CALLS}", ("", "Hm.", NOW * 2))


@pytest.mark.parametrize(
    "head",
    [
        " to=functions.now<|channel|>commentary json<|message|>",
        "<|channel|>commentary to=functions.now<|message|>",
        "<|channel|>commentary to=functions.now json<|message|>",
        "<|channel|>analysis to=functions.now code<|message|>",
        "<|start|>assistant to=functions.now<|message|>",
        "<|start|>assistant to=functions.now<|channel|>commentary <|constrain|>json<|message|>",
        " to=functions.now <|constrain|>json<|message|>",
    ],
)
def test_a_call_may_name_its_function_before_or_behind_the_channel(head: str) -> None:
    everywhere(head + '{"b": 1}<|call|>', ("", "", [("now", '{"b": 1}')]))
    assert read(head) == ("", "", [("now", "{}")])
    # nothing is called where nothing is offered
    content, reasoning, calls = read(head + "{}", tools=False)
    assert (content + reasoning, calls) == ("{}", [])


@pytest.mark.parametrize("mark", EVERY)
def test_a_mark_in_prose_is_text_at_once_and_a_later_call_counts(mark: str) -> None:
    for head, place in ((SAYS.removeprefix("<|start|>assistant"), 0), (THINKS, 1)):
        prose = f"One writes {mark} and then some."
        harmony = Harmony(True, True)
        harmony.push(head)
        assert harmony.push(prose)[place] == prose
        content, reasoning, calls = read(*(head + prose + "<|end|>" + CALLS))
        assert ((content, reasoning)[place], calls) == (prose, NOW)
    prose = f"No channel, but {mark} and a word."
    everywhere(prose, (prose, "", []))


@pytest.mark.parametrize(
    "broken",
    [
        "<|channel|>comment to=functions.now<|message|>{}",
        "<|channel|>commentary to= <|message|>{}",
        "<|channel|>final is a channel<|message|>x",
        "<|start|>assistant says<|message|>x",
        "<|start|><|message|>",
        "to=functions is text",
        " and <|constrain|>json<|message|>",
    ],
)
def test_a_malformed_header_takes_nothing_with_it(broken: str) -> None:
    everywhere(broken, (broken, "", []))
    everywhere(f"{broken}<|end|>{CALLS}", (broken, "", NOW))
    everywhere(f"{THINKS}Hm. {broken}<|end|>{CALLS}", ("", f"Hm. {broken}", NOW))


def test_malformed_arguments_are_told_as_they_are_and_end_with_their_message() -> None:
    broken = CALLS.replace('"a":', '"a"')
    everywhere(f"{broken}<|call|>{CALLS}", ("", "", [("now", '{"a" "<|end|> b"}'), *NOW]))
    # what follows whole arguments without a header is no part of them
    everywhere(f"{CALLS}<|call|> Done.", (" Done.", "", NOW))


def test_what_is_cut_off_within_a_header_is_no_text_and_a_mention_at_the_end_is() -> None:
    head = f"{THINKS}Hm.<|end|>{CALLS}"
    for at in range(len(f"{THINKS}Hm.<|end|>"), head.index("{")):
        assert read(*head[:at]) == ("", "Hm.", []), head[:at]
    assert read(*"<|channel|>analy") == ("", "", [])
    assert read(*"to") == ("to", "", [])
    for mark in ("<|channel|>", "<|start|>", "<|message|>"):
        said = f"The mark is {mark}"
        assert read(*(SAYS + said)) == (said, "", [])


def test_thoughts_may_be_left_where_they_are() -> None:
    assert read(THINKS + "Hm.<|end|>" + SAYS + "Yes.", separate=False) == ("Hm.Yes.", "", [])


def test_other_recipients_and_channels_are_text() -> None:
    text = '<|channel|>commentary to=browser.open<|message|>{"id": 1}'
    everywhere(text, ('{"id": 1}', "", []))
    everywhere("<|channel|>commentary<|message|>I will look.<|end|>" + CALLS, ("I will look.", "", NOW))
    assert json.loads(read(CALLS)[2][0][1]) == {"a": "<|end|> b"}
