"""Attention over a window and compressed entries (DeepSeek-V4's report, 2026, section 2.3) as a residual branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.norm import RMSNormSpec
from ktcore.ops.rope import Pairing, RopeSpec

PAGE = 64
"""Tokens a page usually has; `EntryCacheSpec.bytes_per_token` counts with it."""

Seen = tuple[torch.Tensor, torch.Tensor]
"""What one part of the keys gives: values [T, heads, dim], softmax-weighted, and log of the sum of exp [T, heads];
zeros and -inf where there are no keys."""


@dataclass(frozen=True)
class WindowCacheSpec(Spec):
    """One layer's latest keys, which are their own values: a state a sequence, one head for all query heads.

    `attend(step, q float32 [T, heads, dim], k float32 [T, dim], scale) -> Seen`: of each token's query over the last
    `window` keys, its own included; then the state holds the last ones. The module is a `StateOwner`.
    """

    op: ClassVar[str] = "window_cache"
    heads: int
    dim: int
    window: int

    @property
    def values(self) -> int:
        """Values a sequence's state holds."""
        return self.window * self.dim


@dataclass(frozen=True)
class EntryCacheSpec(Spec):
    """One layer's compressed entries, one for every `ratio` tokens, and the tokens whose windows are still open.

    Window w holds the tokens ratio * w .. ratio * w + ratio - 1. Its entry is made when its last token comes, lies in
    the page that the layer's caches have for that token, max(1, page / ratio) entries a page, and is seen by that
    token and all later ones. Open windows are a state: the module is a `CacheOwner` and a `StateOwner`.

    `pool(step, values float32 [T, width], gates float32 [T, width]) -> (pooled float32 [m, dim], int64 [m])`: for the
    windows that close in the step, sequence by sequence, the sum of their tokens' values, weighted by a softmax of the
    gates in each channel by itself, and the position of each window's first token. `append(step, entries float32
    [m, dim])` stores what became of them. A device may do both for every token of the step instead, m = T, and leave
    out in `append` those that close nothing.
    `attend(step, q float32 [T, heads, dim], scale, chosen=None) -> Seen`, entries being keys and values; `chosen` int32
    [T, n] names those that a query sees, then -1.
    `choose(step, q float32 [T, heads, dim], weights float32 [T, heads]) -> int32 [T, top_k]`, as in `IndexCacheSpec`,
    of the entries that a token sees.

    Attributes:
        overlap: width is 2 * dim: a token's first half counts for the window behind its own, which has no such part
            for w = 0, and its second half for its own; else width is dim.
        top_k: entries that `choose` gives; 0 where the entries are attended to.
        chosen: `attend` takes `chosen`.
    """

    op: ClassVar[str] = "entry_cache"
    heads: int
    dim: int
    ratio: int
    overlap: bool = False
    top_k: int = 0
    chosen: bool = False

    @property
    def width(self) -> int:
        """Values that a token adds to its windows."""
        return self.dim * (1 + self.overlap)

    @property
    def rows(self) -> int:
        """Tokens that the state of open windows holds."""
        return self.ratio * (1 + self.overlap)

    @property
    def values(self) -> int:
        """Values of that state: a row is a token's values and gates."""
        return self.rows * 2 * self.width

    def bytes_per_token(self, element_bytes: int) -> int:
        """Cache bytes a token takes in this layer, rounded up."""
        return -(-self.dim * element_bytes // min(self.ratio, PAGE))

    def pages(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Those page sizes that hold whole windows, or that windows hold whole."""
        return tuple(size for size in sizes if size % self.ratio == 0 or self.ratio % size == 0)


@dataclass(frozen=True)
class EntryIndexerSpec(Spec):
    """Which entries a query attends to. Call: n float32 [T, hidden], low float32 [T, rank], step -> int32 [T, top_k].

    With h heads of d values:
        values = pool_values(n), gates = pool_gates(n) + ape[position mod ratio];  entry = rope(pool_norm(pooled))
        q = rope(q(low)) -> h x d;  w = weights(n) * h^-1/2 * d^-1/2;  the cache chooses by q and w
    Rotated are the last values of a head, entries at their window's first position. Weight of its own: `ape`
    [ratio, width].
    """

    op: ClassVar[str] = "entry_indexer"
    hidden: int
    rank: int
    heads: int
    head_dim: int
    q: LinearSpec
    weights: LinearSpec
    pool_values: LinearSpec
    pool_gates: LinearSpec
    pool_norm: RMSNormSpec
    rope: RopeSpec
    entries: EntryCacheSpec
    ape_format: str = "F32"

    @property
    def scale(self) -> float:
        """What head weights are multiplied with."""
        return float((self.heads * self.head_dim) ** -0.5)


@dataclass(frozen=True)
class CompressedAttentionSpec(Spec):
    """Call: x float32 [T, hidden], step -> [T, hidden].

    With n = norm(x), A heads of D values, per token:
        low = q_a_norm(q_a(n));  q_h = q_b(low)_h / rms(q_b(low)_h), without a weight;  k = kv_norm(kv(n)), one head
        q, k = rope(.): the last `rope.dim` values rotate
        entries as in `EntryIndexerSpec`, from own projections, stored in `entries`
        o_h = one softmax over [window's k | entries | sink_h] of q.k * D^-1/2, of which keys are the values
        o_h's last values rotated back at the query's position
        y = x + o_b(concat over groups g of o_a[g] (o of the heads of group g))
    Weights of its own: `sinks` [A], `o_a` [groups, o_rank, A / groups * D], and with entries `ape` [ratio, width].

    Attributes:
        q_eps: of the heads' norm.
        entries: None: attention is to the window alone; pool_values, pool_gates, pool_norm go with it.
        indexer: chooses entries; None: all that are seen are attended to.
    """

    op: ClassVar[str] = "compressed_attention"
    hidden: int
    heads: int
    head_dim: int
    groups: int
    o_rank: int
    q_eps: float
    q_a: LinearSpec
    q_a_norm: RMSNormSpec
    q_b: LinearSpec
    kv: LinearSpec
    kv_norm: RMSNormSpec
    o_b: LinearSpec
    rope: RopeSpec
    window: WindowCacheSpec
    o_a_format: str
    sinks_format: str = "F32"
    pool_values: LinearSpec | None = None
    pool_gates: LinearSpec | None = None
    pool_norm: RMSNormSpec | None = None
    entries: EntryCacheSpec | None = None
    indexer: EntryIndexerSpec | None = None
    ape_format: str = "F32"
    norm: RMSNormSpec | None = None
    residual: bool = True

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.head_dim**-0.5)


def closed(before: int, after: int, ratio: int) -> range:
    """Windows that close while a sequence grows from `before` to `after` tokens."""
    return range(before // ratio, after // ratio)


def merged(parts: tuple[Seen, ...], sinks: torch.Tensor) -> torch.Tensor:
    """One softmax over all parts' keys and the sinks [heads]: values [T, heads, dim]."""
    logs = torch.stack([log for _, log in parts], -1)
    total = torch.logaddexp(logs.logsumexp(-1), sinks.float())
    shares = (logs - total[..., None]).exp()
    return torch.stack([shares[..., i, None] * values for i, (values, _) in enumerate(parts)]).sum(0)


def weighed(scores: torch.Tensor, values: torch.Tensor) -> Seen:
    """Scores [T, heads, n], -inf for what is not seen, over values [n, dim] or [T, n, dim]."""
    log = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], float("-inf"))
    weights = (scores - log[..., None]).exp().nan_to_num(0.0)
    return weights @ values, log


def pooled(values: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Values and gates [windows, tokens, dim] -> [windows, dim]."""
    return (values * gates.softmax(1)).sum(1)


def rotated_last(x: torch.Tensor, dim: int, rotate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """x [T, heads, d] with its last `dim` values through `rotate`."""
    rest = x.shape[-1] - dim
    turned = rotate(x[..., rest:].contiguous())
    return torch.cat((x[..., :rest], turned), -1) if rest else turned


def mirrored_pairs(x: torch.Tensor, pairing: Pairing) -> torch.Tensor:
    """x [..., dim] with the second value of each pair negated: a rotation between two of these turns backwards."""
    out = x.clone()
    (out[..., 1::2] if pairing == "interleaved" else out[..., x.shape[-1] // 2 :]).neg_()
    return out
