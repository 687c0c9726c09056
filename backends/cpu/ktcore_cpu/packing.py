"""Packs weights into the native panel layout, and the checks that every CPU implementation shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktcore.backend import LoadRequest, Supported, Unsupported
from ktcore.errors import CheckpointError
from ktcore.ops.base import Spec
from ktcore.ops.norm import RMSNormSpec
from ktcore.weights.groups import ORDERED
from ktcore.weights.packed.parts import Part
from ktcore.weights.ref import Weight
from ktcore_cpu.packings import packed_format

if TYPE_CHECKING:
    from ktcore_cpu import _native

PANEL_ROWS = 32
LAYOUT = "cpu.panels/3"
"""Name and version of the packed layout; every change of the native panels, of any format, raises the version."""
OPTIONS = frozenset({"activations", "packing"})


@lru_cache(maxsize=1)
def native_formats() -> dict[str, tuple[int, int]]:
    """Weight formats of the native kernels: name -> (values a block, bytes a block)."""
    from ktcore_cpu import _native

    return _native.formats()


def supports_formats(spec: Spec) -> Supported | Unsupported:
    """Whether the native kernels know all weight formats of `spec`."""
    try:
        known = native_formats()
    except ImportError as error:
        return Unsupported(f"the native module does not load: {error}")
    missing = [f for f in spec.formats() if f not in known]
    if missing:
        unordered = any(f.endswith(ORDERED) for f in missing)
        hint = "; the option quantize: int8_g32 puts columns in order" if unordered else ""
        return Unsupported(f"no native kernel for weight format {', '.join(missing)} (known: {', '.join(known)}){hint}")
    return Supported()


def padded_bytes(rows: int, stored_bytes: int, formats: Iterable[str] = ()) -> int:
    """Packed bytes of a matrix: rows are padded to whole panels, and scales of a few `formats` take more room."""
    from ktcore_cpu import _native

    growth = max((_native.packed_growth(f) for f in formats if f in native_formats()), default=1.0)
    return math.ceil(-(-rows // PANEL_ROWS) * PANEL_ROWS * stored_bytes / max(rows, 1) * growth)


def pack(request: LoadRequest, role: str) -> _native.PackedMatrix:
    """The weight `role` [rows, cols] in the native layout.

    Raises:
        CheckpointError: it cannot be packed.
    """
    weight = request.weights[role]
    rows, cols = weight.shape[-2:]
    return pack_matrix(request, role, weight.format, rows, cols, weight, weight.raw)


def pack_matrix(
    request: LoadRequest, what: str, format: str, rows: int, cols: int, weight: Weight, raw: Callable[[], np.ndarray]
) -> _native.PackedMatrix:
    """A matrix [rows, cols] made of `weight`: mapped from packed weights on disk, or packed into memory.

    Args:
        what: which of the matrices made of `weight`.
        format: of its rows; how they are packed is the rule's to say (option `packing`).
        raw: its rows in `format`; called only when they are to be packed.

    Raises:
        CheckpointError: it cannot be packed.
    """
    from ktcore_cpu import _native

    format = packed_format(request, format)
    request.runtime.switch.use(format)  # type: ignore[attr-defined]

    def packed() -> _native.PackedMatrix:
        return _native.PackedMatrix.pack(request.runtime.pool, format, rows, cols, raw())  # type: ignore[attr-defined]

    try:
        if request.packed is not None:
            nbytes = _native.PackedMatrix.packed_bytes(format, rows, cols)
            kind = f"matrix {what.rpartition('.')[2]} {format} {rows} x {cols}"
            part = Part(f"{request.name}: {what}", LAYOUT, kind, [weight], 1, nbytes)
            stored = request.packed.get(part, lambda _: packed().packed)
            if stored is not None:
                return _native.PackedMatrix.borrow(format, rows, cols, stored)
        return packed()
    except ValueError as error:
        raise CheckpointError(f"{request.name}: cannot pack '{what}': {error}") from error


RELEASE_EVERY = 8
"""Experts after which the pages of their whole file are given back, so that memory never holds a layer twice."""


@contextmanager
def raw_expert(weights: Sequence[Weight], expert: int) -> Iterator[list[np.ndarray]]:
    """The rows of one expert in each of its stacked weights, to be packed inside; their pages are given back after."""
    parts = [weight.part(expert) for weight in weights]
    yield [part.raw() for part in parts]
    for part in parts:
        part.release()
    if expert % RELEASE_EVERY == RELEASE_EVERY - 1:
        for weight in weights:
            if len(weight.ref.sources) == 1:
                weight.release()


def vector(weights: Any, role: str) -> np.ndarray | None:
    """A small weight as float32 numpy array (norm, bias); None when it is absent."""
    weight: Weight | None = weights.get(role)
    return None if weight is None else np.ascontiguousarray(weight.tensor().numpy(), dtype=np.float32)


def norm_weight(weights: Any, role: str, spec: RMSNormSpec | None) -> np.ndarray | None:
    """A norm's factors: its weight plus its offset, ones where it has no weight; None where there is no norm."""
    if spec is None:
        return None
    stored = vector(weights, role)
    factors = np.ones(spec.dim, dtype=np.float32) if stored is None else stored + np.float32(spec.offset)
    return factors if spec.scale == 1.0 else factors * np.float32(spec.scale)


def exact(request: LoadRequest) -> bool:
    """Whether the rule asks for float32 activations instead of 8-bit ones (option `activations: f32`)."""
    wanted = request.options.get("activations", "int8")
    if wanted not in ("int8", "f32"):
        raise CheckpointError(f"{request.name}: option activations={wanted!r}, known are int8 and f32")
    return bool(wanted == "f32")


def rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x as contiguous float32 [T, width], which the native calls take by address."""
    shape = x.shape
    if len(shape) != 2 or shape[1] != width:
        raise ValueError(f"expected float32 [T, {width}], got {list(shape)}")
    # the usual case first: two conversions that do nothing would cost as much as a small native call
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()
