"""Two builds of ktcore on one model, turn by turn: whether a change has made anything slower.

    python benchmarks/versus_revision.py OLD NEW MODEL.gguf [--rounds N] [--prompt N] [--new N] [--threads N]

OLD and NEW are checkouts with a `.venv` of their own (`make dev` in each). Each loads the model once, then works while
the other stands still, over prompts that neither has seen; which of them begins alternates. Printed are medians, and
median and quartiles of the ratios of pairs: the drift of a shared machine is slower than a pair.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Runs in either checkout: what it uses of ktcore has to be in both.
WORKER = """
import json, random, sys
import ktcore
from ktcore.cli.measure import Timer
path, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
model = ktcore.load(path, threads=threads, context=prompt + new + 64)
timer = Timer(model, prompt, new)
print("ready", flush=True)
for line in sys.stdin:
    draw = random.Random(int(line))
    timer._ids = [draw.randrange(model.plan.graph.vocab) for _ in range(prompt)]
    done = timer.round()
    print(json.dumps([done.prefill_tok_s, done.decode_tok_s]), flush=True)
"""


class Side:
    """A checkout's process, stopped but for its turns."""

    def __init__(self, tree: Path, options: argparse.Namespace) -> None:
        command = [str(tree / ".venv/bin/python"), "-c", WORKER, str(options.model.resolve())]
        numbers = [str(n) for n in (options.threads, options.prompt, options.new)]
        self._process = subprocess.Popen(
            [*command, *numbers], cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer(lambda line: line.strip() == "ready")
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, seed: int) -> tuple[float, float]:
        """Prefill and decode of one new prompt, tokens a second."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        line = self._answer(lambda line: line.startswith("["))
        self._process.send_signal(signal.SIGSTOP)
        prefill, decode = json.loads(line)
        return prefill, decode

    def close(self) -> None:
        """Ends it."""
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()

    def _answer(self, wanted: Callable[[str], bool]) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            if wanted(line):
                return line
        sys.exit(f"versus_revision: {self._process.args[0]} ended before it answered; its own words are above")


@contextlib.contextmanager
def sides(options: argparse.Namespace) -> Iterator[list[Side]]:
    """Both, ended whatever happens."""
    with contextlib.ExitStack() as stack:
        made = []
        for tree in (options.old, options.new_tree):
            made.append(Side(tree, options))
            stack.callback(made[-1].close)
        yield made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Two builds of ktcore on one model, turn by turn.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new_tree", metavar="new", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    figures: list[list[tuple[float, float]]] = [[], []]
    with sides(options) as both:
        for seed in range(1, options.rounds + 1):
            for which in ((0, 1), (1, 0))[seed % 2]:
                figures[which].append(both[which].turn(seed))
    print(f"{'':8} {'old tok/s':>10} {'new tok/s':>10} {'new/old':>8}   quartiles of pairs")
    for place, what in enumerate(("prefill", "decode")):
        old, new = ([turn[place] for turn in side] for side in figures)
        pairs = [b / a for a, b in zip(old, new, strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        medians = f"{statistics.median(old):10.1f} {statistics.median(new):10.1f}"
        print(f"{what:8} {medians} {middle:8.3f}   {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
