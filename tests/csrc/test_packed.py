"""Packing loses nothing: every format comes back as the gguf package dequantises it."""

from __future__ import annotations

import numpy as np
import pytest
from ktcore_cpu import _native

from .blocks import random_blocks, reference

FORMATS = list(_native.formats())
QUANTISED = [f for f, (block, _) in _native.formats().items() if block > 1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (33, 256), (70, 768)])
def test_dequantize_equals_gguf_to_the_last_bit(pool: _native.Pool, format: str, rows: int, cols: int) -> None:
    raw = random_blocks(format, rows, cols)
    w = _native.PackedMatrix.pack(pool, format, rows, cols, raw)
    assert (w.format, w.rows, w.cols) == (format, rows, cols)
    np.testing.assert_array_equal(w.dequantize().view(np.uint32), reference(format, raw, rows, cols).view(np.uint32))


@pytest.mark.parametrize("format", ["Q4_1", "Q8_0", "Q4_0"])
def test_columns_need_not_be_multiples_of_256(pool: _native.Pool, format: str) -> None:
    raw = random_blocks(format, 192, 576)
    w = _native.PackedMatrix.pack(pool, format, 192, 576, raw)
    np.testing.assert_array_equal(w.dequantize(), reference(format, raw, 192, 576))


@pytest.mark.parametrize("format", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("cols", [1, 7, 31, 33, 100])
def test_float_formats_take_any_columns(pool: _native.Pool, format: str, cols: int) -> None:
    raw = random_blocks(format, 5, cols)
    w = _native.PackedMatrix.pack(pool, format, 5, cols, raw)
    np.testing.assert_array_equal(w.dequantize(), reference(format, raw, 5, cols))


@pytest.mark.parametrize("format", ["IQ1_S", "IQ1_M", "IQ1_S_FAST", "IQ1_M_FAST"])
@pytest.mark.parametrize("step", [1, 5, 2047])
def test_every_point_of_iq1_comes_back_from_its_rectangle(pool: _native.Pool, format: str, step: int) -> None:
    index = (np.arange(2048) * step % 2048).reshape(64, 32)  # 64 rows of 32 octets
    raw = random_blocks(format, 64, 256)
    short = format.startswith("IQ1_S")
    low, high = (2, 34) if short else (0, 32)
    raw[:, low : low + 32] = index & 255
    if short:
        words = raw[:, high:].copy().view(np.uint16) & 0xF000
        raw[:, high:] = (words | ((index >> 8).reshape(64, 8, 4) << [0, 3, 6, 9]).sum(2).astype(np.uint16)).view(
            np.uint8
        )
    else:
        pairs = (index >> 8).reshape(64, 16, 2)
        raw[:, high : high + 16] = raw[:, high : high + 16] & 0x88 | pairs[..., 0] | pairs[..., 1] << 4
    w = _native.PackedMatrix.pack(pool, format, 64, 256, raw)
    np.testing.assert_array_equal(w.dequantize(), reference(format, raw, 64, 256))


# Scales that are packed in a form too short for a vector grow a little, lattice points as a code for each value more.
GROWTH = {
    "IQ4_XS": 1.02,
    "MXFP4": 1.06,
    "IQ1_S": 1.06,
    "IQ1_M": 1.06,
    "IQ1_S_FAST": 70 / 50,
    "IQ1_M_FAST": 106 / 56,
    "IQ2_XXS_FAST": 102 / 66,
    "IQ2_XS_FAST": 106 / 74,
    "IQ2_S_FAST": 106 / 82,
    "IQ3_XXS_FAST": 134 / 98,
    "IQ3_S_FAST": 134 / 110,
}


@pytest.mark.parametrize("format", QUANTISED)
def test_as_many_bytes_as_stored_when_rows_fill_panels(format: str) -> None:
    raw = random_blocks(format, 64, 512)
    packed = _native.PackedMatrix.pack(_native.Pool(1), format, 64, 512, raw).nbytes
    assert raw.nbytes <= packed <= raw.nbytes * GROWTH.get(format, 1)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_rows_gathers_from_raw_bytes(format: str) -> None:
    raw = np.ascontiguousarray(random_blocks(format, 9, 512))
    ids = np.array([8, 0, 3, 3], np.int64)
    out = np.full((4, 512), np.nan, np.float32)
    _native.dequantize_rows(format, raw.ctypes.data, raw.shape[1], 9, 512, ids, out.ctypes.data)
    np.testing.assert_array_equal(out, reference(format, raw, 9, 512)[ids])


def test_a_read_only_memory_map_can_be_packed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    raw = random_blocks("Q4_1", 32, 64)
    raw.tofile(tmp_path / "w")
    mapped = np.memmap(tmp_path / "w", np.uint8, "r").reshape(raw.shape)
    w = _native.PackedMatrix.pack(_native.Pool(1), "Q4_1", 32, 64, mapped)
    np.testing.assert_array_equal(w.dequantize(), reference("Q4_1", raw, 32, 64))


@pytest.mark.parametrize(
    ("format", "rows", "cols", "raw", "message"),
    [
        ("Q9_9", 1, 32, np.zeros(20, np.uint8), "Q4_1"),
        ("Q4_1", 1, 33, np.zeros(20, np.uint8), "multiples of 32"),
        ("Q4_K", 1, 32, np.zeros(20, np.uint8), "multiples of 256"),
        ("Q4_1", 2, 32, np.zeros(20, np.uint8), "40"),
        ("Q4_1", 0, 32, np.zeros(20, np.uint8), "rows"),
        ("Q4_1", -1, 32, np.zeros(20, np.uint8), "rows"),
        ("F32", 1 << 40, 1 << 40, np.zeros(20, np.uint8), "2\\^30"),
        ("Q4_1", 1, 32, np.zeros((20, 2), np.uint8)[:, 0], "contiguous"),
        ("Q4_1", 1, 32, np.zeros(5, np.float32), "bytes"),
    ],
)
def test_bad_shapes_are_refused(format: str, rows: int, cols: int, raw: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.PackedMatrix.pack(_native.Pool(1), format, rows, cols, raw)


def test_dequantize_rows_refuses_rows_that_are_not_there() -> None:
    raw, out = random_blocks("Q8_0", 2, 32), np.zeros(32, np.float32)
    for ids in ([2], [-1]):
        with pytest.raises(ValueError, match="row"):
            _native.dequantize_rows("Q8_0", raw.ctypes.data, 34, 2, 32, np.array(ids, np.int64), out.ctypes.data)
    with pytest.raises(ValueError, match="row_bytes"):
        _native.dequantize_rows("Q8_0", raw.ctypes.data, 33, 2, 32, np.array([0], np.int64), out.ctypes.data)
