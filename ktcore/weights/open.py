"""Opens a checkpoint: looks at what a path holds, and finds the right reader."""

from __future__ import annotations

import re
from pathlib import Path

from ktcore.errors import CheckpointError
from ktcore.weights.checkpoint import GGUF_MAGIC, PACKED_MANIFEST, Checkpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file (any part of a split one), a folder of one split one, or a Hugging Face folder.

    Reads headers only.

    Raises:
        CheckpointError: nothing is there, or it is damaged or of another kind; the message says which and where.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder", _elsewhere(path))
        if not path.is_file():
            raise CheckpointError(f"{path}: not a regular file", "give a .gguf file or a model folder")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null byte in the path
        raise CheckpointError(f"{str(path)!r}: not a usable path: {error}") from error

    if not head:
        raise CheckpointError(f"{path}: the file is empty", "was the download cut short?")
    if not head.startswith(GGUF_MAGIC):
        what, hint = _describe(path, head)
        raise CheckpointError(f"{path}: not a GGUF file: {what}", hint)

    from ktcore.weights.gguf import open_gguf

    return open_gguf(path)


def _elsewhere(path: Path) -> str:
    """What to do about a path that is an address, or a name on a hub."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        return "models are read from disk: download it first, then give the file's or folder's path"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        return f"if it is a model on a hub, download it first: hf download {path} --local-dir {path.name}"
    return "give a .gguf file or a model folder"


def _open_folder(path: Path) -> Checkpoint:
    if (path / PACKED_MANIFEST).is_file():
        from ktcore.weights.packed.checkpoint import open_packed

        return open_packed(path)
    files = sorted(p.name for p in path.iterdir())
    gguf = [name for name in files if name.lower().endswith(".gguf")]
    if gguf and not any(name.endswith(".safetensors") for name in files):
        from ktcore.weights.gguf import open_gguf, split_set

        first = split_set(gguf)
        if first is not None:
            return open_gguf(path / first)
    if not (path / "config.json").is_file():
        if gguf:
            raise CheckpointError(
                f"{path}: a folder without config.json that holds {_listed(gguf)}",
                f"give the file itself: {path / gguf[0]}",
            )
        what = "an empty folder" if not files else "a folder without config.json"
        raise CheckpointError(f"{path}: {what}", "a model folder holds config.json and *.safetensors files")

    from ktcore.weights.methods import read_quantized
    from ktcore.weights.safetensors import open_folder

    checkpoint = open_folder(path)
    try:
        return read_quantized(checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _listed(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _describe(path: Path, head: bytes) -> tuple[str, str | None]:
    """What a file that is not GGUF looks like, and what to do about it."""
    text = head.lstrip().lower()
    if head[:4] in (b"ggml", b"lmgg", b"tjgg", b"fmgg", b"algg"):
        return "an old ggml file from before GGUF", "convert the model again with a current converter"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, the model itself was not fetched", "run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, likely saved in place of the model", "download the model file itself"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, perhaps a PyTorch checkpoint", "only GGUF and safetensors are read"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, perhaps a PyTorch checkpoint", "only GGUF and safetensors are read"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "a compressed file", "decompress it first"
    if head[8:9] == b"{" and head[6:8] == b"\0\0":
        return "a safetensors file", f"give the folder that also holds its config.json: {path.parent}"
    if text.startswith(b"{"):
        return "a JSON file", f"give the model's folder, {path.parent}; only `ktcore plan` takes a config.json alone"
    if not any(head):
        return "it starts with zeros", "was the download finished?"
    return f"it starts with bytes {head[:8].hex(' ')}", None
