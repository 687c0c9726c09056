"""Latent attention against the plain (unabsorbed) formula in fp64 over what the gguf package says the weights are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ktcore_cpu import _native

from ktcore.ops.rope import rope

from .blocks import random_blocks, reference

HIDDEN, HEADS, ROPE, RANK, EPS, PAGE = 64, 3, 16, 96, 1e-5, 16
SIZES = {"aligned": (32, 32, 64), "odd": (24, 40, 96)}  # nope, value, latent
FREQ = (1e4 ** (-np.arange(ROPE // 2) / (ROPE // 2))).astype(np.float32)


class Reference:
    """One layer with random weights, native and fp64 side by side; sequences are kept apart in the fp64 cache."""

    def __init__(
        self,
        pool: _native.Pool,
        size: str,
        low_rank: bool,
        pairing: str,
        exact: bool,
        format: str,
        temperature: tuple[float, float, float] = (0.0, 0.0, 1.0),
    ) -> None:
        self.temperature = temperature
        self.nope, self.value, self.latent = SIZES[size]
        self.pool, self.pairing = pool, pairing
        q_in = RANK if low_rank else HIDDEN
        # random quantised weights are large: a small scale keeps the softmax from turning rounding into other winners
        self.scale = 0.2 if format == "F32" else 0.02
        self.seed = 0
        q_a = self.matrix(format, RANK, HIDDEN) if low_rank else (None, None)
        q = self.matrix(format, HEADS * (self.nope + ROPE), q_in)
        kv_a = self.matrix(format, self.latent + ROPE, HIDDEN)
        k = self.heads("F32", self.nope, self.latent)
        absorb = self.pack_heads("F32", k[1].transpose(1, 2).float().contiguous().numpy().view(np.uint8), self.nope)
        v = self.heads(format, self.value, self.latent)
        o = self.matrix(format, HIDDEN, HEADS * self.value)
        self.dense = [w[1] for w in (q_a, q, kv_a, k, v, o)]
        rng = np.random.default_rng(5)
        self.norms = [(1 + 0.3 * rng.standard_normal(n)).astype(np.float32) for n in (HIDDEN, q_in, self.latent)]
        self.block = _native.MLABlock(
            pool,
            q_a[0],
            q[0],
            kv_a[0],
            absorb,
            k[0],
            v[0],
            o[0],
            heads=HEADS,
            nope=self.nope,
            rope=ROPE,
            value=self.value,
            latent=self.latent,
            softmax_scale=self.scale,
            rope_pairing=pairing,
            inv_freq=FREQ,
            norm=self.norms[0],
            norm_eps=EPS,
            q_norm=self.norms[1] if low_rank else None,
            q_eps=EPS,
            kv_norm=self.norms[2],
            kv_eps=EPS,
            exact=exact,
            temperature_scale=temperature[0],
            temperature_span=temperature[1],
            temperature_offset=temperature[2],
        )
        self.rows: dict[int, list[torch.Tensor]] = {}

    def matrix(self, format: str, rows: int, cols: int) -> tuple[Any, torch.Tensor]:
        self.seed += 1
        raw = random_blocks(format, rows, cols, self.seed)
        dense = torch.from_numpy(reference(format, raw, rows, cols)).double()
        if format == "F32":  # about 1 / sqrt(fan-in), as the scales of random blocks make the others
            dense = (dense * 0.1).float().double()
            raw = dense.float().numpy().view(np.uint8)
        return _native.PackedMatrix.pack(self.pool, format, rows, cols, raw), dense

    def heads(self, format: str, rows: int, cols: int) -> tuple[Any, torch.Tensor]:
        self.seed += 1
        raw = random_blocks(format, HEADS * rows, cols, self.seed)
        dense = torch.from_numpy(reference(format, raw, HEADS * rows, cols)).double()
        if format == "F32":
            dense = (dense * 0.1).float().double()
            raw = dense.float().numpy().view(np.uint8)
        return self.pack_heads(format, raw.reshape(HEADS, rows, -1), cols), dense.view(HEADS, rows, cols)

    def pack_heads(self, format: str, raw: np.ndarray, cols: int) -> _native.PackedMatrix:
        raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 32), (0, 0)))
        return _native.PackedMatrix.pack(
            self.pool, format, raw.shape[0] * raw.shape[1], cols, np.ascontiguousarray(raw).reshape(-1, raw.shape[2])
        )

    def rms(self, x: torch.Tensor, norm: np.ndarray) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * torch.from_numpy(norm).double()

    def expected(self, sequence: int, x: np.ndarray) -> np.ndarray:
        """The next len(x) tokens of a sequence."""
        q_a, q, kv_a, k_up, v_up, o = self.dense
        h = torch.from_numpy(x).double()
        n = self.rms(h, self.norms[0])
        low = n if q_a is None else self.rms(n @ q_a.T, self.norms[1])
        query = (low @ q.T).view(len(x), HEADS, -1)
        c, k_rope = (n @ kv_a.T).split((self.latent, ROPE), -1)
        past = self.rows.setdefault(sequence, [])
        positions = torch.arange(len(past), len(past) + len(x))
        freq = torch.from_numpy(FREQ)
        turned = rope(k_rope[:, None], positions, freq, 1.0, self.pairing)[:, 0]  # type: ignore[arg-type]
        q_rope = rope(query[..., self.nope :], positions, freq, 1.0, self.pairing)  # type: ignore[arg-type]
        past += list(torch.cat((self.rms(c, self.norms[2]), turned), -1))
        latent, keys_rope = torch.stack(past).split((self.latent, ROPE), -1)
        keys = torch.einsum("tl,hnl->thn", latent, k_up)
        values = torch.einsum("tl,hvl->thv", latent, v_up)
        scores = torch.einsum("qhn,khn->hqk", query[..., : self.nope], keys)
        scores = (scores + torch.einsum("qhr,kr->hqk", q_rope, keys_rope)) * self.scale
        scale, span, offset = self.temperature
        if span:
            scores = scores * (1 + scale * torch.log1p(((positions + offset) // span).double()))[None, :, None]
        hidden = torch.arange(len(past))[None] > positions[:, None]
        y = torch.einsum("hqk,khv->qhv", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
        return (h + y.reshape(len(x), -1) @ o.T).numpy()

    def cache(self, pages: int, kv_dtype: str) -> np.ndarray:
        width = self.latent + ROPE
        if kv_dtype == "i16":
            return np.zeros((pages, PAGE, _native.cache_row_bytes("i16", width)), np.uint8)
        return np.zeros((pages, PAGE, width), np.float16 if kv_dtype == "f16" else np.float32)

    def run(self, x: np.ndarray, counts: list[int], contexts: list[int], cache: np.ndarray) -> np.ndarray:
        """One step; sequence i owns pages i, n + i, 2 n + i …"""
        n, blocks = len(counts), len(cache) // len(counts)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        positions = np.concatenate([np.arange(c - q, c) for q, c in zip(counts, contexts, strict=True)])
        table = (np.arange(blocks)[None] * n + np.arange(n)[:, None]).astype(np.int32)
        step = _native.Step(positions.astype(np.int32), starts, np.array(contexts, np.int32), table)
        out = np.full_like(x, np.nan)
        kind = {"float16": "f16", "float32": "f32", "uint8": "i16"}[cache.dtype.name]
        self.block.forward(x.ctypes.data, out.ctypes.data, step, cache.ctypes.data, len(cache), PAGE, kind)
        return out


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


def tokens(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, HIDDEN)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_ragged_steps_equal_fp64(pool: _native.Pool, size: str, low_rank: bool, pairing: str) -> None:
    layer = Reference(pool, size, low_rank, pairing, exact=True, format="F32")
    cache = np.full((3 * 20, PAGE, layer.latent + ROPE), np.nan, np.float32)
    contexts = [0, 0, 0]
    # long and short prompts, decode beside a long chunk (expanded beside absorbed), and a sequence that rests
    for number, counts in enumerate(([150, 5, 1], [1, 130, 1], [1, 1, 0], [3, 1, 4])):
        contexts = [c + q for c, q in zip(contexts, counts, strict=True)]
        x = tokens(sum(counts), number)
        got = layer.run(x, counts, contexts, cache)
        parts = np.split(x, np.cumsum(counts)[:-1])
        want = np.concatenate([layer.expected(s, part) for s, part in enumerate(parts) if len(part)])
        assert error(got, want) < 5e-6


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_queries_grow_with_their_position_absorbed_and_expanded(pool: _native.Pool, offset: float) -> None:
    layer = Reference(pool, "odd", True, "interleaved", exact=True, format="F32", temperature=(0.3, 16.0, offset))
    cache, context = layer.cache(20, "f32"), 0
    for number, count in enumerate((150, 1, 3, 130)):
        context += count
        x = tokens(count, number)
        assert error(layer.run(x, [count], [context], cache), layer.expected(0, x)) < 5e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kv_dtype", ["i16", "f16"])
def test_a_cache_of_16_bits_stays_close_to_fp64(pool: _native.Pool, size: str, kv_dtype: str) -> None:
    """Absorbed, a few and many tokens, and expanded."""
    layer = Reference(pool, size, True, "half", exact=True, format="F32")
    cache, context = layer.cache(24, kv_dtype), 0
    if kv_dtype == "i16":
        cache[:] = 255  # not a number
    for number, count in enumerate((3, 150, 1, 40, 129, 1)):
        context += count
        x = tokens(count, number)
        want = layer.expected(0, x)
        assert error(layer.run(x, [count], [context], cache) - x, want - x) < 5e-4


@pytest.mark.parametrize("kv_dtype", ["i16", "f16"])
@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "F16"])
def test_quantised_weights_and_a_cache_of_16_bits_stay_close(pool: _native.Pool, format: str, kv_dtype: str) -> None:
    layer = Reference(pool, "aligned", True, "interleaved", exact=False, format=format)
    cache = layer.cache(20, kv_dtype)
    context = 0
    for number, count in enumerate((200, 1, 7)):
        context += count
        x = tokens(count, number)
        want = layer.expected(0, x)
        got = layer.run(x, [count], [context], cache)
        assert error(got - x, want - x) < 0.03


@pytest.mark.parametrize("kv_dtype", ["i16", "f16"])
def test_result_does_not_depend_on_its_neighbours_or_threads(pool_of: Any, isa: str, kv_dtype: str) -> None:
    results = []
    for threads in (1, 3):
        layer = Reference(pool_of(isa, threads), "aligned", False, "half", exact=False, format="Q8_0")
        cache = layer.cache(2 * 10, kv_dtype)
        x = tokens(40, 1)
        layer.run(x, [20, 20], [20, 20], cache)
        both = layer.run(x[:2].copy(), [1, 1], [21, 21], cache)
        alone = layer.run(x[:1].copy(), [1, 0], [21, 21], cache)
        np.testing.assert_array_equal(alone[0], both[0])
        results.append(both)
    np.testing.assert_array_equal(*results)


def test_shapes_that_do_not_fit_are_refused() -> None:
    pool = _native.Pool(1)
    layer = Reference(pool, "aligned", False, "half", True, "F32")
    with pytest.raises(ValueError, match="page"):
        layer.run(tokens(1, 0), [1], [40], np.zeros((1, PAGE, layer.latent + ROPE), np.float32))
    small = _native.PackedMatrix.pack(pool, "F32", 32, 64, np.zeros((32, 256), np.uint8))
    with pytest.raises(ValueError, match="nope"):
        _native.MLABlock(
            pool,
            None,
            small,
            small,
            small,
            small,
            small,
            small,
            heads=HEADS,
            nope=32,
            rope=ROPE,
            value=32,
            latent=64,
            softmax_scale=1.0,
            rope_pairing="half",
            inv_freq=FREQ,
            kv_norm=np.ones(64, np.float32),
            kv_eps=EPS,
        )
