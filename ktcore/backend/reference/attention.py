"""References of the attention branches, composed of parts that may come from other backends."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend.branches import (
    ATTENTION,
    INDEXER,
    MLA,
    attention_branch,
    block_indexer_branch,
    chosen_tokens,
    indexer_branch,
    mla_branch,
)
from ktcore.backend.implementation import LoadRequest, Module
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation, loaded
from ktcore.errors import BackendError
from ktcore.ops.attention import AttentionSpec
from ktcore.ops.batch import StepBatch
from ktcore.ops.block_indexer import BlockIndexerSpec
from ktcore.ops.indexer import TokenIndexerSpec
from ktcore.ops.kv_cache import attend
from ktcore.ops.mla import MLASpec, absorb_query, expand_output, split_up_projection


class ReferenceAttention(ReferenceImplementation):
    """Grouped-query attention."""

    id = "reference.attention"
    spec_type = AttentionSpec
    handles = ATTENTION | {"sinks"}

    def load(self, request: LoadRequest) -> Module:
        return attention_branch(request, loaded(request, "sinks") if cast(AttentionSpec, request.spec).sinks else None)

    def packed_bytes(self, spec: AttentionSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.heads * spec.sinks


class ReferenceMLA(ReferenceImplementation):
    """Multi-head latent attention. Option `absorbed` (default true): attend over latents instead of expanded keys.

    The plain form needs to read the cache back, so it works with the reference cache only.
    """

    id = "reference.mla"
    spec_type = MLASpec
    handles = MLA
    options = frozenset({"absorbed"})

    def load(self, request: LoadRequest) -> Module:
        absorbed = bool(request.options.get("absorbed", True))
        if not absorbed and not hasattr(request.children["cache"], "gather"):
            raise BackendError(
                f"{request.name}: absorbed: false reads cached latents back, which this node's KV cache cannot do",
                "use reference.kv_cache for it, or leave absorbed at true",
            )
        latents = _LatentAttention(request)
        return mla_branch(request, latents.absorbed if absorbed else latents.plain)

    def packed_bytes(self, spec: MLASpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.heads * (spec.nope_dim + spec.value_dim) * spec.latent


class ReferenceTokenIndexer(ReferenceImplementation):
    """Chooses tokens by index scores."""

    id = "reference.token_indexer"
    spec_type = TokenIndexerSpec
    handles = INDEXER | {"gate"}

    def load(self, request: LoadRequest) -> Module:
        ape = loaded(request, "ape") if cast(TokenIndexerSpec, request.spec).gate else None
        return indexer_branch(request, loaded(request, "k_norm"), loaded(request, "k_norm_bias"), ape)

    def packed_bytes(self, spec: TokenIndexerSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * (2 + spec.cache.pool) * spec.head_dim


class ReferenceBlockIndexer(ReferenceImplementation):
    """Chooses blocks of tokens by index scores."""

    id = "reference.block_indexer"
    spec_type = BlockIndexerSpec

    def load(self, request: LoadRequest) -> Module:
        return block_indexer_branch(request)


class _LatentAttention:
    def __init__(self, request: LoadRequest) -> None:
        self.spec = cast(MLASpec, request.spec)
        self.parts = request.children
        self.k_up, self.v_up = up_projections(request)

    def absorbed(self, step: StepBatch, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        q = torch.cat((absorb_query(q_nope, self.k_up), q_rope), -1)
        more = chosen_tokens(self.spec, step, q.device)
        return expand_output(self.parts["cache"].attend(step, q, self.spec.scale, **more), self.v_up)

    def plain(self, step: StepBatch, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        q = torch.cat((q_nope, q_rope), -1)
        chosen = chosen_tokens(self.spec, step, q.device).get("chosen")
        out = []
        for span, rows in self.parts["cache"].gather(step):
            latent, k_rope = rows.split((self.spec.latent, self.spec.rope_dim), -1)
            k_nope = torch.einsum("tl,hnl->thn", latent, self.k_up)
            v = torch.einsum("tl,hvl->thv", latent, self.v_up)
            k = torch.cat((k_nope, k_rope[:, None, :].expand(-1, self.spec.heads, -1)), -1)
            out.append(attend(q[span], k, v, self.spec.scale, chosen=None if chosen is None else chosen[span]))
        return torch.cat(out)


def up_projections(request: LoadRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """K [heads, nope, latent] and V [heads, value, latent] from either stored form."""
    spec = cast(MLASpec, request.spec)
    if spec.split_kv_b:
        return loaded(request, "k_b").transpose(1, 2).contiguous(), loaded(request, "v_b")
    return split_up_projection(loaded(request, "kv_b"), spec.heads, spec.nope_dim, spec.value_dim)
