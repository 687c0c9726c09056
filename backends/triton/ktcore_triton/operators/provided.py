"""A latent cache whose decode steps go to another package's kernel, where that is installed; prompts stay with ours."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from ktcore.backend import Capabilities, LoadRequest, Module, Supported, Unsupported
from ktcore.backend.runtime import DeviceRuntime
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore_triton.operators.cache import TritonKVCache, TritonKVCacheModule
from ktcore_triton.tuning import Tuned, Tuning

LATENT, ROPE = 512, 64


class ProvidedLatentCache(TritonKVCache):
    """Latents of 512 beside rotary keys of 64 (DeepSeek-V2, V3, Kimi-K2), in 16 bits.

    Steps of one token a sequence go to the package; prompts, and steps with guesses, to the shared Triton kernel over
    the same pages. Not captured in graphs: what the package prepares for a step is its own affair.

    Attributes:
        package: the module that must be importable.
        chips: architectures that its kernel runs on.
        heads: numbers of query heads that it takes; empty: any.
        page: tokens a page, where it takes one size only; None: any.
    """

    capturable = False
    handles = frozenset()
    package: str
    name: str
    chips: Sequence[str]
    heads: Sequence[int] = ()
    page: int | None = None

    def __init__(self, backend: str, tuning: Tuned) -> None:
        super().__init__(backend, tuning)
        self.id = f"{backend}.{self.name}"

    def supports(self, spec: KVCacheSpec, device: Capabilities) -> Supported | Unsupported:
        """As the package documents its kernel; without a live device, that it will be installed."""
        if spec.kind != "mla" or (spec.value_dim, spec.key_dim) != (LATENT, LATENT + ROPE):
            return Unsupported("it attends over latents of 512 with rotary keys of 64")
        if self.heads and spec.heads not in self.heads:
            return Unsupported(f"{spec.heads} query heads: it takes {', '.join(map(str, self.heads))}")
        arch = device.properties.get("arch")
        if arch not in self.chips:
            return Unsupported(f"{arch}: it runs on {', '.join(self.chips)}")
        if device.live and find_spec(self.package) is None:
            return Unsupported(f"the package {self.package} is not installed")
        return super().supports(spec, device)

    def page_sizes(self, spec: KVCacheSpec) -> tuple[int, ...]:
        """The package's, or any."""
        return super().page_sizes(spec) if self.page is None else (self.page,)

    def load(self, request: LoadRequest) -> Module:
        """No pages yet."""
        return ProvidedLatentCacheModule(request, self.tuning(request.device), self)

    @abstractmethod
    def decode(
        self, runtime: DeviceRuntime, step: StepBatch, q: torch.Tensor, rows: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of one query a sequence.

        Args:
            q: [n, heads, 576] in the cache's type, the absorbed part first.
            rows: [pages * page_size, 576], the cache.

        Returns:
            [n, heads, 512].
        """


class ProvidedLatentCacheModule(TritonKVCacheModule):
    """One layer's latents, a row a token."""

    def __init__(self, request: LoadRequest, tuning: Tuning, provider: ProvidedLatentCache) -> None:
        super().__init__(request, tuning)
        self._provider = provider

    def attend(
        self,
        step: StepBatch,
        q: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of the step's queries over all that their sequences have cached -> [T, heads, value_dim]."""
        if step.tokens != step.sequences:
            return super().attend(step, q, scale, sinks, chosen)
        self._check(step)
        out = self._provider.decode(self._runtime, step, q.to(self._compute).contiguous(), self._first, scale)
        return out.float()
