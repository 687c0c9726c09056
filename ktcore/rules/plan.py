"""The plan: for every node of a graph the implementation that runs it, its device, the rule, and why no other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ktcore.backend.implementation import Implementation
from ktcore.errors import PlanError
from ktcore.graph.node import Graph, Node
from ktcore.ops.moe import ExpertsSpec
from ktcore.placement.memory import (
    DEFAULT_CONTEXT,
    LONG_SHARE,
    STATE_SLOTS,
    STEP_TOKENS,
    DeviceMemory,
    human_bytes,
    workspace_bytes,
)
from ktcore.rules.experts import ExpertPolicy


@dataclass(frozen=True)
class Rejected:
    """An implementation that does not run a node, why, and the rule that lists it (None: no rule does)."""

    implementation: str
    reason: str
    rule: str | None = None


@dataclass(frozen=True)
class Resident:
    """Experts of a layer that live on another device than the rest.

    Attributes:
        experts: their ids.
        spec: of these experts alone.
    """

    experts: tuple[int, ...]
    spec: ExpertsSpec
    implementation: Implementation
    device: str
    packed_bytes: int


@dataclass(frozen=True)
class Choice:
    """What runs one node.

    Attributes:
        device: "name:index".
        options: the rule's options that the implementation knows.
        rule: the rule that chose, as "'name' (file:line)".
        fallback: it is not the first one that the rule lists.
        rejected: alternatives, those of the rule first.
        stored_bytes: of the weights it loads, in the checkpoint; packed_bytes: on the device.
        covered: names of the parts that a fused implementation runs itself.
        experts: how routed experts are treated beyond their device.
        resident: the experts that live elsewhere; the rest are this choice's own.
        ignored: the rule's options that this implementation, a listed fallback, does not know.
        quantize: format that float weights are quantised to while they are loaded.
        packings: packed bytes by what the option `packing` may say; empty where there is one way.
    """

    node: Node
    implementation: Implementation
    device: str
    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fallback: bool = False
    rejected: tuple[Rejected, ...] = ()
    stored_bytes: int = 0
    packed_bytes: int = 0
    covered: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    experts: ExpertPolicy | None = None
    resident: Resident | None = None
    quantize: str | None = None
    packings: Mapping[str, int] = field(default_factory=dict)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that it owns, a token."""
        return self.implementation.cache_bytes(self.node.spec, self.options)

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent states that it owns, a sequence."""
        return self.implementation.state_bytes(self.node.spec)

    @property
    def why(self) -> str:
        """The reason in a few words."""
        rule = self.rule if self.quantize is None else f"{self.rule}, quantised to {self.quantize}"
        if self.experts is not None:
            return f"{rule}: {self.experts.describe()}"
        if not self.fallback:
            return rule
        return f"{rule}, fallback: {self.rejected[0].implementation}: {self.rejected[0].reason}"


@dataclass(frozen=True)
class SummaryRow:
    """Nodes that differ in their layer only, as one line of a table.

    Attributes:
        nodes: their names with "*" for the layer.
        layers: the layers as in a rule, "0-29"; "" outside of layers.
    """

    nodes: str
    op: str
    implementation: str
    device: str
    count: int
    stored_bytes: int
    packed_bytes: int
    layers: str
    fallback: bool
    why: str


@dataclass(frozen=True)
class Plan:
    """Immutable result of `resolve`.

    Attributes:
        backend: the backend that was planned for.
        choices: node name -> choice; parts of fused nodes have none of their own.
        page_size: tokens a KV page, common to all caches.
        cache_bytes_per_token: of all caches on all devices.
        limits: device -> bytes that may be used there, where known.
        notes: rules that decide nothing here, and why; for readers.
        device_names: device -> what it is called, or the class of devices that was planned for.
    """

    graph: Graph
    backend: str
    choices: Mapping[str, Choice]
    page_size: int
    cache_bytes_per_token: int
    limits: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    device_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices in use, in the order of their first node."""
        own = [choice.device for choice in self.choices.values()]
        return tuple(dict.fromkeys(own + [c.resident.device for c in self.choices.values() if c.resident]))

    @property
    def fallbacks(self) -> tuple[Choice, ...]:
        """Choices that are listed fallbacks."""
        return tuple(choice for choice in self.choices.values() if choice.fallback)

    @property
    def step_tokens(self) -> int:
        """Most tokens of one step: `STEP_TOKENS`, or what an implementation wants for long prompts."""
        return max(STEP_TOKENS, *(choice.implementation.long_step for choice in self.choices.values()))

    def default_context(self) -> int:
        """Tokens to plan for when nobody says: the model's own, at most `DEFAULT_CONTEXT`."""
        return min(self.graph.context_length, DEFAULT_CONTEXT)

    def packings(self) -> dict[str, int]:
        """Packed bytes of all weights by what the option `packing` may say, said of all; empty: it changes none."""
        choices = self.choices.values()
        names = dict.fromkeys(name for choice in choices for name in choice.packings)
        totals = {name: sum(c.packings.get(name, c.packed_bytes) for c in choices) for name in names}
        return totals if len(set(totals.values())) > 1 else {}

    def memory(self, context: int | None = None) -> dict[str, DeviceMemory]:
        """Bytes needed on each device with `context` tokens of KV cache."""
        tokens = -(-(context or self.default_context()) // self.page_size) * self.page_size
        steps = min(self.step_tokens, max(STEP_TOKENS, tokens // LONG_SHARE))
        found: dict[str, DeviceMemory] = {}
        for device in self.devices:
            here = [choice for choice in self.choices.values() if choice.device == device]
            residents = [c.resident for c in self.choices.values() if c.resident and c.resident.device == device]
            found[device] = DeviceMemory(
                weights=sum(choice.packed_bytes for choice in here) + sum(r.packed_bytes for r in residents),
                kv=sum(tokens * choice.kv_bytes_per_token + STATE_SLOTS * choice.state_bytes for choice in here),
                # the head sees a few rows a step only, so its width would overstate the need
                workspace=max(
                    (workspace_bytes(c.node.spec, steps) for c in here if c.node is not self.graph.head), default=0
                ),
                limit=self.limits.get(device),
            )
        return found

    def largest_context(self, device: str, room: int) -> int:
        """Most tokens, in whole pages, whose caches on `device` take at most `room` bytes, states included; 0: none."""
        here = [choice for choice in self.choices.values() if choice.device == device]
        per_token = sum(choice.kv_bytes_per_token for choice in here)
        room -= sum(STATE_SLOTS * choice.state_bytes for choice in here)
        return max(0, room) // (per_token * self.page_size) * self.page_size if per_token else 0

    def summary(self) -> list[SummaryRow]:
        """One row for nodes that are alike, in the graph's order."""
        groups: dict[tuple[str, str, str, str], list[Choice]] = {}
        for name, choice in self.choices.items():
            key = (_LAYER.sub(".*", name), choice.implementation.id, choice.device, choice.why)
            groups.setdefault(key, []).append(choice)
        return [
            SummaryRow(
                nodes=key[0],
                op=group[0].node.spec.op,
                implementation=key[1],
                device=key[2],
                count=len(group),
                stored_bytes=sum(c.stored_bytes for c in group),
                packed_bytes=sum(c.packed_bytes for c in group),
                layers=_spans(sorted({c.node.layer for c in group if c.node.layer is not None})),
                fallback=group[0].fallback,
                why=key[3],
            )
            for key, group in groups.items()
        ]

    def explain(self, name: str) -> str:
        """Several lines of text: what runs a node, by which rule, and why each alternative does not.

        Raises:
            PlanError: the graph has no such node; names near ones.
        """
        node = self._node(name)
        if name not in self.choices:
            owner = next(c for c in self.choices.values() if name in c.covered)
            return f"{name} ({node.spec.op}) is run by {owner.node.name} as a whole, with {owner.implementation.id}"
        choice = self.choices[name]
        lines = [
            f"{name} ({node.spec.op}) is run by {choice.implementation.id} on {choice.device}",
            f"  rule      {choice.rule}" + (", as a listed fallback" if choice.fallback else ""),
            f"  weights   {', '.join(node.spec.formats()) or 'none'}: {human_bytes(choice.stored_bytes)} stored, "
            f"{human_bytes(choice.packed_bytes)} packed",
        ]
        if len(set(choice.packings.values())) > 1:
            sizes = ", ".join(f"{human_bytes(size)} {name}" for name, size in choice.packings.items())
            lines.append(f"  packings  {sizes}")
        if choice.quantize is not None:
            lines.append(f"  quantised {choice.quantize} while loading; the error is measured and reported then")
        if choice.experts is not None:
            lines.append(f"  experts   {choice.experts.describe()}")
        if choice.resident is not None:
            r = choice.resident
            lines.append(
                f"  resident  {len(r.experts)} experts with {r.implementation.id} on {r.device}, "
                f"{human_bytes(r.packed_bytes)} packed"
            )
        if choice.options:
            lines.append(f"  options   {', '.join(f'{k}={v}' for k, v in choice.options.items())}")
        if choice.ignored:
            lines.append(
                f"  unused    options that {choice.implementation.id} does not know: {', '.join(choice.ignored)}"
            )
        if choice.covered:
            lines.append(f"  covers    {', '.join(choice.covered)}")
        lines += [
            f"  rejected  {r.implementation}: {r.reason}" + (f" [rule {r.rule}]" if r.rule else "")
            for r in choice.rejected
        ]
        return "\n".join(lines)

    def _node(self, name: str) -> Node:
        nodes = {node.name: node for node in self.graph.walk()}
        if not isinstance(name, str) or name not in nodes:
            near = get_close_matches(str(name), nodes, 5, 0.4) or list(nodes)[:5]
            raise PlanError(f"the model has no node {name!r}", f"near ones: {', '.join(near)}")
        return nodes[name]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types, with the memory for the default context."""
        context = self.default_context()
        return {
            "architecture": self.graph.architecture,
            "family": self.graph.family,
            "parameters": self.graph.parameters,
            "backend": self.backend,
            "page_size": self.page_size,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "context": context,
            "memory": {
                device: {"weights": m.weights, "kv": m.kv, "workspace": m.workspace, "total": m.total, "limit": m.limit}
                for device, m in self.memory(context).items()
            },
            "packings": self.packings(),
            "notes": list(self.notes),
            "nodes": {name: _choice_dict(choice) for name, choice in self.choices.items()},
        }


_LAYER = re.compile(r"\.\d+(?=\.|$)")


def _choice_dict(choice: Choice) -> dict[str, Any]:
    return {
        "op": choice.node.spec.op,
        "layer": choice.node.layer,
        "implementation": choice.implementation.id,
        "device": choice.device,
        "rule": choice.rule,
        "fallback": choice.fallback,
        "options": dict(choice.options),
        "quantize": choice.quantize,
        "experts": choice.experts.describe() if choice.experts else None,
        "resident": list(choice.resident.experts) if choice.resident else [],
        "stored_bytes": choice.stored_bytes,
        "packed_bytes": choice.packed_bytes,
        "packings": dict(choice.packings),
        "covered": list(choice.covered),
        "rejected": [{"implementation": r.implementation, "reason": r.reason, "rule": r.rule} for r in choice.rejected],
    }


def _spans(layers: list[int]) -> str:
    """ "0-2,5" of [0, 1, 2, 5]."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
