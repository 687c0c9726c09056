"""Truth of the operators that look at one token at a time: embedding, linear, RMSNorm, RoPE, MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.ops import ClampedGLU, LinearSpec, MLPSpec, RMSNormSpec, RopeScaling, RopeSpec

Values = Mapping[str, torch.Tensor]


def linear(spec: LinearSpec, w: Values, x: torch.Tensor, a: Arithmetic, prefix: str = "") -> torch.Tensor:
    """x [T, in] -> [T, out]."""
    y = a.matmul(x, w[f"{prefix}weight"])
    y = y + a.cast(w[f"{prefix}bias"]) if spec.bias else y
    return spec.softcap * (1 - 2 / (torch.exp(2 * y / spec.softcap) + 1)) if spec.softcap else y


def rms_norm(spec: RMSNormSpec, w: Values, x: torch.Tensor, a: Arithmetic, prefix: str = "") -> torch.Tensor:
    """Over the last axis."""
    x = a.cast(x)
    mean_square = (x * x).sum(-1, keepdim=True) / spec.dim
    y = x / torch.sqrt(mean_square + spec.eps)
    y = y * (a.cast(w[f"{prefix}weight"]) + spec.offset) if spec.weight_format else y
    return y * spec.scale


def mlp(spec: MLPSpec, w: Values, x: torch.Tensor, a: Arithmetic, prefix: str = "") -> torch.Tensor:
    """x [T, hidden] -> [T, hidden]."""
    n = rms_norm(spec.norm, w, x, a, f"{prefix}norm.") if spec.norm else a.cast(x)
    gate = linear(spec.gate, w, n, a, f"{prefix}gate.")
    up = linear(spec.up, w, n, a, f"{prefix}up.")
    y = linear(spec.down, w, between(gate, up, spec.activation, spec.clamped), a, f"{prefix}down.")
    y = rms_norm(spec.post_norm, w, y, a, f"{prefix}post_norm.") if spec.post_norm else y
    y = a.cast(x) + y if spec.residual else y
    return y * a.cast(w[f"{prefix}out_scale"]) if spec.out_scale else y


def between(gate: torch.Tensor, up: torch.Tensor, name: str, clamped: ClampedGLU | None) -> torch.Tensor:
    """act(gate) * up, or (up + plus) * gate / (1 + e^(-alpha gate)), up within the limit and so is gate, or what it has
    become by then."""
    if clamped is None:
        return activate(gate, name) * up
    top = torch.tensor(clamped.limit, dtype=gate.dtype)
    if not clamped.after:
        gate = torch.where(gate > top, top, gate)
    gate = gate / (1 + torch.exp(-clamped.alpha * gate))
    if clamped.after:
        gate = torch.where(gate > top, top, gate)
    return (torch.where(up > top, top, torch.where(up < -top, -top, up)) + clamped.plus) * gate


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation of that name, by its formula."""
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "relu":
        return x.clamp(min=0)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rope(
    spec: RopeSpec, w: Values, x: torch.Tensor, positions: torch.Tensor, a: Arithmetic, prefix: str = ""
) -> torch.Tensor:
    """x [T, heads, d], positions [T]: pairs as complex numbers, turned by their angle."""
    freq, factor = _frequencies(spec, w.get(f"{prefix}freq_factors"))
    if spec.turning:
        freq = freq * (torch.arange(len(freq)) < spec.turning)
    x = a.cast(x)
    # float32 is what angles are computed in by everyone; below it no model works
    kind = torch.float64 if a.compute == torch.float64 else torch.float32
    angle = positions[:, None].to(kind) * freq[None, :].to(kind)
    turn = torch.polar(torch.full_like(angle, factor), angle)[:, None, :]
    part, rest = x[..., : spec.dim].to(kind), x[..., spec.dim :]
    if spec.pairing == "interleaved":
        pairs = part.reshape(*part.shape[:-1], -1, 2)
    else:
        pairs = part.reshape(*part.shape[:-1], 2, -1).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    back = turned if spec.pairing == "interleaved" else turned.transpose(-1, -2)
    return torch.cat((a.cast(back.flatten(-2)), rest), -1)


def _frequencies(spec: RopeSpec, divisors: torch.Tensor | None) -> tuple[torch.Tensor, float]:
    freq = torch.tensor([spec.theta ** (-2 * i / spec.dim) for i in range(spec.dim // 2)], dtype=torch.float64)
    s = spec.scaling
    if divisors is not None:
        return freq / divisors.double(), 1.0
    if s is None:
        return freq, 1.0
    if s.kind == "linear":
        return freq / s.factor, 1.0
    if s.kind == "llama3":
        return torch.stack([_llama3(f, s) for f in freq]), 1.0
    return _yarn(freq, spec, s)


def _llama3(f: torch.Tensor, s: RopeScaling) -> torch.Tensor:
    """Bands of LLaMA 3.1: long waves stretched, short ones kept, a linear blend of the frequency between."""
    turns = s.original_context * float(f) / (2 * math.pi)
    if turns < s.low_freq_factor:
        return f / s.factor
    if turns > s.high_freq_factor:
        return f
    kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return f * (kept + (1 - kept) / s.factor)


def _yarn(freq: torch.Tensor, spec: RopeSpec, s: RopeScaling) -> tuple[torch.Tensor, float]:
    """Peng et al., 2023, section 3.2: pairs that turn often are kept, those that turn seldom are stretched."""

    def pair_that_turns(times: float) -> float:
        return spec.dim * math.log(s.original_context / (times * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = pair_that_turns(s.beta_fast), pair_that_turns(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    high = high + 0.001 if low == high else high
    stretched = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(spec.dim // 2)]
    mix = torch.tensor([r / s.factor + (1 - r) for r in stretched], dtype=torch.float64)
    return freq * mix, _yarn_magnitude(s)


def _yarn_magnitude(s: RopeScaling) -> float:
    if s.attention_factor is not None:
        return s.attention_factor

    def magnitude(m: float) -> float:
        return 1.0 if s.factor <= 1 else 0.1 * m * math.log(s.factor) + 1.0

    if s.mscale and s.mscale_all_dim:
        return magnitude(s.mscale) / magnitude(s.mscale_all_dim)
    return magnitude(1.0)
