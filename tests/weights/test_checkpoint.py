"""Telling apart what a path holds: every wrong thing a user can give has its own message."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ktcore.errors import CheckpointError
from ktcore.weights import open_checkpoint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"lmgg" + bytes(100), "an old ggml file"),
        (b"tjgg" + bytes(100), "an old ggml file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n  <html>", "a web page"),
        (b"PK\x03\x04" + bytes(100), "a zip archive, perhaps a PyTorch checkpoint"),
        (b"\x80\x02}q\x00.", "a Python pickle"),
        (b"\x1f\x8b\x08" + bytes(100), "a compressed file"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"t":{}}', "a safetensors file"),
        (b'{"model_type": "llama"}', "a JSON file"),
        (bytes(100), "it starts with zeros"),
        (b"Once upon a time", r"it starts with bytes 4f 6e 63 65"),
        (b"GG", "it starts with bytes 47 47"),
    ],
)
def test_a_file_that_is_not_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_a_file_that_the_system_does_not_map_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_folder: Callable[..., Path], raw: Any
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")  # what mmap(2) answers on a file system that cannot

    folder = write_folder(None, {"w": torch.ones(2, 2)})
    (tmp_path / "model.gguf").write_bytes(raw.file())
    monkeypatch.setattr(mmap, "mmap", refused)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read: .*No such device"):
        open_checkpoint(folder if name.endswith("safetensors") else tmp_path / name)


def test_a_path_with_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match=r"not a usable path|no such file"):
        open_checkpoint("a\0b")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "an empty folder"),
        (["readme.md"], "a folder without config.json\n"),
        (["a.gguf", "b.gguf"], r"without config.json that holds a.gguf, b.gguf\n.*give the file itself: .*a.gguf"),
        ([f"{i}.gguf" for i in range(6)], "0.gguf, 1.gguf, 2.gguf, 3.gguf and 2 more"),
        (["config.json"], "holds config.json, but no weights"),
        (["config.json", "m.gguf"], r"holds no safetensors, but m.gguf"),
        (["config.json", "pytorch_model.bin"], "holds PyTorch pickles"),
        (["config.json", "model-00001-of-00002.safetensors"], "neither model.safetensors nor model.safetensors.index"),
    ],
)
def test_a_folder_that_is_not_a_model(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="zip archive"):
        open_checkpoint("~/m.gguf")
