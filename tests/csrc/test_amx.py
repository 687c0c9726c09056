"""The tile kernels over emulated tiles: integer products against AVX2 to the last bit, bfloat16 ones against fp64."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ktcore_cpu import _native

from .blocks import F32, random_blocks, reference, run_linear
from .test_integer_sums import FLOATS, INTEGER

pytestmark = pytest.mark.skipif(not _native.isa_emulated(), reason="the emulation needs AVX2")

PoolOf = Callable[..., _native.Pool]


def inputs(tokens: int, cols: int, seed: int = 3) -> F32:
    return np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)


def pack(pool: _native.Pool, format: str, rows: int, cols: int) -> tuple[_native.PackedMatrix, np.ndarray]:
    raw = random_blocks(format, rows, cols)
    return _native.PackedMatrix.pack(pool, format, rows, cols, raw), raw


def to_bf16(x: F32) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().double().numpy()


@pytest.mark.parametrize("format", INTEGER)
@pytest.mark.parametrize(("rows", "cols"), [(31, 256), (70, 1280)])
def test_integer_products_are_those_of_the_vector_kernels(pool_of: PoolOf, format: str, rows: int, cols: int) -> None:
    """4 tokens are the vector kernel's, 5 a short tile, 17 a tile that reaches back, 32 two whole ones."""
    plain, tiled = pool_of("avx2", 1), pool_of("amx_emulated", 1)
    w, _ = pack(plain, format, rows, cols)
    for tokens in (4, 5, 15, 16, 17, 31, 32, 35):
        x = inputs(tokens, cols)
        np.testing.assert_array_equal(run_linear(tiled, w, x), run_linear(plain, w, x), f"{tokens} tokens")


def test_tokens_of_several_items_agree(pool_of: PoolOf) -> None:
    plain, tiled = pool_of("avx2", 2), pool_of("amx_emulated", 2)
    w, _ = pack(plain, "Q4_K", 33, 512)
    x = inputs(131, 512)
    np.testing.assert_array_equal(run_linear(tiled, w, x), run_linear(plain, w, x))


@pytest.mark.parametrize("format", ["BF16", "F8_E4M3_G128", "F8_E4M3_G32"])
@pytest.mark.parametrize("cols", [128, 1152])
def test_bf16_products_are_fp64_math_on_rounded_inputs(pool_of: PoolOf, format: str, cols: int) -> None:
    pool = pool_of("amx_emulated", 2)
    w, raw = pack(pool, format, 70, cols)
    dense = reference(format, raw, 70, cols).astype(np.float64)
    for tokens in (1, 5, 16, 17, 31, 32, 33, 70):
        x = inputs(tokens, cols)
        error = np.abs(run_linear(pool, w, x) - to_bf16(x) @ dense.T)
        assert (error <= 2e-6 * (np.abs(x) @ np.abs(dense).T)).all()


@pytest.mark.parametrize("cols", [1, 2, 15, 17, 31, 33, 47, 100, 513, 545])
def test_bf16_rows_of_any_length(pool_of: PoolOf, cols: int) -> None:
    """What lies behind a row's end is never read as part of it: the next row here is not a number."""
    pool = pool_of("amx_emulated", 1)
    w, raw = pack(pool, "BF16", 33, cols)
    dense = reference("BF16", raw, 33, cols).astype(np.float64)
    x = inputs(3, cols)
    x[1] = np.nan
    got = run_linear(pool, w, x)
    want = to_bf16(x) @ dense.T
    assert np.isnan(got[1]).all()
    for row in (0, 2):
        assert (np.abs(got[row] - want[row]) <= 2e-6 * (np.abs(x[row]) @ np.abs(dense).T)).all()


@pytest.mark.parametrize("format", sorted(FLOATS))
def test_exact_mode_does_not_round_inputs(pool_of: PoolOf, format: str) -> None:
    plain, tiled = pool_of("avx2", 1), pool_of("amx_emulated", 1)
    w, _ = pack(plain, format, 40, 256)
    x = inputs(20, 256)
    np.testing.assert_array_equal(run_linear(tiled, w, x, exact=True), run_linear(plain, w, x, exact=True))


@pytest.mark.parametrize("format", ["Q4_0", "Q4_K", "Q8_0", "BF16"])
def test_nan_and_inf_stay_in_their_row(pool_of: PoolOf, format: str) -> None:
    pool = pool_of("amx_emulated", 1)
    w, _ = pack(pool, format, 33, 256)
    x = inputs(18, 256)
    clean = run_linear(pool, w, x)
    x[2, 7], x[17, 200] = np.nan, np.inf
    got = run_linear(pool, w, x)
    assert np.isnan(got[2]).all()
    assert not np.isfinite(got[17]).any()
    others = [t for t in range(18) if t not in (2, 17)]
    np.testing.assert_array_equal(got[others], clean[others])


PROBE = """
#include <immintrin.h>
#include <cstddef>
#include <cstdint>
#define AI inline __attribute__((always_inline))
namespace unit {
#include "kernels/amx_config.h"
#include "kernels/amx_hardware.h"
}
extern "C" void ours(const unit::TileConfig* config, char* p, size_t stride) {
    unit::Tiles t(*config);
    t.zero<3>();
    t.load<1>(p, stride);
    t.load<7>(p + 64, 128);
    t.dot_su<4, 1, 7>();
    t.dot_ss<5, 0, 2>();
    t.dot_bf<0, 6, 3>();
    t.store<4>(p, stride);
}
extern "C" void theirs(const unit::TileConfig* config, char* p, size_t stride) {
    _tile_loadconfig(config);
    _tile_zero(3);
    _tile_loadd(1, p, stride);
    _tile_loadd(7, p + 64, 128);
    _tile_dpbsud(4, 1, 7);
    _tile_dpbssd(5, 0, 2);
    _tile_dpbf16ps(0, 6, 3);
    _tile_stored(4, p, stride);
    _tile_release();
}
"""


def test_the_assembly_is_what_the_intrinsics_give(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or shutil.which("objdump") is None:
        pytest.skip("needs a C++ compiler and binutils")
    source, built = tmp_path / "probe.cpp", tmp_path / "probe.o"
    source.write_text(PROBE)
    include = Path(__file__).parents[2] / "csrc"
    flags = ["-O2", "-std=c++17", "-mamx-tile", "-mamx-int8", "-mamx-bf16", f"-I{include}"]
    subprocess.run([compiler, *flags, "-c", str(source), "-o", str(built)], check=True)
    text = subprocess.run(["objdump", "-d", str(built)], capture_output=True, text=True, check=True).stdout
    found = {}
    for name in ("ours", "theirs"):
        body = re.split(rf"<{name}>:", text)[1].split("\n\n")[0]
        found[name] = re.findall(r"\t((?:tile|tdp|ldtile)\S+)[ \t]*(.*)", body)
    # The address of the second load may be in another register.
    plain = {name: [(op, re.sub(r"%r\w+", "%r", args)) for op, args in ops] for name, ops in found.items()}
    assert len(plain["ours"]) == 9
    assert plain["ours"] == plain["theirs"]
