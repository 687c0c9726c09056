"""Grouped-query attention as a residual branch: y = x + o(attend(rope(qk_norm(qkv(norm(x))))))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ktcore.ops.base import Spec
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.norm import RMSNormSpec
from ktcore.ops.rope import RopeSpec


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """Call: x float32 [T, hidden], step -> [T, hidden].

    The branch holds its own pre-norm and residual so that a backend can run the whole in one kernel launch or native
    call; one that does not is composed from the parts.

    Attributes:
        scale: softmax scale, 1/sqrt(head_dim) unless the family says otherwise.
        norm: applied to x before q, k, v; None where the family has none.
        q_norm, k_norm: per head over head_dim, before RoPE.
        rope: None for layers without position embedding.
        residual: add x to the result.
        post_norm: applied to the branch's result before x is added (dense GLM-4).
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
