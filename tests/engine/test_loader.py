"""A plan becomes modules: in what order, with what, where their inputs come from, and what is told meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktcore.backend.implementation import LoadRequest
from ktcore.engine.experts.split import DeferredExperts, ReducedRouter, SplitExperts
from ktcore.engine.load.loader import Arriving, Crossing, load_modules
from ktcore.engine.step.devices import Devices
from ktcore.engine.step.runner import LoadedModel
from ktcore.errors import BackendError, CheckpointError
from ktcore.graph.node import Graph, Layer, Node
from ktcore.ops import ExpertsSpec, MoESpec
from ktcore.rules.experts import ExpertPolicy
from ktcore.rules.plan import Choice, Plan, Resident
from ktcore.weights.quantize import Loss
from ktcore.weights.ref import WeightRef
from tests.rules.graphs import EXPERTS, HIDDEN, graph, llama, qwen3_moe

HOST, META = torch.device("cpu"), torch.device("meta")


@dataclass(eq=False)
class Loaded:
    """A module that knows what it was made of."""

    request: LoadRequest
    by: str

    def __call__(self, *args: Any) -> Any:
        return args[0]


class Cache(Loaded):
    def allocate_pages(self, pages: int, page_size: int) -> None: ...


class State(Loaded):
    def allocate_states(self, slots: int) -> None: ...

    def copy_states(self, source: Any, target: Any) -> None: ...


class Counted(Loaded):
    def expert_load(self) -> None: ...


@dataclass
class Loads:
    """An implementation that makes a `Loaded`, or fails."""

    id: str = "host.any"
    fused: bool = False
    capturable: bool = False
    long_step: int = 0
    fails: Exception | None = None
    seen: list[LoadRequest] = field(default_factory=list)

    def load(self, request: LoadRequest) -> Loaded:
        self.seen.append(request)
        if self.fails is not None:
            raise self.fails
        op = request.spec.op
        kind = {"kv_cache": Cache, "rope": State, "experts": Counted}.get(op, Loaded)
        return kind(request, self.id)


@dataclass
class Runtime:
    """A device by name; those called "host" are the CPU."""

    name: str
    threads: int | None
    log: list[str]

    @property
    def device(self) -> torch.device:
        return HOST if self.name.startswith("host") else META

    graph = None

    def capabilities(self) -> str:
        return f"capabilities of {self.name}"

    def synchronize(self, stream: object = None) -> None:
        self.log.append(f"waited for {self.name}")

    def close(self) -> None:
        self.log.append(f"closed {self.name}")


class Checkpoint:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.released: list[str] = []

    def ask_for(self, name: str) -> None:
        self.asked.append(name)

    def release(self, name: str) -> None:
        self.released.append(name)


class OnDisk:
    """Packed weights of which some are there already."""

    complete = False

    def populate(self, room: int) -> None:
        assert room > 0


@dataclass
class World:
    """Everything that loading touches."""

    plan: Plan
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: list[str] = field(default_factory=list)

    def load(self, **options: Any) -> LoadedModel:
        registry = SimpleNamespace(runtime=lambda device, threads: Runtime(device, threads, self.log))
        return load_modules(self.plan, self.checkpoint, registry, **options)  # type: ignore[arg-type]


def planned(made: Graph, change: Callable[[Node], Mapping[str, Any] | None] = lambda node: None) -> World:
    """Every node on host:0 by one implementation, but what `change` says."""
    everywhere = Loads()
    choices: dict[str, Choice] = {}
    covered: set[str] = set()
    for node in made.walk():
        if node.name in covered:
            continue
        choice = Choice(node, everywhere, "host:0", "a rule")  # type: ignore[arg-type]
        choices[node.name] = choice = replace(choice, **(change(node) or {}))
        if choice.implementation.fused:
            covered |= {part.name for part in node.walk()}
    return World(Plan(made, "host", choices, 16, 0))


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was handed off; each call gives a new object."""
    made: list[tuple[Any, ...]] = []

    def hand_off(self: Devices, *args: Any) -> tuple[str, int]:
        made.append(args)
        return "handed off", len(made)

    monkeypatch.setattr(Devices, "hand_off", hand_off)
    monkeypatch.setattr("ktcore.engine.load.loader.graph_device", lambda plan, devices: ("graphs", "or why not"))
    return made


