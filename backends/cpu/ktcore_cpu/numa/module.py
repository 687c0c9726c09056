"""Experts packed onto several nodes, each part by the threads that will read it, and the module that runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ktcore.backend import LoadRequest
from ktcore.errors import BackendError, CheckpointError, RuleError
from ktcore.ops.moe import ExpertsSpec
from ktcore_cpu import packing
from ktcore_cpu.numa.plan import NumaPlan, plan_experts
from ktcore_cpu.packings import packed_format

if TYPE_CHECKING:
    from ktcore_cpu import _native

CHECKED_PAGES = 4096
"""Pages of each bank that are looked at after packing."""


def numa_plan(request: LoadRequest, spec: ExpertsSpec) -> tuple[NumaPlan, _native.NodeTeam | None]:
    """The plan that the rule's option `numa` asks for on this runtime's machine, and the team that runs it.

    Raises:
        RuleError: the option is unknown, or what it asks for cannot be done here.
    """
    nodes = getattr(request.runtime, "numa", None)
    policy = policy_of(request.options.get("numa", "auto"))
    places, taken = (nodes.places, nodes.taken) if nodes is not None else ((), {})
    try:
        plan = plan_experts(places, spec, packing.native_formats(), policy, taken=taken)
    except RuleError as error:
        raise RuleError(f"{request.name}: {error.message}", error.hint) from error
    return plan, nodes.team(plan) if nodes is not None and plan.shares else None


def policy_of(option: Any) -> str:
    """YAML reads a bare `off` as false."""
    return "off" if option is False else str(option)


def spread_block(
    request: LoadRequest, spec: ExpertsSpec, plan: NumaPlan, team: _native.NodeTeam
) -> _native.ShardedExpertsBlock:
    """Pack all experts as `plan` says and check that their pages lie where it says.

    Raises:
        CheckpointError: they cannot be packed.
        BackendError: memory cannot be bound to a node, or lies elsewhere.
    """
    from ktcore_cpu import _native

    try:
        banks = pack_shares(request, spec, plan, team)
        for share, bank in zip(plan.shares, banks, strict=True):
            check_pages(request.name, share.place.memory, _native.bank_pages(bank, CHECKED_PAGES))
        return _native.ShardedExpertsBlock(
            team,
            banks,
            [share.experts[0] for share in plan.shares],
            spec.experts,
            slots=[share.slots for share in plan.shares if share.slots],
            activation=spec.activation,
            weight_on_input=spec.weight_on_input,
            exact=packing.exact(request),
        )
    except RuntimeError as error:
        raise BackendError(
            f"{request.name}: {error}", "numa: off in a rule leaves the placement to the system"
        ) from error


def pack_shares(
    request: LoadRequest, spec: ExpertsSpec, plan: NumaPlan, team: _native.NodeTeam
) -> list[_native.ExpertBank]:
    """One bank a share, all nodes at once.

    Raises:
        CheckpointError: they cannot be packed.
    """
    from ktcore_cpu import _native

    weights = [request.weights[role] for role in ("gate", "up", "down")]
    stored = weights[2].format
    formats = [packed_format(request, w.format) for w in weights]
    try:
        request.runtime.switch.use(*formats)  # type: ignore[attr-defined]
        for format in formats:
            team.set_few(format, request.runtime.pool.few[format])  # type: ignore[attr-defined]
            team.set_ahead(format, request.runtime.pool.ahead[format])  # type: ignore[attr-defined]
        banks = []
        for node, share in enumerate(plan.shares):
            columns = share.columns[1] - share.columns[0]
            bank = _native.ExpertBank(share.experts[1] - share.experts[0], spec.hidden, columns, *formats)
            team.bind(node, bank)
            banks.append(bank)
        block = packing.native_formats()[stored]
        for expert in range(spec.experts):
            with packing.raw_expert(weights, expert) as raws:
                team.pack(
                    [
                        (bank, expert - share.experts[0], *slice_expert(raws, share.columns, block))
                        if share.experts[0] <= expert < share.experts[1]
                        else None
                        for share, bank in zip(plan.shares, banks, strict=True)
                    ]
                )
    except ValueError as error:
        raise CheckpointError(f"{request.name}: cannot pack the experts: {error}") from error
    return banks


def slice_expert(
    raws: Sequence[np.ndarray], columns: tuple[int, int], block: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows `columns` of gate and up, and the same columns of down.

    Args:
        raws: uint8 [rows, row bytes] of gate, up and down.
        block: values and bytes of a block of down, of which `columns` must hold whole ones.
    """
    gate, up, down = raws
    first, last = columns
    values, size = block
    if first % values or (last % values and last * size != down.shape[-1] * values):
        raise ValueError(f"columns {first} to {last} of down are no whole blocks of {values}")
    part = np.ascontiguousarray(down[:, first // values * size : last // values * size])
    return gate[first:last], up[first:last], part


def check_pages(name: str, node: int, pages: Mapping[int, int]) -> None:
    """Complain when pages of a bank that is bound to `node` lie elsewhere; -1 counts pages that nothing has touched.

    Raises:
        BackendError: some do.
    """
    stray = {where: count for where, count in pages.items() if where not in (node, -1)}
    if stray:
        where = ", ".join(f"{count} on node {other}" for other, count in sorted(stray.items()))
        raise BackendError(
            f"{name}: of {sum(pages.values())} pages bound to NUMA node {node}, {where}",
            "the control group's memory nodes may have changed while loading; numa: off in a rule does not bind",
        )
