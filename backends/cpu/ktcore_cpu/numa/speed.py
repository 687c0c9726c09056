"""How much of the nodes' joint speed a way of spreading experts keeps when one token is decoded.

A node's speed counts as its number of threads; a layer takes as long as its slowest node.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial


def kept_by_shares(shares: Sequence[int], threads: Sequence[int], all_threads: int) -> float:
    """Fixed shares of the work; 1.0 when they are as the threads.

    Args:
        all_threads: of all nodes, those without a share included.
    """
    whole = sum(shares)
    slowest = max(share / count for share, count in zip(shares, threads, strict=True) if share)
    return whole / all_threads / slowest


def kept_by_chance(experts: Sequence[int], top_k: int, threads: Sequence[int], all_threads: int) -> float:
    """Whole experts on nodes, `top_k` of them drawn alike by a token: 1 / E[time of the slowest node].

    The draws count as independent. P(no node above a time) is a coefficient of a product of truncated exponential
    series, one a node (the multinomial law).
    """
    total = sum(experts)
    times = sorted({drawn / count for count in threads for drawn in range(1, top_k + 1)})
    expected, below = 0.0, 0.0
    for time in times:
        series = [1.0] + [0.0] * top_k
        for held, count in zip(experts, threads, strict=True):
            most = min(top_k, int(time * count + 1e-9))
            terms = [(held / total) ** c / factorial(c) for c in range(most + 1)]
            series = [sum(terms[c] * series[k - c] for c in range(min(k, most) + 1)) for k in range(top_k + 1)]
        within = series[top_k] * factorial(top_k)
        expected += time * (within - below)
        below = within
    return top_k / all_threads / expected
