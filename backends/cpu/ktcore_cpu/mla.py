"""Multi-head latent attention as one native call, with a paged cache of latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.branches import MLA
from ktcore.backend.handles import FREQUENCIES, nested
from ktcore.errors import CheckpointError
from ktcore.ops.batch import StepBatch
from ktcore.ops.indexer import TokenIndexerSpec
from ktcore.ops.mla import MLASpec
from ktcore.ops.rope import RopeSpec, inverse_frequencies
from ktcore.weights.ref import Weight
from ktcore_cpu import packing
from ktcore_cpu.attention import DEFAULT_KV_TYPE, empty_rows, kv_dtype, native_step, row_bytes, temperature_fields
from ktcore_cpu.packings import Packs

if TYPE_CHECKING:
    from ktcore_cpu import _native

PAGE_SIZES = (64, 32, 128, 256, 16)
KEPT_BYTES = 2
"""Bytes a value of the second form of the key projection: float16, since requantising a transpose would lose more."""


class CpuMLA(Packs):
    """Absorbed for up to 127 new tokens of a sequence, expanded from 128 on; the two round differently. Over chosen
    tokens always absorbed; a sequence with no more tokens than may be chosen is attended to as without a choice.

    Options: `activations` and `kv_dtype`, as of cpu.attention.
    """

    id = "cpu.mla"
    spec_type = MLASpec
    handles = (
        MLA
        | nested("rope", FREQUENCIES)
        | nested("indexer.rope", FREQUENCIES)
        | {
            "cache.chosen",
            "indexer.rope",
            "indexer.gate",
            "indexer.cache.pool",
        }
    )
    fused = True
    options = packing.OPTIONS | {"kv_dtype"}
    long_step = 2048  # each step expands all latents before it

    def supports(self, spec: MLASpec, device: Capabilities) -> Supported | Unsupported:
        """Every native weight format; widths up to 1024."""
        if max(spec.latent + spec.rope_dim, spec.nope_dim + spec.rope_dim, spec.value_dim) > 1024:
            return Unsupported("heads wider than 1024")
        if spec.indexer and max(spec.indexer.heads, spec.indexer.head_dim) > 1024:
            return Unsupported("more than 1024 index heads, or wider ones")
        return packing.supports_formats(spec)

    def packed_bytes(self, spec: MLASpec, stored_bytes: int) -> int:
        """Stored bytes and, in float16, the key projection once more: transposed."""
        return stored_bytes + KEPT_BYTES * spec.heads * spec.nope_dim * spec.latent

    def page_sizes(self, spec: MLASpec) -> tuple[int, ...]:
        """Any of these that hold whole pools of index keys."""
        pool = (spec.indexer.cache.pool if spec.indexer else 0) or 1
        return tuple(size for size in PAGE_SIZES if size % pool == 0)

    def cache_bytes_per_token(self, spec: MLASpec) -> int:
        """In the default type."""
        return self.cache_bytes(spec, {})

    def cache_bytes(self, spec: MLASpec, options: Mapping[str, Any]) -> int:
        """In the type that option `kv_dtype` names."""
        kind = options.get("kv_dtype", DEFAULT_KV_TYPE)
        return row_bytes(kind, spec.latent + spec.rope_dim) + (_index_bytes(kind, spec.indexer) if spec.indexer else 0)

    def load(self, request: LoadRequest) -> CpuMLAModule:
        """Pack the projections and both forms of the key's."""
        return CpuMLAModule(request)


