"""Settings that config.json holds layer by layer: the kinds of layers, and `per_layer_config` of transformers 5."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ktcore.graph.settings import Settings

KEY = "per_layer_config"
SLIDING, FULL = "sliding_attention", "full_attention"


def own_settings(s: Settings, layer: int, known: Collection[str]) -> Mapping[str, Any] | None:
    """What `per_layer_config` says of a layer, {} where it says nothing of it; None where there is no such object.

    Args:
        known: keys that the family reads.

    Raises:
        ArchitectureError: it is no object of objects, or holds another key.
    """
    found = s.config.get(KEY)
    if found is None:
        return None
    own = found.get(str(layer), {}) if isinstance(found, Mapping) else found
    if not isinstance(own, Mapping):
        raise s.error(f"{KEY} is {found!r}, an object with an object of settings a layer is needed")
    for key in own:
        if key not in known:
            raise s.error(f"{KEY} has '{key}' for layer {layer}, known are {', '.join(sorted(known))}")
    return own


def own_count(s: Settings, own: Mapping[str, Any], key: str, usual: int) -> int:
    """A whole number of a layer's own settings, `usual` where they do not hold it."""
    value = own.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise s.error(f"{key} of {KEY} is {value!r}, a whole number of at least 1 is needed")
    return value


def kind_of(s: Settings, layer: int, usual: str) -> str:
    """What `layer_types` says of a layer, SLIDING or FULL; `usual` where it is absent or empty.

    Raises:
        ArchitectureError: another word, or none for the layer.
    """
    kinds = s.sequence("layer_types")
    kind = usual if not kinds else kinds[layer] if layer < len(kinds) else None
    if kind not in (SLIDING, FULL):
        raise s.error(f"layer_types says {kind!r} of layer {layer}", f"known: {SLIDING}, {FULL}")
    return str(kind)
