"""The option `packing` in plans: whose word counts, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ktcore.errors import PlanError, RuleError

from . import conftest
from .conftest import Planner
from .graphs import llama


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """host1.linear packs in two ways."""

    def packings(self: Any, spec: Any, stored: Mapping[str, int]) -> Mapping[str, int]:
        return {"compact": sum(stored.values()), "fast": 3 * sum(stored.values())} if "packing" in self.options else {}

    monkeypatch.setattr(conftest.Fake, "packings", packings)
    (item,) = (i for i in conftest.HOST.items if i.id == "host1.linear")
    monkeypatch.setattr(item, "options", frozenset({"packing"}))


LINEAR = "version: 1\nrules:\n  - {name: a, match: {op: linear}, use: host1.linear%s}\n"


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    ("options", "packing", "times"),
    [
        ("", None, 1),
        ("", "fast", 3),
        ("", "compact", 1),
        ("compact", "fast", 1),
        ("fast", None, 3),
        ("fast", "compact", 3),
    ],
)
def test_the_rule_decides_then_the_caller(
    plan: Planner, rest: str, options: str, packing: str | None, times: int
) -> None:
    said = f", options: {{packing: {options}}}" if options else ""
    made = plan(llama(1), LINEAR % said, rest, packing=packing)
    head = made.choices["head"]
    assert head.packed_bytes == times * head.stored_bytes
    assert head.packings == {"compact": head.stored_bytes, "fast": 3 * head.stored_bytes}
    assert made.packings()["fast"] > made.packings()["compact"]
    assert made.to_dict()["nodes"]["head"]["packings"] == head.packings


@pytest.mark.usefixtures("both")
def test_unknown_packings_are_named(plan: Planner, rest: str) -> None:
    with pytest.raises(RuleError, match=r"rules0.yaml:3: rule 'a': option packing='big' is unknown"):
        plan(llama(1), LINEAR % ", options: {packing: big}", rest)
    with pytest.raises(PlanError, match=r"packing 'big' is unknown\n.*compact, fast"):
        plan(llama(1), LINEAR % "", rest, packing="big")


def test_a_plan_whose_implementations_pack_in_one_way_refuses_the_question(plan: Planner, rest: str) -> None:
    made = plan(llama(1), LINEAR % "", rest)
    assert made.packings() == made.to_dict()["packings"] == {}
    with pytest.raises(PlanError, match="packing fast means nothing here"):
        plan(llama(1), LINEAR % "", rest, packing="fast")
