"""`ktcore bench`: speed of a model on this machine, beside what its memory can do in the same run."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktcore.cli import console, options

if TYPE_CHECKING:
    from ktcore.engine.model import Model
    from ktcore.graph.node import Node


@dataclass(frozen=True)
class Round:
    """One round's speeds, tokens a second."""

    prefill: float
    decode: float


def bench(
    model: options.Model,
    prompt: Annotated[int, typer.Option("--prompt", "-p", min=1, help="Prompt tokens.")] = 512,
    new: Annotated[int, typer.Option("--new", "-n", min=2, help="Tokens to decode.")] = 128,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Counted rounds, after one that is not.")] = 3,
    backend: options.Backend = "auto",
    rules: options.Rules = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Time prefill and decode, and put decode beside the machine's streaming-read speed.

    Prompts are random token ids from a fixed seed, so a model without a tokenizer can be timed. Medians are shown.

    Example: `ktcore bench model.gguf -p 512 -n 128 --json`
    """
    begin = time.perf_counter()
    with console.loaded(model, backend=backend, rules=rules, threads=threads, context=prompt + new + 1) as loaded:
        load_s = time.perf_counter() - begin
        one_round(loaded, prompt, new)
        # before the bandwidth measurement, whose buffer is not the model's
        peak = _peak_rss()
        results, reads = [], []
        for _ in range(rounds):
            results.append(one_round(loaded, prompt, new))
            reads.append(read_speed(loaded))
        report = {**_report(loaded, load_s, results, reads), "peak_rss_bytes": peak}
        report |= {"model": str(model), "prompt_tokens": prompt, "new_tokens": new, "rounds": rounds}
    if as_json:
        console.print_json(report)
    else:
        _print(report)


def one_round(model: Model, prompt: int, new: int) -> Round:
    """Prefill `prompt` tokens and decode `new` more, never ending early."""
    import torch

    from ktcore.engine.sequence import Sequence
    from ktcore.ops.sampling import SamplingParams

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.plan.graph.vocab, (prompt,), generator=generator).tolist()
    sequence = Sequence(ids, SamplingParams(temperature=0), max_new_tokens=new + 1)
    begin = time.perf_counter()
    model.engine.add(sequence)
    while not sequence.new_tokens:
        model.engine.step()
    middle = time.perf_counter()
    while model.engine.step():
        pass
    end = time.perf_counter()
    return Round(prompt / (middle - begin), (len(sequence.new_tokens) - 1) / (end - middle))


def read_speed(model: Model) -> float | None:
    """Bytes a second that the host's threads stream from memory now; None where no host runtime can tell."""
    for runtime in model.engine.model.devices.open_runtimes():
        measure = getattr(runtime, "read_bandwidth", None)
        if measure is not None:
            return float(measure())
    return None


def bytes_per_token(model: Model) -> int:
    """Packed weight bytes that one decode step reads: of routed experts only the chosen ones, of an embedding a row."""
    return sum(
        int(choice.packed_bytes * _share(choice.node))
        for choice in model.plan.choices.values()
        if choice.node.spec.op != "embedding"
    )


def _share(node: Node) -> float:
    from ktcore.ops.moe import ExpertsSpec

    return node.spec.top_k / node.spec.experts if isinstance(node.spec, ExpertsSpec) else 1.0


def _peak_rss() -> int:
    """Peak resident bytes of this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _report(model: Model, load_s: float, rounds: list[Round], reads: list[float | None]) -> dict[str, Any]:
    decode = statistics.median(r.decode for r in rounds)
    known = [r for r in reads if r is not None]
    read = statistics.median(known) if known else None
    needed = bytes_per_token(model)
    caps = model.engine.model.devices.open_runtimes()[0].capabilities()
    return {
        "prefill_tok_s": statistics.median(r.prefill for r in rounds),
        "decode_tok_s": decode,
        "load_s": load_s,
        "read_gb_s": read / 1e9 if read else None,
        "decode_read_share": decode * needed / read if read else None,
        "bytes_per_token": needed,
        "device": caps.name,
        "features": sorted(caps.features),
        "properties": dict(caps.properties),
    }


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("prefill", f"{report['prefill_tok_s']:.1f} tok/s ({report['prompt_tokens']} tokens)")
    table.add_row("decode", f"{report['decode_tok_s']:.1f} tok/s ({report['new_tokens']} tokens)")
    if report["read_gb_s"]:
        table.add_row(
            "memory",
            f"{report['read_gb_s']:.1f} GB/s streaming read; decode uses {report['decode_read_share']:.0%} of it "
            f"({report['bytes_per_token'] / 1e6:.1f} MB a token)",
        )
    table.add_row("load", f"{report['load_s']:.2f} s")
    table.add_row("peak memory", f"{report['peak_rss_bytes'] / 1e6:.0f} MB")
    table.add_row("device", f"{report['device']}: {', '.join(report['features'])}")
    console.out_console().print(table)
