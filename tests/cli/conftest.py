"""Runs the program inside of the test process, and small checkpoints for it."""

from __future__ import annotations

import io
import json
import logging
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Done:
    """What a run of the program left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as one JSON object."""
        found: dict[str, Any] = json.loads(self.out)
        return found


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What --verbose does to the process's logging is taken back."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def ktcore(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """ktcore("run", path, "Hi", stdin=""): the program with these words, and no plugins but the host's."""
    from ktcore.cli.main import main

    monkeypatch.setenv("KTCORE_PLUGINS", "cpu")

    def run(*words: object, stdin: str = "") -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        code = left.value.code
        return Done(code if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture
def fails(ktcore: Run) -> Callable[..., str]:
    """fails("run", …) -> stderr of a run that must end in one clear error and nothing else."""

    def run(*words: object, stdin: str = "") -> str:
        done = ktcore(*words, stdin=stdin)
        assert done.code == 1
        assert done.out == ""
        assert done.err.startswith("error: ")
        assert "Traceback" not in done.err
        lines = done.err.rstrip("\n").split("\n")
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  hint: ")), done.err
        return done.err

    return run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA in a folder, without a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE in a folder: 8 experts, 2 a token."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-moe")
    config = Qwen3MoeConfig(**SIZES, head_dim=32, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small but whole GGUF file with two tensors, which tests damage."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tensor("token_embd.weight", np.ones((32, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def offset_of_tensor(file: bytes, name: str) -> int:
    """Where in the header the data offset of a tensor stands: after its name, shape and type."""
    at = file.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (dimensions,) = struct.unpack_from("<I", file, at)
    return at + 4 + 8 * dimensions + 4