def test_parts_come_before_the_whole_which_gets_them_by_role() -> None:
    options = {"some": "option"}
    world = planned(llama(1), lambda node: {"options": options} if node.name.endswith(".o") else None)
    packed = OnDisk()
    model = world.load(threads=3, packed=packed, max_tokens=7)
    attention, mlp = model.layers[0]
    assert isinstance(attention, Loaded)
    assert list(attention.request.children) == ["q", "k", "v", "o", "cache", "norm", "rope"]
    for role, child in attention.request.children.items():
        assert child.request.name == f"layers.0.attn.{role}"
        assert child.request.spec is attention.request.spec.children()[role]
    assert attention.request.children["o"].request.options == options
    q = attention.request.children["q"].request
    assert (q.options, q.packed, q.device) == ({}, packed, "capabilities of host:0")
    assert (q.runtime.name, q.runtime.threads) == ("host:0", 3)
    assert {role: weight.ref for role, weight in q.weights.items()} == {
        "weight": WeightRef(("layers.0.attn.q",), (HIDDEN, HIDDEN), "Q8_0")
    }
    names = [r.name for r in world.plan.choices["embed"].implementation.seen]  # type: ignore[attr-defined]
    assert names[0] == "embed"
    assert names.index("layers.0.attn.q") < names.index("layers.0.attn") < names.index("layers.0.ffn.gate")
    assert sorted(names) == sorted(world.plan.choices)
    assert [m.request.name for m in (model.embed, model.norm, model.head, model.sampler)] == [
        "embed", "norm", "head", "sampler",
    ]  # fmt: skip
    assert [m.request.name for m in model.caches] == ["layers.0.attn.cache"]
    assert [m.request.name for m in model.states] == ["layers.0.attn.rope"]
    assert (model.graph_device, model.no_graphs) == (None, "the model runs on the host")
    assert world.log == ["waited for host:0"]
    assert (model.early, dict(model.losses), dict(model.expert_loads)) == (frozenset(), {}, {})
    assert mlp.request.name == "layers.0.ffn"


def test_a_fused_implementation_gets_all_weights_by_dotted_role_and_no_parts() -> None:
    fused = Loads(id="host.fused", fused=True)
    world = planned(llama(1), lambda node: {"implementation": fused} if node.name == "layers.0.attn" else None)
    attention, _ = world.load().layers[0]
    assert dict(attention.request.children) == {}
    assert sorted(attention.request.weights) == [
        "k.weight", "norm.weight", "o.weight", "q.weight", "v.weight",
    ]  # fmt: skip
    assert attention.by == "host.fused"


def test_progress_counts_stored_bytes_and_ends_at_all_of_them() -> None:
    told: list[tuple[str, int, int]] = []
    world = planned(qwen3_moe(1))
    world.load(progress=lambda *args: told.append(args))
    total = sum(root.nbytes for root in world.plan.graph.roots())
    assert {t[2] for t in told} == {total}
    assert told[0] == ("embed", world.plan.graph.embed.nbytes, total)
    assert [t[1] for t in told] == sorted(t[1] for t in told)
    assert told[-1] == ("sampler", total, total)
    assert [t[0] for t in told] == [r.name for r in world.plan.choices["embed"].implementation.seen]  # type: ignore[attr-defined]
    sources = [s for node in world.plan.graph.walk() for ref in node.weights.values() for s in ref.sources]
    assert sorted(world.checkpoint.released) == sorted(sources)


def test_only_what_was_quantised_counts_for_the_error_by_the_operator_that_owns_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = llama(1)
    ffn = made.layers[0].ffn
    parts = {
        role: replace(part, weights={"weight": replace(part.weights["weight"], stored="BF16")})
        if role in ("gate", "down")
        else part
        for role, part in ffn.parts.items()
    }
    made = graph("llama", [Layer(made.layers[0].attn, replace(ffn, parts=parts))])
    monkeypatch.setattr("ktcore.weights.ref.Loss", lambda: Loss(1.0, 4.0))
    for fused in (True, False):
        world = planned(
            made,
            lambda node, fused=fused: (
                {"implementation": Loads(id="h.f", fused=fused)}  # type: ignore[misc]
                if node.name == "layers.0.ffn"
                else None
            ),
        )
        assert world.load().losses == {"linear": Loss(2.0, 8.0)}


