#!/usr/bin/env python3
"""A model with its dense part on a device and its experts on the host: does it answer right, and how fast.

    python benchmarks/device_hybrid.py MODEL --backend cuda [--reference] [--handoff]

Token ids are made up, so any model will do. `--reference` compares greedy tokens with those of the references on the
host, for models small enough; `--handoff` adds the price of a hand-off under a captured graph. Prints one JSON object.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from on_device import Bench, arguments, prepare


def handoff(backend: str, layers: int) -> dict[str, float]:
    """Microseconds a layer of a replayed chain of hand-offs to experts that do nothing."""
    import torch
    from ktcore_cpu.backend import CpuRuntime

    from ktcore.engine.experts.handoff import HandOff

    bench, lane = Bench(backend), CpuRuntime(1).new_lane()
    hidden, top_k = 2048, 8
    chain = [HandOff(lambda x, i, w: x, bench.runtime, bench.stream, lane, hidden, top_k, 1) for _ in range(layers)]
    with bench.runtime.use_stream(bench.stream):
        x = torch.randn(1, hidden).to(bench.device)
        ids = torch.zeros(1, top_k, dtype=torch.int64).to(bench.device)
        weights = torch.rand(1, top_k).to(bench.device)

    def step() -> None:
        for layer in chain:
            layer.wait(layer.submit(x, ids, weights))

    with torch.inference_mode():
        with bench.runtime.use_stream(bench.stream):
            step()
        bench.runtime.synchronize(bench.stream)
        for layer in chain:
            layer.check()
        graph = bench.runtime.capture(bench.stream, step)
        jobs = [layer.take_over() for layer in chain]
        found = []
        for _ in range(20):
            begin = time.perf_counter()
            graph.replay(bench.stream)
            bench.runtime.synchronize(bench.stream)
            found.append((time.perf_counter() - begin) / layers)
    assert not any(ticket.job.error for tickets in jobs for ticket in tickets)
    return {"layers": layers, "us_a_layer": statistics.median(found) * 1e6}


def decode(model: Any, prompt: Any, new: int) -> dict[str, Any]:
    """Tokens that were drawn, and how many a second after the first."""
    from ktcore.engine.schedule.sequence import Sequence
    from ktcore.ops.sampling import SamplingParams

    sequence = Sequence(prompt.tolist(), SamplingParams(temperature=0), new)
    model.engine.add(sequence)
    stamps = []
    begin = time.perf_counter()
    import torch

    with torch.inference_mode():
        while model.engine.step():
            stamps.append(time.perf_counter())
    steps = [b - a for a, b in itertools.pairwise(stamps)] or [stamps[-1] - begin]
    return {"tokens": sequence.new_tokens, "tokens_s": 1 / statistics.median(steps), "prefill_s": stamps[0] - begin}


def _resident(backend: str) -> Path:
    """A rule file that brings all experts to the device."""
    path = Path(tempfile.mkdtemp()) / "resident.yaml"
    rule = f"{{name: resident, match: {{op: experts}}, use: {backend}.experts, device: accelerator}}"
    path.write_text(f"version: 1\nrules:\n  - {rule}\n", encoding="utf-8")
    return path


def main() -> None:
    """Print one JSON object."""
    parser = arguments(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--handoff", action="store_true")
    parser.add_argument("--resident", action="store_true", help="experts on the device too, for what fits")
    given = parser.parse_args()
    prepare(given)
    import torch

    import ktcore

    report: dict[str, Any] = {"model": given.model.name}
    if given.handoff:
        report["hand_off"] = handoff(given.backend, 4 if given.simulate else 24)
    begin = time.perf_counter()
    rules = _resident(given.backend) if given.resident else None
    with ktcore.load(given.model, backend=given.backend, rules=rules, context=2048) as model:
        report["load_s"] = time.perf_counter() - begin
        prompt = torch.randint(3, 900, (given.prompt,), generator=torch.Generator().manual_seed(1))
        decode(model, prompt, 4)  # compiles kernels, captures the step
        found = report["decode"] = decode(model, prompt, given.new)
        report["graphs"] = model.engine.model.no_graphs or "captured"
        report["devices"] = sorted({c.device for c in model.plan.choices.values()})
    if given.reference:
        with ktcore.load(given.model, backend="cpu", rules="reference", context=2048) as model:
            wanted = decode(model, prompt, given.new)["tokens"]
        same = sum(a == b for a, b in zip(found["tokens"], wanted, strict=True))
        report["tokens_as_the_references"] = f"{same} of {given.new}"
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
