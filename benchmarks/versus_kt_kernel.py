#!/usr/bin/env python3
"""Times a layer of experts beside kt-kernel's, turn by turn, and prints the ratios of the medians.

    python -m venv peer && peer/bin/pip install --no-deps kt-kernel     # it needs torch too
    python benchmarks/versus_kt_kernel.py --peer-python peer/bin/python [--kinds int8,int4,bf16,q4_k] [--rounds 5]

Each kind of weights runs in four settings, ours and the peer's with one thread and with as many as there are cores,
and each side's better one counts. Every round times all of them in turn; a peer that is not being timed is stopped
(SIGSTOP), so that threads that spin cost nobody else. Before timing, both sides' outputs are compared with float64 on
the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ktcore_cpu import ExpertLayer, ExpertPool
from ktcore_cpu.bench_parts import random_blocks

from ktcore.weights.formats import dequantize
from ktcore.weights.quantize import Loss, quantize_rows

DISTINCT = 4
"""Experts of different weights; the others repeat them, each at its own place in memory."""
CHECKED = 4
"""Tokens of a batch whose outputs are compared."""
OURS = {"int8": "INT8_G128", "int4": "INT4_G128", "bf16": "BF16", "q4_k": "Q4_K"}
MOST_ERROR = {"int8": 0.05, "int4": 0.35, "bf16": 0.012, "q4_k": 0.05}
"""Relative errors that the schemes explain: kt-kernel has one int4 or int8 scale a row of weights."""

PEER = """
import json, os, sys, time
import numpy as np
import torch
from kt_kernel import kt_kernel_ext as ext

