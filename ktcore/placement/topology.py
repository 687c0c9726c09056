"""The machine as Linux describes it: usable CPUs, NUMA nodes, memory, and the limits of the control group.

All of it is read below a root folder, so that a test can lay out any machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class NumaNode:
    """One NUMA node.

    Attributes:
        id: the physical id, which need not be its place in a list.
        cpus: those of its CPUs that this process may use.
        memory_bytes: memory of the node; 0 where it has none, or where the control group forbids it to this process.
        cores: its physical cores, each as those of its logical CPUs that may be used.
        distances: physical id of a node -> the kernel's relative distance to it (10 is the node itself).
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int
    cores: tuple[tuple[int, ...], ...] = ()
    distances: Mapping[int, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Topology:
    """What a process may use of the machine.

    Attributes:
        cpus: logical CPUs that it may run on.
        cores: physical cores among them.
        nodes: NUMA nodes with memory or CPUs that may be used; one made-up node 0 where the kernel reports none.
        memory_bytes: the machine's memory; memory_limit: the control group's, None without one.
        cpu_quota: CPUs' worth of time that the control group grants, None without a quota.
        capacities: how quick each core is beside the quickest (1.0), by its first CPU; empty where the kernel does not
            tell. Nodes list their quickest cores first.
    """

    cpus: tuple[int, ...]
    cores: int
    nodes: tuple[NumaNode, ...]
    memory_bytes: int
    memory_limit: int | None = None
    cpu_quota: float | None = None
    capacities: Mapping[int, float] = field(default_factory=dict, hash=False)

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
    granted = _cpuset(root)
    cpus = tuple(sorted(os.sched_getaffinity(0) if allowed is None else allowed))
    if granted.cpus is not None:
        cpus = tuple(cpu for cpu in cpus if cpu in granted.cpus)
    memory = _meminfo(root / "proc/meminfo")
    cores = _cores(root / "sys/devices/system/cpu", cpus)
    capacities = _capacities(root / "sys/devices/system/cpu", cores)
    cores = tuple(sorted(cores, key=lambda core: -capacities.get(core[0], 1.0)))
    nodes = _numa_nodes(root / "sys/devices/system/node", cores, granted.mems)
    return Topology(
        cpus=cpus,
        cores=len(cores),
        nodes=nodes or (NumaNode(0, cpus, memory, cores),),
        memory_bytes=memory,
        memory_limit=_memory_limit(root, memory),
        cpu_quota=_cpu_quota(root),
        capacities=capacities,
    )


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """CPU numbers of the kernel's list format, "0-3,8"; empty for an empty list."""
    found: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return tuple(found)


@dataclass(frozen=True)
class _Cpuset:
    """What a cpuset leaves; None: all."""

    cpus: frozenset[int] | None
    mems: frozenset[int] | None


def _cpuset(root: Path) -> _Cpuset:
    """CPUs and memory nodes of the control group's cpuset; of memory nodes, the kernel's account of the process too."""
    group, old = _control_groups(root)[0], _control_groups(root, "cpuset")[0]
    status = re.search(r"^Mems_allowed_list:\s*(\S+)$", _text(root / "proc/self/status") or "", re.MULTILINE)
    cpus = _text(group / "cpuset.cpus.effective") or _text(old / "cpuset.effective_cpus")
    mems = _text(group / "cpuset.mems.effective") or _text(old / "cpuset.effective_mems")
    granted = [frozenset(parse_cpu_list(text)) for text in (status and status[1], mems) if text]
    return _Cpuset(
        frozenset(parse_cpu_list(cpus)) if cpus else None, frozenset.intersection(*granted) if granted else None
    )


def _numa_nodes(folder: Path, cores: tuple[tuple[int, ...], ...], mems: frozenset[int] | None) -> tuple[NumaNode, ...]:
    paths = sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    ids = [int(path.name[4:]) for path in paths]
    nodes = []
    for id, path in zip(ids, paths, strict=True):
        here = set(parse_cpu_list(_text(path / "cpulist") or ""))
        own = tuple(core for core in cores if here.intersection(core))
        memory = _meminfo(path / "meminfo") if mems is None or id in mems else 0
        if memory or own:
            # the kernel lists distances to the nodes that are online, which are those with a folder
            distances = [int(word) for word in (_text(path / "distance") or "").split()]
            cpus = tuple(sorted(cpu for core in own for cpu in core))
            nodes.append(NumaNode(id, cpus, memory, own, dict(zip(ids, distances, strict=False))))
    return tuple(nodes)


def _cores(folder: Path, cpus: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Physical cores, each as its usable CPUs: hyper-threads of one core list the same siblings."""
    found: dict[str, list[int]] = {}
    for cpu in cpus:
        found.setdefault(_text(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu), []).append(cpu)
    return tuple(tuple(core) for core in found.values())


_CAPACITY = ("cpu_capacity", "acpi_cppc/highest_perf", "cpufreq/cpuinfo_max_freq")
"""Arm's and RISC-V's kernels measure it, x86's firmware grades its cores; the clock's limit is the last resort."""


def _capacities(folder: Path, cores: tuple[tuple[int, ...], ...]) -> dict[int, float]:
    """Of cores by their first CPU, all from the same file: the units of two do not compare."""
    for name in _CAPACITY:
        found = {core[0]: _number(folder / f"cpu{core[0]}" / name) or 0 for core in cores}
        if found and min(found.values()) > 0:
            best = max(found.values())
            return {cpu: value / best for cpu, value in found.items()}
    return {}


def _control_groups(root: Path, controller: str = "") -> list[Path]:
    """The process's control group and all above it, its own first; limits of any of them hold.

    Args:
        controller: of version 1, where each has a hierarchy of its own ("memory"); "" is version 2's only one.
    """
    lines = [
        line.split(":", 2) for line in (_text(root / "proc/self/cgroup") or "").splitlines() if line.count(":") > 1
    ]
    mount, names = root / "sys/fs/cgroup", [name for _, controllers, name in lines if controllers == ""]
    if controller:
        together = next((c for _, c, _ in lines if controller in c.split(",")), controller)
        mount = next((m for m in (mount / together, mount / controller) if m.is_dir()), mount / controller)
        names = [name for _, controllers, name in lines if controller in controllers.split(",")]
    name = names[0].strip("/") if names else ""
    parts = name.split("/") if name and ".." not in name else []
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _memory_limit(root: Path, machine: int) -> int | None:
    """The tightest limit below the machine's memory, of either version: hybrid systems have both."""
    new = [_number(group / "memory.max") for group in _control_groups(root)]
    # version 1 writes "no limit" as a number near 2**63
    old = [_number(group / "memory.limit_in_bytes") for group in _control_groups(root, "memory")]
    return min((limit for limit in (*new, *old) if limit is not None and limit < machine), default=None)


def _cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time, of either version."""
    pairs = [(_text(group / "cpu.max") or "max").split() for group in _control_groups(root)]
    pairs += [
        [_text(group / "cpu.cfs_quota_us") or "max", _text(group / "cpu.cfs_period_us") or ""]
        for group in _control_groups(root, "cpu")
    ]
    # version 1 writes "no quota" as -1
    granted = [(int(p[0]), int(p[1])) for p in pairs if len(p) == 2 and all(word.isdecimal() for word in p)]
    return min((quota / period for quota, period in granted if quota and period), default=None)


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdecimal() else None


def _meminfo(path: Path) -> int:
    """Bytes of the line MemTotal; 0 when there is none."""
    found = re.search(r"MemTotal:\s+(\d+) kB", _text(path) or "")
    return int(found[1]) * 1024 if found else 0


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
