"""Grouped-query attention as a residual branch: y = x + o(attend(rope(qk_norm(qkv(norm(x))))))), gated or tempered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.base import Spec
from ktcore.ops.block_indexer import BlockIndexerSpec
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.norm import RMSNormSpec
from ktcore.ops.rope import RopeSpec


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position: q * (1 + scale * ln(1 + floor((position + offset) / span))).

    Attributes:
        scale: how much; span: tokens between two steps of the growth.
        offset: of positions, which count from 0: 1 in LLaMA 4, 0 in Mistral Small 4.
    """

    scale: float
    span: float
    offset: float = 1.0


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """Call: x float32 [T, hidden], step -> [T, hidden]. With `sinks` a weight `sinks` [heads] of its own.

    The branch holds its own pre-norm and residual so that a backend can run the whole in one kernel launch or native
    call; one that does not is composed from the parts.

    Attributes:
        scale: softmax scale, 1/sqrt(head_dim) unless the family says otherwise.
        norm: applied to x before q, k, v; None where the family has none.
        cache: also says what a query sees: a window, a chunk, a sink.
        q_norm, k_norm: per head over head_dim, before RoPE; their `weight_format` is "" where they have no weight.
        rope: None for layers without position embedding; narrower than head_dim where only the first values rotate.
        residual: add x to the result.
        post_norm: applied to the branch's result before x is added (dense GLM-4).
        gate: [heads * head_dim, hidden] linear of the normed input whose sigmoid multiplies what `o` gets (Qwen3-Next).
        norm_after_rope: q_norm and k_norm come after RoPE (LLaMA 4).
        norm_whole: q_norm is over all heads of q together, [heads * head_dim], and k_norm over those of k (MiniMax-M2).
        sinks: a learned logit a head joins the softmax's denominator and adds no value (gpt-oss).
        temperature: of the queries, after norm and RoPE; None for none.
        indexer: chooses the tokens that a query sees from the normed input; the cache's `chosen` says so. None: all.
        v_norm: per head over the values, which RoPE does not touch (Gemma-4).
        value_dim: width of a value head where it is not a key's: then v has kv_heads * value_dim rows, and o reads
            heads * value_dim values (MiMo-V2); 0 for head_dim.
        value_scale: multiplies the values (MiMo-V2).
        head_gate: `gate` is [heads, hidden], one value a head (Step-3.5).
    """

    op: ClassVar[str] = "attention"
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    q: LinearSpec
    k: LinearSpec
    v: LinearSpec
    o: LinearSpec
    cache: KVCacheSpec
    norm: RMSNormSpec | None = None
    q_norm: RMSNormSpec | None = None
    k_norm: RMSNormSpec | None = None
    rope: RopeSpec | None = None
    residual: bool = True
    post_norm: RMSNormSpec | None = None
    head_gate: bool = False
    gate: LinearSpec | None = None
    norm_after_rope: bool = False
    norm_whole: bool = False
    sinks: bool = False
    temperature: Temperature | None = None
    indexer: BlockIndexerSpec | None = None
    v_norm: RMSNormSpec | None = None
    value_dim: int = 0
    value_scale: float = 1.0

    @property
    def value_width(self) -> int:
        """Values of a value head."""
        return self.value_dim or self.head_dim


def gate_heads(seen: torch.Tensor, gate: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """What heads have seen [T, heads * value width], times the sigmoid of `gate` [T, heads], or [T, heads * ...]."""
    if not spec.head_gate:
        return seen * torch.sigmoid(gate)
    return (seen.view(-1, spec.heads, spec.value_width) * torch.sigmoid(gate)[..., None]).flatten(1)


def tempered(q: torch.Tensor, positions: torch.Tensor, temperature: Temperature) -> torch.Tensor:
    """Queries [T, heads, d] at positions int64 [T], grown as `Temperature` says."""
    steps = torch.floor((positions.float() + temperature.offset) / temperature.span)
    return q * (torch.log1p(steps) * temperature.scale + 1.0)[:, None, None]
