"""Experts with biases and the clamped activation, and branches of families that have them, against fp64 formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ktcore_cpu import _native

from .blocks import random_blocks, reference
from .test_experts import batch, error, few, make_bank, run

LIMIT = 1.5
Clamp = tuple[float, float, float, bool]
OSS, BEFORE, AFTER = (1.702, LIMIT, 1.0, False), (1.0, LIMIT, 0.0, False), (1.0, LIMIT, 0.0, True)
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
ROUTING = {"score": "softmax", "bias": None, "groups": 1, "groups_kept": 1, "group_score": "max", "renorm_eps": 0.0}


def biases(experts: int, hidden: int, width: int) -> Arrays:
    rng = np.random.default_rng(5)
    gate, up, down = (rng.standard_normal((experts, n)).astype(np.float32) for n in (width, width, hidden))
    return gate, up, down


def within(gate: torch.Tensor, up: torch.Tensor, clamp: Clamp) -> torch.Tensor:
    """As GptOssExperts of transformers has it, or DeepSeek-V4's and Step-3.7's experts."""
    alpha, limit, plus, after = clamp
    up = up.clamp(min=-limit, max=limit) + plus
    if after:
        return torch.nn.functional.silu(gate).clamp(max=limit) * up
    gate = gate.clamp(max=limit)
    return up * gate * torch.sigmoid(gate * alpha)


def network(
    x: torch.Tensor, dense: list[torch.Tensor], added: Arrays | None, e: int, clamp: Clamp | None
) -> torch.Tensor:
    """One expert on x, in float64."""
    gate, up = x @ dense[0][e].T, x @ dense[1][e].T
    if added:
        gate, up = gate + torch.from_numpy(added[0][e]).double(), up + torch.from_numpy(added[1][e]).double()
    hidden = within(gate, up, clamp) if clamp else torch.nn.functional.silu(gate) * up
    y = hidden @ dense[2][e].T
    return y + torch.from_numpy(added[2][e]).double() if added else y


def expected(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, dense: list[torch.Tensor], added: Arrays | None,
    clamp: Clamp | None, on_input: bool = False,
) -> np.ndarray:  # fmt: skip
    rows, factors = torch.from_numpy(x).double(), torch.from_numpy(weights).double()
    out = torch.zeros_like(rows)
    for t in range(len(x)):
        for k, e in enumerate(ids[t]):
            if e >= 0 and on_input:
                out[t] += network(rows[t] * factors[t, k], dense, added, e, clamp)
            elif e >= 0:
                out[t] += network(rows[t], dense, added, e, clamp) * factors[t, k]
    return out.numpy()


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("clamp", [None, OSS, BEFORE, AFTER])
@pytest.mark.parametrize("formats", [("Q8_0", "Q4_K", "F16"), ("F16", "BF16", "Q8_0")])
def test_biases_and_clamped_activation(
    pool: _native.Pool, isa: str, formats: tuple[str, str, str], clamp: Clamp | None, on_input: bool
) -> None:
    hidden, width = (256, 96)
    bank, dense = make_bank(pool, formats, 5, hidden, width)
    added = biases(5, hidden, width)
    bank.set_biases(*added)
    # the clamp takes size from the result, not rounding errors from what it leaves: relatively they grow
    for exact, limit in ((True, 3e-6), (False, 0.03 if clamp else 0.02)):
        block = _native.ExpertsBlock(pool, bank, "silu", on_input, exact, clamp)
        for tokens in (1, few(7, isa), few(60, isa)):
            x, ids, weights = batch(tokens, hidden, 5, 3, masked=0.3)
            got = run(block, x, ids, weights)
            assert error(got, expected(x, ids, weights, dense, added, clamp, on_input)) < limit
            np.testing.assert_array_equal(got[(ids < 0).all(1)], 0)


def test_biases_of_odd_widths_and_of_some_matrices(pool: _native.Pool) -> None:
    bank, dense = make_bank(pool, ("F32", "BF16", "F16"), 4, 50, 37)
    added = biases(4, 50, 37)
    x, ids, weights = batch(9, 50, 4, 2)
    for kept in ((1, 1, 1), (0, 0, 1), (1, 0, 0)):
        bank.set_biases(*(b if k else None for b, k in zip(added, kept, strict=True)))
        want = expected(x, ids, weights, dense, tuple(b * k for b, k in zip(added, kept, strict=True)), OSS)  # type: ignore[arg-type]
        block = _native.ExpertsBlock(pool, bank, exact=True, clamp=OSS)
        assert error(run(block, x, ids, weights), want) < 3e-6


def test_variants_depend_on_neither_batch_nor_threads(isa: str, pool_of: Callable[[str, int], _native.Pool]) -> None:
    one, three = pool_of(isa, 1), pool_of(isa, 3)
    bank, _ = make_bank(one, ("Q4_K", "Q4_K", "Q6_K"), 6, 256, 256)
    bank.set_biases(*biases(6, 256, 256))
    x, ids, weights = batch(200 if isa != "scalar" else 12, 256, 6, 3, masked=0.1)
    whole = run(_native.ExpertsBlock(one, bank, clamp=OSS), x, ids, weights)
    block = _native.ExpertsBlock(three, bank, clamp=OSS)
    np.testing.assert_array_equal(run(block, x, ids, weights), whole)
    for part in (slice(0, 1), slice(1, 6), slice(6, 12) if isa == "scalar" else slice(20, 60)):
        alone = run(block, *(np.ascontiguousarray(a[part]) for a in (x, ids, weights)))
        np.testing.assert_array_equal(alone, whole[part])


@pytest.mark.parametrize("clamp", [OSS, BEFORE, AFTER])
def test_nan_stays_in_its_token_and_is_not_clamped_away(pool: _native.Pool, clamp: Clamp) -> None:
    bank, _ = make_bank(pool, ("Q4_K",) * 3, 2, 256, 256)
    bank.set_biases(*biases(2, 256, 256))
    x, ids, weights = batch(12, 256, 2, 2)
    block = _native.ExpertsBlock(pool, bank, exact=True, clamp=clamp)
    clean = run(block, x, ids, weights)
    x[5, 3] = np.nan
    got = run(block, x, ids, weights)
    assert np.isnan(got[5]).all()
    np.testing.assert_array_equal(np.delete(got, 5, 0), np.delete(clean, 5, 0))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["gpt-oss", "llama4", "smallthinker"])
def test_branches_of_the_families(pool: _native.Pool, isa: str, kind: str, exact: bool) -> None:
    hidden, width, experts, top_k = 256, 128, 8, 1 if kind == "llama4" else 3
    bank, dense = make_bank(pool, ("Q8_0", "Q4_0", "Q8_0"), experts, hidden, width)
    rng = np.random.default_rng(6)

    def matrix(rows: int, cols: int, seed: int) -> tuple[_native.PackedMatrix, torch.Tensor]:
        raw = random_blocks("F32", rows, cols, seed)
        dense = torch.from_numpy(reference("F32", raw, rows, cols)).double()
        return _native.PackedMatrix.pack(pool, "F32", rows, cols, raw), dense

    router, router_dense = matrix(experts, hidden, 50)
    shared = [matrix(*shape) for shape in ((64, hidden, 51), (64, hidden, 52), (hidden, 64, 53))]
    norm = (1 + 0.3 * rng.standard_normal(hidden)).astype(np.float32)
    config = ROUTING | {"experts": experts, "top_k": top_k, "on_logits": True, "renormalise": False, "scale": 1.0}
    oss, llama, small = kind == "gpt-oss", kind == "llama4", kind == "smallthinker"
    added = biases(experts, hidden, width) if oss else None
    shift = rng.standard_normal(experts).astype(np.float32)
    if oss:
        bank.set_biases(*biases(experts, hidden, width))
        config["logit_bias"] = shift
    else:
        config |= {"score": "sigmoid", "renormalise": small}
    names = ("shared_gate_proj", "shared_up", "shared_down")
    block = _native.MoEBlock(
        pool, bank, router, config, **{n: m for n, (m, _) in zip(names, shared, strict=True) if llama}, norm=norm,
        norm_eps=1e-5, weight_on_input=llama, exact=exact, clamp=OSS if oss else None,
    )  # fmt: skip
    whole = None
    rows, seen = (rng.standard_normal((40, hidden)).astype(np.float32) for _ in range(2))
    for tokens in (few(40, isa), 1, 4):
        x, before = rows[:tokens].copy(), seen[:tokens].copy()
        h = torch.from_numpy(x).double()
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.from_numpy(norm).double()
        logits = (torch.from_numpy(before).double() if small else n) @ router_dense.T
        if oss:
            logits += torch.from_numpy(shift).double()
        values, ids = logits.topk(top_k, -1)
        weights = values.softmax(-1) if oss else values.sigmoid()
        weights = weights / weights.sum(-1, keepdim=True) if small else weights
        want = h + torch.from_numpy(
            expected(n.numpy(), ids.numpy(), weights.numpy(), dense, added, clamp=OSS if oss else None, on_input=llama)
        )
        if llama:
            gate, up, down = (d for _, d in shared)
            want += (torch.nn.functional.silu(n @ gate.T) * (n @ up.T)) @ down.T
        block.forward(x.ctypes.data, x.ctypes.data, tokens, before.ctypes.data if small else 0)
        assert error(x, want.numpy()) < (5e-6 if exact else 0.03)
        whole = x if whole is None else whole
        np.testing.assert_array_equal(x, whole[:tokens])


def test_shared_experts_have_limits_of_their_own(pool: _native.Pool, isa: str) -> None:
    hidden, width, experts = 256, 128, 4
    bank, dense = make_bank(pool, ("Q8_0", "Q4_0", "Q8_0"), experts, hidden, width)

    def matrix(rows: int, cols: int, seed: int) -> tuple[_native.PackedMatrix, torch.Tensor]:
        raw = random_blocks("F32", rows, cols, seed)
        packed = _native.PackedMatrix.pack(pool, "F32", rows, cols, raw)
        return packed, torch.from_numpy(reference("F32", raw, rows, cols)).double()

    router, choice = matrix(experts, hidden, 50)
    (g, gate), (u, up), (d, down) = (matrix(*s) for s in ((64, hidden, 51), (64, hidden, 52), (hidden, 64, 53)))
    config = ROUTING | {"experts": experts, "top_k": 1, "on_logits": True, "renormalise": False, "scale": 1.0}
    block = _native.MoEBlock(
        pool, bank, router, config, shared_gate_proj=g, shared_up=u, shared_down=d, exact=True, clamp=BEFORE,
        shared_clamp=AFTER,
    )  # fmt: skip
    x = np.random.default_rng(3).standard_normal((few(20, isa), hidden)).astype(np.float32)
    h = torch.from_numpy(x).double()
    ids = (h @ choice.T).argmax(1, keepdim=True).numpy()
    want = h + torch.from_numpy(expected(x, ids, np.ones(ids.shape, np.float32), dense, None, BEFORE))
    want += within(h @ gate.T, h @ up.T, AFTER) @ down.T
    block.forward(x.ctypes.data, x.ctypes.data, len(x))
    assert error(x, want.numpy()) < 5e-6


def test_the_early_router_sees_its_own_input_beyond_one_pass() -> None:
    pool = _native.Pool(2)
    hidden, experts = 32, 4
    bank, dense = make_bank(pool, ("Q8_0",) * 3, experts, hidden, 32)
    raw = random_blocks("F32", experts, hidden, 7)
    router = _native.PackedMatrix.pack(pool, "F32", experts, hidden, raw)
    config = ROUTING | {"experts": experts, "top_k": 1, "on_logits": True, "renormalise": False, "scale": 1.0}
    x, before = (np.random.default_rng(s).standard_normal((2100, hidden)).astype(np.float32) for s in (1, 2))
    out = np.full_like(x, np.nan)
    block = _native.MoEBlock(pool, bank, router, config, residual=False, exact=True)
    block.forward(x.ctypes.data, out.ctypes.data, len(x), before.ctypes.data)
    ids = (before @ reference("F32", raw, experts, hidden).T).argmax(1, keepdims=True)
    assert error(out, expected(x, ids, np.ones(ids.shape, np.float32), dense, None, None)) < 3e-6


def test_what_does_not_fit_is_refused() -> None:
    pool = _native.Pool(1)
    bank, _ = make_bank(pool, ("F32",) * 3, 2, 32, 64)
    gate, up, down = biases(2, 32, 64)
    with pytest.raises(ValueError, match="down_bias must hold 2 x 32"):
        bank.set_biases(gate, up, down[:1])
    for alpha, limit, plus in (
        (1.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
        (np.inf, 1.0, 1.0),
        (1.0, np.nan, 1.0),
        (1.0, 1.0, np.nan),
    ):
        with pytest.raises(ValueError, match="clamped activation"):
            _native.ExpertsBlock(pool, bank, clamp=(alpha, limit, plus, False))
    with pytest.raises(ValueError, match="alpha of 1"):
        _native.ExpertsBlock(pool, bank, clamp=(1.7, 1.0, 0.0, True))
    router = _native.PackedMatrix.pack(pool, "F32", 2, 32, random_blocks("F32", 2, 32))
    config = ROUTING | {"experts": 2, "top_k": 1, "on_logits": True, "renormalise": False, "scale": 1.0}
    for wrong, words in (({"bias": gate[0][:2]}, "by logits"), ({"logit_bias": gate[0]}, "logit_bias")):
        with pytest.raises(ValueError, match=words):
            _native.RouterBlock(pool, router, config | wrong)