class CpuMLAModule:
    """x float32 [T, hidden], step -> float32 [T, hidden]; owns the layer's latents."""

    def __init__(self, request: LoadRequest) -> None:
        from ktcore_cpu import _native

        spec: MLASpec = request.spec  # type: ignore[assignment]
        self._hidden = spec.hidden
        self._row = spec.latent + spec.rope_dim
        self._kv_dtype = kv_dtype(request)
        self._pages = self._keys = self._rows = torch.empty(0)
        self._indexer = _indexer(request, spec.indexer) if spec.indexer else None
        self._index_width = spec.indexer.head_dim if spec.indexer else 0
        self._top_k = spec.indexer.cache.width if spec.indexer else 0
        self._pool = spec.indexer.cache.pool if spec.indexer else 0
        self._sparse = spec.indexer is not None or spec.shared_index
        k_absorb, k_expand, v = _up_projections(request, spec)
        more: dict[str, Any] = {**temperature_fields(spec.temperature), **_turns(request, spec.rope, "rope")}
        self._block = _native.MLABlock(
            request.runtime.pool,  # type: ignore[attr-defined]
            packing.pack(request, "q_a.weight") if spec.q_a is not None else None,
            packing.pack(request, "q_b.weight" if spec.q_a is not None else "q.weight"),
            packing.pack(request, "kv_a.weight"),
            k_absorb,
            k_expand,
            v,
            packing.pack(request, "o.weight"),
            heads=spec.heads,
            nope=spec.nope_dim,
            rope=spec.rope_dim,
            value=spec.value_dim,
            latent=spec.latent,
            softmax_scale=spec.scale,
            norm=packing.norm_weight(request.weights, "norm.weight", spec.norm),
            norm_eps=spec.norm.eps if spec.norm else 0.0,
            q_norm=packing.norm_weight(request.weights, "q_a_norm.weight", spec.q_a_norm),
            q_eps=spec.q_a_norm.eps if spec.q_a_norm else 0.0,
            kv_norm=_required(request, "kv_a_norm.weight"),
            kv_eps=spec.kv_a_norm.eps,
            residual=spec.residual,
            **more,
            exact=packing.exact(request),
        )

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Reserve pages of latents; the system backs them with memory as they are written."""
        self._pages = empty_rows((pages, page_size), self._row, self._kv_dtype)
        self._count, self._page_size = pages, page_size
        if self._indexer is not None:
            self._keys = empty_rows((pages, page_size // (self._pool or 1)), self._index_width, self._kv_dtype)
        if self._pool:
            self._rows = empty_rows((pages, page_size), 2 * self._index_width, self._kv_dtype)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """The latents, and the index keys where there are such."""
        if self._indexer is None:
            return (self._pages,)
        return (self._pages, self._keys, self._rows) if self._pool else (self._pages, self._keys)

    def __call__(self, x: torch.Tensor, step: StepBatch) -> torch.Tensor:
        x = packing.rows(x, self._hidden)
        out = torch.empty_like(x)
        places = (native_step(step), self._pages.data_ptr(), self._count, self._page_size, self._kv_dtype)
        if not self._sparse:
            self._block.forward(x.data_ptr(), out.data_ptr(), *places)
            return out
        if self._indexer is not None:
            chosen = torch.empty((x.shape[0], self._top_k), dtype=torch.int32)
            step.hand_on(chosen)
        else:
            chosen = step.handed_on().to("cpu", torch.int32).contiguous()
        self._block.forward_sparse(
            x.data_ptr(),
            out.data_ptr(),
            *places,
            self._indexer,
            self._keys.data_ptr(),
            chosen.data_ptr(),
            chosen.shape[1],
            self._rows.data_ptr() if self._pool else 0,
        )
        return out


def _index_bytes(kind: str, spec: TokenIndexerSpec) -> int:
    """Of a token: its key, or its key and gates and the share of a pool's key."""
    key, pool = row_bytes(kind, spec.head_dim), spec.cache.pool
    return row_bytes(kind, 2 * spec.head_dim) + -(-key // pool) if pool else key


def _indexer(request: LoadRequest, spec: TokenIndexerSpec) -> _native.TokenIndexer:
    from ktcore_cpu import _native

    # Any: places stands beside arguments of other types
    places: dict[str, Any] = {"ape": request.weights["indexer.ape"].tensor().float().numpy()} if spec.gate else {}
    return _native.TokenIndexer(
        request.runtime.pool,  # type: ignore[attr-defined]
        packing.pack(request, "indexer.q.weight"),
        packing.pack(request, "indexer.k.weight"),
        packing.pack(request, "indexer.weights.weight"),
        packing.pack(request, "indexer.gate.weight") if spec.gate else None,
        heads=spec.heads,
        dim=spec.head_dim,
        rope=spec.rope.dim if spec.rope else 0,
        top_k=spec.top_k,
        pool_tokens=spec.cache.pool,
        **_turns(request, spec.rope, "indexer.rope"),
        k_norm=_required(request, "indexer.k_norm"),
        k_bias=_required(request, "indexer.k_norm_bias"),
        eps=spec.eps,
        exact=packing.exact(request),
        **places,
    )


def _turns(request: LoadRequest, rope: RopeSpec | None, role: str) -> dict[str, Any]:
    """The rotary embedding as native blocks take it; None: no frequencies, nothing rotates."""
    if rope is None:
        return {"rope_pairing": "half", "inv_freq": None, "rope_scale": 1.0}
    divisors = request.weights[f"{role}.freq_factors"].tensor() if rope.freq_factors else None
    freq, factor = inverse_frequencies(rope, divisors)
    return {"rope_pairing": rope.pairing, "inv_freq": freq.numpy(), "rope_scale": factor}


def _up_projections(
    request: LoadRequest, spec: MLASpec
) -> tuple[_native.PackedMatrix, _native.PackedMatrix, _native.PackedMatrix]:
    """k_absorb [heads, latent, nope], k_expand [heads, nope, latent] and v [heads, value, latent], packed by head.

    One of the first two is what the file holds; the other is its transpose in float.
    """
    heads, nope, value, latent = spec.heads, spec.nope_dim, spec.value_dim, spec.latent
    if spec.split_kv_b:
        k, v = request.weights["k_b"], request.weights["v_b"]
        k_stored = _pack_heads(request, "k_b", k, (heads, latent, nope), lambda: k.raw().reshape(heads, latent, -1))
        k_other = _pack_float(request, k, (heads, nope, latent), lambda: k.tensor().view(heads, latent, nope))
        v_packed = _pack_heads(request, "v_b", v, (heads, value, latent), lambda: v.raw().reshape(heads, value, -1))
        return k_stored, k_other, v_packed
    both = request.weights["kv_b"]
    rows = nope + value
    k_stored = _pack_heads(
        request, "kv_b, keys", both, (heads, nope, latent), lambda: both.raw().reshape(heads, rows, -1)[:, :nope]
    )
    k_other = _pack_float(
        request, both, (heads, latent, nope), lambda: both.tensor().view(heads, rows, latent)[:, :nope]
    )
    v_packed = _pack_heads(
        request, "kv_b, values", both, (heads, value, latent), lambda: both.raw().reshape(heads, rows, -1)[:, nope:]
    )
    return k_other, k_stored, v_packed


def _pack_float(
    request: LoadRequest, weight: Weight, shape: tuple[int, int, int], keys: Callable[[], torch.Tensor]
) -> _native.PackedMatrix:
    """`shape` [heads, cols, rows], the transpose of the keys: float16, or float32 where results are to be exact."""
    wide = packing.exact(request) or weight.format == "F32"

    def raw() -> np.ndarray:
        values = keys().transpose(1, 2).contiguous().to(torch.float32 if wide else torch.float16).numpy()
        return values.view(np.uint8)

    return _pack_heads(request, "the transposed key projection", weight, shape, raw, "F32" if wide else "F16")


def _pack_heads(
    request: LoadRequest,
    what: str,
    weight: Weight,
    shape: tuple[int, int, int],
    raw: Callable[[], np.ndarray],
    format: str = "",
) -> _native.PackedMatrix:
    """raw uint8 [heads, rows, row bytes] with each head's rows padded to whole panels (zero bytes are zeros).

    Args:
        shape: heads, rows, and values of a row.
        format: of `raw`; "" is the weight's own.
    """
    heads, rows, cols = shape
    padded = -(-rows // packing.PANEL_ROWS) * packing.PANEL_ROWS

    def flat() -> np.ndarray:
        stored = raw()
        if padded != rows:
            stored = np.concatenate((stored, np.zeros((heads, padded - rows, stored.shape[2]), np.uint8)), 1)
        return np.ascontiguousarray(stored).reshape(heads * padded, -1)

    return packing.pack_matrix(request, what, format or weight.format, heads * padded, cols, weight, flat)


def _required(request: LoadRequest, role: str) -> np.ndarray:
    found = packing.vector(request.weights, role)
    if found is None:
        raise CheckpointError(f"{request.name}: weight '{role}' is missing")
    return found
