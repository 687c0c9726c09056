"""What keys mean that a configuration does not hold: per family for config.json, as llama.cpp has it for GGUF."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

DERIVED: Final = object()
"""Stands in a table for a value that follows from other keys; the builder that reads the key hands it over."""

ALWAYS: Final = ""
"""Of a bias that no key asks for."""

LLAMA_CPP: Mapping[str, Any] = MappingProxyType(
    {
        "attention.head_count_kv": DERIVED,  # head_count
        "attention.key_length": DERIVED,  # embedding_length / head_count
        "attention.value_length": DERIVED,  # likewise
        "rope.dimension_count": DERIVED,  # key_length
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": DERIVED,  # rope.scale_linear, its older name
        "rope.scale_linear": 1.0,
        "rope.scaling.original_context_length": DERIVED,  # context_length
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "rope.scaling.yarn_log_multiplier": 0.0,
        "expert_count": 0,
        "expert_weights_scale": 1.0,
        "nextn_predict_layers": 0,
    }
)
"""GGUF keys that every architecture may leave out: `load_hparams` of llama.cpp's src/llama-model.cpp, and
src/llama-hparams.h. What an architecture adds is in `load_arch_hparams` of its file in src/models."""


@dataclass(frozen=True)
class Defaults:
    """A family's table, kept next to its builder. A key that is not in it must be in the checkpoint.

    Attributes:
        hub: key of config.json -> what the family's configuration class in transformers takes where it is absent.
            None means what null means; `DERIVED` leaves it to the builder.
        null: key of config.json -> what null stands for. Of all other keys null is refused, as the class does it.
        biases: last part of a projection's node name -> the key of config.json that says whether it has a bias, or
            `ALWAYS`. Asked only where there are no weights; else the tensors tell.
        gguf: key without the architecture's prefix -> what llama.cpp takes where it is absent, beyond `LLAMA_CPP`.
        only: key of config.json -> the values that are known; any other is refused by the key's name.
        left_out: beginnings of tensors' names that belong to a part which is not run -> which part.
    """

    hub: Mapping[str, Any] = field(default_factory=dict)
    null: Mapping[str, Any] = field(default_factory=dict)
    gguf: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Collection[Any]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


EMPTY = Defaults()
"""Of settings that are read before the family is known: every key is needed."""
