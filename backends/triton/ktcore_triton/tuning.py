"""Launch shapes: defaults that fit every target, in place of which a backend gives those it measured on its chips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ktcore.backend import Capabilities


@dataclass(frozen=True)
class Launch:
    """How a program is launched: warps of the device's own width, stages of software pipelining."""

    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, Any]:
        """As Triton's launcher takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class LinearTiles:
    """One program's tile of a linear: tokens by output features; `splits` programs share the input features."""

    block_m: int
    block_n: int
    splits: int = 1
    launch: Launch = Launch()


FEW_TOKENS = 16
"""The least rows of a matrix instruction: up to here weights are read once and their bandwidth is all that counts."""


def linear_tiles(tokens: int, *, wide: bool = False) -> LinearTiles:
    """The default tiles of a linear for that many tokens; `wide`: in float32, which takes twice the registers."""
    if tokens <= FEW_TOKENS:
        return LinearTiles(16, 32)
    return LinearTiles(32, 32, launch=Launch(warps=8)) if wide else LinearTiles(64, 64, launch=Launch(warps=8))


@dataclass(frozen=True)
class AttentionTiles:
    """One program's tile of attention: rows (queries times the heads of a key head) by keys; splits of the keys; how
    much of a key is multiplied at a time, a power of two from 16 on (0: all of it), where registers are few."""

    block_m: int
    block_n: int
    splits: int = 1
    launch: Launch = Launch()
    part: int = 0


def attention_tiles(rows: int, value_dim: int) -> AttentionTiles:
    """The default tiles for sequences of at most `rows` query rows a key head; few rows share keys in splits."""
    if value_dim > 256:
        return AttentionTiles(16, 16, 8, Launch(warps=8, stages=1))
    if rows <= 64:
        return AttentionTiles(16, 16, 8, Launch(warps=8, stages=1))
    return AttentionTiles(32, 32, 1, Launch(warps=8, stages=1))


def expert_tiles(tokens: int) -> LinearTiles:
    """The default tiles of routed experts for that many tokens a step."""
    return LinearTiles(16, 32)


@dataclass(frozen=True)
class DeltaTiles:
    """One program's part of the gated delta rule: columns of a head's state; tokens that are solved at once, 16, 32 or
    64; how chunks are launched."""

    block_v: int = 32
    chunk: int = 16
    launch: Launch = Launch(warps=8, stages=1)


@dataclass(frozen=True)
class Product:
    """What a linear's tiles may depend on; wide: products are in float32."""

    tokens: int
    rows: int
    cols: int
    wide: bool = False


MOST_SPLITS, LEAST_COLUMNS = 8, 1024


def spread_over(tiles: LinearTiles, call: Product, processors: int) -> LinearTiles:
    """The same tiles in as many splits of the columns as give every processor two programs, if need be."""
    programs = -(-call.rows // tiles.block_n) * -(-call.tokens // tiles.block_m)
    most = min(MOST_SPLITS, max(1, call.cols // LEAST_COLUMNS))
    return replace(tiles, splits=max(1, min(-(-2 * processors // programs), most)))


@dataclass(frozen=True)
class Tuning:
    """What a backend overrides of the launch shapes, as functions of a call's size.

    Attributes:
        linear: a product's size -> tiles.
        attention: (query rows a key head, value width) -> tiles.
        experts: tokens -> tiles.
        delta: (most new tokens of a sequence, values a head) -> tiles.
    """

    linear: Callable[[Product], LinearTiles] = lambda call: linear_tiles(call.tokens, wide=call.wide)
    attention: Callable[[int, int], AttentionTiles] = attention_tiles
    experts: Callable[[int], LinearTiles] = expert_tiles
    delta: Callable[[int, int], DeltaTiles] = lambda tokens, width: DeltaTiles()


Tuned = Tuning | Callable[[Capabilities], Tuning]
"""A backend's tuning, or what gives it for a device."""
