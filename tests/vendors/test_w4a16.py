"""The quantised product in C++: its tiles, its numbers on the host's emulation of each architecture's fragments against
float64, its builds, and what nvcc and clang's HIP make of it."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the package beside it imports it")

from ktcore_cuda import native
from ktcore_cuda.native import CudaBuild
from ktcore_rocm.native import HipBuild, fragments_of
from ktcore_triton.codes import FLOATS8, FORMATS, Codes
from ktcore_triton.native.build import KERNEL, Build, Gemm, typed
from ktcore_triton.native.fragments import FRAGMENTS, Fragments
from ktcore_triton.native.linear import TiledLinear, splits
from ktcore_triton.native.tiles import TiledWeight, pack, refusal, tiled, unpack

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.host import HostRuntime
from ktcore.conformance.data.memory import make_weights
from ktcore.errors import BackendError
from ktcore.ops.linear import LinearSpec

from . import hip
from .emulation import emulated

FULL = os.environ.get("KTCORE_VENDORS_FULL") == "1"
HIP_CHIPS = ("gfx90a", "gfx942", "gfx1100", "gfx1201")
BUILDS: dict[str, Build] = {"cuda": CudaBuild(), "rocm": HipBuild("gfx942")}
every_kind = pytest.mark.parametrize("fragments", FRAGMENTS.values(), ids=FRAGMENTS)


@every_kind
@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_hold_every_code_once_and_give_it_back(bits: int, fragments: Fragments) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (192, 80), dtype=np.uint8)
    packed = pack(codes, bits, fragments)
    assert packed.size == codes.size * bits // 8
    assert np.array_equal(unpack(packed, 192, 80, bits, fragments), codes)


def test_a_lane_finds_what_the_matrix_instruction_wants() -> None:
    # a code of its own for each of 64 columns at one place of K, the fragment's layout as the PTX ISA draws it
    for k in range(16):
        codes = np.zeros((64, 16), np.uint8)
        codes[:, k] = np.arange(64) + 1
        # two planes of four words a lane: two columns eight apart a subtile of 16, pairs split over a word's halves
        words = pack(codes, 8, FRAGMENTS["nv"]).reshape(2, 32, 4, 4)
        for plane, lane, word, byte in np.argwhere(words):
            flat = (plane * 4 + word) * 2 + byte % 2  # pairs of values, four a subtile
            column = flat // 4 * 16 + flat % 4 // 2 * 8 + lane // 4
            assert words[plane, lane, word, byte] == column + 1
            assert lane % 4 * 2 + byte // 2 + flat % 2 * 8 == k


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# rows, columns, depth, group, bits, zero point, offsets, bfloat16, splits
CASES = [
    (1, 64, 256, 32, 4, 8, False, False, 1),
    (5, 100, 512, 128, 4, 8, False, False, 1),
    (17, 130, 512, 64, 4, 0, True, True, 2),
    (33, 64, 1024, 1024, 4, 7, False, True, 3),
    (16, 72, 2048, 16, 8, 128, False, True, 2),
    (3, 64, 512, 32, 8, 0, True, False, 4),
    (40, 64, 160, 32, 8, 255, False, True, 1),
    (2, 64, 16, 16, 4, 15, False, False, 2),
    (64, 192, 272, 16, 4, 0, True, False, 5),
]


@every_kind
@pytest.mark.parametrize("narrow", [True, False], ids=["half-scales", "float-scales"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_products_on_the_emulated_device(case: tuple[int, ...], narrow: bool, fragments: Fragments) -> None:
    m, n, k, group, bits, zero, offsets, bf16, parts = case
    rng = np.random.default_rng(list(map(int, case)))
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    scale = rng.uniform(0.5, 2, (n, k // group)).astype(np.float32) / 64
    offset = rng.normal(size=(n, k // group)).astype(np.float32) / 64
    if narrow:
        scale, offset = scale.astype(np.float16).astype(np.float32), offset.astype(np.float16).astype(np.float32)
    weight = tiled(Codes(codes, scale, offset if offsets else None, zero, bits), fragments)
    assert (weight.scale.dtype is torch.float16) == narrow
    x = torch.from_numpy(rng.normal(size=(m, k)).astype(np.float32)).to(torch.bfloat16 if bf16 else torch.float16)
    bias = torch.from_numpy(rng.normal(size=n).astype(np.float32))
    rows = 16 if m <= 16 else 32
    blocks = -(-m // rows)
    out = torch.full((m, n), float("nan"))
    partial = torch.full((parts * blocks * rows * weight.padded_n,), float("nan"))
    arrived = torch.zeros(weight.padded_n // 64 * blocks, dtype=torch.int32)
    library = emulated(fragments)

    def run() -> torch.Tensor:
        pointers = map(_pointer, (x, weight.codes, weight.scale, weight.offset, bias, out, partial, arrived))
        assert library.ktcore_gemm(Gemm(*pointers, m, n, k, group, zero, bits, bf16, narrow, parts), None) == 0
        return out.clone()

    values = (codes.astype(np.float64) - zero).reshape(n, -1, group) * scale[..., None].astype(np.float64)
    if offsets:
        values = values + offset[..., None]
    wanted = x.double() @ torch.from_numpy(values.reshape(n, k)).t() + bias.double()
    first = run()
    assert ((first - wanted).abs().max() / wanted.abs().max()) < 1e-6
    # counters are left at zero, or the next launch would not end right
    assert torch.equal(run(), first)
    assert not arrived.any()


def test_each_stream_counts_its_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches that run at once would take each other's blocks for their own, and end too early."""
    calls: list[tuple[int, Gemm]] = []

    def gemm(call: Gemm, stream: int) -> int:
        calls.append((stream, Gemm.from_buffer_copy(call)))
        return 0

    streams = iter((1, 2, 1, 2, 1))
    spec, device = LinearSpec(256, 100, "Q4_0"), Capabilities("cuda", "card")
    runtime = HostRuntime(device)
    monkeypatch.setattr(runtime, "current_handle", lambda: next(streams), raising=False)
    build = SimpleNamespace(fragments=FRAGMENTS["nv"], library=lambda: SimpleNamespace(ktcore_gemm=gemm))
    implementation = TiledLinear("cuda", 4, lambda device: build)  # type: ignore[arg-type, return-value]
    weights = make_weights(spec, np.random.default_rng(0))
    module = implementation.load(LoadRequest("n", spec, weights, runtime, device, options={"compute": "float16"}))
    for tokens in (3, 3, 5, 40, 3):
        module(torch.zeros(tokens, 256))
    first, second, again, other, last = (call.arrived for _, call in calls)
    assert [stream for stream, _ in calls] == [1, 2, 1, 2, 1]
    assert first == again == last
    assert len({first, second, other}) == 3
    assert (calls[3][1].m, calls[3][1].n, calls[3][1].k, calls[3][1].bits) == (40, 100, 256, 4)


