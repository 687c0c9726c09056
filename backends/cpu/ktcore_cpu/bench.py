"""Times a layer of experts of any shape and format beside what this machine can read and multiply.

python -m ktcore_cpu.bench --hidden 2048 --intermediate 768 --experts 128 --top-k 8 --format Q4_K/Q6_K
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from ktcore_cpu import _native
from ktcore_cpu.expert_layer import ExpertLayer, ExpertPool

COUNTS = "1,2,4,8,16,32,64,128,256,512,2048"
LEAST_SECONDS = 0.03
"""Of one timing; small batches are repeated until they take so long."""
MOST_DROP = 0.1
"""Tokens a second may be so much lower than those of the next smaller batch, no more."""


@dataclass(frozen=True)
class Shape:
    """A layer of experts and how tokens choose them."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    formats: tuple[str, str, str]
    routing: str = "uniform"


@dataclass
class Limits:
    """What the pool can do in this process, best of all rounds; bytes and operations a second."""

    read: float = 0.0
    int8: float = 0.0
    bf16: float = 0.0
    f32: float = 0.0

    def measure(self, pool: ExpertPool, seconds: float = 0.1) -> None:
        """Once more; keeps the best."""
        self.read = max(self.read, _native.read_bandwidth(pool.native, seconds))
        for kind in ("int8", "bf16", "f32"):
            setattr(self, kind, max(getattr(self, kind), _native.peak_rate(pool.native, kind, seconds)))

    def of(self, fmt: str) -> float:
        """Operations a second of the arithmetic that a format's products are done in."""
        if fmt in ("F32", "F16"):
            return self.f32
        if fmt == "BF16" or fmt.startswith("F8"):
            return self.bf16 or self.f32
        return self.int8


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
        formats = parse_formats(args.format)
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


def parse_formats(text: str) -> tuple[str, str, str]:
    """Gate, up and down of "Q4_K", "Q4_K/Q6_K" (the second is down's) or "Q4_K/Q5_K/Q6_K".

    Raises:
        ValueError: an unknown one, or more than three.
    """
    names = text.upper().split("/")
    for name in names:
        if name not in _native.formats():
            raise ValueError(f"unknown format {name}; known: {', '.join(_native.formats())}")
    if len(names) > 3:
        raise ValueError(f"{text!r} names more than three formats")
    return (names[0], names[-2] if len(names) == 3 else names[0], names[-1])


def random_layer(shape: Shape, pool: ExpertPool, progress: bool = False) -> ExpertLayer:
    """A layer of random weights. All experts have the same values, each at its own place in memory.

    Raises:
        ValueError: no random weights of a format, or a shape that it cannot have.
    """
    rng = np.random.default_rng(0)
    wide, tall = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    gate, up, down = (random_blocks(f, s, rng) for f, s in zip(shape.formats, (wide, wide, tall), strict=True))
    return ExpertLayer.from_experts(
        ((gate, up, down) for _ in range(shape.experts)),
        experts=shape.experts,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        formats=shape.formats,
        pool=pool,
        progress=progress,
    )


