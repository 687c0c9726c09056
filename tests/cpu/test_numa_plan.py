"""The planner and its topologies, laid out in a folder or by hand: 1 to 8 nodes, and the odd ones."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ktcore_cpu.numa.nodes import Place, apportion, usable_places
from ktcore_cpu.numa.plan import NumaPlan, plan_experts, slot_counts
from ktcore_cpu.numa.speed import kept_by_chance, kept_by_shares

from ktcore.errors import RuleError
from ktcore.ops.moe import ExpertsSpec
from ktcore.placement.topology import NumaNode, Topology, read_topology

GIB = 1 << 30
FORMATS = {"Q4_K": (256, 144), "Q6_K": (256, 210), "Q8_0": (32, 34), "BF16": (1, 2)}
QWEN = ExpertsSpec(2048, 768, 128, 8, "silu", "Q4_K", "Q4_K", "Q6_K")
DEEPSEEK = ExpertsSpec(7168, 2048, 256, 8, "silu", "Q4_K", "Q4_K", "Q6_K")


def machine(
    root: Path, nodes: dict[int, tuple[str, int]], mems: str = "", cpus: str = "", distances: str = ""
) -> Topology:
    """A machine in a folder: node id -> (its CPU list, KiB of memory). CPU n and n + 100 are one core."""
    files = {"proc/meminfo": f"MemTotal: {sum(kib for _, kib in nodes.values())} kB\n", "proc/self/cgroup": "0::/job\n"}
    every: set[int] = set()
    for id, (listed, kib) in nodes.items():
        folder = f"sys/devices/system/node/node{id}"
        files[f"{folder}/cpulist"] = listed + "\n"
        files[f"{folder}/meminfo"] = f"Node {id} MemTotal: {kib} kB\n" if kib else ""
        if distances:
            files[f"{folder}/distance"] = distances.splitlines()[list(nodes).index(id)]
        for part in filter(None, listed.split(",")):
            first, _, last = part.partition("-")
            every |= set(range(int(first), int(last or first) + 1))
    for cpu in every:
        core = cpu % 100
        siblings = f"{core},{core + 100}" if core + 100 in every else f"{core}"
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings + "\n"
    if mems:
        files["proc/self/status"] = f"Name:\tx\nMems_allowed:\t00000001\nMems_allowed_list:\t{mems}\n"
    if cpus:
        files["sys/fs/cgroup/job/cpuset.cpus.effective"] = cpus + "\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return read_topology(root, every)


def even(nodes: int, threads: int = 8, memory: int = 256 * GIB) -> list[Place]:
    return [Place(i, tuple(range(i * threads, (i + 1) * threads)), memory) for i in range(nodes)]


def test_two_sockets_give_one_thread_a_core(tmp_path: Path) -> None:
    found = usable_places(machine(tmp_path, {0: ("0-3,100-103", 1000), 1: ("4-7,104-107", 1000)}))
    assert [(p.memory, p.cpus) for p in found] == [(0, (0, 1, 2, 3)), (1, (4, 5, 6, 7))]


def test_node_ids_with_gaps_stay_physical(tmp_path: Path) -> None:
    topology = machine(
        tmp_path, {0: ("0-1", 10), 4: ("2-3", 10), 9: ("4-5", 10)}, distances="10 20 30\n20 10 40\n30 40 10"
    )
    assert [p.memory for p in usable_places(topology)] == [0, 4, 9]
    assert topology.nodes[1].distances == {0: 20, 4: 10, 9: 40}


def test_a_memory_only_node_works_for_nobody(tmp_path: Path) -> None:
    topology = machine(tmp_path, {0: ("0-1", 10), 1: ("2-3", 10), 2: ("", 500)})
    assert [node.id for node in topology.nodes] == [0, 1, 2]
    assert [p.memory for p in usable_places(topology)] == [0, 1]


def test_cores_without_memory_work_for_the_nearest_node(tmp_path: Path) -> None:
    topology = machine(
        tmp_path, {0: ("0-1", 10), 1: ("2-3", 0), 2: ("4-5", 10)}, distances="10 40 40\n40 10 20\n40 20 10"
    )
    assert [(p.memory, p.cpus) for p in usable_places(topology)] == [(0, (0, 1)), (2, (2, 3, 4, 5))]


def test_uneven_cores_show_in_threads(tmp_path: Path) -> None:
    topology = machine(tmp_path, {0: ("0-5", 10), 1: ("6-7", 10)})
    assert [p.threads for p in usable_places(topology)] == [6, 2]
    assert [p.threads for p in usable_places(topology, 4)] == [3, 1]
    assert [(p.memory, p.threads) for p in usable_places(topology, 1)] == [(0, 1)]
    assert [p.threads for p in usable_places(topology, 99)] == [6, 2]


def test_more_threads_than_cores_use_siblings_last(tmp_path: Path) -> None:
    topology = machine(tmp_path, {0: ("0-1,100-101", 10), 1: ("2-3,102-103", 10)})
    assert [p.cpus for p in usable_places(topology, 6)] == [(0, 1, 100), (2, 3, 102)]


def test_a_cpuset_of_one_node_leaves_one(tmp_path: Path) -> None:
    nodes = {0: ("0-3", 10), 1: ("4-7", 10)}
    both = usable_places(machine(tmp_path / "a", nodes, mems="1", cpus="4-5"))
    assert [(p.memory, p.cpus) for p in both] == [(1, (4, 5))]
    # CPUs of one node, memory of the other: the work goes where it may
    crossed = usable_places(machine(tmp_path / "b", nodes, mems="1", cpus="0-1"))
    assert [(p.memory, p.cpus) for p in crossed] == [(1, (0, 1))]
    # memory of both, CPUs of one: the other node has nobody to read from it
    assert [p.memory for p in usable_places(machine(tmp_path / "c", nodes, mems="0-1", cpus="0-1"))] == [0]


def test_the_quota_bounds_the_threads() -> None:
    nodes = tuple(NumaNode(i, (2 * i, 2 * i + 1), GIB, ((2 * i,), (2 * i + 1,))) for i in range(2))
    assert sum(p.threads for p in usable_places(Topology((0, 1, 2, 3), 4, nodes, GIB, cpu_quota=1.5))) == 2


@given(st.integers(0, 12), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_no_other_apportionment_has_a_smaller_maximum(units: int, weights: list[int]) -> None:
    found = apportion(units, weights)
    every = (s for s in product(range(units + 1), repeat=len(weights)) if sum(s) == units)
    best = min(max(a / w for a, w in zip(s, weights, strict=True)) for s in every)
    assert max(a / w for a, w in zip(found, weights, strict=True)) == pytest.approx(best)


def columns(plan: NumaPlan) -> list[int]:
    return [share.columns[1] - share.columns[0] for share in plan.shares]


@pytest.mark.parametrize(("nodes", "want"), [(2, [1024] * 2), (4, [512] * 4), (8, [256] * 8)])
def test_even_nodes_share_the_columns(nodes: int, want: list[int]) -> None:
    plan = plan_experts(even(nodes), DEEPSEEK, FORMATS)
    assert (plan.way, columns(plan)) == ("shard", want)
    assert "keep 100%" in plan.why
    assert set(plan.rejected) == {"expert_parallel", "replicate"}
    assert [s.place.memory for s in plan.shares] == list(range(nodes))


@pytest.mark.parametrize("places", [[], even(1)])
@pytest.mark.parametrize("policy", ["auto", "shard", "replicate", "off"])
def test_one_node_changes_nothing(places: list[Place], policy: str) -> None:
    plan = plan_experts(places, QWEN, FORMATS, policy)
    assert (plan.way, plan.shares) == ("off", ())
    assert plan.why


def test_uneven_cores_get_uneven_columns() -> None:
    places = [Place(0, tuple(range(12)), GIB * 99), Place(3, tuple(range(12, 16)), GIB * 99)]
    plan = plan_experts(places, DEEPSEEK, FORMATS)
    assert (plan.way, columns(plan)) == ("shard", [1536, 512])


def test_the_unit_is_what_the_layout_allows() -> None:
    small = ExpertsSpec(2048, 1408, 64, 6, "silu", "Q4_K", "Q4_K", "Q8_0")
    plan = plan_experts(even(4), small, FORMATS, "shard")
    assert columns(plan) == [352, 352, 352, 352]
    assert columns(plan_experts(even(2), QWEN, FORMATS, "shard")) == [512, 256]
    odd = ExpertsSpec(64, 70, 4, 2, "silu", "BF16", "BF16", "BF16")
    assert columns(plan_experts(even(2), odd, FORMATS, "shard")) == [64, 6]


def test_too_few_columns_go_to_whole_experts() -> None:
    narrow = ExpertsSpec(2048, 512, 128, 8, "silu", "Q4_K", "Q4_K", "Q6_K")
    plan = plan_experts(even(8), narrow, FORMATS)
    assert plan.way == "expert_parallel"
    assert [s.experts for s in plan.shares] == [(16 * i, 16 * i + 16) for i in range(8)]
    assert "256 + 256 columns keep 25%" in plan.rejected["shard"]


def test_replicas_only_where_all_layers_are_known_to_fit() -> None:
    unknown = plan_experts(even(2), QWEN, FORMATS)
    assert unknown.way == "shard"
    assert "not known" in unknown.rejected["replicate"]
    assert plan_experts(even(2), QWEN, FORMATS, total_bytes=60 * GIB).way == "replicate"
    tight = plan_experts(even(2, memory=64 * GIB), QWEN, FORMATS, total_bytes=60 * GIB)
    assert tight.way == "shard"
    assert "node 0 would hold 60.0 GiB" in tight.rejected["replicate"]


def test_choices_of_a_token_are_shared_by_threads() -> None:
    places = [Place(0, tuple(range(6)), 99 * GIB), Place(1, (6, 7), 99 * GIB)]
    plan = plan_experts(places, QWEN, FORMATS, "replicate")
    assert [s.slots for s in plan.shares] == [6, 2]
    assert slot_counts(8, [6, 2]) == [6, 2]
    assert "6 + 2 of a token's choices keep 100%" in plan.why


@given(st.integers(1, 16), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_slots_are_all_given_away(top_k: int, weights: list[int]) -> None:
    counts = slot_counts(top_k, weights)
    assert sum(counts) == top_k
    assert all(abs(c - top_k * w / sum(weights)) <= 1 for c, w in zip(counts, weights, strict=True))


def test_what_lies_on_a_node_already_counts() -> None:
    layer = sum(s.nbytes for s in plan_experts(even(2), DEEPSEEK, FORMATS).shares)
    assert layer == 256 * (2 * 2048 * 7168 * 144 // 256 + 7168 * 2048 * 210 // 256)
    full = plan_experts(even(2, memory=10 * GIB), DEEPSEEK, FORMATS, taken={0: 8 * GIB})
    assert full.way == "off"
    assert "node 0 would hold" in full.why
    with pytest.raises(RuleError, match="node 1 would hold"):
        plan_experts(even(2, memory=10 * GIB), DEEPSEEK, FORMATS, "shard", taken={1: 8 * GIB})


def test_virtual_nodes_share_their_nodes_memory() -> None:
    places = [Place(0, (0,), 4 * GIB), Place(0, (1,), 4 * GIB)]
    with pytest.raises(RuleError, match="node 0 would hold"):
        plan_experts(places, DEEPSEEK, FORMATS, "replicate")


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(RuleError, match="'fastest' is unknown"):
        plan_experts(even(2), QWEN, FORMATS, "fastest")
    tiny = ExpertsSpec(64, 32, 1, 1, "silu", "Q8_0", "Q8_0", "Q8_0")
    with pytest.raises(RuleError, match="32 columns in whole pieces of 32"):
        plan_experts(even(2), tiny, FORMATS, "shard")
    with pytest.raises(RuleError, match="1 experts in whole pieces of 1"):
        plan_experts(even(2), tiny, FORMATS, "expert_parallel")


@given(
    st.lists(st.integers(1, 24), min_size=2, max_size=8),
    st.integers(1, 40),
    st.integers(2, 64),
    st.sampled_from(["Q4_K", "Q8_0", "BF16"]),
    st.sampled_from(["auto", "shard", "expert_parallel", "replicate"]),
)
def test_every_plan_covers_the_layer_once(
    threads: list[int], blocks: int, experts: int, format: str, policy: str
) -> None:
    ids = [3 * i + 1 for i in range(len(threads))]
    places = [Place(i, tuple(range(i * 24, i * 24 + n)), 512 * GIB) for i, n in zip(ids, threads, strict=True)]
    width = blocks * max(32, FORMATS[format][0])
    spec = ExpertsSpec(512, width, experts, min(4, experts), "silu", "Q8_0", "Q8_0", format)
    units = {"shard": blocks, "expert_parallel": experts}.get(policy)
    if units is not None and sum(n > 0 for n in apportion(units, threads)) == 1:
        with pytest.raises(RuleError, match="one node only"):
            plan_experts(places, spec, FORMATS, policy)
        return
    plan = plan_experts(places, spec, FORMATS, policy)
    assert plan.why
    if plan.way == "off":
        return
    assert [s.place.memory for s in plan.shares] == sorted(s.place.memory for s in plan.shares)
    if plan.way == "shard":
        assert [s.columns[0] for s in plan.shares] == [0, *(s.columns[1] for s in plan.shares[:-1])]
        assert plan.shares[-1].columns[1] == width
        assert all(s.columns[0] % max(32, FORMATS[format][0]) == 0 for s in plan.shares)
    if plan.way == "expert_parallel":
        assert [s.experts[0] for s in plan.shares] == [0, *(s.experts[1] for s in plan.shares[:-1])]
        assert plan.shares[-1].experts[1] == experts


def test_chance_is_the_mean_over_all_draws() -> None:
    experts, threads, top_k = [3, 1, 2], [2, 1, 1], 3
    owner = [0, 0, 0, 1, 2, 2]
    times = [
        max(sum(owner[d] == n for d in draw) / threads[n] for n in range(3)) for draw in product(range(6), repeat=top_k)
    ]
    want = top_k / 4 / (sum(times) / len(times))
    assert kept_by_chance(experts, top_k, threads, 4) == pytest.approx(want)
    assert kept_by_shares([2, 1], [1, 1], 2) == 0.75
