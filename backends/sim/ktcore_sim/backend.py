"""The backend object: what the simulated accelerator implements, and how a device of it is opened."""

from __future__ import annotations

from collections.abc import Sequence

from ktcore.backend import Backend, Implementation
from ktcore_sim.options import SimOptions
from ktcore_sim.runtime import SimRuntime


class SimBackend(Backend):
    """Implementations need no device; the native half loads with the first runtime.

    Args:
        options: how devices behave; each runtime reads the environment when left out.
    """

    def __init__(self, options: SimOptions | None = None) -> None:
        self._options = options

    def implementations(self) -> Sequence[Implementation]:
        """One of every mandatory operator."""
        from ktcore_sim.attention import SimAttention, SimMLA, SimTokenIndexer
        from ktcore_sim.cache import SimIndexCache, SimKVCache
        from ktcore_sim.embedding import SimEmbedding
        from ktcore_sim.linear import SimLinear
        from ktcore_sim.mlp import SimMLP
        from ktcore_sim.moe import SimExperts, SimMoE, SimRouter
        from ktcore_sim.norm import SimRMSNorm
        from ktcore_sim.rope import SimRope

        return [
            SimEmbedding(),
            SimLinear(),
            SimRMSNorm(),
            SimRope(),
            SimKVCache(),
            SimAttention(),
            SimMLA(),
            SimTokenIndexer(),
            SimIndexCache(),
            SimMLP(),
            SimRouter(),
            SimExperts(),
            SimMoE(),
        ]

    def runtime(self, index: int = 0, threads: int | None = None) -> SimRuntime:
        """Open `sim:index`."""
        return SimRuntime(index, self._options)
