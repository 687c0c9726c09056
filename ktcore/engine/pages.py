"""Hands out KV pages; knows numbers only, the memory belongs to the caches."""

from __future__ import annotations

from ktcore.errors import RequestError


class PageAllocator:
    """Free list over `pages` pages of `page_size` tokens."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages; RequestError when there are not so many."""
        if count > len(self._free):
            raise RequestError(f"{count} KV pages are needed, {len(self._free)} of {self.total} are free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Return pages to the free list."""
        self._free.extend(reversed(pages))
