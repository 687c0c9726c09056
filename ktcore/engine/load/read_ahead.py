"""Reads the checkpoint ahead of the loader: while a node's weights are packed, the next one's come from the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Condition, Thread
from types import TracebackType

from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.ref import WeightRef


class ReadAhead:
    """Asks for tensors from a thread of its own, never further than the node behind the one that is loaded.

    Args:
        nodes: the weights of each node, in the order that nodes are loaded.
    """

    def __init__(self, checkpoint: Checkpoint, nodes: Sequence[Mapping[str, WeightRef]]) -> None:
        self._checkpoint = checkpoint
        self._nodes = [list(dict.fromkeys(name for ref in refs.values() for name in ref.sources)) for refs in nodes]
        self._turn = Condition()
        self._begun = 0
        self._closed = False
        self._thread = Thread(target=self._run, name="ktcore-read-ahead", daemon=True)
        if any(self._nodes):
            self._thread.start()

    def next(self) -> None:
        """The next node is being loaded now."""
        with self._turn:
            self._begun += 1
            self._turn.notify()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._turn:
            self._closed = True
            self._turn.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        for place, names in enumerate(self._nodes):
            for name in names:
                with self._turn:
                    self._turn.wait_for(lambda: self._closed or place <= self._begun)  # noqa: B023
                    if self._closed:
                        return
                self._checkpoint.ask_for(name)
