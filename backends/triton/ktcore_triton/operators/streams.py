"""Residual streams: hyper-connections and gated streams by kernels of their own, what stands around composed."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import LoadRequest, Module
from ktcore.backend.branches import stream_branch, stream_end
from ktcore.backend.loading import on_device
from ktcore.ops.streams import GatedStreamsSpec, HyperConnectionSpec, StreamBranchSpec, StreamEndSpec
from ktcore_triton.operators.base import FLOAT_BYTES, TritonImplementation


class TritonHyperConnection(TritonImplementation):
    """In float32: one product for all weights of all tokens, then a launch before the branch and one behind it."""

    spec_type = HyperConnectionSpec
    handles = frozenset({"leave"})

    def load(self, request: LoadRequest) -> Module:
        """Bring the weights to the device."""
        return _HyperConnection(request)

    def packed_bytes(self, spec: HyperConnectionSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * (spec.rows * (spec.streams * spec.hidden + 1) + spec.parts)


class _HyperConnection:
    def __init__(self, request: LoadRequest) -> None:
        self._spec = cast(HyperConnectionSpec, request.spec)
        self._fn = on_device(request, "fn").t().contiguous()
        self._base, self._scale = on_device(request, "base"), on_device(request, "scale")

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `HyperConnectionSpec` says."""
        from ktcore_triton.streams import connect

        s, x = self._spec, x.contiguous()
        return connect(
            x, torch.mm(x, self._fn), self._base, self._scale, s.streams, s.eps, s.rms_eps, s.rounds if s.leave else 0
        )

    def leave(self, x: torch.Tensor, y: torch.Tensor, carry: torch.Tensor) -> torch.Tensor:
        """As `HyperConnectionSpec` says."""
        from ktcore_triton.streams import leave

        return leave(x.contiguous(), y.contiguous(), carry, self._spec.streams)


class TritonGatedStreams(TritonImplementation):
    """Composed of its projections; norm, gate and sum in float32."""

    spec_type = GatedStreamsSpec
    handles = frozenset({"inject", "norm_offset"})

    def load(self, request: LoadRequest) -> Module:
        """Bring the norm to the device; the parts hold the other weights."""
        return _GatedStreams(request)

    def packed_bytes(self, spec: GatedStreamsSpec, stored_bytes: int) -> int:
        """Float32."""
        return FLOAT_BYTES * spec.streams * spec.hidden


class _GatedStreams:
    def __init__(self, request: LoadRequest) -> None:
        self._spec = spec = cast(GatedStreamsSpec, request.spec)
        self._parts = request.children
        self._norm = on_device(request, "norm") + spec.norm_offset

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `GatedStreamsSpec` says."""
        from ktcore_triton.streams import gated_mean, stream_norm

        s, parts = self._spec, self._parts
        n = stream_norm(x.contiguous(), self._norm, s.streams, s.eps)
        up = parts["up"](torch.nn.functional.silu(parts["down"](n) / s.streams))
        inject = (2 * torch.sigmoid(parts["inject"](n) / s.streams)).contiguous() if s.inject else None
        return gated_mean(n, up.contiguous(), s.streams), inject

    def leave(self, x: torch.Tensor, y: torch.Tensor, carry: torch.Tensor) -> torch.Tensor:
        """As `GatedStreamsSpec` says."""
        from ktcore_triton.streams import leave

        return leave(x.contiguous(), y.contiguous(), carry, self._spec.streams)


class TritonStreamBranch(TritonImplementation):
    """Composed of its mixing and its branch."""

    spec_type = StreamBranchSpec

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        return stream_branch(request)


class TritonStreamEnd(TritonImplementation):
    """Composed of its mixing and its norm."""

    spec_type = StreamEndSpec
    handles = frozenset({"mix", "norm"})

    def load(self, request: LoadRequest) -> Module:
        """Nothing to pack: the parts hold the weights."""
        return stream_end(request)
