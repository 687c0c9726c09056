"""Resolution: which rule decides, what errors name, and what the plan remembers."""

from __future__ import annotations

import pytest

from ktcore.backend import Registry
from ktcore.errors import BackendError, PlanError, RuleError

from .conftest import Planner
from .graphs import llama


def rule(text: str) -> str:
    return "version: 1\nrules:\n" + "\n".join(f"  - {line}" for line in text.strip().splitlines())


def test_the_first_rule_that_matches_decides(plan: Planner, rest: str) -> None:
    first = rule("{name: last layer, match: {op: attention, layers: 2}, use: host1.attention}")
    made = plan(llama(), first, rest)
    used = [made.choices[f"layers.{i}.attn"].implementation.id for i in range(3)]
    assert used == ["reference.attention", "reference.attention", "host1.attention"]
    assert made.choices["layers.2.attn"].rule == "'last layer' (rules0.yaml:3)"


@pytest.mark.parametrize(
    ("match", "nodes"),
    [
        ("{op: linear, name: head}", {"head"}),
        ("{op: linear, name: 'layers.*.q'}", {f"layers.{i}.attn.q" for i in range(3)}),
        ("{op: linear, name: ['*.up'], layers: '0,2'}", {"layers.0.ffn.up", "layers.2.ffn.up"}),
        ("{op: linear, layers: 1-, name: '*.o'}", {"layers.1.attn.o", "layers.2.attn.o"}),
        ("{op: linear, format: Q4_1}", {"layers.1.attn.q"}),
        ("{op: linear, format: 'Q4_*'}", {"layers.1.attn.q"}),
        ("{op: linear, name: head, feature: f32}", {"head"}),
        ("{op: linear, name: head, family: [qwen3_moe, llama]}", {"head"}),
    ],
)  # fmt: skip
def test_conditions(plan: Planner, rest: str, match: str, nodes: set[str]) -> None:
    from dataclasses import replace

    from .graphs import HIDDEN, Layer, linear

    graph = llama()
    layer = graph.layers[1]
    parts = dict(layer.attn.parts, q=linear("layers.1.attn.q", HIDDEN, HIDDEN, "Q4_1", 1))
    attn = replace(layer.attn, parts=parts, spec=replace(layer.attn.spec, q=parts["q"].spec))
    graph = replace(graph, layers=(graph.layers[0], Layer(attn, layer.ffn), graph.layers[2]))
    made = plan(graph, rule(f"{{name: mine, match: {match}, use: reference.linear}}"), rest)
    assert {name for name, choice in made.choices.items() if "'mine'" in choice.rule} == nodes


@pytest.mark.parametrize("match", ["{op: linear, family: [qwen3_moe, gpt_oss]}", "{op: linear, layers: 9-}"])
def test_a_rule_for_other_models_takes_nothing(plan: Planner, rest: str, match: str) -> None:
    other = rule(f"{{name: theirs, match: {match}, use: host1.linear, optional: true}}")
    made = plan(llama(1), other, rest)
    assert not [name for name, choice in made.choices.items() if "'theirs'" in choice.rule]


def test_a_feature_is_asked_of_the_device_that_the_rule_names(plan: Planner, rest: str) -> None:
    on = rule("{name: fp8, match: {op: linear, name: head, feature: 'fp8:e4m3fn'}, use: accel.linear, device: accel}")
    assert plan(llama(), on, rest).choices["head"].device == "accel:0"
    host = rule("{name: fp8, match: {op: linear, name: head, feature: 'fp8:e4m3fn'}, use: host1.linear, device: host}")
    with pytest.raises(RuleError, match="'fp8' matches no node"):
        plan(llama(), host, rest)


def test_devices_are_names_and_parts_stay_with_their_composite(plan: Planner, rest: str) -> None:
    rules = rule(
        "{name: e, match: {op: embedding}, use: reference.embedding, device: host}\n"
        "{name: h, match: {name: head}, use: accel.linear, device: accelerator}\n"
        "{name: f, match: {op: mlp}, use: reference.mlp, device: 'accel:1'}"
    )
    made = plan(llama(1), rules, rest, backend="accel:2")
    devices = {name: choice.device for name, choice in made.choices.items()}
    assert devices["embed"] == "host1:0"
    assert devices["head"] == devices["layers.0.attn.q"] == "accel:2"
    assert devices["layers.0.ffn"] == devices["layers.0.ffn.gate"] == "accel:1"
    assert set(made.devices) == {"host1:0", "accel:1", "accel:2"}


