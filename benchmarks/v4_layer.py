#!/usr/bin/env python3
"""A decoder layer as wide as DeepSeek-V4-Flash's: peak memory of loading and running it, and decode at two contexts.

    python benchmarks/v4_layer.py memory [--experts 256] [--folder DIR]
    python benchmarks/v4_layer.py decode [--contexts 4096 65536] [--threads 2]

`memory` writes a GGUF file of random weights (3.7 GB by default, deleted afterwards), and loads and runs it in a fresh
process: its peak must stay within the packed size and 1 GB. `decode` times the attention branch of a layer with an
indexer over random keys and entries, one new token: at the last context it may take 1.3 times what it takes at first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from ktcore_cpu import _native
from ktcore_cpu.backend import CpuRuntime
from ktcore_cpu.compressed import CpuCompressedAttention
from load_memory import peak_of

from ktcore.backend import LoadRequest
from ktcore.conformance.data.memory import make_weights
from ktcore.ops import (
    CompressedAttentionSpec,
    EntryCacheSpec,
    EntryIndexerSpec,
    LinearSpec,
    RMSNormSpec,
    RopeSpec,
    StepBatch,
    WindowCacheSpec,
)

HIDDEN, HEADS, DIM, TURN, RANK, GROUPS, O_RANK = 4096, 64, 512, 64, 1024, 8, 1024
INDEX_HEADS, INDEX_DIM, TOP_K, RATIO, WINDOW = 64, 128, 512, 4, 128
WIDTH, EXPERTS_A_TOKEN, STREAMS, VOCAB = 2048, 6, 4, 1024
PAGE, ARCH = 64, "deepseek4"
DENSE, EXPERT = "Q8_0", "MXFP4"
FACTORS = {"Q8_0": (0, np.float16(1e-3).tobytes()), "MXFP4": (0, bytes([118]))}


def write(path: Path, experts: int) -> Path:
    """One layer with an indexer, random weights, as a GGUF file."""
    w = gguf.GGUFWriter(path, ARCH)
    whole = {
        "block_count": 1,
        "context_length": 1 << 20,
        "embedding_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "attention.key_length": DIM,
        "attention.value_length": DIM,
        "attention.q_lora_rank": RANK,
        "attention.sliding_window": WINDOW,
        "attention.output_group_count": GROUPS,
        "attention.output_lora_rank": O_RANK,
        "attention.indexer.head_count": INDEX_HEADS,
        "attention.indexer.key_length": INDEX_DIM,
        "attention.indexer.top_k": TOP_K,
        "rope.dimension_count": TURN,
        "rope.scaling.original_context_length": 65536,
        "expert_count": experts,
        "expert_used_count": EXPERTS_A_TOKEN,
        "expert_feed_forward_length": WIDTH,
        "expert_shared_count": 1,
        "expert_gating_func": 4,
        "hyper_connection.count": STREAMS,
        "hyper_connection.sinkhorn_iterations": 20,
        "hash_layer_count": 0,
    }
    for key, value in whole.items():
        w.add_uint32(f"{ARCH}.{key}", value)
    broken = {
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.compress_rope_freq_base": 1.6e5,
        "rope.freq_base": 1e4,
        "rope.scaling.factor": 16.0,
        "expert_weights_scale": 1.5,
        "hyper_connection.epsilon": 1e-6,
    }
    for key, number in broken.items():
        w.add_float32(f"{ARCH}.{key}", number)
    w.add_string(f"{ARCH}.rope.scaling.type", "yarn")
    w.add_bool(f"{ARCH}.expert_weights_norm", True)
    w.add_array(f"{ARCH}.attention.compress_ratios", [RATIO])
    w.add_array(f"{ARCH}.swiglu_clamp_exp", [10.0])
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("no_vocab")
    for name, shape, kind in _tensors(experts):
        if kind == "F32":
            w.add_tensor(name, np.full(shape, 0.5 if len(shape) == 1 else 1e-3, np.float32))
        else:
            w.add_tensor(name, _random(shape, kind), raw_dtype=GGMLQuantizationType[kind])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _tensors(experts: int) -> list[tuple[str, tuple[int, ...], str]]:
    wide, mixes = STREAMS * HIDDEN, STREAMS * (2 + STREAMS)
    block: list[tuple[str, tuple[int, ...], str]] = [
        ("attn_norm", (HIDDEN,), "F32"),
        ("ffn_norm", (HIDDEN,), "F32"),
        ("attn_q_a_norm", (RANK,), "F32"),
        ("attn_kv_a_norm", (DIM,), "F32"),
        ("attn_sinks", (HEADS,), "F32"),
        ("attn_q_a", (RANK, HIDDEN), DENSE),
        ("attn_q_b", (HEADS * DIM, RANK), DENSE),
        ("attn_kv", (DIM, HIDDEN), DENSE),
        ("attn_output_a", (GROUPS * O_RANK, HEADS // GROUPS * DIM), DENSE),
        ("attn_output_b", (HIDDEN, GROUPS * O_RANK), DENSE),
        ("indexer.attn_q_b", (INDEX_HEADS * INDEX_DIM, RANK), DENSE),
        ("indexer.proj", (INDEX_HEADS, HIDDEN), DENSE),
        *_compressor("attn_compressor", DIM),
        *_compressor("indexer_compressor", INDEX_DIM),
        *((f"hc_{at}_fn", (mixes, wide), "F32") for at in ("attn", "ffn")),
        *((f"hc_{at}_base", (mixes,), "F32") for at in ("attn", "ffn")),
        *((f"hc_{at}_scale", (3,), "F32") for at in ("attn", "ffn")),
        ("ffn_gate_inp", (experts, HIDDEN), DENSE),
        *((f"ffn_{part}_shexp", (WIDTH, HIDDEN), DENSE) for part in ("gate", "up")),
        ("ffn_down_shexp", (HIDDEN, WIDTH), DENSE),
        *((f"ffn_{part}_exps", (experts, WIDTH, HIDDEN), EXPERT) for part in ("gate", "up")),
        ("ffn_down_exps", (experts, HIDDEN, WIDTH), EXPERT),
    ]
    head = [("output_hc_fn", (STREAMS, wide)), ("output_hc_base", (STREAMS,)), ("output_hc_scale", (1,))]
    return [
        *((f"{name}.weight", (VOCAB, HIDDEN), DENSE) for name in ("token_embd", "output")),
        ("output_norm.weight", (HIDDEN,), "F32"),
        *((f"{name}.weight", shape, "F32") for name, shape in head),
        ("blk.0.exp_probs_b.bias", (experts,), "F32"),
        *((f"blk.0.{name}.weight", shape, kind) for name, shape, kind in block),
    ]


def _compressor(name: str, dim: int) -> list[tuple[str, tuple[int, ...], str]]:
    return [
        *((f"{name}_{part}", (2 * dim, HIDDEN), DENSE) for part in ("kv", "gate")),
        (f"{name}_ape", (RATIO, 2 * dim), "F32"),
        (f"{name}_norm", (dim,), "F32"),
    ]


def _random(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random blocks with small factors; some thousands of them, again and again."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    count = int(np.prod(shape)) // block
    blocks = np.random.default_rng(0).integers(0, 256, (min(count, 7919), size), dtype=np.uint8)
    at, factor = FACTORS[kind]
    blocks[:, at : at + len(factor)] = np.frombuffer(factor, np.uint8)
    return np.resize(blocks, (*shape[:-1], shape[-1] // block * size))


def branch_spec() -> CompressedAttentionSpec:
    """The attention branch of such a layer."""

    def linear(inside: int, outside: int) -> LinearSpec:
        return LinearSpec(inside, outside, DENSE)

    def pool(dim: int) -> dict[str, LinearSpec | RMSNormSpec]:
        two = linear(HIDDEN, 2 * dim)
        return {"pool_values": two, "pool_gates": two, "pool_norm": RMSNormSpec(dim, 1e-6)}

    turn = RopeSpec(TURN, 1.6e5, "interleaved")
    keys = EntryCacheSpec(INDEX_HEADS, INDEX_DIM, RATIO, True, TOP_K)
    indexer = EntryIndexerSpec(
        HIDDEN,
        RANK,
        INDEX_HEADS,
        INDEX_DIM,
        linear(RANK, INDEX_HEADS * INDEX_DIM),
        linear(HIDDEN, INDEX_HEADS),
        rope=turn,
        entries=keys,
        **pool(INDEX_DIM),  # type: ignore[arg-type]
    )
    return CompressedAttentionSpec(
        hidden=HIDDEN,
        heads=HEADS,
        head_dim=DIM,
        groups=GROUPS,
        o_rank=O_RANK,
        q_eps=1e-6,
        q_a=linear(HIDDEN, RANK),
        q_a_norm=RMSNormSpec(RANK, 1e-6),
        q_b=linear(RANK, HEADS * DIM),
        kv=linear(HIDDEN, DIM),
        kv_norm=RMSNormSpec(DIM, 1e-6),
        o_b=linear(GROUPS * O_RANK, HIDDEN),
        rope=turn,
        window=WindowCacheSpec(HEADS, DIM, WINDOW),
        o_a_format=DENSE,
        entries=EntryCacheSpec(HEADS, DIM, RATIO, True, chosen=True),
        indexer=indexer,
        norm=RMSNormSpec(HIDDEN, 1e-6),
        residual=False,
        **pool(DIM),  # type: ignore[arg-type]
    )


def decode(contexts: list[int], threads: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of one new token, by context."""
    torch.set_num_threads(threads)
    runtime, spec = CpuRuntime(threads), branch_spec()
    weights = make_weights(spec, np.random.default_rng(0))
    module = CpuCompressedAttention().load(LoadRequest("layer", spec, weights, runtime, runtime.capabilities()))
    pages = max(contexts) // PAGE + 1
    module.allocate_pages(pages, PAGE)
    module.allocate_states(1)
    _fill(module, runtime, pages)
    table = torch.randperm(pages, dtype=torch.int32)[None]
    times: dict[int, list[float]] = {context: [] for context in contexts}
    for _ in range(rounds):
        for context in contexts:
            for ring in module.state_tensors():
                if ring.dtype == torch.int64:
                    ring.fill_(context - 1)
            step = StepBatch(
                torch.zeros(1, dtype=torch.int64), torch.tensor([context - 1]), (0, 1), (context,), table, PAGE, (0,)
            )
            x = torch.randn(1, HIDDEN)
            began = time.perf_counter()
            module(x, step)
            times[context].append(1e3 * (time.perf_counter() - began))
    return {str(context): statistics.median(took) for context, took in times.items()}


def _fill(module: object, runtime: CpuRuntime, pages: int) -> None:
    """Random entries and index keys in all pages, keys in the ring."""
    own, keys = module.page_tensors()  # type: ignore[attr-defined]
    ring = module.state_tensors()[1]  # type: ignore[attr-defined]
    for memory, dim in ((own, DIM), (keys, INDEX_DIM), (ring, DIM)):
        count = WINDOW if memory is ring else pages * PAGE // RATIO
        rows = torch.randn(count, dim)
        places = list(range(count))
        _native.store_rows(runtime.pool, rows.data_ptr(), count, dim, places, memory.data_ptr(), count, "i16")


def main() -> int:
    """Write and measure, or time; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "decode"))
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--folder", help="where the file is written for a while; the system's folder if left out")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    wanted = parser.parse_args()
    if wanted.what == "decode":
        found = decode(wanted.contexts, wanted.threads, wanted.rounds)
        ratio = found[str(wanted.contexts[-1])] / found[str(wanted.contexts[0])]
        print(json.dumps({"ms": found, "ratio": ratio}))
        return 0 if ratio <= 1.3 else 1
    return peak_of("v4_layer", wanted.folder, wanted.experts)


if __name__ == "__main__":
    raise SystemExit(main())
