"""Times a layer of experts of any shape and format beside what this machine can read and multiply.

python -m ktcore_cpu.bench --hidden 2048 --intermediate 768 --experts 128 --top-k 8 --format Q4_K/Q6_K
python -m ktcore_cpu.bench --all     # every format on every instruction set: one token, and 512
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from ktcore_cpu import _native, bench_table
from ktcore_cpu.bench_parts import Limits, Shape, batch, parse_formats, random_layer, seconds
from ktcore_cpu.expert_layer import ExpertLayer, ExpertPool

COUNTS = "1,2,4,8,16,32,64,128,256,512,2048"
MOST_DROP = 0.1
"""Tokens a second may be so much lower than those of the next smaller batch, no more."""


@dataclass
class Row:
    """One token count, medians over the rounds.

    Attributes:
        read_share: weights read a second over the streaming read; experts that several tokens choose are read once.
        arithmetic_share: operations a second over what the formats' arithmetic reaches without memory.
        change: tokens a second over those of the next smaller count, less one.
        drop: it fell by more than a tenth.
    """

    tokens: int
    tokens_per_second: float
    spread: float
    gb_per_second: float
    tops: float
    read_share: float
    arithmetic_share: float
    change: float = 0.0
    drop: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = _parser().parse_args(argv)
    try:
        if args.all:
            return _table(args)
        if args.isa:
            raise ValueError("--isa goes with --all; KTCORE_ISA chooses the instruction set of one run")
        formats = parse_formats(args.format or "Q4_K/Q6_K")
        counts = [int(n) for n in args.tokens.split(",")]
        if min(counts) < 1 or args.top_k > args.experts:
            raise ValueError("token counts must be positive, and top-k at most the number of experts")
        shape = Shape(args.hidden, args.intermediate, args.experts, args.top_k, formats, args.routing)
        pool = ExpertPool(args.threads)
        layer = random_layer(shape, pool, progress=sys.stderr.isatty())
    except ValueError as error:
        sys.exit(f"error: {error}")
    limits = Limits()
    rows = measure(layer, shape, counts, limits, args.rounds)
    if args.json:
        about = {"isa": _native.isa_selected(), "threads": pool.threads, "shape": asdict(shape)}
        print(json.dumps({**about, "limits": asdict(limits), "rows": [asdict(r) for r in rows]}))
    else:
        _show(shape, pool, limits, rows)


def measure(layer: ExpertLayer, shape: Shape, counts: Sequence[int], limits: Limits, rounds: int) -> list[Row]:
    """Every count once a round, the limits before each round, so that a machine that drifts favours none."""
    rng = np.random.default_rng(1)
    batches = {}
    for tokens in counts:
        x, ids, weights, out = batches[tokens] = batch(shape, tokens, rng)
        layer(x, ids[0], weights, out)
    times: dict[int, list[float]] = {tokens: [] for tokens in counts}
    for _ in range(rounds):
        limits.measure(layer.pool)
        for tokens in counts:
            times[tokens].append(seconds(layer, *batches[tokens]))
    rows: list[Row] = []
    for tokens in counts:
        row = _row(layer, shape, tokens, batches[tokens][1], times[tokens], limits)
        if rows:
            row.change = row.tokens_per_second / rows[-1].tokens_per_second - 1
            row.drop = row.change < -MOST_DROP
        rows.append(row)
    return rows


def _row(
    layer: ExpertLayer,
    shape: Shape,
    tokens: int,
    ids: list[npt.NDArray[np.int64]],
    times: list[float],
    limits: Limits,
) -> Row:
    took = statistics.median(times)
    read = statistics.mean(len(np.unique(i)) for i in ids) * layer.nbytes / shape.experts
    operations = 2.0 * tokens * shape.top_k * shape.hidden * shape.intermediate  # of one of the three matrices
    least = sum(operations / limits.of(fmt) for fmt in shape.formats)
    return Row(
        tokens,
        tokens / took,
        (max(times) - min(times)) / took,
        read / took / 1e9,
        3 * operations / took / 1e12,
        read / took / limits.read,
        least / took,
    )


def _table(args: argparse.Namespace) -> None:
    isas = bench_table.known_isas(args.isa)
    asked = args.format.upper().split("/") if args.format else list(_native.formats())
    formats = [parse_formats(name)[0] for name in asked]
    shape = Shape(args.hidden, args.intermediate, args.experts, args.top_k, parse_formats(formats[0]), args.routing)
    if args.top_k > args.experts:
        raise ValueError("top-k is at most the number of experts")
    threads = ExpertPool(args.threads).threads
    found = bench_table.cells(shape, formats, isas, threads, args.rounds)
    if args.json:
        about = {"threads": threads, "shape": {k: v for k, v in asdict(shape).items() if k != "formats"}}
        print(json.dumps({**about, "isas": isas, "rows": [asdict(c) for c in found]}))
        return
    print(f"{shape.experts} experts of {shape.hidden} x {shape.intermediate}, top {shape.top_k}; {threads} threads")
    print(bench_table.HEADER)
    for cell in found:
        print(bench_table.line(cell), flush=True)


def _show(shape: Shape, pool: ExpertPool, limits: Limits, rows: list[Row]) -> None:
    print(
        f"{shape.experts} experts of {shape.hidden} x {shape.intermediate}, top {shape.top_k}, "
        f"{'/'.join(shape.formats)}, {shape.routing}; {_native.isa_selected()}, {pool.threads} threads"
    )
    print(
        f"limits: read {limits.read / 1e9:.1f} GB/s, int8 {limits.int8 / 1e12:.2f} TOPS, "
        f"bf16 {limits.bf16 / 1e12:.2f} TFLOPS, f32 {limits.f32 / 1e12:.2f} TFLOPS"
    )
    print("tokens    tok/s   +-   GB/s  of read   TOPS  of peak   change")
    for r in rows:
        print(
            f"{r.tokens:6d} {r.tokens_per_second:8.0f} {r.spread:4.0%} {r.gb_per_second:6.1f} {r.read_share:8.0%} "
            f"{r.tops:6.3f} {r.arithmetic_share:8.0%} {r.change:+8.0%}{'  DROP' if r.drop else ''}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ktcore_cpu.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--all", action="store_true", help="the table: every format on every instruction set")
    parser.add_argument("--isa", help="with --all: these instruction sets alone, separated by commas")
    parser.add_argument(
        "--format",
        help="of all, gate and up / down, or gate / up / down (Q4_K/Q6_K); with --all, the table's formats (every one)",
    )
    parser.add_argument("--tokens", default=COUNTS, help="token counts, separated by commas")
    parser.add_argument("--routing", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each physical core that may be used")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    main()
