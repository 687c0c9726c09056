"""How much of a decode step is Python: time inside native calls against the wall time of engine steps.

python benchmarks/python_share.py model.gguf [--threads N] [--steps 200] [--batch 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ktcore_cpu import _native

from ktcore.engine.model import load
from ktcore.engine.schedule.sequence import Sequence
from ktcore.ops.sampling import SamplingParams


class Clock:
    """Wraps every native call that computes; adds up the wall time inside, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        for name, kind in vars(_native).items():
            if isinstance(kind, type) and hasattr(kind, "forward"):
                kind.forward = self.timed(name, kind.forward)  # type: ignore[attr-defined]
        for name in ("linear", "rms_norm", "dequantize_rows"):
            setattr(_native, name, self.timed(name, getattr(_native, name)))

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, counted."""

        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.spent[name] += time.perf_counter() - start
                self.calls[name] += 1

        return run


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    clock = Clock()
    with load(
        options.model, backend="cpu", threads=options.threads, context=options.batch * (options.steps + 64)
    ) as model:
        engine = model.engine
        for i in range(options.batch):
            engine.add(
                Sequence(list(range(10 + i, 26 + i)), SamplingParams(temperature=0), max_new_tokens=options.steps + 8)
            )
        for _ in range(4):  # the prompts, and memory that is asked for once
            engine.step()
        shares, walls = [], []
        clock.spent.clear()
        clock.calls.clear()
        for _ in range(options.steps):
            before, start = sum(clock.spent.values()), time.perf_counter()
            engine.step()
            walls.append(time.perf_counter() - start)
            shares.append(1 - (sum(clock.spent.values()) - before) / walls[-1])
    wall = statistics.median(walls)
    share = statistics.median(shares)
    outside = statistics.median(w * s for w, s in zip(walls, shares, strict=True))
    print(f"a decode step of {options.batch}: {wall * 1e3:.2f} ms")
    print(f"outside native calls: {outside * 1e3:.3f} ms, {share:.1%}")
    for name in sorted(clock.spent, key=clock.spent.__getitem__, reverse=True):
        each = clock.spent[name] / options.steps
        print(f"  {name}: {each * 1e3:.3f} ms in {clock.calls[name] / options.steps:.1f} calls")


if __name__ == "__main__":
    main()
