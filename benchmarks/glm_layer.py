#!/usr/bin/env python3
"""A layer as wide as GLM-5.3-Flash's: peak memory of loading and running it, and decode at two depths of context.

    python benchmarks/glm_layer.py memory [--format Q2_K] [--folder DIR]
    python benchmarks/glm_layer.py depth [--threads 2] [--format Q4_K]

`memory` writes a GGUF file of random weights (2.4 GB, deleted afterwards): latent attention with an indexer over pools,
hyper-connections, 288 routed experts. `depth` times one new token through a layer's attention branches alone, whose
share grows with the context; its caches are filled by 4,096 tokens, whose pages are copied.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from load_memory import peak_of, random_rows

HIDDEN, WIDTH, HEADS, VOCAB, EXPERTS = 4096, 2048, 64, 1024, 288
Q_RANK, LATENT, KEY, VALUE = 1536, 512, 256, 256
INDEX_HEADS, INDEX_DIM, TOP_K, POOL, STREAMS = 32, 128, 2048, 4, 4
DEPTHS = (4096, 65536)
PAGE, ROUNDS = 64, 40
CONFIG = Path(__file__).parents[1] / "tests" / "data" / "configs" / "glm-5.3-flash.json"


def write(path: Path, format: str, experts: int = EXPERTS) -> Path:
    """One sparse layer of latent attention, random weights, as a GGUF file."""
    w = gguf.GGUFWriter(path, "glm5-next")
    arch = w.arch
    w.add_block_count(1)
    w.add_context_length(4096)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(12288)
    w.add_head_count(HEADS)
    w.add_head_count_kv([1])
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(0)
    w.add_key_length(LATENT)
    w.add_value_length(LATENT)
    w.add_key_length_mla(KEY)
    w.add_value_length_mla(VALUE)
    w.add_q_lora_rank(Q_RANK)
    w.add_kv_lora_rank(LATENT)
    w.add_ssm_conv_kernel(4)
    w.add_kda_head_dim(128)
    w.add_float32(f"{arch}.kda.gate_lower_bound", -5.0)
    w.add_indexer_head_count(INDEX_HEADS)
    w.add_indexer_key_length(INDEX_DIM)
    w.add_indexer_top_k(TOP_K)
    w.add_uint32(f"{arch}.attention.indexer.kpool", POOL)
    w.add_bool(f"{arch}.attention.indexer.kpool_select_tail", True)
    w.add_uint32(f"{arch}.hyper_connection.count", STREAMS)
    w.add_uint32(f"{arch}.hyper_connection.sinkhorn_iterations", 20)
    w.add_float32(f"{arch}.hyper_connection.epsilon", 1e-6)
    w.add_leading_dense_block_count(0)
    w.add_expert_count(experts)
    w.add_expert_used_count(8)
    w.add_expert_feed_forward_length(WIDTH)
    w.add_expert_shared_count(1)
    w.add_expert_weights_norm(True)
    w.add_expert_weights_scale(2.5)
    w.add_array(f"{arch}.swiglu_clamp_exp", [10.0])
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("no_vocab")
    for name, shape, kind in _tensors(experts, format):
        if kind == "F32":
            w.add_tensor(name, np.full(shape, 0.01, np.float32))
        else:
            w.add_tensor(name, random_rows(shape, kind), raw_dtype=GGMLQuantizationType[kind])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _tensors(experts: int, format: str) -> list[tuple[str, tuple[int, ...], str]]:
    rows = STREAMS * (2 + STREAMS)
    streams = [("fn", (rows, STREAMS * HIDDEN)), ("base", (rows,)), ("scale", (3,))]
    block: list[tuple[str, tuple[int, ...], str]] = [
        *((name, (HIDDEN,), "F32") for name in ("attn_norm", "ffn_norm")),
        *((f"hc_{where}_{part}", shape, "F32") for where in ("attn", "ffn") for part, shape in streams),
        ("attn_q_a_norm", (Q_RANK,), "F32"),
        ("attn_kv_a_norm", (LATENT,), "F32"),
        ("attn_q_a", (Q_RANK, HIDDEN), "Q8_0"),
        ("attn_q_b", (HEADS * KEY, Q_RANK), "Q8_0"),
        ("attn_kv_a_mqa", (LATENT, HIDDEN), "Q8_0"),
        ("attn_k_b", (HEADS, LATENT, KEY), "Q8_0"),
        ("attn_v_b", (HEADS, VALUE, LATENT), "Q8_0"),
        ("attn_output", (HIDDEN, HEADS * VALUE), "Q8_0"),
        ("indexer.attn_q_b", (INDEX_HEADS * INDEX_DIM, Q_RANK), "Q8_0"),
        ("indexer.attn_k", (INDEX_DIM, HIDDEN), "Q8_0"),
        ("indexer.k_norm", (INDEX_DIM,), "F32"),
        ("indexer.proj", (INDEX_HEADS, HIDDEN), "F32"),
        ("indexer_compressor_gate", (INDEX_DIM, HIDDEN), "F32"),
        ("indexer_compressor_ape", (POOL, INDEX_DIM), "F32"),
        ("ffn_gate_inp", (experts, HIDDEN), "F32"),
        *((f"ffn_{part}_shexp", (WIDTH, HIDDEN), format) for part in ("gate", "up")),
        ("ffn_down_shexp", (HIDDEN, WIDTH), format),
        *((f"ffn_{part}_exps", (experts, WIDTH, HIDDEN), format) for part in ("gate", "up")),
        ("ffn_down_exps", (experts, HIDDEN, WIDTH), format),
    ]
    named = [(f"blk.0.{name}.weight", shape, kind) for name, shape, kind in block]
    table = [(name, (VOCAB, HIDDEN), "Q8_0") for name in ("token_embd.weight", "output.weight")]
    biases = [("blk.0.exp_probs_b.bias", (experts,), "F32"), ("blk.0.indexer.k_norm.bias", (INDEX_DIM,), "F32")]
    return [*table, ("output_norm.weight", (HIDDEN,), "F32"), *biases, *named]


def depth(format: str, threads: int) -> int:
    """Time decode of both kinds of attention branch at `DEPTHS` in turn; 1 if latent attention grows by over 1.3."""
    from ktcore_cpu.backend import CpuRuntime
    from ktcore_cpu.kda import CpuKimiDelta
    from ktcore_cpu.mla import CpuMLA

    from ktcore.backend import Implementation, LoadRequest
    from ktcore.conformance.data.memory import make_weights
    from ktcore.graph import build_graph
    from ktcore.weights.bare import open_config

    graph = build_graph(open_config(CONFIG, format))
    runtime = CpuRuntime(threads)
    took: dict[str, list[float]] = {}
    kinds: list[tuple[str, int, Implementation]] = [("latent", 3, CpuMLA()), ("delta", 4, CpuKimiDelta())]
    for name, layer, implementation in kinds:
        spec = graph.layers[layer].attn.parts["branch"].spec
        weights = make_weights(spec, np.random.default_rng(1))
        module = implementation.load(LoadRequest(name, spec, weights, runtime, runtime.capabilities()))
        took[name] = _decode(module, graph.hidden, isinstance(implementation, CpuMLA))
    print(json.dumps({"depths": DEPTHS, "ms": {k: [round(t, 2) for t in v] for k, v in took.items()}}, indent=1))
    return 0 if took["latent"][1] <= 1.3 * took["latent"][0] else 1


def _decode(module: Any, hidden: int, paged: bool) -> list[float]:
    from ktcore.ops import StepBatch

    pages = DEPTHS[-1] // PAGE + 1
    x = torch.randn(DEPTHS[0], hidden, generator=torch.Generator().manual_seed(2))
    table = torch.arange(pages, dtype=torch.int32)[None]

    def step(at: int, count: int) -> StepBatch:
        ids, places = torch.zeros(count, dtype=torch.int64), torch.arange(at, at + count)
        return StepBatch(ids, places, (0, count), (at + count,), table, PAGE, () if paged else (0,))

    if paged:
        module.allocate_pages(pages, PAGE)
    else:
        module.allocate_states(1)
    for at in range(0, DEPTHS[0], 512):
        module(x[at : at + 512], step(at, 512))
    held = DEPTHS[0] // PAGE
    for rows in module.page_tensors() if paged else ():
        for at in range(held, pages):
            rows[at] = rows[at % held]
    times: dict[int, list[float]] = {context: [] for context in DEPTHS}
    for i in range(ROUNDS * len(DEPTHS)):
        context = DEPTHS[i % len(DEPTHS)]
        # states hold no positions: a sequence of them goes on wherever it stands
        one = step(context if paged else DEPTHS[0] + i, 1)
        start = time.perf_counter()
        module(x[i : i + 1], one)
        times[context].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found[2:]) for found in times.values()]


def main() -> int:
    """One of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "depth"))
    parser.add_argument("--format", choices=("Q2_K", "Q4_K", "Q8_0"))
    parser.add_argument("--folder", help="where the file is written for a while; the system's folder if left out")
    parser.add_argument("--threads", type=int, default=2)
    wanted = parser.parse_args()
    if wanted.what == "memory":
        return peak_of("glm_layer", wanted.folder, wanted.format or "Q2_K")
    return depth(wanted.format or "Q4_K", wanted.threads)


if __name__ == "__main__":
    raise SystemExit(main())
