"""Two checkpoints as one: a model's own, and another one of the same model that its routed experts come from."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ktcore.weights.checkpoint import Checkpoint, TensorInfo
from ktcore.weights.ref import WeightRef

PREFIX = "experts-from/"
"""Before the names of the second checkpoint's tensors; no file's tensor name has it."""


class JoinedCheckpoint(Checkpoint):
    """Path, kind and configuration of `base`; the tensors of both, those of `experts` under prefixed names.

    Closing it closes both.
    """

    def __init__(self, base: Checkpoint, experts: Checkpoint) -> None:
        self.path, self.kind, self.config = base.path, base.kind, base.config
        self.base, self.experts = base, experts
        self.weightless = base.weightless
        named = {PREFIX + name: replace(info, name=PREFIX + name) for name, info in experts.tensors.items()}
        # a view, since a base without weights learns of its tensors only while the graph is built
        self.tensors: Mapping[str, TensorInfo] = ChainMap(base.tensors, named)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.experts.nbytes

    def holds(self, name: str) -> bool:
        owner, own = self._owner(name)
        return owner.holds(own)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        owner, own = self._owner(name)
        owner.expect(own, shape)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        owner, own = self._owner(name)
        return owner.raw(own)

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        owner, own = self._owner(name)
        return owner.rows(own, start, stop)

    def take_rows(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        owner, own = self._owner(name)
        return owner.take_rows(own, rows)

    def input_order(self, name: str) -> npt.NDArray[np.int64]:
        owner, own = self._owner(name)
        return owner.input_order(own)

    def file_of(self, name: str) -> Path:
        owner, own = self._owner(name)
        return owner.file_of(own)

    def ask_for(self, name: str) -> None:
        owner, own = self._owner(name)
        owner.ask_for(own)

    def ask_for_rows(self, name: str, rows: npt.NDArray[np.int64]) -> None:
        owner, own = self._owner(name)
        owner.ask_for_rows(own, rows)

    def scattered(self, name: str) -> None:
        owner, own = self._owner(name)
        owner.scattered(own)

    def release(self, name: str) -> None:
        owner, own = self._owner(name)
        owner.release(own)

    def close(self) -> None:
        self.base.close()
        self.experts.close()

    def _owner(self, name: str) -> tuple[Checkpoint, str]:
        own = name.removeprefix(PREFIX)
        return (self.base, name) if own == name else (self.experts, own)


def from_experts(ref: WeightRef) -> WeightRef:
    """A reference into the second checkpoint, as the joined one knows it."""
    return replace(ref, sources=tuple(PREFIX + name for name in ref.sources))
