"""What a plan tells: page size, memory, table rows, explanations, JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from ktcore.backend import Registry
from ktcore.errors import BackendError, PlanError
from ktcore.placement.memory import STATE_SLOTS

from .conftest import GIB, Planner
from .graphs import llama
from .test_resolve import rule

FUSED = rule("{name: a, match: {op: attention}, use: host1.attention}")


def test_the_page_size_suits_every_cache(plan: Planner, rest: str) -> None:
    assert plan(llama(), rest).page_size == 64
    assert plan(llama(), FUSED, rest).page_size == 64
    mixed = rule(
        "{name: a, match: {op: attention, layers: 0}, use: accel.attention, device: accel}\n"
        "{name: b, match: {op: attention}, use: host1.attention}"
    )
    assert plan(llama(), mixed, rest).page_size == 128


def test_caches_that_share_no_page_size_are_named(plan: Planner, rest: str, registry: object) -> None:
    from .conftest import ACCEL

    before, ACCEL.items[1].pages = ACCEL.items[1].pages, (1,)  # type: ignore[attr-defined]
    try:
        mixed = rule(
            "{name: a, match: {op: attention, layers: 0}, use: accel.attention, device: accel}\n"
            "{name: b, match: {op: attention}, use: host1.attention}"
        )
        with pytest.raises(PlanError, match=r"layers\.0\.attn \(accel\.attention\): 1; layers\.1\.attn"):
            plan(llama(), mixed, rest)
    finally:
        ACCEL.items[1].pages = before  # type: ignore[attr-defined]


def test_memory_adds_up_by_hand(plan: Planner, rest: str) -> None:
    made = plan(llama(2), FUSED, rest)
    assert made.cache_bytes_per_token == 200
    memory = made.memory(1000)["host1:0"]
    assert memory.kv == 1024 * 200  # whole pages of 64
    assert memory.weights == sum(choice.packed_bytes for choice in made.choices.values())
    # the widest operator of a step of 512 tokens is the MLP: 2 * 64 + 3 * 96 floats a token
    assert memory.workspace == 512 * 4 * (2 * 64 + 3 * 96)
    assert memory.total == memory.kv + memory.weights + memory.workspace
    assert memory.limit is None


def test_an_implementation_that_wants_longer_steps_has_them_and_their_workspace_is_counted(
    plan: Planner, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(llama(2), FUSED, rest)
    assert made.step_tokens == 512
    fused = next(c.implementation for c in made.choices.values() if c.implementation.id == "host1.attention")
    monkeypatch.setattr(fused, "long_step", 2048, raising=False)
    assert made.step_tokens == 2048
    token = 4 * (2 * 64 + 3 * 96)
    # a step has at most a quarter of what is behind it
    counted = [made.memory(n)["host1:0"].workspace for n in (1024, 4096, 65536)]
    assert counted == [512 * token, 1024 * token, 2048 * token]


def test_recurrent_states_count_for_every_sequence_that_may_run(
    plan: Planner, rest: str, monkeypatch: pytest.MonkeyPatch, registry: Registry
) -> None:
    item = registry.implementations()["host1.attention"]
    monkeypatch.setattr(item, "state_bytes", lambda spec: 7)
    made = plan(llama(2), FUSED, rest)
    assert made.memory(1000)["host1:0"].kv == 1024 * 200 + STATE_SLOTS * 2 * 7


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_to_change(plan: Planner, rest: str) -> None:
    need = plan(llama(2), rest, backend="accel").memory(4096)["accel:0"]
    plan(llama(2), rest, backend="accel", memory=need.total, context=4096)
    with pytest.raises(PlanError, match=r"on accel:0 with a context of 4096 tokens .*: 1\.0 KiB more than") as caught:
        plan(llama(2), rest, backend="accel", memory=need.total - 1024, context=4096)
    assert "a context of 3840 tokens fits" in str(caught.value)
    plan(llama(2), rest, backend="accel", memory=need.total - 1024, context=3840)
    with pytest.raises(PlanError, match="device: host"):
        plan(llama(2), rest, backend="accel", memory=need.weights // 2, context=4096)


def test_the_limit_is_the_accelerators_alone(plan: Planner, rest: str) -> None:
    assert plan(llama(1), rest, memory=1).memory()["host1:0"].limit is None
    host = rule("{name: e, match: {op: embedding}, use: reference.embedding, device: host}")
    made = plan(llama(1), host, rest, backend="accel", memory=GIB)
    assert {device: m.limit for device, m in made.memory().items()} == {"host1:0": None, "accel:0": GIB}


def test_limits_by_device_hold_the_hosts_memory_too(plan: Planner, rest: str) -> None:
    host = rule("{name: e, match: {op: embedding}, use: reference.embedding, device: host}")
    by_device = {"accel": GIB, "host": 2 * GIB}
    for named in (by_device, {"accel:0": GIB, "host1:0": 2 * GIB}, {"accelerator": GIB, "host1": 2 * GIB}):
        made = plan(llama(1), host, rest, backend="accel", memory=named)
        assert {device: m.limit for device, m in made.memory().items()} == {"host1:0": 2 * GIB, "accel:0": GIB}
        assert not [note for note in made.notes if "memory" in note]
    assert plan(llama(1), rest, memory={"host1": 2 * GIB}).memory()["host1:0"].limit == 2 * GIB
    with pytest.raises(PlanError, match=r"on host1:0 with a context of .* more than the 8\.0 KiB"):
        plan(llama(1), host, rest, backend="accel", memory={"host": 8192})
    with pytest.raises(PlanError, match="memory names host1:0 twice"):
        plan(llama(1), rest, memory={"host1": 2 * GIB, "host": GIB})
    with pytest.raises(BackendError, match=r"backend 'acel' is unknown\n.*did you mean accel"):
        plan(llama(1), rest, memory={"acel": GIB})


def test_a_limit_that_limits_nothing_is_noted(plan: Planner, rest: str) -> None:
    nothing = "memory limits an accelerator, and this plan uses none"
    assert plan(llama(1), rest, memory=1).notes == (nothing,)
    assert plan(llama(1), rest, memory={"accelerator": 1}).notes == (nothing,)
    idle = plan(llama(1), rest, backend="accel", memory={"accel:1": 1, "accel": GIB}).notes
    assert idle == ("memory limits accel:1, and this plan puts nothing there",)


def test_the_largest_context_fills_the_room_in_whole_pages(plan: Planner, rest: str) -> None:
    made = plan(llama(2), FUSED, rest)
    kv = made.memory(640)["host1:0"].kv
    assert made.largest_context("host1:0", kv) == 640
    assert made.largest_context("host1:0", kv - 1) == 576
    assert made.largest_context("host1:0", -1) == 0
    assert made.largest_context("accel:0", kv) == 0


def test_the_summary_joins_layers_that_are_alike(plan: Planner, rest: str) -> None:
    rules = rule("{name: some, match: {op: attention, layers: '0,2-3'}, use: host1.attention}")
    made = plan(llama(5), rules, rest)
    rows = {(row.nodes, row.implementation): row for row in made.summary()}
    fused = rows["layers.*.attn", "host1.attention"]
    assert (fused.count, fused.layers, fused.op, fused.device) == (3, "0,2-3", "attention", "host1:0")
    assert fused.why == "'some' (rules0.yaml:3)"
    assert rows["layers.*.attn", "reference.attention"].layers == "1,4"
    assert rows["head", "reference.linear"].layers == ""
    assert sum(row.count for row in rows.values()) == len(made.choices)
    assert sum(row.stored_bytes for row in rows.values()) == sum(root.nbytes for root in made.graph.roots())


def test_explain_tells_the_rule_and_every_rejected_implementation(plan: Planner, rest: str) -> None:
    text = plan(llama(1), FUSED, rest).explain("layers.0.attn")
    assert "run by host1.attention on host1:0" in text
    assert "'a' (rules0.yaml:3)" in text
    assert "reference.attention: rule 'a' (rules0.yaml:3) comes first [rule 'attention' (rules1.yaml:4)]" in text
    assert "accel.attention: it runs on accel devices" in text
    assert "as a listed fallback" not in text
    rules = rule("{name: a, match: {op: attention}, use: [host1.attention, reference.attention]}")
    text = plan(llama(1, "Q4_1"), rules, rest).explain("layers.0.attn")
    assert "'a' (rules0.yaml:3), as a listed fallback" in text
    assert "rejected  host1.attention: no kernel for Q4_1 [rule 'a' (rules0.yaml:3)]" in text


def test_explain_tells_options_taken_and_unused_and_parts_covered_only_where_there_are_some(
    plan: Planner, rest: str
) -> None:
    rules = rule(
        "{name: a, match: {op: linear, format: Q8_0}, use: [accel.linear, host1.linear], options: {activations: f32}}\n"
        "{name: b, match: {op: attention}, use: host1.attention}"
    )
    made = plan(llama(1), rules, rest)
    lines = made.explain("head").splitlines()
    assert "  options   activations=f32" in lines
    assert not any(line.startswith(("  unused", "  covers", "  experts", "  quantised")) for line in lines)
    text = made.explain("layers.0.attn")
    assert "  covers    layers.0.attn.q, layers.0.attn.k, " in text
    assert "  options" not in text
    both = "[accel.attention, host1.attention]"
    text = plan(llama(1), rules.replace("host1.attention", both), rest, backend="accel").explain("head")
    assert "  unused    options that accel.linear does not know: activations" in text
    assert "\n  options " not in text


def test_explain_of_a_covered_part_names_its_owner(plan: Planner, rest: str) -> None:
    text = plan(llama(1), FUSED, rest).explain("layers.0.attn.q")
    assert "is run by layers.0.attn as a whole, with host1.attention" in text
    with pytest.raises(PlanError, match=r"no node 'layers.9.attn'\n  near ones: layers.0.attn, "):
        plan(llama(1), rest).explain("layers.9.attn")


def test_a_fallback_shows_in_the_reason(plan: Planner, rest: str) -> None:
    rules = rule("{name: a, match: {op: attention}, use: [host1.attention, reference.attention]}")
    row = next(row for row in plan(llama(1, "Q4_1"), rules, rest).summary() if row.op == "attention")
    assert row.fallback
    assert "fallback: host1.attention: no kernel for Q4_1" in row.why


def test_the_plan_is_json_and_frozen(plan: Planner, rest: str) -> None:
    made = plan(llama(1), FUSED, rest)
    data = json.loads(json.dumps(made.to_dict()))
    assert data["nodes"]["layers.0.attn"]["implementation"] == "host1.attention"
    assert data["memory"]["host1:0"]["total"] > 0
    with pytest.raises(FrozenInstanceError):
        made.page_size = 1  # type: ignore[misc]
