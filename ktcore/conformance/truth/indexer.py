"""Truth of the token indexer: scores of all pairs of a sequence's tokens, without pages."""

from __future__ import annotations

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.conformance.truth.small import Values, linear, rope
from ktcore.ops import TokenIndexerSpec


def scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q [L, H, d], weights [L, H], keys [L, d] -> [L, L], a sum over heads of what of q.k is positive."""
    total = torch.zeros(len(q), len(keys), dtype=q.dtype)
    for h in range(q.shape[1]):
        total += weights[:, h, None] * (q[:, h] @ keys.T).clamp(min=0)
    return total


def indexer_scores(
    spec: TokenIndexerSpec, w: Values, n: torch.Tensor, low: torch.Tensor, a: Arithmetic, prefix: str = ""
) -> torch.Tensor:
    """Scores of a whole sequence, n [L, hidden] and low [L, rank]: [L, L] of tokens, or [L, pools] of its pools."""
    positions = torch.arange(len(n))
    key = linear(spec.k, w, n, a, f"{prefix}k.")
    key = key - key.mean(-1, keepdim=True)
    key = key / torch.sqrt((key * key).mean(-1, keepdim=True) + spec.eps)
    key = key * a.cast(w[f"{prefix}k_norm"]) + a.cast(w[f"{prefix}k_norm_bias"])
    q = linear(spec.q, w, low, a, f"{prefix}q.").reshape(-1, spec.heads, spec.head_dim)
    if spec.rope:
        key = rope(spec.rope, w, key[:, None], positions, a, f"{prefix}rope.")[:, 0]
        q = rope(spec.rope, w, q, positions, a, f"{prefix}rope.")
    key = a.stored(key)
    if spec.gate:
        gates = linear(spec.gate, w, n, a, f"{prefix}gate.")
        gates = gates + a.cast(w[f"{prefix}ape"])[positions % spec.cache.pool]
        key = pooled(key, a.stored(gates), spec.cache.pool)
    weights = linear(spec.weights, w, n, a, f"{prefix}weights.") / (spec.heads * spec.head_dim) ** 0.5
    return scores(q, weights, key)


def pooled(keys: torch.Tensor, gates: torch.Tensor, pool: int) -> torch.Tensor:
    """Keys of the complete pools of a sequence [L, d], pool by pool: [L // pool, d]."""
    found = []
    for start in range(0, len(keys) - pool + 1, pool):
        of = slice(start, start + pool)
        grown = torch.exp(gates[of] - gates[of].amax(0))
        found.append((grown * keys[of]).sum(0) / grown.sum(0))
    return torch.stack(found) if found else keys[:0]


def pools_seen(scored: torch.Tensor, t: int, pool: int, top: int) -> tuple[list[int], list[int]]:
    """Of token t, by the scores [L, pools]: the pools that it sees in their order, and the tokens behind the last."""
    whole = (t + 1) // pool
    seen = scored[t, :whole].topk(min(top, whole)).indices.sort().values.tolist()
    return seen, list(range(whole * pool, t + 1))


def best(scored: torch.Tensor, top_k: int) -> torch.Tensor:
    """bool [L, L]: the `top_k` tokens up to each with the highest scores [L, L]."""
    found = torch.zeros(scored.shape, dtype=torch.bool)
    for t, row in enumerate(scored):
        found[t, row[: t + 1].topk(min(top_k, t + 1)).indices] = True
    return found


def margin(scored: torch.Tensor, top_k: int) -> float:
    """The least distance from the last that is chosen to the first that is not, over all tokens, in mean scores."""
    gaps = []
    for t in range(top_k, len(scored)):
        ranked = scored[t, : t + 1].sort(descending=True).values
        gaps.append(float(ranked[top_k - 1] - ranked[top_k]))
    return min(gaps) / float(scored.abs().mean()) if gaps else float("inf")
