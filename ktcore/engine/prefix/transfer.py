"""KV pages and recurrent states as bytes on the host, of all layers together: out of their devices and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ktcore.backend.implementation import CacheOwner, PageTensors, StateTensors
from ktcore.engine.step.runner import LoadedModel


class Transfer:
    """Moves pages and states of one loaded model, whose memory is allocated already.

    Call it with the engine's streams current (`LoadedModel.running`).

    Args:
        beside: further caches with the same pages, of a model that drafts.

    Attributes:
        page_bytes: of one page, over all layers.
        state_bytes: of one sequence's states, over all layers; 0 where the model has none.
        obstacle: why pages cannot be moved, in words; empty where they can.
    """

    def __init__(self, model: LoadedModel, beside: Sequence[CacheOwner] = ()) -> None:
        self._pages: list[torch.Tensor] = []
        self._states: list[torch.Tensor] = []
        caches = (*model.caches, *beside)
        mute = [type(c).__name__ for c in caches if not isinstance(c, PageTensors)]
        mute += [type(s).__name__ for s in model.states if not isinstance(s, StateTensors)]
        self.obstacle = f"{mute[0]} does not show its memory" if mute else ""
        if not mute:
            self._pages = [t for c in caches if isinstance(c, PageTensors) for t in c.page_tensors()]
            self._states = [t for s in model.states if isinstance(s, StateTensors) for t in s.state_tensors()]
        self.page_bytes = _row_bytes(self._pages)
        self.state_bytes = _row_bytes(self._states)

    def layout(self) -> list[object]:
        """What the bytes of a page and of a state are made of, for comparing."""
        return [[str(t.dtype), list(t.shape[1:])] for t in (*self._pages, *self._states)]

    def read_pages(self, pages: Sequence[int]) -> list[torch.Tensor]:
        """Each page's uint8 [page_bytes] on the CPU."""
        return _read(self._pages, pages)

    def write_pages(self, pages: Sequence[int], contents: Sequence[torch.Tensor]) -> None:
        """Fill pages from uint8 [page_bytes] each, on the CPU."""
        _write(self._pages, pages, contents)

    def read_state(self, slot: int) -> torch.Tensor:
        """uint8 [state_bytes] on the CPU."""
        return _read(self._states, [slot])[0]

    def write_state(self, slot: int, content: torch.Tensor) -> None:
        """Fill a slot from uint8 [state_bytes] on the CPU."""
        _write(self._states, [slot], [content])


def _row_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t[0].numel() * t.element_size() for t in tensors if t.shape[0])


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous host tensor [rows, …] as uint8 [rows, bytes]."""
    return tensor.reshape(tensor.shape[0], -1).view(torch.uint8).numpy()


# Rows are copied one by one in NumPy: torch would divide each small copy among threads, which costs more than it gives.


def _read(tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> list[torch.Tensor]:
    size = _row_bytes(tensors)
    out = [torch.empty(size, dtype=torch.uint8) for _ in rows]
    targets = [content.numpy() for content in out]
    at = 0
    for tensor in tensors:
        if tensor.device.type == "cpu":
            source, places = _bytes(tensor), rows
        else:
            index = torch.tensor(list(rows)).to(tensor.device)
            source, places = _bytes(tensor.index_select(0, index).cpu()), range(len(rows))
        end = at + source.shape[1]
        for target, place in zip(targets, places, strict=True):
            target[at:end] = source[place]
        at = end
    return out


def _write(tensors: Sequence[torch.Tensor], rows: Sequence[int], contents: Sequence[torch.Tensor]) -> None:
    sources = [content.numpy() for content in contents]
    at = 0
    for tensor in tensors:
        on_host = tensor.device.type == "cpu"
        part = tensor if on_host else torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype)
        target = _bytes(part)
        end = at + target.shape[1]
        for source, place in zip(sources, rows if on_host else range(len(rows)), strict=True):
            target[place] = source[at:end]
        if not on_host:
            tensor.index_copy_(0, torch.tensor(list(rows)).to(tensor.device), part.to(tensor.device))
        at = end
