"""Embedding, RMSNorm, RoPE and the gated MLP."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.branches import MLP, mlp_branch
from ktcore.backend.handles import FREQUENCIES
from ktcore.backend.loading import compute_dtype, embedding_rows
from ktcore.backend.mirror import upload
from ktcore.ops.embedding import EmbeddingSpec
from ktcore.ops.mlp import MLPSpec
from ktcore.ops.mlp import gated as torch_gated
from ktcore.ops.norm import RMSNormSpec
from ktcore.ops.rope import RopeSpec, inverse_frequencies
from ktcore_npu.operators.base import FLOAT_BYTES, HALF_BYTES, NpuImplementation, npu

ROPE_WIDTH = 896
ROPE_HEADS = 1000


class NpuEmbedding(NpuImplementation):
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


class NpuRMSNorm(NpuImplementation):
    """`npu_rms_norm(self, gamma, epsilon) -> (y, rstd)`, in float32 throughout (op-plugin `torch_npu-npu_rms_norm.md`).

    A norm without a weight gets ones. `npu_add_rms_norm` has no place here: the residual belongs to the branch before.
    """

    spec_type = RMSNormSpec
    handles = frozenset({"offset"})

    def load(self, request: LoadRequest) -> Module:
        """Add the offset once."""
        spec, ops = cast(RMSNormSpec, request.spec), npu(request).ops
        if "weight" in request.weights:
            gamma = (request.weights["weight"].tensor() + spec.offset).to(request.runtime.device)
        else:
            gamma = torch.ones(spec.dim).to(request.runtime.device)

        def run(x: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, ops.npu_rms_norm(x.contiguous(), gamma, epsilon=spec.eps)[0])

        return run

    def packed_bytes(self, spec: RMSNormSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.dim


class NpuRope(NpuImplementation):
    """`npu_rotary_mul(input, r1, r2, rotary_mode)` on [1, T, heads, D] with cos and sin [1, T, 1, D].

    "half" and "interleave" keep the order of the input; D is even and below 896, and "interleave" takes fewer than
    1000 heads (op-plugin `torch_npu-npu_rotary_mul.md`). `npu_interleave_rope` leaves halves where pairs came in, and
    so is not this operator.
    """

    spec_type = RopeSpec
    handles = FREQUENCIES

    def supports(self, spec: RopeSpec, device: Capabilities) -> Supported | Unsupported:
        """Widths as documented."""
        if spec.dim >= ROPE_WIDTH:
            return Unsupported(f"npu_rotary_mul takes widths below {ROPE_WIDTH}, not {spec.dim}")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """Bring the frequencies to the device, at full width."""
        spec, runtime = cast(RopeSpec, request.spec), npu(request)
        divisors = request.weights["freq_factors"].tensor() if spec.freq_factors else None
        found, factor = inverse_frequencies(spec, divisors)
        half = spec.pairing == "half"
        wide = torch.cat((found, found)) if half else found.repeat_interleave(2)
        frequencies, mode, ops = wide.to(runtime.device), "half" if half else "interleave", runtime.ops

        def run(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            positions = positions if positions.device == x.device else upload(runtime, positions)
            angle = positions[:, None].float() * frequencies
            cos, sin = ((f * factor)[None, :, None, :] for f in (angle.cos(), angle.sin()))
            turned = x[..., : spec.dim].contiguous()[None]
            heads = range(0, x.shape[1], ROPE_HEADS - 1)
            parts = [
                ops.npu_rotary_mul(turned[:, :, h : h + ROPE_HEADS - 1].contiguous(), cos, sin, rotary_mode=mode)
                for h in heads
            ]
            out = (parts[0] if len(parts) == 1 else torch.cat(parts, 2))[0]
            return torch.cat((out, x[..., spec.dim :]), -1) if x.shape[-1] > spec.dim else cast(torch.Tensor, out)

        return run

    def packed_bytes(self, spec: RopeSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.dim


class NpuMLP(NpuImplementation):
    """Composed of the projections that the rules chose; `npu_swiglu(x, dim)` is silu(first half) * second half."""

    spec_type = MLPSpec
    handles = MLP

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        ops = npu(request).ops

        def gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
            if activation != "silu":
                return torch_gated(gate, up, activation)
            return cast(torch.Tensor, ops.npu_swiglu(torch.cat((gate, up), -1), dim=-1))

        return mlp_branch(request, gate)
