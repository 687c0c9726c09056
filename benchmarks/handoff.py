#!/usr/bin/env python3
"""What the hand-off to host experts costs, and whether it overlaps, on the simulated accelerator.

    pip install ./backends/sim
    python benchmarks/handoff.py

1. Overhead: a layer whose experts do nothing, with and without the hand-off; the difference is its price, and the time
   that the host thread spends in submit and wait is shown beside it.
2. Overlap: each layer runs `--device-ms` on the device (its shared experts, between submit and wait) and as long on the
   host; a step that overlaps takes the longer of both, one that does not takes their sum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from ktcore_cpu.backend import CpuRuntime
from ktcore_sim.options import SimOptions
from ktcore_sim.runtime import SimRuntime

from ktcore.backend.runtime import HostCallbackMode
from ktcore.engine.experts.handoff import HandOff

HIDDEN, TOP_K = 2048, 8


def idle(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Experts that take no time."""
    return x


class Layers:
    """A chain of hand-offs, one a layer, on one stream."""

    def __init__(self, mode: str, layers: int, experts: object, tokens: int) -> None:
        self.runtime = SimRuntime(0, SimOptions(host_callback=HostCallbackMode(mode)))
        self.stream = self.runtime.new_stream()
        self.lane = CpuRuntime(1).new_lane()
        self.layers = [
            HandOff(experts, self.runtime, self.stream, self.lane, HIDDEN, TOP_K, tokens)  # type: ignore[arg-type]
            for _ in range(layers)
        ]
        with self.runtime.use_stream(self.stream):
            self.x = torch.randn(tokens, HIDDEN).to(self.runtime.device)
            self.ids = torch.zeros(tokens, TOP_K, dtype=torch.int64).to(self.runtime.device)
            self.weights = torch.rand(tokens, TOP_K).to(self.runtime.device)
        self.runtime.synchronize(self.stream)

    def step(self, device_s: float = 0.0) -> tuple[float, float]:
        """Seconds of a step over all layers, and those that the host thread was busy launching it."""
        begin = time.perf_counter()
        with self.runtime.use_stream(self.stream):
            for layer in self.layers:
                ticket = layer.submit(self.x, self.ids, self.weights)
                if device_s:
                    self.runtime.sleep(self.stream, device_s)
                layer.wait(ticket)
        launched = time.perf_counter()
        self.runtime.synchronize(self.stream)
        end = time.perf_counter()
        for layer in self.layers:
            layer.check()
        return end - begin, launched - begin

    def medians(self, rounds: int, device_s: float = 0.0) -> tuple[float, float]:
        """Median of `rounds` steps, after two that warm up."""
        found = [self.step(device_s) for _ in range(rounds + 2)][2:]
        return statistics.median(f[0] for f in found), statistics.median(f[1] for f in found)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device-ms", type=float, default=5.0)
    a = parser.parse_args()
    report: dict[str, object] = {}
    for mode in ("none", "eager", "capturable"):
        step, launch = Layers(mode, a.layers, idle, 1).medians(a.rounds)
        seconds = a.device_ms / 1e3

        def busy(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, seconds: float = seconds) -> torch.Tensor:
            time.sleep(seconds)
            return x

        both, _ = Layers(mode, a.layers, busy, 1).medians(5, seconds)
        report[mode] = {
            "hand_off_us_a_layer": round(step / a.layers * 1e6, 1),
            "host_thread_us_a_layer": round(launch / a.layers * 1e6, 1),
            "overlapped_step_ms": round(both * 1e3, 2),
            "longer_side_ms": round(seconds * a.layers * 1e3, 2),
            "ratio": round(both / (seconds * a.layers), 3),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
