"""Residual streams as two native calls: what a branch reads of them, and the streams after it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from ktcore.backend import Capabilities, Implementation, LoadRequest, Supported, Unsupported
from ktcore.errors import BackendError
from ktcore.ops.streams import GatedStreamsSpec, HyperConnectionSpec
from ktcore_cpu import packing
from ktcore_cpu.packings import Packs

LANES, MOST = 16, 8
"""Streams are a multiple of so many values wide, and at most so many."""
FLOAT_BYTES = 4


class CpuHyperConnection(Implementation):
    """Float32 throughout; results depend on neither threads nor the tokens beside."""

    id = "cpu.hyper_connection"
    spec_type = HyperConnectionSpec
    handles = frozenset({"leave"})

    def supports(self, spec: HyperConnectionSpec, device: Capabilities) -> Supported | Unsupported:
        """Up to 8 streams whose width is a multiple of 16."""
        return _shape(spec)

    def packed_bytes(self, spec: HyperConnectionSpec, stored_bytes: int) -> int:
        """As float32."""
        return FLOAT_BYTES * (spec.rows * (spec.streams * spec.hidden + 1) + spec.parts)

    def load(self, request: LoadRequest) -> StreamsModule:
        """Read the weights as float32."""
        from ktcore_cpu import _native

        spec = cast(HyperConnectionSpec, request.spec)
        block = _native.HyperBlock(
            request.runtime.pool,  # type: ignore[attr-defined]
            _floats(request, "fn"),
            hidden=spec.hidden,
            streams=spec.streams,
            rounds=spec.rounds,
            eps=spec.eps,
            rms_eps=spec.rms_eps,
            leaves=bool(spec.leave),
            base=_floats(request, "base"),
            scale=_floats(request, "scale"),
        )
        return StreamsModule(request.name, block, spec.hidden, spec.streams)


class CpuGatedStreams(Packs):
    """Fused: norms, the two projections of the mixture and the gates, with activations quantised once for each."""

    id = "cpu.gated_streams"
    spec_type = GatedStreamsSpec
    handles = frozenset({"inject", "norm_offset"})
    fused = True
    options = packing.OPTIONS

    def supports(self, spec: GatedStreamsSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format; up to 8 streams whose width is a multiple of 16."""
        fits = _shape(spec)
        return fits if isinstance(fits, Unsupported) else packing.supports_formats(spec)

    def load(self, request: LoadRequest) -> StreamsModule:
        """Pack the projections."""
        from ktcore_cpu import _native

        spec = cast(GatedStreamsSpec, request.spec)
        block = _native.GatedStreamsBlock(
            request.runtime.pool,  # type: ignore[attr-defined]
            packing.pack(request, "down.weight"),
            packing.pack(request, "up.weight"),
            packing.pack(request, "inject.weight") if spec.inject else None,
            hidden=spec.hidden,
            streams=spec.streams,
            norm=_floats(request, "norm") + np.float32(spec.norm_offset),
            eps=spec.eps,
            exact=packing.exact(request),
        )
        return StreamsModule(request.name, block, spec.hidden, spec.streams)


class StreamsModule:
    """`enter` and `leave` as the specs say; the carry is float32 [T, what the block needs]."""

    def __init__(self, name: str, block: Any, hidden: int, streams: int) -> None:
        self._name, self._block, self._hidden, self._width = name, block, hidden, streams * hidden
        self._carry = block.carry

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Streams x [T, N * hidden] -> [T, hidden], carry."""
        x = self._checked(x, self._width)
        out, carry = torch.empty(len(x), self._hidden), torch.empty(len(x), self._carry)
        self._block.enter(x.data_ptr(), out.data_ptr(), carry.data_ptr(), len(x))
        return out, carry

    def leave(self, x: torch.Tensor, y: torch.Tensor, carry: Any) -> torch.Tensor:
        """The same streams x, what the branch gave y [T, hidden], the carry of `enter` -> streams [T, N * hidden]."""
        x, y = self._checked(x, self._width), self._checked(y, self._hidden)
        if not len(x) == len(y) == len(carry):
            raise BackendError(
                f"{self._name}: {len(x)} tokens in the streams, {len(y)} from the branch, {len(carry)} before"
            )
        out = torch.empty_like(x)
        self._block.leave(x.data_ptr(), y.data_ptr(), carry.data_ptr(), out.data_ptr(), len(x))
        return out

    def _checked(self, x: torch.Tensor, width: int) -> torch.Tensor:
        if x.dim() != 2 or x.shape[1] != width or x.device.type != "cpu":
            raise BackendError(
                f"{self._name}: x {list(x.shape)} on {x.device}, [tokens, {width}] on the host is needed"
            )
        return x.float().contiguous()


def _shape(spec: HyperConnectionSpec | GatedStreamsSpec) -> Supported | Unsupported:
    if spec.hidden % LANES:
        return Unsupported(f"streams whose width is not a multiple of {LANES}")
    if not 1 <= spec.streams <= MOST:
        return Unsupported(f"more than {MOST} residual streams")
    return Supported()


def _floats(request: LoadRequest, role: str) -> np.ndarray:
    return np.ascontiguousarray(request.weights[role].tensor().float().numpy())
