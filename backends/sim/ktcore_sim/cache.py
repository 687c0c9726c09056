"""The paged caches on the device: float32 rows, attention or a choice over them as one launch for the whole batch."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.mirror import mirrored
from ktcore.backend.pages import check_pages
from ktcore.ops.batch import StepBatch
from ktcore.ops.indexer import IndexCacheSpec
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore_sim.base import FLOAT_BYTES, SimImplementation, kernels
from ktcore_sim.capabilities import PAGE_SIZES


class SimKVCache(SimImplementation):
    """Both kinds of cache."""

    id = "sim.kv_cache"
    spec_type = KVCacheSpec
    handles = frozenset({"window", "chosen"})

    def supports(self, spec: KVCacheSpec, device: Capabilities) -> Supported | Unsupported:
        """ "gqa" and "mla"; a choice of tokens with "mla" alone."""
        if spec.chosen and spec.kind == "gqa":
            return Unsupported("a choice of tokens for each key head")
        return Supported() if spec.kind in ("gqa", "mla") else Unsupported(f"cache kind {spec.kind} is unknown")

    def load(self, request: LoadRequest) -> SimKVCacheModule:
        """No pages yet."""
        return SimKVCacheModule(request)

    def page_sizes(self, spec: KVCacheSpec) -> tuple[int, ...]:
        """Preferred first."""
        return PAGE_SIZES

    def cache_bytes_per_token(self, spec: KVCacheSpec) -> int:
        """Float32."""
        return spec.bytes_per_token(FLOAT_BYTES)


class SimPages:
    """One layer's pages: a row a token.

    Fresh pages hold the device's poison, so that reading a row that nobody wrote gives NaN.

    Args:
        width: values of a row.
    """

    def __init__(self, request: LoadRequest, width: int) -> None:
        self._name = request.name
        self._width = width
        self._runtime = request.runtime
        self._page_size = self._pages = 0
        self._rows = torch.empty(0, device=request.runtime.device)

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` pages of `page_size` tokens; earlier content is gone."""
        self._pages, self._page_size = pages, page_size
        # given back before the new ones are taken, or both would have to fit
        self._rows = torch.empty(0, device=self._runtime.device)
        self._rows = torch.empty(pages * page_size, self._width, device=self._runtime.device)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """The rows."""
        return (self._rows.view(self._pages, -1),)

    def store(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        """Write rows of the step's tokens, each in two pieces."""
        check_pages(self._name, step, self._pages, self._page_size)
        kernels().append(self._rows, mirrored(self._runtime, step, "sim.slots", StepBatch.slots), first, second)

    def places(self, step: StepBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block table, starts of queries and lengths of contexts, on the device."""
        check_pages(self._name, step, self._pages, self._page_size)
        return (
            mirrored(self._runtime, step, "sim.table", lambda b: b.block_table),
            mirrored(self._runtime, step, "sim.q_start", lambda b: torch.tensor(b.q_start, dtype=torch.int32)),
            mirrored(self._runtime, step, "sim.context", lambda b: torch.tensor(b.context_lens, dtype=torch.int32)),
        )


class SimKVCacheModule(SimPages):
    """A row of "gqa" is key and value of every head, of "mla" latent and rope key."""

    def __init__(self, request: LoadRequest) -> None:
        self.spec = cast(KVCacheSpec, request.spec)
        super().__init__(request, self.spec.bytes_per_token(1))

    def append(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        """Store keys and values, or latents and rope keys, of the step's tokens; shapes as in `KVCacheSpec`."""
        self.store(step, first, second)

    def attend(
        self, step: StepBatch, q: torch.Tensor, scale: float, chosen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of the step's queries over all that their sequences have cached -> [T, heads, value_dim]."""
        s = self.spec
        places = self.places(step)
        latent = s.kind == "mla"
        seen = chosen if s.chosen else None
        more = (step.page_size, scale, s.kv_heads, s.value_dim, latent, s.window, seen)
        return cast(torch.Tensor, kernels().attend(q, self._rows, *places, *more))


class SimIndexCache(SimImplementation):
    """Index keys, and the choice by their scores as one launch for the whole batch."""

    id = "sim.index_cache"
    spec_type = IndexCacheSpec

    def load(self, request: LoadRequest) -> SimIndexCacheModule:
        """No pages yet."""
        return SimIndexCacheModule(request)

    def page_sizes(self, spec: IndexCacheSpec) -> tuple[int, ...]:
        """Preferred first."""
        return PAGE_SIZES

    def cache_bytes_per_token(self, spec: IndexCacheSpec) -> int:
        """Float32."""
        return spec.bytes_per_token(FLOAT_BYTES)


class SimIndexCacheModule(SimPages):
    """A row is a token's index key."""

    def __init__(self, request: LoadRequest) -> None:
        self.spec = cast(IndexCacheSpec, request.spec)
        super().__init__(request, self.spec.dim)

    def append(self, step: StepBatch, keys: torch.Tensor) -> None:
        """Store the keys [T, dim] of the step's tokens."""
        half = self.spec.dim // 2
        self.store(step, keys[:, :half].contiguous(), keys[:, half:].contiguous())

    def choose(self, step: StepBatch, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """int32 [T, top_k], as `IndexCacheSpec` says."""
        places = self.places(step)
        found = kernels().choose(q, weights, self._rows, *places, step.page_size, self.spec.top_k)
        return cast(torch.Tensor, found)
