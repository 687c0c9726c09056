"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) as a residual branch, plain and absorbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ktcore.ops.attention import Temperature
from ktcore.ops.base import Spec
from ktcore.ops.indexer import TokenIndexerSpec
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore.ops.linear import LinearSpec
from ktcore.ops.norm import RMSNormSpec
from ktcore.ops.rope import RopeSpec


@dataclass(frozen=True)
class MLASpec(Spec):
    """Call: x float32 [T, hidden], step -> [T, hidden].

    With nope N, rope R, value V and latent rank L, per token:
        q = q_b(rms(q_a(x))) or q_proj(x) -> heads x (N + R);  (c, k_r) = kv_a(x) -> L + R;  c = rms(c)
        plain:    (k_n, v) = kv_b(c);  score = (q_n.k_n + q_r.k_r) * scale
        absorbed: q~_h = K_h^T q_n;    score = (q~.c + q_r.k_r) * scale;  o_h = V_h (softmax . c)
    The up-projections come as own weights: either `kv_b` [heads * (N + V), L], or `k_b` [heads, L, N] (transposed per
    head) and `v_b` [heads, V, L], as newer GGUF files hold them.

    Sparse attention (DeepSeek-V3.2): the softmax runs over the tokens that an indexer chose, here or in the last layer
    before that had one; the cache's `chosen` says so. The step hands the choice on (`StepBatch.hand_on`).

    Attributes:
        q: the whole query projection where there is no low-rank one; else q_a, q_a_norm and q_b are set.
        kv_b_format: format of the up-projection(s); "k_b" and "v_b" when split.
        scale: (N + R)^-1/2, times YaRN's mscale squared where it applies: never the width after absorption.
        temperature: of the whole queries (Mistral Small 4); None for none.
        indexer: chooses tokens from the normed input and the normed low-rank query, which there has to be.
        shared_index: without an indexer of its own, the branch attends to the tokens that were handed on last.
        rope: None where nothing rotates: the R values are used as they are (Kimi Linear), or there are none of them
            (GLM-5.3-Flash).
    """

    op: ClassVar[str] = "mla"
    hidden: int
    heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent: int
    scale: float
    kv_a: LinearSpec
    kv_a_norm: RMSNormSpec
    o: LinearSpec
    cache: KVCacheSpec
    kv_b_format: str
    split_kv_b: bool = False
    q: LinearSpec | None = None
    q_a: LinearSpec | None = None
    q_a_norm: RMSNormSpec | None = None
    q_b: LinearSpec | None = None
    norm: RMSNormSpec | None = None
    residual: bool = True
    temperature: Temperature | None = None
    indexer: TokenIndexerSpec | None = None
    shared_index: bool = False
    rope: RopeSpec | None = None


def split_up_projection(kv_b: torch.Tensor, heads: int, nope: int, value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_b [heads * (nope + value), L] -> (K [heads, nope, L], V [heads, value, L])."""
    rows = kv_b.view(heads, nope + value, -1)
    return rows[:, :nope], rows[:, nope:]


def absorb_query(q_nope: torch.Tensor, k_up: torch.Tensor) -> torch.Tensor:
    """q_nope [T, heads, N] through K [heads, N, L] -> [T, heads, L]: the query in latent space."""
    return torch.einsum("thn,hnl->thl", q_nope, k_up)


def expand_output(latent: torch.Tensor, v_up: torch.Tensor) -> torch.Tensor:
    """Attention over latents [T, heads, L] through V [heads, value, L] -> [T, heads, value]."""
    return torch.einsum("thl,hvl->thv", latent, v_up)
