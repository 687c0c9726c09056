"""The machine as Linux describes it: usable CPUs, NUMA nodes, memory, and the limits of the control group.

All of it is read below a root folder, so that a test can lay out any machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NumaNode:
    """One NUMA node.

    Attributes:
        id: the physical id, which need not be its place in a list.
        cpus: those of its CPUs that this process may use.
        memory_bytes: memory of the node.
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True)
class Topology:
    """What a process may use of the machine.

    Attributes:
        cpus: logical CPUs that it may run on.
        cores: physical cores among them.
        nodes: NUMA nodes that hold memory; one made-up node 0 where the kernel reports none.
        memory_bytes: the machine's memory; memory_limit: the control group's, None without one.
        cpu_quota: CPUs' worth of time that the control group grants, None without a quota.
    """

    cpus: tuple[int, ...]
    cores: int
    nodes: tuple[NumaNode, ...]
    memory_bytes: int
    memory_limit: int | None = None
    cpu_quota: float | None = None

    @property
    def usable_memory(self) -> int:
        """Bytes that this process can have at most."""
        return self.memory_bytes if self.memory_limit is None else min(self.memory_bytes, self.memory_limit)


def read_topology(root: Path = Path("/"), allowed: Iterable[int] | None = None) -> Topology:
    """Read the topology.

    Args:
        root: folder that stands for "/".
        allowed: logical CPUs that may be used; None asks the kernel.
    """
    cpus = tuple(sorted(os.sched_getaffinity(0) if allowed is None else allowed))
    memory = _meminfo(root / "proc/meminfo")
    nodes = _numa_nodes(root / "sys/devices/system/node", cpus)
    folders = _control_groups(root)
    return Topology(
        cpus=cpus,
        cores=_cores(root / "sys/devices/system/cpu", cpus),
        nodes=nodes or (NumaNode(0, cpus, memory),),
        memory_bytes=memory,
        memory_limit=min((m for m in map(_memory_limit, folders) if m is not None and m < memory), default=None),
        cpu_quota=min((q for q in map(_cpu_quota, folders) if q is not None), default=None),
    )


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """CPU numbers of the kernel's list format, "0-3,8"; empty for an empty list."""
    found: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _numa_nodes(folder: Path, cpus: tuple[int, ...]) -> tuple[NumaNode, ...]:
    nodes = []
    for path in folder.glob("node[0-9]*"):
        here = set(parse_cpu_list(_text(path / "cpulist") or ""))
        memory = _meminfo(path / "meminfo")
        if memory:
            nodes.append(NumaNode(int(path.name[4:]), tuple(c for c in cpus if c in here), memory))
    return tuple(sorted(nodes, key=lambda node: node.id))


def _cores(folder: Path, cpus: tuple[int, ...]) -> int:
    """Hyper-threads of one core list the same siblings."""
    siblings = {_text(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return len(siblings)


def _control_groups(root: Path) -> list[Path]:
    """The process's control group (version 2) and all above it; limits of any of them hold."""
    mount = root / "sys/fs/cgroup"
    lines = (_text(root / "proc/self/cgroup") or "").splitlines()
    name = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    parts = name.split("/") if name and ".." not in name else []
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _memory_limit(folder: Path) -> int | None:
    text = _text(folder / "memory.max")
    return int(text) if text and text.isdecimal() else None


def _cpu_quota(folder: Path) -> float | None:
    words = (_text(folder / "cpu.max") or "max").split()
    return None if words[0] == "max" or len(words) < 2 else int(words[0]) / int(words[1])


def _meminfo(path: Path) -> int:
    """Bytes of the line MemTotal; 0 when there is none."""
    found = re.search(r"MemTotal:\s+(\d+) kB", _text(path) or "")
    return int(found[1]) * 1024 if found else 0


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
