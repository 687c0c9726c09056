"""Reading model folders: against files that the safetensors library wrote, and error by error on bad ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from ktcore.errors import CheckpointError
from ktcore.weights import dequantize, open_checkpoint

TENSORS = {
    "a.weight": torch.randn(6, 10, generator=torch.Generator().manual_seed(1)),
    "b.weight": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "c.weight": torch.randn(7, generator=torch.Generator().manual_seed(3)).half(),
    "d.weight": torch.randn(4, 8, generator=torch.Generator().manual_seed(4)).to(torch.float8_e4m3fn),
    "e.packed": torch.arange(12, dtype=torch.int32).reshape(3, 4),
    "f.scalar": torch.tensor(2.5),
    "g.empty": torch.zeros(0, 4),
}
FORMATS = {"a": "F32", "b": "BF16", "c": "F16", "d": "F8_E4M3", "e": "I32", "f": "F32", "g": "F32"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "nested": {"x": [1, 2]}}')
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    names, weight_map = list(TENSORS), {}
    for i, part in enumerate((names[:3], names[3:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.torch.save_file({name: TENSORS[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_tensors_read_as_they_were_saved(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.kind, checkpoint.path) == ("hf", path)
        assert checkpoint.config == {"model_type": "llama", "nested": {"x": [1, 2]}}
        assert set(checkpoint.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            info = checkpoint.tensors[name]
            assert info.shape == tuple(tensor.shape)
            assert info.format == FORMATS[name[0]]
            raw = checkpoint.raw(name)
            assert raw.tobytes() == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            torch.testing.assert_close(dequantize(info.format, raw, info.shape), tensor.float(), rtol=0, atol=0)
            checkpoint.release(name)
        assert checkpoint.nbytes == sum(t.nbytes for t in TENSORS.values())


def test_raw_is_a_read_only_view(folder: Path) -> None:
    view = open_checkpoint(folder).raw("a.weight")
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: the index lists this shard"):
        open_checkpoint(sharded)


def test_an_index_that_names_a_tensor_the_shard_lacks(sharded: Path) -> None:
    write_index(sharded, {"ghost.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"puts tensor ghost.weight into model-00001-of-00002.safetensors"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "weight_map is empty"),
        ([1], "must map tensor names to file names"),
        ({"a": 3}, "must map tensor names to file names"),
        (None, "must map tensor names to file names"),
        ({"a": "../secret.safetensors"}, "not a plain file name"),
        ({"a": "/etc/passwd"}, "not a plain file name"),
        ({"a": ".."}, "not a plain file name"),
        ({"a": ""}, "not a plain file name"),
    ],
)
def test_a_damaged_index(sharded: Path, weight_map: Any, message: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_a_damaged_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100])
def test_a_file_cut_in_its_header(folder: Path, keep: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: (the file is empty|truncated at byte|claims a header)"
    ):
        open_checkpoint(folder)


def test_a_file_cut_in_its_data_names_the_bytes(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"tensor .* takes \d+ bytes from byte \d+, but only \d+ are present"):
        open_checkpoint(folder)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"t": entry(dtype="Q99")}, "t: unknown weight format 'Q99'"),
        ({"t": entry(dtype=3)}, "t: needs dtype, shape and two data_offsets"),
        ({"t": entry(shape=[-2])}, "t: needs"),
        ({"t": entry(shape=[True])}, "t: needs"),
        ({"t": entry(shape=[2**70])}, "t: needs"),
        ({"t": entry(offsets=[0])}, "t: needs"),
        ({"t": entry(offsets=[8, 0])}, "t: F32 .* takes 8 bytes, its offsets span -8"),
        ({"t": entry(shape=[2**40, 2**40])}, "its offsets span 8"),
        ({"t": entry(offsets=[16, 24])}, "only 0 are present"),
        ({"t": [1]}, "t: its header entry is not an object"),
        ({"t": entry(), "u": entry()}, "overlaps"),
        ({"t": entry(shape=[1], offsets=[4, 8])}, "leaves a hole"),
        ({"t": entry(shape=[1], offsets=[0, 4])}, "4 bytes after the last tensor"),
        ([], "JSON of type list"),
    ],
)
def test_a_damaged_header_names_file_and_tensor(folder: Path, header: Any, message: str) -> None:
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(folder)
    assert "model.safetensors" in str(error.value)


def test_an_unaligned_header_still_gives_the_right_values(folder: Path) -> None:
    raw = json.dumps({"t": entry()}).encode()
    raw += b" " * ((8 - len(raw) % 8) % 8 + 3)
    values = np.array([1.5, -2.0], dtype=np.float32)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + values.tobytes())
    assert dequantize("F32", open_checkpoint(folder).raw("t"), (2,)).tolist() == [1.5, -2.0]
