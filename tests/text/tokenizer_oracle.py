"""llama.cpp's own token ids: writes vocabulary-only GGUF files and asks an interpreter that has llama-cpp-python."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

VARIABLE = "KTCORE_LLAMA_CPP_PYTHON"

_SCRIPT = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
ask = json.load(open(sys.argv[2], encoding="utf-8"))
answer = {"version": llama_cpp.__version__}
if "texts" in ask:
    answer["ids"] = [
        model.tokenize(text.encode(), add_bos=ask["bos"], special=ask["special"]) for text in ask["texts"]
    ]
if "pieces" in ask:
    vocab, buffer = model._model.vocab, llama_cpp.ctypes.create_string_buffer(512)
    def piece(i):
        n = llama_cpp.llama_token_to_piece(vocab, i, buffer, 512, 0, True)
        return buffer.raw[:n].hex()
    answer["pieces"] = [piece(i) for i in ask["pieces"]]
    answer["ends"] = [i for i in ask["pieces"] if llama_cpp.llama_vocab_is_eog(vocab, i)]
json.dump(answer, open(sys.argv[3], "w"))
"""


def interpreter() -> str | None:
    """A Python that can import llama_cpp: the variable's, or this one; None where there is none."""
    if named := os.environ.get(VARIABLE):
        return named
    return sys.executable if importlib.util.find_spec("llama_cpp") else None


WHY_NOT = f"needs llama-cpp-python, here or in the interpreter that {VARIABLE} names"


def write_vocabulary(path: Path, entries: Mapping[str, Any]) -> Path:
    """A GGUF file without tensors from ``tokenizer.ggml.*`` entries."""
    out = gguf.GGUFWriter(str(path), "llama")
    types = {bool: out.add_bool, int: out.add_uint32, str: out.add_string, list: out.add_array, tuple: out.add_array}
    for key, value in entries.items():
        types[type(value)](key, value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    return path


def ask_llama_cpp(
    path: Path,
    texts: Sequence[str] = (),
    *,
    pieces: Sequence[int] = (),
    special: bool = True,
    bos: bool = False,
) -> dict[str, Any]:
    """What llama.cpp makes of texts (``ids``) and of token ids (``pieces`` in hexadecimal, ``ends`` of generation)."""
    python = interpreter()
    assert python is not None, WHY_NOT
    ask, answer = path.with_suffix(".ask.json"), path.with_suffix(".answer.json")
    ask.write_text(json.dumps({"texts": list(texts), "pieces": list(pieces), "special": special, "bos": bos}))
    done = subprocess.run(
        [python, "-c", _SCRIPT, str(path), str(ask), str(answer)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(answer.read_text())
    return result
