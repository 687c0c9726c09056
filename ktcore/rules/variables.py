"""Variables of rule files: `${name}` in any string; a string that is nothing else takes the value as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches

from ktcore.rules.located import Located

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


class Variables:
    """Values by name, and which of them were used."""

    def __init__(self, values: Mapping[str, Located]) -> None:
        self._values = values
        self.used: set[str] = set()

    def fill(self, source: Located, busy: tuple[str, ...] = ()) -> Located:
        """`source` with all variables replaced, in values at any depth.

        Raises:
            RuleError: a variable is not defined, holds itself, or a list or mapping stands inside of a longer string.
        """
        value = source.value
        if isinstance(value, dict):
            return Located({key: self.fill(item, busy) for key, item in value.items()}, source.where)
        if isinstance(value, list):
            return Located([part for item in value for part in self._spliced(item, busy)], source.where)
        if not isinstance(value, str) or "${" not in value:
            return source
        whole = _VARIABLE.fullmatch(value)
        if whole:
            return Located(self._get(whole[1], source, busy).value, source.where)
        return Located(_VARIABLE.sub(lambda m: self._text(m[1], source, busy), value), source.where)

    def _spliced(self, item: Located, busy: tuple[str, ...]) -> list[Located]:
        """A variable that holds a list, named as an item of a list, gives its items."""
        filled = self.fill(item, busy)
        from_variable = isinstance(item.value, str) and isinstance(filled.value, list)
        return list(filled.value) if from_variable else [filled]

    def _text(self, name: str, source: Located, busy: tuple[str, ...]) -> str:
        found = self._get(name, source, busy)
        if isinstance(found.value, (dict, list)) or found.value is None:
            raise source.where.error(f"variable '{name}' is {found.kind} and cannot stand inside of a string")
        return str(found.value)

    def _get(self, name: str, source: Located, busy: tuple[str, ...]) -> Located:
        if name not in self._values:
            near = get_close_matches(name, self._values, 1)
            known = ", ".join(sorted(self._values)) or "none"
            hint = f"did you mean '{near[0]}'?" if near else f"known: {known}"
            raise source.where.error(f"variable '{name}' is not defined", hint)
        if name in busy:
            raise source.where.error(f"variable '{name}' holds itself: {' -> '.join((*busy, name))}")
        self.used.add(name)
        return self.fill(self._values[name], (*busy, name))
