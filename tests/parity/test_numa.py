"""A whole model with its experts spread over virtual NUMA nodes against transformers; all memory is on node 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ktcore_cpu import _native
from ktcore_cpu.numa.module import spread_block
from ktcore_cpu.numa.plan import NumaPlan

import ktcore
from ktcore.backend import LoadRequest
from ktcore.ops.moe import ExpertsSpec
from ktcore.placement.topology import NumaNode, Topology

from .conftest import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")
GIB = 1 << 30
RULES = """version: 1
rules:
  - name: spread
    match: {{op: experts}}
    use: cpu.experts
    device: host
    options: {{numa: {way}, activations: f32}}
  - name: exact attention
    match: {{op: attention}}
    use: cpu.attention
    options: {{activations: f32, kv_dtype: f32}}
"""


@pytest.mark.parametrize("way", ["auto", "shard", "expert_parallel", "replicate"])
def test_experts_on_virtual_nodes_match_transformers(
    tiny: Callable[[str], Tiny], way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Topology((0, 1), 2, tuple(NumaNode(0, (cpu,), GIB, ((cpu,),)) for cpu in (0, 1)), GIB)
    for module in ("ktcore_cpu.numa.runtime", "ktcore.placement.topology"):
        monkeypatch.setattr(f"{module}.read_topology", lambda *_: machine)
    ways: list[str] = []

    def spread(request: LoadRequest, spec: ExpertsSpec, plan: NumaPlan, team: _native.NodeTeam) -> object:
        ways.append(plan.way)
        return spread_block(request, spec, plan, team)

    monkeypatch.setattr("ktcore_cpu.experts.spread_block", spread)
    rules = tmp_path / "numa.yaml"
    rules.write_text(RULES.format(way=way))
    t = tiny("mixtral")
    with ktcore.load(t.folder, backend="cpu", rules=rules, context=256, threads=2) as model:
        branches = [n for n, c in model.plan.choices.items() if c.node.spec.op == "moe"]
        assert len(ways) == len(branches)
        assert set(ways) == {"shard" if way == "auto" else way}
        assert "2 NUMA nodes can hold experts" in model.plan.explain(branches[0])
        torch.testing.assert_close(model.logits(t.ids), t.logits, atol=2e-4, rtol=1e-4)
