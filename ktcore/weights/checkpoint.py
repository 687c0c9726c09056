"""What a checkpoint offers whatever its file format, and :func:`open_checkpoint`, which finds the right reader."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ktcore.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self

GGUF_MAGIC = b"GGUF"
PACKED_MANIFEST = "ktcore-packed.json"
"""What a folder that `ktcore convert` wrote holds."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, as its header describes it.

    Args:
        name: its name in the file.
        shape: torch order, ``[out, in]``; the last dimension is contiguous.
        format: name of its weight format (:func:`ktcore.weights.get_format`).
        nbytes: bytes it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int


class Checkpoint(ABC):
    """An open model file or folder: configuration and tensor list at hand, tensor bytes mapped, nothing copied.

    Attributes:
        path: what was opened.
        kind: ``"gguf"`` or ``"hf"``.
        config: GGUF key-value metadata, or config.json, as plain Python values. Long arrays (vocabularies) are
            sequences that decode themselves on first use.
        tensors: name to :class:`TensorInfo`, in file order.
    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the file or files."""
        return sum(info.nbytes for info in self.tensors.values())

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.tensors

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.path

    def expect(self, name: str, shape: tuple[int, ...]) -> None:  # noqa: B027
        """Told what the configuration says of a tensor before it is looked up; only one without weights listens."""

    @abstractmethod
    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes: flat uint8, read-only, a view of the memory map.

        Raises:
            CheckpointError: there is no such tensor, or the checkpoint is closed.
        """

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows start..stop, all axes but the last folded: uint8 [stop - start, row_bytes], a view where it can be."""
        info = self.tensors[name]
        height = math.prod(info.shape[:-1])
        return self.raw(name).reshape(height, -1)[start:stop]

    def input_order(self, name: str) -> npt.NDArray[np.int64]:
        """Of a tensor in an ordered format: the input that each stored column belongs to, int64 [in]."""
        raise CheckpointError(f"{self.path}: '{name}' has its columns in place")

    @abstractmethod
    def release(self, name: str) -> None:
        """Let the system drop this tensor's pages from memory; reading it again brings them back from the file."""

    @abstractmethod
    def close(self) -> None:
        """Give up the memory map. Views that are still alive keep their own file mapped until they go."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file (any part of a split one) or a Hugging Face folder; reads headers only.

    Raises:
        CheckpointError: nothing is there, or it is damaged or of another kind; the message says which and where.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder", "give a .gguf file or a model folder")
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


def _open_folder(path: Path) -> Checkpoint:
    if (path / PACKED_MANIFEST).is_file():
        from ktcore.weights.packed.checkpoint import open_packed

        return open_packed(path)
    if not (path / "config.json").is_file():
        files = sorted(p.name for p in path.iterdir())
        gguf = [name for name in files if name.lower().endswith(".gguf")]
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
