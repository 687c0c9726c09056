"""Places to work: NUMA nodes that have both memory and cores for this process, and the CPUs of their threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ktcore.placement.topology import NumaNode, Topology


@dataclass(frozen=True)
class Place:
    """One node's threads and the memory that is nearest to them.

    Attributes:
        memory: physical id of the node whose memory is used.
        cpus: one for each thread.
        memory_bytes: what the node has.
    """

    memory: int
    cpus: tuple[int, ...]
    memory_bytes: int

    @property
    def threads(self) -> int:
        """One a CPU."""
        return len(self.cpus)


def usable_places(topology: Topology, threads: int | None = None) -> tuple[Place, ...]:
    """The nodes that can hold and run experts, in the order of their physical ids.

    A node without cores (memory only) is left out. The cores of a node without memory that this process may use work
    for the nearest node that has some, by the kernel's distances.

    Args:
        threads: in all, shared out by cores; None: one for each physical core, at most the control group's quota. A
            node too small for one is left out.
    """
    holders = [node for node in topology.nodes if node.memory_bytes > 0]
    if not holders:
        return ()
    cores: list[list[tuple[int, ...]]] = [[] for _ in holders]
    for node in topology.nodes:
        nearest = next((i for i, holder in enumerate(holders) if holder is node), None)
        if nearest is None:
            nearest = min(range(len(holders)), key=lambda i: _distance(node, holders[i]))
        cores[nearest] += node.cores
    counts = [len(own) for own in cores]
    if threads is None and topology.cpu_quota is not None:
        threads = min(sum(counts), ceil(topology.cpu_quota))
    if threads is not None:
        room = [sum(map(len, own)) for own in cores]
        counts = apportion(min(threads, sum(room)), counts, room)
    return tuple(
        Place(holder.id, _cpus(own, count), holder.memory_bytes)
        for holder, own, count in zip(holders, cores, counts, strict=True)
        if count
    )


def describe_places(topology: Topology, places: Sequence[Place]) -> str:
    """One line: which nodes hold experts, with how many threads, and which do not."""
    held = ", ".join(f"node {p.memory} ({p.threads} threads)" for p in places)
    idle = [str(node.id) for node in topology.nodes if node.id not in {p.memory for p in places}]
    left_out = f"; not node {', '.join(idle)}, where this process has no memory or no cores to use" if idle else ""
    return (f"experts are spread over {held}" if len(places) > 1 else "experts run on one pool") + left_out


def apportion(units: int, weights: Sequence[int], limits: Sequence[int] | None = None) -> list[int]:
    """`units` whole units over `weights`, so that the largest share per weight is as small as can be.

    Each unit goes where the share per weight grows to the least (D'Hondt's method, which has that property); ties go to
    the first. A weight of 0 gets nothing.

    Args:
        limits: at most so many each; in all at least `units`.
    """
    shares = [0] * len(weights)
    for _ in range(units):
        open_ = [i for i, w in enumerate(weights) if w > 0 and (limits is None or shares[i] < limits[i])]
        best = min(open_, key=lambda i: ((shares[i] + 1) / weights[i], i))
        shares[best] += 1
    return shares


def _distance(node: NumaNode, holder: NumaNode) -> tuple[int, int]:
    """Where the kernel tells nothing, nodes are equally far."""
    return node.distances.get(holder.id, 255), holder.id


def _cpus(cores: Sequence[tuple[int, ...]], count: int) -> tuple[int, ...]:
    """First one CPU of each core, then the hyper-threads."""
    depth = max(map(len, cores), default=0)
    return tuple(core[level] for level in range(depth) for core in cores if level < len(core))[:count]
