"""Routed experts on the native kernels: packed expert by expert from the mapped file, run in two parallel regions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.lane import LaneJob
from ktcore.errors import CheckpointError
from ktcore.ops.moe import ExpertsSpec
from ktcore.weights.packed.parts import Part
from ktcore_cpu import packing
from ktcore_cpu.expert_biases import CLAMPED, clamp_of, expert_biases, unsupported_clamp
from ktcore_cpu.numa.module import numa_plan, spread_block
from ktcore_cpu.packings import Packs, packed_format

if TYPE_CHECKING:
    from ktcore_cpu import _native


EXPERTS = frozenset({"weight_on_input", "bias"}) | CLAMPED
"""Fields of the spec that the native experts compute."""


class CpuExperts(Packs):
    """Any top-k, any batch; a token's result depends on neither its batch nor the number of threads.

    Option `activations`: "int8" (groups of 16 share a scale) or "f32". Option `packing`: "compact", or "fast": more
    memory where that buys speed. Option `numa`: "auto", "off", "shard", "expert_parallel" or "replicate", for machines
    with several NUMA nodes; sums over nodes are taken in their order.
    """

    id = "cpu.experts"
    spec_type = ExpertsSpec
    handles = EXPERTS
    options = packing.OPTIONS | {"numa"}

    def supports(self, spec: ExpertsSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format."""
        return unsupported_clamp(spec.clamped) or packing.supports_formats(spec)

    def packed_bytes(self, spec: ExpertsSpec, stored_bytes: int) -> int:
        """Stored bytes, rows padded to whole panels."""
        return expert_bytes(spec, stored_bytes)

    def load(self, request: LoadRequest) -> CpuExpertsModule:
        """Pack all experts."""
        return CpuExpertsModule(request)


class CpuExpertsModule:
    """x float32 [T, hidden], ids int64 [T, k], weights float32 [T, k] -> float32 [T, hidden].

    Attributes:
        numa: how the experts lie over NUMA nodes, and why.
    """

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        spec: ExpertsSpec = request.spec  # type: ignore[assignment]
        self._hidden = spec.hidden
        self._block: _native.ExpertsBlock | _native.ShardedExpertsBlock
        self._bank: _native.ExpertBank | None = None
        self.numa, team = numa_plan(request, spec)
        if team is not None and request.packed is None:
            self._block = spread_block(request, spec, self.numa, team)
            return
        self._bank = pack_experts(request, spec)
        self._block = _native.ExpertsBlock(
            request.runtime.pool,  # type: ignore[attr-defined]
            self._bank,
            activation=spec.activation,
            weight_on_input=spec.weight_on_input,
            exact=packing.exact(request),
            clamp=clamp_of(spec.clamped),
        )

    def expert_load(self) -> torch.Tensor | None:
        """Tokens that each expert has been given, int64 [experts]; not counted where NUMA nodes share them."""
        return None if self._bank is None else torch.from_numpy(self._bank.load)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        x = packing.rows(x, self._hidden)
        if ids.shape != weights.shape or len(ids.shape) != 2 or ids.shape[0] != x.shape[0]:
            raise ValueError(
                f"expected ids and weights [{x.shape[0]}, k], got {list(ids.shape)}, {list(weights.shape)}"
            )
        ids = ids.to(torch.int64).contiguous()
        weights = weights.float().contiguous()
        out = torch.empty_like(x)
        self._block.forward(x.data_ptr(), ids.data_ptr(), weights.data_ptr(), out.data_ptr(), x.shape[0], ids.shape[1])
        return out

    def lane_job(
        self, lane: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> LaneJob:
        """A job for a native lane: reads and writes these host buffers each time it runs, and keeps them."""
        from ktcore_cpu import _native

        if not isinstance(lane, _native.Lane):
            plain: LaneJob = lane.job(lambda: out.copy_(self(x, ids, weights)))
            return plain
        tokens, top_k = ids.shape
        job: LaneJob = lane.experts_job(
            self._block, x.data_ptr(), ids.data_ptr(), weights.data_ptr(), out.data_ptr(), tokens, top_k,
            owners=(x, ids, weights, out),
        )  # fmt: skip
        return job


def pack_experts(request: LoadRequest, spec: ExpertsSpec, prefix: str = "") -> _native.ExpertBank:
    """All experts in the native layout, with their biases; at most `packing.RELEASE_EVERY` of them are in memory twice.

    Raises:
        CheckpointError: they cannot be packed.
    """
    from ktcore_cpu import _native

    weights = [request.weights[prefix + role] for role in ("gate", "up", "down")]
    gate, up, down = (packed_format(request, w.format) for w in weights)
    sizes = (spec.hidden, spec.intermediate, gate, up, down)
    request.runtime.switch.use(gate, up, down)  # type: ignore[attr-defined]

    def pack_one(bank: _native.ExpertBank, at: int, expert: int) -> None:
        with packing.raw_expert(weights, expert) as raws:
            bank.pack(request.runtime.pool, at, *raws)  # type: ignore[attr-defined]

    def fill(expert: int) -> np.ndarray:
        bank = _native.ExpertBank(1, *sizes)
        pack_one(bank, 0, expert)
        return bank.contents

    try:
        if request.packed is not None:
            kind = f"experts {gate} {up} {down}, {spec.hidden} x {spec.intermediate}"
            part = Part(
                f"{request.name}: {prefix}gate, up, down",
                packing.LAYOUT,
                kind,
                weights,
                spec.experts,
                _native.ExpertBank.expert_bytes(*sizes),
            )
            stored = request.packed.get(part, fill)
            if stored is not None:
                bank = _native.ExpertBank.borrow(spec.experts, *sizes, stored)
                bank.set_biases(*expert_biases(request, spec, prefix))
                return bank
        bank = _native.ExpertBank(spec.experts, *sizes)
        for expert in range(spec.experts):
            pack_one(bank, expert, expert)
        bank.set_biases(*expert_biases(request, spec, prefix))
    except ValueError as error:
        raise CheckpointError(f"{request.name}: cannot pack the experts: {error}") from error
    return bank


def expert_bytes(spec: ExpertsSpec, stored_bytes: int) -> int:
    """Packed bytes of a layer's experts: rows are padded to whole panels, gate's and up's more than down's."""
    widest = min(spec.intermediate, spec.hidden)
    biases = spec.bias * spec.experts * 4 * (2 * spec.intermediate + spec.hidden + 3 * packing.PANEL_ROWS)
    return packing.padded_bytes(widest, stored_bytes, spec.formats()) + biases
