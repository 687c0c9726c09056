"""The paged KV cache over the SYCL kernels, ids "xpu.sycl_kv_cache"."""

from __future__ import annotations

from typing import cast

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.loading import compute_dtype
from ktcore.backend.mirror import mirrored
from ktcore.backend.pages import check_pages
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore_xpu.sycl.launcher import LANES, launcher_for
from ktcore_xpu.sycl.operators import SyclImplementation

PAGE_SIZES = (64, 32, 16, 128)
HALF_BYTES = 2


class SyclKVCache(SyclImplementation):
    """Grouped queries with window, chunk and sinks, and the latent cache of MLA, in 16 bits."""

    id = "xpu.sycl_kv_cache"
    spec_type = KVCacheSpec
    handles = frozenset({"window", "chunk", "sinks"})

    def supports(self, spec: KVCacheSpec, device: Capabilities) -> Supported | Unsupported:
        """Widths that fill sub-groups."""
        if spec.key_dim % LANES or spec.value_dim % LANES:
            return Unsupported(
                f"keys of {spec.key_dim} and values of {spec.value_dim}: multiples of {LANES} are needed"
            )
        if spec.kind == "mla" and spec.sinks:
            return Unsupported("a latent cache with sinks")
        return super().supports(spec, device)

    def load(self, request: LoadRequest) -> Module:
        """No pages yet."""
        return SyclKVCacheModule(request)

    def page_sizes(self, spec: KVCacheSpec) -> tuple[int, ...]:
        """Preferred first; the kernels take any."""
        return PAGE_SIZES

    def cache_bytes_per_token(self, spec: KVCacheSpec) -> int:
        """16 bits a value."""
        return spec.bytes_per_token(HALF_BYTES)


class SyclKVCacheModule:
    """One layer's pages. Keys and values of "gqa" lie apart; of "mla" a row holds the latent, then the rotary key."""

    def __init__(self, request: LoadRequest) -> None:
        self.spec = cast(KVCacheSpec, request.spec)
        self._name = request.name
        self._runtime = request.runtime
        self._launcher = launcher_for(request.runtime)
        self._type = compute_dtype(request)
        self._pages = self._page_size = 0
        self._first = self._second = torch.empty(0, device=request.runtime.device)

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` pages of `page_size` tokens; earlier content is gone."""
        spec, device = self.spec, self._runtime.device
        self._pages, self._page_size = pages, page_size
        # given back before the new ones are taken, or both would have to fit
        self._first = self._second = torch.empty(0, device=device)
        rows, heads = pages * page_size, 1 if spec.kind == "mla" else spec.kv_heads
        self._first = torch.empty(rows, heads, spec.key_dim, dtype=self._type, device=device)
        if spec.kind == "gqa":
            self._second = torch.empty(rows, heads, spec.value_dim, dtype=self._type, device=device)

    def page_tensors(self) -> tuple[torch.Tensor, ...]:
        """Keys and values; of "mla" latents and rotary keys together."""
        if self.spec.kind == "mla":
            return (self._first.view(self._pages, -1),)
        return self._first.view(self._pages, -1), self._second.view(self._pages, -1)

    def append(self, step: StepBatch, first: torch.Tensor, second: torch.Tensor) -> None:
        """Store keys and values, or latents and rope keys, of the step's tokens; shapes as in `KVCacheSpec`."""
        self._check(step)
        slots = mirrored(self._runtime, step, "slots", StepBatch.slots)
        if self.spec.kind == "mla":
            row = torch.cat((first, second), -1)[:, None]
            self._first.index_copy_(0, slots, row.to(self._type))
            return
        self._first.index_copy_(0, slots, first.to(self._type))
        self._second.index_copy_(0, slots, second.to(self._type))

    def attend(self, step: StepBatch, q: torch.Tensor, scale: float, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Causal attention of the step's queries over all that their sequences have cached -> [T, heads, value_dim]."""
        from ktcore_xpu.sycl.attention import Places, attention

        self._check(step)
        spec = self.spec
        places = Places(
            mirrored(self._runtime, step, "sycl.sequence", token_sequences),
            mirrored(self._runtime, step, "sycl.visible", visible_keys),
            mirrored(self._runtime, step, "block_table", lambda s: s.block_table),
            step.page_size,
        )
        return attention(
            self._launcher,
            q.contiguous(),
            self._first,
            None if spec.kind == "mla" else self._second,
            places,
            scale,
            spec.value_dim,
            window=spec.window,
            chunk=spec.chunk,
            sinks=sinks,
        )

    def _check(self, step: StepBatch) -> None:
        check_pages(self._name, step, self._pages, self._page_size)


def token_sequences(step: StepBatch) -> torch.Tensor:
    """int32 [T]: the sequence of each query token."""
    lengths = torch.tensor(step.q_start, dtype=torch.int64).diff()
    return torch.repeat_interleave(torch.arange(step.sequences, dtype=torch.int32), lengths)


def visible_keys(step: StepBatch) -> torch.Tensor:
    """int32 [T]: how many keys of its sequence each query token may see, its own included."""
    starts, contexts = torch.tensor(step.q_start), torch.tensor(step.context_lens)
    which = token_sequences(step).long()
    return (contexts[which] - starts[1:][which] + torch.arange(step.tokens) + 1).int()
