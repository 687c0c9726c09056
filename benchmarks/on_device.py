"""Opens a backend's device for a benchmark, or its simulation, and times work on it by replaying a captured graph."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def arguments(text: str | None) -> argparse.ArgumentParser:
    """A parser with what all of them take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--simulate", action="store_true", help="on the simulated device, small: no figures to keep")
    return parser


def prepare(given: argparse.Namespace) -> None:
    """Exchange the backend for its simulation when asked to. Call it before anything imports Triton."""
    os.environ.setdefault("TRITON_INTERPRET", "1" if given.simulate else "0")
    if given.simulate:
        sys.path.insert(0, str(ROOT))
        from tests.vendors.simulate import simulation

        simulation(given.backend).install()


class Bench:
    """A device, a stream on it, and times of what runs there."""

    def __init__(self, backend: str) -> None:
        from ktcore.backend import Registry

        self.runtime = Registry.discover().runtime(f"{backend}:0")
        self.device = self.runtime.device
        self.stream = self.runtime.new_stream()

    def seconds(self, work: Callable[[], object], times: int = 20, rounds: int = 5) -> float:
        """Median seconds of one `work`, of `rounds` replays of a graph that holds it `times` times."""
        import torch

        with torch.inference_mode():
            with self.runtime.use_stream(self.stream):
                for _ in range(2):
                    work()
            self.runtime.synchronize(self.stream)

            def repeat() -> None:
                for _ in range(times):
                    work()

            graph = self.runtime.capture(self.stream, repeat)
            found = []
            for _ in range(rounds + 1):
                begin = time.perf_counter()
                graph.replay(self.stream)
                self.runtime.synchronize(self.stream)
                found.append((time.perf_counter() - begin) / times)
        return statistics.median(found[1:])