folder, kind, threads, E, H, I, K = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:8])
reply = os.fdopen(int(sys.argv[8]), "w", buffering=1)
pool = ext.WorkerPoolConfig()
pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
cpu = ext.CPUInfer(pool)
stored = [torch.from_numpy(np.load(f"{folder}/{kind}.{role}.npy")) for role in ("gate", "up", "down")]
gate, up, down = (s.repeat(E // len(s), *[1] * (s.dim() - 1)).contiguous() for s in stored)
mask = torch.zeros(E, dtype=torch.bool)
config = ext.moe.MOEConfig(E, K, H, I, mask.data_ptr())
config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, 2048
if kind == "bf16":
    each = [[[w[e].data_ptr() for e in range(E)]] for w in (gate, up, down)]
    config.gate_projs, config.up_projs, config.down_projs = each
    moe = ext.moe.AMXBF16_MOE(config)
else:
    config.gate_proj, config.up_proj, config.down_proj = (w.data_ptr() for w in (gate, up, down))
    if kind == "q4_k":
        types = ext.kvcache.ggml_type
        config.gate_type = config.up_type = config.down_type = int(types.Q4_K)
        config.hidden_type = int(types.BF16)
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, 2048
        moe = ext.moe.MOE(config)
    else:
        moe = {"int8": ext.moe.AMXInt8_MOE, "int4": ext.moe.AMXInt4_MOE}[kind](config)
order = torch.arange(E, dtype=torch.int64)
cpu.submit(moe.load_weights_task(order.data_ptr()))
cpu.sync()
if kind != "q4_k":  # the others have made copies of their own
    del gate, up, down
print("ready", file=reply)
for line in sys.stdin:
    tokens, seconds = json.loads(line)
    x = torch.from_numpy(np.load(f"{folder}/{tokens}.x.npy")).bfloat16().contiguous()
    ids = torch.from_numpy(np.load(f"{folder}/{tokens}.ids.npy"))
    weights = torch.full((tokens, K), 1.0 / K)
    out = torch.zeros(tokens, H, dtype=torch.bfloat16)
    count = torch.tensor([tokens], dtype=torch.int32)
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        for chosen in ids:
            cpu.submit(moe.forward_task(count.data_ptr(), K, chosen.data_ptr(), weights.data_ptr(), x.data_ptr(),
                                        out.data_ptr(), False))
            cpu.sync()
        calls += len(ids)
    took = (time.perf_counter() - start) / calls
    np.save(f"{folder}/out.npy", out.float().numpy())
    print(json.dumps(took), file=reply)
"""


@dataclass
class Batch:
    """Inputs of one token count: several routings, so that one token's experts are not in a cache."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


class Ours:
    """Our layer with some threads."""

    def __init__(self, kind: str, stored: list[np.ndarray], threads: int, shape: tuple[int, int, int, int]) -> None:
        experts, hidden, intermediate, _ = shape
        if OURS[kind].startswith("INT"):
            stored = [np.stack([_quantized(m, OURS[kind]) for m in role]) for role in stored]
        self.layer = ExpertLayer.from_experts(
            ([role.view(np.uint8)[e % DISTINCT] for role in stored] for e in range(experts)),
            experts=experts,
            hidden=hidden,
            intermediate=intermediate,
            formats=OURS[kind],
            pool=ExpertPool(threads),
        )

    def seconds(self, batch: Batch, least: float) -> tuple[float, np.ndarray]:
        """Of one call, and the last output."""
        out = np.empty_like(batch.x)
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < least:
            for ids in batch.ids:
                self.layer(batch.x, ids, batch.weights, out)
            calls += len(batch.ids)
        return (time.perf_counter() - start) / calls, out

    def close(self) -> None:
        """Nothing to end."""


class Peer:
    """kt-kernel in a process of its own, stopped while it is not asked."""

    def __init__(self, python: str, folder: Path, kind: str, threads: int, shape: tuple[int, int, int, int]) -> None:
        read, write = os.pipe()
        command = [python, "-c", PEER, str(folder), kind, str(threads), *map(str, shape), str(write)]
        self.log = (folder / f"{kind}.{threads}.log").open("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, pass_fds=[write], text=True
        )
        os.close(write)
        self.folder, self.replies = folder, os.fdopen(read)
        self._reply()
        self.process.send_signal(signal.SIGSTOP)

    def seconds(self, batch: Batch, least: float) -> tuple[float, np.ndarray]:
        """Of one call, and the last output."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        print(json.dumps([len(batch.x), least]), file=self.process.stdin, flush=True)
        took = float(self._reply())
        self.process.send_signal(signal.SIGSTOP)
        return took, np.load(self.folder / "out.npy")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _reply(self) -> str:
        line = self.replies.readline()
        if not line:
            self.log.seek(0)
            sys.exit(f"kt-kernel failed:\n{self.log.read()[-2000:]}")
        return line


def main() -> None:
    """Run the rounds, print one JSON line a kind and token count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--kinds", default="int8,int4,bf16,q4_k")
    parser.add_argument("--tokens", default="1,8,32,128,512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--threads", default=f"1,{len(os.sched_getaffinity(0))}")
    a = parser.parse_args()
    shape = (a.experts, a.hidden, a.intermediate, a.top_k)
    counts, threads = [int(n) for n in a.tokens.split(",")], sorted({int(n) for n in a.threads.split(",")})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batches = {tokens: _batch(folder, tokens, shape) for tokens in counts}
        for kind in a.kinds.split(","):
            stored, values = _weights(folder, kind, shape)
            sides = {("ktcore", n): Ours(kind, stored, n, shape) for n in threads}
            sides |= {("kt-kernel", n): Peer(a.peer_python, folder, kind, n, shape) for n in threads}  # type: ignore[dict-item]
            try:
                _compare(kind, sides, batches, values, a.rounds)
            finally:
                for side in sides.values():
                    side.close()


def _compare(
    kind: str, sides: dict[tuple[str, int], Any], batches: dict[int, Batch], values: list[np.ndarray], rounds: int
) -> None:
    errors = {}
    for tokens, batch in batches.items():
        want = _truth(values, batch)
        for side, runner in sides.items():
            error = _relative(runner.seconds(batch, 0.0)[1][: len(want)], want)
            if error > MOST_ERROR[kind]:
                sys.exit(f"{kind}: {side[0]} with {side[1]} threads is off by {error:.3f} for {tokens} tokens")
            errors[tokens, side[0]] = error
    times: dict[tuple[int, tuple[str, int]], list[float]] = {}
    for _ in range(rounds):
        for tokens, batch in batches.items():
            for side, runner in sides.items():
                times.setdefault((tokens, side), []).append(runner.seconds(batch, 0.1)[0])
    for tokens in batches:
        best = {}
        for name in ("ktcore", "kt-kernel"):
            medians = {
                side[1]: statistics.median(t) for (n, side), t in times.items() if (n, side[0]) == (tokens, name)
            }
            threads = min(medians, key=lambda n: medians[n])
            best[name] = (threads, medians[threads])
        line = {"kind": kind, "tokens": tokens}
        for name, (threads, seconds) in best.items():
            line |= {f"{name} tok/s": round(tokens / seconds, 1), f"{name} threads": threads}
            line |= {f"{name} error": round(errors[tokens, name], 4)}
        print(json.dumps({**line, "ratio": round(best["kt-kernel"][1] / best["ktcore"][1], 2)}), flush=True)


def _weights(folder: Path, kind: str, shape: tuple[int, int, int, int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What both sides store of the distinct experts (bfloat16 bits, or Q4_K blocks), and its values."""
    _, hidden, intermediate, _ = shape
    rng = np.random.default_rng(0)
    stored, values = [], []
    for role, rows, cols in (
        ("gate", intermediate, hidden),
        ("up", intermediate, hidden),
        ("down", hidden, intermediate),
    ):
        if kind == "q4_k":
            raw = np.stack([random_blocks("Q4_K", (rows, cols), rng) for _ in range(DISTINCT)])
            values.append(np.stack([dequantize("Q4_K", r, (rows, cols)).numpy() for r in raw]))
        else:
            floats = rng.standard_normal((DISTINCT, rows, cols), dtype=np.float32) * np.float32(cols**-0.5)
            rounded = torch.from_numpy(floats).bfloat16()
            raw = rounded.view(torch.int16).numpy()
            values.append(rounded.float().numpy())
        np.save(folder / f"{kind}.{role}.npy", raw)
        stored.append(raw)
    return stored, values


def _quantized(bits: np.ndarray, fmt: str) -> np.ndarray:
    """bfloat16 bits [rows, cols] in one of our group formats."""
    return quantize_rows(torch.from_numpy(bits).view(torch.bfloat16).float(), fmt, Loss(), "the random weights")


def _batch(folder: Path, tokens: int, shape: tuple[int, int, int, int]) -> Batch:
    experts, hidden, _, top_k = shape
    rng = np.random.default_rng(tokens)
    x = torch.from_numpy(rng.standard_normal((tokens, hidden), dtype=np.float32)).bfloat16().float().numpy()
    routings = max(1, min(16, 32 // tokens))
    ids = np.stack([[rng.permutation(experts)[:top_k] for _ in range(tokens)] for _ in range(routings)])
    np.save(folder / f"{tokens}.x.npy", x)
    np.save(folder / f"{tokens}.ids.npy", ids)
    return Batch(x, ids, np.full((tokens, top_k), 1 / top_k, np.float32))


def _truth(values: list[np.ndarray], batch: Batch) -> np.ndarray:
    """The first outputs of the last routing in float64."""
    gate, up, down = values
    out = np.zeros((min(CHECKED, len(batch.x)), batch.x.shape[1]))
    for t in range(len(out)):
        x = batch.x[t].astype(np.float64)
        for e, weight in zip(batch.ids[-1][t] % DISTINCT, batch.weights[t], strict=True):
            g = gate[e] @ x
            out[t] += weight * (down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ x)))
    return out


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


if __name__ == "__main__":
    main()
