"""References of the small operators: embedding, linear, RMSNorm, RoPE, MLP, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ktcore.backend.branches import MLP, mlp_branch
from ktcore.backend.handles import FREQUENCIES
from ktcore.backend.implementation import LoadRequest, Module
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation, loaded
from ktcore.ops.embedding import EmbeddingSpec, embedding
from ktcore.ops.linear import LinearSpec, capped, linear
from ktcore.ops.mlp import MLPSpec
from ktcore.ops.norm import RMSNormSpec, norm_factors, rms_norm
from ktcore.ops.rope import RopeSpec, inverse_frequencies, rope
from ktcore.ops.sampling import SamplingParams, SamplingSpec, sample


class ReferenceEmbedding(ReferenceImplementation):
    """Rows of a float32 table."""

    id = "reference.embedding"
    spec_type = EmbeddingSpec
    handles = frozenset({"scale"})

    def load(self, request: LoadRequest) -> Module:
        weight, scale = loaded(request, "weight"), cast(EmbeddingSpec, request.spec).scale
        return lambda ids: embedding(ids.to(weight.device), weight, scale)

    def packed_bytes(self, spec: EmbeddingSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.vocab * spec.hidden


class ReferenceLinear(ReferenceImplementation):
    """torch's linear in float32."""

    id = "reference.linear"
    spec_type = LinearSpec
    handles = frozenset({"bias", "softcap"})

    def load(self, request: LoadRequest) -> Module:
        spec = cast(LinearSpec, request.spec)
        weight = loaded(request, "weight")
        bias = loaded(request, "bias") if spec.bias else None
        return lambda x: capped(linear(x, weight, bias), spec.softcap)

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.out_features * (spec.in_features + spec.bias)


class ReferenceRMSNorm(ReferenceImplementation):
    """The formula itself."""

    id = "reference.rms_norm"
    spec_type = RMSNormSpec
    handles = frozenset({"offset", "scale"})

    def load(self, request: LoadRequest) -> Module:
        spec = cast(RMSNormSpec, request.spec)
        weight = norm_factors(spec, loaded(request, "weight") if "weight" in request.weights else None)
        weight = None if weight is None else weight.to(request.runtime.device)
        return lambda x: rms_norm(x, weight, spec.eps)

    def packed_bytes(self, spec: RMSNormSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.dim if stored_bytes else 0


class ReferenceRope(ReferenceImplementation):
    """Angles computed anew for every call."""

    id = "reference.rope"
    spec_type = RopeSpec
    handles = FREQUENCIES

    def load(self, request: LoadRequest) -> Module:
        spec = cast(RopeSpec, request.spec)
        divisors = request.weights["freq_factors"].tensor() if spec.freq_factors else None
        freq, factor = inverse_frequencies(spec, divisors)
        freq = freq.to(request.runtime.device)
        return lambda x, positions: rope(x, positions.to(x.device), freq, factor, spec.pairing)

    def packed_bytes(self, spec: RopeSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.dim // 2


class ReferenceMLP(ReferenceImplementation):
    """Composed of three projections and, in a branch of its own, a norm."""

    id = "reference.mlp"
    spec_type = MLPSpec
    handles = MLP

    def load(self, request: LoadRequest) -> Module:
        return mlp_branch(request)


class ReferenceSampling(ReferenceImplementation):
    """Draws from the logits on whatever device they are."""

    id = "reference.sampling"
    spec_type = SamplingSpec

    def load(self, request: LoadRequest) -> Module:
        return _sample


def _sample(
    logits: torch.Tensor,
    params: SamplingParams,
    seen: Sequence[int] = (),
    generator: torch.Generator | None = None,
    prompt_len: int = 0,
) -> Any:
    return sample(logits, params, seen, generator, prompt_len)
