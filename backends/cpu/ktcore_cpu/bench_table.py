"""The whole table of the bench command: every weight format on every instruction set, one token and many."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ktcore_cpu import _native
from ktcore_cpu.bench_parts import Limits, Shape, batch, random_expert, seconds
from ktcore_cpu.expert_layer import ExpertPool
from ktcore_cpu.expert_layout import Layout
from ktcore_cpu.expert_weights import fill

MANY = 512
"""Tokens of the second figure."""
LIMIT_SECONDS = 0.02
"""Of each limit, measured anew beside every figure."""


@dataclass(frozen=True)
class Cell:
    """One format on one instruction set, all three matrices in it; medians over the rounds.

    Attributes:
        bits: a weight takes in memory, as packed.
        one_gb_per_second: weights read a second for one token, in billions of bytes.
        one_gw_per_second: in billions of weights.
        read_share: of the streaming read in the same rounds.
        many_gw_per_second: billions of weights multiplied by a token a second, 512 tokens at once.
        many_tops: two operations each.
        peak_share: over what the format's arithmetic reaches on this instruction set without memory.
    """

    isa: str
    format: str
    bits: float
    one_gb_per_second: float
    one_gw_per_second: float
    read_share: float
    many_gw_per_second: float
    many_tops: float
    peak_share: float


def known_isas(text: str | None) -> list[str]:
    """The instruction sets that `text` names, separated by commas; None: all that this CPU runs but the scalar one.

    Raises:
        ValueError: one that this CPU neither runs nor emulates.
    """
    supported = _native.isa_supported()
    if text is None:
        return [isa for isa in supported if isa != "scalar"] or supported
    asked = text.split(",")
    for isa in asked:
        if isa not in (*supported, *_native.isa_emulated()):
            raise ValueError(f"this CPU does not run {isa}; it runs {', '.join(supported)}")
    return asked


def cells(shape: Shape, formats: Sequence[str], isas: Sequence[str], threads: int, rounds: int) -> Iterator[Cell]:
    """Every format on every instruction set, one after another; the experts are packed once a format.

    Args:
        shape: its formats are not read.
        threads: 0: one for each physical core that may be used.

    Raises:
        ValueError: a shape that a format cannot have.
    """
    pools = {isa: _pool(isa, threads) for isa in isas}
    for fmt in formats:
        bank = _bank(shape, fmt, next(iter(pools.values())).native)
        for isa, pool in pools.items():
            with forced(isa):
                yield _cell(shape, fmt, isa, pool, bank, rounds)
        del bank  # before the next one is made


@contextmanager
def forced(isa: str) -> Iterator[None]:
    """Pools made inside are of this instruction set."""
    before = os.environ.get("KTCORE_ISA")
    os.environ["KTCORE_ISA"] = isa
    try:
        yield
    finally:
        if before is None:
            del os.environ["KTCORE_ISA"]
        else:
            os.environ["KTCORE_ISA"] = before


HEADER = "format          bits  isa               1: GB/s    Gw/s  of read    512: Gw/s    TOPS  of peak"


def line(c: Cell) -> str:
    """A row below `HEADER`."""
    return (
        f"{c.format:14s} {c.bits:5.2f}  {c.isa:14s} {c.one_gb_per_second:10.1f} {c.one_gw_per_second:7.1f} "
        f"{c.read_share:8.0%} {c.many_gw_per_second:12.0f} {c.many_tops:7.3f} {c.peak_share:8.0%}"
    )


def _pool(isa: str, threads: int) -> ExpertPool:
    with forced(isa):
        return ExpertPool(threads)


def _bank(shape: Shape, fmt: str, pool: _native.Pool) -> _native.ExpertBank:
    expert = random_expert(shape, (fmt, fmt, fmt))
    layout = Layout(shape.experts, shape.hidden, shape.intermediate, (fmt, fmt, fmt), (False,) * 3, True)
    bank: _native.ExpertBank = fill(layout, (expert for _ in range(shape.experts)), pool, None, False)
    return bank


def _cell(shape: Shape, fmt: str, isa: str, pool: ExpertPool, bank: _native.ExpertBank, rounds: int) -> Cell:
    pool.switch.use(fmt)
    call = _caller(_native.ExpertsBlock(pool.native, bank, "silu", False, False))
    limits, times = Limits(), {1: list[float](), MANY: list[float]()}
    rng = np.random.default_rng(1)
    batches = {tokens: batch(shape, tokens, rng) for tokens in times}
    for x, ids, weights, out in batches.values():
        call(x, ids[0], weights, out)
    for _ in range(rounds):
        limits.measure(pool, LIMIT_SECONDS)
        for tokens, took in times.items():
            took.append(seconds(call, *batches[tokens]))
    weights_of_one = 3 * shape.top_k * shape.hidden * shape.intermediate
    one, many = (statistics.median(took) for took in times.values())
    read = bank.nbytes / shape.experts * shape.top_k / one
    rate = weights_of_one * MANY / many
    return Cell(
        isa=isa,
        format=fmt,
        bits=8 * bank.nbytes / (3 * shape.experts * shape.hidden * shape.intermediate),
        one_gb_per_second=read / 1e9,
        one_gw_per_second=weights_of_one / one / 1e9,
        read_share=read / limits.read,
        many_gw_per_second=rate / 1e9,
        many_tops=2 * rate / 1e12,
        peak_share=2 * rate / limits.of(fmt),
    )


def _caller(block: _native.ExpertsBlock) -> Callable[..., None]:
    def call(
        x: npt.NDArray[np.float32],
        ids: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
    ) -> None:
        block.forward(x.ctypes.data, ids.ctypes.data, weights.ctypes.data, out.ctypes.data, len(x), ids.shape[1])

    return call
