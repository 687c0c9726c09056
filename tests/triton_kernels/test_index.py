"""Indexers' choices, and attention over them, in Triton's interpreter against the reference operators in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ktcore_triton import index
from ktcore_triton.attention import Pages, Sight, latent_attention
from ktcore_triton.chosen import Chosen, chosen_attention
from ktcore_triton.index import Choice, choose, choose_best, pool_gated
from ktcore_triton.tuning import AttentionTiles

from ktcore.errors import BackendError
from ktcore.ops.block_indexer import BlockIndexCacheSpec, choose_blocks, max_scores
from ktcore.ops.indexer import IndexCacheSpec, choose_tokens
from ktcore.ops.kv_cache import attend
from ktcore.ops.pooled_index import choose_pools, pooled_keys

from .test_attention import DECODE, PAGE, RAGGED, Lengths, paged

HEADS, DIM, TOP = 5, 40, 12


def queries(pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions int64 [T], and int32 [T] whose sequence a token is of."""
    spans = list(zip(pages.q_start.tolist(), pages.q_start[1:].tolist(), pages.context_lens.tolist(), strict=False))
    positions = torch.cat([torch.arange(c - (b - a), c) for a, b, c in spans])
    return positions, torch.cat([torch.full((b - a,), i, dtype=torch.int32) for i, (a, b, _) in enumerate(spans)])


class Drawn:
    """Whole numbers: no order of summation rounds, and many scores are equal."""

    def __init__(self, lengths: Lengths, heads: int = HEADS, dim: int = DIM) -> None:
        g = torch.Generator().manual_seed(dim)
        self.pages, self.slots = paged(lengths)
        self.size = int(self.pages.table.max() + 1) * PAGE
        self.positions, self.sequences = queries(self.pages)
        tokens = len(self.positions)
        self.q = torch.randint(-2, 3, (tokens, heads, dim), generator=g).float()
        self.weights = torch.randint(-1, 3, (tokens, heads), generator=g).float()
        # what was never written must never be read
        self.keys = torch.full((self.size, dim), float("nan"))
        for at in self.slots:
            self.keys[at] = torch.randint(-1, 2, (len(at), dim), generator=g).float()

    def spans(self) -> list[tuple[slice, torch.Tensor]]:
        starts = self.pages.q_start.tolist()
        return [(slice(a, b), at) for a, b, at in zip(starts, starts[1:], self.slots, strict=False)]


@pytest.mark.parametrize("lengths", [RAGGED, DECODE, ((130, 130), (2, 290))], ids=["ragged", "decode", "long"])
@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("top", [TOP, 64, 400])
def test_the_highest_scores_are_chosen_and_of_equal_ones_the_first(lengths: Lengths, weighed: bool, top: int) -> None:
    d = Drawn(lengths)
    weights = d.weights if weighed else None
    found = choose(d.q, weights, d.keys, d.pages, d.positions, Choice(top, top), torch.float32)
    for span, at in d.spans():
        each = torch.einsum("thd,ld->thl", d.q[span].double(), d.keys[at].double()).relu()
        factors = d.weights[span].double() if weighed else torch.ones(each.shape[:2], dtype=torch.float64)
        scores = torch.einsum("th,thl->tl", factors, each)
        assert torch.equal(found[span], choose_tokens(scores, d.positions[span], top))


def test_many_queries_are_scored_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    d = Drawn(RAGGED)
    whole = choose(d.q, d.weights, d.keys, d.pages, d.positions, Choice(TOP, TOP), torch.float32)
    monkeypatch.setattr(index, "MOST_SCORES", 5 * d.pages.table.shape[1] * PAGE)
    assert torch.equal(choose(d.q, d.weights, d.keys, d.pages, d.positions, Choice(TOP, TOP), torch.float32), whole)


