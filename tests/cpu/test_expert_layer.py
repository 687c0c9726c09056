"""The expert layer that other engines use, against fp64 math on the weights as the gguf package or torch sees them."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from ktcore_cpu import ExpertLayer, ExpertPool, ExpertRun

DOC = Path(__file__).resolve().parents[2] / "docs" / "expert-layer.md"
EXPERTS, HIDDEN, WIDTH = 6, 96, 64
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def floats(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    gate, up = (rng.standard_normal((2, EXPERTS, WIDTH, HIDDEN)) * 0.1).astype(np.float32)
    return gate, up, (rng.standard_normal((EXPERTS, HIDDEN, WIDTH)) * 0.1).astype(np.float32)


def batch(tokens: int = 7, top_k: int = 3) -> Arrays:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
    return x, rng.integers(0, EXPERTS, (tokens, top_k)), rng.random((tokens, top_k)).astype(np.float32)


def truth(
    weights: Arrays, x: np.ndarray, ids: np.ndarray, scales: np.ndarray, act: str = "silu", on_input: bool = False
) -> np.ndarray:
    """The sum over a token's experts, in float64, written out."""
    functions = {
        "silu": lambda v: v / (1 + np.exp(-v)),
        "relu": lambda v: np.maximum(v, 0),
        "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
    }
    gate, up, down = (w.astype(np.float64) for w in weights)
    out = np.zeros(x.shape)
    for t, row in enumerate(x.astype(np.float64)):
        for e, scale in zip(ids[t], scales[t].astype(np.float64), strict=True):
            if e >= 0:
                r = row * scale if on_input else row
                y = down[e] @ (functions[act](gate[e] @ r) * (up[e] @ r))
                out[t] += y if on_input else scale * y
    return out


