"""Grouped-query attention as one native call: norm, q/k/v, qk-norm, RoPE, paged cache, attention, output, residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ktcore.backend import Capabilities, Implementation, LoadRequest, Supported, Unsupported
from ktcore.ops.attention import AttentionSpec
from ktcore.ops.batch import StepBatch
from ktcore.ops.rope import inverse_frequencies
from ktcore_cpu import packing
from ktcore_cpu.norm import PostNorm

if TYPE_CHECKING:
    from ktcore_cpu import _native


NOT_YET = {
    "gate": "an output gate",
    "norm_after_rope": "query and key norms after RoPE",
    "sinks": "attention sinks",
    "temperature": "queries that grow with their position",
}
"""Fields of the spec that the native block does not know, and how to say so."""


class CpuAttention(Implementation):
    """Fused, with its own KV cache: pages [pages, kv_heads, page_size, head_dim] in float16, or in float32.

    Options: `activations` ("int8", "f32") and `kv_dtype` ("f16", "f32").
    """

    id = "cpu.attention"
    spec_type = AttentionSpec
    fused = True
    options = packing.OPTIONS | {"kv_dtype"}

    def supports(self, spec: AttentionSpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format; equal key and value widths; ordinary RMSNorms."""
        if spec.cache.key_dim != spec.cache.value_dim:
            return Unsupported("keys and values of different width")
        if any(n is not None and n.offset for n in (spec.norm, spec.q_norm, spec.k_norm, spec.post_norm)):
            return Unsupported("a zero-centred norm")
        if spec.q_norm is not None and spec.k_norm is not None and spec.q_norm.eps != spec.k_norm.eps:
            return Unsupported("query and key norms with different eps")
        for field, words in NOT_YET.items():
            if getattr(spec, field):
                return Unsupported(words)
        if spec.cache.chunk:
            return Unsupported("attention within chunks of positions")
        if any(n is not None and not n.weight_format for n in (spec.q_norm, spec.k_norm)):
            return Unsupported("query and key norms without weights")
        return packing.supports_formats(spec)

    def page_sizes(self, spec: AttentionSpec) -> tuple[int, ...]:
        """Any of these."""
        return (64, 32, 128, 256)

    def cache_bytes_per_token(self, spec: AttentionSpec) -> int:
        """As float16."""
        return spec.cache.bytes_per_token(2)

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
        self._kv_dtype: str = request.options.get("kv_dtype", "f16")
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
            norm=packing.vector(weights, "norm.weight"),
            norm_eps=spec.norm.eps if spec.norm else 0.0,
            q_norm=packing.vector(weights, "q_norm.weight"),
            k_norm=packing.vector(weights, "k_norm.weight"),
            qk_eps=qk_norm.eps if qk_norm else 0.0,
            q_bias=packing.vector(weights, "q.bias"),
            k_bias=packing.vector(weights, "k.bias"),
            v_bias=packing.vector(weights, "v.bias"),
            o_bias=packing.vector(weights, "o.bias"),
            window=spec.cache.window,
            residual=spec.residual and spec.post_norm is None,
            exact=packing.exact(request),
        )
        self._finish = PostNorm(request, spec.post_norm, spec.residual) if spec.post_norm else None

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Reserve KV pages; the system backs them with memory as they are written."""
        dtype = {"f16": torch.float16, "f32": torch.float32}[self._kv_dtype]
        shape = (pages, self._spec.kv_heads, page_size, self._spec.head_dim)
        self._k, self._v = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self._pages, self._page_size = pages, page_size
        self._k_ptr, self._v_ptr = self._k.data_ptr(), self._v.data_ptr()

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


def native_step(step: StepBatch) -> _native.Step:
    """The native description of the step, made once and used by every layer."""
    return step.derived("cpu.step", _describe)


def _describe(step: StepBatch) -> _native.Step:
    from ktcore_cpu import _native

    return _native.Step(
        step.positions.to(torch.int32).numpy(),
        torch.tensor(step.q_start, dtype=torch.int32).numpy(),
        torch.tensor(step.context_lens, dtype=torch.int32).numpy(),
        step.block_table.numpy(),
    )
