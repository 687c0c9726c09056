"""Residual streams of the native module against float64 and against transformers' modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ktcore_cpu import _native
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen

from ktcore.ops import HyperConnectionSpec
from ktcore.ops.streams import connection_weights, entered, left

from .blocks import F32, random_blocks, reference

SHAPES = [(16, 4), (528, 3), (1024, 4), (48, 8)]


def made(hidden: int, streams: int, leaves: bool = True) -> tuple[HyperConnectionSpec, dict[str, torch.Tensor]]:
    spec = HyperConnectionSpec(hidden, streams, 1e-6, 1e-5, 20 if leaves else 0, leave="mixed" if leaves else "")
    g = torch.Generator().manual_seed(hidden + streams)
    width = streams * hidden
    return spec, {
        "fn": torch.randn(spec.rows, width, generator=g) * 2 * width**-0.5,
        "base": torch.randn(spec.rows, generator=g),
        "scale": 1 + 0.3 * torch.randn(spec.parts, generator=g),
    }


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def block(pool: _native.Pool, spec: HyperConnectionSpec, w: dict[str, torch.Tensor]) -> _native.HyperBlock:
    return _native.HyperBlock(
        pool,
        w["fn"].numpy(),
        hidden=spec.hidden,
        streams=spec.streams,
        rounds=spec.rounds,
        eps=spec.eps,
        rms_eps=spec.rms_eps,
        leaves=bool(spec.leave),
        base=w["base"].numpy(),
        scale=w["scale"].numpy(),
    )


def run(
    b: _native.HyperBlock | _native.GatedStreamsBlock, x: torch.Tensor, hidden: int, y: torch.Tensor | None = None
) -> tuple[F32, F32]:
    n = len(x)
    inside, carry = np.full((n, hidden), np.nan, np.float32), np.full((n, max(b.carry, 1)), np.nan, np.float32)
    b.enter(x.data_ptr(), inside.ctypes.data, carry.ctypes.data, n)
    out = np.full(tuple(x.shape), np.nan, np.float32)
    if y is not None:
        b.leave(x.data_ptr(), y.data_ptr(), carry.ctypes.data, out.ctypes.data, n)
    return inside, out


@pytest.mark.parametrize(("hidden", "streams"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 19])
def test_streams_match_float64(pool: _native.Pool, hidden: int, streams: int, tokens: int) -> None:
    spec, w = made(hidden, streams)
    x, y = drawn(tokens, streams * hidden), drawn(tokens, hidden)
    inside, out = run(block(pool, spec, w), x, hidden, y)
    pre, post, mix = connection_weights(spec, x.double(), *(w[r].double() for r in ("fn", "base", "scale")))
    np.testing.assert_allclose(inside, entered(x.double(), pre), atol=2e-5)
    np.testing.assert_allclose(out, left(x.double(), y.double(), post, mix), atol=2e-5)


def test_the_end_matches_transformers(pool: _native.Pool) -> None:
    spec, w = made(64, 4, leaves=False)
    config: Any = SimpleNamespace(hc_mult=4, hidden_size=64, hc_eps=1e-6, rms_norm_eps=1e-5)
    theirs: Any = v4.DeepseekV4HyperHead(config)
    theirs.load_state_dict({"hc_fn": w["fn"], "hc_base": w["base"], "hc_scale": w["scale"]})
    x = drawn(7, 256)
    b = block(pool, spec, w)
    assert b.carry == 0
    with torch.no_grad():
        np.testing.assert_allclose(run(b, x, 64)[0], theirs(x.view(1, 7, 4, 64))[0], atol=1e-5)


def test_a_token_is_the_same_among_others_and_on_other_threads(pool: _native.Pool) -> None:
    spec, w = made(528, 4)
    x, y = drawn(21, 4 * 528), drawn(21, 528)
    inside, out = run(block(pool, spec, w), x, 528, y)
    single = block(_native.Pool(1), spec, w)
    for t in (0, 8, 20):
        alone = run(single, x[t : t + 1].clone(), 528, y[t : t + 1].clone())
        assert np.array_equal(alone[0][0], inside[t])
        assert np.array_equal(alone[1][0], out[t])


def test_streams_may_be_written_in_place(pool: _native.Pool) -> None:
    spec, w = made(64, 4)
    x, y = drawn(3, 256), drawn(3, 64)
    b = block(pool, spec, w)
    want = run(b, x, 64, y)[1]
    inside, carry = np.empty((3, 64), np.float32), np.empty((3, b.carry), np.float32)
    b.enter(x.data_ptr(), inside.ctypes.data, carry.ctypes.data, 3)
    b.leave(x.data_ptr(), y.data_ptr(), carry.ctypes.data, x.data_ptr(), 3)
    assert np.array_equal(x.numpy(), want)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden": 24}, "multiple of 16"),
        ({"streams": 9}, "1 to 8 streams"),
        ({"rounds": -1}, "rounds"),
        ({"base": np.zeros(3, np.float32)}, "base"),
        ({"scale": np.zeros(2, np.float32)}, "scale"),
        ({"hidden": 32}, "fn must be"),
    ],
)
def test_what_does_not_fit_is_refused(pool: _native.Pool, changes: dict[str, Any], said: str) -> None:
    _, w = made(16, 4)
    fields: dict[str, Any] = {
        "hidden": 16, "streams": 4, "rounds": 2, "eps": 1e-6, "rms_eps": 1e-6, "leaves": True,
        "base": w["base"].numpy(), "scale": w["scale"].numpy(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=said):
        _native.HyperBlock(pool, w["fn"].numpy(), **(fields | changes))


def test_the_end_has_no_way_back(pool: _native.Pool) -> None:
    spec, w = made(16, 4, leaves=False)
    x = drawn(1, 64)
    with pytest.raises(ValueError, match="no way back"):
        block(pool, spec, w).leave(x.data_ptr(), x.data_ptr(), x.data_ptr(), x.data_ptr(), 1)


def gated(pool: _native.Pool, fmt: str, exact: bool, *, leaves: bool = True) -> tuple[_native.GatedStreamsBlock, Any]:
    """Four streams of 64 with a mixture of rank 256, and transformers' module with the same weights in float64."""
    shapes = {"input_mix_weight_down": (256, 256), "input_mix_weight_up": (256, 256), "block_inject_weight": (4, 256)}
    packed, dense = [], {}
    for seed, (name, (rows, cols)) in enumerate(shapes.items()):
        raw = random_blocks(fmt, rows, cols, seed)
        packed.append(_native.PackedMatrix.pack(pool, fmt, rows, cols, raw))
        dense[f"{name}.weight"] = torch.from_numpy(reference(fmt, raw, rows, cols))
    norm = 0.3 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    config: Any = SimpleNamespace(hc_count=4, hidden_size=64, hc_lowrank=256, rms_norm_eps=1e-5)
    theirs: Any = qwen.Qwen4ExpTextGatedResidual(config, use_combine=leaves).double()
    kept = dense if leaves else {n: w for n, w in dense.items() if not n.startswith("block")}
    theirs.load_state_dict({"hc_norm.weight": norm, **kept})
    down, up, inject = packed
    block = _native.GatedStreamsBlock(
        pool, down, up, inject if leaves else None, hidden=64, streams=4, norm=1 + norm.numpy(), eps=1e-5, exact=exact
    )
    return block, theirs


