"""`ktcore plan`: what would run where, and why, from the model's header alone."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import typer

from ktcore.cli import console, options
from ktcore.errors import KtcoreError

if TYPE_CHECKING:
    from rich.table import Table

    from ktcore.rules.plan import Plan


def plan(
    model: options.Model,
    backend: options.Backend = "auto",
    memory: options.Memory = None,
    context: options.Context = None,
    rules: options.Rules = None,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="NODE", help="Why this node runs as it does, such as layers.0.attn."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show which implementation runs each part of a model, on which device, and why.

    Reads headers only and needs no hardware: plan for a card that you have yet to buy.

    Example: `ktcore plan model.gguf --backend rocm --memory 24GiB`
    """
    from ktcore.rules.prepare import prepare

    prepared = prepare(model, backend=backend, rules=rules, memory=options.parse_size(memory), context=context)
    try:
        if explain is not None:
            typer.echo(_explain(prepared.plan, explain))
        elif as_json:
            console.print_json({**prepared.plan.to_dict(), "backend_reason": prepared.backend_reason})
        else:
            _print(prepared.plan, prepared.backend_reason, context)
    finally:
        prepared.checkpoint.close()


def _explain(plan: Plan, name: str) -> str:
    try:
        return plan.explain(name)
    except KeyError:
        known = [node.name for node in plan.graph.walk()]
        near = get_close_matches(name, known, 3) or known[:5]
        raise KtcoreError(f"the model has no node '{name}'", f"near ones: {', '.join(near)}") from None


def _print(plan: Plan, reason: str, context: int | None) -> None:
    out = console.out_console()
    out.print(f"{plan.graph.architecture}, {len(plan.graph.layers)} layers, planned for {plan.backend}. {reason}")
    out.print(_nodes(plan))
    out.print(_memory(plan, context))
    for note in plan.notes:
        out.print(f"note: {note}", style="dim", markup=False)


def _nodes(plan: Plan) -> Table:
    from rich.table import Table

    from ktcore.placement.memory import human_bytes

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("nodes", "kind", "count", "implementation", "device", "bytes", "why"):
        right = title in ("count", "bytes")
        table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=title != "why")
    for row in plan.summary():
        table.add_row(
            row.nodes,
            row.op,
            str(row.count),
            row.implementation,
            row.device,
            human_bytes(row.packed_bytes),
            row.why,
            style="yellow" if row.fallback else None,
        )
    return table


def _memory(plan: Plan, context: int | None) -> Table:
    from rich.table import Table

    from ktcore.placement.memory import human_bytes

    tokens = context or plan.default_context()
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"memory with a context of {tokens} tokens")
    for title in ("device", "weights", "KV cache", "workspace", "total", "limit"):
        table.add_column(title, justify="left" if title == "device" else "right")
    for device, need in plan.memory(tokens).items():
        limit = "unknown" if need.limit is None else human_bytes(need.limit)
        figures = [human_bytes(n) for n in (need.weights, need.kv, need.workspace, need.total)]
        table.add_row(device, *figures, limit)
    return table
