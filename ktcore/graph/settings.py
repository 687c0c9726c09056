"""A model's hyper-parameters, read by their config.json name or their GGUF key, whichever the checkpoint has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ktcore.errors import ArchitectureError
from ktcore.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ktcore.graph.mixed import OtherExperts

T = TypeVar("T")
_REQUIRED: Any = object()


class Settings:
    """Configuration of one checkpoint.

    Attributes:
        checkpoint: where it comes from.
        config: the keys and values; those of the checkpoint unless a section is given.
        gguf: True for GGUF files, False for Hugging Face folders.
        architecture: `general.architecture` or `model_type`.
        experts: routed experts of another checkpoint, which take the place of this one's; or None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        section: Mapping[str, Any] | None = None,
        experts: OtherExperts | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.experts = experts
        if section is not None and not isinstance(section, Mapping):
            raise ArchitectureError(f"{checkpoint.path}: {section!r} stands where an object of settings belongs")
        self.config = checkpoint.config if section is None else section
        self.gguf = checkpoint.kind == "gguf"
        key = "general.architecture" if self.gguf else "model_type"
        name = checkpoint.config.get(key)
        if not isinstance(name, str):
            raise ArchitectureError(f"{checkpoint.path}: '{key}' is missing, so the architecture is unknown")
        self.architecture = name

    @overload
    def get(self, hf: str, gguf: str, *, layer: int | None = None) -> Any: ...
    @overload
    def get(self, hf: str, gguf: str, default: T, *, layer: int | None = None) -> Any | T: ...
    def get(self, hf: str, gguf: str, default: Any = _REQUIRED, *, layer: int | None = None) -> Any:
        """The value of a hyper-parameter; null counts as absent.

        Args:
            hf: name in config.json, or several with "|" between them; "" when it does not exist there.
            gguf: GGUF key without the architecture's prefix, or ""; some writers store an array with a value a layer.
            layer: which item of such an array to take.

        Raises:
            ArchitectureError: absent, and there is no default.
        """
        keys = [f"{self.architecture}.{gguf}"] if self.gguf else hf.split("|")
        if (gguf if self.gguf else hf) == "":
            return self._absent(hf or gguf, default)
        for key in keys:
            value = self.config.get(key)
            if value is not None:
                return self._item(key, value, layer)
        return self._absent(" or ".join(keys), default)

    def integer(self, hf: str, gguf: str, default: int = _REQUIRED, *, least: int = 1, layer: int | None = None) -> int:
        """A whole number of at least `least`; ArchitectureError when it is missing or something else."""
        value = self.get(hf, gguf, default, layer=layer)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(f"{hf or gguf} is {value!r}, a whole number of at least {least} is needed")
        return value

    def number(self, hf: str, gguf: str, default: float = _REQUIRED, *, positive: bool = False) -> float:
        """A finite number, not negative, and with `positive` not zero; ArchitectureError otherwise."""
        value = self.get(hf, gguf, default)
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if not fine or value > 1e300 or (positive and value == 0):
            raise self.error(f"{hf or gguf} is {value!r}, a number {'above 0' if positive else 'from 0 up'} is needed")
        return float(value)

    def sequence(self, hf: str) -> Sequence[Any]:
        """An array of config.json, empty when it is absent; ArchitectureError when it is something else."""
        value: Any = self.get(hf, "", [])
        if not isinstance(value, list):
            raise self.error(f"{hf} is {value!r}, an array is needed")
        return value

    def error(self, message: str, hint: str | None = None) -> ArchitectureError:
        """An error that names the checkpoint; the caller raises it."""
        return ArchitectureError(f"{self.checkpoint.path}: {message}", hint)

    def _item(self, key: str, value: Any, layer: int | None) -> Any:
        if layer is None or isinstance(value, (str, int, float)):
            return value
        if isinstance(value, Mapping) or layer >= len(value):
            raise self.error(f"{key} has {len(value)} items, none for layer {layer}")
        return value[layer]

    def _absent(self, keys: str, default: Any) -> Any:
        if default is _REQUIRED:
            raise self.error(f"'{keys}' is missing, which architecture '{self.architecture}' needs")
        return default
