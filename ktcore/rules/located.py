"""YAML values that remember their file and line, so that every complaint about a rule file can say where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ktcore.errors import RuleError


@dataclass(frozen=True)
class Where:
    """A place in a rule file; lines count from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, message: str, hint: str | None = None) -> RuleError:
        """The error that complains about this place."""
        return RuleError(f"{self}: {message}", hint)


@dataclass(frozen=True)
class Located:
    """A YAML value with its place; mappings and lists hold `Located` values again."""

    value: Any
    where: Where

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def mapping(self, what: str) -> Mapping[str, Located]:
        """The value as a mapping; RuleError otherwise."""
        if not isinstance(self.value, dict):
            raise self.where.error(f"{what} must be a mapping, not {self.kind}")
        return self.value

    def text(self, what: str) -> str:
        """The value as a string; RuleError otherwise."""
        if not isinstance(self.value, str):
            raise self.where.error(f"{what} must be a string, not {self.kind}")
        return self.value

    def flag(self, what: str) -> bool:
        """The value as true or false; RuleError otherwise."""
        if not isinstance(self.value, bool):
            raise self.where.error(f"{what} must be true or false, not {self.plain()!r}")
        return self.value

    def texts(self, what: str) -> tuple[str, ...]:
        """A string, or a non-empty list of strings, as a tuple; RuleError otherwise."""
        items = self.value if isinstance(self.value, list) else [self]
        if not items:
            raise self.where.error(f"{what} is an empty list")
        return tuple(item.text(what) for item in items)

    @property
    def kind(self) -> str:
        """What the value is, in YAML's words."""
        names = {dict: "a mapping", list: "a list", str: "a string", type(None): "nothing"}
        return names.get(type(self.value), f"{self.value!r}")


def read_yaml(path: Path) -> Located:
    """Read one YAML document with places.

    Raises:
        RuleError: the file cannot be read, is not YAML, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RuleError(f"{path}: the rule file cannot be read: {error}") from error
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise Where(path, 1).error("the rule file is empty", "it needs at least 'version: 1' and 'rules:'")
        return _convert(root, path, loader, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Where(path, line).error(f"not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise Where(path, 1).error(f"not YAML: {error}") from error
    finally:
        loader.dispose()


def _convert(node: yaml.Node, path: Path, loader: yaml.SafeLoader, above: tuple[int, ...]) -> Located:
    where = Where(path, node.start_mark.line + 1)
    if id(node) in above:
        raise where.error("an alias holds itself")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        return Located([_convert(item, path, loader, above) for item in node.value], where)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Located] = {}
        for key, item in node.value:
            name = str(key.value)
            if name in found:
                raise Where(path, key.start_mark.line + 1).error(f"the key '{name}' is repeated")
            found[name] = _convert(item, path, loader, above)
        return Located(found, where)
    return Located(loader.construct_object(node), where)
