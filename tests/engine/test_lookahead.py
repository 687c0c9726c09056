"""Guesses by prompt lookup: what followed the last tokens when they came up before."""

from __future__ import annotations

from ktcore.engine.schedule.lookahead import PromptLookup


def test_it_goes_on_as_it_went_on_last_time() -> None:
    lookup = PromptLookup(4)
    tokens = [1, 2, 3, 4, 5, 9, 1, 2, 3]
    assert lookup.guess(tokens, 10) == [4, 5, 9, 1]
    assert lookup.guess(tokens, 2) == [4, 5]
    tokens += [7, 1, 2, 3]
    assert lookup.guess(tokens, 3) == [7, 1, 2]  # the latest time counts


def test_two_tokens_do_where_three_are_not_found() -> None:
    assert PromptLookup(3).guess([8, 1, 2, 5, 6, 7, 1, 2], 9) == [5, 6, 7]


def test_nothing_is_guessed_from_what_is_new() -> None:
    lookup = PromptLookup(4)
    assert lookup.guess([1], 4) == []
    assert lookup.guess([1, 2, 3, 4, 5], 4) == []
    assert lookup.guess([1, 2, 3, 4, 5, 5, 5], 4) == [5]


def test_wrong_guesses_make_the_next_ones_shorter_and_right_ones_longer() -> None:
    lookup = PromptLookup(6)
    tokens = [*range(10), *range(4)]
    assert len(lookup.guess(tokens, 9)) == 6
    lookup.learn(6, 0)
    assert len(lookup.guess(tokens, 9)) == 1
    lookup.learn(1, 1)
    assert len(lookup.guess(tokens, 9)) == 3
    lookup.learn(3, 3)
    assert len(lookup.guess(tokens, 9)) == 5
    lookup.learn(0, 0)
    assert len(lookup.guess(tokens, 9)) == 5


def test_it_may_be_asked_before_there_is_anything_and_after_every_token() -> None:
    lookup, tokens = PromptLookup(2), list[int]()
    guesses = []
    for token in [7, 8, 9, 7, 8, 9, 7]:
        guesses.append(lookup.guess(tokens, 2))
        tokens.append(token)
    assert guesses == [[], [], [], [], [], [9, 7], [7, 8]]