def test_a_fused_implementation_covers_its_parts(plan: Planner, rest: str) -> None:
    rules = rule(
        "{name: fused, match: {op: attention}, use: host1.attention}\n"
        "{name: covered, match: {op: linear, name: '*.attn.q'}, use: host1.linear}"
    )
    made = plan(llama(1), rules, rest)
    choice = made.choices["layers.0.attn"]
    assert "layers.0.attn.q" in choice.covered
    assert "layers.0.attn.q" not in made.choices
    assert choice.stored_bytes == made.graph.node("layers.0.attn").nbytes
    assert choice.packed_bytes == 2 * choice.stored_bytes
    assert any("'covered'" in note and "fused" in note for note in made.notes)


def test_an_open_composite_counts_only_its_own_weights(plan: Planner, rest: str) -> None:
    made = plan(llama(1), rest)
    assert made.choices["layers.0.attn"].stored_bytes == 0
    total = sum(choice.stored_bytes for choice in made.choices.values())
    assert total == sum(root.nbytes for root in made.graph.roots())


def test_a_listed_fallback_is_taken_and_recorded(plan: Planner, rest: str) -> None:
    rules = rule("{name: a, match: {op: attention}, use: [host1.attention, reference.attention]}")
    made = plan(llama(1, "Q4_1"), rules, rest)
    choice = made.choices["layers.0.attn"]
    assert choice.fallback
    assert choice.implementation.id == "reference.attention"
    assert (choice.rejected[0].implementation, choice.rejected[0].reason) == ("host1.attention", "no kernel for Q4_1")
    assert made.fallbacks == (choice,)
    assert "layers.0.attn.q" in made.choices
    assert not plan(llama(1), rules, rest).choices["layers.0.attn"].fallback


@pytest.mark.parametrize("where", ["rule", "file"])
def test_strict_forbids_the_fallback(plan: Planner, rest: str, where: str) -> None:
    text = "{name: a, match: {op: attention}, use: [host1.attention, reference.attention]%s}"
    rules = rule(text % ", strict: true") if where == "rule" else rule(text % "") + "\nstrict: true\n"
    with pytest.raises(PlanError, match=r"layers\.0\.attn: host1\.attention cannot .*: no kernel for Q4_1"):
        plan(llama(1, "Q4_1"), rules, rest)


def test_what_no_rule_lists_is_never_taken(plan: Planner, rest: str) -> None:
    rules = rule("{name: a, match: {op: attention}, use: host1.attention}")
    with pytest.raises(PlanError, match=r"layers\.0\.attn \(attention\) cannot run on host1:0: .*no kernel for Q4_1"):
        plan(llama(1, "Q4_1"), rules, rest)


def test_a_node_without_a_rule_is_named(plan: Planner) -> None:
    with pytest.raises(PlanError, match=r"no rule is about node 'layers\.0\.attn'"):
        plan(llama(1), rule("{name: e, match: {op: embedding}, use: reference.embedding}"))


def test_a_rule_that_matches_nothing_is_an_error_unless_optional(plan: Planner, rest: str) -> None:
    text = "{name: gone, match: {op: mla}, use: reference.mla%s}"
    with pytest.raises(RuleError, match=r"rules0\.yaml:3: rule 'gone' matches no node of this llama model"):
        plan(llama(1), rule(text % ""), rest)
    plan(llama(1), rule(text % ", optional: true"), rest)


def test_a_rule_behind_others_of_its_file_is_an_error(plan: Planner, rest: str) -> None:
    """Each of the earlier two alone would leave it something."""
    rules = rule(
        "{name: low, match: {op: mlp, layers: 0-1}, use: reference.mlp}\n"
        "{name: high, match: {op: mlp, layers: 2-}, use: reference.mlp}\n"
        "{name: all, match: {op: mlp}, use: host1.mlp}"
    )
    with pytest.raises(RuleError, match=r"rules0\.yaml:5: rule 'all' can never fire: rule 'low' \(line 3\)"):
        plan(llama(), rules, rest)


