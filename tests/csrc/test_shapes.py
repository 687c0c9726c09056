"""Drawn shapes, formats, batches and instruction sets: every block against fp64 math, in float32 mode to rounding."""

from __future__ import annotations

import os
from functools import cache
from itertools import pairwise
from unittest import mock

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ktcore_cpu import _native

from ktcore.ops.moe import RouterSpec, route

from . import test_attention, test_experts, test_mla, test_mlp
from .blocks import random_blocks, reference, run_linear

FORMATS = sorted(_native.formats())
UNITS = _native.isa_supported() + _native.isa_emulated()
drawn = settings(max_examples=60, deadline=None, derandomize=True)


@cache
def pool(isa: str, threads: int) -> _native.Pool:
    with mock.patch.dict(os.environ, KTCORE_ISA=isa):
        return _native.Pool(threads)


pools = st.builds(pool, st.sampled_from(UNITS), st.integers(1, 3))


def multiple_for(*formats: str) -> int:
    """Of values that rows of all these formats may have."""
    return max(_native.formats()[f][0] for f in formats)


@st.composite
def widths(draw: st.DrawFn, *formats: str, most: int = 768) -> int:
    step = multiple_for(*formats)
    return step * draw(st.integers(1, max(1, most // max(step, 8)))) if step > 1 else draw(st.integers(1, most // 2))


@drawn
@given(data=st.data())
def test_linear(data: st.DataObject) -> None:
    at, format = data.draw(pools), data.draw(st.sampled_from(FORMATS))
    rows, cols, tokens = data.draw(st.integers(1, 130)), data.draw(widths(format)), data.draw(st.integers(1, 70))
    raw = random_blocks(format, rows, cols, data.draw(st.integers(0, 9)))
    w = _native.PackedMatrix.pack(at, format, rows, cols, raw)
    dense = reference(format, raw, rows, cols).astype(np.float64)
    x = np.random.default_rng(tokens).standard_normal((tokens, cols)).astype(np.float32)
    want = x.astype(np.float64) @ dense.T
    size = np.abs(x).astype(np.float64) @ np.abs(dense).T  # what rounding is relative to: sums may cancel
    assert (np.abs(run_linear(at, w, x, exact=True) - want) <= 1e-6 * size + 1e-30).all()
    # the int8 step of each 16 values, or bfloat16's eight bits
    assert (np.abs(run_linear(at, w, x) - want) <= 0.02 * size + 1e-30).all()


@drawn
@given(data=st.data())
def test_feed_forward(data: st.DataObject) -> None:
    formats = (data.draw(st.sampled_from(FORMATS)),) * 2 + (data.draw(st.sampled_from(FORMATS)),)
    hidden, ffn = data.draw(widths(formats[0], most=512)), data.draw(widths(formats[2], most=512))
    activation = data.draw(st.sampled_from(sorted(test_mlp.ACTIVATIONS)))
    block, expected = test_mlp.make(data.draw(pools), formats, hidden, ffn, activation, True)
    x = test_mlp.rows(data.draw(st.integers(1, 40)), hidden)
    out = np.full_like(x, np.nan)
    block.forward(x.ctypes.data, out.ctypes.data, len(x))
    want = expected(x)
    assert np.abs(out - want).max() <= 5e-5 * np.abs(want).max()


@drawn
@given(data=st.data())
def test_routed_experts(data: st.DataObject) -> None:
    at = data.draw(pools)
    formats = tuple(data.draw(st.sampled_from(FORMATS)) for _ in range(3))
    hidden, width = data.draw(widths(*formats[:2], most=512)), data.draw(widths(formats[2], most=512))
    experts, top_k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    bank, dense = test_experts.make_bank(at, formats, experts, hidden, width)  # type: ignore[arg-type]
    activation, on_input = data.draw(st.sampled_from(["silu", "relu"])), data.draw(st.booleans())
    block = _native.ExpertsBlock(at, bank, activation, on_input, True)
    masked = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    x, ids, weights = test_experts.batch(data.draw(st.integers(1, 80)), hidden, experts, top_k, masked)
    got = test_experts.run(block, x, ids, weights)
    want = test_experts.expected(x, ids, weights, dense, activation, on_input)
    assert np.abs(got - want).max() <= 5e-5 * np.abs(want).max()


@drawn
@given(data=st.data())
def test_attention_blocks(data: st.DataObject) -> None:
    kv_heads, dim = data.draw(st.integers(1, 3)), 8 * data.draw(st.integers(1, 16))
    layer = test_attention.Layer(
        heads=kv_heads * data.draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        dim=dim,
        hidden=data.draw(st.integers(4, 90)),
        pairing=data.draw(st.sampled_from(["half", "interleaved"])),
        rotary=2 * data.draw(st.integers(0, dim // 2)),
        window=data.draw(st.sampled_from([0, 1, 13, 64, 65])),
        chunk=data.draw(st.sampled_from([0, 0, 7, 64])),
        sinks=data.draw(st.booleans()),
        norm_last=data.draw(st.booleans()),
        gated=data.draw(st.booleans()),
        extras=data.draw(st.booleans()),
        page=data.draw(st.sampled_from([1, 16, 17, 64])),
    ).build(data.draw(pools), pages=160)
    steps = data.draw(st.lists(st.sampled_from([1, 1, 2, 5, 63, 64, 70]), min_size=1, max_size=4))
    cuts = np.concatenate(([0], np.cumsum(steps))).tolist()
    if cuts[-1] > 160 * layer.page:
        cuts = [0, 160 * layer.page]
    x = test_attention.hidden_rows(cuts[-1], layer.hidden)
    table = test_attention.ints(np.random.default_rng(5).permutation(160)[: -(-cuts[-1] // layer.page)])
    got = np.concatenate([layer.run(x[a:b], test_attention.one(a, b - a, table)) for a, b in pairwise(cuts)])
    np.testing.assert_allclose(got, layer.expected(x), atol=5e-5, rtol=1e-5)


@drawn
@given(data=st.data())
def test_latent_attention(data: st.DataObject) -> None:
    size = tuple(8 * data.draw(st.integers(1, 12)) for _ in range(3))
    with mock.patch.dict(test_mla.SIZES, drawn=size):
        layer = test_mla.Reference(
            data.draw(pools), "drawn", data.draw(st.booleans()), data.draw(st.sampled_from(["half", "interleaved"])),
            exact=True, format="F32",
        )  # fmt: skip
    sequences = data.draw(st.integers(1, 3))
    cached = np.full((sequences * 16, test_mla.PAGE, layer.latent + test_mla.ROPE), np.nan, np.float32)
    contexts = [0] * sequences
    lengths = st.sampled_from([1, 1, 2, 9, 40, 65])
    for number in range(data.draw(st.integers(1, 3))):
        counts = [data.draw(lengths) for _ in range(sequences)]
        contexts = [c + n for c, n in zip(contexts, counts, strict=True)]
        x = test_mla.tokens(sum(counts), number)
        got = layer.run(x, counts, contexts, cached)
        parts = np.split(x, np.cumsum(counts)[:-1])
        want = np.concatenate([layer.expected(s, part) for s, part in enumerate(parts)])
        assert test_mla.error(got, want) < 1e-5


@drawn
@given(data=st.data())
def test_router(data: st.DataObject) -> None:
    at = data.draw(pools)
    groups = data.draw(st.integers(1, 4))
    experts = groups * data.draw(st.integers(2, 12))
    hidden, tokens = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 40))
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(8, kept * (experts // groups))))
    raw = random_blocks("F32", experts, hidden, 3)
    x = np.random.default_rng(tokens).standard_normal((tokens, hidden)).astype(np.float32)
    group_score = data.draw(st.sampled_from(["max", "top2_sum"]))
    # "max" masks to 0, which a negative choice would lose against, to ties
    biased = group_score == "top2_sum" and data.draw(st.booleans())
    bias = np.random.default_rng(1).standard_normal(experts).astype(np.float32) if biased else None
    spec = RouterSpec(
        hidden, experts, top_k, "F32", score=data.draw(st.sampled_from(["softmax", "sigmoid"])),
        choice_bias=bias is not None, groups=groups, groups_kept=kept,
        group_score=group_score, renormalise=data.draw(st.booleans()),
    )  # fmt: skip
    w = _native.PackedMatrix.pack(at, "F32", experts, hidden, raw)
    block = _native.RouterBlock(at, w, test_experts.config(spec, bias))
    ids, weights = np.empty((tokens, top_k), np.int64), np.empty((tokens, top_k), np.float32)
    block.forward(x.ctypes.data, ids.ctypes.data, weights.ctypes.data, tokens)
    logits = torch.from_numpy(run_linear(at, w, x, exact=True))
    want_ids, want = route(logits, spec, None if bias is None else torch.from_numpy(bias))
    order, want_order = ids.argsort(-1), want_ids.numpy().argsort(-1)
    np.testing.assert_array_equal(np.take_along_axis(ids, order, -1), want_ids.sort(-1).values.numpy())
    np.testing.assert_allclose(
        np.take_along_axis(weights, order, -1), np.take_along_axis(want.numpy(), want_order, -1), rtol=2e-5, atol=1e-7
    )
