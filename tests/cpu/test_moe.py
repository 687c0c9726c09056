"""The native router, experts and MoE branch, as the loader calls them, against the reference modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from ktcore_cpu.backend import CpuRuntime
from ktcore_cpu.experts import CpuExperts
from ktcore_cpu.moe import CpuMoE
from ktcore_cpu.router import CpuRouter

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.handles import answer
from ktcore.errors import CheckpointError
from ktcore.ops.linear import LinearSpec
from ktcore.ops.mlp import MLPSpec
from ktcore.ops.moe import ExpertsSpec, MoESpec, RouterSpec, route, routed_experts
from ktcore.ops.norm import RMSNormSpec

DEVICE = Capabilities("cpu", "host")
EXPERTS = ExpertsSpec(64, 96, 8, 3, "silu", "F32", "F32", "F32")
ROUTER = RouterSpec(64, 8, 3, "F32", "sigmoid", choice_bias=True, renormalise=True, scale=2.5)


@dataclass
class Held:
    """A float32 weight in memory; counts how often its pages were given back."""

    values: torch.Tensor
    format: str = "F32"
    released: int = 0
    ref: Any = None

    def __post_init__(self) -> None:
        self.ref = type("Ref", (), {"sources": ("one",), "nbytes": self.values.nbytes})
        self.parts = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def raw(self) -> np.ndarray:
        return self.values.reshape(-1, self.values.shape[-1]).contiguous().numpy().view(np.uint8)

    def tensor(self) -> torch.Tensor:
        return self.values

    def part(self, index: int) -> Held:
        self.parts += 1
        return Held(self.values[index])

    def release(self) -> None:
        self.released += 1


def weights(*shapes: Sequence[int]) -> list[Held]:
    make = torch.Generator().manual_seed(3)
    return [Held(torch.randn(*shape, generator=make) * 0.2) for shape in shapes]


def request(spec: Any, held: dict[str, Held], **options: Any) -> LoadRequest:
    return LoadRequest("layers.0.ffn", spec, held, CpuRuntime(2), DEVICE, options=options)  # type: ignore[arg-type]


def stacks() -> dict[str, Held]:
    return dict(zip(("gate", "up", "down"), weights((8, 96, 64), (8, 96, 64), (8, 64, 96)), strict=True))


def test_experts_are_packed_one_by_one_and_their_pages_given_back() -> None:
    held = stacks()
    module = CpuExperts().load(request(EXPERTS, held, activations="f32"))
    assert all(w.parts == 8 and w.released >= 1 for w in held.values())
    make = torch.Generator().manual_seed(1)
    x, ids = torch.randn(20, 64, generator=make), torch.randint(-1, 8, (20, 3), generator=make)
    chosen = torch.rand(20, 3, generator=make)
    want = routed_experts(x, ids, chosen, *(w.values for w in held.values()), EXPERTS)
    torch.testing.assert_close(module(x, ids, chosen), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(x, ids.int(), chosen.double()), want, atol=1e-5, rtol=1e-5)
    assert module(x[:0], ids[:0], chosen[:0]).shape == (0, 64)
    with pytest.raises(ValueError, match="ids and weights"):
        module(x, ids[:5], chosen)


def test_a_stack_of_the_wrong_size_names_the_node() -> None:
    held = stacks()
    held["down"] = Held(torch.zeros(8, 64, 95))
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn"):
        CpuExperts().load(request(EXPERTS, held))


def test_router_matches_the_definition() -> None:
    weight, bias = weights((8, 64), (8,))
    module = CpuRouter().load(request(ROUTER, {"weight": weight, "bias": bias}))
    x = torch.randn(9, 64)
    ids, chosen = module(x)
    want_ids, want = route(x @ weight.values.T, ROUTER, bias.values)
    order, want_order = ids.argsort(-1), want_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), want_ids.gather(1, want_order))
    torch.testing.assert_close(chosen.gather(1, order), want.gather(1, want_order), atol=1e-5, rtol=1e-5)


def branch() -> MoESpec:
    up, down = LinearSpec(64, 160, "F32"), LinearSpec(160, 64, "F32")
    shared = MLPSpec(64, 160, "silu", up, up, down)
    return MoESpec(64, ROUTER, EXPERTS, shared, LinearSpec(64, 1, "F32"), RMSNormSpec(64, 1e-5))


def test_branch_with_gated_shared_experts() -> None:
    spec = branch()
    router, bias, gate, up, down, scale, norm = weights((8, 64), (8,), (160, 64), (160, 64), (64, 160), (1, 64), (64,))
    held = {f"experts.{role}": w for role, w in stacks().items()}
    held |= {"router.weight": router, "router.bias": bias, "shared_gate.weight": scale, "norm.weight": norm}
    held |= {"shared.gate.weight": gate, "shared.up.weight": up, "shared.down.weight": down}
    module = CpuMoE().load(request(spec, held, activations="f32"))
    x = torch.randn(11, 64)
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.values
    routed = routed_experts(
        n,
        *route(n @ router.values.T, ROUTER, bias.values),
        *(held[f"experts.{role}"].values for role in ("gate", "up", "down")),
        EXPERTS,
    )
    shared = (torch.nn.functional.silu(n @ gate.values.T) * (n @ up.values.T)) @ down.values.T
    want = x + routed + shared * (n @ scale.values.T).sigmoid()
    torch.testing.assert_close(module(x), want, atol=1e-5, rtol=1e-5)


def test_what_the_fused_branch_does_not_run_it_says() -> None:
    spec = branch()
    assert isinstance(answer(CpuMoE(), spec, DEVICE), Supported)
    assert spec.shared is not None
    for changed in (
        replace(spec, experts=replace(EXPERTS, gate_format="MADE_UP")),
        replace(spec, experts=replace(EXPERTS, weight_on_input=True)),
        replace(spec, shared=replace(spec.shared, activation="relu")),
        replace(spec, shared=replace(spec.shared, norm=spec.norm)),
    ):
        assert isinstance(answer(CpuMoE(), changed, DEVICE), Unsupported)
