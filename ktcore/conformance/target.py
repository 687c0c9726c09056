"""The backend under test: its implementations, its open device, and how data gets there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.handles import answer
from ktcore.backend.implementation import CacheOwner, Implementation, LoadRequest, Module, StateOwner, Unsupported
from ktcore.backend.reference import reference_implementations
from ktcore.backend.registry import Registry
from ktcore.backend.runtime import DeviceRuntime
from ktcore.conformance.case import Context
from ktcore.conformance.data.memory import own_weights
from ktcore.conformance.expectations import Expectations, Precision
from ktcore.ops import Spec
from ktcore.weights.ref import Weight


@dataclass
class Loaded:
    """A spec loaded with one implementation, parts included.

    Attributes:
        answered_by: implementation ids of it and its parts.
        caches: what holds KV pages, with the page sizes it takes.
        states: what holds recurrent states.
        on_stream: enters the stream that the module is called on.
    """

    id: str
    module: Module
    precision: Precision
    answered_by: list[str] = field(default_factory=list)
    caches: list[tuple[CacheOwner, tuple[int, ...]]] = field(default_factory=list)
    states: list[StateOwner] = field(default_factory=list)
    on_stream: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Page sizes that every cache inside takes, preferred first."""
        common = [sizes for _, sizes in self.caches]
        return tuple(s for s in common[0] if all(s in other for other in common)) if common else ()

    def allocate(self, pages: int, page_size: int) -> None:
        """Make room in every cache inside."""
        # a cache that fills its pages on another stream may do so when the first keys are there already
        with self.on_stream():
            for cache, _ in self.caches:
                cache.allocate_pages(pages, page_size)

    def allocate_states(self, slots: int) -> None:
        """Make room in every recurrent state inside."""
        with self.on_stream():
            for state in self.states:
                state.allocate_states(slots)


