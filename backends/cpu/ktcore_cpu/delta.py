"""Gated delta net as one native call: projections, convolution, recurrence, gated norm, output; owns its states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.linear_attention import GatedDeltaNetSpec
from ktcore_cpu import packing
from ktcore_cpu.attention import native_step
from ktcore_cpu.packings import Packs

LANES = 16
"""Values of a native vector: head widths are multiples of it."""
FLOAT_BYTES = 4


class CpuGatedDeltaNet(Packs):
    """Up to 4 new tokens of a sequence go through the recurrence, more by chunks of 16; the two round differently.

    States are float32 slots: the convolution's last inputs and a matrix a head.
    """

    id = "cpu.gated_delta_net"
    spec_type = GatedDeltaNetSpec
    handles = frozenset({"decay_log", "tiled", "sigmoid_gate", "norm", "norm.offset", "residual", "out_norm.offset"})
    fused = True
    options = packing.OPTIONS

    def supports(self, spec: GatedDeltaNetSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format; head widths that are multiples of 16."""
        if any(w % LANES or w > 1024 for w in (spec.key_dim, spec.value_dim)):
            return Unsupported(f"heads whose width is not a multiple of {LANES}, or above 1024")
        if not 2 <= spec.conv_width <= 16:
            return Unsupported("a convolution that is not 2 to 16 tokens wide")
        return packing.supports_formats(spec)

    def state_bytes(self, spec: GatedDeltaNetSpec) -> int:
        """As float32."""
        return FLOAT_BYTES * spec.state.values

    def load(self, request: LoadRequest) -> CpuGatedDeltaNetModule:
        """Pack the five projections."""
        return CpuGatedDeltaNetModule(request)


class CpuGatedDeltaNetModule:
    """x float32 [T, hidden], step -> float32 [T, hidden]; owns the layer's states."""

    keeps_states = True

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        spec: GatedDeltaNetSpec = request.spec  # type: ignore[assignment]
        decay = _vector(request, "decay")
        channels = spec.qkv.out_features
        self._name, self._hidden = request.name, spec.hidden
        self._shapes = spec.state.shapes
        self._conv = self._state = torch.empty(0)
        self._held = torch.empty(0, dtype=torch.int64)
        self._block = _native.DeltaBlock(
            request.runtime.pool,  # type: ignore[attr-defined]
            packing.pack(request, "qkv.weight"),
            packing.pack(request, "z.weight"),
            packing.pack(request, "b.weight"),
            packing.pack(request, "a.weight"),
            packing.pack(request, "o.weight"),
            key_heads=spec.key_heads,
            value_heads=spec.value_heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            width=spec.conv_width,
            conv=_vector(request, "conv").reshape(channels, spec.conv_width),
            decay=-np.exp(decay) if spec.decay_log else decay,
            dt_bias=_vector(request, "dt_bias"),
            out_norm=packing.norm_weight(request.weights, "out_norm.weight", spec.out_norm),
            out_eps=spec.out_norm.eps,
            norm=packing.norm_weight(request.weights, "norm.weight", spec.norm),
            norm_eps=spec.norm.eps if spec.norm else 0.0,
            residual=spec.residual,
            exact=packing.exact(request),
            tiled=spec.tiled,
            sigmoid_gate=spec.sigmoid_gate,
        )

    def allocate_states(self, slots: int) -> None:
        """Make room for `slots` sequences; earlier content is gone."""
        self._conv, self._state = (torch.empty(slots, *shape) for shape in self._shapes)
        self._held = torch.full((slots,), -1)

    def state_tensors(self) -> tuple[torch.Tensor, ...]:
        """How many tokens slots hold [slots], the convolution's inputs, and the states."""
        return self._held, self._conv, self._state

    def copy_states(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy slots `source` to slots `target`, pair by pair."""
        for a, b in zip(source, target, strict=True):
            self._conv[b], self._state[b] = self._conv[a], self._state[a]
            self._held[b] = self._held[a]

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        x = packing.rows(x, self._hidden)
        out = torch.empty_like(x)
        self._check(step)
        try:
            self._block.forward(
                x.data_ptr(),
                out.data_ptr(),
                native_step(step),
                step.state_slots,
                self._conv.data_ptr(),
                self._state.data_ptr(),
                len(self._held),
                step.kept_states,
            )
        except ValueError as error:
            raise BackendError(f"{self._name}: {error}") from error
        for slot, tokens in zip(step.state_slots, step.context_lens, strict=True):
            self._held[slot] = tokens
        for i, (slot, tokens) in enumerate(step.kept_states):
            if slot >= 0:
                self._held[slot] = step.context_lens[i] - (step.q_start[i + 1] - step.q_start[i]) + tokens
        return out

    def _check(self, step: StepBatch) -> None:
        """A slot that holds the state after other tokens would give wrong tokens silently."""
        for i, slot in enumerate(step.state_slots):
            before = step.context_lens[i] - (step.q_start[i + 1] - step.q_start[i])
            if before and 0 <= slot < len(self._held) and int(self._held[slot]) != before:
                held = int(self._held[slot])
                raise BackendError(
                    f"{self._name}: slot {slot} holds the state after {held} tokens, {before} are needed"
                )


def _vector(request: LoadRequest, role: str) -> np.ndarray:
    return np.ascontiguousarray(request.weights[role].tensor().float().numpy())
