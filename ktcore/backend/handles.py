"""What an implementation handles: it names the spec fields whose values other than the default it computes, and a spec
with any other such field is refused here, by name, so that a field added later is never ignored by older plugins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.implementation import Implementation, Support, Unsupported
from ktcore.ops.base import Spec
from ktcore.ops.rope import RopeScaling


def answer(implementation: Implementation, spec: Spec, device: Capabilities) -> Support:
    """Whether the implementation runs `spec` on `device`: it handles every field in use, and its `supports` agrees."""
    missing = unhandled(implementation, spec)
    if missing:
        return Unsupported(f"it does not handle {', '.join(missing)}")
    return implementation.supports(spec, device)


def unhandled(implementation: Implementation, spec: Spec) -> list[str]:
    """ "field=value" of every field in use that the implementation does not name in `handles`."""
    used = fields_in_use(spec, with_parts=implementation.fused)
    return [f"{name}={_shown(value)}" for name, value in used if name not in implementation.handles]


def fields_in_use(spec: Spec, with_parts: bool) -> Iterator[tuple[str, Any]]:
    """Name and value of every field with a default that has another value; those inside of plain values by dotted name.

    Formats are left out: `supports` tells which ones can be read, and a format that it does not list is refused there.

    Args:
        with_parts: fields of the parts too, by dotted role, as a fused implementation computes them.
    """
    for f in fields(spec):
        value = getattr(spec, f.name)
        if isinstance(value, Spec):
            if is_optional(f):
                yield f.name, value
            if with_parts:
                yield from ((f"{f.name}.{name}", inner) for name, inner in fields_in_use(value, True))
        elif is_optional(f) and value != f.default:
            yield f.name, value
            if is_dataclass(value) and not isinstance(value, type):
                yield from ((f"{f.name}.{i.name}", getattr(value, i.name)) for i in fields(value) if _differs(i, value))


def is_optional(f: Field[Any]) -> bool:
    """Whether a field may be absent from a model: it has a default, and is no format."""
    return f.default is not MISSING and not f.name.endswith("_format")


def known_names(spec_type: type[Spec], with_parts: bool) -> frozenset[str]:
    """Every name that `handles` may hold for an operator."""
    found: set[str] = set()
    hints = get_type_hints(spec_type)
    for f in fields(spec_type):
        kind = _dataclass_of(hints[f.name])
        if is_optional(f):
            found.add(f.name)
        if kind is not None and issubclass(kind, Spec):
            found |= nested(f.name, known_names(kind, True)) if with_parts else set()
        elif kind is not None:
            found |= nested(f.name, (i.name for i in fields(kind) if i.default is not MISSING))
    return frozenset(found)


def nested(role: str, names: Iterable[str]) -> frozenset[str]:
    """The names below `role`: {"cache.window"} of "cache" and {"window"}."""
    return frozenset(f"{role}.{name}" for name in names)


FREQUENCIES = frozenset({"scaling", "freq_factors", "turning"}) | nested(
    "scaling", (f.name for f in fields(RopeScaling) if f.default is not MISSING)
)
"""Of a `RopeSpec`: whatever takes its frequencies from `ktcore.ops.rope.inverse_frequencies` handles all of these."""


def _differs(f: Field[Any], holder: Any) -> bool:
    return f.default is not MISSING and getattr(holder, f.name) != f.default


def _dataclass_of(hint: Any) -> Any:
    """The dataclass in `hint`, which may allow None too."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and is_dataclass(o)), None)


def _shown(value: Any) -> str:
    """A short form: a part or a plain value by its kind alone."""
    return type(value).__name__ if is_dataclass(value) else str(value)
