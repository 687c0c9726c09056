"""Truth of attention: each sequence at once over all of its tokens, without pages."""

from __future__ import annotations

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.conformance.truth.small import Values, linear, rms_norm, rope
from ktcore.ops import AttentionSpec, MLASpec, Temperature


def causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [L, H, dk], k [L, G, dk], v [L, G, dv], query i seeing keys up to i -> [L, H, dv].

    Args:
        window: keys that a query sees, itself included; chunk: positions that see each other; 0 for all.
        chosen: bool [L, L] or [L, G, L], keys that each query, of the heads of a key head, sees beside these rules.
        sinks: [H], a logit of each head that takes its share of the weight and has no value.
    """
    length, heads, _ = q.shape
    share = heads // k.shape[1]
    reach = torch.arange(length)
    seen = reach[None, :] <= reach[:, None]
    if window:
        seen &= reach[None, :] > reach[:, None] - window
    if chunk:
        seen &= reach[None, :] >= reach[:, None] - reach[:, None] % chunk
    out = []
    for g in range(k.shape[1]):
        shown = seen if chosen is None else seen & (chosen if chosen.dim() == 2 else chosen[:, g])
        rows = q[:, g * share : (g + 1) * share].transpose(0, 1)
        score = (rows @ k[:, g].T) * scale
        score = score.masked_fill(~shown, float("-inf"))
        if sinks is None:
            weight = torch.softmax(score, -1)
        else:
            sink = sinks[g * share : (g + 1) * share].to(score.dtype)[:, None, None]
            top = torch.maximum(score.amax(-1, keepdim=True), sink)
            grown = torch.exp(score - top)
            weight = grown / (grown.sum(-1, keepdim=True) + torch.exp(sink - top))
        out.append((weight @ v[:, g]).transpose(0, 1))
    return torch.cat(out, 1)


def attention(
    spec: AttentionSpec, w: Values, x: torch.Tensor, a: Arithmetic, chosen: torch.Tensor | None = None
) -> torch.Tensor:
    """A whole sequence x [L, hidden] -> [L, hidden].

    Args:
        chosen: as `causal` takes it.
    """
    n = rms_norm(spec.norm, w, x, a, "norm.") if spec.norm else a.cast(x)
    q = linear(spec.q, w, n, a, "q.").reshape(-1, spec.heads, spec.head_dim)
    k = linear(spec.k, w, n, a, "k.").reshape(-1, spec.kv_heads, spec.head_dim)
    v = linear(spec.v, w, n, a, "v.").reshape(x.shape[0], spec.kv_heads, -1)
    v = (rms_norm(spec.v_norm, w, v, a, "v_norm.") if spec.v_norm else v) * spec.value_scale
    positions = torch.arange(x.shape[0])
    if spec.norm_whole and spec.q_norm and spec.k_norm:
        q = rms_norm(spec.q_norm, w, q.flatten(1), a, "q_norm.").reshape(q.shape)
        k = rms_norm(spec.k_norm, w, k.flatten(1), a, "k_norm.").reshape(k.shape)
    for turn in (spec.norm_after_rope, not spec.norm_after_rope):
        if turn and spec.rope:
            q, k = (rope(spec.rope, w, t, positions, a, "rope.") for t in (q, k))
        elif not turn and not spec.norm_whole:
            q = rms_norm(spec.q_norm, w, q, a, "q_norm.") if spec.q_norm else q
            k = rms_norm(spec.k_norm, w, k, a, "k_norm.") if spec.k_norm else k
    q = _grown(spec.temperature, q, a)
    sinks = w["sinks"] if spec.sinks else None
    cache = spec.cache
    y = causal(q, a.stored(k), a.stored(v), spec.scale, cache.window, cache.chunk, sinks, chosen).flatten(1)
    if spec.gate:
        gate = 1 / (1 + torch.exp(-linear(spec.gate, w, n, a, "gate.")))
        y = y * (gate.repeat_interleave(y.shape[1] // spec.heads, 1) if spec.head_gate else gate)
    y = linear(spec.o, w, y, a, "o.")
    y = rms_norm(spec.post_norm, w, y, a, "post_norm.") if spec.post_norm else y
    return a.cast(x) + y if spec.residual else y


def _grown(temperature: Temperature | None, q: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    """Queries [L, H, d] of a sequence from its beginning."""
    if temperature is None:
        return q
    steps = torch.tensor([float((t + temperature.offset) // temperature.span) for t in range(len(q))])
    return q * a.cast(1 + temperature.scale * torch.log(1 + steps.double()))[:, None, None]


def mla(spec: MLASpec, w: Values, x: torch.Tensor, a: Arithmetic, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """A whole sequence x [L, hidden] -> [L, hidden], keys and values expanded from the latents.

    Args:
        chosen: bool [L, L], the tokens that each one sees of those up to itself; None: all.
    """
    n = rms_norm(spec.norm, w, x, a, "norm.") if spec.norm else a.cast(x)
    q = _queries(spec, w, n, a)
    positions = torch.arange(x.shape[0])
    q_rope = q[..., spec.nope_dim :]
    q_rope = rope(spec.rope, w, q_rope, positions, a, "rope.") if spec.rope else q_rope
    both = linear(spec.kv_a, w, n, a, "kv_a.")
    latent, k_rope = both[:, : spec.latent], both[:, spec.latent :]
    latent = a.stored(rms_norm(spec.kv_a_norm, w, latent, a, "kv_a_norm."))
    k_rope = k_rope[:, None]
    k_rope = a.stored(rope(spec.rope, w, k_rope, positions, a, "rope.") if spec.rope else k_rope)
    up_k, up_v = _up(spec, w)
    k_nope = torch.stack([latent @ a.cast(m).T for m in up_k], 1)
    v = torch.stack([latent @ a.cast(m).T for m in up_v], 1)
    k = torch.cat((k_nope, k_rope.expand(-1, spec.heads, -1)), -1)
    whole = _grown(spec.temperature, torch.cat((q[..., : spec.nope_dim], q_rope), -1), a)
    y = causal(whole, k, v, spec.scale, chosen=chosen)
    y = linear(spec.o, w, y.flatten(1), a, "o.")
    return a.cast(x) + y if spec.residual else y


def low_query(spec: MLASpec, w: Values, n: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    """The normed low-rank query [L, rank] of the normed input."""
    assert spec.q_a is not None, "there is no low-rank query"
    assert spec.q_a_norm is not None, "a low-rank query has a norm"
    return rms_norm(spec.q_a_norm, w, linear(spec.q_a, w, n, a, "q_a."), a, "q_a_norm.")


def _queries(spec: MLASpec, w: Values, n: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    if spec.q_b:
        flat = linear(spec.q_b, w, low_query(spec, w, n, a), a, "q_b.")
    else:
        assert spec.q is not None, "a query projection is either whole or in two parts"
        flat = linear(spec.q, w, n, a, "q.")
    return flat.reshape(-1, spec.heads, spec.nope_dim + spec.rope_dim)


def _up(spec: MLASpec, w: Values) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per head: key rows [nope, latent] and value rows [value, latent]."""
    if spec.split_kv_b:
        return [m.T for m in w["k_b"]], list(w["v_b"])
    both = w["kv_b"].reshape(spec.heads, spec.nope_dim + spec.value_dim, spec.latent)
    return [m[: spec.nope_dim] for m in both], [m[spec.nope_dim :] for m in both]
