"""The files of a packed folder: a manifest with a checksum of its own, the packed parts, and tensors kept as they were.

ktcore-packed.json   {"magic", "version", "checksum", "body"}; the checksum is the SHA-256 of the body's canonical JSON
packed.bin           parts, each from a page boundary, its pieces side by side
tensors.bin          tensors that are read unpacked (tables, norms, biases), each from a 64-byte boundary
metadata.gguf        a GGUF source's metadata, without tensors; of a folder its own small files lie here instead
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import PACKED_MANIFEST

MAGIC = "ktcore-packed"
VERSION = 1
MANIFEST = PACKED_MANIFEST
PARTS = "packed.bin"
TENSORS = "tensors.bin"
METADATA = "metadata.gguf"
PAGE = 4096
TENSOR_ALIGNMENT = 64
AGAIN = "write it again: ktcore convert MODEL FOLDER"


def canonical(value: Any) -> bytes:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(data: Any) -> str:
    """SHA-256 of bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def aligned(offset: int, unit: int) -> int:
    """`offset` rounded up to whole units."""
    return -(-offset // unit) * unit


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest and wait until it is on the disk."""
    text = json.dumps({"magic": MAGIC, "version": VERSION, "checksum": digest(canonical(body)), "body": body})
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The body of a folder's manifest; its version, its checksum and the sizes of the files are checked.

    Raises:
        CheckpointError: absent, damaged, of another version, or a file is missing or has another size.
    """
    path = folder / MANIFEST
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", AGAIN) from error
    if not isinstance(outer, dict) or outer.get("magic") != MAGIC:
        raise CheckpointError(f"{path}: not the manifest of a packed model", AGAIN)
    if outer.get("version") != VERSION:
        raise CheckpointError(
            f"{folder}: written in version {outer.get('version')} of the packed layout, this ktcore reads {VERSION}",
            f"{AGAIN}, or use the ktcore that wrote it",
        )
    body = outer.get("body")
    if not isinstance(body, dict) or digest(canonical(body)) != outer.get("checksum"):
        raise CheckpointError(f"{path}: damaged: its checksum does not fit", AGAIN)
    for name, size in body["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes, expected {size}"
            raise CheckpointError(f"{folder / name}: {what}", f"copy it again, or {AGAIN}")
    return body


def map_range(descriptor: int, offset: int, nbytes: int) -> mmap.mmap:
    """A read-only map of part of a file; `offset` starts a page. The system is told that it will be read."""
    mapped = mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ, offset=offset)
    if hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED)
    return mapped


def write_error(path: Path, error: OSError) -> CheckpointError:
    """What a failed write means, in words: a full disk is the usual one."""
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror or error}",
        "free some room or give another place; what is written so far is kept, and the same command goes on from it",
    )
