"""`ktcore plan`: what would run where, and why, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli import groups as g
from ktcore.cli import options as o
from ktcore.errors import PlanError

if TYPE_CHECKING:
    from ktcore.placement.memory import DeviceMemory
    from ktcore.rules.plan import Plan
    from ktcore.rules.prepare import Prepared
    from ktcore.weights.checkpoint import Checkpoint


@g.grouped
def plan(
    *,
    model: o.ModelArgument,
    source: g.Source,
    memory: o.MemoryOption = None,
    context: o.ContextOption = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FORMAT",
            show_default="what config.json says",
            help="With a bare config.json: the format that the weights are taken to have, like Q4_K.",
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="NODE", help="One node: its rule, and why each alternative was rejected."),
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Show what would run where, and why.

    Reads headers only, and the backend's device need not be here. Rules choose; `--explain` says how they did. A bare
    config.json will do in place of a model: what would it take to run one that is not downloaded?

    \b
      ktcore plan model.gguf --backend cpu
      ktcore plan model.gguf --backend cpu --explain layers.0.attn
      ktcore plan deepseek.gguf --backend NAME --memory 24GiB --context 32768
      ktcore plan config.json --weights Q4_K --backend cpu
    """
    from ktcore.cli.terminal import write, write_json
    from ktcore.rules.prepare import prepare

    prepared = prepare(
        model,
        **vars(source),
        memory=memory,
        context=context,
        opener=partial(_open, weights=weights),
    )
    prepared.checkpoint.close()
    made = prepared.plan
    if as_json:
        whole = _whole(prepared, context)
        write_json(whole if explain is None else _explained(made, whole, explain))
    elif explain is not None:
        write(made.explain(explain) + "\n")
    else:
        _show(prepared, context, asked=source.backend != "auto")


def _open(path: Path, weights: str | None) -> Checkpoint:
    """A model, or a config.json alone."""
    from ktcore.weights.bare import open_config
    from ktcore.weights.open import open_checkpoint

    if path.suffix == ".json" and not path.is_dir():
        return open_config(path, weights)
    if weights is not None:
        raise PlanError(f"--weights {weights}: {path} has weights of its own", "give its config.json to plan others")
    return open_checkpoint(path)


def _whole(prepared: Prepared, context: int | None) -> dict[str, Any]:
    whole = {**prepared.plan.to_dict(), "backend_reason": prepared.backend_reason}
    if context is not None:
        needs = prepared.plan.memory(context)
        whole["context"] = context
        whole["memory"] = {device: {**vars(need), "total": need.total} for device, need in needs.items()}
    return whole


def _explained(made: Plan, whole: dict[str, Any], name: str) -> dict[str, Any]:
    """The node's entry; for a part of a fused node, that of the whole."""
    made.explain(name)  # names near ones where there is no such node
    owner = next(key for key, choice in made.choices.items() if name == key or name in choice.covered)
    return {"node": owner, **whole["nodes"][owner]}


def _show(prepared: Prepared, context: int | None, asked: bool) -> None:
    from rich.markup import escape

    from ktcore.cli.terminal import console
    from ktcore.placement.memory import human_count

    made = prepared.plan
    graph = made.graph
    out = console()
    out.print(
        f"{graph.architecture}: {len(graph.layers)} layers, hidden {graph.hidden}, vocabulary {graph.vocab}, "
        f"context {graph.context_length}, {human_count(graph.parameters)} parameters",
        markup=False,
    )
    out.print(
        f"Planned for [bold]{escape(made.backend)}[/]." + ("" if asked else f" {escape(prepared.backend_reason)}")
    )
    out.print()
    out.print(_nodes_table(made))
    out.print()
    out.print(_memory_table(prepared, context or made.default_context()))
    out.print()
    if made.fallbacks:
        out.print(
            f"[yellow]fallback[/] marks {len(made.fallbacks)} nodes that their rule's first choice cannot run; "
            "the reason stands beside them."
        )
    notes = [*_bare(prepared), *_left_out(prepared), *_absences(prepared), *_packings(made), *made.notes]
    for text in notes:
        out.print(f"note: {text}", style="dim", markup=False)
    out.print("`--explain NODE` tells more about one node.", style="dim", markup=False)


def _bare(prepared: Prepared) -> Iterator[str]:
    """What was assumed where there are no weights."""
    from ktcore.weights.bare import BareCheckpoint

    checkpoint = prepared.checkpoint
    if not isinstance(checkpoint, BareCheckpoint):
        return
    formats = sorted({info.format for info in checkpoint.tensors.values() if len(info.shape) > 1})
    yield f"{checkpoint.path} alone was read: weights are taken to be {', '.join(formats)}"
    if checkpoint.unplanned:
        yield f"the released weights are quantised with '{checkpoint.unplanned}'; say with --weights what to plan for"


def _left_out(prepared: Prepared) -> Iterator[str]:
    """The parts of the checkpoint that are not run."""
    from ktcore.graph.complete import left_out

    for part, tensors in left_out(prepared.checkpoint, prepared.plan.graph).items():
        yield f"left out: {part}, {tensors} tensors"


def _packings(made: Plan) -> Iterator[str]:
    """What weights take by packing, where that makes a difference."""
    from ktcore.placement.memory import human_bytes

    if sizes := made.packings():
        listed = ", ".join(f"{human_bytes(size)} {name}" for name, size in sizes.items())
        yield f"weights can be packed in several ways (--packing): {listed}"


def _absences(prepared: Prepared) -> Iterator[str]:
    """A sentence for each backend of the plan that could not run here."""
    from ktcore.backend.record import BackendState
    from ktcore.backend.registry import split_device

    for name in dict.fromkeys(split_device(device)[0] for device in prepared.plan.devices):
        record = prepared.registry.known(name)
        if record.state is not BackendState.LOADED and record.spec is not None:
            yield (
                f"{name} is {record.state.value} here ({record.reason}); the plan is for its declared device class, "
                f"{record.spec.declared[0].name}"
            )


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


def _memory_table(prepared: Prepared, context: int) -> Any:
    from rich.table import Table

    from ktcore.placement.memory import human_bytes

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("device", "weights", f"KV, {context} tokens", "workspace", "total", "fits"):
        table.add_column(heading, justify="left" if heading in ("device", "fits") else "right", no_wrap=True)
    for device, need in prepared.plan.memory(context).items():
        figures = (human_bytes(n) for n in (need.weights, need.kv, need.workspace, need.total))
        table.add_row(device, *figures, _fits(prepared, device, need))
    return table


def _fits(prepared: Prepared, device: str, need: DeviceMemory) -> str:
    """Whether the device's part fits, and into what."""
    from ktcore.backend.registry import split_device
    from ktcore.placement.memory import human_bytes
    from ktcore.placement.topology import read_topology

    made = prepared.plan
    limit, what = need.limit, ""
    if limit is None:
        if prepared.registry.known(split_device(device)[0]).accelerator:
            return "unknown: say with --memory what it has"
        limit, what = read_topology().usable_memory, " of this machine"
    if need.total > limit:
        return f"no: {human_bytes(limit)}{what} is too little"
    verdict = f"yes, into {human_bytes(limit)}{what}"
    largest = made.largest_context(device, limit - need.weights - need.workspace)
    return f"{verdict}; up to {largest} tokens of context" if largest else verdict
