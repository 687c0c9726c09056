"""Paged attention in Triton's interpreter against the reference operator in float32."""

from __future__ import annotations

import pytest
import torch
from ktcore_triton.attention import Pages, Sight, latent_attention, paged_attention
from ktcore_triton.tuning import AttentionTiles

from ktcore.errors import BackendError
from ktcore.ops.kv_cache import attend

PAGE = 16
Lengths = tuple[tuple[int, int], ...]
RAGGED = ((1, 37), (3, 3), (20, 50))
DECODE = ((1, 90), (1, 1), (1, 64))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def paged(lengths: Lengths) -> tuple[Pages, list[torch.Tensor]]:
    """Pages in a random order, and the slots int64 [context] of each sequence."""
    blocks = [-(-context // PAGE) for _, context in lengths]
    order = torch.randperm(sum(blocks)).int()
    table = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32)
    slots, used = [], 0
    for i, (_, context) in enumerate(lengths):
        table[i, : blocks[i]] = order[used : used + blocks[i]]
        used += blocks[i]
        at = torch.arange(context)
        slots.append(table[i].long()[at // PAGE] * PAGE + at % PAGE)
    starts = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).int()
    contexts = torch.tensor([c for _, c in lengths], dtype=torch.int32)
    return Pages(starts, contexts, table, PAGE, max(q for q, _ in lengths)), slots


def check(
    lengths: Lengths, heads: int, kv_heads: int, dim: int, value: int, tiles: AttentionTiles | None,
    sight: Sight | None = None, with_sinks: bool = False, dtype: torch.dtype = torch.float32, bound: float = 1e-5,
) -> None:  # fmt: skip
    sight = sight or Sight()
    pages, slots = paged(lengths)
    size = int(pages.table.max() + 1) * PAGE
    q = torch.randn(int(pages.q_start[-1]), heads, dim).to(dtype)
    # whatever was never written must never be read
    keys, values = torch.full((size, kv_heads, dim), float("nan")), torch.full((size, kv_heads, value), float("nan"))
    for at in slots:
        keys[at], values[at] = torch.randn(len(at), kv_heads, dim), torch.randn(len(at), kv_heads, value)
    keys, values = keys.to(dtype), values.to(dtype)
    sinks = torch.randn(heads) if with_sinks else None
    found = paged_attention(
        q, keys, values, pages, dim**-0.5, sight=sight, sinks=sinks, tiles=tiles, compute=torch.float32
    )
    expected = torch.cat(
        [
            attend(q[pages.q_start[i] : pages.q_start[i + 1]], keys[at], values[at], dim**-0.5, sight.window,
                   sight.chunk, sinks)
            for i, at in enumerate(slots)
        ]
    )  # fmt: skip
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value"), [(8, 2, 64, 64), (6, 2, 80, 48), (4, 4, 32, 32)])
def test_grouped_queries(lengths: Lengths, splits: int, heads: int, kv_heads: int, dim: int, value: int) -> None:
    check(lengths, heads, kv_heads, dim, value, AttentionTiles(16, 16, splits, part=0 if splits == 1 else 32))


@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("sight", [Sight(window=7), Sight(chunk=24), Sight()], ids=["window", "chunk", "all"])
def test_windows_chunks_and_sinks(lengths: Lengths, splits: int, sight: Sight) -> None:
    check(lengths, 4, 2, 32, 32, AttentionTiles(16, 16, splits), sight, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_the_default_tiles_and_half_types(lengths: Lengths, dtype: torch.dtype) -> None:
    check(lengths, 8, 2, 64, 64, None, dtype=dtype, bound=6e-3)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("heads", "latent", "rope", "part"), [(16, 64, 16, 0), (5, 32, 8, 16), (128, 512, 64, 0), (16, 512, 64, 64)]
)
def test_latent_attention_is_that_over_one_shared_head(
    heads: int, latent: int, rope: int, part: int, splits: int
) -> None:
    pages, slots = paged(((1, 33), (2, 20)))
    cache = torch.full((int(pages.table.max() + 1) * PAGE, latent + rope), float("nan"))
    for at in slots:
        cache[at] = torch.randn(len(at), latent + rope)
    q, scale = torch.randn(3, heads, latent + rope), 192**-0.5
    found = latent_attention(q, cache, pages, scale, latent, tiles=AttentionTiles(16, 16, splits, part=part))
    expected = torch.cat(
        [
            attend(q[pages.q_start[i] : pages.q_start[i + 1]], cache[at][:, None], cache[at][:, None, :latent], scale)
            for i, at in enumerate(slots)
        ]
    )
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    pages, _ = paged(((1, 3),))
    with pytest.raises(BackendError, match="do not fit"):
        paged_attention(torch.zeros(1, 3, 16), torch.zeros(16, 2, 16), torch.zeros(16, 2, 16), pages, 1.0)
    with pytest.raises(BackendError, match="power of two, not 48"):
        latent_attention(torch.zeros(1, 2, 64), torch.zeros(16, 64), pages, 1.0, 48)
