#!/usr/bin/env python3
"""Decode with drafts of a model's own layer for further tokens beside decode without, at a share of right drafts.

    python benchmarks/drafting.py MODEL.gguf --draft mtp:1 --right 0.7

A model of random weights drafts at random. So a first run notes the text, and the drafter, which does all of its work,
has each proposal replaced: the share `--right` of them by the text's own tokens, the others by wrong ones. Rounds take
turns, and each tells the ratio of its two figures.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from pathlib import Path
from typing import Any

import ktcore
from ktcore.engine.schedule.sequence import Sequence
from ktcore.ops.sampling import SamplingParams


def forced(model: ktcore.Model, text: list[int], right: float) -> None:
    """Has that share of proposals be right, place by place, evenly spread."""
    drafter, places = model.engine.drafter, itertools.count()
    assert drafter is not None
    follow = drafter.follow

    def is_right(place: int) -> bool:
        return int((place + 1) * right) > int(place * right)

    def replaced(batch: Any, hidden: Any, ends: Any) -> None:
        follow(batch, hidden, ends)
        for sequence in batch.sequences:
            drafts, begin = sequence.drafts, len(sequence.tokens)
            if drafts is not None and (made := drafts.guess(sequence.tokens, drafts.most)):
                known = text[begin : begin + len(made)]
                ids = [t if is_right(next(places)) else (t + 1) % model.plan.graph.vocab for t in known]
                drafts.propose(ids, begin)

    drafter.follow = replaced  # type: ignore[method-assign]


def decode(model: ktcore.Model, prompt: list[int], new: int) -> tuple[float, Sequence]:
    """Tokens a second behind the first one."""
    drafts = model.engine.drafts(None)
    sequence = Sequence(list(prompt), SamplingParams(temperature=0), new + 1, drafts=drafts)
    model.engine.add(sequence)
    while not sequence.new_tokens:
        model.engine.step()
    began = time.perf_counter()
    while sequence.finish is None:
        model.engine.step()
    return (len(sequence.new_tokens) - 1) / (time.perf_counter() - began), sequence


def without(model: ktcore.Model, prompt: list[int], new: int) -> tuple[float, Sequence]:
    """The same of the model as if it had been loaded without a drafter."""
    drafter, model.engine.drafter = model.engine.drafter, None
    try:
        return decode(model, prompt, new)
    finally:
        model.engine.drafter = drafter


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft", default="mtp:1")
    parser.add_argument("--right", type=float, default=0.7)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    a = parser.parse_args()
    context = a.prompt + a.new + 32
    with ktcore.load(a.model, "cpu", context=context, threads=a.threads, prefix=None, draft=a.draft) as model:
        draw = random.Random(0)
        prompt = [draw.randrange(model.plan.graph.vocab) for _ in range(a.prompt)]
        text = without(model, prompt, a.new + 20)[1].tokens
        forced(model, text, a.right)
        ratios = []
        for _ in range(a.rounds):
            alone, _ = without(model, prompt, a.new)
            ahead, sequence = decode(model, prompt, a.new)
            if sequence.tokens != text[: len(sequence.tokens)]:
                raise SystemExit("drafts changed the answer")
            ratios.append(ahead / alone)
            share = sequence.right / max(sequence.guessed, 1)
            print(f"{alone:.2f} tok/s alone, {ahead:.2f} with {a.draft} ({share:.0%} right): {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
