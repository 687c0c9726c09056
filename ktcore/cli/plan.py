"""`ktcore plan`: what would run where, and why, from headers alone."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli import options as o
from ktcore.errors import PlanError

if TYPE_CHECKING:
    from ktcore.rules.plan import Plan


def plan(
    model: o.ModelArgument,
    backend: o.BackendOption = "auto",
    rules: o.RulesOption = None,
    memory: o.MemoryOption = None,
    context: o.ContextOption = None,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="NODE", help="One node: its rule, and why each alternative was rejected."),
    ] = None,
    as_json: o.JsonOption = False,
    debug: o.DebugOption = False,
) -> None:
    """Show what would run where, and why. Reads headers only; the backend's device need not be here.

    \b
      ktcore plan model.gguf --backend cpu
      ktcore plan model.gguf --backend cpu --explain layers.0.attn
      ktcore plan deepseek.gguf --backend NAME --memory 24GiB --context 32768
    """
    from ktcore.cli.terminal import write, write_json
    from ktcore.rules.prepare import prepare

    prepared = prepare(model, backend=backend, rules=rules, memory=memory, context=context)
    prepared.checkpoint.close()
    made = prepared.plan
    if explain is not None:
        _check_node(made, explain)
    if as_json:
        whole = {**made.to_dict(), "backend_reason": prepared.backend_reason}
        write_json(whole if explain is None else _explained(made, whole, explain))
    elif explain is not None:
        write(made.explain(explain) + "\n")
    else:
        _show(made, prepared.backend_reason, context)


def _check_node(made: Plan, name: str) -> None:
    names = [node.name for node in made.graph.walk()]
    if name not in names:
        near = get_close_matches(name, names, 5, 0.4) or names[:5]
        raise PlanError(f"the model has no node '{name}'", f"near ones: {', '.join(near)}")


def _explained(made: Plan, whole: dict[str, Any], name: str) -> dict[str, Any]:
    """The node's entry; for a part of a fused node, that of the whole."""
    owner = next(key for key, choice in made.choices.items() if name == key or name in choice.covered)
    return {"node": owner, **whole["nodes"][owner]}


def _show(made: Plan, reason: str, context: int | None) -> None:
    from rich.markup import escape

    from ktcore.cli.terminal import console

    graph = made.graph
    out = console()
    out.print(
        f"{graph.architecture}: {len(graph.layers)} layers, hidden {graph.hidden}, vocabulary {graph.vocab}, "
        f"context {graph.context_length}",
        markup=False,
    )
    out.print(f"Backend [bold]{made.backend}[/]: {escape(reason)}")
    out.print(_nodes_table(made))
    out.print(_memory_table(made, context or made.default_context()))
    if made.fallbacks:
        out.print(f"[yellow]fallback[/] marks {len(made.fallbacks)} nodes whose rule's first choice cannot run them.")
    for text in made.notes:
        out.print(f"note: {text}", style="dim", markup=False)
    out.print("`--explain NODE` tells more about one of them.", style="dim", markup=False)


def _nodes_table(made: Plan) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from ktcore.placement.memory import human_bytes

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("node", "op", "layers"):
        table.add_column(heading, overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("implementation", overflow="fold")
    table.add_column("device")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in made.summary():
        table.add_row(
            escape(row.nodes),
            row.op,
            row.layers,
            str(row.count),
            f"[yellow]{row.implementation} fallback[/]" if row.fallback else row.implementation,
            row.device,
            human_bytes(row.packed_bytes),
            escape(row.why),
        )
    return table


def _memory_table(made: Plan, context: int) -> Any:
    from rich.table import Table

    from ktcore.placement.memory import human_bytes

    table = Table(box=None, header_style="bold", pad_edge=False, title=None)
    for heading in ("device", "weights", f"KV, {context} tokens", "workspace", "total", "may use", "fits"):
        table.add_column(heading, justify="left" if heading in ("device", "fits") else "right", no_wrap=True)
    for device, need in made.memory(context).items():
        per_token = sum(c.kv_bytes_per_token for c in made.choices.values() if c.device == device)
        fits = "limit unknown: give --memory" if need.limit is None else "yes" if not need.excess else "no"
        if need.limit is not None and per_token:
            room = max(0, need.limit - need.weights - need.workspace) // per_token
            fits += f", up to {room // made.page_size * made.page_size} tokens of context"
        table.add_row(
            device,
            *(human_bytes(n) for n in (need.weights, need.kv, need.workspace, need.total)),
            "?" if need.limit is None else human_bytes(need.limit),
            fits,
        )
    return table
