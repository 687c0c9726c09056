"""Topology of machines laid out in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from ktcore.placement.topology import parse_cpu_list, read_topology

KIB = 1024


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def two_sockets(root: Path) -> Path:
    """Eight logical CPUs on two nodes, ids 0 and 2; siblings are n and n + 4."""
    files = {"proc/meminfo": "MemTotal:       2000 kB\nMemFree: 5 kB\n", "proc/self/cgroup": "0::/a/b\n"}
    for node, cpus in ((0, "0-1,4-5"), (2, "2-3,6-7")):
        files[f"sys/devices/system/node/node{node}/cpulist"] = cpus + "\n"
        files[f"sys/devices/system/node/node{node}/meminfo"] = f"Node {node} MemTotal:  1000 kB\n"
    for cpu in range(8):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 4},{cpu % 4 + 4}\n"
    return lay_out(root, files)


def test_nodes_keep_their_physical_ids_and_cores_count_once(tmp_path: Path) -> None:
    found = read_topology(two_sockets(tmp_path), range(8))
    assert [(node.id, node.cpus, node.memory_bytes) for node in found.nodes] == [
        (0, (0, 1, 4, 5), 1000 * KIB),
        (2, (2, 3, 6, 7), 1000 * KIB),
    ]
    assert found.cores == 4
    assert found.memory_bytes == found.usable_memory == 2000 * KIB


def test_quick_cores_come_first_and_units_are_not_mixed(tmp_path: Path) -> None:
    root = two_sockets(tmp_path)
    assert read_topology(root, range(8)).capacities == {}
    for cpu, level in enumerate((40, 80, 60, 20) * 2):
        lay_out(root, {f"sys/devices/system/cpu/cpu{cpu}/acpi_cppc/highest_perf": f"{level}\n"})
    lay_out(root, {"sys/devices/system/cpu/cpu0/cpu_capacity": "1024\n"})  # of one alone: says nothing of the others
    found = read_topology(root, range(8))
    assert found.capacities == {0: 0.5, 1: 1.0, 2: 0.75, 3: 0.25}
    assert [node.cores for node in found.nodes] == [((1, 5), (0, 4)), ((2, 6), (3, 7))]


def test_only_cpus_that_the_process_may_use_count(tmp_path: Path) -> None:
    found = read_topology(two_sockets(tmp_path), [6, 2, 3])
    assert found.cpus == (2, 3, 6)
    assert [node.cpus for node in found.nodes] == [(), (2, 3, 6)]
    assert found.cores == 2


def test_the_tightest_control_group_holds(tmp_path: Path) -> None:
    lay_out(
        two_sockets(tmp_path),
        {
            "sys/fs/cgroup/a/memory.max": "512000\n",
            "sys/fs/cgroup/a/b/memory.max": "700000\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        },
    )
    found = read_topology(tmp_path, range(8))
    assert (found.memory_limit, found.usable_memory, found.cpu_quota) == (512000, 512000, 1.5)


def test_control_groups_of_version_1_hold_too(tmp_path: Path) -> None:
    lay_out(
        two_sockets(tmp_path),
        {
            "proc/self/cgroup": "9:memory:/a/b\n4:cpu,cpuacct:/a\n3:cpuset:/a\n1:name=systemd:/x\n0::/\n",
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "512000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpuset/a/cpuset.effective_cpus": "0-2\n",
            "sys/fs/cgroup/cpuset/a/cpuset.effective_mems": "0\n",
        },
    )
    found = read_topology(tmp_path, range(8))
    assert (found.memory_limit, found.usable_memory, found.cpu_quota) == (512000, 512000, 1.5)
    assert found.cpus == (0, 1, 2)
    assert [(node.id, node.memory_bytes) for node in found.nodes] == [(0, 1000 * KIB), (2, 0)]


def test_a_container_that_sees_its_own_version_1_group_as_the_root(tmp_path: Path) -> None:
    lay_out(
        two_sockets(tmp_path),
        {
            "proc/self/cgroup": "9:memory:/docker/abc\n4:cpu:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "640000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    found = read_topology(tmp_path, range(8))
    assert (found.memory_limit, found.cpu_quota) == (640000, 0.5)


def test_version_1_without_limits_has_none(tmp_path: Path) -> None:
    lay_out(
        two_sockets(tmp_path),
        {
            "proc/self/cgroup": "9:memory:/\n4:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    found = read_topology(tmp_path, range(8))
    assert (found.memory_limit, found.cpu_quota) == (None, None)


def test_a_limit_above_the_machines_memory_is_none(tmp_path: Path) -> None:
    lay_out(two_sockets(tmp_path), {"sys/fs/cgroup/memory.max": str(1 << 40)})
    assert read_topology(tmp_path, range(8)).memory_limit is None


def test_a_kernel_without_numa_gives_one_node(tmp_path: Path) -> None:
    found = read_topology(lay_out(tmp_path, {"proc/meminfo": "MemTotal: 100 kB\n"}), [0, 1])
    assert [(node.id, node.cpus, node.memory_bytes) for node in found.nodes] == [(0, (0, 1), 100 * KIB)]
    assert found.cores == 2


@pytest.mark.parametrize(("text", "cpus"), [("0-3,8", (0, 1, 2, 3, 8)), ("", ()), ("5\n", (5,))])
def test_cpu_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus


def test_this_machine_agrees_with_psutil() -> None:
    found = read_topology()
    assert found.memory_bytes == psutil.virtual_memory().total
    assert set(found.cpus) == os.sched_getaffinity(0)
    assert 1 <= found.cores <= len(found.cpus)
