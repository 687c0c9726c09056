"""The attention block against plain torch in fp64: pairings, norms, biases, pages, ragged batches, windows, caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from ktcore_cpu import _native

from .blocks import F32, random_blocks, reference


@dataclass
class Layer:
    """A block and the fp64 weights it was made from."""

    heads: int = 6
    kv_heads: int = 2
    dim: int = 64
    hidden: int = 96
    pairing: str = "half"
    rotary: int = 64
    window: int = 0
    chunk: int = 0
    sinks: bool = False
    temperature: tuple[float, float, float] = (0.0, 0.0, 1.0)  # scale, span and offset
    norm_last: bool = False
    norm_whole: bool = False
    gated: bool = False
    head_gate: bool = False
    value_dim: int = 0
    value_norm: bool = False
    value_scale: float = 1.0
    format: str = "F32"
    extras: bool = False
    kv_dtype: str = "f32"
    page: int = 32
    w: dict[str, torch.Tensor] = field(default_factory=dict)

    def build(self, pool: _native.Pool, pages: int = 40, exact: bool = True) -> Layer:
        shapes = {
            "q": (self.heads * self.dim, self.hidden),
            "k": (self.kv_heads * self.dim, self.hidden),
            "v": (self.kv_heads * self.value, self.hidden),
            "o": (self.hidden, self.heads * self.value),
        }
        if self.gated:
            shapes["gate"] = (self.heads * (1 if self.head_gate else self.value), self.hidden)
        packed = {}
        for seed, (name, (rows, cols)) in enumerate(shapes.items()):
            raw = random_blocks(self.format, rows, cols, seed)
            dense = reference(self.format, raw, rows, cols)
            if self.format == "F32":
                dense = dense / np.float32(np.sqrt(cols))
                raw = np.ascontiguousarray(dense).view(np.uint8)
            self.w[name] = torch.from_numpy(dense).double()
            packed[name] = _native.PackedMatrix.pack(pool, self.format, rows, cols, raw)
        rng = np.random.default_rng(9)
        options: dict[str, Any] = {}
        names = {"norm": self.hidden, "q_norm": self.dim, "k_norm": self.dim}
        if self.norm_whole:
            names |= {"q_norm": self.heads * self.dim, "k_norm": self.kv_heads * self.dim}
        names |= {f"{n}_bias": s[0] for n, s in shapes.items() if n != "gate"}
        if self.sinks:
            options["sinks"] = (3 * rng.standard_normal(self.heads)).astype(np.float32)
            self.w["sinks"] = torch.from_numpy(options["sinks"]).double()
        for name, size in names.items() if self.extras else [("norm", self.hidden)]:
            options[name] = (1 + 0.3 * rng.standard_normal(size)).astype(np.float32)
            self.w[name] = torch.from_numpy(options[name]).double()
        if self.value_norm:
            options |= {"v_norm": np.linspace(0.5, 1.5, self.value, dtype=np.float32), "v_eps": 1e-3}
        self.inv_freq = (1e4 ** (-np.arange(self.rotary // 2) / (self.rotary // 2))).astype(np.float32)
        self.block = _native.AttentionBlock(
            pool, packed["q"], packed["k"], packed["v"], packed["o"], heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.dim, rope_pairing=self.pairing, inv_freq=self.inv_freq,
            rope_scale=1.0 if not self.extras else 1.1, softmax_scale=self.dim**-0.5, norm_eps=1e-5, qk_eps=1e-6,
            window=self.window, residual=True, exact=exact, chunk=self.chunk, temperature_scale=self.temperature[0],
            temperature_span=self.temperature[1], temperature_offset=self.temperature[2],
            norm_after_rope=self.norm_last, norm_whole=self.norm_whole, gate=packed.get("gate"),
            value_dim=self.value_dim, value_scale=self.value_scale, **options,
        )  # fmt: skip
        self.pages = pages
        # all bits set: NaN in every type, and in a scale
        widths = (_native.cache_row_bytes(self.kv_dtype, width) for width in (self.dim, self.value))
        self.k, self.v = (np.full((pages, self.kv_heads, self.page, width), 255, np.uint8) for width in widths)
        return self

    @property
    def value(self) -> int:
        return self.value_dim or self.dim

    def run(self, x: F32, step: _native.Step) -> F32:
        out = np.full_like(x, np.nan)
        self.block.forward(
            x.ctypes.data,
            out.ctypes.data,
            step,
            self.k.ctypes.data,
            self.v.ctypes.data,
            self.pages,
            self.page,
            self.kv_dtype,
        )
        return out

    def expected(self, x: F32) -> np.ndarray:
        """One whole sequence from position 0, in fp64."""
        w, t = self.w, len(x)
        h = torch.from_numpy(x).double()
        n = rms(h, w["norm"], 1e-5)

        def project(name: str, heads: int) -> torch.Tensor:
            y = n @ w[name].T + (w[f"{name}_bias"] if self.extras else 0)
            if name == "v":
                y = y.view(t, heads, self.value)
                weight = torch.linspace(0.5, 1.5, self.value, dtype=torch.float64)
                return (rms(y, weight, 1e-3) if self.value_norm else y) * self.value_scale
            y = y.view(t, heads, self.dim)
            if self.norm_last:
                y = self.rotate(y)
            if self.extras and self.norm_whole:
                y = rms(y.flatten(1), w[f"{name}_norm"], 1e-6).view(y.shape)
            elif self.extras:
                y = rms(y, w[f"{name}_norm"], 1e-6)
            return y if self.norm_last else self.rotate(y)

        q, k, v = project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads)
        if self.temperature[1]:
            scale, span, offset = self.temperature
            steps = ((torch.arange(t) + offset) // span).double()
            q = q * (torch.log1p(steps) * scale + 1)[:, None, None]
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.dim**-0.5
        at = torch.arange(t)
        seen = at[None] <= at[:, None]
        if self.window:
            seen &= at[None] > at[:, None] - self.window
        if self.chunk:
            seen &= at[None] // self.chunk == at[:, None] // self.chunk
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.sinks:
            scores = torch.cat((scores, w["sinks"][:, None, None].expand(-1, t, 1)), -1)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :t], v).reshape(t, -1)
        if self.gated:
            gate = (n @ w["gate"].T).sigmoid()
            mixed = mixed * (gate.repeat_interleave(self.value, 1) if self.head_gate else gate)
        y = mixed @ w["o"].T + (w["o_bias"] if self.extras else 0)
        return (h + y).numpy()

    def rotate(self, y: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(len(y)).double()[:, None] * torch.from_numpy(self.inv_freq).double()
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        if self.extras:
            cos, sin = cos * 1.1, sin * 1.1
        y, half = y.clone(), self.rotary // 2
        first, second = (slice(0, half), slice(half, 2 * half))
        if self.pairing == "interleaved":
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        a, b = y[..., first].clone(), y[..., second].clone()
        y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
        return y


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def ints(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)


def one(start: int, n: int, table: np.ndarray) -> _native.Step:
    return _native.Step(ints(range(start, start + n)), ints([0, n]), ints([start + n]), table[None])


def hidden_rows(n: int, width: int, seed: int = 3) -> F32:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


CASES = {
    "half": {},
    "interleaved": {"pairing": "interleaved"},
    "partial rotary": {"rotary": 32},
    "partial interleaved": {"rotary": 48, "pairing": "interleaved"},
    "no rotary": {"rotary": 0},
    "norms and biases": {"extras": True},
    "window": {"window": 37},
    "chunk": {"chunk": 48},
    "chunk off the blocks, window": {"chunk": 29, "window": 17},
    "sinks": {"sinks": True},
    "sinks in a window": {"sinks": True, "window": 20, "heads": 4},
    "gate": {"gated": True},
    "gate of a value a head": {"gated": True, "head_gate": True},
    "narrow values": {"value_dim": 48, "gated": True},
    "odd values": {"value_dim": 24, "dim": 40, "rotary": 40, "hidden": 50},
    "wide values": {"value_dim": 80, "heads": 4},
    "norm and factor of values": {"value_norm": True, "value_scale": 0.7, "extras": True},
    "temperature without rotary": {"rotary": 0, "temperature": (0.3, 16.0, 1.0)},
    "temperature from position 0": {"temperature": (0.3, 16.0, 0.0)},
    "norms of whole rows": {"extras": True, "norm_whole": True, "rotary": 32},
    "norm after rotary": {"extras": True, "norm_last": True, "pairing": "interleaved"},
    "wide heads": {"dim": 128, "rotary": 128, "heads": 4, "kv_heads": 4},
    "odd heads": {"dim": 24, "rotary": 16, "hidden": 50, "heads": 5, "kv_heads": 1},
    "tiny heads": {"dim": 8, "rotary": 8, "hidden": 20, "heads": 2, "kv_heads": 2, "page": 48},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_dtype", ["f32", "i16", "f16", "bf16", "q8"])
def test_prefill_then_decode_equals_plain_attention(pool: _native.Pool, case: str, kv_dtype: str) -> None:
    layer = Layer(kv_dtype=kv_dtype, **CASES[case]).build(pool)  # type: ignore[arg-type]
    total = 150 if layer.dim < 128 else 70
    x = hidden_rows(total, layer.hidden)
    table = ints(np.random.default_rng(5).permutation(40)[:8])
    cuts = [0, 40, 41, 44, 100, 101, total] if total == 150 else [0, 40, 41, total]
    got = np.concatenate([layer.run(x[a:b], one(a, b - a, table)) for a, b in pairwise(cuts)])
    tolerance = {"f32": 2e-5, "i16": 5e-3, "f16": 5e-3, "bf16": 4e-2, "q8": 4e-2}[kv_dtype]
    np.testing.assert_allclose(got, layer.expected(x), atol=tolerance, rtol=0)


def test_long_contexts_are_cut_into_parts_without_a_trace(pool: _native.Pool) -> None:
    layer = Layer(heads=3, kv_heads=1, dim=16, rotary=16, hidden=32, page=64).build(pool)
    x = hidden_rows(700, 32)
    table = ints(np.random.default_rng(6).permutation(40)[:11])
    whole = layer.run(x, one(0, 700, table))
    np.testing.assert_allclose(whole, layer.expected(x), atol=2e-5, rtol=0)
    for at in (0, 63, 255, 256, 257, 300, 511, 512, 699):
        np.testing.assert_array_equal(layer.run(x[at : at + 1], one(at, 1, table)), whole[at : at + 1])
    for a, b in ((500, 503), (500, 520), (489, 521), (240, 272), (0, 32), (600, 633)):
        np.testing.assert_array_equal(layer.run(x[a:b], one(a, b - a, table)), whole[a:b])


@pytest.mark.parametrize("kv_dtype", ["i16", "f16", "bf16", "q8"])
@pytest.mark.parametrize("mask", [{}, {"chunk": 300}, {"window": 130, "sinks": True}, {"sinks": True}])
def test_decode_is_prefill_to_the_last_bit(pool: _native.Pool, kv_dtype: str, mask: dict[str, Any]) -> None:
    layer = Layer(heads=4, kv_heads=1, dim=32, rotary=32, hidden=32, page=64, kv_dtype=kv_dtype, **mask).build(pool)
    x = hidden_rows(650, 32)
    table = ints(np.random.default_rng(6).permutation(40)[:11])
    whole = layer.run(x, one(0, 650, table))
    np.testing.assert_allclose(whole, layer.expected(x), atol=4e-2, rtol=0)
    for at in (0, 15, 299, 300, 301, 649):
        np.testing.assert_array_equal(layer.run(x[at : at + 1], one(at, 1, table)), whole[at : at + 1])
    np.testing.assert_array_equal(layer.run(x[598:602], one(598, 4, table)), whole[598:602])
    np.testing.assert_array_equal(layer.run(x[590:620], one(590, 30, table)), whole[590:620])


def test_many_heads_of_a_group_are_cut_by_tokens_and_by_context(pool: _native.Pool) -> None:
    layer = Layer(heads=16, kv_heads=1, dim=16, rotary=16, hidden=32, page=64).build(pool)
    x = hidden_rows(650, 32)
    table = ints(range(20, 31))
    whole = layer.run(x, one(0, 650, table))
    np.testing.assert_allclose(whole, layer.expected(x), atol=2e-5, rtol=0)
    for a, b in ((600, 632), (250, 270), (511, 536)):
        np.testing.assert_array_equal(layer.run(x[a:b], one(a, b - a, table)), whole[a:b])


def identity_block(pool: _native.Pool, dim: int) -> _native.AttentionBlock:
    """One head whose cached values are its input."""
    eye = _native.PackedMatrix.pack(pool, "F32", dim, dim, np.eye(dim, dtype=np.float32).view(np.uint8))
    return _native.AttentionBlock(
        pool, eye, eye, eye, eye, heads=1, kv_heads=1, head_dim=dim, rope_pairing="half",
        inv_freq=np.empty(0, np.float32), softmax_scale=1.0, exact=True,
    )  # fmt: skip


@pytest.mark.parametrize("dim", [128, 64, 24])
def test_eight_bit_rows_are_what_gguf_makes_of_them(pool: _native.Pool, dim: int) -> None:
    """v has no norm and no rotation: with identity weights its cached rows are x itself, as Q8_0."""
    block = identity_block(pool, dim)
    x = hidden_rows(32, dim) * np.float32(7)
    x[3, 5] = 600  # an outlier costs its own 32 values only
    codes = -(-dim // 32) * 32
    k = np.zeros((1, 1, 32, codes + codes // 16), np.uint8)
    v, out = k.copy(), np.empty_like(x)
    block.forward(x.ctypes.data, out.ctypes.data, one(0, 32, ints([0])), k.ctypes.data, v.ctypes.data, 1, 32, "q8")
    rows = v[0, 0]
    scale = np.ascontiguousarray(rows[:, codes:]).view(np.float16).astype(np.float32).repeat(32, 1)
    ours = (np.ascontiguousarray(rows[:, :codes]).view(np.int8).astype(np.float32) * scale)[:, :dim]
    padded = np.pad(x, ((0, 0), (0, codes - dim)))
    theirs = dequantize(quantize(padded, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)[:, :dim]
    ties = ours != theirs  # a product that rounds to a half exactly, and which way it goes
    assert ties.mean() < 0.002
    np.testing.assert_allclose(ours, theirs, atol=np.abs(x).max() / 127 * 1.01, rtol=0)
    np.testing.assert_array_equal(k, v)


@pytest.mark.parametrize("heads", [1, 4, 8, 12, 16, 20])
@pytest.mark.parametrize("page", [32, 24])
def test_integer_rows_do_not_see_the_rows_beside_them(pool: _native.Pool, heads: int, page: int) -> None:
    """Tiles differ by how many rows there are, and by whether a page holds 16 keys in a piece; results do not."""
    layer = Layer(heads=heads, kv_heads=1, dim=40, rotary=32, hidden=32, page=page, kv_dtype="i16").build(pool)
    x = hidden_rows(300, 32)
    table = ints(np.random.default_rng(6).permutation(40)[:13])
    whole = layer.run(x, one(0, 300, table))
    np.testing.assert_allclose(whole, layer.expected(x), atol=5e-3, rtol=0)
    for a, b in ((0, 1), (63, 65), (255, 256), (270, 300), (299, 300)):
        np.testing.assert_array_equal(layer.run(x[a:b], one(a, b - a, table)), whole[a:b])


def test_sequences_whose_contexts_are_cut_are_what_each_is_alone(pool: _native.Pool) -> None:
    """Six pieces of queries, each shared by two parts of a context."""
    layer = Layer(heads=16, kv_heads=2, dim=40, rotary=32, hidden=32, page=32, kv_dtype="i16").build(pool)
    tables = np.random.default_rng(6).permutation(40)[:30].reshape(3, 10)
    contexts = (300, 290, 310)
    xs = [hidden_rows(310, 32)[:n] * np.float32(1 + i) for i, n in enumerate(contexts)]
    alone = [layer.run(x, one(0, len(x), ints(table))) for x, table in zip(xs, tables, strict=True)]
    last = ints([n - 1 for n in contexts])
    step = _native.Step(last, ints([0, 1, 2, 3]), ints(contexts), ints(tables))
    got = layer.run(np.concatenate([x[-1:] for x in xs]), step)
    np.testing.assert_array_equal(got, np.concatenate([whole[-1:] for whole in alone]))


@pytest.mark.parametrize("dim", [256, 128, 24])
def test_integer_rows_are_closer_than_half_precision(pool: _native.Pool, dim: int) -> None:
    """v has no norm and no rotation: with identity weights its cached rows are x itself."""
    block = identity_block(pool, dim)
    x = hidden_rows(32, dim) * np.float32(7)
    x[3, 5] = 600  # an outlier
    x[4] = 0
    x[4, 7] = -3  # the whole norm in one value
    x[5] = 0
    k = np.zeros((1, 1, 32, 2 * dim + 8), np.uint8)
    v, out = k.copy(), np.empty_like(x)
    block.forward(x.ctypes.data, out.ctypes.data, one(0, 32, ints([0])), k.ctypes.data, v.ctypes.data, 1, 32, "i16")
    codes = np.ascontiguousarray(v[0, 0, :, : 2 * dim]).view(np.int16).astype(np.float64)
    scale = np.ascontiguousarray(v[0, 0, :, 2 * dim : 2 * dim + 4]).view(np.float32).astype(np.float64)
    most = np.ascontiguousarray(v[0, 0, :, 2 * dim + 6 :]).view(np.uint16)[:, 0]
    assert (np.abs(codes * scale - x) <= scale * 0.501).all()
    np.testing.assert_array_equal(most, np.abs(codes).max(1))
    # products with a query whose groups have a norm of 65000 stay below 2^31
    groups = np.pad(codes, ((0, 0), (0, -dim % 128))).reshape(32, -1, 128)
    assert np.linalg.norm(groups, axis=2).max() < 2**31 / 65100
    half = x.astype(np.float16).astype(np.float64)
    typical = np.arange(32) > 5
    assert np.linalg.norm((codes * scale - x)[typical]) < np.linalg.norm((half - x)[typical])


def test_eight_bit_cache_is_close_at_long_context(pool_of: Callable[..., _native.Pool]) -> None:
    """2000 tokens with outlier channels, as keys of real models have: against fp64 attention."""
    errors = {}
    for kv_dtype in ("i16", "f16", "bf16", "q8"):
        layer = Layer(heads=4, kv_heads=2, dim=128, rotary=128, hidden=64, page=64, kv_dtype=kv_dtype)
        layer.build(pool_of(_native.isa_selected()), pages=32)
        x = hidden_rows(2000, 64)
        x[:, 5] *= 8
        got, want = layer.run(x, one(0, 2000, ints(range(32)))), layer.expected(x)
        errors[kv_dtype] = float(np.sqrt(((got - want) ** 2).mean() / ((want - x) ** 2).mean()))
    assert errors["i16"] < 5e-4
    assert errors["f16"] < 5e-4
    assert errors["bf16"] < 5e-3
    assert errors["q8"] < 6e-3, errors


def test_windows_are_cut_alike_in_prefill_and_decode(pool: _native.Pool) -> None:
    layer = Layer(heads=2, kv_heads=2, dim=16, rotary=16, hidden=32, page=64, window=300).build(pool)
    x = hidden_rows(650, 32)
    table = ints(range(20, 31))
    whole = layer.run(x, one(0, 650, table))
    np.testing.assert_allclose(whole, layer.expected(x), atol=2e-5, rtol=0)
    for at in (0, 299, 300, 301, 556, 649):
        np.testing.assert_array_equal(layer.run(x[at : at + 1], one(at, 1, table)), whole[at : at + 1])


def test_a_ragged_batch_equals_its_sequences_alone(pool: _native.Pool) -> None:
    layer = Layer().build(pool, pages=30)
    tables = ints(np.random.default_rng(7).permutation(30)[:12].reshape(3, 4))
    lengths, news = [50, 90, 33], [1, 40, 33]
    rows = [hidden_rows(n, layer.hidden, seed) for seed, n in enumerate(lengths)]
    alone = []
    for x, n, table in zip(rows, news, tables, strict=True):
        if len(x) > n:
            layer.run(x[:-n], one(0, len(x) - n, table))
        alone.append(layer.expected(x)[-n:])
    positions = np.concatenate([np.arange(length - n, length) for length, n in zip(lengths, news, strict=True)])
    step = _native.Step(ints(positions), ints([0, 1, 41, 74]), ints(lengths), tables)
    got = layer.run(np.concatenate([x[-n:] for x, n in zip(rows, news, strict=True)]), step)
    np.testing.assert_allclose(got, np.concatenate(alone), atol=2e-5, rtol=0)


def test_in_place_and_int8_mode(pool: _native.Pool) -> None:
    layer = Layer(format="Q8_0", hidden=96).build(pool, exact=False)
    for name in "qkvo":
        assert layer.w[name].abs().max() > 0
    x = hidden_rows(40, 96)
    want, table = layer.expected(x), ints(range(2))
    out = layer.run(x, one(0, 40, table))
    error = np.sqrt(((out - want) ** 2).mean()) / np.sqrt(((want - x) ** 2).mean())
    assert error < 0.06  # scores of these random weights are steep
    layer.block.forward(
        x.ctypes.data, x.ctypes.data, one(0, 40, table), layer.k.ctypes.data, layer.v.ctypes.data, 40, 32, "f32"
    )
    np.testing.assert_array_equal(x, out)


@pytest.mark.parametrize("kv_dtype", ["i16", "f16"])
def test_threads_change_nothing(pool_of: Callable[..., _native.Pool], isa: str, kv_dtype: str) -> None:
    outs = []
    for threads in (1, 2, 3, 7):
        layer = Layer(format="Q8_0", kv_dtype=kv_dtype).build(pool_of(isa, threads), exact=False)
        x = hidden_rows(130, 96)
        first = layer.run(x, one(0, 130, ints(range(6))))
        outs.append(np.concatenate([first, layer.run(x[:1], one(130, 1, ints(range(6))))]))
    for other in outs[1:]:
        np.testing.assert_array_equal(outs[0], other)


def test_instruction_sets_agree(pool_of: Callable[[str], _native.Pool]) -> None:
    outs = []
    for isa in _native.isa_supported():
        layer = Layer(extras=True).build(pool_of(isa))
        outs.append(layer.run(hidden_rows(70, 96), one(0, 70, ints(range(3)))))
    for other in outs[1:]:
        np.testing.assert_allclose(other, outs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("positions", "q_start", "context", "table", "message"),
    [
        ([0], [0, 1], [1], [[40]], "page 40"),
        ([0], [0, 1], [1], [[-1]], "page -1"),
        ([0], [0, 1], [33], [[0]], "does not fit"),
        ([0], [0, 1], [0], [[0]], "context length"),
        ([0], [0, 2], [1], [[0]], "q_start"),
        ([0], [1, 1], [1], [[0]], "q_start"),
        ([0, 1], [0, 3, 2], [5, 1], [[0], [1]], "q_start"),
        ([0], [0], [1], [[0]], "q_start"),
        ([-1], [0, 1], [1], [[0]], "positions"),
        ([0], [0, 1], [1], [[0], [0]], "block_table"),
    ],
)
def test_steps_that_point_outside_are_refused(
    positions: Any, q_start: Any, context: Any, table: Any, message: str
) -> None:
    layer = Layer().build(_native.Pool(1))
    with pytest.raises(ValueError, match=message):
        layer.run(hidden_rows(1, 96), _native.Step(ints(positions), ints(q_start), ints(context), ints(table)))


def test_weights_that_do_not_fit_are_refused() -> None:
    pool = _native.Pool(1)
    w = _native.PackedMatrix.pack(pool, "F32", 64, 64, np.zeros((64, 256), np.uint8))
    ok: dict[str, Any] = {"heads": 2, "kv_heads": 2, "head_dim": 32, "rope_pairing": "half", "softmax_scale": 1.0}
    ok["inv_freq"] = np.ones(16, np.float32)
    _native.AttentionBlock(pool, w, w, w, w, **ok)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"heads": 3}, "heads"), ({"heads": 0}, "heads"), ({"kv_heads": 1}, "kv_heads"), ({"head_dim": 31}, "head_dim"),
        ({"rope_pairing": "full"}, "rope_pairing"), ({"inv_freq": np.ones(17, np.float32)}, "inv_freq"),
        ({"norm": np.ones(63, np.float32)}, "norm"), ({"q_bias": np.ones(1, np.float32)}, "q bias"),
        ({"window": -1}, "window"),
    ]  # fmt: skip
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            _native.AttentionBlock(pool, w, w, w, w, **(ok | change))
    for change, message in [
        ({"sink": np.ones(2, np.float32)}, "AttentionBlock has no argument 'sink'"),
        ({"heads": "2"}, "heads has the wrong type"),
        ({"exact": None}, "exact has the wrong type"),
    ]:
        with pytest.raises(TypeError, match=message):
            _native.AttentionBlock(pool, w, w, w, w, **(ok | change))
    with pytest.raises(TypeError, match="softmax_scale is missing"):
        _native.AttentionBlock(pool, w, w, w, w, **{k: v for k, v in ok.items() if k != "softmax_scale"})
