"""`ktcore bench`: how fast a model runs here, and how close decode comes to what the memory can give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli import groups as g
from ktcore.cli import options as o

if TYPE_CHECKING:
    from ktcore.backend.runtime import DeviceRuntime


@g.grouped
def bench(
    *,
    model: o.ModelArgument,
    prompt: Annotated[
        int, typer.Option("--prompt", "-p", metavar="N", min=1, help="Tokens of the prompt (prefill).")
    ] = 512,
    new: Annotated[
        int, typer.Option("--new", "-n", metavar="N", min=1, help="Tokens to draw one by one (decode).")
    ] = 128,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Timed repetitions; medians are reported.")
    ] = 3,
    compare_quality: Annotated[
        bool,
        typer.Option(
            "--quality", help="Instead of speed, measure what --rules costs: KL divergence from the full model."
        ),
    ] = False,
    text: Annotated[
        Path | None, typer.Option("--text", help="With --quality: the text to predict.  [default: random token ids]")
    ] = None,
    as_json: o.JsonOption = False,
    loading: g.Loading,
) -> None:
    """Measure prefill and decode, load time and peak memory.

    Decode reads every active weight once a token, so the memory's streaming bandwidth, measured in the same run, bounds
    it; the share of that bandwidth says how much is left to win. Token ids are random, and no tokenizer is needed.

    \b
      ktcore bench model.gguf -p 512 -n 128
      ktcore bench model.gguf --threads 8 --json
      ktcore bench model.gguf --quality --rules fewer-experts.yaml --text book.txt
    """
    import statistics

    from ktcore.cli import measure
    from ktcore.cli.terminal import opened, write_json

    if compare_quality:
        from ktcore.cli import quality

        found = quality.quality(model, text, loading.given())
        write_json(found) if as_json else quality.show(found)
        return
    options = {**loading.given(), "context": loading.context or prompt + new + 1}
    with opened(model, **options) as (loaded, load_s):
        host = measure.host_runtime(loaded)
        timer = measure.Timer(loaded, prompt, new)
        timed, reads, peak = [], [], 0
        for _ in range(rounds):
            timed.append(timer.round())
            # before the bandwidth is measured, which takes memory of its own
            peak = peak or measure.peak_memory()
            # after every round, so that a machine whose speed drifts changes both alike
            reads += [host[1].read_bandwidth()] if host and isinstance(host[1], measure.ReadsMemory) else []
        middle = measure.median(timed)
        read = statistics.median(reads) if reads else None
        step_bytes = measure.decode_read_bytes(loaded.plan, {host[0]} if host else set())
        result = {
            "prefill_tok_s": middle.prefill_tok_s,
            "decode_tok_s": middle.decode_tok_s,
            "load_s": load_s,
            "peak_rss_bytes": peak,
            "read_gb_s": read / 1e9 if read else None,
            "decode_read_share": step_bytes * middle.decode_tok_s / read if read else None,
            "decode_read_bytes": step_bytes,
            "guesses": measure.acceptance(loaded),
            "rounds": [vars(r) for r in timed],
            "prompt_tokens": prompt,
            "new_tokens": new,
            "quantization_error": loaded.quantization_error,
            "model": str(model),
            "backend": loaded.plan.backend,
            "devices": list(loaded.plan.devices),
            "decode_graphs": loaded.engine.graphs is not None,
            "no_decode_graphs": "" if loaded.engine.graphs else loaded.engine.model.no_graphs or "not asked for",
            **_host_facts(host[1] if host else None),
        }
    if as_json:
        write_json(result)
    else:
        _show(result)


def _host_facts(runtime: DeviceRuntime | None) -> dict[str, Any]:
    if runtime is None:
        return {"threads": None, "isa": None}
    caps = runtime.capabilities()
    isa = next((f.removeprefix("isa:") for f in sorted(caps.features) if f.startswith("isa:")), None)
    return {"threads": caps.properties.get("threads"), "isa": isa}


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    from ktcore.cli.terminal import console
    from ktcore.placement.memory import human_bytes

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    spread = {
        key: f"{min(r[key] for r in result['rounds']):.1f} to {max(r[key] for r in result['rounds']):.1f}"
        for key in ("prefill_tok_s", "decode_tok_s")
    }
    table.add_row(
        "prefill",
        f"{result['prefill_tok_s']:.1f}",
        f"tok/s over {result['prompt_tokens']} tokens ({spread['prefill_tok_s']})",
    )
    table.add_row(
        "decode",
        f"{result['decode_tok_s']:.1f}",
        f"tok/s over {result['new_tokens']} tokens ({spread['decode_tok_s']})",
    )
    if result["guesses"] is not None:
        found = result["guesses"]
        table.add_row("guesses right", f"{found['share']:.0%}", f"of {found['tokens']} that {found['by']} made")
    table.add_row("load", f"{result['load_s']:.2f}", "s")
    table.add_row("peak memory", human_bytes(result["peak_rss_bytes"]), "")
    if result["read_gb_s"] is not None:
        table.add_row("memory reads", f"{result['read_gb_s']:.1f}", "GB/s streaming, measured now")
        table.add_row(
            "decode's share",
            f"{result['decode_read_share']:.0%}",
            f"of that, reading {human_bytes(result['decode_read_bytes'])} of weights a token",
        )
    out = console()
    out.print(table)
    if len(result["devices"]) > 1 or result["decode_graphs"]:
        why = "captured as a graph" if result["decode_graphs"] else f"not captured: {result['no_decode_graphs']}"
        out.print(f"decode steps {why}", style="dim", markup=False)
    out.print(
        f"{result['threads']} threads, {result['isa']}, median of {len(result['rounds'])}", style="dim", markup=False
    )
