"""Which node holds and runs which part of a layer's experts: a pure function of places, shapes and a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from ktcore.errors import RuleError
from ktcore.ops.moe import ExpertsSpec
from ktcore_cpu.numa.nodes import Place, apportion
from ktcore_cpu.numa.speed import kept_by_chance, kept_by_shares

WAYS = ("shard", "expert_parallel", "replicate")
POLICIES = ("auto", "off", *WAYS)
PANEL_ROWS = 32
MARGIN = 0.05
"""A later way must keep so much more of the speed than an earlier one to be taken in its place."""
USABLE_MEMORY = 0.9
"""Part of a node's memory that experts may take; bound memory that a node lacks ends the process."""


@dataclass(frozen=True)
class Share:
    """A node's part of a layer.

    Attributes:
        place: where.
        columns: range of the intermediate dimension.
        experts: range of the experts.
        slots: its weight when each token's choices are shared out; 0 where they are not.
        nbytes: packed bytes.
    """

    place: Place
    columns: tuple[int, int]
    experts: tuple[int, int]
    slots: int
    nbytes: int


@dataclass(frozen=True)
class NumaPlan:
    """Attributes:
    way: one of `WAYS`, or "off": one pool for the whole machine.
    shares: one a node, in the order in which sums are taken; empty when off.
    why: the reason, for readers.
    rejected: way -> why it was not taken.
    """

    way: str
    shares: tuple[Share, ...]
    why: str
    rejected: Mapping[str, str]

    def describe(self) -> str:
        """One line."""
        nodes = ", ".join(str(share.place.memory) for share in self.shares)
        return f"{self.way}{f' over nodes {nodes}' if nodes else ''}: {self.why}"


def plan_experts(
    places: Sequence[Place],
    spec: ExpertsSpec,
    formats: Mapping[str, tuple[int, int]],
    policy: str = "auto",
    *,
    taken: Mapping[int, int] | None = None,
    total_bytes: int | None = None,
) -> NumaPlan:
    """Spread one layer's experts over nodes.

    Args:
        places: as `usable_places` gives them; one or none leaves all as it is on any machine.
        formats: name -> (values a block, bytes a block).
        policy: one of `POLICIES`.
        taken: bytes that other layers have taken already, by physical node id.
        total_bytes: packed bytes of all layers' experts once; None when unknown: then nothing is replicated unasked.

    Raises:
        RuleError: the policy is unknown, or the way that it asks for cannot be gone here.
    """
    if policy not in POLICIES:
        raise RuleError(f"option numa={policy!r} is unknown", f"known: {', '.join(POLICIES)}")
    if policy == "off" or len(places) < 2:
        why = "the rule says so" if policy == "off" else "there is one node with both memory and cores to use"
        return NumaPlan("off", (), why, {})
    if spec.bias or spec.clamped:  # a bias belongs to the sum, not to each node's part of it
        if policy != "auto":
            raise RuleError(f"option numa={policy}: experts with biases or clamps run on one pool", "use numa: auto")
        return NumaPlan("off", (), "experts with biases or clamps run on one pool", {})
    layer = _Layer(places, spec, formats, taken or {}, total_bytes)
    if policy != "auto":
        shares = layer.shares(policy)
        reason = layer.misfit(policy, shares)
        if reason:
            raise RuleError(f"option numa={policy}: {reason}", "choose another way, or numa: auto")
        return NumaPlan(policy, shares, f"the rule says so; {layer.words(policy, shares)}", {})
    return _best(layer)


def _best(layer: _Layer) -> NumaPlan:
    rejected: dict[str, str] = {}
    best: tuple[float, str, tuple[Share, ...]] | None = None
    for way in WAYS:
        shares = layer.shares(way)
        reason = layer.misfit(way, shares)
        if way == "replicate" and layer.total_bytes is None:
            reason = reason or "it is not known whether the other layers fit too; a rule can ask for it"
        if reason:
            rejected[way] = reason
            continue
        kept = layer.kept(way, shares)
        if best is None or kept > best[0] + MARGIN:
            if best is not None:
                rejected[best[1]] = layer.words(best[1], best[2])
            best = (kept, way, shares)
        else:
            rejected[way] = layer.words(way, shares)
    if best is None:
        return NumaPlan("off", (), "no way fits the nodes' memory: " + "; ".join(rejected.values()), rejected)
    others = "; ".join(f"{way}: {reason}" for way, reason in rejected.items())
    return NumaPlan(best[1], best[2], f"{layer.words(best[1], best[2])} ({others})", rejected)


