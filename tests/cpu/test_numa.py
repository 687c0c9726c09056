"""The CPU backend on a machine of virtual nodes: experts as the loader makes them, whole models, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ktcore_cpu import _native
from ktcore_cpu.backend import CpuRuntime
from ktcore_cpu.experts import CpuExperts
from ktcore_cpu.moe import CpuMoE
from ktcore_cpu.numa.module import check_pages

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.errors import BackendError, RuleError
from ktcore.ops.moe import ExpertsSpec, MoESpec, routed_experts
from ktcore.placement.topology import NumaNode, Topology

from .test_moe import DEVICE, EXPERTS, ROUTER, Held, stacks

GIB = 1 << 30
WAYS = ["shard", "expert_parallel", "replicate"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The reference's tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def virtual(nodes: int = 2, memory: int = GIB) -> Topology:
    """Nodes of one thread each; all have their memory on node 0, which is there."""
    made = tuple(NumaNode(0, (i % 2,), memory, ((i % 2,),)) for i in range(nodes))
    return Topology((0, 1), 2, made, memory)


def request(spec: ExpertsSpec, held: dict[str, Held], runtime: CpuRuntime, **options: object) -> LoadRequest:
    return LoadRequest("layers.0.ffn.experts", spec, held, runtime, DEVICE, options=options)  # type: ignore[arg-type]


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_definitions_result(way: str, nodes: int) -> None:
    held, runtime = stacks(), CpuRuntime(topology=virtual(nodes))
    module = CpuExperts().load(request(EXPERTS, held, runtime, activations="f32", numa=way))
    assert (module.numa.way, len(module.numa.shares)) == (way, nodes)
    assert all(w.parts == 8 and w.released >= 1 for w in held.values())
    make = torch.Generator().manual_seed(1)
    for tokens in (1, 20, 300):
        x, ids = torch.randn(tokens, 64, generator=make), torch.randint(-1, 8, (tokens, 3), generator=make)
        chosen = torch.rand(tokens, 3, generator=make)
        want = routed_experts(x, ids, chosen, *(w.values for w in held.values()), EXPERTS)
        got = module(x, ids, chosen)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert torch.equal(module(x, ids, chosen), got)
    assert module(x[:0], ids[:0], chosen[:0]).shape == (0, 64)


def test_layers_share_a_team_and_their_bytes_add_up() -> None:
    runtime = CpuRuntime(topology=virtual())
    first = CpuExperts().load(request(EXPERTS, stacks(), runtime))
    taken = dict(runtime.numa.taken)
    second = CpuExperts().load(request(EXPERTS, stacks(), runtime))
    assert first.numa == second.numa
    assert first.numa.way == "shard"
    assert taken == {0: 8 * 3 * 96 * 64 * 4}
    assert runtime.numa.taken == {0: 2 * taken[0]}
    assert runtime.numa.team(first.numa) is runtime.numa.team(second.numa)


@pytest.mark.parametrize("option", ["off", False])
def test_off_runs_on_one_pool(option: object) -> None:
    module = CpuExperts().load(request(EXPERTS, stacks(), CpuRuntime(topology=virtual()), numa=option))
    assert module.numa.describe() == "off: the rule says so"
    assert isinstance(module._block, _native.ExpertsBlock)


def test_one_node_is_as_before() -> None:
    runtime = CpuRuntime(2, topology=virtual(1))
    module = CpuExperts().load(request(EXPERTS, stacks(), runtime, numa="shard"))
    assert module.numa.way == "off"
    assert isinstance(module._block, _native.ExpertsBlock)
    assert runtime.numa.taken == {}


def test_what_cannot_be_done_is_refused() -> None:
    runtime = CpuRuntime(topology=virtual())
    with pytest.raises(RuleError, match="'sideways' is unknown"):
        CpuExperts().load(request(EXPERTS, stacks(), runtime, numa="sideways"))
    with pytest.raises(RuleError, match="node 0 would hold"):
        CpuExperts().load(request(EXPERTS, stacks(), CpuRuntime(topology=virtual(2, 1 << 20)), numa="replicate"))
    absent = Topology((0, 1), 2, (NumaNode(0, (0,), GIB, ((0,),)), NumaNode(999, (1,), GIB, ((1,),))), GIB)
    with pytest.raises(BackendError, match="NUMA node 999"):
        CpuExperts().load(request(EXPERTS, stacks(), CpuRuntime(topology=absent)))
    with pytest.raises(BackendError, match="of 7 pages bound to NUMA node 1, 4 on node 0"):
        check_pages("layers.0", 1, {0: 4, 1: 2, -1: 1})
    check_pages("layers.0", 1, {1: 2, -1: 1})


def test_a_native_lane_runs_spread_experts_without_python() -> None:
    held, runtime = stacks(), CpuRuntime(topology=virtual())
    module = CpuExperts().load(request(EXPERTS, held, runtime, activations="f32"))
    x, ids, chosen = torch.randn(5, 64), torch.randint(0, 8, (5, 3)), torch.rand(5, 3)
    out = torch.full((5, 64), torch.nan)
    job = module.lane_job(runtime.new_lane(), x, ids, chosen, out)
    assert isinstance(job, _native.Job)
    job.start()
    job.wait()
    assert job.error == ""
    assert torch.equal(out, module(x, ids, chosen))
    ids[0, 0] = 8
    job.start()
    job.wait()
    assert "expert 8 is not one of 8" in job.error


def test_the_fused_branch_leaves_several_nodes_to_the_split_one() -> None:
    spec = MoESpec(64, ROUTER, EXPERTS)
    assert isinstance(CpuMoE().supports(spec, replace(DEVICE, properties={"numa_nodes": 1})), Supported)
    answer = CpuMoE().supports(spec, replace(DEVICE, properties={"numa_nodes": 2}))
    assert isinstance(answer, Unsupported)
    assert "2 NUMA nodes" in answer.reason


def test_the_runtime_says_where_experts_go() -> None:
    def properties(topology: Topology) -> dict[str, object]:
        caps: Capabilities = CpuRuntime(topology=topology).capabilities()
        return dict(caps.properties)

    several = properties(virtual())
    assert several["numa_nodes"] == 2
    assert several["numa"] == "experts are spread over node 0 (1 threads), node 0 (1 threads)"
    nodes = (*virtual(1).nodes, NumaNode(5, (), GIB))
    assert properties(Topology((0, 1), 2, nodes, GIB))["numa"] == (
        "experts run on one pool; not node 5, where this process has no memory or no cores to use"
    )
