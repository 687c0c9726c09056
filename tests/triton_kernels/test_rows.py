"""The row kernels in Triton's interpreter against the reference operators in float64 or float32."""

from __future__ import annotations

import pytest
import torch
from ktcore_triton.rows import cache_write, rms_norm, rope, swiglu

from ktcore.errors import BackendError
from ktcore.ops.rope import Pairing
from ktcore.ops.rope import rope as reference_rope

TYPES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    return float((found.double() - expected.double()).norm() / expected.double().norm()) < bound


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("dim", "residual", "weighted", "offset"), [(96, True, True, 0.0), (2048, False, True, 1.0),
                                                                    (128, True, False, 0.0)])  # fmt: skip
def test_rms_norm(dtype: torch.dtype, dim: int, residual: bool, weighted: bool, offset: float) -> None:
    x, r = torch.randn(5, dim).to(dtype), torch.randn(5, dim).to(dtype)
    weight = torch.rand(dim) + 0.5 if weighted else None
    found, total = rms_norm(x, weight, 1e-5, residual=r if residual else None, offset=offset)
    s = x.double() + (r.double() if residual else 0)
    expected = s / (s.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (1 if weight is None else weight.double() + offset)
    assert near(found, expected, TYPES[dtype])
    assert near(total, s, TYPES[dtype])
    assert found.dtype == total.dtype == dtype


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(("width", "pairs"), [(64, 32), (80, 16), (128, 24)])
def test_rope(dtype: torch.dtype, pairing: Pairing, width: int, pairs: int) -> None:
    x, positions = torch.randn(4, 3, width).to(dtype), torch.tensor([0, 5, 77, 4000])
    frequencies = 10000.0 ** -(torch.arange(pairs) / pairs)
    expected = reference_rope(x.float(), positions, frequencies, 1.2, pairing)
    found = rope(x, positions, frequencies, 1.2, pairing)
    assert near(found, expected, TYPES[dtype])
    assert torch.equal(found[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up = torch.randn(7, 300).to(dtype), torch.randn(7, 300).to(dtype)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert near(swiglu(gate, up), expected, TYPES[dtype])


def test_cache_writes_go_to_their_slots_and_nowhere_else() -> None:
    cache = torch.full((12, 2, 24), -7.0, dtype=torch.float16)
    rows, slots = torch.randn(4, 2, 24), torch.tensor([3, 11, -1, 0])
    cache_write(rows, slots, cache)
    expected = torch.full_like(cache, -7.0)
    for i in (0, 1, 3):
        expected[slots[i]] = rows[i].half()
    assert torch.equal(cache, expected)


def test_a_latent_row_is_written_in_two_parts() -> None:
    cache = torch.zeros(6, 40)
    latent, key, slots = torch.randn(2, 32), torch.randn(2, 8), torch.tensor([5, 2])
    cache_write(latent, slots, cache)
    cache_write(key, slots, cache, column=32)
    assert torch.equal(cache[slots], torch.cat((latent, key), 1))
    assert not cache[[0, 1, 3, 4]].any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BackendError, match="do not fit a cache"):
        cache_write(torch.zeros(2, 16), torch.zeros(2, dtype=torch.int64), torch.zeros(4, 20), column=8)
    with pytest.raises(BackendError, match="differ in shape"):
        swiglu(torch.zeros(2), torch.zeros(3))
    with pytest.raises(BackendError, match="not contiguous"):
        rms_norm(torch.zeros(4, 2).T, None, 1e-5)
    with pytest.raises(BackendError, match="40 pairs"):
        rope(torch.zeros(1, 1, 64), torch.zeros(1), torch.zeros(40), 1.0, "half")