def random_blocks(fmt: str, shape: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Bytes of a matrix of normal values of about 1/sqrt(columns).

    Raises:
        ValueError: rows that are no whole number of blocks, or a format that cannot be made.
    """
    from ktcore.conformance.data.blocks import FORMATS, UNLISTED, random_weight

    block, size = _native.formats()[fmt]
    if shape[1] % block:
        raise ValueError(f"rows of {shape[1]} values are not a multiple of {fmt}'s block of {block}")
    std = shape[1] ** -0.5
    if fmt in (*FORMATS, *UNLISTED):
        return random_weight(fmt, shape, std, rng)
    if fmt.startswith("INT"):
        import torch

        from ktcore.weights.quantize import Loss, quantize_rows

        values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(std))
        return quantize_rows(values, fmt, Loss(), "the random weights").reshape(-1)
    if fmt == "F8_E4M3_G128":
        raw = rng.integers(0, 0x70, (shape[0] * shape[1] // block, size), dtype=np.uint8)  # 0x70 is 128
        raw[:, 4:] |= rng.integers(0, 2, raw[:, 4:].shape, dtype=np.uint8) << np.uint8(7)
        raw[:, :4] = np.array([std / 30], np.float32).view(np.uint8)
        return raw.reshape(-1)
    raise ValueError(f"no random weights of format {fmt}")


def routing(shape: Shape, tokens: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """ids [tokens, top_k], each token's different: all experts as likely, or (zipf) expert r as 1 / (r + 1)."""
    weight = np.zeros(shape.experts)
    if shape.routing == "zipf":
        weight = -np.log(rng.permutation(shape.experts) + 1.0)
    # the largest of log-weights plus Gumbel noise: draws without putting back
    keys = weight + rng.gumbel(size=(tokens, shape.experts))
    ids: npt.NDArray[np.int64] = np.argsort(-keys, axis=1)[:, : shape.top_k].astype(np.int64)
    return np.ascontiguousarray(ids)


def measure(layer: ExpertLayer, shape: Shape, counts: Sequence[int], limits: Limits, rounds: int) -> list[Row]:
    """Every count once a round, the limits before each round, so that a machine that drifts favours none."""
    rng = np.random.default_rng(1)
    batches = {}
    for tokens in counts:
        x = rng.standard_normal((tokens, shape.hidden), dtype=np.float32)
        ids = [routing(shape, tokens, rng) for _ in range(max(1, min(32, 64 // tokens)))]
        batches[tokens] = (x, ids, np.full((tokens, shape.top_k), 1 / shape.top_k, np.float32), np.empty_like(x))
        layer(x, ids[0], *batches[tokens][2:])
    times: dict[int, list[float]] = {tokens: [] for tokens in counts}
    for _ in range(rounds):
        limits.measure(layer.pool)
        for tokens in counts:
            times[tokens].append(_seconds(layer, *batches[tokens]))
    rows: list[Row] = []
    for tokens in counts:
        row = _row(layer, shape, tokens, batches[tokens][1], times[tokens], limits)
        if rows:
            row.change = row.tokens_per_second / rows[-1].tokens_per_second - 1
            row.drop = row.change < -MOST_DROP
        rows.append(row)
    return rows


def _seconds(
    layer: ExpertLayer,
    x: npt.NDArray[np.float32],
    ids: list[npt.NDArray[np.int64]],
    weights: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> float:
    """Of one call: the mean over all routings, repeated until there is something to time."""
    calls, start = 0, time.perf_counter()
    while True:
        for chosen in ids:
            layer(x, chosen, weights, out)
        calls += len(ids)
        took = time.perf_counter() - start
        if took >= LEAST_SECONDS:
            return took / calls


def _row(
    layer: ExpertLayer,
    shape: Shape,
    tokens: int,
    ids: list[npt.NDArray[np.int64]],
    times: list[float],
    limits: Limits,
) -> Row:
    seconds = statistics.median(times)
    read = statistics.mean(len(np.unique(i)) for i in ids) * layer.nbytes / shape.experts
    operations = 2.0 * tokens * shape.top_k * shape.hidden * shape.intermediate  # of one of the three matrices
    least = sum(operations / limits.of(fmt) for fmt in shape.formats)
    return Row(
        tokens,
        tokens / seconds,
        (max(times) - min(times)) / seconds,
        read / seconds / 1e9,
        3 * operations / seconds / 1e12,
        read / seconds / limits.read,
        least / seconds,
    )


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
    parser.add_argument("--format", default="Q4_K/Q6_K", help="of all, gate and up / down, or gate / up / down")
    parser.add_argument("--tokens", default=COUNTS, help="token counts, separated by commas")
    parser.add_argument("--routing", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each physical core that may be used")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    main()
