"""Applies rules to a graph: for every node the first rule that matches decides, and what it passed over is recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.handles import answer
from ktcore.backend.implementation import Implementation, Supported
from ktcore.backend.record import describe
from ktcore.backend.registry import Registry, split_device
from ktcore.errors import BackendError, CheckpointError, PlanError, RuleError
from ktcore.graph.node import Graph, Node
from ktcore.ops.base import Spec
from ktcore.ops.moe import ExpertsSpec
from ktcore.placement.memory import fit_hint, human_bytes
from ktcore.rules.audit import check_rules_used
from ktcore.rules.load import RuleSet
from ktcore.rules.packing import check_packing, packed_size, sizes, with_packing
from ktcore.rules.plan import Choice, Plan, Rejected, Resident
from ktcore.rules.quantize import OPTION, quantized_node, with_new_nodes
from ktcore.rules.schema import Rule, rule_text
from ktcore.weights.quantize import target_format

DEFAULT_PAGE_SIZE = 16
ACCELERATOR = "accelerator"
"""What rules and limits call the accelerator that is planned for."""
REFERENCE = "reference."
"""Prefix of the implementations that run on any device."""


def resolve(
    graph: Graph,
    rules: RuleSet,
    registry: Registry,
    backend: str,
    memory: int | Mapping[str, int] | None = None,
    context: int | None = None,
    packing: str | None = None,
) -> Plan:
    """Plan a graph for a backend ("name" or "name:index"), which need not be available here.

    Args:
        memory: bytes of accelerator memory to stay within, or bytes by device ("name", "name:index", "accelerator" or
            "host"); None, and a device without a figure, takes what an available device reports.
        context: tokens of KV cache; None takes the model's own, at most 16384.
        packing: "compact" or "fast" for all nodes whose rule has no such option; None leaves it to the rules.

    Raises:
        RuleError: a rule names something unknown, matches nothing or can never fire; with file and line.
        PlanError: no rule is about a node, nothing that its rule lists can run it, caches share no page size, or the
            plan does not fit into the memory.
        BackendError: the backend is unknown, incompatible or broken.
    """
    check_packing(packing)
    plan = _Resolver(graph, rules, registry, backend, memory, packing).plan()
    if packing is not None and not any(choice.packings for choice in plan.choices.values()):
        raise PlanError(
            f"packing {packing} means nothing here: no implementation of this plan packs weights in several ways"
        )
    _check_fits(plan, context or plan.default_context())
    return plan


class _Resolver:
    def __init__(
        self,
        graph: Graph,
        rules: RuleSet,
        registry: Registry,
        backend: str,
        memory: int | Mapping[str, int] | None,
        packing: str | None,
    ) -> None:
        name, index = split_device(backend)
        self.graph = graph
        self.rules = rules
        self.registry = registry
        self.packing = packing
        self.backend = backend
        self.record = registry.known(name)
        self.main = f"{name}:{index}"
        self.implementations = registry.implementations()
        self.families = (graph.family, graph.architecture)
        self.choices: dict[str, Choice] = {}
        self.fired: dict[int, int] = dict.fromkeys(range(len(rules.rules)), 0)
        self._capabilities: dict[str, Capabilities] = {}
        self.memory = self._memory(memory)

    def plan(self) -> Plan:
        for rule in self.rules.rules:
            self._check_rule(rule)
        for root in self.graph.roots():
            self._decide(root, self.main)
        notes = check_rules_used(self.graph, self.rules, self.fired, self._matches)
        graph = with_new_nodes(self.graph, {n: c.node for n, c in self.choices.items() if c.quantize})
        nodes = {node.name: node for node in graph.walk()}
        return Plan(
            graph=graph,
            backend=self.backend,
            choices={name: replace(choice, node=nodes[name]) for name, choice in self.choices.items()},
            page_size=_common_page_size(self.choices),
            cache_bytes_per_token=sum(choice.kv_bytes_per_token for choice in self.choices.values()),
            limits=self._limits(),
            notes=(*self._idle_limits(), *notes),
            device_names={device: caps.name for device, caps in self._capabilities.items()},
        )

    def _check_rule(self, rule: Rule) -> None:
        self._device(rule, self.main)
        known: set[str] = set()
        for name in rule.use:
            if name not in self.implementations:
                raise self._unknown(rule, name)
            known |= self.implementations[name].options
        self._target(rule)
        for option in rule.options:
            if option not in known | {OPTION}:
                listed = ", ".join(sorted(known | {OPTION}))
                raise rule.where.error(
                    f"rule '{rule.name}': none of {', '.join(rule.use)} has an option '{option}'", f"known: {listed}"
                )

    def _target(self, rule: Rule) -> str | None:
        """The format that the rule quantises to."""
        if OPTION not in rule.options:
            return None
        try:
            return target_format(rule.options[OPTION])
        except CheckpointError as error:
            raise rule.where.error(f"rule '{rule.name}': {error.message}", error.hint) from None

    def _as_loaded(self, rule: Rule, node: Node, fused: bool) -> Node:
        """The node with the weights that an implementation gets, which its rule may have quantised."""
        target = self._target(rule)
        try:
            return node if target is None else quantized_node(node, target, with_parts=fused)
        except CheckpointError as error:
            raise PlanError(f"{node.name}: rule {rule_text(rule)}: {error.message}", error.hint) from None

    def _unknown(self, rule: Rule, name: str) -> RuleError:
        message = f"rule '{rule.name}': implementation '{name}' is unknown"
        owner = self.registry.get(name.partition(".")[0])
        if owner is not None and not owner.usable:
            return rule.where.error(f"{message}: backend '{owner.name}' is {owner.state.value}: {owner.reason}")
        near = get_close_matches(name, self.implementations, 3, 0.5)
        known = near or sorted(self.implementations)
        return rule.where.error(message, f"{'near' if near else 'known'} ones: {', '.join(known)}")

    def _device(self, rule: Rule, inherited: str) -> str:
        if rule.device is None:
            return inherited
        if rule.device == ACCELERATOR:
            return self.main
        if rule.device == "host":
            return f"{self.registry.host().name}:0"
        try:
            name, index = split_device(rule.device)
            self.registry.known(name)
        except BackendError as error:
            raise rule.where.error(f"rule '{rule.name}': {error.message}", error.hint) from error
        return f"{name}:{index}"

    def _caps(self, device: str) -> Capabilities:
        if device not in self._capabilities:
            self._capabilities[device] = self.registry.capabilities(device)
        return self._capabilities[device]

    def _matches(self, rule: Rule, node: Node, inherited: str | None = None) -> bool:
        return rule.match.covers(node, self.families, self._caps(self._device(rule, inherited or self.main)))

    def _decide(self, node: Node, inherited: str) -> None:
        matching = [i for i, rule in enumerate(self.rules.rules) if self._matches(rule, node, inherited)]
        if not matching:
            raise PlanError(
                f"no rule is about node '{node.name}' ({node.spec.op})",
                f"add one with 'match: {{op: {node.spec.op}}}' to your rule file",
            )
        rule = self.rules.rules[matching[0]]
        self.fired[matching[0]] += 1
        choice = self._choose(rule, node, self._device(rule, inherited), [self.rules.rules[i] for i in matching[1:]])
        self.choices[node.name] = choice
        if not choice.implementation.fused:
            for part in node.parts.values():
                self._decide(part, choice.device)

    def _choose(self, rule: Rule, node: Node, device: str, later: list[Rule]) -> Choice:
        rejected: list[Rejected] = []
        chosen: Implementation | None = None
        stored = node
        for name in rule.use:
            if chosen is not None:
                rejected.append(Rejected(name, f"listed after {chosen.id}, which can run it", rule_text(rule)))
                continue
            apart = self._experts_apart(self.implementations[name], node, device)
            candidate = self._as_loaded(rule, stored, self.implementations[name].fused)
            reason = apart or self._obstacle(self.implementations[name], candidate, device)
            if reason is None:
                chosen, node = self.implementations[name], candidate
            elif apart is None and (rule.strict or self.rules.strict):
                raise PlanError(
                    f"{node.name}: {name} cannot run it on {device}: {reason}",
                    f"rule {rule_text(rule)} is strict, so no fallback is taken",
                )
            else:
                rejected.append(Rejected(name, reason, rule_text(rule)))
        if chosen is None:
            reasons = "; ".join(f"{r.implementation}: {r.reason}" for r in rejected)
            raise PlanError(
                f"{node.name} ({node.spec.op}) cannot run on {device}: {reasons}",
                f"rule {rule} lists no other; add one to its 'use', or write a rule that comes before it",
            )
        rejected += self._passed_over(node, device, rule, later)
        if OPTION in rule.options and node is stored and (chosen.fused or not node.parts):
            raise rule.where.error(
                f"rule '{rule.name}': {node.name} ({node.spec.op}) holds no float matrix to quantise"
            )
        resident = self._resident(rule, node)
        spec = node.spec if resident is None else _without(node, resident)
        fused = chosen.fused
        known = chosen.options | ({OPTION} if node is not stored else set())
        share = _share(spec, node)
        options = with_packing(
            {key: value for key, value in rule.options.items() if key in chosen.options}, chosen, self.packing
        )
        packings = sizes(chosen, spec, node, fused, share)
        return Choice(
            node=node,
            implementation=chosen,
            device=device,
            rule=rule_text(rule),
            options=options,
            quantize=None if node is stored else self._target(rule),
            fallback=chosen.id != rule.use[0],
            rejected=tuple(rejected),
            stored_bytes=_nbytes(stored, fused),
            packed_bytes=packed_size(
                rule, options, packings, chosen.packed_bytes(spec, round(_nbytes(node, fused) * share))
            ),
            packings=packings,
            covered=tuple(part.name for part in node.walk() if part is not node) if fused else (),
            ignored=tuple(key for key in rule.options if key not in known),
            experts=rule.experts,
            resident=resident,
        )

    def _experts_apart(self, implementation: Implementation, node: Node, device: str) -> str | None:
        """Why a fused implementation is passed over: a rule treats some experts of the node differently from others."""
        if not implementation.fused:
            return None
        for part in node.walk():
            if part is node or not isinstance(part.spec, ExpertsSpec):
                continue
            decides = next((rule for rule in self.rules.rules if self._matches(rule, part, device)), None)
            if decides is not None and decides.experts is not None:
                return f"rule {rule_text(decides)} treats some of its experts apart, which needs its parts"
        return None

    def _resident(self, rule: Rule, node: Node) -> Resident | None:
        """The experts that the rule keeps on another device, with the first implementation that runs them there."""
        policy, whole = rule.experts, node.spec
        if policy is None or not policy.on_device or not isinstance(whole, ExpertsSpec):
            return None
        ids = policy.resident(whole.experts)
        if ids and max(ids) >= whole.experts:
            raise rule.where.error(f"rule '{rule.name}': {node.name} has no expert {max(ids)}, only {whole.experts}")
        device = self._device(replace(rule, device=policy.device), self.main)
        spec = replace(whole, experts=len(ids))
        part = replace(node, spec=spec)
        reasons = []
        for name in policy.use:
            if name not in self.implementations:
                raise self._unknown(rule, name)
            reason = self._obstacle(self.implementations[name], part, device)
            if reason is None:
                stored = node.nbytes * len(ids) // whole.experts
                packed = self.implementations[name].packed_bytes(spec, stored)
                return Resident(ids, spec, self.implementations[name], device, packed)
            reasons.append(f"{name}: {reason}")
        raise PlanError(f"{node.name}: no implementation keeps experts on {device}: {'; '.join(reasons)}")

    def _obstacle(self, implementation: Implementation, node: Node, device: str) -> str | None:
        """Why the implementation cannot run the node on the device; None when it can."""
        if not isinstance(node.spec, implementation.spec_type):
            return f"it implements {implementation.spec_type.op}, not {node.spec.op}"
        owner, name = implementation.id.partition(".")[0], split_device(device)[0]
        if not implementation.id.startswith(REFERENCE) and owner != name:
            return f"it runs on {owner} devices, the rule puts the node on {device}"
        try:
            found = answer(implementation, node.spec, self._caps(device))
        except Exception as error:  # a plugin's bug must not take planning down; it shows as the reason
            return f"its supports() failed: {describe(error)}"
        return None if isinstance(found, Supported) else found.reason

    def _passed_over(self, node: Node, device: str, rule: Rule, later: list[Rule]) -> Iterator[Rejected]:
        """Alternatives that the deciding rule does not list: those of later rules, then those of no rule."""
        seen = set(rule.use)
        for other in later:
            for name in other.use:
                if name not in seen:
                    seen.add(name)
                    yield Rejected(name, f"rule {rule_text(rule)} comes first", rule_text(other))
        for name, implementation in self.implementations.items():
            if name not in seen and isinstance(node.spec, implementation.spec_type):
                yield Rejected(name, self._obstacle(implementation, node, device) or "no rule lists it for this node")

    def _memory(self, given: int | Mapping[str, int] | None) -> dict[str, int]:
        """Bytes by "name:index"; a figure alone is for the accelerator that is planned for."""
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            return {self.main if self.record.accelerator else ACCELERATOR: given}
        named: dict[str, int] = {}
        for device, size in given.items():
            if device == ACCELERATOR:
                named[self.main if self.record.accelerator else ACCELERATOR] = size
                continue
            name, index = split_device(self.registry.host().name if device == "host" else device)
            self.registry.known(name)
            if named.setdefault(f"{name}:{index}", size) != size:
                raise PlanError(f"memory names {name}:{index} twice, with different sizes", "name each device once")
        return named

    def _used(self) -> set[str]:
        residents = {choice.resident.device for choice in self.choices.values() if choice.resident}
        return {choice.device for choice in self.choices.values()} | residents

    def _idle_limits(self) -> Iterator[str]:
        """A note for each figure that limits nothing."""
        used = self._used()
        for device in self.memory:
            if device == ACCELERATOR:
                yield "memory limits an accelerator, and this plan uses none"
            elif device not in used:
                yield f"memory limits {device}, and this plan puts nothing there"

    def _limits(self) -> Mapping[str, int]:
        limits: dict[str, int] = {}
        for device in self._used():
            caps = self._caps(device)
            if device in self.memory:
                limits[device] = self.memory[device]
            elif caps.memory_bytes is not None and caps.live:
                limits[device] = caps.memory_bytes
        return limits


def _nbytes(node: Node, fused: bool) -> int:
    return node.nbytes if fused else sum(ref.nbytes for ref in node.weights.values())


def _without(node: Node, resident: Resident) -> Spec:
    """The spec of the experts that are left."""
    assert isinstance(node.spec, ExpertsSpec)
    return replace(node.spec, experts=node.spec.experts - len(resident.experts))


def _share(spec: Spec, node: Node) -> float:
    """The part of the node's experts that `spec` holds; 1 for everything else."""
    if isinstance(spec, ExpertsSpec) and isinstance(node.spec, ExpertsSpec):
        return spec.experts / node.spec.experts
    return 1.0


