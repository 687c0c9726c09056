#!/usr/bin/env python3
"""How many choices of experts a cache of some of them hits, on traces of routing, beside an oracle and a fixed list.

    python benchmarks/expert_cache.py [--json] [--layers 8] [--steps 4000] [--seed 0]

Traces are synthetic: at each layer a token chooses 8 of 128 experts, whose popularity follows Zipf's law with exponent
1.5 (a tenth of them takes seven tenths of the choices, as published measurements have it). In `drift`, one token in
twenty swaps two experts' popularity at each layer; in `topics`, every thousand tokens all of them change.

Belady's oracle knows the future, copies at once and without limit; the list holds what the whole trace chooses most.
"""

from __future__ import annotations

import argparse
import heapq
import json

import numpy as np
import numpy.typing as npt

from ktcore.placement.residence import Residence

EXPERTS, TOP_K, ZIPF = 128, 8, 1.5
SHARES = (10, 25, 50)
TRACES = {"still": (0.0, 0), "drift": (0.05, 0), "topics": (0.0, 1000)}
"""Name -> swaps a token and layer, tokens of a topic."""

Ids = npt.NDArray[np.int64]


def trace(steps: int, layers: int, drift: float, topic: int, rng: np.random.Generator) -> Ids:
    """Numbers layer * EXPERTS + expert that each token chooses, [steps, layers * TOP_K]."""
    weight = -ZIPF * np.log(np.arange(1, EXPERTS + 1))
    place = np.array([rng.permutation(EXPERTS) for _ in range(layers)])
    found = np.empty((steps, layers, TOP_K), np.int64)
    for t in range(steps):
        if topic and t and t % topic == 0:
            place = np.array([rng.permutation(EXPERTS) for _ in range(layers)])
        for layer in np.nonzero(rng.random(layers) < drift)[0]:
            i, j = rng.integers(0, EXPERTS, 2)
            place[layer, [i, j]] = place[layer, [j, i]]
        # Gumbel's trick: the largest are a draw without replacement
        drawn = weight[place] + rng.gumbel(size=(layers, EXPERTS))
        found[t] = np.argpartition(-drawn, TOP_K, axis=1)[:, :TOP_K]
    return (found + np.arange(layers)[None, :, None] * EXPERTS).reshape(steps, -1)


def belady(ids: Ids, count: int, slots: int) -> float:
    """Share of hits of who knows the future: the expert that is needed last makes room, or is not taken in at all."""
    never = len(ids)
    following, seen = np.empty_like(ids), np.full(count, never)
    for t in range(len(ids) - 1, -1, -1):
        following[t] = seen[ids[t]]
        seen[ids[t]] = t
    held: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits = 0
    for step, after in zip(ids.tolist(), following.tolist(), strict=True):
        for expert, needed in zip(step, after, strict=True):
            if expert in held:
                hits += 1
            elif len(held) >= slots:
                while held.get(heap[0][1]) != -heap[0][0]:
                    heapq.heappop(heap)  # told anew since
                if -heap[0][0] <= needed:
                    continue
                del held[heapq.heappop(heap)[1]]
            held[expert] = needed
            heapq.heappush(heap, (-needed, expert))
    return hits / ids.size


def fixed(ids: Ids, count: int, slots: int) -> float:
    """Share of hits of the best list that never changes."""
    return float(np.sort(np.bincount(ids.reshape(-1), minlength=count))[::-1][:slots].sum() / ids.size)


def policy(ids: Ids, layers: int, slots: int) -> tuple[float, float]:
    """Share of hits of `Residence`, from nothing, and copies for each choice in the last three quarters."""
    residence = Residence(layers, EXPERTS, slots)
    hits = copies = 0
    for t, chosen in enumerate(ids):
        hits += int(residence.resident.reshape(-1)[chosen].sum())
        residence.see(np.bincount(chosen, minlength=layers * EXPERTS).reshape(layers, EXPERTS))
        moved = len(residence.moves())
        copies += moved if t >= len(ids) // 4 else 0
    return hits / ids.size, copies / (ids.size * 3 / 4)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    rng = np.random.default_rng(a.seed)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (drift, topic) in TRACES.items():
        ids, count = trace(a.steps, a.layers, drift, topic, rng), a.layers * EXPERTS
        for share in SHARES:
            slots = count * share // 100
            best, still, (hits, copies) = (
                belady(ids, count, slots),
                fixed(ids, count, slots),
                policy(ids, a.layers, slots),
            )
            row = {"belady": best, "list": still, "policy": hits, "copies": copies}
            found.setdefault(name, {})[str(share)] = {k: round(v, 4) for k, v in row.items()}
            if not a.json:
                beside = f"{hits / best:.2f} of belady's, {hits / still:.2f} of the list's"
                figures = f"belady {best:.3f}  list {still:.3f}  policy {hits:.3f}"
                print(f"{name:7} {share:3}%  {figures}: {beside}; copies {copies:.4f}")
    worst = {
        str(share): round(min(t[str(share)]["policy"] / t[str(share)]["belady"] for t in found.values()), 3)
        for share in SHARES
    }
    if a.json:
        print(json.dumps({"belady_share": worst, "kind": "measured on synthetic traces", "traces": found}))


if __name__ == "__main__":
    main()
