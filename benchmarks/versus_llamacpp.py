#!/usr/bin/env python3
"""Times ktcore beside llama.cpp or ik_llama.cpp on one GGUF file, turn by turn, and prints the ratios of the medians.

    pip install llama-cpp-python        # CMAKE_ARGS=-DGGML_NATIVE=ON and --no-binary build it for this CPU
    python benchmarks/versus_llamacpp.py MODEL.gguf [--peer-python PATH] [--rounds 5] [--threads 2]
    python benchmarks/versus_llamacpp.py MODEL.gguf --peer ik_llama.cpp --llama-bench build/bin/llama-bench

Each round runs one process of each engine, A B A B, so that a machine whose speed drifts cannot favour either.
llama.cpp is a Python package, perhaps of another environment (--peer-python), or its own llama-bench; ik_llama.cpp is a
llama-bench, run with repacking, flash attention and fused experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import llama_bench

PEER = """
import json, random, sys, time
from llama_cpp import Llama
path, prompt, new, threads = sys.argv[1], *map(int, sys.argv[2:5])
llm = Llama(model_path=path, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512,
            n_ctx=prompt + new + 64, verbose=False)
random.seed(0)
ids = [random.randrange(100, min(40000, llm.n_vocab())) for _ in range(prompt)]
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


Figures = dict[str, float]
REPEATS = 3
"""Measurements of a phase in one process."""


def main(argv: list[str] | None = None) -> None:
    """Run the rounds and print one JSON line each and the ratios at the end."""
    a = _arguments(argv)
    sizes = [str(a.prompt), str(a.new), str(a.threads)]
    ours = [sys.executable, "-m", "ktcore.cli.main", "bench", str(a.model), "-p", sizes[0], "-n", sizes[1]]
    ours += ["--threads", sizes[2], "--backend", "cpu", "--json"]
    if a.llama_bench is None:
        peer: Callable[[], Figures] = partial(_printed, [a.peer_python, "-c", PEER, str(a.model), *sizes])
    else:
        calls = llama_bench.commands(a.peer, a.llama_bench, a.model, a.prompt, a.new, a.threads, REPEATS)
        peer = partial(llama_bench.measure, calls)
    figures: dict[str, list[Figures]] = {"ktcore": [], a.peer: []}
    for _ in range(a.rounds):
        for name, run in (("ktcore", partial(_printed, ours)), (a.peer, peer)):
            try:
                figures[name].append(run())
            except llama_bench.PeerError as error:
                sys.exit(f"{name} failed: {error}")
            print(json.dumps({"engine": name, **figures[name][-1]}), flush=True)
    print(json.dumps(summary(figures["ktcore"], figures[a.peer], a.peer), indent=2))


def summary(ours: list[Figures], theirs: list[Figures], peer: str) -> dict[str, Figures]:
    """The medians of each phase, and the median of the rounds' ratios."""
    found = {}
    for phase in ("prefill_tok_s", "decode_tok_s"):
        pairs = [o[phase] / p[phase] for o, p in zip(ours, theirs, strict=True)]
        medians = {name: statistics.median(f[phase] for f in runs) for name, runs in (("ktcore", ours), (peer, theirs))}
        found[phase] = {**{k: round(v, 1) for k, v in medians.items()}, "ratio": round(statistics.median(pairs), 3)}
    return found


def _printed(command: list[str]) -> Figures:
    """The numbers of the JSON that a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise llama_bench.PeerError(f"{command[0]} ended with {done.returncode}:\n{done.stderr}")
    return {k: v for k, v in json.loads(done.stdout).items() if isinstance(v, (int, float))}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", choices=llama_bench.FLAGS, default="llama.cpp")
    parser.add_argument("--llama-bench", type=Path, help="the peer's binary")
    parser.add_argument("--peer-python", help="of the environment that llama-cpp-python is in (this one)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args(argv)
    if a.llama_bench is not None and a.peer_python is not None:
        parser.error("--llama-bench runs no Python: give it or --peer-python")
    if a.peer == "ik_llama.cpp" and a.llama_bench is None:
        parser.error("--peer ik_llama.cpp needs --llama-bench")
    a.peer_python = a.peer_python or sys.executable
    return a


if __name__ == "__main__":
    main()
