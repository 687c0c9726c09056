"""Truth of the block indexer: scores of the blocks of a sequence, token by token, without pages."""

from __future__ import annotations

import torch

from ktcore.conformance.truth.arithmetic import Arithmetic
from ktcore.conformance.truth.small import Values, linear, rms_norm, rope
from ktcore.ops import BlockIndexCacheSpec, BlockIndexerSpec

NEVER = float("-inf")
"""Score of a block that a query cannot choose."""


def block_scores(spec: BlockIndexCacheSpec, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores of a whole sequence: [L, 1, blocks] by "mean", [L, heads, blocks] by "max"; `NEVER` where none may be.

    Args:
        q: [L, heads, d]; keys: of complete blocks [L // block, d] by "mean", of tokens [L, d] by "max".
    """
    length, b = len(q), spec.block
    rows = 1 if spec.pool == "mean" else spec.heads
    found = torch.full((length, rows, -(-length // b)), NEVER, dtype=q.dtype)
    for t in range(length):
        if spec.pool == "mean":
            for at in range((t + 1) // b):
                found[t, 0, at] = (q[t] @ keys[at]).clamp(min=0).sum()
        else:
            for at in range(t // b + 1):
                found[t, :, at] = (q[t] @ keys[at * b : min(at * b + b, t + 1)].T).amax(-1)
    return found


def forced(spec: BlockIndexCacheSpec, t: int) -> set[int]:
    """Blocks that token t attends to whatever they score."""
    own = t // spec.block
    return {at for at in range(own - spec.local + 1, own + 1) if at >= 0} if spec.pool == "max" else set()


def tokens(spec: BlockIndexCacheSpec, t: int, blocks: set[int]) -> list[int]:
    """What token t sees of `blocks`, and by "mean" behind the last complete one."""
    seen = {at * spec.block + i for at in blocks for i in range(spec.block)}
    if spec.pool == "mean":
        seen |= set(range((t + 1) // spec.block * spec.block, t + 1))
    return sorted(s for s in seen if s <= t)


def best(spec: BlockIndexCacheSpec, scores: torch.Tensor) -> torch.Tensor:
    """bool [L, rows, L]: what each token sees, by the scores [L, rows, blocks] of `block_scores`."""
    seen = torch.zeros(scores.shape[0], scores.shape[1], scores.shape[0], dtype=torch.bool)
    for t, of_rows in enumerate(scores):
        for r, row in enumerate(of_rows):
            must = forced(spec, t)
            order = sorted((at for at in range(len(row)) if row[at] != NEVER), key=lambda at: (-float(row[at]), at))
            free = [at for at in order if at not in must][: spec.top - len(must)]
            seen[t, r, tokens(spec, t, must | set(free))] = True
    return seen


def margin(spec: BlockIndexCacheSpec, scores: torch.Tensor) -> float:
    """The least distance from the last block that is chosen to the first that is not, in mean scores."""
    gaps = []
    for t, of_rows in enumerate(scores):
        for row in of_rows:
            must = forced(spec, t)
            free = sorted((float(v) for at, v in enumerate(row) if v != NEVER and at not in must), reverse=True)
            count = spec.top - len(must)
            if len(free) > count:
                gaps.append(free[count - 1] - free[count])
    return min(gaps) / float(scores[scores != NEVER].abs().mean()) if gaps else float("inf")


def indexer_scores(spec: BlockIndexerSpec, w: Values, n: torch.Tensor, a: Arithmetic, prefix: str = "") -> torch.Tensor:
    """`block_scores` of a whole sequence n [L, hidden]."""
    positions = torch.arange(len(n))
    q = linear(spec.q, w, n, a, f"{prefix}q.").reshape(-1, spec.heads, spec.head_dim)
    q = rope(spec.rope, w, rms_norm(spec.q_norm, w, q, a, f"{prefix}q_norm."), positions, a, f"{prefix}rope.")
    k = linear(spec.k, w, n, a, f"{prefix}k.")
    if spec.cache.pool == "mean":
        b = spec.cache.block
        starts = range(0, len(n) - b + 1, b)
        k = torch.stack([a.stored(k[s : s + b]).mean(0) for s in starts]) if starts else k[:0]
        positions = torch.tensor(list(starts), dtype=torch.int64)
    k = rms_norm(spec.k_norm, w, k, a, f"{prefix}k_norm.")
    k = a.stored(rope(spec.rope, w, k[:, None], positions, a, f"{prefix}rope."))[:, 0]
    return block_scores(spec.cache, q, k)
