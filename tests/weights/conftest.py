"""Small checkpoints to read: written by the gguf package where it can write them, by hand where it would refuse to."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """write_gguf(name="m.gguf", metadata={}, tensors={}, **writer): a valid file by the gguf package."""

    def write(
        name: str = "m.gguf",
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, Any] | None = None,
        **writer: Any,
    ) -> Path:
        out = gguf.GGUFWriter(tmp_path / name, "llama", **writer)
        for key, value in (metadata or {}).items():
            if key == "general.alignment":
                out.add_custom_alignment(value)
            elif isinstance(value, tuple):  # (value, type)
                out.add_key_value(key, value[0], value[1])
            else:
                out.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        for key, value in (tensors or {}).items():
            if isinstance(value, tuple):  # (fp32 values, format)
                kind = gguf.GGMLQuantizationType[value[1]]
                out.add_tensor(key, gguf.quants.quantize(value[0], kind), raw_dtype=kind)
            else:
                out.add_tensor(key, value)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        return tmp_path / name

    return write


class Raw:
    """Little-endian pieces of a GGUF file, right or wrong."""

    STRING, ARRAY, U32 = 8, 9, 4

    @staticmethod
    def string(value: bytes | str) -> bytes:
        value = value.encode() if isinstance(value, str) else value
        return struct.pack("<Q", len(value)) + value

    @classmethod
    def kv(cls, key: bytes | str, kind: int, value: bytes) -> bytes:
        return cls.string(key) + struct.pack("<I", kind) + value

    @classmethod
    def u32(cls, key: bytes | str, value: int) -> bytes:
        return cls.kv(key, cls.U32, struct.pack("<I", value))

    @classmethod
    def tensor(cls, name: bytes | str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
        return (
            cls.string(name)
            + struct.pack("<I", len(dims))
            + struct.pack(f"<{len(dims)}Q", *dims)
            + struct.pack("<IQ", kind, offset)
        )

    @staticmethod
    def file(
        kvs: list[bytes] | None = None,
        tensors: list[bytes] | None = None,
        data: int = 0,
        version: int = 3,
        counts: tuple[int, int] | None = None,
    ) -> bytes:
        kvs, tensors = kvs or [], tensors or []
        n_tensors, n_kvs = counts or (len(tensors), len(kvs))
        head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kvs) + b"".join(kvs) + b"".join(tensors)
        return head + bytes(-len(head) % 32) + bytes(data)


@pytest.fixture
def raw() -> type[Raw]:
    return Raw


@pytest.fixture
def weights() -> np.ndarray:
    """fp32 [6, 512], reproducible."""
    return np.random.default_rng(7).standard_normal((6, 512), dtype=np.float32)


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """write_folder(quantization_config, tensors): a model folder that the safetensors library wrote."""

    def write(method: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> Path:
        config = {"model_type": "llama"} | ({} if method is None else {"quantization_config": method})
        (tmp_path / "config.json").write_text(json.dumps(config))
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, tmp_path / "model.safetensors")
        return tmp_path

    return write
