"""The `experts` part of a rule: residence changes nothing, dropping and deferring change what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ktcore
from ktcore.errors import RuleError

from .conftest import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def _rules(folder: Path, experts: str) -> Path:
    path = folder / "experts.yaml"
    path.write_text(
        "version: 1\nextends: reference\nrules:\n  - name: mine\n    match: {op: experts}\n"
        f"    use: reference.experts\n    device: host\n    experts: {experts}\n"
    )
    return path


def _logits(t: Tiny, rules: Path) -> torch.Tensor:
    with ktcore.load(t.folder, backend="cpu", rules=rules, context=256) as model:
        return model.logits(t.ids)


@pytest.mark.parametrize("experts", ["{on_device: 5}", "{on_device: [3, 0, 15]}", "{on_device: 16}", "{keep: 0}"])
@pytest.mark.parametrize("name", ["qwen3-moe", "v3"])
def test_where_experts_live_does_not_change_the_result(
    name: str, experts: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny(name)
    torch.testing.assert_close(_logits(t, _rules(tmp_path, experts)), t.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("experts", ["{keep: 2}", "{threshold: 0.9}", "{defer: 2}", "{on_device: 4, defer: 1}"])
def test_dropping_and_deferring_change_the_result_but_not_beyond_recognition(
    experts: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    t = tiny("qwen3-moe")
    difference = (_logits(t, _rules(tmp_path, experts)) - t.logits).abs().max().item()
    assert 1e-3 < difference < 3


def test_keeping_all_and_deferring_nothing_is_exact(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    t = tiny("v3")
    rules = _rules(tmp_path, "{keep: 4, threshold: 0.0, defer: 0}")
    torch.testing.assert_close(_logits(t, rules), t.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ("{on_device: -1}", "whole number"),
        ("{on_device: [1, 1]}", "each once"),
        ("{on_device: [16]}", "no expert 16"),
        ("{treshold: 1}", "no key 'treshold'"),
        ("{threshold: 2}", "from 0 to 1"),
    ],
)
def test_a_bad_policy_is_refused_with_its_line(
    experts: str, message: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    with pytest.raises(RuleError, match=message) as caught:
        _logits(tiny("v3"), _rules(tmp_path, experts))
    assert "experts.yaml:" in str(caught.value)