def test_sizes_that_cannot_be_are_refused() -> None:
    library = emulated(FRAGMENTS["nv"])
    for m, n, k, group, bits in ((0, 64, 64, 32, 4), (1, 64, 24, 24, 4), (1, 64, 64, 24, 4), (1, 64, 64, 32, 5)):
        assert library.ktcore_gemm(Gemm(*[None] * 8, m, n, k, group, 8, bits, 0, 1, 1), None) == -1
    assert refusal(40, 20)
    with pytest.raises(BackendError, match="multiples of 16"):
        tiled(Codes(np.zeros((4, 40), np.uint8), np.ones((4, 2), np.float32), None, 8, 4), FRAGMENTS["nv"])


def _linears(backend: str) -> list[TiledLinear]:
    return [TiledLinear(backend, bits, lambda device: BUILDS[backend]) for bits in (4, 8)]


@pytest.mark.parametrize("name", FORMATS)
def test_each_affine_format_has_one_of_the_two(name: str) -> None:
    answers = [i.supports(LinearSpec(512, 64, name), Capabilities("cuda", "declared")) for i in _linears("cuda")]
    assert sum(isinstance(a, Supported) for a in answers) == (0 if name in FLOATS8 else 1)


def test_chips_without_known_matrix_instructions_are_refused() -> None:
    wanted = {"gfx90a": "mfma", "gfx950": "mfma", "gfx1101": "wmma11", "gfx1200": "wmma12"}
    wanted |= dict.fromkeys(("gfx908", "gfx1030", "gfx1250", ""), "")
    assert {arch: (f.name if (f := fragments_of(arch)) else "") for arch in wanted} == wanted
    old = Capabilities("rocm", "MI100", properties={"arch": "gfx908"})
    answer = TiledLinear("rocm", 4, lambda device: HipBuild("gfx908")).supports(LinearSpec(512, 64, "Q4_0"), old)
    assert isinstance(answer, Unsupported)
    assert answer.reason == "no matrix instructions of gfx908 are known" == HipBuild("gfx908").status()


