"""Where a decode step's time goes, part by part, beside the bytes that each part reads and what this machine can read.

python benchmarks/step_parts.py model.gguf [--threads N] [--batch 1] [--rounds 8] [--steps 40]

The read speed is measured before and after each round, since memory's speed drifts; shares are of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ktcore_cpu import _native

from ktcore.engine.model import Model, load
from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.engine import Engine
from ktcore.ops.moe import ExpertsSpec
from ktcore.ops.sampling import SamplingParams

PROMPT = 16


@dataclass
class Parts:
    """Puts a clock around the parts of a loaded model.

    Attributes:
        spent: seconds by part since it was last cleared.
        fixed: bytes that a step reads whatever it is given, by part, as they are stored.
        expert: bytes of one routed expert, by layer.
    """

    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    fixed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    expert: dict[int, float] = field(default_factory=dict)

    def watch(self, model: Model) -> None:
        """Replaces the engine's parts by timed ones."""
        run = model.engine.model
        layers = []
        for i, (attention, ffn) in enumerate(run.layers):
            name = "experts" if i in run.expert_loads else "dense"
            layers.append((self._timed("attention", attention), self._timed(name, ffn)))
            layer = model.plan.graph.layers[i]
            routed = [n for n in layer.ffn.walk() if isinstance(n.spec, ExpertsSpec)]
            self.fixed["attention"] += layer.attn.nbytes
            self.fixed[name] += layer.ffn.nbytes - sum(n.nbytes for n in routed)
            for node in routed:
                assert isinstance(node.spec, ExpertsSpec)
                self.expert[i] = node.nbytes / node.spec.experts
        self.fixed["head"] = model.plan.graph.head.nbytes
        model.engine.model = replace(
            run,
            layers=tuple(layers),
            embed=self._timed("embedding", run.embed),
            norm=self._timed("norm", run.norm),
            head=self._timed("head", run.head),
            sampler=self._timed("sampler", run.sampler),
        )

    def _timed(self, name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return part(*arguments)
            finally:
                self.spent[name] += time.perf_counter() - start

        return run


def main() -> None:
    """Measures and prints medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    options = parser.parse_args()
    new = options.rounds * (options.steps + 1) + 8
    context = options.batch * (PROMPT + new + 64)
    with load(options.model, backend="cpu", threads=options.threads, context=context) as model:
        parts = Parts()
        parts.watch(model)
        for i in range(options.batch):
            ids = [(i * PROMPT + j) % model.plan.graph.vocab for j in range(PROMPT)]
            model.engine.add(Sequence(ids, SamplingParams(temperature=0), max_new_tokens=new))
        for _ in range(4):  # the prompts, and memory that is asked for once
            model.engine.step()
        show(list(rounds(model.engine, parts, options.rounds, options.steps)))


@dataclass(frozen=True)
class Round:
    """One round: bytes a second that the machine read, seconds and bytes of a step's parts."""

    read: float
    seconds: dict[str, float]
    nbytes: dict[str, float]


def rounds(engine: Engine, parts: Parts, count: int, steps: int) -> Iterator[Round]:
    """Runs them; the last part of each is what lies between the others: Python, scheduling, checks."""
    pool = engine.model.devices.runtime("cpu").pool  # type: ignore[attr-defined]
    for _ in range(count):
        before = _native.read_bandwidth(pool, 0.03)
        engine.step()  # what the measurement has put out of the caches
        parts.spent.clear()
        wall = routed = 0.0
        for _ in range(steps):
            loads = {i: [m.expert_load() for m in modules] for i, modules in engine.model.expert_loads.items()}
            start = time.perf_counter()
            engine.step()
            wall += time.perf_counter() - start
            for i, modules in engine.model.expert_loads.items():
                for was, module in zip(loads[i], modules, strict=True):
                    now = module.expert_load()
                    if was is not None and now is not None:
                        routed += int((now != was).sum()) * parts.expert[i]
        nbytes = {name: float(n) for name, n in parts.fixed.items()}
        if routed:
            nbytes["experts"] += routed / steps
        seconds = {name: spent / steps for name, spent in parts.spent.items()}
        seconds["between"] = wall / steps - sum(seconds.values())
        yield Round((before + _native.read_bandwidth(pool, 0.03)) / 2, seconds, nbytes)


def show(found: list[Round]) -> None:
    """A line a part."""

    def line(name: str, seconds: Callable[[Round], float], nbytes: Callable[[Round], float]) -> None:
        share = statistics.median(nbytes(r) / seconds(r) / r.read for r in found)
        took, size = (statistics.median(map(of, found)) for of in (seconds, nbytes))
        print(f"{name:10} {took * 1e3:8.3f} ms {size / 1e6:8.1f} MB {share:6.0%} of the read speed")

    print(f"streaming read: {statistics.median(r.read for r in found) / 1e9:.1f} GB/s")
    for name in found[0].seconds:
        line(name, lambda r, n=name: r.seconds[n], lambda r, n=name: r.nbytes.get(n, 0.0))  # type: ignore[misc]
    line("step", lambda r: sum(r.seconds.values()), lambda r: sum(r.nbytes.values()))


if __name__ == "__main__":
    main()
