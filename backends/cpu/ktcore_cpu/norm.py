"""RMSNorm as one native call."""

from __future__ import annotations

from typing import Any, cast

import torch

from ktcore.backend import Capabilities, Implementation, LoadRequest, Supported, Unsupported
from ktcore.errors import BackendError
from ktcore.ops.norm import RMSNormSpec
from ktcore_cpu import packing


class CpuRMSNorm(Implementation):
    """Over the last axis, with a weight or without, zero-centred or not."""

    id = "cpu.rms_norm"
    spec_type = RMSNormSpec
    handles = frozenset({"offset", "scale"})

    def supports(self, spec: RMSNormSpec, device: Capabilities) -> Supported | Unsupported:
        """All of them."""
        return Supported()

    def load(self, request: LoadRequest) -> CpuRMSNormModule:
        """Read the weight."""
        return CpuRMSNormModule(request)


class CpuRMSNormModule:
    """float32 [..., dim] -> the same shape.

    Args:
        role: of its weight in the request.

    Raises:
        BackendError: on a call whose last axis is not `dim` wide, or whose tensor is not in the host's memory.
    """

    def __init__(self, request: LoadRequest, role: str = "weight", spec: RMSNormSpec | None = None) -> None:
        from ktcore_cpu import _native

        spec = spec or cast(RMSNormSpec, request.spec)
        self._call = _native.rms_norm
        self._pool: Any = request.runtime.pool  # type: ignore[attr-defined]
        self._weight: Any = packing.norm_weight(request.weights, role, spec)
        self._eps, self._dim, self._name = spec.eps, spec.dim, request.name

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.dim() or x.shape[-1] != self._dim or x.device.type != "cpu":
            raise BackendError(f"{self._name}: x {list(x.shape)} on {x.device} for a norm over {self._dim} on the host")
        x = x.float().contiguous()
        out = torch.empty_like(x)
        self._call(self._pool, x.data_ptr(), self._weight, self._eps, out.data_ptr(), x.numel() // self._dim)
        return out


class PostNorm:
    """The end of a branch whose result is normed before x is added: y [T, hidden] -> norm(y), or x + norm(y)."""

    def __init__(self, request: LoadRequest, spec: RMSNormSpec, residual: bool) -> None:
        self._norm = CpuRMSNormModule(request, "post_norm.weight", spec)
        self._residual = residual

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = self._norm(y)
        return out.add_(x) if self._residual else out
