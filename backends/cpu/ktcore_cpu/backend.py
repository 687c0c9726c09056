"""The CPU backend object and its runtime: host memory, and one native thread pool an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ktcore.backend import Backend, Capabilities, Implementation
from ktcore.backend.host import HostRuntime
from ktcore.backend.lane import Lane
from ktcore.errors import BackendError
from ktcore.placement.topology import Topology
from ktcore_cpu.numa.runtime import NumaNodes
from ktcore_cpu.plugin import DECLARED
from ktcore_cpu.switch import Switch

if TYPE_CHECKING:
    from ktcore_cpu import _native


class CpuRuntime(HostRuntime):
    """The host with a pool of worker threads.

    Attributes:
        pool: native pool that every module of this runtime runs on, but for experts that are spread over NUMA nodes.
        switch: where its products of few tokens end.
        numa: the NUMA nodes, with threads of their own where experts use them.
    """

    def __init__(self, threads: int | None = None, topology: Topology | None = None) -> None:
        super().__init__()
        self.numa = NumaNodes(threads or None, topology)
        from ktcore_cpu import _native

        try:
            self.pool: _native.Pool = _native.Pool(threads or 0)
            self.switch = Switch(self.pool)
            self._capabilities = Capabilities(
                backend="cpu",
                name=DECLARED.name,
                features=DECLARED.features | {f"isa:{_native.isa_selected()}"},
                properties={
                    "threads": self.pool.threads,
                    "numa_nodes": len(self.numa.places),
                    "numa": self.numa.describe(),
                    "isa_supported": " ".join(_native.isa_supported()),
                    "cpu_flags": " ".join(_native.cpu_flags()),
                },
                live=True,
            )
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"the cpu backend cannot start: {error}") from error

    def new_lane(self) -> Lane:
        """A native lane: its callbacks take no interpreter lock."""
        from ktcore_cpu import _native

        return _native.Lane()

    def capabilities(self) -> Capabilities:
        """The instruction set in use, those supported, CPU features, and the number of threads."""
        return self._capabilities

    def read_bandwidth(self) -> float:
        """Bytes a second that the pool streams from memory, measured now over a buffer well beyond the caches."""
        from ktcore_cpu import _native

        return _native.read_bandwidth(self.pool)


class CpuBackend(Backend):
    """Implementations over the native kernels."""

    def implementations(self) -> Sequence[Implementation]:
        """All of them; none needs more than the native module."""
        from ktcore_cpu.attention import CpuAttention
        from ktcore_cpu.compressed import CpuCompressedAttention
        from ktcore_cpu.delta import CpuGatedDeltaNet
        from ktcore_cpu.embedding import CpuEmbedding
        from ktcore_cpu.experts import CpuExperts
        from ktcore_cpu.kda import CpuKimiDelta
        from ktcore_cpu.linear import CpuLinear
        from ktcore_cpu.mla import CpuMLA
        from ktcore_cpu.mlp import CpuMLP
        from ktcore_cpu.moe import CpuMoE
        from ktcore_cpu.norm import CpuRMSNorm
        from ktcore_cpu.router import CpuRouter
        from ktcore_cpu.streams import CpuGatedStreams, CpuHyperConnection

        return [
            CpuEmbedding(),
            CpuLinear(),
            CpuRMSNorm(),
            CpuAttention(),
            CpuMLA(),
            CpuGatedDeltaNet(),
            CpuKimiDelta(),
            CpuCompressedAttention(),
            CpuMLP(),
            CpuRouter(),
            CpuExperts(),
            CpuMoE(),
            CpuHyperConnection(),
            CpuGatedStreams(),
        ]

    def runtime(self, index: int = 0, threads: int | None = None) -> CpuRuntime:
        """The host; there is only device 0."""
        if index != 0:
            raise BackendError(f"the cpu backend has one device, cpu:0, not cpu:{index}")
        return CpuRuntime(threads)
