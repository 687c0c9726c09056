"""What the bench commands share: random experts and their routing, timing, and the limits of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ktcore_cpu import _native
from ktcore_cpu.expert_layer import ExpertLayer, ExpertPool
from ktcore_cpu.expert_layout import Expert

LEAST_SECONDS = 0.03
"""Of one timing; small batches are repeated until they take so long."""


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
    expert = random_expert(shape, shape.formats)
    return ExpertLayer.from_experts(
        (expert for _ in range(shape.experts)),
        experts=shape.experts,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        formats=shape.formats,
        pool=pool,
        progress=progress,
    )


def random_expert(shape: Shape, formats: tuple[str, str, str]) -> Expert:
    """Gate, up and down of one expert, as bytes.

    Raises:
        ValueError: as `random_layer`.
    """
    rng = np.random.default_rng(0)
    wide, tall = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    gate, up, down = (random_blocks(f, s, rng) for f, s in zip(formats, (wide, wide, tall), strict=True))
    return gate, up, down


def random_blocks(fmt: str, shape: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Bytes of a matrix of normal values of about 1/sqrt(columns).

    Raises:
        ValueError: rows that are no whole number of blocks, or a format that cannot be made.
    """
    from ktcore.conformance.data.blocks import FORMATS, random_weight

    block, size = _native.formats()[fmt]
    if shape[1] % block:
        raise ValueError(f"rows of {shape[1]} values are not a multiple of {fmt}'s block of {block}")
    std = shape[1] ** -0.5
    if fmt in FORMATS:
        return random_weight(fmt, shape, std, rng)
    if fmt.startswith("INT"):
        import torch

        from ktcore.weights.quantize import Loss, quantize_rows

        values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(std))
        return quantize_rows(values, fmt, Loss(), "the random weights").reshape(-1)
    if fmt.startswith("F8_E4M3_G"):
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


Batch = tuple[npt.NDArray[np.float32], list[npt.NDArray[np.int64]], npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Inputs, several routings of them, weights of the experts, and room for the result."""


def batch(shape: Shape, tokens: int, rng: np.random.Generator) -> Batch:
    """Random inputs of so many tokens."""
    x = rng.standard_normal((tokens, shape.hidden), dtype=np.float32)
    ids = [routing(shape, tokens, rng) for _ in range(max(1, min(32, 64 // tokens)))]
    return x, ids, np.full((tokens, shape.top_k), 1 / shape.top_k, np.float32), np.empty_like(x)


def seconds(
    layer: Callable[..., Any],
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
