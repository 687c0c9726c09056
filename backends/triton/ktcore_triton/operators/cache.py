"""The paged KV cache in 16 bits, and attention over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.branches import step_positions
from ktcore.backend.loading import compute_dtype
from ktcore.backend.mirror import mirrored
from ktcore.backend.pages import check_pages
from ktcore.backend.runtime import DeviceRuntime
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore_triton.operators.base import HALF_BYTES, TritonImplementation
from ktcore_triton.tuning import Tuning

if TYPE_CHECKING:
    from ktcore_triton.attention import Pages

PAGE_SIZES = (64, 32, 16, 128)


class TritonKVCache(TritonImplementation):
    """Grouped queries with window, chunk and sinks; latents of MLA with a rank that is a power of two; choices."""

    spec_type = KVCacheSpec
    handles = frozenset({"window", "chunk", "sinks", "chosen"})
    options = frozenset({"compute"})

    def supports(self, spec: KVCacheSpec, device: Capabilities) -> Supported | Unsupported:
        """As the kernels take them."""
        rank = spec.value_dim
        if spec.kind == "mla" and rank & (rank - 1):
            return Unsupported(f"a latent rank that is no power of two ({rank})")
        if spec.kind == "mla" and (spec.window or spec.chunk or spec.sinks):
            return Unsupported("a window, chunks or sinks over latents")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """No pages yet."""
        return TritonKVCacheModule(request, self.tuning(request.device))

    def page_sizes(self, spec: KVCacheSpec) -> tuple[int, ...]:
        """Preferred first; the kernels take any."""
        return PAGE_SIZES

    def cache_bytes_per_token(self, spec: KVCacheSpec) -> int:
        """16 bits a value."""
        return spec.bytes_per_token(HALF_BYTES)


class TritonKVCacheModule:
    """One layer's pages. Keys and values of "gqa" lie apart; of "mla" a row holds the latent, then the rotary key."""

    def __init__(self, request: LoadRequest, tuning: Tuning) -> None:
        self.spec = cast(KVCacheSpec, request.spec)
        self._name = request.name
        self._runtime = request.runtime
        self._compute = compute_dtype(request)
        self._tuning = tuning
        self._pages = self._page_size = 0
        self._first = self._second = torch.empty(0, device=request.runtime.device)

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` pages of `page_size` tokens; earlier content is gone."""
        spec, device = self.spec, self._runtime.device
        self._pages, self._page_size = pages, page_size
        # given back before the new ones are taken, or both would have to fit
        self._first = self._second = torch.empty(0, device=device)
        rows = pages * page_size
        if spec.kind == "mla":
            self._first = torch.empty(rows, spec.key_dim, dtype=self._compute, device=device)
            return
        self._first = torch.empty(rows, spec.kv_heads, spec.key_dim, dtype=self._compute, device=device)
        self._second = torch.empty(rows, spec.kv_heads, spec.value_dim, dtype=self._compute, device=device)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """Keys and values; of "mla" latents and rotary keys together."""
        if self.spec.kind == "mla":
            return (self._first.view(self._pages, -1),)
        return self._first.view(self._pages, -1), self._second.view(self._pages, -1)

    def append(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        """Store keys and values, or latents and rope keys, of the step's tokens; shapes as in `KVCacheSpec`."""
        from ktcore_triton.rows import cache_write

        self._check(step)
        slots = mirrored(self._runtime, step, "slots", StepBatch.slots)
        latent = self.spec.kind == "mla"
        cache_write(first.contiguous(), slots, self._first)
        cache_write(
            second.contiguous(), slots, self._first if latent else self._second, self.spec.value_dim if latent else 0
        )

    def attend(
        self,
        step: StepBatch,
        q: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of the step's queries over what their sequences have cached -> [T, heads, value_dim]."""
        from ktcore_triton.attention import Sight, latent_attention, paged_attention
        from ktcore_triton.chosen import Chosen, chosen_attention

        self._check(step)
        spec = self.spec
        pages = step_pages(self._runtime, step)
        group = spec.heads if spec.kind == "mla" else spec.heads // spec.kv_heads
        tiles = self._tuning.attention(pages.most_queries * group, spec.value_dim)
        q = q.contiguous()
        if spec.chosen:
            if chosen is None:
                raise BackendError(f"{self._name}: attention over chosen tokens is not told which ones")
            seen = Chosen(chosen, step_positions(self._runtime, step), owners(self._runtime, step))
            values = None if spec.kind == "mla" else self._second
            return chosen_attention(
                q, self._first, values, seen, pages, scale, spec.value_dim, sight=Sight(spec.window, spec.chunk),
                sinks=sinks, tiles=tiles, compute=self._compute,
            )  # fmt: skip
        if spec.kind == "mla":
            return latent_attention(q, self._first, pages, scale, spec.value_dim, tiles=tiles, compute=self._compute)
        return paged_attention(
            q,
            self._first,
            self._second,
            pages,
            scale,
            sight=Sight(spec.window, spec.chunk),
            sinks=sinks,
            tiles=tiles,
            compute=self._compute,
        )

    def _check(self, step: StepBatch) -> None:
        check_pages(self._name, step, self._pages, self._page_size)


def step_pages(runtime: DeviceRuntime, step: StepBatch) -> Pages:
    """The step's sequences on the device."""
    from ktcore_triton.attention import Pages

    return Pages(
        mirrored(runtime, step, "q_start", lambda s: torch.tensor(s.q_start, dtype=torch.int32)),
        mirrored(runtime, step, "context_lens", lambda s: torch.tensor(s.context_lens, dtype=torch.int32)),
        mirrored(runtime, step, "block_table", lambda s: s.block_table),
        step.page_size,
        max((b - a for a, b in zip(step.q_start, step.q_start[1:], strict=False)), default=0),
    )


def owners(runtime: DeviceRuntime, step: StepBatch) -> torch.Tensor:
    """int32 [T] on the device: which of the step's sequences a token is of."""
    return mirrored(runtime, step, "owners", _owners)


def _owners(step: StepBatch) -> torch.Tensor:
    lengths = torch.tensor(step.q_start).diff()
    return torch.arange(step.sequences, dtype=torch.int32).repeat_interleave(lengths)
