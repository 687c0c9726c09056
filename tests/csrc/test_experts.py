"""Routed experts, router and the whole MoE branch against fp64 math on what the gguf package says the weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from ktcore_cpu import _native

from ktcore.ops.moe import ExpertsSpec, RouterSpec, route, routed_experts

from .blocks import random_blocks, reference

FORMATS = sorted(_native.formats())
Dense = list[torch.Tensor]


def make_bank(
    pool: _native.Pool, formats: tuple[str, str, str], experts: int, hidden: int, width: int
) -> tuple[_native.ExpertBank, Dense]:
    """A packed bank and its fp64 weights gate, up [E, width, hidden], down [E, hidden, width]."""
    bank = _native.ExpertBank(experts, hidden, width, *formats)
    dense: list[list[torch.Tensor]] = [[], [], []]
    for e in range(experts):
        raws = []
        for i, (format, (rows, cols)) in enumerate(
            zip(formats, ((width, hidden), (width, hidden), (hidden, width)), strict=True)
        ):
            raw = random_blocks(format, rows, cols, 10 * e + i)
            raws.append(raw)
            dense[i].append(torch.from_numpy(reference(format, raw, rows, cols)).double())
        bank.pack(pool, e, *raws)
    return bank, [torch.stack(d) for d in dense]


def run(block: _native.ExpertsBlock, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    out = np.full_like(x, np.nan)
    block.forward(*(a.ctypes.data for a in (x, ids, weights, out)), len(x), ids.shape[1])
    return out


def expected(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, dense: Dense, activation: str = "silu", on_input: bool = False
) -> np.ndarray:
    e, width, hidden = dense[0].shape
    spec = ExpertsSpec(hidden, width, e, ids.shape[1], activation, "", "", "", on_input)
    args = (torch.from_numpy(a).double() for a in (x, weights))
    xt, wt = args
    return routed_experts(xt, torch.from_numpy(ids), wt, *dense, spec).numpy()


def batch(tokens: int, hidden: int, experts: int, top_k: int, masked: float = 0.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    ids = rng.integers(0, experts, (tokens, top_k))  # with repeats within a token
    ids[rng.random(ids.shape) < masked] = -1
    return x, ids, rng.random((tokens, top_k)).astype(np.float32)


def few(tokens: int, isa: str) -> int:
    """Fewer tokens for the scalar definition, which is slow; still enough for its tiles."""
    return min(tokens, 6) if isa == "scalar" else tokens


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_equals_fp64_when_exact_and_is_close_with_int8(pool: _native.Pool, isa: str, format: str) -> None:
    bank, dense = make_bank(pool, (format,) * 3, 3, 256, 256)
    exact, int8 = _native.ExpertsBlock(pool, bank, exact=True), _native.ExpertsBlock(pool, bank)
    for tokens in (1, few(19, isa)):
        x, ids, weights = batch(tokens, 256, 3, 2)
        want = expected(x, ids, weights, dense)
        assert error(run(exact, x, ids, weights), want) < 3e-6
        assert error(run(int8, x, ids, weights), want) < 0.02


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_tanh"])
@pytest.mark.parametrize("on_input", [False, True])
def test_mixed_formats_masks_and_repeats(pool: _native.Pool, isa: str, activation: str, on_input: bool) -> None:
    bank, dense = make_bank(pool, ("Q4_K", "F16", "Q8_0"), 5, 256, 96)
    for exact, limit in ((True, 3e-6), (False, 0.02)):
        block = _native.ExpertsBlock(pool, bank, activation, on_input, exact)
        for tokens in (1, 2, few(7, isa), few(140, isa)):
            x, ids, weights = batch(tokens, 256, 5, 3, masked=0.3)
            want = expected(x, ids, weights, dense, activation, on_input)
            got = run(block, x, ids, weights)
            assert error(got, want) < limit
            np.testing.assert_array_equal(got[(ids < 0).all(1)], 0)


def test_odd_float_widths(pool: _native.Pool) -> None:
    bank, dense = make_bank(pool, ("F32", "BF16", "F16"), 4, 50, 37)
    x, ids, weights = batch(9, 50, 4, 2)
    want = expected(x, ids, weights, dense)
    assert error(run(_native.ExpertsBlock(pool, bank, exact=True), x, ids, weights), want) < 3e-6


def test_one_expert_for_all_and_experts_for_none(pool: _native.Pool, isa: str) -> None:
    bank, dense = make_bank(pool, ("Q4_0",) * 3, 16, 64, 64)
    block = _native.ExpertsBlock(pool, bank, exact=True)
    x, ids, weights = batch(300 if isa != "scalar" else 140, 64, 16, 1)
    ids[:] = 11
    assert error(run(block, x, ids, weights), expected(x, ids, weights, dense)) < 3e-6
    ids[:] = -1
    np.testing.assert_array_equal(run(block, x, ids, weights), 0)


@pytest.mark.parametrize("formats", [("Q4_K", "Q4_K", "Q6_K"), ("Q4_0", "Q8_0", "Q5_1"), ("F16", "Q2_K", "BF16")])
def test_result_depends_on_neither_batch_nor_threads(
    isa: str, pool_of: Callable[[str, int], _native.Pool], formats: tuple[str, str, str]
) -> None:
    one, three = pool_of(isa, 1), pool_of(isa, 3)
    bank, _ = make_bank(one, formats, 6, 256, 256)
    x, ids, weights = batch(333 if isa != "scalar" else 12, 256, 6, 3, masked=0.1)
    whole = run(_native.ExpertsBlock(one, bank), x, ids, weights)
    block = _native.ExpertsBlock(three, bank)
    np.testing.assert_array_equal(run(block, x, ids, weights), whole)
    for part in (slice(0, 1), slice(1, 6), slice(6, 12) if isa == "scalar" else slice(20, 60)):
        alone = run(block, *(np.ascontiguousarray(a[part]) for a in (x, ids, weights)))
        np.testing.assert_array_equal(alone, whole[part])


def test_more_tokens_than_one_pass_takes() -> None:
    pool = _native.Pool(2)
    bank, dense = make_bank(pool, ("Q8_0",) * 3, 4, 32, 32)
    block = _native.ExpertsBlock(pool, bank, exact=True)
    x, ids, weights = batch(4100, 32, 4, 2)
    assert error(run(block, x, ids, weights), expected(x, ids, weights, dense)) < 3e-6


def test_nan_stays_in_its_token(pool: _native.Pool) -> None:
    bank, _ = make_bank(pool, ("Q4_K",) * 3, 2, 256, 256)
    x, ids, weights = batch(12, 256, 2, 2)
    block = _native.ExpertsBlock(pool, bank, exact=True)
    clean = run(block, x, ids, weights)
    x[5, 3] = np.nan
    got = run(block, x, ids, weights)
    assert np.isnan(got[5]).any()
    np.testing.assert_array_equal(np.delete(got, 5, 0), np.delete(clean, 5, 0))


def test_misuse_is_refused() -> None:
    pool = _native.Pool(1)
    with pytest.raises(ValueError, match="multiples of 256"):
        _native.ExpertBank(2, 64, 256, "Q4_K", "Q4_K", "Q4_K")
    with pytest.raises(ValueError, match="experts"):
        _native.ExpertBank(0, 64, 64, "Q8_0", "Q8_0", "Q8_0")
    bank = _native.ExpertBank(2, 32, 32, "F32", "F32", "F32")
    raw = random_blocks("F32", 32, 32)
    with pytest.raises(ValueError, match="bytes"):
        bank.pack(pool, 0, raw, raw, raw[:5])
    bank.pack(pool, 0, raw, raw, raw)
    with pytest.raises(ValueError, match="already"):
        bank.pack(pool, 0, raw, raw, raw)
    with pytest.raises(ValueError, match="no expert 2"):
        bank.pack(pool, 2, raw, raw, raw)
    with pytest.raises(ValueError, match="1 of 2"):
        _native.ExpertsBlock(pool, bank)
    bank.pack(pool, 1, raw, raw, raw)
    block = _native.ExpertsBlock(pool, bank)
    x, ids, weights = batch(2, 32, 2, 2)
    ids[1, 1] = 2
    with pytest.raises(ValueError, match="expert 2"):
        run(block, x, ids, weights)


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "renormalised": {"renormalise": True},
    "v2": {"groups": 8, "groups_kept": 3, "scale": 16.0},
    "v3": {
        "score": "sigmoid",
        "choice_bias": True,
        "groups": 8,
        "groups_kept": 4,
        "group_score": "top2_sum",
        "renormalise": True,
        "renorm_eps": 1e-20,
        "scale": 2.5,
    },
    "gpt-oss": {"logit_bias": True, "on_logits": True},
    "llama4": {"score": "sigmoid", "on_logits": True},
    "smallthinker": {"score": "sigmoid", "on_logits": True, "renormalise": True},
    "biased softmax": {"logit_bias": True, "renormalise": True},
}


def config(spec: RouterSpec, bias: np.ndarray | None, logit_bias: np.ndarray | None = None) -> dict[str, Any]:
    names = (
        "experts",
        "top_k",
        "score",
        "groups",
        "groups_kept",
        "group_score",
        "renormalise",
        "renorm_eps",
        "scale",
        "on_logits",
    )
    return {name: getattr(spec, name) for name in names} | {"bias": bias, "logit_bias": logit_bias}


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_router_chooses_as_the_definition(pool: _native.Pool, kind: str, tokens: int) -> None:
    spec = RouterSpec(64, 32, 6, "F32", **ROUTERS[kind])
    rng = np.random.default_rng(3)
    raw = random_blocks("F32", 32, 64, 9)
    bias = rng.standard_normal(32).astype(np.float32) * 0.1 if spec.choice_bias else None
    on_logits = rng.standard_normal(32).astype(np.float32) if spec.logit_bias else None
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    weight = _native.PackedMatrix.pack(pool, "F32", 32, 64, raw)
    block = _native.RouterBlock(pool, weight, config(spec, bias, on_logits))
    ids, weights = np.full((tokens, 6), -7, np.int64), np.full((tokens, 6), np.nan, np.float32)
    block.forward(x.ctypes.data, ids.ctypes.data, weights.ctypes.data, tokens)
    logits = torch.from_numpy(x) @ torch.from_numpy(raw.view(np.float32)).T
    if on_logits is not None:
        logits = logits + torch.from_numpy(on_logits)
    want_ids, want = route(logits, spec, None if bias is None else torch.from_numpy(bias))
    order, want_order = ids.argsort(1), want_ids.numpy().argsort(1)
    np.testing.assert_array_equal(
        np.take_along_axis(ids, order, 1), np.take_along_axis(want_ids.numpy(), want_order, 1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(weights, order, 1), np.take_along_axis(want.numpy(), want_order, 1), rtol=3e-5, atol=1e-7
    )


@pytest.mark.parametrize("top_k", [1, 5, 24])
def test_router_takes_the_best_in_falling_order_of_equals_the_lower_and_nan_last(
    pool: _native.Pool, top_k: int
) -> None:
    n = 24
    spec = RouterSpec(n, n, top_k, "F32", "sigmoid", logit_bias=True)
    weight = _native.PackedMatrix.pack(pool, "F32", n, n, np.eye(n, dtype=np.float32).view(np.uint8))
    x = np.random.default_rng(8).integers(-3, 4, (40, n)).astype(np.float32)
    nothing = np.where(np.arange(n) % 5 == 2, np.nan, 0).astype(np.float32)
    ids, weights = np.empty((40, top_k), np.int64), np.empty((40, top_k), np.float32)
    block = _native.RouterBlock(pool, weight, config(spec, None, nothing))
    block.forward(x.ctypes.data, ids.ctypes.data, weights.ctypes.data, 40)
    # numpy puts NaN behind all numbers, and a stable order leaves equals as they were
    np.testing.assert_array_equal(ids, np.argsort(-(x + nothing), axis=1, kind="stable")[:, :top_k])


def test_router_of_nan_gives_experts_that_exist(pool: _native.Pool) -> None:
    spec = RouterSpec(32, 16, 4, "F32", "sigmoid", groups=4, groups_kept=2, group_score="top2_sum")
    w = _native.PackedMatrix.pack(pool, "F32", 16, 32, random_blocks("F32", 16, 32))
    x = np.full((1, 32), np.nan, np.float32)
    ids, weights = np.full((1, 4), -7, np.int64), np.zeros((1, 4), np.float32)
    _native.RouterBlock(pool, w, config(spec, None)).forward(x.ctypes.data, ids.ctypes.data, weights.ctypes.data, 1)
    assert len(set(ids[0])) == 4
    assert ids.min() >= 0
    assert ids.max() < 16


@pytest.mark.parametrize("gated", [None, False, True])
@pytest.mark.parametrize("exact", [True, False])
def test_branch_equals_its_parts_in_fp64(pool: _native.Pool, isa: str, gated: bool | None, exact: bool) -> None:
    hidden, width, shared_width = 256, 256, 512
    spec = RouterSpec(hidden, 8, 3, "F32", renormalise=True)
    bank, dense = make_bank(pool, ("Q4_K", "Q4_K", "Q6_K"), 8, hidden, width)

    def matrix(format: str, rows: int, cols: int, seed: int) -> tuple[_native.PackedMatrix, torch.Tensor]:
        raw = random_blocks(format, rows, cols, seed)
        return _native.PackedMatrix.pack(pool, format, rows, cols, raw), torch.from_numpy(
            reference(format, raw, rows, cols)
        ).double()

    router, router_dense = matrix("F32", 8, hidden, 50)
    gate, up, down = (
        matrix(f, r, c, s)
        for f, r, c, s in (
            ("Q8_0", shared_width, hidden, 51),
            ("Q4_K", shared_width, hidden, 52),
            ("Q6_K", hidden, shared_width, 53),
        )
    )
    scale = matrix("F32", 1, hidden, 54)
    norm = (1 + 0.3 * np.random.default_rng(4).standard_normal(hidden)).astype(np.float32)
    shared = {} if gated is None else {"shared_gate_proj": gate[0], "shared_up": up[0], "shared_down": down[0]}
    block = _native.MoEBlock(
        pool,
        bank,
        router,
        config(spec, None),
        **shared,
        shared_gate=scale[0] if gated else None,
        norm=norm,
        norm_eps=1e-5,
        exact=exact,
    )
    whole = None
    for tokens in (few(70, isa), 1, 4):
        x = np.random.default_rng(8).standard_normal((70, hidden)).astype(np.float32)[:tokens].copy()
        h = torch.from_numpy(x).double()
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.from_numpy(norm).double()
        ids, weights = route((n @ router_dense.T).float(), spec, None)
        e = ExpertsSpec(hidden, width, 8, 3, "silu", "", "", "")
        want = h + routed_experts(n, ids, weights.double(), *dense, e)
        if gated is not None:
            part = (torch.nn.functional.silu(n @ gate[1].T) * (n @ up[1].T)) @ down[1].T
            want += part * (n @ scale[1].T).sigmoid() if gated else part
        block.forward(x.ctypes.data, x.ctypes.data, tokens)
        assert error(x, want.numpy()) < (5e-6 if exact else 0.03)
        whole = x if whole is None else whole
        np.testing.assert_array_equal(x, whole[:tokens])


def test_two_pools_fill_one_bank(pool_of: Callable[..., _native.Pool]) -> None:
    experts, hidden, width = 64, 256, 64
    raws = [
        [
            random_blocks("Q4_0", *shape, 3 * e + i)
            for i, shape in enumerate(((width, hidden),) * 2 + ((hidden, width),))
        ]
        for e in range(experts)
    ]
    bank = _native.ExpertBank(experts, hidden, width, "Q4_0", "Q4_0", "Q4_0")
    pools = [pool_of("scalar", 1) for _ in range(2)]
    refused = []

    def fill(at: _native.Pool, order: Iterable[int]) -> None:
        for e in order:
            try:
                bank.pack(at, e, *raws[e])
            except ValueError as error:
                refused.append(str(error))

    threads = [
        Thread(target=fill, args=(at, order)) for at, order in zip(pools, (range(64), range(63, -1, -1)), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bank.packed == experts
    assert len(refused) == experts
    assert all("is packed already" in text for text in refused)
    alone = _native.ExpertBank(experts, hidden, width, "Q4_0", "Q4_0", "Q4_0")
    for e in range(experts):
        alone.pack(pools[0], e, *raws[e])
    np.testing.assert_array_equal(bank.contents, alone.contents)
