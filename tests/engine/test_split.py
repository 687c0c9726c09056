"""Splitting, deferring and dropping experts, against the plain sum over all of them."""

from __future__ import annotations

import pytest
import torch

from ktcore.engine.experts.split import DeferralChain, DeferredExperts, ReducedRouter, SplitExperts, _numbering

EXPERTS, HIDDEN, TOP_K, TOKENS = 6, 4, 3, 9
HOST = torch.device("cpu")
MATRICES = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))


class _Experts:
    """Linear experts; `held` are the ids of its rows, as a backend that packed only those numbers them."""

    def __init__(self, held: list[int] | None = None) -> None:
        self.held = list(range(EXPERTS)) if held is None else held
        self.rows = 0

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for e, w in zip(ids[t].tolist(), weights[t], strict=True):
                if e >= 0:
                    self.rows += 1
                    out[t] += w * (x[t] @ MATRICES[self.held[e]])
        return out


def _routing(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN, generator=g), ids, torch.rand(TOKENS, TOP_K, generator=g)


@pytest.mark.parametrize("resident", [[0], [5, 2], [1, 3, 4], list(range(EXPERTS))])
def test_experts_in_two_places_give_the_same_sum(resident: list[int]) -> None:
    far_ids = [e for e in range(EXPERTS) if e not in resident]
    near, far = _Experts(resident), _Experts(far_ids) if far_ids else None
    split = SplitExperts(near, far, resident, EXPERTS, HOST)
    x, ids, weights = _routing()
    torch.testing.assert_close(split(x, ids, weights), _Experts()(x, ids, weights))
    assert near.rows + (far.rows if far else 0) == TOKENS * TOP_K


def test_an_absent_expert_stays_absent_in_both_places() -> None:
    near, far = _Experts([0, 1]), _Experts([2, 3, 4, 5])
    split = SplitExperts(near, far, [0, 1], EXPERTS, HOST)
    x, ids, weights = _routing()
    masked = ids.masked_fill(ids == 2, -1)
    torch.testing.assert_close(split(x, masked, weights), _Experts()(x, masked, weights))


def test_deferred_experts_land_one_layer_late_and_none_is_lost() -> None:
    chain, experts = DeferralChain(), _Experts()
    layers = [DeferredExperts(experts, experts, chain, defer=1, last=last) for last in (False, False, True)]
    blocks = [_routing(seed) for seed in range(3)]
    sums = [layer(*block) for layer, block in zip(layers, blocks, strict=True)]
    whole = [_Experts()(*block) for block in blocks]
    late = []
    for x, ids, weights in blocks[:2]:
        weakest = weights.argmin(-1, keepdim=True)
        late.append(_Experts()(x, ids.gather(1, weakest), weights.gather(1, weakest)))
    torch.testing.assert_close(sums[0], whole[0] - late[0])
    torch.testing.assert_close(sums[1], whole[1] - late[1] + late[0])
    torch.testing.assert_close(sums[2], whole[2] + late[1])
    assert chain.owed is None


@pytest.mark.parametrize(("keep", "threshold"), [(2, 0.0), (0, 0.5), (1, 0.9)])
def test_a_reduced_router_drops_the_weakest_choices_only(keep: int, threshold: float) -> None:
    _, ids, weights = _routing()
    got, same = ReducedRouter(lambda x: (ids, weights), keep, threshold)(torch.empty(0))
    torch.testing.assert_close(same, weights)
    for t in range(TOKENS):
        order = weights[t].argsort(descending=True).tolist()
        kept = [c for c in order if weights[t, c] >= threshold * weights[t].max()][: keep or TOP_K]
        expected = [int(ids[t, c]) if c in kept else -1 for c in range(TOP_K)]
        assert got[t].tolist() == expected


def test_what_is_deferred_or_dropped_is_no_expert_in_split_halves_either() -> None:
    """Ids of no expert are -1 and nothing else: the halves look their own numbers up by them."""
    resident, others = [1, EXPERTS - 1], [e for e in range(EXPERTS) if e not in (1, EXPERTS - 1)]
    chain = DeferralChain()

    def split() -> SplitExperts:
        return SplitExperts(_Experts(resident), _Experts(others), resident, EXPERTS, HOST)

    layers = [DeferredExperts(split(), split(), chain, defer=1, last=last) for last in (False, True)]
    plain_chain, plain = DeferralChain(), _Experts()
    expected = [DeferredExperts(plain, plain, plain_chain, defer=1, last=last) for last in (False, True)]
    for seed, (layer, reference) in enumerate(zip(layers, expected, strict=True)):
        torch.testing.assert_close(layer(*_routing(seed)), reference(*_routing(seed)))
    x, ids, weights = _routing()
    for router in (
        ReducedRouter(lambda x: (ids, weights), keep=1),
        ReducedRouter(lambda x: (ids, weights), threshold=1.0),
    ):
        kept, _ = router(x)
        assert set(kept[kept < 0].tolist()) == {-1}
        torch.testing.assert_close(split()(x, kept, weights), plain(x, kept, weights))


def test_a_reduced_router_keeps_what_is_at_its_bounds_and_of_equals_the_first() -> None:
    ids = torch.arange(64)[None]
    equal = torch.full((1, 64), 0.25)
    kept, _ = ReducedRouter(lambda x: (ids, equal), keep=3)(torch.empty(0))
    assert kept[0].tolist() == [0, 1, 2] + [-1] * 61
    # a share that is reached is enough, and without bounds nothing is dropped
    halves = torch.tensor([[1.0, 0.5, 0.25]])
    at_the_share, _ = ReducedRouter(lambda x: (ids[:, :3], halves), threshold=0.5)(torch.empty(0))
    assert at_the_share[0].tolist() == [0, 1, -1]
    everything, _ = ReducedRouter(lambda x: (ids[:, :3], halves))(torch.empty(0))
    assert everything[0].tolist() == [0, 1, 2]


def test_each_half_is_told_its_own_numbers_and_minus_one_for_the_rest() -> None:
    seen: list[list[int]] = []

    def half(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return x

    split = SplitExperts(half, half, [4, 1], EXPERTS, HOST)
    split(torch.ones(1, HIDDEN), torch.tensor([[4, 0, 1, 5, -1]]), torch.ones(1, 5))
    assert sorted(seen) == sorted([[0, -1, 1, -1, -1], [-1, 0, -1, 3, -1]])


def test_the_table_of_numbers_ends_with_the_entry_of_no_expert() -> None:
    """An id that is above it is an error, not another expert that is absent."""
    table = _numbering([2, 0], 3, HOST)
    assert (table.tolist(), table.dtype) == ([1, -1, 0, -1], torch.int64)
