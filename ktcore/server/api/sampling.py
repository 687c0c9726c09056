"""From an API's sampling fields to the engine's parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ktcore.errors import FieldError
from ktcore.ops.sampling import SamplingParams

# Dividing logits by less could overflow float32; so close to 0 the likeliest token is drawn anyway.
_COLDEST = 1e-6
RANDOM = -1
"""As a seed: a fresh one each time, as llama.cpp, Ollama and SGLang have it."""


def params_for(vocab: int, **given: Any) -> SamplingParams:
    """Checked parameters; what is None keeps its default, and a temperature next to 0 is 0.

    Args:
        vocab: size of the model's vocabulary.
        given: fields of `SamplingParams`.

    Raises:
        RequestError: a value is out of range.
    """
    known = {name: value for name, value in given.items() if value is not None}
    if known.get("temperature", 1.0) < _COLDEST:
        known["temperature"] = 0.0
    if known.get("seed") == RANDOM:
        del known["seed"]
    bad = next((i for i in known.get("logit_bias", ()) if not 0 <= i < vocab), None)
    if bad is not None:
        raise FieldError("logit_bias", f"token id {bad} is outside of the vocabulary of {vocab}")
    return SamplingParams(**known)


def for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of several answers to the same prompt: each has its own seed, made from the one given."""
    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + choice + 2**63) % 2**64 - 2**63)