# random codes make gates of tens, so that what the activations' 8 bits lose is seen through steep sigmoids
@pytest.mark.parametrize(("fmt", "exact", "within"), [("F32", True, 1e-5), ("Q4_K", True, 1e-5), ("Q4_K", False, 0.15)])
@pytest.mark.parametrize("tokens", [1, 3, 18])
def test_gated_streams_match_transformers(
    pool: _native.Pool, fmt: str, exact: bool, within: float, tokens: int
) -> None:
    block, theirs = gated(pool, fmt, exact)
    x, y = drawn(tokens, 256), drawn(tokens, 64)
    inside, out = run(block, x, 64, y)
    with torch.no_grad():
        want, streams, inject = theirs(x[None].double())
    after = streams.view(tokens, 4, 64) + inject[0][..., None] * y[:, None].double()
    np.testing.assert_allclose(inside, want[0], atol=within)
    np.testing.assert_allclose(out, after.flatten(1), atol=5 * within)
    assert np.abs(inside - want[0].numpy()).mean() < within / 10


def test_the_end_of_gated_streams_matches_transformers(pool: _native.Pool) -> None:
    block, theirs = gated(pool, "F32", True, leaves=False)
    x = drawn(5, 256)
    assert block.carry == 0
    with torch.no_grad():
        np.testing.assert_allclose(run(block, x, 64)[0], theirs(x[None].double())[0], atol=1e-5)
    with pytest.raises(ValueError, match="no way back"):
        block.leave(x.data_ptr(), x.data_ptr(), x.data_ptr(), x.data_ptr(), 1)


def test_gated_streams_are_the_same_on_other_threads_and_beside_other_tokens(pool: _native.Pool) -> None:
    block, _ = gated(pool, "Q4_K", False)
    single, _ = gated(_native.Pool(1), "Q4_K", False)
    x, y = drawn(9, 256), drawn(9, 64)
    inside, out = run(block, x, 64, y)
    alone = run(single, x[8:].clone(), 64, y[8:].clone())
    assert np.array_equal(alone[0][0], inside[8])
    assert np.array_equal(alone[1][0], out[8])
