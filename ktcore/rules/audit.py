"""Finds rules that decided nothing: mistakes are errors, the rest becomes notes in the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ktcore.graph.node import Graph, Node
from ktcore.rules.load import RuleSet
from ktcore.rules.schema import Rule, rule_text


def check_rules_used(
    graph: Graph, rules: RuleSet, fired: Mapping[int, int], matches: Callable[[Rule, Node], bool]
) -> tuple[str, ...]:
    """Judge the rules that fired for no node.

    Args:
        fired: index of a rule -> number of nodes it decided.
        matches: whether a rule's condition is met by a node.

    Returns:
        A note for each rule whose nodes were taken by rules of other files, or run by a fused implementation.

    Raises:
        RuleError: a rule that is not optional matches nothing, or earlier rules of its file take all of its nodes.
    """
    notes: list[str] = []
    for index, count in fired.items():
        rule = rules.rules[index]
        if count:
            continue
        nodes = [node for node in graph.walk() if matches(rule, node)]
        if not nodes:
            if not rule.optional:
                raise _matches_nothing(rule, graph)
            continue
        takers = {node.name: _first_before(rules, index, node, matches) for node in nodes}
        same_file = [t for t in takers.values() if t is not None and t.where.file == rule.where.file]
        if len(same_file) == len(nodes) and not rule.optional:
            first = same_file[0]
            raise rule.where.error(
                f"rule '{rule.name}' can never fire: rule '{first.name}' (line {first.where.line}) comes first for "
                f"{nodes[0].name}" + (f", and likewise for {len(nodes) - 1} more" if len(nodes) > 1 else ""),
                "put the narrower rule first, or mark this one 'optional: true'",
            )
        notes.append(_note(rule, takers))
    return tuple(notes)


def _first_before(rules: RuleSet, index: int, node: Node, matches: Callable[[Rule, Node], bool]) -> Rule | None:
    """The rule before `index` that takes the node, one of the same file if there is any."""
    earlier = [rule for rule in rules.rules[:index] if matches(rule, node)]
    own = [rule for rule in earlier if rule.where.file == rules.rules[index].where.file]
    return next(iter(own + earlier), None)


def _matches_nothing(rule: Rule, graph: Graph) -> Exception:
    match = rule.match
    ops = sorted({node.spec.op for node in graph.walk()})
    if match.op and not set(match.op) & set(ops):
        hint = f"operators of this model: {', '.join(ops)}"
    else:
        hint = "loosen its match, or mark it 'optional: true'"
    return rule.where.error(f"rule '{rule.name}' matches no node of this {graph.architecture} model", hint)


def _note(rule: Rule, takers: Mapping[str, Rule | None]) -> str:
    hidden = [taker for taker in takers.values() if taker is not None]
    if len(hidden) < len(takers):
        return f"rule {rule_text(rule)} decides nothing here: its nodes are parts that a fused implementation runs"
    return f"rule {rule_text(rule)} decides nothing here: rule {rule_text(hidden[0])} comes first"
