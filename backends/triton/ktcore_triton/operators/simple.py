"""Embedding, RMSNorm, RoPE and the gated MLP."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import LoadRequest, Module
from ktcore.backend.branches import MLP, mlp_branch
from ktcore.backend.handles import FREQUENCIES
from ktcore.backend.loading import compute_dtype, embedding_rows, on_device
from ktcore.backend.mirror import upload
from ktcore.ops.embedding import EmbeddingSpec
from ktcore.ops.mlp import MLPSpec
from ktcore.ops.mlp import gated as torch_gated
from ktcore.ops.norm import RMSNormSpec, norm_factors
from ktcore.ops.rope import RopeSpec, inverse_frequencies
from ktcore_triton.operators.base import FLOAT_BYTES, HALF_BYTES, TritonImplementation


class TritonEmbedding(TritonImplementation):
    """A gather of torch's from a table in 16 bits; in float32 where the checkpoint has it so."""

    spec_type = EmbeddingSpec
    handles = frozenset({"scale"})
    options = frozenset({"compute"})

    def load(self, request: LoadRequest) -> Module:
        """Dequantise the table."""
        in_float32 = cast(EmbeddingSpec, request.spec).weight_format == "F32"
        return embedding_rows(request, torch.float32 if in_float32 else compute_dtype(request))

    def packed_bytes(self, spec: EmbeddingSpec, stored_bytes: int) -> int:
        """Of the table."""
        return spec.vocab * spec.hidden * (FLOAT_BYTES if spec.weight_format == "F32" else HALF_BYTES)


class TritonRMSNorm(TritonImplementation):
    """With a weight or without; in float32 throughout."""

    spec_type = RMSNormSpec
    handles = frozenset({"offset", "scale"})

    def load(self, request: LoadRequest) -> Module:
        """Add the offset once."""
        spec = cast(RMSNormSpec, request.spec)
        weight = norm_factors(spec, on_device(request, "weight") if "weight" in request.weights else None)
        weight = None if weight is None else weight.to(request.runtime.device)

        def run(x: torch.Tensor) -> torch.Tensor:
            from ktcore_triton.rows import rms_norm

            return rms_norm(x.contiguous(), weight, spec.eps)[0]

        return run

    def packed_bytes(self, spec: RMSNormSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.dim if stored_bytes else 0


class TritonRope(TritonImplementation):
    """Both pairings, partial width, every scaling; frequencies are worked out once, on the host."""

    spec_type = RopeSpec
    handles = FREQUENCIES

    def load(self, request: LoadRequest) -> Module:
        """Bring the frequencies to the device."""
        spec, runtime = cast(RopeSpec, request.spec), request.runtime
        divisors = request.weights["freq_factors"].tensor() if spec.freq_factors else None
        found, factor = inverse_frequencies(spec, divisors)
        frequencies = found.to(runtime.device)

        def run(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            from ktcore_triton.rows import rope

            positions = positions if positions.device == x.device else upload(runtime, positions)
            return rope(x.contiguous(), positions, frequencies, factor, spec.pairing)

        return run

    def packed_bytes(self, spec: RopeSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.dim // 2


class TritonMLP(TritonImplementation):
    """Composed of the projections that the rules chose; activation and product in one launch."""

    spec_type = MLPSpec
    handles = MLP

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        return mlp_branch(request, gated)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up."""
    if activation != "silu":
        return torch_gated(gate, up, activation)
    from ktcore_triton.rows import swiglu

    return swiglu(gate, up)
