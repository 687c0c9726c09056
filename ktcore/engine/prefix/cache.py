"""The prefix cache of one engine: finds the pages that a prompt needs not compute, and keeps those that it leaves.

Tiers, nearest first: pages that are still on the device, copies in main memory, copies on disk. What a sequence leaves
is copied a few pages a step, so that nobody waits for it; what is on disk is read before a sequence is admitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ktcore.engine.prefix.digests import extend_digests, state_digest
from ktcore.engine.prefix.disk import DiskTier
from ktcore.engine.prefix.memory import MemoryTier
from ktcore.engine.prefix.transfer import Transfer
from ktcore.engine.schedule.pages import PageAllocator
from ktcore.engine.schedule.sequence import Sequence
from ktcore.placement.memory import byte_count
from ktcore.weights.packed.container import canonical, digest

DEVICE, MEMORY, DISK = "device", "memory", "disk"
PAGES_A_STEP = 8
DISK_BYTES = 8 * 2**30
MEMORY_BYTES = 2**30
"""What a server, or a chat, gives the tier in main memory where nobody says."""


@dataclass(frozen=True)
class PrefixOptions:
    """Sizes are bytes, or words like "8GiB".

    Attributes:
        memory: size of the tier in main memory; 0 leaves it out.
        folder: where the tier on disk lives; None leaves it out.
        disk: size of the tier on disk.

    Raises:
        RequestError: a size is none.
    """

    memory: int | str = 0
    folder: Path | str | None = None
    disk: int | str = DISK_BYTES

    def __post_init__(self) -> None:
        _ = self.memory_bytes, self.disk_bytes  # refuse what is no size now, and not with the first page

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tier in main memory."""
        return 0 if self.memory == 0 else byte_count("memory", self.memory)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the tier on disk."""
        return byte_count("disk", self.disk)


ON_DEVICE = PrefixOptions()
"""Pages that are still on the device, and nothing else."""


@dataclass
class PrefixStats:
    """Prompt tokens since the start: asked for, and by the tier that had them."""

    asked: int = 0
    device: int = 0
    memory: int = 0
    disk: int = 0


@dataclass
class Found:
    """The beginning of a prompt: its pages on the device, owned for the asker already, or their contents.

    Attributes:
        tiers: where each page was.
        missing: number of the first page that is nowhere.
        state: the recurrent states behind the last page.
    """

    pages: list[int | None] = field(default_factory=list)
    contents: list[torch.Tensor | None] = field(default_factory=list)
    tiers: list[str] = field(default_factory=list)
    missing: int = 0
    state: torch.Tensor | None = None

    @property
    def shared(self) -> list[int]:
        """The pages on the device."""
        return [page for page in self.pages if page is not None]


class PrefixCache:
    """One thread uses it: that of the step loop. The tier on disk has threads of its own.

    Args:
        transfer: moves pages out of the device and back.
        slots: whether the model has recurrent states.
        identity: names model and plan, for the tier on disk.

    Attributes:
        off: why nothing is reused, in words; empty where prompts are.
    """

    def __init__(
        self, pages: PageAllocator, transfer: Transfer, options: PrefixOptions | None, slots: bool, identity: str
    ) -> None:
        if options is None:
            self.off = "it was not asked for"
            options = PrefixOptions()
        else:
            self.off = ""
        self.stats = PrefixStats()
        self._pages = pages
        self._transfer = transfer
        self._states = slots
        self._leaving: deque[tuple[int, bytes]] = deque()
        movable = not transfer.obstacle
        self.memory = MemoryTier(options.memory_bytes if movable else 0)
        self.disk: DiskTier | None = None
        self._readers: ThreadPoolExecutor | None = None
        if slots and not self.off and not (movable and (options.memory or options.folder)):
            self.off = transfer.obstacle or (
                "the model has recurrent states, which are kept in main memory or on disk: none is given for them"
            )
        if options.folder is not None and movable:
            layout = digest(canonical([identity, pages.page_size, transfer.layout()]))[:32]
            self.disk = DiskTier(Path(options.folder).expanduser(), layout, options.disk_bytes)
            self._readers = ThreadPoolExecutor(2, thread_name_prefix="ktcore-prefix-read")

    @property
    def tiers(self) -> bool:
        """Whether pages are kept elsewhere than on the device."""
        return self.memory.limit > 0 or self.disk is not None

    @property
    def leaving(self) -> int:
        """Pages that wait to be copied."""
        return len(self._leaving)

    def begin(self, sequence: Sequence) -> None:
        """Name the pages of a sequence that is to be admitted, and read from disk what only is there."""
        note = sequence.prefix
        if self.off or sequence.all_logits:
            return
        extend_digests(note.digests, sequence.tokens, self._pages.page_size)
        wanted: list[bytes] = []
        if self.disk is None:
            return
        assert self._readers is not None
        for name in note.digests[: self.limit(sequence)]:
            known = self._pages.has(name) or name in self.memory
            if not known and name not in self.disk:
                break
            wanted += [] if known else [name]
            if self._states and (state := state_digest(name)) not in self.memory and state in self.disk:
                wanted.append(state)
        if wanted:
            note.fetching = self._readers.submit(_fetch, self.disk, wanted)

    def ready(self, sequence: Sequence) -> bool:
        """Whether nothing is read for it any more."""
        return sequence.prefix.fetching is None or sequence.prefix.fetching.done()

    def wait(self, sequence: Sequence) -> None:
        """Until it is ready."""
        if sequence.prefix.fetching is not None:
            sequence.prefix.fetching.exception()

    def find(self, sequence: Sequence) -> Found:
        """What there is of its prompt; at least one token is left to compute. Give it to `restore` or `drop`."""
        found = Found()
        if self.off or sequence.all_logits:
            return found
        fetched = self._fetched(sequence)
        names = sequence.prefix.digests[: self.limit(sequence)]
        for name in names:
            page, content, tier = self._pages.share(name), None, DEVICE
            if page is None:
                # what was read is in memory too by now
                tier = DISK if name in fetched else MEMORY
                content = fetched[name] if name in fetched else self.memory.get(name)
                if content is None:
                    break
            found.pages.append(page)
            found.contents.append(content)
            found.tiers.append(tier)
        found.missing = len(found.pages)
        if self._states:
            self._cut_to_state(found, names, fetched)
        return found

    def drop(self, found: Found) -> None:
        """Own its pages no more."""
        self._pages.give_back(found.shared)

    def restore(self, found: Found, sequence: Sequence) -> None:
        """Begin a sequence behind what was found; its pages and its slot are taken already."""
        size, count = self._pages.page_size, len(found.pages)
        note = sequence.prefix
        filled = [(sequence.pages[i], c) for i, c in enumerate(found.contents) if c is not None]
        if filled:
            self._transfer.write_pages([page for page, _ in filled], [content for _, content in filled])
        if found.state is not None and sequence.state_slot is not None:
            self._transfer.write_state(sequence.state_slot, found.state)
        for i in range(count):
            self._pages.register(sequence.pages[i], note.digests[i])
        sequence.cached = sequence.kept = count * size
        note.named = count
        note.fetching = None
        if note.reused is None:
            note.reused = sequence.cached
            self.stats.asked += len(sequence.tokens)
            self.stats.device += found.tiers.count(DEVICE) * size
            self.stats.memory += found.tiers.count(MEMORY) * size
            self.stats.disk += found.tiers.count(DISK) * size
        if self._states and not self.off and not sequence.all_logits:
            # behind what other prompts share with this one, and behind its last full page
            note.borders = {found.missing * size, self.limit(sequence) * size} - {0, sequence.cached}

    def passed(self, sequence: Sequence) -> None:
        """Keep the recurrent states of a sequence that a step has brought to a border; not yet known to be good."""
        note, at = sequence.prefix, sequence.cached
        if not self._states or self.off or sequence.all_logits or not at or at % self._pages.page_size:
            return
        answer = at > sequence.prompt_len
        if at not in note.borders and not answer:
            return
        if answer:  # of an answer only the last border counts
            for old in [p for p in note.snapshots if p > sequence.prompt_len]:
                del note.snapshots[old]
        extend_digests(note.digests, sequence.tokens[:at], self._pages.page_size)
        name = state_digest(note.digests[at // self._pages.page_size - 1])
        if sequence.state_slot is not None:
            note.snapshots[at] = (name, self._transfer.read_state(sequence.state_slot))

    def commit(self, sequences: Iterable[Sequence]) -> None:
        """Name the pages that sequences have filled, once a step's result says that all went well."""
        size = self._pages.page_size
        for sequence in sequences:
            if self.off or sequence.all_logits:
                continue
            note, full = sequence.prefix, min(sequence.cached // size, len(sequence.pages))
            extend_digests(note.digests, sequence.tokens[: full * size], size)
            for i in range(note.named, full):
                self._pages.register(sequence.pages[i], note.digests[i])
            note.named = max(note.named, full)
            for at in [p for p in note.snapshots if p <= sequence.prompt_len]:
                self._keep(*note.snapshots.pop(at))

    def leave(self, sequence: Sequence) -> None:
        """Copy, later, what a sequence leaves that ends or makes room; call it before its pages are given back."""
        note = sequence.prefix
        if self.tiers:
            for page, name in zip(sequence.pages, note.digests[: note.named], strict=False):
                if not self._stored(name):
                    self._pages.hold(page)
                    self._leaving.append((page, name))
            if sequence.error is None:
                for name, content in note.snapshots.values():
                    self._keep(name, content)
        note.snapshots.clear()
        note.named = 0

    def copy_out(self, most: int | None = PAGES_A_STEP) -> None:
        """Copy pages that were left, at most so many; None copies all."""
        while self._leaving:
            count = min(len(self._leaving), PAGES_A_STEP if most is None else most)
            taken = [self._leaving.popleft() for _ in range(count)]
            fresh = list({name: page for page, name in taken if not self._stored(name)}.items())
            try:
                if fresh:
                    contents = self._transfer.read_pages([page for _, page in fresh])
                    for (name, _), content in zip(fresh, contents, strict=True):
                        self._keep(name, content)
            finally:
                self._pages.give_back([page for page, _ in taken])
            if most is not None:
                return

    def close(self) -> None:
        """Write what waits for the disk, and end the threads."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        if self.disk is not None:
            self.disk.close()
        self.memory.clear()

    def limit(self, sequence: Sequence) -> int:
        """Most pages of its prompt that can be reused: one token at least is computed."""
        return (len(sequence.tokens) - 1) // self._pages.page_size

    def _fetched(self, sequence: Sequence) -> dict[bytes, torch.Tensor]:
        fetching = sequence.prefix.fetching
        if fetching is None or not fetching.done():
            return {}
        found = fetching.result()
        for name, content in found.items():
            self.memory.put(name, content)
        return found

    def _cut_to_state(self, found: Found, names: list[bytes], fetched: dict[bytes, torch.Tensor]) -> None:
        """Recurrent states exist behind few pages: what lies after the last of those is computed again."""
        count = len(found.pages)
        while count and found.state is None:
            name = state_digest(names[count - 1])
            found.state = self.memory.get(name)
            if found.state is None:
                found.state = fetched.get(name)
            count -= found.state is None
        self._pages.give_back([page for page in found.pages[count:] if page is not None])
        del found.pages[count:], found.contents[count:], found.tiers[count:]

    def _stored(self, name: bytes) -> bool:
        """Whether every tier that may hold it does."""
        missing = self.memory.limit and name not in self.memory
        return not missing and (self.disk is None or name in self.disk)

    def _keep(self, name: bytes, content: torch.Tensor) -> None:
        self.memory.put(name, content)
        if self.disk is not None:
            self.disk.put(name, content)


def _fetch(disk: DiskTier, names: list[bytes]) -> dict[bytes, torch.Tensor]:
    found = {}
    for name in names:
        content = disk.get(name)
        if content is not None:
            found[name] = content
    return found
