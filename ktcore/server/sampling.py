"""From an API's sampling fields to the engine's parameters."""

from __future__ import annotations

from dataclasses import replace

from ktcore.ops.sampling import SamplingParams

# Dividing logits by less could overflow float32; so close to 0 the likeliest token is drawn anyway.
_COLDEST = 1e-6


def params_for(
    temperature: float, top_p: float, top_k: int, min_p: float, repetition_penalty: float, seed: int | None
) -> SamplingParams:
    """Checked parameters; a temperature next to 0 is 0.

    Raises:
        RequestError: a value is out of range.
    """
    temperature = 0.0 if temperature < _COLDEST else temperature
    return SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)


def for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of several answers to the same prompt: each has its own seed, made from the one given."""
    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + choice + 2**63) % 2**64 - 2**63)
