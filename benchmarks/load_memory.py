#!/usr/bin/env python3
"""Peak memory of loading and running one layer as wide as DeepSeek-V3's: it must stay near the packed size.

    python benchmarks/load_memory.py [--experts 256] [--format Q2_K] [--folder DIR]

Writes a GGUF file of random weights (3.9 GB by default, deleted afterwards), and loads it in a fresh process. The peak
is Linux's VmHWM: all resident pages at once, anonymous ones and those of the mapped file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

HIDDEN, WIDTH, HEADS, VOCAB, TOP_K = 7168, 2048, 128, 1024, 8
Q_RANK, KV_RANK, ROPE, NOPE, VALUE = 1536, 512, 64, 128, 128
MIB = 1 << 20

CHILD = """
import json, sys, torch, ktcore
def memory(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key + ":"))
    return int(line.split()[1]) * 1024
import transformers, ktcore_cpu._native
before = memory("VmRSS")
with ktcore.load(sys.argv[1], backend="cpu", context=512) as model:
    loaded = {key: memory(key) for key in ("VmHWM", "RssAnon", "RssFile")}
    finite = bool(torch.isfinite(model.logits(list(range(200)))).all())
    print(json.dumps({"before": before, "loaded": loaded, "peak": memory("VmHWM"), "finite": finite}))
"""


def write(path: Path, experts: int, format: str) -> Path:
    """One layer with latent attention and routed experts, random weights, as a GGUF file."""
    w = gguf.GGUFWriter(path, "deepseek2")
    w.add_block_count(1)
    w.add_context_length(4096)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(18432)
    w.add_head_count(HEADS)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(1e4)
    w.add_rope_dimension_count(ROPE)
    w.add_key_length(KV_RANK + ROPE)
    w.add_value_length(KV_RANK)
    w.add_key_length_mla(NOPE + ROPE)
    w.add_value_length_mla(VALUE)
    w.add_q_lora_rank(Q_RANK)
    w.add_kv_lora_rank(KV_RANK)
    w.add_leading_dense_block_count(0)
    w.add_expert_count(experts)
    w.add_expert_used_count(TOP_K)
    w.add_expert_feed_forward_length(WIDTH)
    w.add_expert_shared_count(1)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    w.add_expert_weights_norm(True)
    w.add_expert_weights_scale(2.5)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("no_vocab")
    for name, shape, kind in _tensors(experts, format):
        if kind == "F32":
            w.add_tensor(name, np.full(shape, 0.5, np.float32))
        else:
            w.add_tensor(name, random_rows(shape, kind), raw_dtype=GGMLQuantizationType[kind])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def measure(path: Path) -> dict[str, object]:
    """Bytes before loading, loaded (by kind) and at the peak, of a fresh process that loads and runs the file."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def _tensors(experts: int, format: str) -> list[tuple[str, tuple[int, ...], str]]:
    block = [
        ("attn_norm", (HIDDEN,), "F32"),
        ("ffn_norm", (HIDDEN,), "F32"),
        ("attn_q_a_norm", (Q_RANK,), "F32"),
        ("attn_kv_a_norm", (KV_RANK,), "F32"),
        ("attn_q_a", (Q_RANK, HIDDEN), "Q8_0"),
        ("attn_q_b", (HEADS * (NOPE + ROPE), Q_RANK), "Q8_0"),
        ("attn_kv_a_mqa", (KV_RANK + ROPE, HIDDEN), "Q8_0"),
        ("attn_k_b", (HEADS, KV_RANK, NOPE), "Q8_0"),
        ("attn_v_b", (HEADS, VALUE, KV_RANK), "Q8_0"),
        ("attn_output", (HIDDEN, HEADS * VALUE), "Q8_0"),
        ("ffn_gate_inp", (experts, HIDDEN), "F32"),
        *((f"ffn_{part}_shexp", (WIDTH, HIDDEN), format) for part in ("gate", "up")),
        ("ffn_down_shexp", (HIDDEN, WIDTH), format),
        *((f"ffn_{part}_exps", (experts, WIDTH, HIDDEN), format) for part in ("gate", "up")),
        ("ffn_down_exps", (experts, HIDDEN, WIDTH), format),
    ]
    named = [(f"blk.0.{name}.weight", shape, kind) for name, shape, kind in block]
    table = [(name, (VOCAB, HIDDEN), "Q8_0") for name in ("token_embd.weight", "output.weight")]
    bias = ("blk.0.exp_probs_b.bias", (experts,), "F32")
    return [*table, ("output_norm.weight", (HIDDEN,), "F32"), bias, *named]


def random_rows(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random blocks whose float16 factors are 1e-3; some thousands of them, again and again."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    fields = {"Q8_0": (0,), "Q4_K": (0, 2), "Q2_K": (80, 82)}[kind]
    count = int(np.prod(shape)) // block
    blocks = np.random.default_rng(0).integers(0, 256, (min(count, 7919), size), dtype=np.uint8)
    for at in fields:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    return np.resize(blocks, (*shape[:-1], shape[-1] // block * size))


def peak_of(module: str, folder: str | None, *arguments: object) -> int:
    """Write a layer by `write(path, *arguments)` of a script here, and load it, each in a process of its own; print.

    Returns:
        1 if the peak is more than a GiB over the file, else 0.
    """
    with tempfile.TemporaryDirectory(dir=folder) as where:
        path = Path(where) / "layer.gguf"
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {module}, pathlib; "
        code += f"{module}.write(pathlib.Path({str(path)!r}), *{arguments!r})"
        subprocess.run([sys.executable, "-c", code], check=True)  # its memory must not count
        found = measure(path)
        stored = path.stat().st_size
    over = found["peak"] - stored  # type: ignore[operator]
    print(json.dumps({"stored_MiB": stored // MIB, "peak_over_stored_MiB": over // MIB, **found}, indent=1))
    return 0 if over <= 1024 * MIB else 1


def main() -> int:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--format", choices=("Q2_K", "Q4_K", "Q8_0"), default="Q2_K")
    parser.add_argument("--folder", help="where the file is written for a while; the system's folder if left out")
    wanted = parser.parse_args()
    return peak_of("load_memory", wanted.folder, wanted.experts, wanted.format)


if __name__ == "__main__":
    raise SystemExit(main())
