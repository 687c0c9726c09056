"""Opens Hugging Face model folders: config.json and safetensors files, mapped without copying.

Layout: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import TensorInfo
from ktcore.weights.formats import get_format, row_bytes
from ktcore.weights.mapped import MappedCheckpoint, MappedFile, StoredTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_JSON = 256 * 1024 * 1024

_DAMAGED = "the file is damaged or its download is incomplete: fetch it again"


def open_folder(path: Path) -> MappedCheckpoint:
    """Open a folder with config.json and either model.safetensors or a sharded set with its index.

    Raises:
        CheckpointError: a file is missing, damaged or truncated, or the index and the shards disagree.
    """
    config = read_json(path / "config.json")
    files: list[MappedFile] = []
    try:
        if (path / SINGLE).is_file():
            tensors = _read_file(path / SINGLE, files)
        elif (path / INDEX).is_file():
            tensors = _read_shards(path, files)
        else:
            raise _no_weights(path)
    except BaseException:
        for file in files:
            file.close()
        raise
    return MappedCheckpoint(path, "hf", config, tensors, tuple(files))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, too big to be sensible, not UTF-8, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too big for a JSON file of a model")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return _parse_json(raw, str(path))


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}", _DAMAGED) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: JSON of type {type(value).__name__} where an object belongs", _DAMAGED)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} appears twice")
    return result


def _no_weights(path: Path) -> CheckpointError:
    names = sorted(p.name for p in path.iterdir())
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf:
        return CheckpointError(f"{path}: holds no safetensors, but {gguf[0]}", f"give the file: {path / gguf[0]}")
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return CheckpointError(f"{path}: holds {shards[0]}, but neither {SINGLE} nor {INDEX}", f"fetch {INDEX} too")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return CheckpointError(f"{path}: holds PyTorch pickles, no safetensors", "get the model as safetensors")
    return CheckpointError(
        f"{path}: holds config.json, but no weights", f"{SINGLE} or {INDEX} and its shards belong there"
    )


def _read_shards(path: Path, files: list[MappedFile]) -> dict[str, StoredTensor]:
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names", _DAMAGED)
    if not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty", _DAMAGED)
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or "\\" in name or "\0" in name or name in ("", ".."):
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: the index lists this shard, but it is missing", "fetch it")
        shards[name] = _read_file(path / name, files)
    tensors: dict[str, StoredTensor] = {}
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            raise CheckpointError(f"{index}: puts tensor {tensor} into {name}, which does not hold it")
        tensors[tensor] = shards[name][tensor]
    return tensors


def _read_file(path: Path, files: list[MappedFile]) -> dict[str, StoredTensor]:
    file = MappedFile(path)
    files.append(file)
    if file.size < 8:
        raise CheckpointError(f"{path}: truncated at byte {file.size} while reading the header's length", _DAMAGED)
    (length,) = struct.unpack_from("<Q", file.map, 0)
    if length > min(file.size - 8, MAX_HEADER):
        raise CheckpointError(f"{path}: claims a header of {length} bytes in a file of {file.size}", _DAMAGED)
    header = _parse_json(file.map[8 : 8 + length], f"{path}: header")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _read_entry(file, name, entry, start) for name, entry in header.items()}
    _check_layout(file, tensors, start)
    return tensors


def _read_entry(file: MappedFile, name: str, entry: Any, start: int) -> StoredTensor:
    where = f"{file.path}: tensor {name}"
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where}: its header entry is not an object", _DAMAGED)
    dtype, shape, span = entry.get("dtype"), _naturals(entry.get("shape")), _naturals(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or span is None or len(span) != 2:
        raise CheckpointError(f"{where}: needs dtype, shape and two data_offsets, has {dict(entry)!r:.200}", _DAMAGED)
    try:
        fmt = get_format(dtype)
        rows, cols = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        nbytes = rows * row_bytes(fmt, cols)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", error.hint) from None
    begin, end = span
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {nbytes} bytes, its offsets span {end - begin}", _DAMAGED
        )
    if start + end > file.size:
        present = max(0, file.size - start - begin)
        raise CheckpointError(
            f"{where} takes {nbytes} bytes from byte {start + begin}, but only {present} are present: "
            f"the file ends at byte {file.size}",
            "the download is incomplete: fetch the file again",
        )
    return StoredTensor(TensorInfo(name, tuple(shape), fmt.name, nbytes), file, start + begin)


def _naturals(value: Any) -> list[int] | None:
    good = isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)
    return value if good else None


def _check_layout(file: MappedFile, tensors: Mapping[str, StoredTensor], start: int) -> None:
    """As the format demands: the tensors fill the file from the header to its end, without holes or overlaps."""
    at = start
    for stored in sorted(tensors.values(), key=lambda t: (t.offset, t.info.nbytes)):
        if stored.offset != at:
            what = "overlaps the one before" if stored.offset < at else "leaves a hole before it"
            raise CheckpointError(f"{file.path}: tensor {stored.info.name} {what}", _DAMAGED)
        at += stored.info.nbytes
    if at != file.size:
        raise CheckpointError(f"{file.path}: {file.size - at} bytes after the last tensor", _DAMAGED)
