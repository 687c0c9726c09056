"""A runtime's NUMA nodes: the places to work, the teams on them, and what their memory holds already."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from ktcore.errors import BackendError
from ktcore.placement.topology import Topology, read_topology
from ktcore_cpu.numa.nodes import Place, describe_places, usable_places
from ktcore_cpu.numa.plan import NumaPlan

if TYPE_CHECKING:
    from ktcore_cpu import _native


class NumaNodes:
    """Made with a runtime, read and started when first asked for.

    Attributes:
        taken: bytes of experts by physical node id.
    """

    def __init__(self, threads: int | None = None, topology: Topology | None = None) -> None:
        self._threads = threads
        self._given = topology
        self._teams: dict[tuple[Place, ...], _native.NodeTeam] = {}
        self.taken: dict[int, int] = {}

    @cached_property
    def topology(self) -> Topology:
        """The machine's, unless another was given."""
        return self._given or read_topology()

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Nodes with both memory and cores for this process."""
        return usable_places(self.topology, self._threads)

    def describe(self) -> str:
        """One line about the places."""
        return describe_places(self.topology, self.places)

    def team(self, plan: NumaPlan) -> _native.NodeTeam:
        """The threads that run `plan`, one team for all layers with the same nodes; counts the plan's bytes as taken.

        Raises:
            BackendError: the threads cannot be started where the plan wants them.
        """
        from ktcore_cpu import _native

        places = tuple(share.place for share in plan.shares)
        if places not in self._teams:
            try:
                self._teams[places] = _native.NodeTeam([list(p.cpus) for p in places], [p.memory for p in places])
            except (ValueError, RuntimeError) as error:
                raise BackendError(f"cannot start threads on NUMA nodes: {error}") from error
        for share in plan.shares:
            self.taken[share.place.memory] = self.taken.get(share.place.memory, 0) + share.nbytes
        return self._teams[places]
