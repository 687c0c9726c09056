"""Steps stay short beside prompts: the controller against machines of known speed."""

from __future__ import annotations

import pytest

from ktcore.engine.schedule.pace import AGE, FIRST, LEAST, Pace


def _run(pace: Pace, steps: int, decode: float, token: float, fixed: float = 0.0) -> tuple[float, int]:
    """The longest of the last steps, as a multiple of one without prompts, and their prompts' tokens in all."""
    longest, tokens = 0.0, 0
    for step in range(steps):
        limit = pace.most(4)
        assert limit is not None
        seconds = decode + (limit * token + fixed if limit else 0.0)
        pace.note(4, limit, seconds)
        if step > steps // 2:
            longest, tokens = max(longest, seconds / decode), tokens + limit
    return longest, tokens


@pytest.mark.parametrize("token", [1e-5, 1e-4, 1e-3])
def test_steps_come_as_close_to_the_bound_as_is_safe(token: float) -> None:
    longest, tokens = _run(Pace(3.0), 200, decode=0.01, token=token)
    assert 2.0 < longest <= 3.3
    assert tokens > 0


def test_a_prompt_always_goes_on() -> None:
    longest, tokens = _run(Pace(3.0), 100, decode=0.001, token=0.01)
    assert tokens >= 48 * LEAST
    assert longest > 3


def test_the_limit_follows_when_prompts_become_dearer() -> None:
    pace = Pace(3.0)
    _run(pace, 100, decode=0.01, token=1e-4)
    longest, _ = _run(pace, 60, decode=0.01, token=5e-4, fixed=0.005)
    assert longest <= 3.0


def test_a_step_without_prompts_is_measured_now_and_then() -> None:
    pace = Pace(3.0)
    assert pace.most(0) is None
    assert pace.most(4) == 0
    pace.note(4, 0, 0.01)
    assert pace.most(4) == FIRST
    assert pace.most(32) == 0  # far from what was measured
    for _ in range(AGE + 1):
        pace.note(4, 32, 0.02)
    assert pace.most(4) == 0


def test_a_small_limit_grows_again() -> None:
    pace = Pace(3.0)
    _run(pace, 60, decode=0.01, token=0.02)  # not even one token fits
    _, tokens = _run(pace, 200, decode=0.01, token=0.003)
    assert tokens >= 99 * 3


def test_a_measurement_serves_numbers_of_sequences_within_a_quarter() -> None:
    pace = Pace(3.0)
    pace.note(40, 0, 0.01)
    assert [bool(pace.most(n)) for n in (31, 32, 40, 53, 54)] == [False, True, True, True, False]
    pace.note(2, 0, 0.01)
    assert [bool(pace.most(n)) for n in (1, 2, 3, 4)] == [True, True, True, False]


def test_a_measurement_is_old_after_so_many_steps_whenever_it_was_made() -> None:
    pace = Pace(3.0)
    for _ in range(AGE):
        pace.note(0, 32, 1.0)
    pace.note(4, 0, 0.01)
    for _ in range(AGE):
        assert pace.most(4)
        pace.note(4, 16, 0.021)
    pace.note(4, 16, 0.021)
    assert pace.most(4) == 0


def test_a_slower_machine_without_prompts_may_take_longer_with_them() -> None:
    pace = Pace(3.0)
    for _ in range(60):
        pace.note(4, 0, 0.02)
    for _ in range(60):
        pace.note(4, 0, 0.04)
    before = pace.most(4)
    pace.note(4, FIRST, 3 * 0.7 * 0.04 * 0.99)
    assert (pace.most(4) or 0) >= (before or 0)
    pace.note(4, FIRST, 3 * 0.7 * 0.04 * 1.2)
    assert (pace.most(4) or 0) < (before or 0)


def test_one_step_that_waited_for_something_else_does_not_count_for_long() -> None:
    pace = Pace(3.0)
    for _ in range(20):
        pace.note(4, 0, 0.01)
    pace.note(4, 0, 5.0)  # counts as twice the usual, and a quarter of that
    pace.note(4, FIRST, 3 * 0.7 * 0.0125 * 1.01)
    assert (pace.most(4) or 0) < FIRST


def test_one_token_is_taken_where_not_even_that_fits() -> None:
    pace = Pace(3.0)
    pace.note(4, 0, 0.001)
    for _ in range(20):
        pace.note(4, pace.most(4) or 0, 1.0)
    assert pace.most(4) == 1
