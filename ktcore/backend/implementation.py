"""An implementation: one way to run one operator on one kind of device, and the module it loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ktcore.backend.capabilities import Capabilities
from ktcore.backend.runtime import DeviceRuntime
from ktcore.ops.base import Spec
from ktcore.weights.packed.parts import PackedParts
from ktcore.weights.ref import Weight

if TYPE_CHECKING:
    import torch

Module = Any
"""A loaded operator: a callable with the signature that its spec's docstring gives."""


@dataclass(frozen=True)
class Supported:
    """The implementation runs the spec. Which of several does is the business of rules."""


@dataclass(frozen=True)
class Unsupported:
    """The implementation does not run the spec, and why, in words for the user."""

    reason: str


Support = Supported | Unsupported


@dataclass(frozen=True)
class LoadRequest:
    """All that `load` may use.

    Attributes:
        name: the node's name, for error messages.
        weights: role -> opened weight; for a fused implementation also those of the parts, by dotted role ("q.weight").
        children: role -> loaded module of each part; empty for a fused implementation.
        options: the rule's options for this node.
        packed: packed weights on disk, which an implementation may take its own from and leave them in; None: there
            are none.
    """

    name: str
    spec: Spec
    weights: Mapping[str, Weight]
    runtime: DeviceRuntime
    device: Capabilities
    children: Mapping[str, Module] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    packed: PackedParts | None = None


class Implementation(ABC):
    """One way to run one operator. Inert until `load`: a backend lists its implementations without touching a device.

    Attributes:
        id: "backend.name", unique among all backends ("cpu.linear").
        spec_type: the operator spec that it implements.
        handles: names of the spec's fields whose values other than their defaults it computes; of parts that a fused
            implementation computes itself, by dotted role ("cache.sinks"), and of plain values likewise
            ("scaling.mscale"). A spec with any other such value is refused before `supports` is asked
            (`ktcore.backend.handles`), so a field that ktcore adds later is never ignored.
        fused: True when it runs a composite with all of its parts; False when the parts are chosen one by one.
        options: names of the rule options that `load` understands.
        capturable: calls of its modules may be recorded in a device graph and replayed: they take what changes from
            step to step from device memory (`ktcore.backend.mirror.mirrored`) and never wait for the device.
        long_step: tokens that a step of one long prompt should hold, where every step over a long context costs
            something of its own; 0: larger steps than usual gain nothing.
    """

    id: str
    spec_type: type[Spec]
    handles: frozenset[str] = frozenset()
    fused: bool = False
    options: frozenset[str] = frozenset()
    capturable: bool = False
    long_step: int = 0

    @abstractmethod
    def supports(self, spec: Any, device: Capabilities) -> Support:
        """Whether this runs `spec`, whose fields it handles, on `device`. Pure and quick; no policy in it.

        It decides by values: shapes, formats, kinds, the device. Fields that `handles` does not name never get here.
        """

    @abstractmethod
    def load(self, request: LoadRequest) -> Module:
        """Pack the weights into this implementation's own layout on its own device and return the module."""

    def packed_bytes(self, spec: Any, stored_bytes: int) -> int:
        """Device bytes after packing weights of `stored_bytes` in the checkpoint; the default packs one to one."""
        return stored_bytes

    def packings(self, spec: Any, stored: Mapping[str, int]) -> Mapping[str, int]:
        """Device bytes by what the rule option `packing` may say: "compact" and "fast" (more, where that buys speed).

        Args:
            stored: bytes in the checkpoint by weight format.

        Returns:
            Nothing where weights are packed in one way, as by default; such an implementation has no such option.
        """
        return {}

    def page_sizes(self, spec: Any) -> tuple[int, ...]:
        """For what owns a KV cache: tokens a page that it can work with, preferred first."""
        return ()

    def cache_bytes_per_token(self, spec: Any) -> int:
        """For what owns a KV cache: bytes a token takes in it."""
        return 0

    def state_bytes(self, spec: Any) -> int:
        """For what owns recurrent states: bytes a sequence takes in them."""
        return 0

    def cache_bytes(self, spec: Any, options: Mapping[str, Any]) -> int:
        """The same under a rule's `options`; the default says that they change nothing."""
        return self.cache_bytes_per_token(spec)


@runtime_checkable
class StateOwner(Protocol):
    """A module that holds recurrent states, a slot a sequence: by itself, or a fused branch with them inside."""

    def allocate_states(self, slots: int) -> None:
        """Make room for `slots` sequences; earlier content is gone."""
        ...

    def copy_states(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy slots `source` to slots `target`, pair by pair, in the order of the device's work."""
        ...


@runtime_checkable
class KeepsStates(Protocol):
    """A `StateOwner` that leaves the state behind some of a step's tokens in a second slot, as `StepBatch.kept_states`
    says; of others the engine copies states before a step that may have to be undone."""

    keeps_states: bool


@runtime_checkable
class ExpertLoad(Protocol):
    """A module with routed experts that counts what they are given."""

    def expert_load(self) -> torch.Tensor | None:
        """Tokens that each of its experts has been given so far, int64 [experts] on the CPU; None: not counted here.

        Any thread may call it.
        """
        ...


@runtime_checkable
class CacheOwner(Protocol):
    """A module that holds KV pages: a cache by itself, or a fused attention with the cache inside."""

    def allocate_pages(self, pages: int, page_size: int) -> None:
        """Make room for `pages` pages of `page_size` tokens; earlier content is gone."""
        ...


@runtime_checkable
class PageTensors(Protocol):
    """A `CacheOwner` whose pages can be copied to the host and back, for prefixes that are kept off the device."""

    def page_tensors(self) -> Sequence[torch.Tensor]:
        """The memory of the pages, on their device: each tensor [pages, …], contiguous; a row is all of a page.

        The same memory until `allocate_pages` is called again.
        """
        ...


@runtime_checkable
class StateTensors(Protocol):
    """A `StateOwner` whose states can be copied to the host and back."""

    def state_tensors(self) -> Sequence[torch.Tensor]:
        """The memory of the states, on their device: each tensor [slots, …], contiguous; a row is all of a slot.

        The same memory until `allocate_states` is called again.
        """
        ...
