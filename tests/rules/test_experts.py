"""The `experts` part of a rule: defaults, values, and errors that name the key and the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ktcore.errors import RuleError
from ktcore.rules.experts import ExpertPolicy
from ktcore.rules.load import read_rule_set

Write = Callable[..., Path]


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], ExpertPolicy]:
    def read(experts: str) -> ExpertPolicy:
        path = tmp_path / "rules.yaml"
        rule = f"  - name: a\n    match: {{op: experts}}\n    use: x\n    experts: {{{experts}}}\n"
        path.write_text("version: 1\nrules:\n" + rule)
        found = read_rule_set([path]).rules[0].experts
        assert isinstance(found, ExpertPolicy)
        return found

    return read


def test_what_is_not_given_is_off(policy: Callable[[str], ExpertPolicy]) -> None:
    found = policy("")
    assert found == ExpertPolicy((), ("reference.experts",), "accelerator", 0, 0, 0.0)
    assert found == ExpertPolicy()
    assert found.describe() == ""
    assert found.resident(8) == ()


def test_what_is_given_is_taken(policy: Callable[[str], ExpertPolicy]) -> None:
    found = policy("on_device: [3, 1], use: [a.b, c.d], device: 'sim:1', defer: 2, keep: 5, threshold: 0.25")
    assert found == ExpertPolicy((3, 1), ("a.b", "c.d"), "sim:1", 2, 5, 0.25)
    assert found.resident(8) == (3, 1)
    words = "2 on sim:1, 2 may be a layer late, at most 5 a token, weights from 0.25 of the largest"
    assert found.describe() == words


def test_a_number_of_experts_is_the_first_ones(policy: Callable[[str], ExpertPolicy]) -> None:
    found = policy("on_device: 4")
    assert found.resident(8) == (0, 1, 2, 3)
    assert found.resident(2) == (0, 1)
    assert found.describe() == "4 on accelerator"


@pytest.mark.parametrize(("given", "value"), [("0", 0.0), ("1", 1.0), ("0.5", 0.5)])
def test_a_threshold_is_a_share(policy: Callable[[str], ExpertPolicy], given: str, value: float) -> None:
    assert policy(f"threshold: {given}").threshold == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("keeep: 1", "experts has no key 'keeep'"),
        ("keep: -1", "keep must be a whole number from 0, not -1"),
        ("keep: true", "keep must be a whole number from 0, not True"),
        ("keep: 1.5", "keep must be a whole number from 0, not 1.5"),
        ("defer: '1'", "defer must be a whole number from 0, not '1'"),
        ("on_device: -1", "on_device must be a whole number from 0"),
        ("on_device: [1, 1]", "each once"),
        ("on_device: [-1]", "whole numbers from 0"),
        ("on_device: [true]", "whole numbers from 0"),
        ("on_device: [a]", "whole numbers from 0"),
        ("threshold: -0.1", "threshold must be a number from 0 to 1"),
        ("threshold: 1.1", "threshold must be a number from 0 to 1"),
        ("threshold: true", "threshold must be a number from 0 to 1"),
        ("threshold: half", "threshold must be a number from 0 to 1"),
    ],
)
def test_a_wrong_value_is_an_error_with_its_line(
    policy: Callable[[str], ExpertPolicy], given: str, message: str
) -> None:
    with pytest.raises(RuleError, match=message) as caught:
        policy(given)
    assert "rules.yaml:6" in str(caught.value)
