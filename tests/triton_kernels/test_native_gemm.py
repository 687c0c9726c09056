"""The quantised product in C++: packing, its numerics under host emulation of four kinds of fragments, nvcc's build."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from ktcore_triton import native
from ktcore_triton.native.library import Arguments, Library, decoder_bias, zero_word
from ktcore_triton.native.packing import FLAVOURS, pack, pad_groups, unpack

SOURCE = Path(native.__file__).parent / "csrc" / "gemm.cu"
FULL = os.environ.get("KTCORE_VENDORS_FULL") == "1"
KINDS = ("constant", "zeros", "offset")


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone(flavour: str, bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (131, 328), dtype=np.uint8)
    packed = pack(codes, bits, flavour)
    assert len(packed.codes) == 192 * 384 * bits // 8
    assert (unpack(packed) == codes).all()


@pytest.fixture(scope="module", params=FLAVOURS)
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Library]:
    """The kernel's source compiled for this CPU, with the fragments of one vendor."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the emulation with")
    path = tmp_path_factory.mktemp(request.param) / "emulated.so"
    define = f"-DKT_{request.param.upper()}=1"
    options = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-shared"]
    subprocess.run([compiler, *options, "-DKT_EMULATE", define, "-x", "c++", SOURCE, "-o", path], check=True)
    return request.param, Library(path)


CASES = [
    # m, n, k, group, bits, kind, blocks: odd tails, every group, stripes that cross outputs, one block for all
    (1, 70, 296, 0, 4, 0, 3),
    (5, 130, 320, 32, 4, 1, 5),
    (16, 64, 640, 64, 4, 2, 4),
    (17, 64, 256, 128, 4, 0, 1),
    (33, 61, 192, 32, 4, 1, 2),
    (67, 64, 128, 64, 4, 2, 1),
    (3, 130, 384, 128, 8, 1, 4),
    (19, 65, 160, 32, 8, 0, 3),
    (65, 64, 256, 128, 8, 2, 2),
]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "group", "bits", "kind", "blocks"), CASES)
def test_emulated_kernel_agrees_with_float64(
    emulated: tuple[str, Library], bf16: bool, m: int, n: int, k: int, group: int, bits: int, kind: int, blocks: int
) -> None:
    flavour, library = emulated
    random = np.random.default_rng(m * n + k)
    dtype = torch.bfloat16 if bf16 else torch.float16
    groups = k // group if group else 1
    codes = random.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    scale = torch.from_numpy(random.uniform(0.01, 0.03, (n, groups)).astype(np.float32)).to(dtype)
    zeros = random.integers(1, 1 << bits, (n, groups)) if kind == 1 else np.full((n, groups), 8 if kind == 0 else 0)
    offset = torch.from_numpy(random.normal(0, 0.1, (n, groups)).astype(np.float32)).to(dtype)
    x = torch.from_numpy(random.normal(0, 1, (m, k)).astype(np.float32)).to(dtype)
    bias = torch.from_numpy(random.normal(0, 1, n).astype(np.float32))

    width = group or k
    weight = (codes - zeros.repeat(width, 1).astype(np.float64)) * scale.double().numpy().repeat(width, 1)
    if kind == 2:
        weight = weight + offset.double().numpy().repeat(width, 1)
    x64 = x.double().numpy()
    expected = x64 @ weight.T + bias.double().numpy()
    # weights are rounded to the type of x: half a unit in the last place of each
    bound = np.abs(x64) @ np.abs(weight).T * (2.0**-8 if bf16 else 2.0**-11) + 1e-4

    packed = torch.from_numpy(pack(codes, bits, flavour).codes)
    scales = torch.from_numpy(pad_groups(scale.float().numpy(), k, group)).to(dtype)
    extras = zeros.astype(np.float32) + decoder_bias(bits, bf16) if kind == 1 else offset.float().numpy()
    extra = torch.from_numpy(pad_groups(extras, k, group)).to(dtype)
    results = []
    counters = torch.zeros(library.counter_bytes(m, n), dtype=torch.uint8)
    partial = torch.full((library.partial_bytes(m, blocks) // 4,), float("nan"))
    aligned = _aligned(x)
    for backwards in (None, 1):
        y = torch.full((m, n), float("nan"))
        sizes = {"m": m, "n": n, "k": k, "group": group, "kind": kind, "bits": bits, "bf16": int(bf16)}
        zero = zero_word(8 if kind == 0 else 0, bits, bf16)
        pointers = {"x": aligned, "codes": packed, "scale": scales, "extra": extra, "bias": bias, "y": y}
        pointers |= {"counters": counters, "partial": partial}
        arguments = Arguments(
            **{name: tensor.data_ptr() for name, tensor in pointers.items()},
            **sizes, zero=zero, blocks=blocks, stream=backwards, warp_size=64 if flavour == "mfma" else 32,
        )  # fmt: skip
        assert library.gemm(arguments) == 0
        assert not counters.any()
        results.append(y)
    assert torch.equal(results[0], results[1]), "the order in which blocks arrive shows in the sums"
    error = np.abs(results[0].double().numpy() - expected)
    assert (error <= bound).all(), f"{error.max()} at {np.unravel_index(error.argmax(), error.shape)}"


def test_arguments_that_do_not_fit_are_refused(emulated: tuple[str, Library]) -> None:
    assert emulated[1].gemm(Arguments(m=1, n=64, k=129, group=32, bits=4, blocks=1, warp_size=32)) == -1
    assert emulated[1].gemm(Arguments(m=1, n=64, k=128, group=16, bits=4, blocks=1, warp_size=32)) == -1


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120] if FULL else [])
def test_nvcc_builds_it_without_spills(arch: int, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    library = tmp_path / "gemm.so"
    options = ["-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-Xptxas", "-v"]
    target = f"arch=compute_{arch},code=sm_{arch}"
    done = subprocess.run(
        [nvcc, *options, "-gencode", target, SOURCE, "-o", library], capture_output=True, text=True, check=True
    )
    assert re.findall(r"(\d+) bytes spill", done.stderr) == ["0"] * 24  # stores and loads of 12 kernels
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 12
    assert max(registers) <= 168  # three blocks of 128 threads fit the 64 Ki registers
    assert ctypes.CDLL(str(library)).kt_gemm  # needs no device to be loaded


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The same values at an address that 16 divides."""
    room = torch.empty(x.numel() + 8, dtype=x.dtype)
    start = -room.data_ptr() % 16 // 2
    return room[start : start + x.numel()].copy_(x.reshape(-1))
