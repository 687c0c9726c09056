"""The reference KV cache refuses pages that do not hold what a step says."""

from __future__ import annotations

import pytest
import torch

from ktcore.backend.reference.cache import PagedCache
from ktcore.errors import BackendError
from ktcore.ops import KVCacheSpec, StepBatch

PAGE = 4
SPEC = KVCacheSpec("gqa", heads=4, kv_heads=2, key_dim=8, value_dim=6)


def _step(start: int, stop: int, table: list[int], page_size: int = PAGE) -> StepBatch:
    return StepBatch(
        torch.zeros(stop - start, dtype=torch.int64),
        torch.arange(start, stop),
        (0, stop - start),
        (stop,),
        torch.tensor([table], dtype=torch.int32),
        page_size,
    )


def _append(cache: PagedCache, step: StepBatch) -> None:
    cache.append(step, torch.randn(step.tokens, 2, 8), torch.randn(step.tokens, 2, 6))


@pytest.fixture
def cache() -> PagedCache:
    cache = PagedCache("layers.0.attn.cache", SPEC, torch.device("cpu"))
    cache.allocate_pages(4, PAGE)
    return cache


def test_pages_may_lie_anywhere(cache: PagedCache) -> None:
    k, v, q = torch.randn(7, 2, 8), torch.randn(7, 2, 6), torch.randn(7, 4, 8)
    results = []
    for table in ([0, 1], [3, 1]):
        step = _step(0, 7, table)
        cache.append(step, k, v)
        results.append(cache.attend(step, q, 0.3))
    assert results[0].shape == (7, 4, 6)
    assert torch.equal(*results)


def test_a_page_that_was_never_written_is_an_error(cache: PagedCache) -> None:
    _append(cache, _step(0, 4, [2]))
    with pytest.raises(BackendError, match=r"layers\.0\.attn\.cache: position 4 .* nothing was written"):
        cache.attend(_step(4, 5, [2, 3]), torch.randn(1, 4, 8), 1.0)


def test_blocks_in_the_wrong_order_are_an_error(cache: PagedCache) -> None:
    _append(cache, _step(0, 8, [2, 3]))
    with pytest.raises(BackendError, match=r"position 0 .* holds position 4"):
        cache.attend(_step(7, 8, [3, 2]), torch.randn(1, 4, 8), 1.0)


@pytest.mark.parametrize("table", [[-1], [4]])
def test_a_page_that_was_not_allocated_is_an_error(cache: PagedCache, table: list[int]) -> None:
    with pytest.raises(BackendError, match="not allocated"):
        _append(cache, _step(0, 2, table))


def test_another_page_size_is_an_error(cache: PagedCache) -> None:
    with pytest.raises(BackendError, match="pages of 8 tokens, the cache of 4"):
        _append(cache, _step(0, 2, [0], page_size=8))


def test_allocating_again_forgets(cache: PagedCache) -> None:
    _append(cache, _step(0, 4, [0]))
    cache.allocate_pages(4, PAGE)
    with pytest.raises(BackendError, match="nothing was written"):
        cache.attend(_step(3, 4, [0]), torch.randn(1, 4, 8), 1.0)


def test_values_of_the_wrong_width_are_an_error(cache: PagedCache) -> None:
    with pytest.raises(BackendError, match="do not fit"):
        cache.append(_step(0, 1, [0]), torch.randn(1, 2, 8), torch.randn(1, 2, 8))


def test_a_cache_without_pages_says_so_of_any_step() -> None:
    cache = PagedCache("cache", SPEC, torch.device("cpu"))
    with pytest.raises(BackendError, match="the step has pages of 1 tokens, the cache of 0"):
        _append(cache, _step(0, 1, [0], page_size=1))
