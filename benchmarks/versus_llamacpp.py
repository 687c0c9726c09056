#!/usr/bin/env python3
"""Times ktcore beside llama.cpp on one GGUF file, turn by turn, and prints the ratios of the medians.

    pip install llama-cpp-python        # CMAKE_ARGS=-DGGML_NATIVE=ON and --no-binary build it for this CPU
    python benchmarks/versus_llamacpp.py MODEL.gguf [--peer-python PATH] [--rounds 5] [--threads 2]

Each round runs one process of each engine, A B A B, so that a machine whose speed drifts cannot favour either. The peer
may live in another environment: give its Python with --peer-python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

PEER = """
import json, random, sys, time
from llama_cpp import Llama
path, prompt, new, threads = sys.argv[1], *map(int, sys.argv[2:5])
llm = Llama(model_path=path, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512,
            n_ctx=prompt + new + 64, verbose=False)
random.seed(0)
ids = [random.randrange(100, 40000) for _ in range(prompt)]
best = []
for _ in range(3):
    llm.reset()
    t = time.perf_counter(); llm.eval(ids); prefill = prompt / (time.perf_counter() - t)
    t = time.perf_counter()
    for i in range(new):
        llm.eval([ids[i % prompt]])
    best.append((prefill, new / (time.perf_counter() - t)))
best.sort()
print(json.dumps(dict(prefill_tok_s=best[1][0], decode_tok_s=sorted(b[1] for b in best)[1])))
"""


def main() -> None:
    """Run the rounds and print one JSON line each and the ratios at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    sizes = [str(a.prompt), str(a.new), str(a.threads)]
    ours = [sys.executable, "-m", "ktcore.cli.main", "bench", str(a.model), "-p", sizes[0], "-n", sizes[1]]
    ours += ["--threads", sizes[2], "--backend", "cpu", "--json"]
    peer = [a.peer_python, "-c", PEER, str(a.model), *sizes]
    figures: dict[str, list[dict[str, float]]] = {"ktcore": [], "llama.cpp": []}
    for _ in range(a.rounds):
        for name, command in (("ktcore", ours), ("llama.cpp", peer)):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            figures[name].append(json.loads(done.stdout))
            shown = {k: v for k, v in figures[name][-1].items() if isinstance(v, (int, float))}
            print(json.dumps({"engine": name, **shown}), flush=True)
    summary = {}
    for phase in ("prefill_tok_s", "decode_tok_s"):
        medians = {name: statistics.median(f[phase] for f in runs) for name, runs in figures.items()}
        pairs = [o[phase] / p[phase] for o, p in zip(figures["ktcore"], figures["llama.cpp"], strict=True)]
        summary[phase] = {**{k: round(v, 1) for k, v in medians.items()}, "ratio": round(statistics.median(pairs), 3)}
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
