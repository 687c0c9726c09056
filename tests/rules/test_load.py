"""Rule files: what they may hold, and errors with file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ktcore.backend import Registry
from ktcore.errors import RuleError
from ktcore.rules.load import load_rules, read_rule_set, shipped_rules

RULE = "  - {name: a, match: {op: linear}, use: reference.linear"
Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "empty"),
        ("- 1\n", 1, "must be a mapping, not a list"),
        ("rules: []\n", 1, "no 'version'"),
        ("version: 2\n", 1, "version 2 is not known"),
        ("version: 1\nrule: []\n", 2, "did you mean 'rules'"),
        ("version: 1\nrules: {}\n", 2, "rules must be a list"),
        ("version: 1\nrules:\n  - 5\n", 3, "a rule must be a mapping"),
        ("version: 1\nrules: [\n", 3, "not YAML"),
        ("version: 1\nversion: 1\n", 2, "'version' is repeated"),
        (f"version: 1\nrules:\n{RULE}, devise: host}}\n", 3, "did you mean 'device'"),
        ("version: 1\nrules:\n  - name: a\n    match: {}\n", 3, "no 'use'"),
        ("version: 1\nrules:\n  - match: {}\n    use: x\n", 3, "no 'name'"),
        ("version: 1\nrules:\n  - name: a\n    use: x\n", 3, "no 'match'"),
        ("version: 1\nrules:\n  - name: a\n    match:\n      opp: linear\n    use: x\n", 5, "did you mean 'op'"),
        ("version: 1\nrules:\n  - name: a\n    match: {}\n    use: []\n", 5, "empty list"),
        ("version: 1\nrules:\n  - name: a\n    match: {}\n    use: [x, x]\n", 5, "twice"),
        ("version: 1\nrules:\n  - name: a\n    match: {layers: 5-3}\n    use: x\n", 4, "backwards"),
        ("version: 1\nrules:\n  - name: a\n    match: {layers: all}\n    use: x\n", 4, "malformed"),
        (f"version: 1\nrules:\n{RULE}, optional: maybe}}\n", 3, "true or false"),
        (f"version: 1\nrules:\n{RULE}, options: [1]}}\n", 3, "options must be a mapping"),
        (f"version: 1\nrules:\n{RULE}, device: 3}}\n", 3, "device must be a string"),
        ("version: 1\nextends: nowhere\n", 2, "extends 'nowhere'"),
        ("version: 1\nstrict: 1\n", 2, "true or false"),
        ("version: 1\nvars: {a: &it [1, *it]}\n", 2, "an alias holds itself"),
    ],
)
def test_mistakes_are_errors_with_file_and_line(write: Write, text: str, line: int, message: str) -> None:
    path = write(text)
    with pytest.raises(RuleError, match=message) as caught:
        read_rule_set([path])
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=r"gone\.yaml: the rule file cannot be read"):
        read_rule_set([tmp_path / "gone.yaml"])


def test_variables_fill_strings_lists_and_options(write: Write) -> None:
    path = write("""
        version: 1
        vars: {impl: [a.x, b.x], first: 3, all: "${first}-9", kind: linear}
        rules:
          - name: the ${kind}
            match: {op: "${kind}", layers: "${all}"}
            use: ["${impl}", c.x]
            options: {n: "${first}"}
    """)
    (rule,) = read_rule_set([path]).rules
    assert rule.name == "the linear"
    assert rule.use == ("a.x", "b.x", "c.x")
    assert rule.match.layers == ((3, 9),)
    assert rule.options == {"n": 3}


@pytest.mark.parametrize(
    ("variables", "use", "message"),
    [
        ("{}", "${linear}", "'linear' is not defined\n  known: none"),
        ("{b: x, a: y}", "${linear}", "'linear' is not defined\n  known: a, b"),
        ("{lineal: a.x}", "${linear}", "'linear' is not defined\n  did you mean 'lineal'"),
        ("{linear: '${other}', other: '${linear}'}", "${linear}", "holds itself: linear -> other -> linear"),
        ("{many: [a, b]}", "x.${many}", "is a list and cannot stand inside"),
    ],
)
def test_bad_variables_are_errors(write: Write, variables: str, use: str, message: str) -> None:
    path = write(f"version: 1\nvars: {variables}\nrules:\n  - {{name: a, match: {{}}, use: '{use}'}}\n")
    with pytest.raises(RuleError, match=message) as caught:
        read_rule_set([path])
    assert f"{path}:" in str(caught.value)


def test_a_file_may_name_variables_that_only_its_children_use_and_use_an_alias_twice(write: Write) -> None:
    path = write("version: 1\nvars: {idle: a.x}\nrules:\n  - {name: a, match: &it {op: linear}, use: a.x}\n")
    assert read_rule_set([path]).rules[0].use == ("a.x",)
    path = write("version: 1\nvars: {one: &it [a.x], two: *it}\nrules:\n  - {name: a, match: {}, use: '${two}'}\n")
    assert read_rule_set([path]).rules[0].use == ("a.x",)


def test_an_extending_file_comes_first_and_sets_the_variables_of_its_parent(write: Write) -> None:
    write("version: 1\nvars: {impl: a.x}\nrules:\n  - {name: parent, match: {}, use: '${impl}'}\n", "base/p.yaml")
    child = write("version: 1\nextends: base/p\nvars: {impl: b.x}\nrules:\n  - {name: child, match: {}, use: c.x}\n")
    rules = read_rule_set([child]).rules
    assert [(rule.name, rule.use) for rule in rules] == [("child", ("c.x",)), ("parent", ("b.x",))]


def test_a_parent_that_is_reached_twice_is_read_once(write: Write) -> None:
    write("version: 1\nrules:\n  - {name: root, match: {}, use: a.x}\n", "root.yaml")
    write("version: 1\nextends: root\n", "left.yaml")
    write("version: 1\nextends: root\n", "right.yaml")
    path = write("version: 1\nextends: [left, right]\n")
    assert [rule.name for rule in read_rule_set([path]).rules] == ["root"]


def test_extending_in_a_circle_is_an_error(write: Write) -> None:
    write("version: 1\nextends: b\n", "a.yaml")
    path = write("version: 1\nextends: a\n", "b.yaml")
    with pytest.raises(RuleError, match=r"a\.yaml:2: the file extends itself: b\.yaml -> a\.yaml -> b\.yaml"):
        read_rule_set([path])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{}", "{op: linear}"),
        ("{op: [linear, mlp]}", "{op: linear, layers: 3-5}"),
        ("{layers: 0-9}", "{layers: '1,4-6'}"),
        ("{layers: 2-}", "{layers: 3-}"),
        ("{name: '*'}", "{name: head}"),
        ("{op: linear}", "{op: linear, feature: bf16}"),
    ],
)
def test_a_rule_that_no_model_can_reach_is_an_error(write: Write, first: str, second: str) -> None:
    rules = f"version: 1\nrules:\n  - {{name: one, match: {first}, use: a.x}}\n"
    path = write(rules + f"  - {{name: two, match: {second}, use: a.x, optional: true}}\n")
    with pytest.raises(RuleError, match=rf"{path}:4: rule 'two' can never fire: rule 'one' \(line 3\)"):
        read_rule_set([path])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{op: linear, format: Q8_0}", "{op: linear}"),
        ("{op: linear, feature: bf16}", "{op: linear}"),
        ("{layers: 0-9}", "{layers: 5-12}"),
        ("{layers: 0-9}", "{op: linear}"),
        ("{family: llama}", "{family: [llama, qwen3_moe]}"),
    ],
)
def test_a_narrower_rule_may_come_first(write: Write, first: str, second: str) -> None:
    rules = f"version: 1\nrules:\n  - {{name: one, match: {first}, use: a.x}}\n"
    assert len(read_rule_set([write(rules + f"  - {{name: two, match: {second}, use: a.x}}\n")]).rules) == 2


def test_the_users_file_comes_first_then_the_overlay_then_the_base(registry: Registry, write: Write) -> None:
    user = write("version: 1\nrules:\n  - {name: mine, match: {op: linear}, use: reference.linear}\n")
    rules = load_rules("llama", "cpu", user, registry)
    assert rules.rules[0].name == "mine"
    assert [path.name for path in rules.files][:3] == ["rules.yaml", "cpu.yaml", "llama.yaml"]


def test_a_variable_of_the_user_that_nothing_uses_is_an_error(registry: Registry, write: Write) -> None:
    user = write("version: 1\nvars:\n  atention: reference.attention\n")
    with pytest.raises(RuleError, match=rf"{user}:3: variable 'atention' is set, but no rule uses it"):
        load_rules("llama", "cpu", user, registry)


def test_a_shipped_file_is_found_by_name_and_an_unknown_one_names_the_shipped(registry: Registry) -> None:
    assert load_rules("llama", "cpu", "reference", registry).files[0] == shipped_rules() / "reference.yaml"
    with pytest.raises(RuleError, match=r"no rule file 'referense'\n.*reference"):
        load_rules("llama", "cpu", "referense", registry)


def test_an_unknown_family_names_the_known(registry: Registry) -> None:
    with pytest.raises(RuleError, match=r"base/gpt\.yaml\n.*deepseek_v3.*llama"):
        load_rules("gpt", "cpu", None, registry)


def test_a_plugins_folder_is_searched_after_the_shipped(registry: Registry, write: Write) -> None:
    path = write("version: 1\nrules:\n  - {name: overlay, match: {op: mlp}, use: accel.mlp}\n", "own/accel.yaml")
    registry._rule_paths.append(path.parent)
    assert load_rules("llama", "accel:1", None, registry).files[0] == path