@pytest.mark.parametrize("backend", BUILDS)
def test_without_a_compiler_it_says_so(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = BUILDS[backend]
    monkeypatch.setenv(build.cache_variable, str(tmp_path))
    monkeypatch.setattr(type(build), "compiler", lambda build: None)
    found, spec = _linears(backend)[0], LinearSpec(512, 64, "Q4_0")
    answer = found.supports(spec, Capabilities(backend, "card", live=True))
    assert isinstance(answer, Unsupported)
    assert f"no {build.compiler_name}" in answer.reason
    assert isinstance(found.supports(spec, Capabilities(backend, "declared")), Supported)
    assert f"no {build.compiler_name}" in build.status()
    with pytest.raises(BackendError, match=f"no {build.compiler_name}"):
        build.library()


@pytest.mark.parametrize("backend", BUILDS)
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = BUILDS[backend]
    broken = tmp_path / "compiler"
    broken.write_text('#!/bin/sh\necho "unsupported version for $HIP_PLATFORM" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv(build.cache_variable, str(tmp_path / "cache"))
    monkeypatch.setenv(build.compiler_variable, str(broken))
    monkeypatch.delenv("HIP_PLATFORM", raising=False)
    with pytest.raises(BackendError, match=f"unsupported version for {'amd' if backend == 'rocm' else ''}"):
        build.library()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_probe_tells_of_the_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ktcore_rocm.plugin import probe

    chip = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: chip)
    monkeypatch.setenv(HipBuild.cache_variable, str(tmp_path))
    monkeypatch.setattr(HipBuild, "compiler", lambda build: None)
    found = probe()
    assert found.available
    assert found.reason.startswith("MI300X, ROCm 6.4; its HIP kernels are not built and there is no hipcc")
    HipBuild("gfx942").path().touch()
    assert probe().reason == "MI300X, ROCm 6.4; HIP kernels built"
    chip.gcnArchName = "gfx1030"
    assert probe().reason == "MI300X, ROCm 6.4; no matrix instructions of gfx1030 are known"


def test_each_chip_has_a_library_of_its_own() -> None:
    assert len({HipBuild(arch).path() for arch in HIP_CHIPS}) == len(HIP_CHIPS)


def test_splits_fill_the_processors_and_leave_warps_enough_to_do() -> None:
    def weight(n: int, k: int, fragments: str = "nv") -> TiledWeight:
        codes = Codes(np.zeros((n, k), np.uint8), np.ones((n, k // 32), np.float32), None, 8, 4)
        return tiled(codes, FRAGMENTS[fragments])

    assert splits(weight(64, 4096), 132) == 8
    assert splits(weight(64, 4096, "mfma"), 132) == 16  # half the warps a block
    assert splits(weight(128, 512), 132) == 1
    assert splits(weight(8192, 512), 132) == 1


@pytest.mark.skipif(CudaBuild().compiler() is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", native.ARCHITECTURES if FULL else (90,))
def test_nvcc_compiles_it_without_spilling(architecture: int, tmp_path: Path) -> None:
    compiler = CudaBuild().compiler()
    assert compiler
    (command,) = CudaBuild((architecture,)).commands(compiler, tmp_path / "library.so")
    command += ["-Xptxas", "-v"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", done.stderr)]
    spilled = [int(b) for b in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert len(registers) == len(spilled) == 32
    # 256 threads a block, 65536 registers a processor
    assert max(registers) <= 255
    assert max(spilled) == 0
    # it loads where there is no device, and says what a driver says there
    loaded = typed(ctypes.CDLL(str(tmp_path / "library.so")))
    if not torch.cuda.is_available():
        x = torch.zeros(4096, dtype=torch.uint8).data_ptr()
        assert loaded.ktcore_gemm(Gemm(*[x] * 8, 1, 64, 64, 32, 8, 4, 0, 1, 1), None) > 0


@pytest.mark.skipif(bool(hip.missing()), reason=f"nothing to compile HIP with: {hip.missing()}")
@pytest.mark.parametrize("arch", HIP_CHIPS if FULL else ("gfx942",))
def test_hip_compiles_it_without_spilling(arch: str, tmp_path: Path) -> None:
    build = HipBuild(arch)
    assert build.fragments
    flags = [f for f in build.flags() if f not in ("-x", "hip", "-fPIC") and not f.startswith("--offload")]
    assert build.fragments.macro in flags
    found = hip.compiled(KERNEL, arch, flags, tmp_path)
    assert len(found) == 32
    assert {k.wave for k in found} == {64 if build.fragments.name == "mfma" else 32}
    assert max(k.spilled + k.private for k in found) == 0
    # four waves of 64 and 512 registers a lane leave room for two blocks on CDNA; RDNA lets a wave have 256
    assert max(k.vgprs for k in found) <= 256
    # beside what is asked for at launch: sums of four warps in 32 rows and 64 columns
    assert max(k.lds for k in found) + 4 * 32 * 64 * 4 <= hip.LDS_BYTES


HIP_RUNTIME = ctypes.util.find_library("amdhip64")


@pytest.mark.skipif(not FULL, reason="KTCORE_VENDORS_FULL=1 builds it")
@pytest.mark.skipif(not HIP_RUNTIME or not HipBuild("gfx90a").compiler(), reason="there is no hipcc or no libamdhip64")
def test_hipcc_builds_the_library_which_finds_the_runtime_that_is_loaded(tmp_path: Path) -> None:
    script = f"""
import ctypes, torch
from ktcore.errors import BackendError
from ktcore_rocm.native import HipBuild
from ktcore_triton.native.build import Gemm
build = HipBuild("gfx90a")
try:
    build.library()
except BackendError as error:
    assert "has loaded no HIP runtime" in str(error), error
else:
    raise AssertionError("it came with a runtime of its own")
ctypes.CDLL("{HIP_RUNTIME}")
x = torch.zeros(4096, dtype=torch.uint8).data_ptr()
loaded = build.library()
code = loaded.ktcore_gemm(Gemm(*[x] * 8, 1, 64, 64, 32, 8, 4, 0, 1, 1), None)
assert torch.cuda.is_available() or code > 0 and b"hip" in loaded.ktcore_error(code), code
"""
    variables = {**os.environ, "KTCORE_ROCM_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=variables)
    (library,) = tmp_path.iterdir()  # nothing else is left
    assert b"libamdhip64" not in library.read_bytes()
