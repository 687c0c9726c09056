"""The gated delta net against transformers' functions and against the fp64 recurrence, block and rule alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from ktcore_cpu import _native
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from .blocks import F32, random_blocks, reference


def l2(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def inputs(tokens: int, heads: int, key: int, value: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(tokens)
    # from almost no decay to a state that is gone after one token
    rates = torch.logspace(-3, 1.6, heads)
    return {
        "q": torch.randn(tokens, heads, key, generator=g),
        "k": torch.randn(tokens, heads, key, generator=g),
        "v": torch.randn(tokens, heads, value, generator=g),
        "g": -torch.rand(tokens, heads, generator=g) * rates,
        "beta": torch.rand(tokens, heads, generator=g),
        "state": torch.randn(heads, key, value, generator=g),
    }


def native(pool: _native.Pool, i: dict[str, torch.Tensor], state: F32, span: slice = slice(None)) -> F32:
    q, k = l2(i["q"][span]) * i["q"].shape[-1] ** -0.5, l2(i["k"][span])
    rest = (i[name][span].numpy() for name in ("v", "g", "beta"))
    return np.asarray(_native.delta_rule(pool, q.numpy(), k.numpy(), *rest, state))


@pytest.mark.parametrize(("key", "value"), [(16, 16), (32, 80), (128, 128)])
@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 17, 70])
def test_the_rule_matches_transformers(pool: _native.Pool, tokens: int, key: int, value: int) -> None:
    i = inputs(tokens, 3, key, value)
    state = i["state"].numpy().copy()
    got = native(pool, i, state)
    theirs = [i[n].double()[None] for n in ("q", "k", "v", "g", "beta")]
    for rule, within in ((torch_recurrent_gated_delta_rule, 1e-5), (torch_chunk_gated_delta_rule, 1e-4)):
        want, last = rule(
            *theirs, initial_state=i["state"].double()[None], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        np.testing.assert_allclose(got, want[0].float(), atol=within, rtol=1e-4)
        np.testing.assert_allclose(state, last[0].float(), atol=within, rtol=1e-4)


def test_pieces_equal_the_whole(pool: _native.Pool) -> None:
    i = inputs(60, 2, 32, 48)
    whole, pieces = i["state"].numpy().copy(), i["state"].numpy().copy()
    want = native(pool, i, whole)
    got = np.concatenate([native(pool, i, pieces, slice(a, b)) for a, b in pairwise((0, 20, 21, 25, 26, 60))])
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(pieces, whole, atol=1e-5, rtol=1e-5)


class Layer:
    """A block and the fp64 weights it was made from."""

    hidden, key_heads, value_heads, key, value, width = 64, 2, 4, 16, 32, 4

    def __init__(
        self,
        pool: _native.Pool,
        format: str = "F32",
        exact: bool = True,
        slots: int = 4,
        tiled: bool = False,
        sigmoid: bool = False,
    ) -> None:
        self.tiled, self.sigmoid = tiled, sigmoid
        self.channels = 2 * self.key_heads * self.key + self.value_heads * self.value
        inner = self.value_heads * self.value
        shapes = {
            "qkv": (self.channels, self.hidden),
            "z": (inner, self.hidden),
            "b": (self.value_heads, self.hidden),
            "a": (self.value_heads, self.hidden),
            "o": (self.hidden, inner),
        }
        self.w: dict[str, torch.Tensor] = {}
        packed = []
        for seed, (name, (rows, cols)) in enumerate(shapes.items()):
            raw = random_blocks(format, rows, cols, seed)
            dense = reference(format, raw, rows, cols)
            if format == "F32":
                dense = dense / np.float32(np.sqrt(cols))
                raw = np.ascontiguousarray(dense).view(np.uint8)
            self.w[name] = torch.from_numpy(dense).double()
            packed.append(_native.PackedMatrix.pack(pool, format, rows, cols, raw))
        rng = np.random.default_rng(1)
        vectors: dict[str, Any] = {
            "conv": rng.standard_normal((self.channels, self.width)),
            "decay": -np.exp(rng.standard_normal(self.value_heads)),
            "dt_bias": rng.standard_normal(self.value_heads),
            "out_norm": 1 + 0.3 * rng.standard_normal(self.value),
            "norm": 1 + 0.3 * rng.standard_normal(self.hidden),
        }
        vectors = {name: v.astype(np.float32) for name, v in vectors.items()}
        self.w |= {name: torch.from_numpy(v).double() for name, v in vectors.items()}
        self.block = _native.DeltaBlock(
            pool, *packed, key_heads=self.key_heads, value_heads=self.value_heads, key_dim=self.key,
            value_dim=self.value, width=self.width, out_eps=1e-6, norm_eps=1e-5, exact=exact, tiled=tiled,
            sigmoid_gate=sigmoid, **vectors,
        )  # fmt: skip
        self.slots = slots
        self.conv = np.full((slots, self.width - 1, self.channels), np.nan, np.float32)
        self.state = np.full((slots, self.value_heads, self.key, self.value), np.nan, np.float32)

    def run(
        self,
        x: F32,
        counts: list[int],
        contexts: list[int],
        slots: list[int],
        kept: list[tuple[int, int]] | None = None,
    ) -> F32:
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        zeros = np.zeros((len(counts), 1), np.int32)
        step = _native.Step(np.zeros(len(x), np.int32), starts, np.array(contexts, np.int32), zeros)
        out = np.full_like(x, np.nan)
        self.block.forward(
            x.ctypes.data, out.ctypes.data, step, slots, self.conv.ctypes.data, self.state.ctypes.data, self.slots,
            *([] if kept is None else [kept]),
        )  # fmt: skip
        return out

    def expected(self, x: F32) -> np.ndarray:
        """One whole sequence, token by token in fp64."""
        w, t = self.w, len(x)
        h = torch.from_numpy(x).double()
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * w["norm"]
        padded = torch.cat((torch.zeros(self.width - 1, self.channels).double(), n @ w["qkv"].T))
        mixed = torch.nn.functional.silu((padded.unfold(0, self.width, 1) * w["conv"]).sum(-1))
        keys = self.key_heads * self.key
        group = self.value_heads // self.key_heads
        order = torch.arange(self.value_heads)
        order = order % self.key_heads if self.tiled else order // group
        q, k = (y.view(t, self.key_heads, self.key)[:, order] for y in mixed[:, : 2 * keys].split(keys, 1))
        g = w["decay"] * torch.nn.functional.softplus(n @ w["a"].T + w["dt_bias"])
        out, _ = torch_recurrent_gated_delta_rule(
            q[None], k[None], mixed[:, 2 * keys :].view(1, t, self.value_heads, self.value), g[None],
            (n @ w["b"].T).sigmoid()[None], initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        y = out[0].double()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * w["out_norm"]
        z = n @ w["z"].T
        gate = z.sigmoid() if self.sigmoid else torch.nn.functional.silu(z)
        return (h + (y.reshape(t, -1) * gate) @ w["o"].T).numpy()


def rows(n: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((n, Layer.hidden)).astype(np.float32)


@pytest.mark.parametrize(("tiled", "sigmoid"), [(False, False), (True, False), (True, True)])
def test_ragged_steps_equal_fp64(pool: _native.Pool, tiled: bool, sigmoid: bool) -> None:
    layer = Layer(pool, tiled=tiled, sigmoid=sigmoid)
    texts = [rows(60, 1), rows(60, 2), rows(60, 3)]
    want = [layer.expected(x) for x in texts]
    at, slots = [0, 0, 0], [2, 0, 3]
    # prompts of all sizes, decode beside a prompt, a sequence that rests, fewer tokens than the convolution is wide
    for counts in ([40, 1, 2], [1, 37, 1], [1, 0, 2], [3, 5, 1], [2, 1, 18]):
        x = np.concatenate([t[a : a + c] for t, a, c in zip(texts, at, counts, strict=True)])
        goal = np.concatenate([t[a : a + c] for t, a, c in zip(want, at, counts, strict=True)])
        at = [a + c for a, c in zip(at, counts, strict=True)]
        np.testing.assert_allclose(layer.run(x, counts, at, slots), goal, atol=5e-5, rtol=0)


def test_a_new_sequence_forgets_what_its_slot_held(pool: _native.Pool) -> None:
    layer = Layer(pool)
    layer.run(rows(30), [30], [30], [1])
    x = rows(9, 5)
    np.testing.assert_allclose(layer.run(x, [9], [9], [1]), layer.expected(x), atol=5e-5, rtol=0)


def test_a_state_that_is_kept_is_that_of_the_tokens_before(pool: _native.Pool) -> None:
    texts = [rows(40, 1), rows(40, 2), rows(40, 3)]
    plain, keeping = Layer(pool, slots=6), Layer(pool, slots=6)
    for layer in (plain, keeping):
        layer.run(np.concatenate([t[:20] for t in texts]), [20] * 3, [20] * 3, [0, 1, 2])
    # a token before two guesses, fewer before than the convolution is wide, nothing kept; and a state after all tokens
    for counts, kept in (([3, 4, 2], [(4, 1), (5, 3), (-1, 0)]), ([1, 1, 4], [(-1, 0), (3, 1), (4, 2)])):
        x = np.concatenate([t[20 : 20 + c] for t, c in zip(texts, counts, strict=True)])
        contexts = [20 + c for c in counts]
        before = keeping.conv.copy(), keeping.state.copy()
        want = plain.run(x, counts, contexts, [0, 1, 2])
        assert np.array_equal(keeping.run(x, counts, contexts, [0, 1, 2], kept), want)
        np.testing.assert_array_equal(keeping.state[:3], plain.state[:3])
        after = keeping.conv.copy(), keeping.state.copy()
        keeping.conv, keeping.state = (b.copy() for b in before)
        for i, (slot, count) in enumerate(kept):
            if slot >= 0:
                keeping.run(texts[i][20 : 20 + count], [count], [20 + count], [i])
                assert np.array_equal(keeping.conv[i], after[0][slot])
                assert np.array_equal(keeping.state[i], after[1][slot])
        keeping.conv, keeping.state = after
        for layer in (plain, keeping):  # the next case begins where the first did
            layer.conv[:3], layer.state[:3] = (b[:3] for b in before)


@pytest.mark.parametrize("kept", [[(0, 1)], [(4, 1)], [(1, 0)], [(1, 3)], [(1, 1), (2, 1)], [(-2, 1)]])
def test_a_kept_state_needs_a_slot_of_its_own_and_tokens_of_the_step(
    pool: _native.Pool, kept: list[tuple[int, int]]
) -> None:
    layer = Layer(pool)
    with pytest.raises(ValueError, match="state"):
        layer.run(rows(2), [2], [2], [0], kept)


def test_quantised_weights_stay_close(pool: _native.Pool) -> None:
    layer = Layer(pool, "Q8_0", exact=False)
    x = rows(50)
    got, want = layer.run(x, [50], [50], [0]), layer.expected(x)
    error = np.sqrt(((got - want) ** 2).mean() / ((want - x) ** 2).mean())
    assert error < 0.05


def test_threads_and_neighbours_change_nothing(pool_of: Callable[..., _native.Pool], isa: str) -> None:
    outs = []
    for threads in (1, 3):
        layer = Layer(pool_of(isa, threads), "Q8_0", exact=False)
        x = rows(41)
        first = layer.run(x, [40, 1], [40, 1], [0, 1])
        alone = layer.run(x[:1], [1], [41], [0])
        layer.run(x[:40], [40], [40], [0])
        both = layer.run(x[:2], [1, 1], [41, 2], [0, 1])
        np.testing.assert_array_equal(both[:1], alone)
        outs.append(np.concatenate((first, both)))
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("slots", [[0, 0], [0, 4], [-1, 1], [0]])
def test_slots_that_do_not_fit_are_refused(slots: list[int]) -> None:
    with pytest.raises(ValueError, match="slot"):
        Layer(_native.Pool(1)).run(rows(2), [1, 1], [1, 1], slots)


def test_shapes_that_do_not_fit_are_refused() -> None:
    pool = _native.Pool(1)
    i = {name: t.numpy() for name, t in inputs(2, 2, 16, 16).items()}
    with pytest.raises(ValueError, match="fit together"):
        _native.delta_rule(pool, i["q"], i["k"][:1], i["v"], i["g"], i["beta"], i["state"])
    with pytest.raises(ValueError, match="multiples of 16"):
        _native.delta_rule(
            pool, *(np.ascontiguousarray(i[n][..., :8]) for n in "qk"), i["v"], i["g"], i["beta"],
            np.ascontiguousarray(i["state"][:, :8]),
        )  # fmt: skip