@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize("pool", [4, 16])
def test_whole_pools_are_chosen_and_the_tokens_behind_the_last(lengths: Lengths, pool: int) -> None:
    d = Drawn(lengths)
    spec = IndexCacheSpec(HEADS, DIM, 2 * pool, pool)
    gates = torch.randn(d.keys.shape)
    pooled = torch.full((d.size // pool, DIM), float("nan"))
    # every token that is cached ends a pool or does not
    everything = torch.cat(d.slots)
    pool_gated(d.keys, gates, pooled, everything, torch.cat([torch.arange(len(at)) for at in d.slots]))
    choice = Choice(2, spec.width, pool)
    found = choose(d.q, d.weights, pooled, d.pages, d.positions, choice, torch.float32)
    for span, at in d.spans():
        keys = pooled_keys(d.keys[at], gates[at], pool)
        kept = pooled[at[pool - 1 :: pool] // pool]
        torch.testing.assert_close(kept, keys, atol=1e-6, rtol=1e-6)
        expected = choose_pools(d.q[span], d.weights[span], kept, d.positions[span], len(at), spec)
        assert torch.equal(found[span], expected)


@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize(("block", "local"), [(4, 2), (5, 0), (16, 1)])
def test_blocks_are_chosen_by_their_best_key_for_each_head(lengths: Lengths, block: int, local: int) -> None:
    d = Drawn(lengths, heads=2)
    spec = BlockIndexCacheSpec(2, DIM, block, 3, "max", local)
    choice = Choice(3, spec.width, block, tail=False, local=local)
    found = choose_best(d.q, d.keys, d.pages, d.positions, choice, torch.float32)
    for span, at in d.spans():
        scores = max_scores(d.q[span], d.keys[at], d.positions[span], block)
        assert torch.equal(found[span], choose_blocks(scores, d.positions[span], len(at), spec))


def drawn_choice(d: Drawn, rows: int, width: int) -> torch.Tensor:
    """int32 [T, rows, width]: some of the tokens up to each, and a later one, which must not be seen."""
    found = torch.full((len(d.positions), rows, width), -1, dtype=torch.int32)
    for t, position in enumerate(d.positions.tolist()):
        for r in range(rows):
            count = min(position + 1, width - t % 3)
            found[t, r, :count] = torch.randperm(position + 1)[:count].sort().values
            found[t, r, count : count + 1] = position + 1
    return found


@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("by_head", [True, False])
def test_attention_over_chosen_keys_and_values(lengths: Lengths, splits: int, by_head: bool) -> None:
    d = Drawn(lengths)
    torch.manual_seed(1)
    heads, groups, dim, value = 6, 2, 24, 16
    q = torch.randn(len(d.positions), heads, dim)
    keys, values = torch.full((d.size, groups, dim), float("nan")), torch.full((d.size, groups, value), float("nan"))
    for at in d.slots:
        keys[at], values[at] = torch.randn(len(at), groups, dim), torch.randn(len(at), groups, value)
    chosen = drawn_choice(d, groups if by_head else 1, 20)
    chosen = chosen if by_head else chosen[:, 0]
    sinks = torch.randn(heads)
    for sight in (Sight(), Sight(window=30), Sight(chunk=24)):
        found = chosen_attention(
            q, keys, values, Chosen(chosen, d.positions, d.sequences), d.pages, 0.3, value, sight=sight, sinks=sinks,
            tiles=AttentionTiles(32, 16, splits, part=16),
        )  # fmt: skip
        for span, at in d.spans():
            expected = attend(q[span], keys[at], values[at], 0.3, sight.window, sight.chunk, sinks, chosen=chosen[span])
            torch.testing.assert_close(found[span], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("splits", "part"), [(1, 0), (3, 0), (1, 16)])
def test_attention_over_chosen_latents(splits: int, part: int) -> None:
    d = Drawn(RAGGED)
    torch.manual_seed(2)
    cache = torch.full((d.size, 72), float("nan"))
    for at in d.slots:
        cache[at] = torch.randn(len(at), 72)
    q, chosen = torch.randn(len(d.positions), 20, 72), drawn_choice(d, 1, 18)[:, 0]
    tiles = AttentionTiles(16, 16, splits, part=part)
    found = chosen_attention(q, cache, None, Chosen(chosen, d.positions, d.sequences), d.pages, 0.2, 64, tiles=tiles)
    for span, at in d.spans():
        rows = cache[at][:, None]
        torch.testing.assert_close(
            found[span], attend(q[span], rows, rows[..., :64], 0.2, chosen=chosen[span]), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("splits", [1, 3])
def test_a_choice_of_all_tokens_gives_the_bits_of_attention_over_all(splits: int) -> None:
    d = Drawn(RAGGED)
    cache, q = torch.randn(d.size, 72), torch.randn(len(d.positions), 32, 72)
    everything = torch.arange(60, dtype=torch.int32).expand(len(d.positions), 60)
    chosen = everything.masked_fill(everything > d.positions[:, None], -1)
    tiles = AttentionTiles(16, 16, splits)
    found = chosen_attention(q, cache, None, Chosen(chosen, d.positions, d.sequences), d.pages, 0.2, 64, tiles=tiles)
    assert torch.equal(found, latent_attention(q, cache, d.pages, 0.2, 64, tiles=tiles))


def test_what_does_not_fit_is_refused() -> None:
    d = Drawn(DECODE)
    with pytest.raises(BackendError, match="do not fit"):
        choose(d.q, d.weights[:1], d.keys, d.pages, d.positions, Choice(TOP, TOP), torch.float32)
    with pytest.raises(BackendError, match="pools of 3 in pages of 16"):
        choose(d.q, d.weights, d.keys, d.pages, d.positions, Choice(4, 14, 3), torch.float32)
    seen = Chosen(torch.zeros(3, 4, 2, dtype=torch.int32), d.positions, d.sequences)
    with pytest.raises(BackendError, match="do not fit"):
        chosen_attention(torch.zeros(3, 4, 16), torch.zeros(16, 2, 16), torch.zeros(16, 2, 16), seen, d.pages, 1.0, 16)
    with pytest.raises(BackendError, match="power of two, not 48"):
        narrow = replace(seen, tokens=seen.tokens[:, 0])
        chosen_attention(torch.zeros(3, 2, 64), torch.zeros(16, 64), None, narrow, d.pages, 1.0, 48)
