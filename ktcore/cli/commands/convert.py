"""`ktcore convert`: pack, and where wished quantise, a model once, into a folder that loads by memory map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktcore.cli import groups as g
from ktcore.cli import options as o
from ktcore.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from ktcore.engine.load.convert import Converted


@g.grouped
def convert(
    *,
    model: o.ModelArgument,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", show_default=False, help="Where to write; must not exist yet."),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            metavar="FORMAT",
            help="Quantise float routed experts, to [bold]int4_g128[/], int4_g64, int4_g32, int8_g128 …",
        ),
    ] = None,
    source: g.Source,
    threads: o.ThreadsOption = None,
    keep_dense: Annotated[
        bool,
        typer.Option(
            "--keep-dense",
            help="Also keep all but the routed experts unpacked, so that any accelerator can load them.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read everything back and check it; without FOLDER, check MODEL and do no more."),
    ] = False,
    as_json: o.JsonOption = False,
) -> None:
    """Pack a model's weights once, into a folder that runs by itself and loads by memory map.

    An interrupted conversion goes on where it was when the command is repeated.

    \b
      ktcore convert Qwen3-30B-A3B/ qwen3-int4/ --experts int4_g128
      ktcore convert model.gguf packed/ --dry-run
      ktcore convert --verify packed/
    """
    if folder is None:
        if not verify:
            raise RequestError("give a folder to write to", "ktcore convert MODEL FOLDER")
        _verify(model)
        return
    from ktcore.cli.terminal import loading_bar, note, write_json
    from ktcore.engine.load.convert import PARTIAL
    from ktcore.engine.load.convert import convert as run

    try:
        with loading_bar(f"packing {model.name}") as progress:
            done = run(
                model,
                folder,
                experts=experts,
                **vars(source),
                threads=threads,
                keep_dense=keep_dense,
                dry_run=dry_run,
                progress=progress,
            )
    except KeyboardInterrupt:
        note(f"stopped: the same command goes on with what {folder}{PARTIAL} holds")
        raise
    if verify and not dry_run:
        _verify(folder, quiet=as_json)
    if as_json:
        write_json(
            {
                "folder": str(folder),
                "written": not dry_run,
                "source_bytes": done.source_bytes,
                "packed_bytes": done.packed_bytes,
                "kept_bytes": done.kept_bytes,
                "resumed_bytes": done.resumed_bytes,
                "quantization_error": dict(done.errors or {}),
            }
        )
        return
    _show(done, dry_run)


def _show(done: Converted, dry_run: bool) -> None:
    from ktcore.cli.terminal import console
    from ktcore.placement.memory import human_bytes
    from ktcore.rules.quantize import quantized_formats

    out = console()
    out.print(f"source     {human_bytes(done.source_bytes)}", markup=False)
    out.print(f"packed     {human_bytes(done.packed_bytes)}" + (", by the plan" if dry_run else ""), markup=False)
    if formats := sorted(set(quantized_formats(done.plan.graph).values())):
        out.print(f"quantised  to {', '.join(formats)}", markup=False)
    if dry_run:
        out.print("nothing written", markup=False)
        return
    out.print(f"kept       {human_bytes(done.kept_bytes)} of tensors as they were", markup=False)
    if done.resumed_bytes:
        out.print(f"resumed    {human_bytes(done.resumed_bytes)} were there, checked", markup=False)
    for op, error in (done.errors or {}).items():
        out.print(f"error      {op}: {error:.2%} relative", markup=False)
    out.print(f"written    {done.folder}", markup=False)


def _verify(folder: Path, quiet: bool = False) -> None:
    from ktcore.cli.terminal import console, loading_bar
    from ktcore.weights.packed.container import MANIFEST, read_manifest
    from ktcore.weights.packed.reader import verify

    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: not a folder that `ktcore convert` wrote")
    body = read_manifest(folder)
    with loading_bar(f"checking {folder.name}") as progress:
        damaged = verify(folder, body, (lambda done, total: progress("", done, total)) if progress else None)
    if damaged:
        raise CheckpointError(
            f"{folder}: damaged: {', '.join(damaged[:4])}" + (f" and {len(damaged) - 4} more" * (len(damaged) > 4)),
            "convert the model again",
        )
    if not quiet:
        console().print(f"{folder}: whole", markup=False)
