#!/usr/bin/env python3
"""Puts `ktcore serve` and llama.cpp's server under the same load on the same GGUF file, turn by turn.

    python benchmarks/serving.py MODEL.gguf --peer llama-server [--scenario streams] [--rounds 3] [--json OUT.json]

Scenarios: streams (eight at once against one), newcomer (a long prompt beside running streams), prefix (a prompt whose
beginning is known), arrivals (mixed requests at random times). Peers: llama-server (built once, under build/, from the
sources that llama-cpp-python carries), llama-cpp-python (its server, in an environment under build/), none. Prompts are
the same texts for both, answers greedy and of a fixed length, every prompt new to both servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil
import serving_scenarios as scenarios
from rich.console import Console
from rich.table import Table
from serving_client import Target
from serving_servers import (
    ROOT,
    Server,
    build_llama_server,
    install_llama_cpp_python,
    ktcore_server,
    llama_cpp_python,
    llama_server,
)

from ktcore.cli.machine import examine

NAMES = ("streams", "newcomer", "prefix", "arrivals")
Rounds = dict[str, dict[str, list[scenarios.Figures]]]


def main() -> None:
    """Measures, prints a table, and leaves the figures of every round where asked to."""
    a = _arguments()
    load = scenarios.Load(**{f.name: getattr(a, f.name) for f in fields(scenarios.Load) if f.name != "pause"})
    console = Console()
    with tempfile.TemporaryDirectory(prefix="ktcore-serving-") as folder:
        servers = _servers(a, Path(folder))
        loads_before = psutil.getloadavg()
        try:
            targets = {server.name: server.start() for server in servers}
            rounds = _run(a, load, servers, targets, console)
        finally:
            for server in servers:
                server.stop()
    found = {
        "machine": {**examine()["machine"], "load_before": loads_before, "load_after": psutil.getloadavg()},
        "model": a.model.name,
        "threads": a.threads,
        "context": a.context,
        "load": asdict(load),
        "rounds": rounds,
        "medians": {name: {who: _medians(f) for who, f in each.items()} for name, each in rounds.items()},
    }
    _show(found, console)
    if a.json:
        a.json.write_text(json.dumps(found, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", choices=("llama-server", "llama-cpp-python", "none"), default="llama-server")
    parser.add_argument("--peer-path", type=Path, help="a llama-server, or a Python that has llama-cpp-python[server]")
    parser.add_argument("--scenario", choices=NAMES, action="append", help="once or more; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--context", type=int, default=16384, help="tokens that all sequences share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    for f in fields(scenarios.Load):
        if f.name != "pause":
            parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default)
    return parser.parse_args()


def _servers(a: argparse.Namespace, folder: Path) -> list[Server]:
    made = [ktcore_server(a.model, a.threads, a.context, folder)]
    if a.peer == "llama-server":
        binary = a.peer_path or build_llama_server(ROOT / "build" / "llama.cpp")
        made.append(llama_server(binary, a.model, a.threads, a.context, folder))
    elif a.peer == "llama-cpp-python":
        python = a.peer_path or install_llama_cpp_python(ROOT / "build" / "llama-cpp-python")
        made.append(llama_cpp_python(python, a.model, a.threads, a.context, folder))
    return made


def _run(
    a: argparse.Namespace, load: scenarios.Load, servers: list[Server], targets: dict[str, Target], console: Console
) -> Rounds:
    rounds: Rounds = {}
    for name in a.scenario or NAMES:
        rounds[name] = {server.name: [] for server in servers}
        for number in range(-1, a.rounds):
            for server in servers:
                rng = random.Random(f"{a.seed} {name} {number}")
                if number < 0:  # memory that is asked for once, code that is compiled once
                    asyncio.run(targets[server.name].ask(scenarios.words(64, rng), 8))
                    continue
                figures = _round(name, load, server, targets, rng)
                rounds[name][server.name].append(figures)
                shown = {k: float(f"{v:.4g}") for k, v in figures.items()}
                console.print_json(json.dumps({"scenario": name, "server": server.name, **shown}), indent=None)
    return rounds


def _round(
    name: str, load: scenarios.Load, server: Server, targets: dict[str, Target], rng: random.Random
) -> scenarios.Figures:
    def restart() -> Target:
        server.stop()
        targets[server.name] = server.start()
        return targets[server.name]

    target = targets[server.name]
    if name == "prefix":
        return asyncio.run(scenarios.prefix(target, load, rng, restart))
    return asyncio.run(getattr(scenarios, name)(target, load, rng))


def _medians(rounds: list[scenarios.Figures]) -> scenarios.Figures:
    keys = dict.fromkeys(key for each in rounds for key in each)
    return {key: statistics.median(each[key] for each in rounds if key in each) for key in keys}


def _show(found: dict[str, Any], console: Console) -> None:
    machine = found["machine"]
    loads = "{:.1f} before, {:.1f} after".format(machine["load_before"][0], machine["load_after"][0])
    console.print(f"{found['model']} on {machine['logical_cpus']} CPUs of {machine['cpu']}, {found['threads']} threads")
    console.print(f"processes that wanted to run: {loads}")
    for name, servers in found["medians"].items():
        table = Table("median of rounds", *servers, title=name)
        for key in dict.fromkeys(key for each in servers.values() for key in each):
            cells = [_cell(key, each.get(key)) for each in servers.values()]
            table.add_row(key.removesuffix("_s") if not key.endswith("tok_s") else key, *cells)
        console.print(table)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key.endswith("_s") and not key.endswith("tok_s"):
        return f"{value * 1e3:.4g} ms"
    return f"{value:.4g}"


if __name__ == "__main__":
    main()
