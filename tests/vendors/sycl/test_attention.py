"""Attention kernels, run by the OpenCL CPU device, against the reference formula in float64."""

from __future__ import annotations

import pytest
import torch
from ktcore_xpu.sycl.attention import Places, attention
from ktcore_xpu.sycl.launcher import Launcher

from ktcore.errors import BackendError

PAGE = 16
Lengths = tuple[tuple[int, int], ...]
RAGGED = ((1, 37), (3, 3), (20, 50))
DECODE = ((1, 90), (1, 1), (1, 200))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, chunk: int, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One sequence in float64: the last queries of its keys, bottom-right aligned."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
    i = torch.arange(len(k) - len(q), len(k))[:, None]
    j = torch.arange(len(k))[None]
    hidden = (j > i) | (j <= i - window if window else j < 0) | (j // chunk != i // chunk if chunk else j < 0)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(q), 1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(k)], v.repeat_interleave(group, 1))


def paged(lengths: Lengths) -> tuple[Places, list[torch.Tensor]]:
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
    sequence = [i for i, (queries, _) in enumerate(lengths) for _ in range(queries)]
    visible = [context - queries + j + 1 for queries, context in lengths for j in range(queries)]
    places = Places(torch.tensor(sequence).int(), torch.tensor(visible).int(), table, PAGE)
    return places, slots


def check(
    launcher: Launcher, lengths: Lengths, heads: int, kv_heads: int, key: int, value: int, latent: bool = False,
    dtype: torch.dtype = torch.float32, splits: int | None = None, window: int = 0, chunk: int = 0,
    with_sinks: bool = False,
) -> None:  # fmt: skip
    places, slots = paged(lengths)
    size = int(places.table.max() + 1) * PAGE
    q = torch.randn(len(places.visible), heads, key)
    # whatever was never written must never be read
    keys, values = torch.full((size, kv_heads, key), float("nan")), torch.full((size, kv_heads, value), float("nan"))
    for at in slots:
        keys[at], values[at] = torch.randn(len(at), kv_heads, key), torch.randn(len(at), kv_heads, value)
    keys, values = keys.to(dtype), values.to(dtype)
    sinks = torch.randn(heads) if with_sinks else None
    scale = 192**-0.5
    found = attention(
        launcher, q, keys, None if latent else values, places, scale, value,
        window=window, chunk=chunk, sinks=sinks, splits=splits,
    )  # fmt: skip
    seen = keys[..., :value] if latent else values
    starts = torch.tensor([0, *(n for n, _ in lengths)]).cumsum(0).tolist()
    wanted = torch.cat(
        [
            expected(q[starts[i] : starts[i + 1]], keys[at], seen[at], scale, window, chunk, sinks)
            for i, at in enumerate(slots)
        ]
    )
    assert float((found - wanted).norm() / wanted.norm()) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_grouped_queries(launcher: Launcher, lengths: Lengths, dtype: torch.dtype) -> None:
    check(launcher, lengths, 6, 2, 80, 48, dtype=dtype)


@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("sight", [{"window": 7}, {"chunk": 24}, {}], ids=["window", "chunk", "all"])
def test_windows_chunks_and_sinks(launcher: Launcher, splits: int, sight: dict[str, int]) -> None:
    for lengths in (RAGGED, DECODE):
        check(launcher, lengths, 4, 2, 32, 32, splits=splits, with_sinks=True, **sight)


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize(("heads", "latent", "rope"), [(5, 64, 16), (20, 512, 64)])
def test_latent_cache(launcher: Launcher, heads: int, latent: int, rope: int, splits: int | None) -> None:
    check(launcher, DECODE, heads, 1, latent + rope, latent, True, torch.float16, splits)


def test_one_head_a_key_head(launcher: Launcher) -> None:
    check(launcher, RAGGED, 4, 4, 64, 64)


def test_what_does_not_fit_is_refused(launcher: Launcher) -> None:
    places, _ = paged(((1, 3),))
    with pytest.raises(BackendError, match="multiples of 16"):
        attention(launcher, torch.zeros(1, 2, 40), torch.zeros(16, 2, 40), torch.zeros(16, 2, 40), places, 1.0, 40)
    with pytest.raises(BackendError, match="must be float32"):
        attention(launcher, torch.zeros(1, 2, 32).half(), torch.zeros(16, 2, 32), None, places, 1.0, 16)
