"""Grouped-query attention as one native call: norm, q/k/v, qk-norm, RoPE, paged cache, attention, output, residual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.branches import ATTENTION
from ktcore.backend.handles import FREQUENCIES, nested
from ktcore.errors import CheckpointError
from ktcore.ops.attention import AttentionSpec, Temperature
from ktcore.ops.batch import StepBatch
from ktcore.ops.rope import inverse_frequencies
from ktcore_cpu import packing
from ktcore_cpu.norm import PostNorm
from ktcore_cpu.packings import Packs

if TYPE_CHECKING:
    from ktcore_cpu import _native


KV_TYPES = {
    "i16": torch.uint8,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "q8": torch.uint8,
}
"""Cache types and what their pages are made of. i16 and q8 rows are bytes: codes of 16 bits and 8 bytes of scales, 32
codes of 8 bits to a half-precision scale."""
DEFAULT_KV_TYPE = "i16"


class CpuAttention(Packs):
    """Fused, with its own KV cache: pages [pages, kv_heads, page_size, width] of keys and of values.

    Options: `activations` ("int8", "f32") and `kv_dtype` ("i16": 16-bit integers with a scale a row, whose products are
    integers; "f16", "bf16", "f32"; "q8": 8 bits, as GGUF's Q8_0; products of these are float32).
    """

    id = "cpu.attention"
    spec_type = AttentionSpec
    handles = (
        (ATTENTION - {"indexer"})
        | {"sinks", "q.bias", "k.bias", "v.bias", "o.bias", "norm.offset", "q_norm.offset", "k_norm.offset"}
        | {"cache.window", "cache.chunk", "cache.sinks"}
        | nested("rope", FREQUENCIES)
    )
    fused = True
    options = packing.OPTIONS | {"kv_dtype"}

    def supports(self, spec: AttentionSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format."""
        if spec.q_norm is not None and spec.k_norm is not None and spec.q_norm.eps != spec.k_norm.eps:
            return Unsupported("query and key norms with different eps")
        return packing.supports_formats(spec)

    def page_sizes(self, spec: AttentionSpec) -> tuple[int, ...]:
        """Any of these."""
        return (64, 32, 128, 256)

    def cache_bytes_per_token(self, spec: AttentionSpec) -> int:
        """In the default type."""
        return self.cache_bytes(spec, {})

    def cache_bytes(self, spec: AttentionSpec, options: Mapping[str, Any]) -> int:
        """In the type that option `kv_dtype` names."""
        kind = options.get("kv_dtype", DEFAULT_KV_TYPE)
        return spec.kv_heads * (row_bytes(kind, spec.head_dim) + row_bytes(kind, spec.value_width))

    def load(self, request: LoadRequest) -> CpuAttentionModule:
        """Pack the four projections."""
        return CpuAttentionModule(request)


class CpuAttentionModule:
    """x float32 [T, hidden], step -> float32 [T, hidden]; owns the layer's KV pages."""

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        spec: AttentionSpec = request.spec  # type: ignore[assignment]
        weights = request.weights
        self._spec = spec
        self._hidden = spec.hidden
        self._kv_dtype = kv_dtype(request)
        self._k = self._v = torch.empty(0)
        self._page_size = 0
        if spec.rope is None:
            freq, factor, pairing = torch.empty(0), 1.0, "half"
        else:
            divisors = weights["rope.freq_factors"].tensor() if spec.rope.freq_factors else None
            freq, factor = inverse_frequencies(spec.rope, divisors)
            pairing = spec.rope.pairing
        qk_norm = spec.q_norm or spec.k_norm
        self._block = _native.AttentionBlock(
            request.runtime.pool,  # type: ignore[attr-defined]
            packing.pack(request, "q.weight"),
            packing.pack(request, "k.weight"),
            packing.pack(request, "v.weight"),
            packing.pack(request, "o.weight"),
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            rope_pairing=pairing,
            inv_freq=freq.numpy(),
            rope_scale=factor,
            softmax_scale=spec.scale,
            norm=packing.norm_weight(weights, "norm.weight", spec.norm),
            norm_eps=spec.norm.eps if spec.norm else 0.0,
            q_norm=packing.norm_weight(weights, "q_norm.weight", spec.q_norm),
            k_norm=packing.norm_weight(weights, "k_norm.weight", spec.k_norm),
            qk_eps=qk_norm.eps if qk_norm else 0.0,
            q_bias=packing.vector(weights, "q.bias"),
            k_bias=packing.vector(weights, "k.bias"),
            v_bias=packing.vector(weights, "v.bias"),
            o_bias=packing.vector(weights, "o.bias"),
            window=spec.cache.window,
            residual=spec.residual and spec.post_norm is None,
            exact=packing.exact(request),
            chunk=spec.cache.chunk,
            sinks=packing.vector(weights, "sinks") if spec.sinks else None,
            **temperature_fields(spec.temperature),
            norm_after_rope=spec.norm_after_rope,
            norm_whole=spec.norm_whole,
            gate=packing.pack(request, "gate.weight") if spec.gate is not None else None,
            value_dim=spec.value_dim,
            v_norm=packing.norm_weight(weights, "v_norm.weight", spec.v_norm),
            v_eps=spec.v_norm.eps if spec.v_norm else 0.0,
            value_scale=spec.value_scale,
        )
        self._finish = PostNorm(request, spec.post_norm, spec.residual) if spec.post_norm else None

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Reserve KV pages; the system backs them with memory as they are written."""
        shape = (pages, self._spec.kv_heads, page_size)
        widths = (self._spec.head_dim, self._spec.value_width)
        self._k, self._v = (empty_rows(shape, width, self._kv_dtype) for width in widths)
        self._pages, self._page_size = pages, page_size
        self._k_ptr, self._v_ptr = self._k.data_ptr(), self._v.data_ptr()

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """Keys and values."""
        return self._k, self._v

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        x = packing.rows(x, self._hidden)
        out = torch.empty_like(x)
        self._block.forward(
            x.data_ptr(),
            out.data_ptr(),
            native_step(step),
            self._k_ptr,
            self._v_ptr,
            self._pages,
            self._page_size,
            self._kv_dtype,
        )
        return out if self._finish is None else self._finish(x, out)


def kv_dtype(request: LoadRequest) -> str:
    """The cache type that the rule asks for.

    Raises:
        CheckpointError: there is no such type.
    """
    wanted = request.options.get("kv_dtype", DEFAULT_KV_TYPE)
    if wanted not in KV_TYPES:
        raise CheckpointError(f"{request.name}: option kv_dtype={wanted!r}, known are {', '.join(KV_TYPES)}")
    return str(wanted)


def row_bytes(kv_type: str, width: int) -> int:
    """Bytes of a cached row of `width` values; an unknown type, which `load` refuses, counts as float16."""
    if kv_type == "i16":
        return 2 * (width + width % 2) + 8
    if kv_type == "q8":
        return -(-width // 32) * 34
    return width * (4 if kv_type == "f32" else 2)


def empty_rows(shape: tuple[int, ...], width: int, kv_type: str) -> torch.Tensor:
    """Uninitialised cache rows of `width` values, in huge pages where the system gives them.

    The last dimension counts elements of the type.
    """
    from ktcore_cpu import _native

    dtype = KV_TYPES[kv_type]
    rows = torch.empty((*shape, row_bytes(kv_type, width) // dtype.itemsize), dtype=dtype)
    _native.prefer_huge_pages(rows.data_ptr(), rows.nbytes)
    return rows


def temperature_fields(temperature: Temperature | None) -> dict[str, float]:
    """The temperature of queries as native blocks take it; without one they have defaults that change nothing."""
    if temperature is None:
        return {}
    return {
        "temperature_scale": temperature.scale,
        "temperature_span": temperature.span,
        "temperature_offset": temperature.offset,
    }


def native_step(step: StepBatch) -> _native.Step:
    """The native description of the step, made once and used by every layer."""
    return step.derived("cpu.step", _describe)


def _describe(step: StepBatch) -> _native.Step:
    from ktcore_cpu import _native

    # by numpy: a tensor of a few numbers takes torch several times as long, and this is once a step
    return _native.Step(
        step.positions.numpy().astype(np.int32),
        np.array(step.q_start, np.int32),
        np.array(step.context_lens, np.int32),
        step.block_table.numpy(),
    )