def test_a_rule_hidden_by_another_file_is_a_note(plan: Planner, rest: str) -> None:
    made = plan(llama(1), rule("{name: mine, match: {op: mlp}, use: host1.mlp}"), rest)
    assert "rule 'mlp' (rules1.yaml:5) decides nothing here: rule 'mine' (rules0.yaml:3) comes first" in made.notes


def test_an_unknown_implementation_names_near_ones(plan: Planner, rest: str) -> None:
    with pytest.raises(
        RuleError, match=r"rules0\.yaml:3: .*'host1\.atention' is unknown\n  near ones: host1\.attention"
    ):
        plan(llama(1), rule("{name: a, match: {op: attention}, use: host1.atention}"), rest)


def test_an_implementation_of_a_broken_backend_says_so(plan: Planner, rest: str, registry: Registry) -> None:
    from ktcore.backend import BackendState

    record = registry.get("accel")
    assert record is not None
    record.fail(BackendState.BROKEN, "its library is damaged")
    with pytest.raises(RuleError, match=r"'accel\.mlp' is unknown: backend 'accel' is broken: its library is damaged"):
        plan(llama(1), rule("{name: a, match: {op: mlp}, use: accel.mlp}"), rest)


def test_unknown_options_and_devices_are_errors(plan: Planner, rest: str) -> None:
    with pytest.raises(RuleError, match=r"rules0\.yaml:3: .*no.* an option 'speed'\n  known: activations"):
        plan(llama(1), rule("{name: a, match: {op: linear}, use: host1.linear, options: {speed: 1}}"), rest)
    with pytest.raises(RuleError, match=r"rules0\.yaml:3: .*backend 'gpu' is unknown\n  known: host1"):
        plan(llama(1), rule("{name: a, match: {op: mlp}, use: reference.mlp, device: gpu}"), rest)
    with pytest.raises(RuleError, match=r"rules0\.yaml:3: .*'accel:x' is malformed"):
        plan(llama(1), rule("{name: a, match: {op: mlp}, use: reference.mlp, device: 'accel:x'}"), rest)


def test_options_reach_the_choice_and_those_a_fallback_lacks_are_told(plan: Planner, rest: str) -> None:
    rules = rule(
        "{name: a, match: {op: linear, name: head}, use: [host1.linear, reference.linear], options: {activations: f32}}"
    )
    assert plan(llama(1), rules, rest).choices["head"].options == {"activations": "f32"}
    from dataclasses import replace

    from .graphs import HIDDEN, VOCAB, linear

    other = replace(llama(1), head=linear("head", VOCAB, HIDDEN, "Q4_1"))
    made = plan(other, rules, rest)
    assert made.choices["head"].ignored == ("activations",)
    assert "activations" in made.explain("head")


def test_an_implementation_stays_on_its_own_backends_devices(plan: Planner, rest: str) -> None:
    with pytest.raises(PlanError, match=r"host1\.mlp: it runs on host1 devices, the rule puts the node on accel:0"):
        plan(llama(1), rule("{name: a, match: {op: mlp}, use: host1.mlp, device: accel}"), rest)
    with pytest.raises(PlanError, match=r"it implements linear, not mlp"):
        plan(llama(1), rule("{name: a, match: {op: mlp}, use: host1.linear}"), rest)


def test_a_supports_that_raises_is_a_reason(plan: Planner, rest: str, registry: Registry) -> None:
    item = registry.implementations()["host1.mlp"]
    item.supports = lambda spec, device: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    try:
        with pytest.raises(PlanError, match=r"its supports\(\) failed: ZeroDivisionError"):
            plan(llama(1), rule("{name: a, match: {op: mlp}, use: host1.mlp}"), rest)
    finally:
        del item.supports  # type: ignore[method-assign]


def test_an_unavailable_backend_can_be_planned_for_and_an_unknown_one_not(plan: Planner, rest: str) -> None:
    assert plan(llama(1), rest, backend="accel").devices == ("accel:0",)
    with pytest.raises(
        BackendError, match=r"backend 'gpu' is unknown\n  known: host1 \(loaded\), accel \(unavailable\)"
    ):
        plan(llama(1), rest, backend="gpu")


def test_resolve_probes_and_opens_nothing_that_is_not_used(registry: Registry, plan: Planner, rest: str) -> None:
    plan(llama(1), rest)
    record = registry.get("accel")
    assert record is not None
    assert record.settled is None
