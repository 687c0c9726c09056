"""What the expert layer takes and gives: numpy arrays or torch tensors in, float32 rows and weight bytes out.

Imports numpy; torch only when a torch tensor is passed or weights are to be quantised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def is_torch(array: Any) -> bool:
    """Whether it is a torch tensor; does not import torch."""
    return type(array).__module__.partition(".")[0] == "torch"


def float_rows(array: Any, what: str, width: int | None = None) -> Floats:
    """float32 [T, width], C-contiguous; the caller's memory where it is that already.

    Args:
        array: any float dtype; torch tensors must be on the CPU.

    Raises:
        TypeError: it holds no floating-point numbers.
        ValueError: another shape, or a tensor of another device.
    """
    if is_torch(array):
        _check_host(array, what)
        if not array.is_floating_point():
            raise TypeError(f"{what} must hold floating-point numbers, not {array.dtype}")
        rows = array.detach().float().contiguous().numpy()
    else:
        rows = np.asarray(array)
        if not _is_float(rows):
            raise TypeError(f"{what} must hold floating-point numbers, not {rows.dtype}")
        rows = np.ascontiguousarray(rows, dtype=np.float32)
    if rows.ndim != 2 or (width is not None and rows.shape[1] != width):
        raise ValueError(f"{what} must be [tokens, {width or 'k'}], not {list(rows.shape)}")
    return np.asarray(rows, np.float32)


def id_rows(array: Any, what: str = "ids") -> npt.NDArray[np.int64]:
    """int64 [T, k], C-contiguous.

    Raises:
        TypeError: it holds no integers.
        ValueError: another shape, or a tensor of another device.
    """
    if is_torch(array):
        _check_host(array, what)
        array = array.detach().numpy()
    ids = np.asarray(array)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what} must hold integers, not {ids.dtype}")
    if ids.ndim != 2:
        raise ValueError(f"{what} must be [tokens, k], not {list(ids.shape)}")
    return np.ascontiguousarray(ids, dtype=np.int64)


def like(rows: Floats, example: Any) -> Any:
    """`rows` as the kind of array and the dtype that `example` is; torch tensors share the memory where they can."""
    if not is_torch(example):
        return rows.astype(np.asarray(example).dtype, copy=False)
    import torch

    return torch.from_numpy(rows).to(example.dtype)


def copy_into(out: Any, rows: Floats) -> None:
    """Write `rows` into the array or tensor `out`, rounding to its dtype."""
    if is_torch(out):
        import torch

        out.copy_(torch.from_numpy(rows))
    else:
        out[...] = rows


def shape_of(array: Any) -> tuple[int, ...]:
    """Its shape as integers."""
    return tuple(int(n) for n in array.shape)


def stored_format(array: Any, what: str) -> str:
    """The weight format that a float array is stored in: F32 (float64 too), F16 or BF16.

    Raises:
        TypeError: none of these.
    """
    name = str(array.dtype).removeprefix("torch.")
    if name == "float64":
        return "F32"
    if name not in _STORED:
        raise TypeError(f"{what} is {name}; give float32, float16 or bfloat16, or name the block format of raw bytes")
    return _STORED[name]


def stored_bytes(array: Any, what: str) -> Bytes:
    """The bytes of a float matrix in `stored_format`, flat; the caller's memory where it is contiguous."""
    if is_torch(array):
        import torch

        _check_host(array, what)
        values = array.detach()
        values = values.float() if values.dtype == torch.float64 else values
        raw: Bytes = values.contiguous().reshape(-1).view(torch.uint8).numpy()
        return raw
    values = np.asarray(array)
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def raw_bytes(data: Any, what: str) -> Bytes:
    """Stored blocks as flat bytes, whatever holds them: an array or tensor of bytes, bytes, a memory map.

    Raises:
        TypeError: elements of more than one byte.
        ValueError: not contiguous.
    """
    if is_torch(data):
        _check_host(data, what)
        data = data.detach().numpy()
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    if array.itemsize != 1:
        raise TypeError(f"{what} holds {array.dtype}, but blocks of a named format are bytes (uint8)")
    if not array.flags.c_contiguous:
        raise ValueError(f"{what} must be C-contiguous")
    return array.reshape(-1).view(np.uint8)


def quantized(array: Any, fmt: str, loss: Any, what: str) -> Bytes:
    """A float matrix in an INT4_G* or INT8_G* format by ktcore's own quantisation; `loss` counts the error.

    Raises:
        ValueError: values that are not finite.
    """
    import torch

    from ktcore.errors import CheckpointError
    from ktcore.weights.quantize import quantize_rows

    stored_format(array, what)
    if is_torch(array):
        _check_host(array, what)
        values = array.detach().float().contiguous()
    else:
        values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    try:
        return quantize_rows(values, fmt, loss, what)
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def _is_float(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _check_host(tensor: Any, what: str) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{what} is on {tensor.device}; copy it to the CPU first")