def _common_page_size(choices: Mapping[str, Choice]) -> int:
    owners: dict[tuple[str, tuple[int, ...]], Choice] = {}
    for choice in choices.values():
        sizes = choice.implementation.page_sizes(choice.node.spec)
        if sizes:
            owners.setdefault((choice.implementation.id, sizes), choice)
    if not owners:
        return DEFAULT_PAGE_SIZE
    common = list(next(iter(owners))[1])
    for _, sizes in owners:
        common = [size for size in common if size in sizes]
    if not common:
        each = "; ".join(f"{c.node.name} ({name}): {', '.join(map(str, s))}" for (name, s), c in owners.items())
        raise PlanError(f"the KV caches share no page size: {each}", "choose attention implementations that agree")
    return common[0]


def _check_fits(plan: Plan, context: int) -> None:
    for device, need in plan.memory(context).items():
        if need.excess:
            assert need.limit is not None
            raise PlanError(
                f"the plan needs {human_bytes(need.total)} on {device} with a context of {context} tokens (weights "
                f"{human_bytes(need.weights)}, KV cache {human_bytes(need.kv)}, workspace "
                f"{human_bytes(need.workspace)}): {human_bytes(need.excess)} more than the {human_bytes(need.limit)} "
                "that may be used",
                fit_hint(need, context),
            )
