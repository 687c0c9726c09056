"""A checkpoint that lives in memory, with the random weights that a spec needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ktcore.conformance.data.blocks import random_weight
from ktcore.ops import (
    AttentionSpec,
    CompressedAttentionSpec,
    EmbeddingSpec,
    EntryIndexerSpec,
    ExpertsSpec,
    GatedDeltaNetSpec,
    GatedStreamsSpec,
    HyperConnectionSpec,
    KimiDeltaSpec,
    LinearSpec,
    MLASpec,
    MLPSpec,
    MoESpec,
    NGramSpec,
    NGramTableSpec,
    RMSNormSpec,
    RopeSpec,
    RouterSpec,
    Spec,
    TokenIndexerSpec,
)
from ktcore.weights.checkpoint import Checkpoint, TensorInfo
from ktcore.weights.formats import get_format
from ktcore.weights.ref import Weight, WeightRef

Wanted = tuple[str, tuple[int, ...], str, float, float]
"""Role, shape, format, mean and standard deviation."""


class MemoryCheckpoint(Checkpoint):
    """Tensors by name, as bytes; what a file reader would give, without the file."""

    def __init__(self) -> None:
        self.path = Path("(made by the conformance kit)")
        self.kind = "memory"
        self.config: Mapping[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._bytes: dict[str, np.ndarray] = {}
        self.orders: dict[str, npt.NDArray[np.int64]] = {}
        """Of weights in ordered formats: which input each stored column belongs to."""

    def add(self, name: str, shape: tuple[int, ...], fmt: str, raw: np.ndarray) -> Weight:
        """Store a tensor and open it."""
        self.tensors[name] = TensorInfo(name, shape, fmt, raw.size)
        self._bytes[name] = raw
        return WeightRef.of(self, name).open(self)

    def raw(self, name: str) -> np.ndarray:
        """Stored bytes, read-only as those of a mapped file are."""
        view: np.ndarray = self._bytes[name].reshape(-1).view()
        view.flags.writeable = False
        return view

    def input_order(self, name: str) -> npt.NDArray[np.int64]:
        """See `orders`."""
        return self.orders[name]

    def release(self, name: str) -> None:
        """Nothing is mapped."""

    def close(self) -> None:
        """Nothing is mapped."""


def make_weights(spec: Spec, rng: np.random.Generator) -> dict[str, Weight]:
    """Random weights for `spec` and all of its parts, by dotted role."""
    checkpoint = MemoryCheckpoint()
    made = {}
    for role, shape, fmt, mean, std in _wanted(spec, ""):
        if mean:
            values = (mean + std * rng.standard_normal(shape)).astype(np.float32)
            made[role] = checkpoint.add(role, shape, "F32", values.view(np.uint8).reshape(-1))
        else:
            made[role] = _stored(checkpoint, role, shape, fmt, std, rng)
    return made


def _stored(
    checkpoint: MemoryCheckpoint, role: str, shape: tuple[int, ...], fmt: str, std: float, rng: np.random.Generator
) -> Weight:
    """A random weight; in an ordered format the items of a stack are tensors of their own, each in its own order."""
    if not get_format(fmt).ordered:
        return checkpoint.add(role, shape, fmt, random_weight(fmt, shape, std, rng))
    names = [role] if len(shape) == 2 else [f"{role}.{i}" for i in range(shape[0])]
    for name in names:
        checkpoint.add(name, shape[-2:], fmt, random_weight(fmt, shape[-2:], std, rng))
        checkpoint.orders[name] = rng.permutation(shape[-1]).astype(np.int64)
    return WeightRef.of(checkpoint, *names).open(checkpoint)


def storable(spec: Spec) -> bool:
    """Whether a checkpoint can hold the weights of `spec`: rows are whole blocks of their format."""
    return all(shape[-1] % get_format(fmt).block_size == 0 for _, shape, fmt, mean, _ in _wanted(spec, "") if not mean)


def own_weights(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """Weights of the part at `prefix` and below it, by roles relative to it."""
    return {role[len(prefix) :]: w for role, w in weights.items() if role.startswith(prefix)}


def values(weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """Dequantised float32 values of all weights."""
    return {role: weight.tensor() for role, weight in weights.items()}


def _wanted(spec: Spec, prefix: str) -> Iterator[Wanted]:
    for role, shape, fmt, mean, std in _own(spec):
        yield prefix + role, shape, fmt, mean, std
    for role, part in spec.children().items():
        yield from _wanted(part, f"{prefix}{role}.")


def _own(spec: Spec) -> Iterator[Wanted]:
    if isinstance(spec, LinearSpec):
        yield "weight", (spec.out_features, spec.in_features), spec.weight_format, 0.0, spec.in_features**-0.5
        if spec.bias:
            yield "bias", (spec.out_features,), "F32", 0.0, 0.3
    elif isinstance(spec, RMSNormSpec) and spec.weight_format:
        yield "weight", (spec.dim,), spec.weight_format, 1.0 - spec.offset, 0.2
    elif isinstance(spec, EmbeddingSpec):
        yield "weight", (spec.vocab, spec.hidden), spec.weight_format, 0.0, 1.0
    elif isinstance(spec, HyperConnectionSpec):
        yield "fn", (spec.rows, spec.streams * spec.hidden), spec.fn_format, 0.0, (spec.streams * spec.hidden) ** -0.5
        yield "base", (spec.rows,), spec.base_format, 0.0, 0.5
        yield "scale", (spec.parts,), spec.scale_format, 1.0, 0.3
    elif isinstance(spec, GatedStreamsSpec):
        yield "norm", (spec.streams * spec.hidden,), spec.norm_format, 1.0 - spec.norm_offset, 0.2
    elif isinstance(spec, RouterSpec):
        yield "weight", (spec.experts, spec.hidden), spec.weight_format, 0.0, 1.5 * spec.hidden**-0.5
        if spec.choice_bias:
            yield "bias", (spec.experts,), "F32", 0.0, 0.2
        if spec.logit_bias:
            yield "logit_bias", (spec.experts,), "F32", 0.0, 1.0
        if spec.expert_scale:
            yield "expert_scale", (spec.experts,), "F32", 1.0, 0.4
    elif isinstance(spec, ExpertsSpec):
        wide, tall = spec.hidden**-0.5, spec.intermediate**-0.5
        yield "gate", (spec.experts, spec.intermediate, spec.hidden), spec.gate_format, 0.0, wide
        yield "up", (spec.experts, spec.intermediate, spec.hidden), spec.up_format, 0.0, wide
        yield "down", (spec.experts, spec.hidden, spec.intermediate), spec.down_format, 0.0, tall
        if spec.bias:
            yield "gate_bias", (spec.experts, spec.intermediate), "F32", 0.0, 0.5
            yield "up_bias", (spec.experts, spec.intermediate), "F32", 0.0, 0.5
            yield "down_bias", (spec.experts, spec.hidden), "F32", 0.0, 0.5
    elif isinstance(spec, AttentionSpec) and spec.sinks:
        yield "sinks", (spec.heads,), "F32", 0.0, 1.0
    elif isinstance(spec, (MLPSpec, MoESpec)) and spec.out_scale:
        yield "out_scale", (1,), "F32", 0.6, 0.05
    elif isinstance(spec, MLASpec):
        yield from _up_projections(spec)
    elif isinstance(spec, TokenIndexerSpec):
        yield "k_norm", (spec.head_dim,), spec.k_norm_format, 1.0, 0.2
        yield "k_norm_bias", (spec.head_dim,), spec.k_norm_format, 0.0, 0.3
        if spec.gate:
            yield "ape", (spec.cache.pool, spec.head_dim), spec.ape_format, 0.0, 1.0
    elif isinstance(spec, EntryIndexerSpec):
        yield "ape", (spec.entries.ratio, spec.entries.width), spec.ape_format, 0.0, 0.7
    elif isinstance(spec, CompressedAttentionSpec):
        wide = spec.heads // spec.groups * spec.head_dim
        yield "o_a", (spec.groups, spec.o_rank, wide), spec.o_a_format, 0.0, wide**-0.5
        yield "sinks", (spec.heads,), spec.sinks_format, 0.0, 1.0
        if spec.entries:
            yield "ape", (spec.entries.ratio, spec.entries.width), spec.ape_format, 0.0, 0.7
    elif isinstance(spec, GatedDeltaNetSpec):
        yield "conv", (spec.qkv.out_features, spec.conv_width), spec.conv_format, 0.0, 0.6
        # rates that are negative, or their logarithms
        yield "decay", (spec.value_heads,), spec.decay_format, *((0.0, 0.8) if spec.decay_log else (-1.0, 0.3))
        yield "dt_bias", (spec.value_heads,), spec.dt_bias_format, 0.0, 1.0
    elif isinstance(spec, KimiDeltaSpec):
        channels = spec.heads * spec.head_dim
        for role in "qkv":
            yield f"conv_{role}", (channels, spec.conv_width), spec.conv_format, 0.0, 0.6
        yield "decay", (spec.heads,), spec.decay_format, *((0.0, 0.8) if spec.decay_log else (-1.0, 0.3))
        yield "dt_bias", (channels,), spec.dt_bias_format, 0.0, 1.0
    elif isinstance(spec, NGramTableSpec):
        yield "table", (spec.rows, spec.dim), spec.table_format, 0.0, 1.0
    elif isinstance(spec, NGramSpec):
        width = spec.streams * spec.hidden
        for role in ("norm_key", "norm_query", "norm_conv"):
            yield role, (width,), spec.norm_format, 1.0 - spec.norm_offset, 0.2
        yield "conv", (width, spec.conv_width), spec.conv_format, 0.0, 0.6
    elif isinstance(spec, RopeSpec) and spec.freq_factors:
        yield "freq_factors", (spec.dim // 2,), "F32", 3.0, 0.7


def _up_projections(spec: MLASpec) -> Iterator[Wanted]:
    std, fmt = spec.latent**-0.5, spec.kv_b_format
    if spec.split_kv_b:
        yield "k_b", (spec.heads, spec.latent, spec.nope_dim), fmt, 0.0, std
        yield "v_b", (spec.heads, spec.value_dim, spec.latent), fmt, 0.0, std
    else:
        yield "kv_b", (spec.heads * (spec.nope_dim + spec.value_dim), spec.latent), fmt, 0.0, std