def error(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def pool() -> ExpertPool:
    return ExpertPool(2)


@pytest.mark.parametrize("act", ["silu", "relu", "gelu_tanh"])
@pytest.mark.parametrize("on_input", [False, True])
def test_float_weights(pool: ExpertPool, act: str, on_input: bool) -> None:
    weights, (x, ids, scales) = floats(), batch()
    ids[2] = -1
    layer = ExpertLayer(*weights, activation=act, weight_on_input=on_input, pool=pool)
    got = layer(x, ids, scales)
    assert error(got, truth(weights, x, ids, scales, act, on_input)) < 3e-6
    assert not got[2].any()
    assert layer.formats == ("F32", "F32", "F32")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_torch_in_and_out(pool: ExpertPool, name: str) -> None:
    dtype = getattr(torch, name)
    tensors = [torch.from_numpy(w).to(dtype) for w in floats()]
    x, ids, scales = (torch.from_numpy(a) for a in batch())
    layer = ExpertLayer(*tensors, pool=pool, exact=True)
    want = truth(tuple(t.double().numpy() for t in tensors), x.numpy(), ids.numpy(), scales.numpy())  # type: ignore[arg-type]
    got = layer(x, ids.to(torch.int32), scales.double())
    assert isinstance(got, torch.Tensor)
    assert error(got, want) < 3e-6
    rounded = layer(x.to(dtype).T.contiguous().T, ids, scales.to(dtype))
    assert rounded.dtype == dtype
    assert error(rounded.float(), want) < 0.02
    out = torch.zeros(len(x), HIDDEN, dtype=dtype)
    assert layer(x, ids, scales, out) is out
    assert error(out.float(), want) < 0.01


@pytest.mark.parametrize("formats", ["Q8_0", ("Q4_1", "Q5_0", "BF16")])
def test_blocks_of_a_gguf_file(pool: ExpertPool, formats: Any) -> None:
    names = (formats,) * 3 if isinstance(formats, str) else formats
    types = [GGMLQuantizationType[n] for n in names]
    raw = [quantize(w, t) for w, t in zip(floats(), types, strict=True)]
    weights = tuple(dequantize(r, t) for r, t in zip(raw, types, strict=True))
    x, ids, scales = batch()
    held = [raw[0].tobytes(), torch.from_numpy(raw[1].view(np.uint8)), raw[2].view(np.uint8)]
    shape = {"experts": EXPERTS, "hidden": HIDDEN, "intermediate": WIDTH}
    layer = ExpertLayer.from_blocks(*held, formats, pool=pool, exact=True, **shape)
    assert error(layer(x, ids, scales), truth(weights, x, ids, scales)) < 3e-6
    assert (
        error(
            ExpertLayer.from_blocks(*held, formats, pool=pool, **shape)(x, ids, scales), truth(weights, x, ids, scales)
        )
        < 0.02
    )


@pytest.mark.parametrize(("name", "limit"), [("int4_g32", 0.2), ("int8_g32", 0.012)])
def test_quantised_while_packing(pool: ExpertPool, name: str, limit: float) -> None:
    weights, (x, ids, scales) = floats(), batch()
    layer = ExpertLayer(*weights, quantize=name, pool=pool, exact=True)
    assert error(layer(x, ids, scales), truth(weights, x, ids, scales)) < limit
    assert 0 < layer.quantization_error < limit
    assert layer.nbytes < 4 * EXPERTS * HIDDEN * WIDTH * 3
    mixed = ExpertLayer(*weights, quantize=(None, name, None), pool=pool)
    assert mixed.formats == ("F32", name.upper(), "F32")


def test_one_expert_is_held_at_a_time(pool: ExpertPool) -> None:
    class Watched(np.ndarray):
        """An array that can be referred to weakly."""

    weights, (x, ids, scales) = floats(), batch()
    alive: list[weakref.ref[Watched]] = []
    reported: list[tuple[int, int]] = []

    def source() -> Iterator[tuple[np.ndarray, ...]]:
        for e in range(EXPERTS):
            assert not [r for r in alive if r() is not None]
            made = tuple(w[e].copy().view(Watched) for w in weights)
            alive.extend(weakref.ref(m) for m in made)
            yield made
            del made

    layer = ExpertLayer.from_experts(
        source(),
        experts=EXPERTS,
        hidden=HIDDEN,
        intermediate=WIDTH,
        stored="F32",
        pool=pool,
        progress=lambda done, total: reported.append((done, total)),
    )
    assert error(layer(x, ids, scales), truth(weights, x, ids, scales)) < 3e-6
    assert reported == [(e + 1, EXPERTS) for e in range(EXPERTS)]


def test_experts_elsewhere_add_nothing_and_take_no_memory(pool: ExpertPool) -> None:
    weights, (x, ids, scales) = floats(), batch(40)
    mask = np.isin(np.arange(EXPERTS), (0, 4))
    want = truth(weights, x, np.where(mask[ids], -1, ids), scales)
    whole = ExpertLayer(*weights, pool=pool)
    part = ExpertLayer(*weights, pool=pool, elsewhere=mask)
    assert part.nbytes * EXPERTS == whole.nbytes * 4
    np.testing.assert_array_equal(part(x, ids, scales), whole(x, ids, scales, elsewhere=torch.from_numpy(mask)))
    assert error(part(x, ids, scales), want) < 3e-6
    more = np.arange(EXPERTS) == 5
    np.testing.assert_array_equal(part(x, ids, scales, elsewhere=more), whole(x, ids, scales, elsewhere=mask | more))
    with pytest.raises(ValueError, match=f"expert {EXPERTS} is not one of {EXPERTS}"):
        part(x, np.full_like(ids, EXPERTS), scales)


def test_submitted_calls_give_the_same_and_can_run_again(pool: ExpertPool) -> None:
    x, ids, scales = batch(20)
    layers = [ExpertLayer(*floats(seed), pool=pool) for seed in range(3)]
    want = [layer(x, ids, scales) for layer in layers]
    runs = [layer.submit(x, ids, scales) for layer in layers for _ in range(4)]
    for i, run in enumerate(runs):
        np.testing.assert_array_equal(run.wait(), want[i // 4])
    layers[0].submit(x, ids, scales)  # dropped while it may still run
    out = np.empty_like(x)
    again = layers[1].prepare(x, ids, scales, out)
    assert again.done
    x *= 2
    assert again.start().wait() is out
    np.testing.assert_array_equal(out, layers[1](x, ids, scales))
    assert error(out, truth(floats(1), x, ids, scales)) < 3e-6


def test_a_stream_can_start_and_await_a_call(pool: ExpertPool) -> None:
    x, ids, scales = batch()
    layer = ExpertLayer(*floats(), pool=pool)
    out = np.zeros_like(x)
    run = layer.prepare(x, ids, scales, out)
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    callback(ExpertRun.start_address)(run.address)
    callback(ExpertRun.wait_address)(run.address)
    np.testing.assert_array_equal(out, layer(x, ids, scales))


def test_out_may_be_x(pool: ExpertPool) -> None:
    x, ids, scales = batch()
    layer = ExpertLayer(*floats(), pool=pool)
    want = layer(x, ids, scales)
    assert layer(x, ids, scales, x) is x
    np.testing.assert_array_equal(x, want)


def test_no_tokens_and_odd_strides(pool: ExpertPool) -> None:
    layer = ExpertLayer(*floats(), pool=pool)
    x, ids, scales = batch(10)
    assert layer(x[:0], ids[:0], scales[:0]).shape == (0, HIDDEN)
    want = layer(x, ids, scales)
    np.testing.assert_array_equal(layer(np.asfortranarray(x), ids[:, ::1].astype(np.uint8), scales), want)
    wide = np.zeros((10, 2 * HIDDEN), np.float32)
    layer(x, ids, scales, wide[:, ::2])
    np.testing.assert_array_equal(wide[:, ::2], want)
    assert not wide[:, 1::2].any()


def misuse() -> dict[str, tuple[Any, type[Exception], str]]:
    gate, up, down = floats()
    x, ids, scales = batch()
    shape = {"experts": EXPERTS, "hidden": HIDDEN, "intermediate": WIDTH}
    layer = ExpertLayer(gate, up, down, threads=1)
    raw = np.zeros(100, np.uint8)
    return {
        "down turned": (lambda: ExpertLayer(gate, up, up), ValueError, r"down \[experts, hidden, intermediate\]"),
        "integer weights": (lambda: ExpertLayer(gate.astype(int), up, down), TypeError, "gate is int64"),
        "unknown scheme": (lambda: ExpertLayer(gate, up, down, quantize="int3"), ValueError, "int4_g128"),
        "group too wide": (
            lambda: ExpertLayer(gate, up, down, quantize="int4_g128"),
            ValueError,
            "gate has rows of 96",
        ),
        "activation": (lambda: ExpertLayer(gate, up, down, activation="swish"), ValueError, "silu, relu, gelu_tanh"),
        "nan": (lambda: ExpertLayer(gate * np.nan, up, down, quantize="int8_g32"), ValueError, "gate of expert 0"),
        "threads": (lambda: ExpertLayer(gate, up, down, threads=-1), ValueError, "threads"),
        "mask": (lambda: ExpertLayer(gate, up, down, elsewhere=[True]), ValueError, rf"bool \[{EXPERTS}\]"),
        "nothing held": (lambda: ExpertLayer(gate, up, down, elsewhere=[True] * EXPERTS), ValueError, "all experts"),
        "format": (lambda: ExpertLayer.from_blocks(raw, raw, raw, "Q9_Z", **shape), ValueError, "Q9_Z.*known: Q4_0"),
        "bytes": (
            lambda: ExpertLayer.from_blocks(raw, raw, raw, "Q8_0", **shape),
            ValueError,
            "gate has 100 bytes.* take",
        ),
        "too few": (
            lambda: ExpertLayer.from_experts(iter([(gate[0], up[0], down[0])]), stored="F32", **shape),
            ValueError,
            f"ended after 1 of {EXPERTS}",
        ),
        "other type": (
            lambda: ExpertLayer.from_experts(zip(gate, up, down, strict=True), **shape),
            TypeError,
            "gate of expert 0 is F32, but the layer holds BF16",
        ),
        "x": (lambda: layer(x[:, 1:], ids, scales), ValueError, rf"x must be \[tokens, {HIDDEN}\]"),
        "x of integers": (lambda: layer(x.astype(int), ids, scales), TypeError, "x must hold floating"),
        "ids": (lambda: layer(x, ids[1:], scales[1:]), ValueError, r"must both be \[7, k\]"),
        "float ids": (lambda: layer(x, ids.astype(float), scales), TypeError, "ids must hold integers"),
        "no such expert": (lambda: layer(x, ids + EXPERTS, scales), ValueError, "is not one of 6"),
        "submitted": (lambda: layer.submit(x, ids + EXPERTS, scales).wait(), ValueError, "is not one of 6"),
        "out": (lambda: layer(x, ids, scales, x[:2]), ValueError, r"out must be \[7, 96\]"),
    }


@pytest.mark.parametrize("case", list(misuse()))
def test_misuse_is_told(case: str) -> None:
    call, kind, text = misuse()[case]
    with pytest.raises(kind, match=text):
        call()


def test_other_threads_run_during_a_call() -> None:
    """Two Python threads on one layer: calls take turns, and each gives its own result."""
    from concurrent.futures import ThreadPoolExecutor

    layer = ExpertLayer(*floats(), threads=2)
    batches = [batch(tokens) for tokens in range(1, 30)]
    want = [layer(*b) for b in batches]
    with ThreadPoolExecutor(4) as threads:
        for got, expected in zip(threads.map(lambda b: layer(*b), batches * 3), want * 3, strict=True):
            np.testing.assert_array_equal(got, expected)


ALONE = """
import sys
import ktcore_cpu
assert "numpy" not in sys.modules and "ktcore_cpu._native" not in sys.modules
import numpy as np
from ktcore_cpu import ExpertLayer
raw = np.zeros((2, 32 * 34), np.uint8)
layer = ExpertLayer.from_blocks(raw, raw, raw, "Q8_0", experts=2, hidden=32, intermediate=32, threads=1)
layer(np.ones((1, 32), np.float32), np.zeros((1, 1), int), np.ones((1, 1)))
loaded = {name for name in sys.modules if name.split(".")[0] in ("torch", "ktcore", "pluggy", "transformers")}
assert not loaded, loaded
"""


def test_it_needs_nothing_of_the_engine() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_guides_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, DOC.name, "exec"), {})