class TestPlaces:
    def test_a_root_on_another_device_has_its_input_brought_and_a_model_of_one_host_needs_none(self) -> None:
        world = planned(llama(1), lambda node: {"device": "far:0"} if node.name.startswith("layers.0.ffn") else None)
        attention, mlp = world.load().layers[0]
        assert isinstance(mlp, Arriving)
        assert mlp.device == META
        assert mlp(torch.ones(2)).device == META
        # what comes from the other device has to be brought here again
        assert isinstance(attention, Arriving)
        assert attention.device == HOST
        everywhere = planned(llama(1), lambda node: {"device": "far:0"}).load()
        assert isinstance(everywhere.norm, Arriving)

    def test_a_part_on_another_device_is_crossed_to_and_back(self) -> None:
        world = planned(llama(1), lambda node: {"device": "far:0"} if node.name == "layers.0.ffn.up" else None)
        _, mlp = world.load().layers[0]
        inner = mlp.module.request.children
        assert isinstance(inner["gate"], Loaded)
        up = inner["up"]
        assert isinstance(up, Crossing)
        assert (up.inside, up.outside) == (META, HOST)
        assert up.module.request.runtime.name == "far:0"

    def test_crossing_moves_tensors_in_tuples_too_and_leaves_the_rest(self) -> None:
        seen: list[Any] = []

        def module(*args: Any) -> Any:
            seen.extend(args)
            return torch.ones(2), (torch.ones(1), "text")

        out = Crossing(module, HOST, META)(torch.ones(3), 5, (torch.ones(1), None))
        assert [s.device if isinstance(s, torch.Tensor) else s for s in seen[:2]] == [HOST, 5]
        assert (seen[2][0].device, seen[2][1]) == (HOST, None)
        assert (out[0].device, out[1][0].device, out[1][1]) == (META, META, "text")
        Crossing(seen.append, META, HOST)(torch.ones(3))
        assert seen[-1].device == META


def _experts(device: str = "host:0", **more: Any) -> Callable[[Node], Mapping[str, Any] | None]:
    """Everything on far:0, the routed experts on `device`, with `more` in their choice."""

    def change(node: Node) -> Mapping[str, Any]:
        if isinstance(node.spec, ExpertsSpec):
            return {"device": device, **more}
        return {"device": "far:0"}

    return change


def _branch(model: LoadedModel, layer: int) -> Mapping[str, Any]:
    found: Mapping[str, Any] = model.layers[layer][1].module.request.children
    return found


