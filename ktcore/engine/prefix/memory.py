"""The tier in main memory: contents by name, the least recently used ones go."""

from __future__ import annotations

from collections import OrderedDict

import torch


class MemoryTier:
    """At most `limit` bytes of contents; 0 keeps none. One thread uses it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._held: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: bytes) -> bool:
        return name in self._held

    def get(self, name: bytes) -> torch.Tensor | None:
        """The content uint8 [bytes], counted as used; None where it is not held."""
        found = self._held.get(name)
        if found is not None:
            self._held.move_to_end(name)
        return found

    def put(self, name: bytes, content: torch.Tensor) -> None:
        """Hold uint8 [bytes], of which nothing may change later, if it fits at all."""
        size = content.numel()
        if name in self._held or size > self.limit:
            return
        self._held[name] = content
        self.bytes += size
        while self.bytes > self.limit:
            _, old = self._held.popitem(last=False)
            self.bytes -= old.numel()

    def clear(self) -> None:
        """Hold nothing."""
        self._held.clear()
        self.bytes = 0
