"""Notices when code that is not the backend's does its work: the references, or torch on host tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ktcore.backend.reference as reference

_REFERENCE_FOLDER = str(Path(reference.__file__ or "").parent)
_HELPERS = frozenset({"up_projections", "loaded", "<genexpr>"})
_SMALL = 64
"""Host tensors up to so many values are bookkeeping (positions, page tables), not work."""


@contextmanager
def reference_calls() -> Iterator[list[str]]:
    """Collects the functions of the reference implementations that this thread enters."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_REFERENCE_FOLDER) and code.co_name not in _HELPERS:
            seen.append(
                f"{Path(code.co_filename).stem}.{code.co_qualname if hasattr(code, 'co_qualname') else code.co_name}"
            )

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(before)


class HostWork(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts torch operations that compute floating-point results on host tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [a for a in args if isinstance(a, torch.Tensor)]
        works = isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel() > _SMALL
        if works and inputs and all(a.device.type == "cpu" for a in (*inputs, result)) and not _moves(func):
            self.names.append(str(func).removeprefix("aten."))
        return result


def _moves(func: Any) -> bool:
    """Views, copies and allocations move data and compute nothing."""
    name = str(func)
    return any(word in name for word in ("copy", "empty", "view", "clone", "slice", "as_strided", "detach", "_to_"))
