"""Hands out KV pages, and remembers what free ones still hold; knows numbers only, the memory belongs to the caches."""

from __future__ import annotations

from collections import OrderedDict

from ktcore.errors import RequestError


class PageAllocator:
    """`pages` pages of `page_size` tokens, each with any number of owners.

    A page whose content has a name (`register`) keeps it when its last owner leaves, and can be shared again until its
    place is needed: then the pages go that were left longest ago.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))
        self._owners = [0] * pages
        self._content: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}
        self._left: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages nobody owns."""
        return len(self._free) + len(self._left)

    @property
    def kept(self) -> int:
        """Pages nobody owns whose content can still be shared."""
        return len(self._left)

    def needed(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages for one owner; RequestError when there are not so many."""
        if count > self.free:
            raise RequestError(f"{count} KV pages are needed, {self.free} of {self.total} are free")
        taken = [self._free.pop() if self._free else self._dropped() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, content: bytes) -> int | None:
        """The page with this content, owned once more; None where there is none."""
        page = self._page.get(content)
        if page is not None:
            self._owners[page] += 1
            self._left.pop(page, None)
        return page

    def hold(self, page: int) -> None:
        """One owner more for an owned page."""
        self._owners[page] += 1

    def has(self, content: bytes) -> bool:
        """Whether a page has this content."""
        return content in self._page

    def register(self, page: int, content: bytes) -> bool:
        """Name the content of an owned page; False where another page has it already."""
        if content in self._page:
            return False
        self._content[page], self._page[content] = content, page
        return True

    def give_back(self, pages: list[int]) -> None:
        """One owner less for each page. Later ones of a list are the first whose content goes."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] < 0:
                raise ValueError(f"KV page {page} was given back more often than it was taken")
            if not self._owners[page]:
                if page in self._content:
                    self._left[page] = None
                else:
                    self._free.append(page)

    def _dropped(self) -> int:
        page, _ = self._left.popitem(last=False)
        del self._page[self._content.pop(page)]
        return page
