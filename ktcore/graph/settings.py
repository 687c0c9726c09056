"""A model's hyper-parameters, read by their config.json name or their GGUF key, whichever the checkpoint has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktcore.errors import ArchitectureError
from ktcore.graph.defaults import DERIVED, EMPTY, LLAMA_CPP, Defaults
from ktcore.graph.wrappers import WRAPPERS, Wrapper
from ktcore.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ktcore.graph.mixed import OtherExperts

_NONE: Any = object()
MAX_LAYERS = 4096
"""Beyond any model's."""


class Settings:
    """Configuration of one checkpoint.

    What an absent key means is never said where it is read: it stands in the family's `Defaults`, or the key is needed.

    Attributes:
        checkpoint: where it comes from.
        config: the keys and values; those of the checkpoint unless a section is given.
        gguf: True for GGUF files, False for Hugging Face folders.
        architecture: `general.architecture` or `model_type`; of the language model where it is a part.
        wrapper: what the language model is a part of, in hub folders; None where it is alone.
        experts: routed experts of another checkpoint, which take the place of this one's; or None.
        defaults: what absent keys mean, and null.
        further: the layer that predicts further tokens is wanted, too.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        section: Mapping[str, Any] | None = None,
        experts: OtherExperts | None = None,
        defaults: Defaults = EMPTY,
        further: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.experts = experts
        self.defaults = defaults
        self.further = further
        if section is not None and not isinstance(section, Mapping):
            raise ArchitectureError(f"{checkpoint.path}: {section!r} stands where an object of settings belongs")
        self.gguf = checkpoint.kind == "gguf"
        self.wrapper: Wrapper | None = None
        whole = checkpoint.config
        key = "general.architecture" if self.gguf else "model_type"
        name = whole.get(key)
        if not self.gguf and isinstance(name, str) and name in WRAPPERS:
            self.wrapper = WRAPPERS[name]
            whole = self._text(whole, self.wrapper)
            name = whole.get(key)
        if not isinstance(name, str):
            raise ArchitectureError(f"{checkpoint.path}: '{key}' is missing, so the architecture is unknown")
        self.config = whole if section is None else section
        self.architecture = name

    def under(self, defaults: Defaults) -> Settings:
        """The same settings, read with the table of a family.

        Raises:
            ArchitectureError: a key has a value that the family's models here do not know.
        """
        for key, known in {} if self.gguf else defaults.only.items():
            if key in self.config and self.config[key] not in known:
                raise self.error(
                    f"{key} is {self.config[key]!r}, which architecture '{self.architecture}' is not known to do here",
                    f"known: {', '.join(repr(value) for value in known)}",
                )
        return Settings(self.checkpoint, self.config, self.experts, defaults, self.further)

    def within(self, section: Any, defaults: Defaults | None = None) -> Settings:
        """Settings of a section (an object in config.json); ArchitectureError when it is something else."""
        if section is None:
            raise self.error("null stands where an object of settings belongs")
        table = self.defaults if defaults is None else defaults
        return Settings(self.checkpoint, section, self.experts, table, self.further)

    def get(self, hf: str, gguf: str, *, without: Any = _NONE, derived: Any = _NONE, layer: int | None = None) -> Any:
        """The value of a hyper-parameter, or what the family's table says of its absence.

        Args:
            hf: name in config.json, or several with "|" between them; "" when it does not exist there.
            gguf: GGUF key without the architecture's prefix, or ""; some writers store an array with a value a layer.
            without: what holds in the kind of checkpoint that has no such key at all.
            derived: the value that follows from other keys, where the table says `DERIVED`.
            layer: which item of such an array to take.

        Raises:
            ArchitectureError: absent or null, and the family's table has nothing for it.
        """
        if not (gguf if self.gguf else hf):
            return _handed(without, f"'{hf or gguf}' is read without saying what holds where it does not exist")
        names = [gguf] if self.gguf else hf.split("|")
        for name in names:
            key = f"{self.architecture}.{name}" if self.gguf else name
            value = self.config.get(key)
            if value is not None:
                return self._item(key, value, layer)
        # GGUF has no null
        if not self.gguf and any(name in self.config for name in names):
            return self._null(next(name for name in names if name in self.config), derived)
        return self._absent(names, derived)

    def given(self, hf: str, gguf: str = "") -> Any:
        """The value when the configuration holds one, else None."""
        return self.config.get(f"{self.architecture}.{gguf}" if self.gguf else hf)

    def integer(
        self,
        hf: str,
        gguf: str,
        *,
        least: int = 1,
        without: int = _NONE,
        derived: int = _NONE,
        layer: int | None = None,
    ) -> int:
        """A whole number of at least `least`; ArchitectureError when it is missing or something else."""
        value = self.get(hf, gguf, without=without, derived=derived, layer=layer)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(f"{self._name(hf, gguf)} is {value!r}, a whole number of at least {least} is needed")
        return value

    def layers(self) -> int:
        """How many layers the configuration counts; ArchitectureError beyond MAX_LAYERS, before they are listed."""
        count = self.integer("num_hidden_layers", "block_count")
        if count > MAX_LAYERS:
            key = self._name("num_hidden_layers", "block_count")
            raise self.error(f"{key} is {count}, no model has more than {MAX_LAYERS} layers")
        return count

    def number(
        self, hf: str, gguf: str, *, positive: bool = False, without: float = _NONE, derived: float = _NONE
    ) -> float:
        """A finite number, not negative, and with `positive` not zero; ArchitectureError otherwise."""
        value = self.get(hf, gguf, without=without, derived=derived)
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if not fine or value > 1e300 or (positive and value == 0):
            needed = "above 0" if positive else "from 0 up"
            raise self.error(f"{self._name(hf, gguf)} is {value!r}, a number {needed} is needed")
        return float(value)

    def flag(self, hf: str, gguf: str, *, without: bool = _NONE) -> bool:
        """True or false; ArchitectureError when it is missing or something else."""
        value = self.get(hf, gguf, without=without)
        if not isinstance(value, bool):
            raise self.error(f"{self._name(hf, gguf)} is {value!r}, true or false is needed")
        return value

    def sequence(self, hf: str) -> Sequence[Any]:
        """An array of config.json, empty in GGUF; ArchitectureError when it is missing or something else."""
        value: Any = self.get(hf, "", without=[])
        if not isinstance(value, list):
            raise self.error(f"{hf} is {value!r}, an array is needed")
        return value

    def about(self, *keys: tuple[str, str]) -> str:
        """A hint that names settings, each by its name in config.json and its GGUF key."""
        return f"see {', '.join(self._name(*pair) for pair in keys)}, or what stands for it where it is absent"

    def error(self, message: str, hint: str | None = None) -> ArchitectureError:
        """An error that names the checkpoint; the caller raises it."""
        return ArchitectureError(f"{self.checkpoint.path}: {message}", hint)

    def _text(self, whole: Mapping[str, Any], wrapper: Wrapper) -> Mapping[str, Any]:
        if "text_config" not in whole:
            raise ArchitectureError(
                f"{self.checkpoint.path}: 'text_config' is missing, which architecture '{whole['model_type']}' needs"
            )
        section = wrapper.section(whole)
        if not isinstance(section, Mapping):
            found = "null" if section is None else repr(section)
            raise ArchitectureError(
                f"{self.checkpoint.path}: 'text_config' is {found}, an object of settings is needed"
            )
        return section

    def _name(self, hf: str, gguf: str) -> str:
        return gguf if self.gguf else hf

    def _item(self, key: str, value: Any, layer: int | None) -> Any:
        if layer is None or isinstance(value, (str, int, float)):
            return value
        if isinstance(value, Mapping) or layer >= len(value):
            raise self.error(f"{key} has {len(value)} items, none for layer {layer}")
        return value[layer]

    def _absent(self, names: Sequence[str], derived: Any) -> Any:
        table = {**LLAMA_CPP, **self.defaults.gguf} if self.gguf else self.defaults.hub
        if names[0] not in table:
            keys = f"{self.architecture}.{names[0]}" if self.gguf else " or ".join(names)
            raise self.error(f"'{keys}' is missing, which architecture '{self.architecture}' needs")
        value = table[names[0]]
        if value is None:
            return self._null(names[0], derived)
        return _derived(names[0], value, derived)

    def _null(self, name: str, derived: Any) -> Any:
        if name not in self.defaults.null:
            optional = name in self.defaults.hub
            raise self.error(
                f"'{name}' is null, which means nothing to architecture '{self.architecture}'",
                "leave the key out for its usual value, or give one" if optional else "give a value",
            )
        return _derived(name, self.defaults.null[name], derived)


def _derived(name: str, value: Any, derived: Any) -> Any:
    if value is not DERIVED:
        return value
    return _handed(derived, f"the table says that '{name}' is derived, but its reader hands nothing over")


def _handed(value: Any, complaint: str) -> Any:
    if value is _NONE:
        raise TypeError(complaint)  # of a builder, not of a checkpoint
    return value