@dataclass(frozen=True)
class _Layer:
    places: Sequence[Place]
    spec: ExpertsSpec
    formats: Mapping[str, tuple[int, int]]
    taken: Mapping[int, int]
    total_bytes: int | None

    def shares(self, way: str) -> tuple[Share, ...]:
        """Nodes that get nothing are left out."""
        threads = [place.threads for place in self.places]
        width, experts = self.spec.intermediate, self.spec.experts
        if way == "shard":
            unit = self.unit
            cuts = zip(self.places, _ranges(apportion(-(-width // unit), threads), unit, width), strict=True)
            return tuple(self._share(place, cut, (0, experts), 0) for place, cut in cuts if cut[0] < cut[1])
        if way == "expert_parallel":
            cuts = zip(self.places, _ranges(apportion(experts, threads), 1, experts), strict=True)
            return tuple(self._share(place, (0, width), cut, 0) for place, cut in cuts if cut[0] < cut[1])
        return tuple(self._share(p, (0, width), (0, experts), p.threads) for p in self.places)

    @property
    def unit(self) -> int:
        """Columns that cannot be parted: a panel's rows of gate and up, a block of down."""
        return lcm(PANEL_ROWS, self.formats[self.spec.down_format][0])

    def kept(self, way: str, shares: Sequence[Share]) -> float:
        """Part of all nodes' speed when one token is decoded."""
        every = sum(place.threads for place in self.places)
        threads = [share.place.threads for share in shares]
        if way == "shard":
            return kept_by_shares([s.columns[1] - s.columns[0] for s in shares], threads, every)
        if way == "expert_parallel":
            held = [s.experts[1] - s.experts[0] for s in shares]
            return kept_by_chance(held, self.spec.top_k, threads, every)
        return kept_by_shares(slot_counts(self.spec.top_k, threads), threads, every)

    def misfit(self, way: str, shares: Sequence[Share]) -> str:
        """Why the way cannot be gone; empty when it can."""
        if len(shares) < 2:
            what = f"{self.spec.intermediate} columns" if way == "shard" else f"{self.spec.experts} experts"
            return f"{what} in whole pieces of {self.unit if way == 'shard' else 1} give work to one node only"
        layer = self._bytes(self.spec.intermediate, self.spec.experts)
        layers = 1.0 if self.total_bytes is None else max(1.0, self.total_bytes / layer)
        for share in shares:
            node = share.place.memory
            # virtual nodes share a physical one
            here = sum(s.nbytes for s in shares if s.place.memory == node) * layers + self.taken.get(node, 0)
            if here > USABLE_MEMORY * share.place.memory_bytes:
                return (
                    f"node {node} would hold {here / 2**30:.1f} GiB of experts, "
                    f"{USABLE_MEMORY:.0%} of its memory are {USABLE_MEMORY * share.place.memory_bytes / 2**30:.1f} GiB"
                )
        return ""

    def words(self, way: str, shares: Sequence[Share]) -> str:
        """The parts, and what is kept of the speed."""
        if way == "shard":
            parts = " + ".join(str(s.columns[1] - s.columns[0]) for s in shares) + " columns"
        elif way == "expert_parallel":
            parts = " + ".join(str(s.experts[1] - s.experts[0]) for s in shares) + " experts"
        else:
            counts = slot_counts(self.spec.top_k, [s.place.threads for s in shares])
            parts = " + ".join(map(str, counts)) + " of a token's choices"
        return f"{parts} keep {self.kept(way, shares):.0%} of the nodes' decode speed"

    def _share(self, place: Place, columns: tuple[int, int], experts: tuple[int, int], slots: int) -> Share:
        nbytes = self._bytes(columns[1] - columns[0], experts[1] - experts[0])
        return Share(place, columns, experts, slots, nbytes)

    def _bytes(self, columns: int, experts: int) -> int:
        """Packed: rows padded to whole panels."""
        spec, hidden = self.spec, self.spec.hidden
        sides = self._matrix(spec.gate_format, columns, hidden) + self._matrix(spec.up_format, columns, hidden)
        return experts * (sides + self._matrix(spec.down_format, hidden, columns))

    def _matrix(self, name: str, rows: int, cols: int) -> int:
        block, size = self.formats[name]
        return -(-rows // PANEL_ROWS) * PANEL_ROWS * -(-cols // block) * size


def slot_counts(top_k: int, weights: Sequence[int]) -> list[int]:
    """How many of a token's choices each node takes, by weight, rounded as the native block rounds."""
    whole, counts, before = sum(weights), [], 0
    for weight in weights:
        start = (2 * top_k * before + whole) // (2 * whole)
        before += weight
        counts.append((2 * top_k * before + whole) // (2 * whole) - start)
    return counts


def _ranges(counts: Sequence[int], unit: int, end: int) -> list[tuple[int, int]]:
    """Ranges of `counts` units one after another; the last unit may be cut short by `end`."""
    ranges, at = [], 0
    for count in counts:
        ranges.append((min(end, at * unit), min(end, (at + count) * unit)))
        at += count
    return ranges
