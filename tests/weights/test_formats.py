"""Format sizes and values, against the gguf package's tables and torch's own types."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import safetensors
import torch

from ktcore.errors import CheckpointError
from ktcore.weights import WeightFormat, dequantize, get_format, known_formats, register_format, row_bytes
from ktcore.weights.formats import get_ggml_format, is_readable

SIZE_ONLY = {"Q8_1", "Q8_K", "U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2"}
# the library's own list: safetensors 0.8, Dtype
SAFETENSORS = (
    *("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64", "C64"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"),
)
QUANTISABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "MXFP4"]
BLOCKS = [
    kind.name
    for kind, (size, _) in gguf.GGML_QUANT_SIZES.items()
    if size > 1 and kind.name not in ("Q8_1", "Q8_K", "Q1_0")
]


def test_every_ggml_type_has_the_gguf_packages_number_and_sizes() -> None:
    for kind, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        assert get_format(kind.name) == WeightFormat(kind.name, block_size, block_bytes, kind.value)
        assert get_ggml_format(kind.value) is get_format(kind.name)
    assert get_ggml_format(4) is None  # a number that ggml once used and dropped


@pytest.mark.parametrize("name", QUANTISABLE)
def test_dequantised_values_are_near_what_was_quantised(name: str, weights: np.ndarray) -> None:
    raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(-1)
    values = dequantize(name, raw, weights.shape)
    assert values.dtype == torch.float32
    assert values.shape == weights.shape
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    error = np.linalg.norm(values.numpy() - weights) / np.linalg.norm(weights)
    assert error < {16: 0.004, 8.5: 0.01}.get(8 * block_bytes / block_size, 0.12)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_formats_match_the_gguf_package_bit_for_bit(name: str) -> None:
    shape = (3, 2, 512)
    rng = np.random.default_rng(len(name))
    raw = rng.integers(0, 256, (6, row_bytes(name, 512)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).astype(np.float32).reshape(shape)
        values = dequantize(name, raw.reshape(-1), shape)
    np.testing.assert_array_equal(values.numpy(), expected)


def test_one_bit_blocks_are_read_bit_by_bit() -> None:
    raw = np.random.default_rng(1).integers(0, 256, (4, 18), dtype=np.uint8)
    raw[:, :2] = np.array([0.5, -1.25, 3.0, 0.0], dtype="<f2").view(np.uint8).reshape(4, 2)
    found = dequantize("Q1_0", raw.reshape(-1), (2, 256)).reshape(4, 128)
    for block, values in zip(raw, found.tolist(), strict=True):
        scale = float(block[:2].view("<f2")[0])
        assert values == [scale if block[2 + i // 8] >> (i % 8) & 1 else -scale for i in range(128)]


def test_two_bit_blocks_are_read_code_by_code() -> None:
    raw = np.random.default_rng(2).integers(0, 256, (6, 18), dtype=np.uint8)
    raw[:, :2] = np.array([0.5, -1.25, 3.0, 0.0, 1.0, 65504.0], dtype="<f2").view(np.uint8).reshape(6, 2)
    found = dequantize("Q2_0", raw.reshape(-1), (2, 192)).reshape(6, 64)
    for block, values in zip(raw, found.tolist(), strict=True):
        scale = float(block[:2].view("<f2")[0])
        assert values == [scale * (int(block[2 + i // 4] >> (2 * (i % 4)) & 3) - 1) for i in range(64)]
    assert get_ggml_format(42) is get_format("Q2_0")


@pytest.mark.parametrize("name", known_formats())
def test_a_format_is_called_readable_exactly_where_its_values_can_be_had(name: str) -> None:
    fmt = get_format(name)
    raw = np.zeros(fmt.block_bytes, dtype=np.uint8)
    assert is_readable(name) == (name not in SIZE_ONLY)
    if is_readable(name):
        assert dequantize(name, raw, (1, fmt.block_size)).shape == (1, fmt.block_size)
    else:
        with pytest.raises(CheckpointError, match=f"no dequantisation is known for weight format {name}"):
            dequantize(name, raw, (1, fmt.block_size))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F64", torch.float64),
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz),
        ("F8_E8M0", torch.float8_e8m0fnu),
    ],
)
def test_float_types_match_torch(name: str, dtype: torch.dtype) -> None:
    stored = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    raw = stored.view(torch.uint8).numpy().reshape(-1)
    torch.testing.assert_close(dequantize(name, raw, (5, 7)), stored.float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_sizes_are_those_that_the_safetensors_library_demands(name: str) -> None:
    def read(nbytes: int) -> None:
        head = json.dumps({"t": {"dtype": name, "shape": [3, 8], "data_offsets": [0, nbytes]}}).encode()
        safetensors.deserialize(len(head).to_bytes(8, "little") + head + bytes(nbytes))

    size = 3 * row_bytes(name, 8)
    try:
        read(size)
    except safetensors.SafetensorError as error:
        if "unknown variant" not in str(error):
            raise
        pytest.skip(f"safetensors {safetensors.__version__} does not know {name}")
    for other in (size - 1, size + 1):
        with pytest.raises(safetensors.SafetensorError):
            read(other)


def test_integers_and_scalars_are_read_as_values() -> None:
    raw = np.array([-3, 2, 2**31 - 1], dtype=np.int32).view(np.uint8)
    assert dequantize("I32", raw, (3,)).tolist() == [-3.0, 2.0, float(2**31)]
    assert dequantize("F32", np.array([1.5], dtype=np.float32).view(np.uint8), ()).item() == 1.5


def test_the_result_does_not_share_the_source(weights: np.ndarray) -> None:
    raw = weights.copy().view(np.uint8).reshape(-1)
    values = dequantize("F32", raw, weights.shape)
    raw[:] = 0
    np.testing.assert_array_equal(values.numpy(), weights)


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Q4_0 tensor of shape \[2, 64\] takes 72 bytes, got 71"):
        dequantize("Q4_0", np.zeros(71, dtype=np.uint8), (2, 64))


def test_a_row_must_hold_whole_blocks() -> None:
    assert row_bytes("Q4_K", 512) == 288
    with pytest.raises(CheckpointError, match="1408 values is not a multiple of Q4_K's block of 256"):
        row_bytes("Q4_K", 1408)


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"unknown weight format 'Q9_Z'[\s\S]*Q4_K"):
        get_format("Q9_Z")


def test_a_format_nothing_can_dequantise_says_so() -> None:
    with pytest.raises(CheckpointError, match="no dequantisation is known for weight format Q8_K"):
        dequantize("Q8_K", np.zeros(292, dtype=np.uint8), (256,))


def test_formats_can_be_added_but_not_redefined() -> None:
    added = WeightFormat("TEST_W4G128", 128, 66)
    register_format(added)
    register_format(added)
    assert get_format("TEST_W4G128") is added
    assert "TEST_W4G128" in known_formats()
    with pytest.raises(CheckpointError, match="already known"):
        register_format(WeightFormat("TEST_W4G128", 128, 68))
    with pytest.raises(CheckpointError, match="already means Q4_K"):
        register_format(WeightFormat("TEST_OTHER", 256, 144, ggml_type=12))
    assert "TEST_OTHER" not in known_formats()
