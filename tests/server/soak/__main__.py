"""Soaks `ktcore serve` with mixed load and says what was wrong.

    python -m tests.server.soak MODEL [--minutes 30] [--workers 12] [--json OUT.json]

Streams, disconnects, slow readers, stop strings, forms, several choices, embeddings, both APIs, and requests that must
be refused. Greedy and seeded answers are compared with those that the server gave alone; at the end nothing may run,
all KV pages are free, metrics agree with the clients' counts, memory is flat, and SIGTERM lets an answer under way end.

Flat means: resident memory of the last tenth of the time is at most 5% over that of the tenth after the first quarter,
medians both. The prefix cache's tiers are small here, and the KV cache with them, so that all are full by then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from .checks import FLAT, Soaked, problems, soak


def main() -> int:
    """Runs it; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--context", type=int, default=4096, help="small, so that answers have to make room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ktcore-soak-") as folder, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken.close()
        words = [str(a.model), "--name", "soaked", "--port", str(port), "--backend", "cpu", "--context", str(a.context)]
        # small tiers, so that they are full before memory is looked at
        words += ["--prefix-cache", folder, "--prefix-cache-disk", "64MiB", "--prefix-cache-memory", "32MiB"]
        words += ["--log", "off"]
        environment = {**os.environ, "KTCORE_PLUGINS": "cpu"}
        process = subprocess.Popen([sys.executable, "-m", "ktcore.cli.main", "serve", *words], env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process)
            resident = psutil.Process(process.pid)
            soaked = asyncio.run(
                soak(
                    url, "soaked", a.context, a.minutes * 60, a.workers, lambda: resident.memory_info().rss, seed=a.seed
                )
            )
            wrong = problems(soaked)
            if soaked.growth > FLAT:
                wrong.append(f"resident memory grew by {soaked.growth:.1%} after the warm-up")
            wrong += _drain(url, process)
        finally:
            process.kill()
    _tell(soaked, wrong, a.json)
    return bool(wrong)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 120
    while True:
        if process.poll() is not None or time.monotonic() > ends:
            sys.exit("the server does not answer")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)


def _drain(url: str, process: subprocess.Popen[bytes]) -> list[str]:
    """SIGTERM while an answer is under way: it comes to its end, and so does the server."""
    ask = {"model": "soaked", "prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=ask, timeout=60) as response:
        pieces = response.iter_text()
        text = next(pieces)
        process.send_signal(signal.SIGTERM)
        text += "".join(pieces)
    wrong = [] if '"finish_reason": "length"' in text else ["SIGTERM cut off an answer"]
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        return [*wrong, "the server did not end in a minute after SIGTERM"]
    return wrong if code == 0 else [*wrong, f"the server ended with {code}"]


def _tell(soaked: Soaked, wrong: list[str], out: Path | None) -> None:
    tally, points = soaked.tally, soaked.memory
    curve = [(round(t), round(m / 2**20, 1)) for t, m in points[:: max(len(points) // 20, 1)]]
    told = {
        "requests": dict(tally.kinds.most_common()),
        "answers": tally.choices,
        "hung_up": tally.left + tally.unheard,
        "tokens": tally.new_tokens,
        "metrics": {name: value for name, value in soaked.metrics.items() if value and "bucket" not in name},
        "memory_mib": curve,
        "memory_growth": round(soaked.growth, 4),
        "failures": len(tally.failures),
        "wrong": wrong,
    }
    print(json.dumps(told, indent=2))
    if out is not None:
        out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
