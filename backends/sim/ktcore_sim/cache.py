"""The paged KV cache on the device: float32 rows, attention over them as one launch for the whole batch."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.mirror import mirrored
from ktcore.backend.pages import check_pages
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore_sim.base import FLOAT_BYTES, SimImplementation, kernels
from ktcore_sim.capabilities import PAGE_SIZES


class SimKVCache(SimImplementation):
    """Both kinds of cache."""

    id = "sim.kv_cache"
    spec_type = KVCacheSpec
    handles = frozenset({"window"})

    def supports(self, spec: KVCacheSpec, device: Capabilities) -> Supported | Unsupported:
        """ "gqa" and "mla"."""
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


class SimKVCacheModule:
    """One layer's pages: a row a token. A row of "gqa" is key and value of every head, of "mla" latent and rope key.

    Fresh pages hold the device's poison, so that reading a row that nobody wrote gives NaN.
    """

    def __init__(self, request: LoadRequest) -> None:
        self.spec = cast(KVCacheSpec, request.spec)
        self._name = request.name
        self._runtime = request.runtime
        self._page_size = self._pages = 0
        self._rows = torch.empty(0, device=request.runtime.device)

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` pages of `page_size` tokens; earlier content is gone."""
        width = self.spec.bytes_per_token(1)
        self._pages, self._page_size = pages, page_size
        # given back before the new ones are taken, or both would have to fit
        self._rows = torch.empty(0, device=self._runtime.device)
        self._rows = torch.empty(pages * page_size, width, device=self._runtime.device)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """The rows."""
        return (self._rows.view(self._pages, -1),)

    def append(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        """Store keys and values, or latents and rope keys, of the step's tokens; shapes as in `KVCacheSpec`."""
        self._check(step)
        kernels().append(self._rows, mirrored(self._runtime, step, "sim.slots", StepBatch.slots), first, second)

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Causal attention of the step's queries over all that their sequences have cached -> [T, heads, value_dim]."""
        self._check(step)
        s = self.spec
        result = kernels().attend(
            q,
            self._rows,
            mirrored(self._runtime, step, "sim.table", lambda b: b.block_table),
            mirrored(self._runtime, step, "sim.q_start", lambda b: torch.tensor(b.q_start, dtype=torch.int32)),
            mirrored(self._runtime, step, "sim.context", lambda b: torch.tensor(b.context_lens, dtype=torch.int32)),
            step.page_size,
            scale,
            s.kv_heads,
            s.value_dim,
            s.kind == "mla",
            s.window,
        )
        return cast(torch.Tensor, result)

    def _check(self, step: StepBatch) -> None:
        check_pages(self._name, step, self._pages, self._page_size)