class TestExperts:
    def test_on_the_host_they_are_handed_off(self, handed: list[tuple[Any, ...]]) -> None:
        model = planned(qwen3_moe(2), _experts()).load(max_tokens=33)
        for layer in range(2):
            assert _branch(model, layer)["experts"] == ("handed off", layer + 1)
            module, *rest = handed[layer]
            assert module.request.name == f"layers.{layer}.ffn.experts"
            assert module.request.runtime.name == "host:0"
            assert rest == ["host:0", "far:0", HIDDEN, 2, 33]
            assert model.expert_loads[layer] == [module]
        assert (model.graph_device, model.no_graphs) == ("graphs", "or why not")

    def test_on_another_accelerator_they_are_crossed_to(self, handed: list[tuple[Any, ...]]) -> None:
        experts = _branch(planned(qwen3_moe(1), _experts("far:1")).load(), 0)["experts"]
        assert isinstance(experts, Crossing)
        assert (experts.inside, experts.outside, handed) == (META, META, [])
        assert experts.module.request.runtime.name == "far:1"

    def test_beside_their_branch_they_are_called_as_they_are(self, handed: list[tuple[Any, ...]]) -> None:
        experts = _branch(planned(qwen3_moe(1), _experts("far:0", options={"a": 1})).load(), 0)["experts"]
        assert isinstance(experts, Counted)
        assert (experts.request.options, experts.request.spec.experts, handed) == ({"a": 1}, EXPERTS, [])

    @pytest.mark.parametrize("ids", [(1, 6), tuple(range(EXPERTS))])
    def test_residents_are_split_off_each_half_with_its_own_experts(
        self, handed: list[tuple[Any, ...]], ids: tuple[int, ...]
    ) -> None:
        made = qwen3_moe(1)
        node = made.layers[0].ffn.parts["experts"]
        near = Loads(id="far.near")
        resident = Resident(ids, replace(node.spec, experts=len(ids)), near, "far:0", 0)  # type: ignore[arg-type]
        world = planned(made, _experts(resident=resident, options={"a": 1}))
        split = _branch(world.load(), 0)["experts"]
        assert isinstance(split, SplitExperts)
        kept = split._near.request
        assert (kept.runtime.name, kept.spec.experts, kept.options) == ("far:0", len(ids), {})
        assert kept.weights["gate"].shape[0] == len(ids)
        others = [e for e in range(EXPERTS) if e not in ids]
        if not others:
            assert (split._far, handed) == (None, [])
            return
        assert split._far == ("handed off", 1)
        left = handed[0][0].request
        assert (left.spec.experts, left.weights["up"].shape[0], left.options) == (len(others), len(others), {"a": 1})
        assert handed[0][3:] == (HIDDEN, 2, 512)
        # both halves are counted
        assert len(world.plan.choices) > 0
        assert split._far_ids.device == META

    def test_deferred_ones_have_two_callers_a_common_chain_and_a_last_layer(
        self, handed: list[tuple[Any, ...]]
    ) -> None:
        model = planned(qwen3_moe(3), _experts(experts=ExpertPolicy(defer=1))).load()
        found = [_branch(model, layer)["experts"] for layer in range(3)]
        for layer, experts in enumerate(found):
            assert isinstance(experts, DeferredExperts)
            assert (experts._now, experts._later) == (("handed off", 2 * layer + 1), ("handed off", 2 * layer + 2))
            assert (experts._defer, experts._last, experts._chain) == (1, layer == 2, model.deferred)
        assert [h[0] for h in handed[::2]] == [h[0] for h in handed[1::2]]  # packed once

    @pytest.mark.parametrize(
        ("policy", "reduced"),
        [
            (ExpertPolicy(keep=1), (1, 0.0)),
            (ExpertPolicy(threshold=0.5), (0, 0.5)),
            (ExpertPolicy(defer=1), None),
            (None, None),
        ],
    )
    def test_a_router_is_reduced_where_the_policy_says_so(
        self, handed: list[tuple[Any, ...]], policy: ExpertPolicy | None, reduced: tuple[int, float] | None
    ) -> None:
        router = _branch(planned(qwen3_moe(1), _experts(experts=policy)).load(), 0)["router"]
        if reduced is None:
            assert isinstance(router, Loaded)
        else:
            assert isinstance(router, ReducedRouter)
            assert (router._keep, router._threshold) == reduced
            assert router._router.request.name == "layers.0.ffn.router"

    def test_a_fused_branch_keeps_its_router_to_itself(self) -> None:
        fused = Loads(id="host.moe", fused=True)
        world = planned(
            qwen3_moe(1), lambda node: {"implementation": fused} if isinstance(node.spec, MoESpec) else None
        )
        _, branch = world.load().layers[0]
        assert dict(branch.request.children) == {}
        assert "experts.gate" in branch.request.weights

    def test_layers_whose_router_reads_what_came_before_attention_are_known(self) -> None:
        made = qwen3_moe(3)
        early = made.layers[1].ffn
        layers = list(made.layers)
        layers[1] = Layer(layers[1].attn, replace(early, spec=replace(early.spec, early_router=True)))
        assert planned(graph("qwen3_moe", layers)).load().early == {1}


class TestFailures:
    @pytest.mark.parametrize(
        "error", [CheckpointError("cut"), MemoryError("none left"), torch.OutOfMemoryError("full")]
    )
    def test_what_is_nobodys_bug_passes_and_devices_are_closed(self, error: Exception) -> None:
        world = planned(llama(1), lambda n: {"implementation": Loads(fails=error)} if n.name == "head" else None)
        with pytest.raises(type(error)) as caught:
            world.load()
        assert caught.value is error
        assert world.log == ["closed host:0"]

    def test_a_plugins_bug_names_its_implementation_node_and_device(self) -> None:
        bug = Loads(id="host.buggy", fails=ZeroDivisionError("by nothing"))
        world = planned(llama(1), lambda n: {"implementation": bug} if n.name == "layers.0.ffn.up" else None)
        with pytest.raises(
            BackendError,
            match=r"ffn.up: host.buggy cannot load on host:0: ZeroDivisionError: by nothing\n.*before host.buggy in",
        ) as caught:
            world.load()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert world.log == ["closed host:0"]
