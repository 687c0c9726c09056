"""The paged KV cache, written by `npu_scatter_nd_update_` and read by `npu_fused_infer_attention_score`.

Limits of the attention in layout TND with pages (op-plugin `torch_npu-npu_fused_infer_attention_score.md`, Atlas A2 and
A3): heads of 128 or 192, narrower ones are padded with zeros; up to 256 query heads, at most 64 a key head; pages a
multiple of 16 up to 1024 tokens, [pages, page, kv_heads * D] with the last up to 65535. Latents are 512 wide beside a
rotary key of 64, each in a cache of its own; the query heads are a power of two up to 128, and a request has at most 16
query tokens, so that longer ones are cut into requests over the same pages.
"""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.loading import compute_dtype
from ktcore.backend.mirror import mirrored
from ktcore.backend.pages import check_pages
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore_npu.operators.base import HALF_BYTES, NpuImplementation, npu
from ktcore_npu.operators.fused_attention import fused_attention

PAGE_SIZES = (128, 64, 32, 16, 256, 512)
WIDTHS = (128, 192)
LATENT, ROPE = 512, 64
QUERIES = 16
HEADS_A_KEY, MOST_HEADS, MOST_LATENT_HEADS, WIDEST = 64, 256, 128, 65535


class NpuKVCache(NpuImplementation):
    """Grouped queries, and latents of MLA."""

    spec_type = KVCacheSpec
    options = frozenset({"compute"})

    def supports(self, spec: KVCacheSpec, device: Capabilities) -> Supported | Unsupported:
        """As the operator's documented limits say."""
        if spec.kind == "mla":
            return self._latent(spec, device)
        if max(spec.key_dim, spec.value_dim) > WIDTHS[-1]:
            return Unsupported(f"heads of {max(spec.key_dim, spec.value_dim)}: over pages they go up to {WIDTHS[-1]}")
        if spec.heads > MOST_HEADS or spec.heads // spec.kv_heads > HEADS_A_KEY:
            return Unsupported(
                f"{spec.heads} query heads over {spec.kv_heads}: at most {MOST_HEADS}, and {HEADS_A_KEY} a key head"
            )
        if spec.kv_heads * _width(spec) > WIDEST:
            return Unsupported(f"a row of {spec.kv_heads} heads of {_width(spec)}: at most {WIDEST} values")
        return super().supports(spec, device)

    def _latent(self, spec: KVCacheSpec, device: Capabilities) -> Supported | Unsupported:
        if spec.value_dim > LATENT or spec.key_dim - spec.value_dim > ROPE:
            return Unsupported(f"latents of {spec.value_dim} + {spec.key_dim - spec.value_dim}: at most 512 + 64")
        if spec.heads > MOST_LATENT_HEADS:
            return Unsupported(f"{spec.heads} heads over latents: at most {MOST_LATENT_HEADS}")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """No pages yet."""
        return LatentCache(request) if cast(KVCacheSpec, request.spec).kind == "mla" else GroupedCache(request)

    def page_sizes(self, spec: KVCacheSpec) -> tuple[int, ...]:
        """Preferred first."""
        return PAGE_SIZES

    def cache_bytes_per_token(self, spec: KVCacheSpec) -> int:
        """16 bits a value, padding included."""
        return HALF_BYTES * (LATENT + ROPE if spec.kind == "mla" else 2 * spec.kv_heads * _width(spec))


