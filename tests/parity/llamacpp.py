"""llama.cpp's own logits of a GGUF file, from whatever Python has llama-cpp-python."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

VARIABLE = "KTCORE_LLAMA_CPP_PYTHON"
WHY_NOT = f"needs llama-cpp-python, here or in the interpreter that {VARIABLE} names"

# -1 leaves to the file what the binding would otherwise set itself
_SCRIPT = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], logits_all=True, n_ctx=256, n_batch=128, n_ubatch=128, n_threads=1, verbose=False,
                        yarn_beta_fast=-1.0, yarn_beta_slow=-1.0, yarn_attn_factor=-1.0, **json.loads(sys.argv[4]))
model.eval(json.loads(sys.argv[2]))
json.dump(model.scores[: model.n_tokens].tolist(), open(sys.argv[3], "w"))
"""


def interpreter() -> str | None:
    """A Python that can import llama_cpp: the variable's, or this one; None where there is none."""
    if named := os.environ.get(VARIABLE):
        return named
    return sys.executable if importlib.util.find_spec("llama_cpp") else None


def logits(path: Path, ids: torch.Tensor, *, float32_cache: bool = False, flash: bool = False) -> torch.Tensor:
    """float32 [tokens, vocab] of one sequence.

    Args:
        float32_cache: keys and values stay float32, where it would otherwise round them to float16.
        flash: its flash attention, without which it does not run MiniMax-M3's choice of blocks.
    """
    python = interpreter()
    assert python is not None
    answer = path.with_suffix(".json")
    more: dict[str, object] = {"type_k": 0, "type_v": 0} if float32_cache else {}
    more |= {"flash_attn": True} if flash else {}
    done = subprocess.run(
        [python, "-c", _SCRIPT, path, json.dumps(ids.tolist()), answer, json.dumps(more)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(answer.read_text()))
