"""Weights on their way to a device: types, the device, and roles that a node does not have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ktcore.backend.loading import compute_dtype, embedding_rows, on_device, optional
from ktcore.ops import EmbeddingSpec

TABLE = torch.arange(12.0).view(4, 3)


def request(device: str = "cpu", features: tuple[str, ...] = (), scale: float = 1.0, **options: Any) -> Any:
    weights = {"weight": SimpleNamespace(tensor=lambda: TABLE.clone())}
    runtime = SimpleNamespace(
        device=torch.device(device), pinned_buffer=lambda shape, dtype: torch.empty(shape, dtype=dtype)
    )
    return SimpleNamespace(
        spec=EmbeddingSpec(4, 3, "F32", scale),
        weights=weights,
        runtime=runtime,
        options=options,
        device=SimpleNamespace(has=lambda name: name in features),
    )


def test_a_weight_arrives_in_the_asked_type_on_the_device() -> None:
    assert torch.equal(on_device(request(), "weight"), TABLE)
    half = on_device(request(), "weight", torch.float16)
    assert (half.dtype, torch.equal(half.float(), TABLE)) == (torch.float16, True)
    assert on_device(request("meta"), "weight").device.type == "meta"


def test_a_role_that_a_node_lacks_is_none() -> None:
    assert optional(request(), "bias") is None
    found = optional(request(), "weight", torch.bfloat16)
    assert found is not None
    assert found.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("asked", "features", "found"),
    [
        (None, ("bf16",), torch.bfloat16),
        (None, (), torch.float16),
        ("float32", ("bf16",), torch.float32),
        ("float16", ("bf16",), torch.float16),
        ("bfloat16", (), torch.bfloat16),
    ],
)
def test_products_run_in_what_is_asked_or_the_best_of_the_device(
    asked: str | None, features: tuple[str, ...], found: torch.dtype
) -> None:
    assert compute_dtype(request(features=features, compute=asked)) is found


def test_rows_of_an_embedding_are_float32_in_the_order_of_the_ids() -> None:
    rows = embedding_rows(request(), torch.float16)(torch.tensor([3, 0, 3]))
    assert rows.dtype is torch.float32
    assert torch.equal(rows, TABLE[[3, 0, 3]])
    assert torch.equal(embedding_rows(request(scale=0.5), torch.float16)(torch.tensor([2])), TABLE[[2]] * 0.5)
    assert embedding_rows(request("meta"), torch.float16)(torch.tensor([1])).shape == (1, 3)
