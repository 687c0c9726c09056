"""A strict reader of GGUF headers: trusts no count, length, dimension or offset before holding it against the file.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import GGUF_MAGIC, TensorInfo
from ktcore.weights.foreign_types import FOREIGN
from ktcore.weights.formats import get_ggml_format, row_bytes
from ktcore.weights.mapped import MappedFile

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # ggml's own limit
MAX_NAME = 65535  # the specification's limit on key lengths
MAX_NESTING = 4
LAZY_FROM = 4096  # shorter arrays are decoded at once

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
# The fewest bytes that one element can take, for bounding a count before believing it.
_LEAST_BYTES = {**{kind: scalar.size for kind, scalar in _SCALARS.items()}, _STRING: 8, _ARRAY: 12}


@dataclass(frozen=True)
class GgufHeader:
    """A parsed header: metadata, and for each tensor its description and byte offset in the file."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, tuple[TensorInfo, int]]
    data_offset: int
    metadata_end: int = 0


def read_header(file: MappedFile) -> GgufHeader:
    """Parse and check the header of a mapped GGUF file.

    Raises:
        CheckpointError: truncated (with the byte and what was being read), damaged, or of an unsupported version.
    """
    cursor = _Cursor(file)
    version = _read_version(cursor)
    tensor_count = cursor.count("the tensor count", least=24)
    metadata_count = cursor.count("the metadata count", least=13)
    metadata = _read_metadata(cursor, metadata_count)
    metadata_end = cursor.at
    alignment = _alignment(file.path, metadata)
    described = [_read_tensor(cursor, i, tensor_count) for i in range(tensor_count)]
    data_offset = -(-cursor.at // alignment) * alignment
    return GgufHeader(version, metadata, _place(file, described, data_offset, alignment), data_offset, metadata_end)


class LazyArray(Sequence[Any]):
    """A long metadata array that decodes itself on first use; equal to the list it stands for.

    Strings that are not UTF-8 show their bytes as ``\\xNN``.
    """

    def __init__(self, file: MappedFile, kind: int, count: int, offset: int) -> None:
        self._file, self._kind, self._count, self._offset = file, kind, count, offset
        self._values: list[Any] | None = None

    def tolist(self) -> list[Any]:
        """The elements as plain Python values (the same list on every call: do not change it)."""
        if self._values is None:
            self._values = _decode(self._file, self._kind, self._count, self._offset)
        return self._values

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.tolist()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and self.tolist() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<array of {self._count} {'strings' if self._kind == _STRING else 'numbers'}>"


class _Cursor:
    """Reads forward through the file; every read is held against its end first."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.map, self.end, self.at = file, file.map, file.size, 0

    def fail(self, message: str, hint: str | None = None) -> NoReturn:
        raise CheckpointError(f"{self.file.path}: {message}", hint)

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.end - self.at:
            self.fail(
                f"truncated at byte {self.end}: {what} starts at byte {self.at} and takes {nbytes} bytes",
                "the download is incomplete, or the header is damaged",
            )

    def scalar(self, kind: struct.Struct, what: str) -> Any:
        self.need(kind.size, what)
        (value,) = kind.unpack_from(self.map, self.at)
        self.at += kind.size
        return value

    def count(self, what: str, least: int) -> int:
        """A count of things that take at least `least` bytes each, and so must fit into what is left of the file."""
        start = self.at
        value: int = self.scalar(_U64, what)
        if value * least > self.end - self.at:
            self.fail(
                f"{what} at byte {start} is {value}, more than the {self.end - self.at} bytes left can hold",
                "the file is truncated or damaged",
            )
        return value

    def string(self, what: str, limit: int | None = None) -> bytes:
        length: int = self.scalar(_U64, f"the length of {what}")
        if limit is not None and length > limit:
            self.fail(f"{what} at byte {self.at} claims {length} bytes, more than the allowed {limit}")
        self.need(length, what)
        value = self.map[self.at : self.at + length]
        self.at += length
        return value

    def name(self, what: str) -> str:
        start = self.at
        try:
            name = self.string(what, MAX_NAME).decode()
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} is not UTF-8", "the header is damaged")
        if not name:
            self.fail(f"{what} at byte {start} is empty", "the header is damaged")
        return name


def _read_version(cursor: _Cursor) -> int:
    cursor.need(8, "the magic number and version")
    if cursor.map[:4] != GGUF_MAGIC:
        cursor.fail("not a GGUF file")
    cursor.at = 4
    version: int = cursor.scalar(_U32, "the version")
    if version in VERSIONS:
        return version
    if version == 1:
        cursor.fail("GGUF version 1 is not supported", "convert the model again with a current converter")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        cursor.fail("a big-endian GGUF file", "get or convert a little-endian one")
    cursor.fail(f"GGUF version {version} is not supported, only {' and '.join(map(str, VERSIONS))}")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        start = cursor.at
        key = cursor.name(f"metadata key {i + 1} of {count}")
        if key in metadata:
            cursor.fail(f"metadata key {key!r} appears twice, again at byte {start}", "the header is damaged")
        kind: int = cursor.scalar(_U32, f"the type of {key}")
        metadata[key] = _read_value(cursor, key, kind, 0)
    return metadata


def _read_value(cursor: _Cursor, key: str, kind: int, depth: int) -> Any:
    if kind == _STRING:
        return _text(cursor.string(f"the value of {key}"))
    if kind == _ARRAY:
        return _read_array(cursor, key, depth)
    if kind not in _SCALARS:
        cursor.fail(f"{key} has unknown value type {kind} at byte {cursor.at - 4}", "the header is damaged")
    value = cursor.scalar(_SCALARS[kind], f"the value of {key}")
    return bool(value) if kind == _BOOL else value


def _read_array(cursor: _Cursor, key: str, depth: int) -> Sequence[Any]:
    if depth == MAX_NESTING:
        cursor.fail(f"{key}: arrays nested more than {MAX_NESTING} deep at byte {cursor.at}")
    kind: int = cursor.scalar(_U32, f"the element type of {key}")
    if kind not in _LEAST_BYTES:
        cursor.fail(f"{key} has unknown element type {kind} at byte {cursor.at - 4}", "the header is damaged")
    count = cursor.count(f"the length of {key}", least=_LEAST_BYTES[kind])
    if kind == _ARRAY:
        return [_read_array(cursor, key, depth + 1) for _ in range(count)]
    start = cursor.at
    if kind == _STRING:
        _skip_strings(cursor, key, count)
    else:
        cursor.at += count * _SCALARS[kind].size  # count() has checked that they fit
    array = LazyArray(cursor.file, kind, count, start)
    return array if count >= LAZY_FROM else array.tolist()


def _skip_strings(cursor: _Cursor, key: str, count: int) -> None:
    # A vocabulary has 10^5 of them: a bare loop over the lengths, without the cursor's calls, keeps opening quick.
    unpack, mapped, at, last = _U64.unpack_from, cursor.map, cursor.at, cursor.end - 8
    for i in range(count):
        if at > last:
            cursor.at = min(at, cursor.end)
            cursor.need(8, f"the length of string {i + 1} of {count} of {key}")
        at += 8 + unpack(mapped, at)[0]
        if at > last + 8:
            cursor.fail(
                f"truncated at byte {cursor.end}: string {i + 1} of {count} of {key} ends at byte {at}",
                "the download is incomplete, or the header is damaged",
            )
    cursor.at = at


def _strings(mapped: mmap.mmap, at: int, count: int) -> list[bytes]:
    unpack, values = _U64.unpack_from, []
    for _ in range(count):
        start = at + 8
        at = start + unpack(mapped, at)[0]
        values.append(mapped[start:at])
    return values


def _decode(file: MappedFile, kind: int, count: int, offset: int) -> list[Any]:
    if kind == _STRING:
        return [_text(value) for value in _strings(file.map, offset, count)]
    scalar = _SCALARS[kind]
    values = file.view(offset, count * scalar.size).view(np.dtype(scalar.format))
    plain: list[Any] = ((values != 0) if kind == _BOOL else values).tolist()
    return plain


def _text(value: bytes) -> str:
    # Bad bytes must neither stop the reader nor make a string that cannot be printed.
    return value.decode("utf-8", "backslashreplace")


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 1 <= value <= 2**31 or value & (value - 1):
        raise CheckpointError(f"{path}: general.alignment is {value!r}, not a power of two", "the header is damaged")
    return value


def _read_tensor(cursor: _Cursor, index: int, count: int) -> tuple[TensorInfo, int]:
    name = cursor.name(f"the name of tensor {index + 1} of {count}")
    dims: int = cursor.scalar(_U32, f"the number of dimensions of tensor {name}")
    if dims > MAX_DIMS:
        cursor.fail(f"tensor {name} claims {dims} dimensions at byte {cursor.at - 4}; GGUF allows {MAX_DIMS}")
    extents = [cursor.scalar(_U64, f"dimension {d + 1} of tensor {name}") for d in range(dims)]
    if 0 in extents:
        cursor.fail(f"tensor {name} has an empty dimension: {extents}", "the header is damaged")
    number: int = cursor.scalar(_U32, f"the type of tensor {name}")
    offset: int = cursor.scalar(_U64, f"the offset of tensor {name}")
    fmt = get_ggml_format(number)
    if fmt is None and number in FOREIGN:
        cursor.fail(
            f"tensor {name} is of type {number}, {FOREIGN[number]}",
            "take a file whose types llama.cpp of today writes, or quantise the model anew with it",
        )
    if fmt is None:
        cursor.fail(
            f"tensor {name} has unknown type {number}",
            "the file is damaged, or from a newer or modified converter: take one in a standard format",
        )
    shape = tuple(reversed(extents))  # GGUF lists the contiguous dimension first
    try:
        row = row_bytes(fmt, shape[-1] if shape else 1)
    except CheckpointError as error:
        cursor.fail(f"tensor {name}: {error.message}", "the header is damaged")
    return TensorInfo(name, shape, fmt.name, math.prod(shape[:-1]) * row), offset


def _place(
    file: MappedFile, described: list[tuple[TensorInfo, int]], data_offset: int, alignment: int
) -> dict[str, tuple[TensorInfo, int]]:
    """Check that tensors have distinct names and lie aligned, inside the file, and not over one another."""
    placed: dict[str, tuple[TensorInfo, int]] = {}
    for info, offset in described:
        if info.name in placed:
            raise CheckpointError(f"{file.path}: two tensors are named {info.name}", "the header is damaged")
        if offset % alignment:
            raise CheckpointError(
                f"{file.path}: tensor {info.name} at data offset {offset} is not aligned to {alignment} bytes",
                "the header is damaged",
            )
        start = data_offset + offset
        if start + info.nbytes > file.size:
            present = max(0, file.size - start)
            raise CheckpointError(
                f"{file.path}: tensor {info.name} ({info.format}, {list(info.shape)}) takes {info.nbytes} bytes from "
                f"byte {start}, but only {present} are present: the file ends at byte {file.size}",
                "the download is incomplete: fetch the file again",
            )
        placed[info.name] = (info, start)
    end, before = 0, ""
    for info, start in sorted(placed.values(), key=lambda item: item[1]):
        if start < end:
            raise CheckpointError(f"{file.path}: tensors {before} and {info.name} overlap", "the header is damaged")
        end, before = start + info.nbytes, info.name
    return placed
