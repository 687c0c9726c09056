"""Launch shapes: defaults that fit every target, in place of which a backend gives those it measured on its chips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
    """One program's tile of attention: rows (queries times the heads of a key head) by keys; splits of the keys."""

    block_m: int
    block_n: int
    splits: int = 1
    launch: Launch = Launch()


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
class Tuning:
    """What a backend overrides of the launch shapes, as functions of a call's size.

    Attributes:
        linear: (tokens, wide) -> tiles; wide: products in float32.
        attention: (query rows a key head, value width) -> tiles.
        experts: tokens -> tiles.
        delta: (most new tokens of a sequence, values a head) -> tiles.
    """

    linear: Callable[[int, bool], LinearTiles] = lambda tokens, wide: linear_tiles(tokens, wide=wide)
    attention: Callable[[int, int], AttentionTiles] = attention_tiles
    experts: Callable[[int], LinearTiles] = expert_tiles
    delta: Callable[[int, int], DeltaTiles] = lambda tokens, width: DeltaTiles()