class _Cache:
    """Two tensors [pages * page_size, width] in 16 bits: keys and values, or latents and rotary keys."""

    def __init__(self, request: LoadRequest, widths: tuple[int, int]) -> None:
        self.spec = cast(KVCacheSpec, request.spec)
        self._name = request.name
        self._runtime = npu(request)
        self._compute = compute_dtype(request)
        self._widths = widths
        self._pages = self._page_size = 0
        self._first = self._second = torch.empty(0, device=request.runtime.device)
        self._runtime.causal_mask()

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` pages of `page_size` tokens; earlier content is gone."""
        self._pages, self._page_size = pages, page_size
        # given back before the new ones are taken, or both would have to fit
        self._first = self._second = torch.empty(0, device=self._runtime.device)
        # zeros: a masked key that is no number would make the sum none
        self._first, self._second = (
            torch.zeros(pages * page_size, width, dtype=self._compute, device=self._runtime.device)
            for width in self._widths
        )
        # whatever stream was current: steps run on another one
        self._runtime.synchronize()

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """Keys and values, or latents and rotary keys."""
        return self._first.view(self._pages, -1), self._second.view(self._pages, -1)

    def append(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        """Store keys and values, or latents and rope keys, of the step's tokens; shapes as in `KVCacheSpec`."""
        self._check(step)
        slots = mirrored(self._runtime, step, "npu.slots", lambda s: s.slots()[:, None])
        for cache, rows in ((self._first, first), (self._second, second)):
            wide = self._padded(rows, cache.shape[1] // (rows.shape[1] if rows.dim() == 3 else 1))
            # indices [T, 1] choose rows: updates are [T, width], in place (op-plugin `npu_scatter_nd_update_`)
            self._runtime.ops.npu_scatter_nd_update_(cache, slots, wide.reshape(rows.shape[0], -1))

    def _padded(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """Rows in 16 bits, contiguous, zeros up to `width` in the last axis."""
        missing = width - rows.shape[-1]
        rows = rows.to(self._compute)
        return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()

    def _check(self, step: StepBatch) -> None:
        check_pages(self._name, step, self._pages, self._page_size)


class GroupedCache(_Cache):
    """Keys and values [pages, page, kv_heads * D], one call for the whole ragged batch."""

    def __init__(self, request: LoadRequest) -> None:
        spec = cast(KVCacheSpec, request.spec)
        self._width = _width(spec)
        super().__init__(request, (spec.kv_heads * self._width,) * 2)

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Causal attention of the step's queries over all that their sequences have cached -> [T, heads, value_dim]."""
        self._check(step)
        spec, shape = self.spec, (self._pages, self._page_size, -1)
        seen = fused_attention(
            self._runtime,
            step,
            lambda s: (list(s.q_start[1:]), list(s.context_lens)),
            self._padded(q, self._width),
            key=self._first.view(shape),
            value=self._second.view(shape),
            block_table=mirrored(self._runtime, step, "npu.block_table", lambda s: s.block_table.clamp(min=0)),
            block_size=self._page_size,
            num_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            scale=scale,
        )
        return seen[..., : spec.value_dim].float()


class LatentCache(_Cache):
    """Latents [pages, 1, page, 512] and rotary keys [pages, 1, page, 64]."""

    def __init__(self, request: LoadRequest) -> None:
        super().__init__(request, (LATENT, ROPE))
        self._heads = 1 << (self.spec.heads - 1).bit_length()

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float) -> torch.Tensor:
        """The same over latents; q [T, heads, key_dim] holds the absorbed part first."""
        self._check(step)
        spec, page = self.spec, self._page_size
        latent, rope = q[..., : spec.value_dim], q[..., spec.value_dim :]
        more = self._heads - spec.heads
        if more:
            latent, rope = (torch.nn.functional.pad(part, (0, 0, 0, more)) for part in (latent, rope))
        rows = self._first.view(self._pages, 1, page, LATENT)
        seen = fused_attention(
            self._runtime,
            step,
            _request_lengths,
            self._padded(latent, LATENT),
            query_rope=self._padded(rope, ROPE),
            key=rows,
            value=rows,
            key_rope=self._second.view(self._pages, 1, page, ROPE),
            block_table=mirrored(self._runtime, step, "npu.request_table", _request_table),
            block_size=page,
            num_heads=self._heads,
            num_key_value_heads=1,
            scale=scale,
        )
        return seen[:, : spec.heads, : spec.value_dim].float()


def requests(step: StepBatch) -> list[tuple[int, int, int]]:
    """(sequence, end of its queries, keys that it sees) of every request: at most 16 queries of one sequence."""

    def cut(s: StepBatch) -> list[tuple[int, int, int]]:
        found = []
        for i in range(s.sequences):
            start, end = s.q_start[i], s.q_start[i + 1]
            before = s.context_lens[i] - (end - start)
            for stop in (*range(start + QUERIES, end, QUERIES), *([end] if end > start else [])):
                found.append((i, stop, before + stop - start))
        return found

    return step.derived("npu.requests", cut)


def _request_lengths(step: StepBatch) -> tuple[list[int], list[int]]:
    found = requests(step)
    return [end for _, end, _ in found], [seen for _, _, seen in found]


def _request_table(step: StepBatch) -> torch.Tensor:
    rows = torch.tensor([i for i, _, _ in requests(step)], dtype=torch.int64)
    return step.block_table.clamp(min=0)[rows]


def _width(spec: KVCacheSpec) -> int:
    widest = max(spec.key_dim, spec.value_dim)
    return next((w for w in WIDTHS if widest <= w), widest)
