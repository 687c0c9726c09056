"""What a rule file may hold. Every unknown key, wrong type or impossible combination is an error with file and line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ktcore.rules.experts import ExpertPolicy, parse_experts
from ktcore.rules.located import Located, Where
from ktcore.rules.match import Match, Span, parse_layers

VERSION = 1
FILE_KEYS = ("version", "extends", "vars", "rules", "strict")
RULE_KEYS = ("name", "match", "use", "device", "options", "experts", "optional", "strict")
MATCH_KEYS = ("op", "name", "layers", "format", "feature", "family")


@dataclass(frozen=True)
class Rule:
    """One rule, variables filled in.

    Attributes:
        use: implementation ids; the first runs, the later ones are the listed fallbacks.
        device: "host", "accelerator" (the plan's backend, also when that is the host), "name" or "name:index"; None
            leaves a part where its composite is, and a top-level node on the plan's backend.
        experts: for a rule about experts: which are resident on the accelerator, late, or dropped.
        optional: it may match nothing; for files that serve several models.
        strict: no fallback: the first of `use` runs, or the plan fails.
    """

    name: str
    match: Match
    use: tuple[str, ...]
    where: Where
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    experts: ExpertPolicy | None = None
    optional: bool = False
    strict: bool = False

    def __str__(self) -> str:
        return f"'{self.name}' ({self.where})"


def rule_text(rule: Rule) -> str:
    """A rule as plans name it: with its file's name and line, without the machine's folders."""
    return f"'{rule.name}' ({rule.where.file.name}:{rule.where.line})"


def check_keys(given: Mapping[str, Located], known: tuple[str, ...], what: str) -> None:
    """RuleError at the first key of `given` that is not in `known`."""
    for key, item in given.items():
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise item.where.error(f"{what} has no key '{key}'", hint)


def parse_rule(source: Located) -> Rule:
    """A rule from its mapping, variables already filled in.

    Raises:
        RuleError: with file and line of what is wrong.
    """
    given = source.mapping("a rule")
    check_keys(given, RULE_KEYS, "a rule")
    for key in ("name", "match", "use"):
        if key not in given:
            raise source.where.error(f"the rule has no '{key}'")
    use = given["use"].texts("use")
    if len(set(use)) < len(use):
        raise given["use"].where.error("use lists an implementation twice")
    match = parse_match(given["match"])
    if "experts" in given and match.op != ("experts",):
        raise given["experts"].where.error("'experts' belongs to a rule with 'match: {op: experts}'")
    return Rule(
        name=given["name"].text("name"),
        match=match,
        use=use,
        where=source.where,
        device=given["device"].text("device") if "device" in given else None,
        options=given["options"].plain() if "options" in given and given["options"].mapping("options") else {},
        experts=parse_experts(given["experts"]) if "experts" in given else None,
        optional=given["optional"].flag("optional") if "optional" in given else False,
        strict=given["strict"].flag("strict") if "strict" in given else False,
    )


def parse_match(source: Located) -> Match:
    """The condition of a rule."""
    given = source.mapping("match")
    check_keys(given, MATCH_KEYS, "match")
    texts = {key: item.texts(key) for key, item in given.items() if key != "layers"}
    return Match(layers=_layers(given["layers"]) if "layers" in given else (), **texts)


def _layers(source: Located) -> tuple[Span, ...]:
    if isinstance(source.value, int) and not isinstance(source.value, bool):
        return parse_layers(str(source.value))
    try:
        return parse_layers(source.text("layers"))
    except ValueError as error:
        raise source.where.error(
            f"layers {source.value!r} is malformed: {error}", 'write "3-60", "0,2,5-7", or "3-" for the rest'
        ) from error
