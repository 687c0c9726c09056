"""Truth of attention over a window and compressed entries: each sequence at once, window after window of tokens."""

from __future__ import annotations

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.conformance.truth.small import Values, linear, rms_norm, rope
from ktcore.ops import CompressedAttentionSpec, EntryCacheSpec, EntryIndexerSpec, RopeSpec


def pooled(spec: EntryCacheSpec, values: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Values and gates [L, width] of a sequence's tokens -> one row for each whole window [L // ratio, dim]."""
    made = torch.zeros(len(values) // spec.ratio, spec.dim, dtype=values.dtype)
    for w in range(len(made)):
        begin, end = w * spec.ratio, (w + 1) * spec.ratio
        v, g = values[begin:end, -spec.dim :], gates[begin:end, -spec.dim :]
        if spec.overlap and w:
            v = torch.cat((values[begin - spec.ratio : begin, : spec.dim], v))
            g = torch.cat((gates[begin - spec.ratio : begin, : spec.dim], g))
        share = torch.exp(g - g.amax(0))
        made[w] = (share * v).sum(0) / share.sum(0)
    return made


def visible(length: int, ratio: int) -> torch.Tensor:
    """bool [length, length // ratio]: a token sees windows whose last token is not behind it."""
    last = torch.arange(length // ratio) * ratio + ratio - 1
    return last[None, :] <= torch.arange(length)[:, None]


def seen(q: torch.Tensor, rows: torch.Tensor, scale: float, shown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [L, H, d] over rows [n, d] that are keys and values, shown bool [L, n]: weighted values, log of the weights'
    sum; zeros and -inf where nothing is shown."""
    values, logs = torch.zeros_like(q), torch.full(q.shape[:2], -float("inf"), dtype=q.dtype)
    for t in range(len(q)):
        mine = rows[shown[t]]
        if len(mine):
            score = (q[t] @ mine.T) * scale
            values[t], logs[t] = torch.softmax(score, -1) @ mine, torch.logsumexp(score, -1)
    return values, logs


def in_window(length: int, window: int) -> torch.Tensor:
    """bool [length, length]: the last `window` tokens, oneself included."""
    ago = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return (ago >= 0) & (ago < window)


def index_scores(
    spec: EntryIndexerSpec, w: Values, n: torch.Tensor, low: torch.Tensor, a: Arithmetic, prefix: str = ""
) -> torch.Tensor:
    """Scores [L, L // ratio] of a whole sequence's entries, n [L, hidden] and low [L, rank]."""
    keys = _entries(spec, spec.entries, w, n, a, prefix)
    q = linear(spec.q, w, low, a, f"{prefix}q.").reshape(-1, spec.heads, spec.head_dim)
    q = _turned(spec.rope, w, q, torch.arange(len(q)), a, f"{prefix}rope.")
    weights = linear(spec.weights, w, n, a, f"{prefix}weights.") / (spec.heads * spec.head_dim) ** 0.5
    return choice_scores(q, weights, keys)


def choice_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q [L, H, d], weights [L, H], keys [n, d] -> [L, n]."""
    total = torch.zeros(len(q), len(keys), dtype=q.dtype)
    for h in range(q.shape[1]):
        total += weights[:, h, None] * (q[:, h] @ keys.T).clamp(min=0)
    return total


def best(scored: torch.Tensor, ratio: int, top_k: int) -> torch.Tensor:
    """bool [L, n]: the `top_k` entries with the highest of `scored` [L, n] among those that each token sees."""
    found = torch.zeros(scored.shape, dtype=torch.bool)
    for t, row in enumerate(scored):
        there = (t + 1) // ratio
        found[t, row[:there].topk(min(top_k, there)).indices] = True
    return found


def margin(scored: torch.Tensor, ratio: int, top_k: int) -> float:
    """The least distance from the last entry that is chosen to the first that is not, in mean scores."""
    gaps = []
    for t, row in enumerate(scored):
        ranked = row[: (t + 1) // ratio].sort(descending=True).values
        if len(ranked) > top_k:
            gaps.append(float(ranked[top_k - 1] - ranked[top_k]))
    return min(gaps) / float(scored.abs().mean()) if gaps else float("inf")


def low_query(spec: CompressedAttentionSpec, w: Values, n: torch.Tensor, a: Arithmetic) -> torch.Tensor:
    """The normed low-rank query [L, rank] of the normed input."""
    return rms_norm(spec.q_a_norm, w, linear(spec.q_a, w, n, a, "q_a."), a, "q_a_norm.")


def attention(
    spec: CompressedAttentionSpec, w: Values, x: torch.Tensor, a: Arithmetic, chosen: torch.Tensor | None = None
) -> torch.Tensor:
    """A whole sequence x [L, hidden] -> [L, hidden].

    Args:
        chosen: bool [L, L // ratio], the entries that each token sees of those that have closed; None: all.
    """
    length = len(x)
    positions = torch.arange(length)
    n = rms_norm(spec.norm, w, x, a, "norm.") if spec.norm else a.cast(x)
    q = linear(spec.q_b, w, low_query(spec, w, n, a), a, "q_b.").reshape(length, spec.heads, spec.head_dim)
    q = q / torch.sqrt((q * q).mean(-1, keepdim=True) + spec.q_eps)
    q = _turned(spec.rope, w, q, positions, a, "rope.")
    k = rms_norm(spec.kv_norm, w, linear(spec.kv, w, n, a, "kv."), a, "kv_norm.")
    rows = a.stored(_turned(spec.rope, w, k[:, None], positions, a, "rope.")[:, 0])
    shown = in_window(length, spec.window.window)
    if spec.entries:
        closed = visible(length, spec.entries.ratio)
        rows = torch.cat((rows, _entries(spec, spec.entries, w, n, a, "")))
        shown = torch.cat((shown, closed if chosen is None else closed & chosen), 1)
    values, logs = seen(q, rows, spec.head_dim**-0.5, shown)
    # the sink takes its share
    values = values / (1 + torch.exp(a.cast(w["sinks"]) - logs))[..., None]
    back = _turned(spec.rope, w, values, -positions, a, "rope.")
    grouped = back.reshape(length, spec.groups, -1)
    parts = [a.matmul(grouped[:, g], w["o_a"][g]) for g in range(spec.groups)]
    y = linear(spec.o_b, w, torch.cat(parts, 1), a, "o_b.")
    return a.cast(x) + y if spec.residual else y


def _entries(
    spec: CompressedAttentionSpec | EntryIndexerSpec,
    entries: EntryCacheSpec,
    w: Values,
    n: torch.Tensor,
    a: Arithmetic,
    prefix: str,
) -> torch.Tensor:
    """A sequence's entries as the cache gives them back, [L // ratio, dim]."""
    assert spec.pool_values is not None, "entries are made of values"
    assert spec.pool_gates is not None, "entries are made by gates"
    assert spec.pool_norm is not None, "entries have a norm"
    place = torch.arange(len(n)) % entries.ratio
    gates = linear(spec.pool_gates, w, n, a, f"{prefix}pool_gates.") + a.cast(w[f"{prefix}ape"])[place]
    made = pooled(entries, linear(spec.pool_values, w, n, a, f"{prefix}pool_values."), gates)
    made = rms_norm(spec.pool_norm, w, made, a, f"{prefix}pool_norm.")
    first = torch.arange(len(made)) * entries.ratio
    return a.stored(_turned(spec.rope, w, made[:, None], first, a, f"{prefix}rope.")[:, 0])


def _turned(
    spec: RopeSpec, w: Values, x: torch.Tensor, positions: torch.Tensor, a: Arithmetic, prefix: str
) -> torch.Tensor:
    """x [T, heads, d] whose last values rotate."""
    if not len(x):
        return a.cast(x)
    keep = x.shape[-1] - spec.dim
    return torch.cat((x[..., :keep], rope(spec, w, x[..., keep:], positions, a, prefix)), -1)
