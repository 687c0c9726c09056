"""Rules that treat some experts of a layer apart: which live where, what they take, and what plans tell of it."""

from __future__ import annotations

import pytest

from ktcore.errors import PlanError, RuleError
from ktcore.rules.plan import Plan

from .conftest import REST, Planner
from .graphs import EXPERTS, qwen3_moe
from .test_resolve import rule

MOE = rule(
    "{name: moe, match: {op: moe}, use: [host1.moe, reference.moe]}\n"
    "{name: router, match: {op: router}, use: reference.router}\n"
    "{name: all experts, match: {op: experts}, use: host1.experts}"
)
NAME = "layers.0.ffn.experts"


def apart(experts: str) -> str:
    return rule(f"{{name: apart, match: {{op: experts, layers: 0}}, use: host1.experts, experts: {{{experts}}}}}")


@pytest.fixture
def rest() -> str:
    """References for what else the graph has, which has no dense MLP."""
    return "\n".join(line for line in REST.splitlines() if "mlp" not in line)


@pytest.fixture
def made(plan: Planner, rest: str) -> Plan:
    return plan(qwen3_moe(2), apart("on_device: [0, 5, 2], use: accel.experts, device: 'accel:1'"), MOE, rest)


def test_resident_experts_are_loaded_by_what_runs_on_their_device(made: Plan) -> None:
    choice, other = made.choices[NAME], made.choices["layers.1.ffn"]
    assert choice.resident is not None
    assert (choice.resident.experts, choice.resident.device) == ((0, 5, 2), "accel:1")
    assert choice.resident.implementation.id == "accel.experts"
    assert choice.resident.spec.experts == 3
    assert (choice.implementation.id, choice.device) == ("host1.experts", "host1:0")
    # both pack into twice what is stored, each its own share
    assert choice.resident.packed_bytes == 2 * choice.stored_bytes * 3 // EXPERTS
    assert choice.packed_bytes == 2 * choice.stored_bytes * 5 // EXPERTS
    assert other.implementation.id == "host1.moe"
    assert other.resident is None
    assert made.devices == ("host1:0", "accel:1")
    assert made.memory()["accel:1"].weights == choice.resident.packed_bytes
    assert made.memory()["host1:0"].weights == sum(c.packed_bytes for c in made.choices.values())


def test_what_takes_a_branch_as_a_whole_is_passed_over_where_experts_are_apart(made: Plan) -> None:
    choice = made.choices["layers.0.ffn"]
    assert (choice.implementation.id, choice.fallback) == ("reference.moe", True)
    assert choice.rejected[0].reason == (
        "rule 'apart' (rules0.yaml:3) treats some of its experts apart, which needs its parts"
    )


def test_plans_tell_which_experts_are_apart(made: Plan) -> None:
    text = made.explain(NAME)
    assert "  experts   3 on accel:1" in text
    assert "  resident  3 experts with accel.experts on accel:1, " in text
    node = made.to_dict()["nodes"][NAME]
    assert (node["experts"], node["resident"]) == ("3 on accel:1", [0, 5, 2])
    assert made.choices[NAME].why == "'apart' (rules0.yaml:3): 3 on accel:1"
    branch = made.to_dict()["nodes"]["layers.1.ffn"]
    assert (branch["experts"], branch["resident"], branch["fallback"]) == (None, [], False)
    assert "experts   " not in made.explain("layers.1.ffn")


def test_experts_that_are_late_or_few_stay_where_they_are(plan: Planner, rest: str) -> None:
    choice = plan(qwen3_moe(1), apart("defer: 1, keep: 0"), MOE, rest).choices[NAME]
    assert choice.resident is None
    assert choice.experts is not None
    assert (choice.experts.defer, choice.experts.keep) == (1, 0)
    assert choice.packed_bytes == 2 * choice.stored_bytes


@pytest.mark.parametrize(
    ("experts", "error", "message"),
    [
        ("on_device: [1, 8], use: accel.experts", RuleError, f"{NAME} has no expert 8, only 8"),
        ("on_device: [1], use: accel.expert", RuleError, r"'accel\.expert' is unknown\n  near ones: accel\.experts"),
        (
            "on_device: 1, use: [accel.linear, host1.experts], device: accel",
            PlanError,
            "no implementation keeps experts on accel:0: accel.linear: it implements linear, not experts; "
            "host1.experts: it runs on host1 devices, the rule puts the node on accel:0",
        ),
        ("on_device: 1, use: accel.experts, device: gpu", RuleError, "backend 'gpu' is unknown"),
    ],
)
def test_what_cannot_be_kept_apart_is_an_error(
    plan: Planner, rest: str, experts: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(qwen3_moe(1), apart(experts), MOE, rest, backend="host1")


def test_all_of_them_may_be_resident(plan: Planner, rest: str) -> None:
    choice = plan(qwen3_moe(1), apart("on_device: 99, use: accel.experts, device: accel"), MOE, rest).choices[NAME]
    assert choice.resident is not None
    assert choice.resident.experts == tuple(range(EXPERTS))
    assert choice.packed_bytes == 0
