"""References of residual streams: how a branch reads them, how its result gets into them, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ktcore.backend.branches import stream_branch, stream_end
from ktcore.backend.implementation import LoadRequest, Module
from ktcore.backend.reference.base import FLOAT_BYTES, ReferenceImplementation, loaded
from ktcore.ops.streams import (
    GatedStreamsSpec,
    HyperConnectionSpec,
    StreamBranchSpec,
    StreamEndSpec,
    connection_weights,
    entered,
    left,
    stream_norm,
)


class ReferenceHyperConnection(ReferenceImplementation):
    """The formulas in float32."""

    id = "reference.hyper_connection"
    spec_type = HyperConnectionSpec
    handles = frozenset({"leave"})
    capturable = True

    def load(self, request: LoadRequest) -> Module:
        return _HyperConnection(request)

    def packed_bytes(self, spec: HyperConnectionSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * (spec.rows * (spec.streams * spec.hidden + 1) + spec.parts)


class _HyperConnection:
    def __init__(self, request: LoadRequest) -> None:
        self._spec = cast(HyperConnectionSpec, request.spec)
        self._weights = tuple(loaded(request, role) for role in ("fn", "base", "scale"))

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """As `HyperConnectionSpec` says."""
        pre, *carry = connection_weights(self._spec, x, *self._weights)
        return entered(x, pre), carry

    def leave(self, x: torch.Tensor, y: torch.Tensor, carry: Any) -> torch.Tensor:
        """As `HyperConnectionSpec` says."""
        post, mix = carry
        return left(x, y, post, mix)


class ReferenceGatedStreams(ReferenceImplementation):
    """Composed of its projections."""

    id = "reference.gated_streams"
    spec_type = GatedStreamsSpec
    handles = frozenset({"inject", "norm_offset"})
    capturable = True

    def load(self, request: LoadRequest) -> Module:
        return _GatedStreams(request)

    def packed_bytes(self, spec: GatedStreamsSpec, stored_bytes: int) -> int:
        return FLOAT_BYTES * spec.streams * spec.hidden


class _GatedStreams:
    def __init__(self, request: LoadRequest) -> None:
        self._spec = spec = cast(GatedStreamsSpec, request.spec)
        self._parts = request.children
        self._norm = loaded(request, "norm") + spec.norm_offset

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """As `GatedStreamsSpec` says."""
        s, parts = self._spec, self._parts
        n = stream_norm(x, self._norm, s.streams, s.eps)
        mix = torch.sigmoid(parts["up"](torch.nn.functional.silu(parts["down"](n) / s.streams)))
        inject = 2 * torch.sigmoid(parts["inject"](n) / s.streams) if s.inject else None
        return (mix * n).view(-1, s.streams, s.hidden).mean(1), inject

    def leave(self, x: torch.Tensor, y: torch.Tensor, carry: Any) -> torch.Tensor:
        """As `GatedStreamsSpec` says."""
        return cast(torch.Tensor, x + (carry[..., None] * y[:, None]).flatten(1))


class ReferenceStreamBranch(ReferenceImplementation):
    """Composed of its mixing and its branch, whoever made those."""

    id = "reference.stream_branch"
    spec_type = StreamBranchSpec
    capturable = True

    def load(self, request: LoadRequest) -> Module:
        return stream_branch(request)


class ReferenceStreamEnd(ReferenceImplementation):
    """Composed of its mixing and its norm."""

    id = "reference.stream_end"
    spec_type = StreamEndSpec
    handles = frozenset({"mix", "norm"})
    capturable = True

    def load(self, request: LoadRequest) -> Callable[[torch.Tensor], torch.Tensor]:
        return stream_end(request)
