"""Finds and reads rule files: the base of a family, a backend's overlay before it, the user's file before both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ktcore.backend.registry import Registry, split_device
from ktcore.errors import RuleError
from ktcore.rules.located import Located, read_yaml
from ktcore.rules.schema import FILE_KEYS, VERSION, Rule, check_keys, parse_rule
from ktcore.rules.variables import Variables


@dataclass(frozen=True)
class RuleSet:
    """Rules in the order they are tried.

    Attributes:
        files: where they came from, first tried first.
        strict: no fallback anywhere.
    """

    rules: tuple[Rule, ...]
    files: tuple[Path, ...] = ()
    strict: bool = False


@dataclass(frozen=True)
class _File:
    path: Path
    vars: dict[str, Located]
    rules: list[Located]
    strict: bool


def load_rules(family: str, backend: str, user: str | Path | None, registry: Registry) -> RuleSet:
    """The rules for a model family on a backend.

    Args:
        family: names the base file, `base/<family>.yaml`.
        backend: "name" or "name:index"; names the overlay, `<backend>.yaml`, which may be absent.
        user: a file whose rules are tried first, or the name of a shipped one ("reference").

    Raises:
        RuleError: a file is absent or malformed, with file and line.
    """
    folders = rule_folders(registry)
    name, _ = split_device(backend)
    base = _find(f"base/{family}", folders)
    if base is None:
        known = sorted({path.stem for folder in folders for path in (folder / "base").glob("*.yaml")})
        raise RuleError(f"there is no rule file base/{family}.yaml", f"families with rules: {', '.join(known)}")
    overlay = _find(name, folders)
    heads = [path for path in (_user_file(user, folders) if user is not None else None, overlay, base) if path]
    return read_rule_set(heads, folders, check_unused=user is not None)


def read_rule_set(heads: Sequence[Path], folders: Sequence[Path] = (), check_unused: bool = False) -> RuleSet:
    """Read files, the first tried first, each followed by what it extends; a file is read once.

    A variable takes its value from the first file that sets it.

    Args:
        check_unused: a variable that the first file sets and no rule uses is an error.
    """
    files: dict[Path, _File] = {}
    for head in heads:
        for file in _chain(head, folders, ()):
            files.setdefault(file.path.resolve(), file)
    values: dict[str, Located] = {}
    for file in files.values():
        for name, value in file.vars.items():
            values.setdefault(name, value)
    variables = Variables(values)
    rules: list[Rule] = []
    for file in files.values():
        own = [parse_rule(variables.fill(source)) for source in file.rules]
        _check_order(own)
        rules += own
    if check_unused and heads:
        for name, value in next(iter(files.values())).vars.items():
            if name not in variables.used:
                known = ", ".join(sorted(variables.used)) or "none"
                raise value.where.error(f"variable '{name}' is set, but no rule uses it", f"used ones: {known}")
    return RuleSet(
        tuple(rules), tuple(file.path for file in files.values()), any(file.strict for file in files.values())
    )


def shipped_rules() -> Path:
    """The folder of rule files that come with ktcore: inside of an installed package, else beside it in a checkout.

    Raises:
        RuleError: there is neither.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "shipped_rules", package.parent / "rules"):
        if (folder / "base").is_dir():
            return folder
    raise RuleError(f"the shipped rule files are missing from {package}", "reinstall ktcore")


def rule_folders(registry: Registry) -> tuple[Path, ...]:
    """Folders that are searched for rule files: the shipped one first, then those of plugins."""
    return (shipped_rules(), *registry.rule_paths())


def _user_file(user: str | Path, folders: Sequence[Path]) -> Path:
    path = Path(user)
    if path.is_file():
        return path
    found = _find(str(user), folders) if path.suffix == "" else None
    if found is None:
        known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
        raise RuleError(f"there is no rule file '{user}'", f"give a path, or one of the shipped: {', '.join(known)}")
    return found


def _find(name: str, folders: Sequence[Path]) -> Path | None:
    candidates = (folder / f"{name}.yaml" for folder in folders)
    return next((path for path in candidates if path.is_file()), None)


def _chain(path: Path, folders: Sequence[Path], above: tuple[Path, ...]) -> Iterator[_File]:
    """A file and all that it extends, the extending one first."""
    root = read_yaml(path)
    given = root.mapping("a rule file")
    check_keys(given, FILE_KEYS, "a rule file")
    if "version" not in given:
        raise root.where.error("the file has no 'version'", f"add 'version: {VERSION}'")
    if given["version"].value != VERSION:
        raise given["version"].where.error(f"version {given['version'].plain()!r} is not known; this ktcore reads 1")
    sources = given["rules"].value if "rules" in given else []
    if not isinstance(sources, list):
        raise given["rules"].where.error("rules must be a list")
    yield _File(
        path=path,
        vars=dict(given["vars"].mapping("vars")) if "vars" in given else {},
        rules=sources,
        strict=given["strict"].flag("strict") if "strict" in given else False,
    )
    for parent in _parents(given.get("extends"), path, folders):
        below = (*above, path.resolve())
        if parent.resolve() in below:
            loop = " -> ".join(p.name for p in (*below, parent))
            raise given["extends"].where.error(f"the file extends itself: {loop}")
        yield from _chain(parent, folders, below)


def _parents(extends: Located | None, path: Path, folders: Sequence[Path]) -> list[Path]:
    if extends is None:
        return []
    found = []
    for name in extends.texts("extends"):
        relative = path.parent / name
        parent = relative if relative.is_file() else _find(name, (path.parent, *folders))
        if parent is None:
            raise extends.where.error(f"the file extends '{name}', which is neither beside it nor among shipped rules")
        found.append(parent)
    return found


def _check_order(rules: Sequence[Rule]) -> None:
    """A rule whose nodes an earlier one of the same file takes, whatever the model, is a mistake."""
    for first, second in combinations(rules, 2):
        if first.match.includes(second.match):
            raise second.where.error(
                f"rule '{second.name}' can never fire: rule '{first.name}' (line {first.where.line}) takes "
                "all of its nodes",
                "put the narrower rule first",
            )
