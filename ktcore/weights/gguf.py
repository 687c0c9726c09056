"""Opens GGUF checkpoints: one file, or all the parts of a split one as if they were one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ktcore.errors import CheckpointError
from ktcore.weights.gguf_header import GgufHeader, read_header
from ktcore.weights.mapped import MappedCheckpoint, MappedFile, StoredTensor

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufCheckpoint(MappedCheckpoint):
    """A GGUF model.

    Attributes:
        metadata: its metadata as a GGUF file without tensors.
    """

    metadata: bytes


def open_gguf(path: Path) -> GgufCheckpoint:
    """Open a GGUF file; any part of a split file opens all of them.

    Metadata is that of the first part, which is where splitting tools put it.

    Raises:
        CheckpointError: damaged, truncated, unsupported, or a part is missing.
    """
    files: list[MappedFile] = []
    try:
        first = _open(path, files)
        parts = [(files[0], first)]
        if (count := _int(path, first, "split.count", 1)) > 1:
            names = _part_paths(path, count)
            number = _int(path, first, "split.no", 0)
            if not 0 <= number < count or names[number] != path:
                raise CheckpointError(f"{path}: is part {number + 1} of {count} by its header, but not by its name")
            parts = [parts[0] if other == path else _open_part(other, n, count, files) for n, other in enumerate(names)]
        tensors = _merge(path, parts)
    except BaseException:
        for file in files:
            file.close()
        raise
    checkpoint = GgufCheckpoint(path, "gguf", parts[0][1].metadata, tensors, tuple(files))
    checkpoint.metadata = _metadata_alone(*parts[0])
    return checkpoint


def split_set(names: Iterable[str]) -> str | None:
    """The first part of the one split model that is all there is among GGUF file names; None when there is more.

    Projectors of images ("mmproj" in their name) are no part of a language model, and do not count.
    """
    models = [name for name in names if "mmproj" not in name.lower()]
    parts = [_PART_NAME.fullmatch(name) for name in models]
    sets = {(part["stem"], part["count"]) if part else None for part in parts}
    if len(sets) != 1 or None in sets:
        return None
    return min(models)


def _metadata_alone(file: MappedFile, header: GgufHeader) -> bytes:
    """The start of a file: magic, version, tensor count (made 0), metadata count, metadata; padded to the alignment."""
    start = file.map[:8] + bytes(8) + file.map[16 : header.metadata_end]
    return start + bytes(-len(start) % 4096)


def _open(path: Path, files: list[MappedFile]) -> GgufHeader:
    file = MappedFile(path)
    files.append(file)
    return read_header(file)


def _open_part(path: Path, number: int, count: int, files: list[MappedFile]) -> tuple[MappedFile, GgufHeader]:
    if not path.is_file():
        raise CheckpointError(f"{path}: part {number + 1} of {count} is missing", "fetch all parts into one folder")
    header = _open(path, files)
    if (_int(path, header, "split.no", -1), _int(path, header, "split.count", 1)) != (number, count):
        raise CheckpointError(f"{path}: its header does not say part {number + 1} of {count}, as its name does")
    return files[-1], header


def _part_paths(path: Path, count: int) -> list[Path]:
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: one of {count} parts by its header, but its name does not say which",
            f"name the parts like NAME-00001-of-{count:05}.gguf",
        )
    return [path.with_name(f"{match['stem']}-{n + 1:05}-of-{count:05}.gguf") for n in range(count)]


def _merge(path: Path, parts: list[tuple[MappedFile, GgufHeader]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, header in parts:
        for name, (info, offset) in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{file.path}: tensor {name} is also in {tensors[name].file.path.name}")
            tensors[name] = StoredTensor(info, file, offset)
    wanted = _int(path, parts[0][1], "split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise CheckpointError(f"{path}: its parts hold {len(tensors)} tensors, but should hold {wanted}")
    return tensors


def _int(path: Path, header: GgufHeader, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int):
        raise CheckpointError(f"{path}: {key} is {value!r}, not a whole number", "the header is damaged")
    return value
