"""Which experts the policy keeps: on traces with a known best answer, within its copies, and after failures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ktcore.placement.residence import BURST, EVERY, Move, Residence

LAYERS, EXPERTS, CHOSEN = 3, 40, 4


def step(rng: np.random.Generator, popular: np.ndarray) -> np.ndarray:
    """Counts of a token that chooses by Zipf's law in the order `popular` of the experts of every layer."""
    weight = np.empty(EXPERTS)
    weight[popular] = -1.5 * np.log(np.arange(1, EXPERTS + 1))
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    for layer in range(LAYERS):
        counts[layer, np.argsort(-(weight + rng.gumbel(size=EXPERTS)))[:CHOSEN]] = 1
    return counts


def run(residence: Residence, steps: int, popular: np.ndarray, seed: int = 0) -> tuple[float, int]:
    """Share of hits, and copies."""
    rng = np.random.default_rng(seed)
    hits = copies = 0
    for _ in range(steps):
        counts = step(rng, popular)
        hits += int(counts[residence.resident].sum())
        residence.see(counts)
        copies += len(residence.moves())
    return hits / (steps * LAYERS * CHOSEN), copies


def best_list(steps: int, popular: np.ndarray, slots: int, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    total = sum(step(rng, popular) for _ in range(steps))
    assert isinstance(total, np.ndarray)
    return float(np.sort(total.reshape(-1))[::-1][:slots].sum() / total.sum())


def test_it_comes_to_the_best_list_where_nothing_changes() -> None:
    residence = Residence(LAYERS, EXPERTS, 30)
    run(residence, 1000, np.arange(EXPERTS))
    hits, copies = run(residence, 1000, np.arange(EXPERTS), seed=1)
    assert hits >= 0.98 * best_list(1000, np.arange(EXPERTS), 30, seed=1)
    assert copies <= 0.01 * 1000 * LAYERS * CHOSEN


def test_it_follows_a_change_of_topic() -> None:
    residence = Residence(LAYERS, EXPERTS, 30)
    run(residence, 1000, np.arange(EXPERTS))
    other = np.arange(EXPERTS)[::-1].copy()
    run(residence, 300, other, seed=2)
    hits, _ = run(residence, 500, other, seed=3)
    assert hits >= 0.95 * best_list(500, other, 30, seed=3)


def test_copies_are_bounded_in_the_mean() -> None:
    residence = Residence(LAYERS, EXPERTS, 60, copies=0.01, margin=0.0)
    rng = np.random.default_rng(0)
    copies = 0
    for t in range(1, 401):
        residence.see(step(rng, rng.permutation(EXPERTS)))
        copies += len(residence.moves())
        assert copies <= 0.01 * t * LAYERS * CHOSEN + 1
    assert copies > 0


def test_what_is_saved_up_is_bounded() -> None:
    residence = Residence(LAYERS, EXPERTS, 100, copies=0.1)
    nothing, one = np.zeros((LAYERS, EXPERTS), np.int64), step(np.random.default_rng(0), np.arange(EXPERTS))
    for _ in range(1000):
        residence.see(nothing + one)
    assert len(residence.moves()) <= BURST * 0.1 * one.sum()


def test_slots_are_never_given_twice() -> None:
    residence, rng = Residence(LAYERS, EXPERTS, 20, copies=1.0), np.random.default_rng(0)
    held: set[int] = set()
    for _ in range(300):
        residence.see(step(rng, rng.permutation(EXPERTS)))
        for move in residence.moves():
            assert move.expert not in held
            if move.instead_of is None:
                assert len(held) < 20
            else:
                held.remove(move.instead_of)
            held.add(move.expert)
        assert held == set(np.flatnonzero(residence.resident).tolist())


def test_rates_of_an_earlier_run_fill_the_slots_at_once() -> None:
    known = np.zeros((LAYERS, EXPERTS))
    known[1, :10] = 1.0
    residence = Residence(LAYERS, EXPERTS, 5, known=known, copies=1.0)
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    counts[1, :10] = 1
    for _ in range(EVERY):
        residence.see(counts)
    assert len(residence.moves()) == 5
    assert residence.resident[1, :10].sum() == 5
    assert residence.rates[1, 3] == pytest.approx(1.0)


def test_a_copy_that_failed_has_no_slot() -> None:
    residence = Residence(1, 4, 2, copies=1.0)
    for _ in range(EVERY):
        residence.see(np.array([[3, 2, 1, 0]]))
    moves = residence.moves()
    assert moves == [Move(0, None), Move(1, None)]
    residence.undo(moves[0])
    assert residence.resident.tolist() == [[False, True, False, False]]


def test_the_coldest_lose_their_slots_first() -> None:
    residence = Residence(1, 4, 3, copies=1.0)
    for _ in range(EVERY):
        residence.see(np.array([[3, 2, 1, 0]]))
    residence.moves()
    assert residence.shrink(1) == [2, 1]
    assert residence.resident.tolist() == [[True, False, False, False]]
    with pytest.raises(ValueError, match="no part of 1"):
        residence.shrink(2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slots": 161}, "161 slots for 4 layers"),
        ({"layers": 0}, "0 layers"),
        ({"copies": -1.0}, "copies -1"),
        ({"known": np.zeros((4, 39))}, r"known rates \[4, 39\]"),
        ({"known": np.full((4, 40), np.nan)}, "are no rates"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"layers": 4, "experts": 40, "slots": 10}
    with pytest.raises(ValueError, match=said):
        Residence(**(given | changes))
