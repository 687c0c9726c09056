"""Rotary position embedding (Su et al., 2021): both pairings, partial width, and the frequency scalings in use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ktcore.ops.base import Spec

Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for contexts beyond the trained one.

    kind "linear": f / factor. "llama3": the piecewise blend of LLaMA 3.1. "yarn": Peng et al., 2023, with the
    attention factor 0.1*mscale*ln(factor) + 1 as in transformers' `modeling_rope_utils`.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class RopeSpec(Spec):
    """Call: x float32 [T, heads, d >= dim], positions int64 [T] -> the same shape; the first `dim` values rotate.

    Attributes:
        turning: only the first so many pairs turn, at the frequencies that they have among all dim/2; 0 for all pairs
            (Gemma-4's "proportional").
        freq_factors: a weight `freq_factors` [dim/2] holds divisors of the frequencies (GGUF `rope_freqs.weight`).
    """

    op: ClassVar[str] = "rope"
    dim: int
    theta: float
    pairing: Pairing
    scaling: RopeScaling | None = None
    freq_factors: bool = False
    turning: int = 0


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's magnitude 0.1 * mscale * ln(factor) + 1, and 1 where the context is not stretched."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(spec: RopeSpec, divisors: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """Angular frequency of each pair, float32 [dim/2], and the factor that cos and sin are multiplied with.

    Args:
        divisors: [dim/2], frequencies are divided by it (only with `freq_factors`).
    """
    freq, factor = _frequencies(spec, divisors)
    if spec.turning:
        freq[spec.turning :] = 0.0
    return freq, factor


def _frequencies(spec: RopeSpec, divisors: torch.Tensor | None) -> tuple[torch.Tensor, float]:
    exponent = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    freq = 1.0 / (spec.theta**exponent)
    if divisors is not None:
        return freq / divisors.float(), 1.0
    s = spec.scaling
    if s is None:
        return freq, 1.0
    if s.kind == "linear":
        return freq / s.factor, 1.0
    if s.kind == "llama3":
        return _llama3(freq, s), 1.0
    return _yarn(freq, spec, s)


def rope(x: torch.Tensor, positions: torch.Tensor, freq: torch.Tensor, factor: float, pairing: Pairing) -> torch.Tensor:
    """Rotate the first 2*len(freq) values of x [T, heads, d] by the angles positions [T] * freq.

    "half" pairs (i, i + dim/2) as GPT-NeoX does, "interleaved" pairs (2i, 2i+1) as GPT-J does; either way the result
    keeps the order of the input.
    """
    dim = 2 * freq.shape[0]
    angle = positions[:, None].float() * freq[None, :].to(x.device)
    cos, sin = (angle.cos() * factor)[:, None, :], (angle.sin() * factor)[:, None, :]
    rotated, rest = x[..., :dim], x[..., dim:]
    if pairing == "half":
        a, b = rotated[..., : dim // 2], rotated[..., dim // 2 :]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


def _llama3(freq: torch.Tensor, s: RopeScaling) -> torch.Tensor:
    wavelength = 2 * math.pi / freq
    low, high = s.original_context / s.low_freq_factor, s.original_context / s.high_freq_factor
    if s.low_freq_factor == s.high_freq_factor:
        return torch.where(wavelength > low, freq / s.factor, freq)
    t = (s.original_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blended = (1 - t) * freq / s.factor + t * freq
    return torch.where(wavelength > low, freq / s.factor, torch.where(wavelength < high, freq, blended))


def _yarn(freq: torch.Tensor, spec: RopeSpec, s: RopeScaling) -> tuple[torch.Tensor, float]:
    def corrected(beta: float) -> float:
        return spec.dim * math.log(s.original_context / (beta * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = corrected(s.beta_fast), corrected(s.beta_slow)
    if s.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, float(spec.dim - 1))
    if low == high:
        high += 0.001
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    scaled = freq / s.factor * ramp + freq * (1 - ramp)
    if s.attention_factor is not None:
        return scaled, s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return scaled, yarn_mscale(s.factor, s.mscale) / yarn_mscale(s.factor, s.mscale_all_dim)
    return scaled, yarn_mscale(s.factor, 1.0)