class Target:
    """One backend, one device.

    Args:
        registry: where the backend was found.
        name: the backend's name.
    """

    def __init__(self, registry: Registry, name: str, expectations: Expectations, index: int = 0) -> None:
        self.registry = registry
        self.name = name
        self.index = index
        self.expectations = expectations
        found = registry.implementations()
        self.implementations = [i for i in found.values() if i.id.partition(".")[0] == name]
        self._references = {i.spec_type: i for i in reference_implementations()}
        self._runtime: DeviceRuntime | None = None
        self._stream: Any = None

    @property
    def runtime(self) -> DeviceRuntime:
        """The device, opened at the first use.

        Raises:
            BackendError: it does not open.
        """
        if self._runtime is None:
            self._runtime = self.registry.runtime(f"{self.name}:{self.index}")
        return self._runtime

    @property
    def stream(self) -> Any:
        """The stream that operators are called on."""
        if self._stream is None:
            self._stream = self.runtime.new_stream()
        return self._stream

    @property
    def is_host(self) -> bool:
        """Whether tensors of the device are ordinary host memory."""
        return self.runtime.device.type == "cpu"

    @property
    def device(self) -> Capabilities:
        """What the open device can do."""
        return self.runtime.capabilities()

    def close(self) -> None:
        """Release the device."""
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = self._stream = None

    def load(
        self, ctx: Context, spec: Spec, weights: Mapping[str, Weight], options: Mapping[str, Any] | None = None
    ) -> list[Loaded]:
        """`spec` by every implementation of the backend that takes it, else by the reference, noted as a fallback.

        Raises:
            NotApplicable: the backend implements the operator, but not this.
        """
        own = [i for i in self.implementations if i.spec_type is type(spec)]
        if not own:
            ctx.fallback(f"no {self.name}.* implementation of {spec.op}")
            return [self._loaded(ctx, self._references[type(spec)], spec, weights, options)]
        answers = [(i, answer(i, spec, self.device)) for i in own]
        taken = [i for i, said in answers if not isinstance(said, Unsupported)]
        if not taken:
            reasons = "; ".join(f"{i.id}: {a.reason}" for i, a in answers if isinstance(a, Unsupported))
            ctx.not_applicable(reasons)
        return [self._loaded(ctx, i, spec, weights, options) for i in taken]

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of `x` on the device, by way of a pinned buffer."""
        if self.is_host:
            return x.clone()
        staged = self.runtime.pinned_buffer(tuple(x.shape), x.dtype)
        staged.copy_(x)
        # memory belongs to the stream it is made on: one that only that stream uses may be dropped at any time
        with self.runtime.use_stream(self.stream):
            there = torch.empty(x.shape, dtype=x.dtype, device=self.runtime.device)
        self.runtime.copy_async(there, staged, self.stream)
        self.runtime.synchronize(self.stream)
        return there

    def get(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of a result on the CPU, when all work before it is done."""
        if x.device.type == "cpu":
            self.runtime.synchronize()
            return x.clone()
        self.runtime.synchronize(self.stream)
        back = self.runtime.pinned_buffer(tuple(x.shape), x.dtype)
        # a dense copy of a strided result is work of the device too: on the same stream, and alive until it is done
        with self.runtime.use_stream(self.stream):
            dense = x.contiguous()
        self.runtime.copy_async(back, dense, self.stream)
        self.runtime.synchronize(self.stream)
        return back.clone()

    def restore(self, there: torch.Tensor, held: torch.Tensor) -> None:
        """Copy `held`, which lies on the CPU, into memory of the device."""
        if there.device.type == "cpu":
            there.copy_(held)
            return
        staged = self.runtime.pinned_buffer(tuple(held.shape), held.dtype)
        staged.copy_(held)
        self.runtime.copy_async(there, staged, self.stream)
        self.runtime.synchronize(self.stream)

    def call(self, module: Module, *arguments: Any) -> Any:
        """Call a module with CPU tensors as arguments; tensors it returns come back to the CPU."""
        there = [self.put(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with torch.inference_mode(), self.runtime.use_stream(self.stream):
            result = module(*there)
        if isinstance(result, tuple):
            return tuple(self.get(r) for r in result)
        if isinstance(result, torch.Tensor):
            return self.get(result)
        # nothing to fetch, but the arguments must live until the work is done
        self.runtime.synchronize(self.stream)
        return result

    def _loaded(
        self,
        ctx: Context,
        chosen: Implementation,
        spec: Spec,
        weights: Mapping[str, Weight],
        options: Mapping[str, Any] | None,
    ) -> Loaded:
        whole = Loaded(chosen.id, None, self._precision(chosen, spec), [chosen.id], on_stream=self._on_stream)
        children: dict[str, Module] = {}
        if not chosen.fused:
            for role, part in spec.children().items():
                loaded = self._part(ctx, part, own_weights(weights, f"{role}."))
                children[role] = loaded.module
                whole.answered_by += loaded.answered_by
                whole.caches += loaded.caches
                whole.states += loaded.states
                whole.precision = whole.precision.merged(loaded.precision)
        own = weights if chosen.fused else {role: w for role, w in weights.items() if "." not in role}
        request = LoadRequest(ctx.case.id, spec, dict(own), self.runtime, self.device, children, dict(options or {}))
        with self.runtime.use_stream(self.stream):
            whole.module = chosen.load(request)
        if isinstance(whole.module, CacheOwner):
            whole.caches.append((whole.module, chosen.page_sizes(spec)))
        if isinstance(whole.module, StateOwner):
            whole.states.append(whole.module)
        return whole

    def _on_stream(self) -> AbstractContextManager[None]:
        return self.runtime.use_stream(self.stream)

    def _precision(self, chosen: Implementation, spec: Spec) -> Precision:
        """Declared by the backend for its own; a reference is torch in float32, which is batch dependent."""
        formats = spec.formats() if chosen.fused or not spec.children() else ()
        return self.expectations.precision_of(chosen.id, formats)

    def _part(self, ctx: Context, spec: Spec, weights: Mapping[str, Weight]) -> Loaded:
        for item in self.implementations:
            if item.spec_type is type(spec) and not isinstance(answer(item, spec, self.device), Unsupported):
                return self._loaded(ctx, item, spec, weights, None)
        ctx.fallback(f"part {spec.op}: answered by the reference")
        return self._loaded(ctx, self._references[type(spec)], spec, weights, None)
