"""XPU without its packages: what is missing is said in words, layouts are right, and calls are as vendors document."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from ktcore_xpu import onednn
from ktcore_xpu.sycl import build, home, implementations
from ktcore_xpu.sycl.cache import token_sequences, visible_keys
from ktcore_xpu.sycl.home import SyclHome, find_home
from ktcore_xpu.sycl.launcher import Launcher, source
from ktcore_xpu.sycl.shim import Pointer, arguments

from ktcore.backend import Capabilities, LoadRequest, Supported, Unsupported
from ktcore.backend.host import HostRuntime
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import KVCacheSpec
from ktcore.ops.linear import LinearSpec
from ktcore.weights import dequantize

LIVE = Capabilities("xpu", "Arc", 1 << 30, frozenset({"f16", "bf16"}), {"subgroups": "16,32"}, live=True)
DECLARED = Capabilities("xpu", "Arc", None, frozenset({"f16", "bf16"}), {"subgroups": "16,32"})


def whole(root: Path) -> SyclHome:
    """A folder that looks like a SYCL runtime."""
    for part in ("include/sycl/sycl.hpp", "lib/libsycl.so", "lib/libsycl.so.9", "lib/libsycl-jit.so"):
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        (root / part).touch()
    return SyclHome(root)


def test_a_missing_runtime_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(home.VARIABLE, str(tmp_path))
    linear = implementations()[0]
    answer = linear.supports(LinearSpec(64, 8, "Q4_0"), LIVE)
    assert isinstance(answer, Unsupported)
    assert f"{tmp_path} has no include/sycl/sycl.hpp" in answer.reason
    assert isinstance(linear.supports(LinearSpec(64, 8, "Q4_0"), DECLARED), Supported)
    assert find_home_of(monkeypatch, whole(tmp_path)).version == "libsycl.so.9"
    assert isinstance(linear.supports(LinearSpec(64, 8, "Q4_0"), LIVE), Supported)


def find_home_of(monkeypatch: pytest.MonkeyPatch, there: SyclHome) -> SyclHome:
    monkeypatch.setenv(home.VARIABLE, str(there.root))
    return find_home()


def test_a_runtime_of_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = whole(tmp_path)
    maps = SimpleNamespace(read_text=lambda: "7f00 r-xp /opt/lib/libsycl.so.8.0.0\n")
    monkeypatch.setattr(home, "Path", lambda path: maps if path == "/proc/self/maps" else Path(path))
    with pytest.raises(BackendError, match=r"libsycl\.so\.9, this process runs libsycl\.so\.8"):
        find_home_of(monkeypatch, there)


def test_the_shim_is_built_once_and_errors_are_the_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = whole(tmp_path / "sycl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        calls.append(command)
        Path(command[command.index("-o") + 1]).touch()
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(build, "subprocess", SimpleNamespace(run=run))
    first = build.shim_library(there)
    assert build.shim_library(there) == first
    assert first.exists()
    assert len(calls) == 1
    assert f"-I{there.include}" in calls[0]
    assert f"-Wl,-rpath,{there.lib}" in calls[0]
    monkeypatch.setattr(build, "subprocess", subprocess)
    (there.include / "sycl" / "sycl.hpp").write_text("#error not a real one\n")
    other = whole(tmp_path / "other")
    (other.include / "sycl" / "sycl.hpp").write_text("#error not a real one\n")
    with pytest.raises(BackendError, match="not a real one"):
        build.shim_library(other)


def test_a_missing_compiler_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(home.VARIABLE, str(whole(tmp_path).root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.why_unavailable() == build.NO_COMPILER
    with pytest.raises(BackendError, match="install g"):
        build.shim_library(find_home())


def test_what_devices_and_specs_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, cache = implementations()[:2]
    wide = Capabilities("xpu", "other", None, frozenset(), {"subgroups": "32"})
    for implementation, spec, device, words in (
        (linear, LinearSpec(64, 8, "Q4_0"), wide, "sub-groups of 16, the device has 32"),
        (linear, LinearSpec(64, 8, "BF16"), DECLARED, "BF16: the kernels take formats with scales"),
        (cache, KVCacheSpec("gqa", 2, 2, 40, 40), DECLARED, "multiples of 16"),
    ):
        answer = implementation.supports(spec, device)
        assert isinstance(answer, Unsupported)
        assert words in answer.reason


def test_arguments_are_told_by_their_types() -> None:
    made = arguments([Pointer(7), None, 5, 0.5])
    assert [a.kind for a in made] == [0, 0, 1, 2]
    assert (made[0].pointer, made[1].pointer, made[2].integer, made[3].real) == (7, None, 5, 0.5)


def test_a_device_without_sub_groups_of_16_is_refused() -> None:
    shim = SimpleNamespace(describe=lambda queue: {"name": "Chip", "widths": "32"})
    with pytest.raises(BackendError, match="Chip has no sub-groups of 16, but 32"):
        Launcher(shim, lambda: 1, "xpu").kernel("router.cpp", "route")  # type: ignore[arg-type]


def test_macros_follow_the_headers() -> None:
    text = source("router.cpp", TOP=4, SIGMOID=True)
    assert text.index("#include <sycl/builtins.hpp>") < text.index("#define SIGMOID 1\n#define TOP 4\n")


def test_where_each_token_of_a_ragged_step_looks() -> None:
    table = torch.zeros(3, 4, dtype=torch.int32)
    step = StepBatch(torch.zeros(6).long(), torch.zeros(6).long(), (0, 1, 4, 6), (9, 3, 7), table, 16)
    assert token_sequences(step).tolist() == [0, 1, 1, 1, 2, 2]
    assert visible_keys(step).tolist() == [9, 1, 2, 3, 6, 7]
    assert token_sequences(step).dtype == visible_keys(step).dtype == torch.int32


@pytest.fixture(scope="module")
def _product() -> Iterator[None]:
    """`int4_gemm_w4a16` as vllm-xpu-kernels declares it; refuses what its documentation excludes."""
    library = torch.library.Library("_xpu_C", "DEF")
    library.define(
        "int4_gemm_w4a16(Tensor A, Tensor B, Tensor? bias, Tensor B_scale, Tensor B_zp, int group_size, Tensor? g_idx)"
        " -> Tensor"
    )

    def run(
        a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor,
        group: int, g_idx: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        k, n = a.shape[-1], b.shape[1]
        assert a.dtype in (torch.float16, torch.bfloat16)
        assert b.dtype == torch.int32
        assert b.shape == (k // 8, n)
        assert b.stride() == (1, k // 8)
        assert scale.dtype == a.dtype
        assert scale.shape == (k // group, n)
        assert scale.is_contiguous()
        assert g_idx is None
        assert bias is None or bias.numel() == 0
        shifts = 4 * torch.arange(8)
        codes = ((b.t()[..., None] >> shifts) & 15).reshape(n, k)
        if zero.dim() == 1:
            assert zero.dtype == torch.int8
            assert zero.tolist() == [8]
            points = torch.full((n, k // group), 8)
        else:
            assert zero.dtype == torch.int32
            assert zero.shape == (k // group, n // 8)
            points = ((zero[..., None] >> shifts) & 15).reshape(k // group, n).t()
        weight = (codes.view(n, -1, group) - points[..., None]) * scale.t().float()[..., None]
        return (a.float() @ weight.reshape(n, k).T).to(a.dtype)

    library.impl("int4_gemm_w4a16", run, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("_product")
@pytest.mark.parametrize(("name", "zeros"), [("Q4_0", None), ("INT4_G64", (8, 9)), ("INT4_G128", (0, 16))])
def test_the_vendors_product_gets_what_it_documents(
    monkeypatch: pytest.MonkeyPatch, name: str, zeros: tuple[int, int] | None
) -> None:
    monkeypatch.setitem(sys.modules, "vllm_xpu_kernels", ModuleType("vllm_xpu_kernels"))
    monkeypatch.setitem(sys.modules, "vllm_xpu_kernels._xpu_C", ModuleType("vllm_xpu_kernels._xpu_C"))
    rng, rows, cols = np.random.default_rng(0), 24, 256
    group = 32 if zeros is None else int(name[6:])
    codes = rng.integers(0, 256, (rows, cols // group, group // 2), dtype=np.uint8)
    scale = rng.uniform(0.001, 0.1, (rows, cols // group, 1)).astype("<f2").view(np.uint8)
    point = rng.integers(*zeros, (rows, cols // group, 1)).astype("<u2").view(np.uint8) if zeros else scale[..., :0]
    raw = np.concatenate((scale, point, codes), -1).reshape(rows, -1)
    stored = SimpleNamespace(raw=lambda: raw, input_order=None)
    request = LoadRequest("proj", LinearSpec(cols, rows, name), {"weight": stored}, HostRuntime(), LIVE)  # type: ignore[dict-item]
    x = torch.randn(5, cols)
    found = onednn.OneDnnLinear().load(request)(x)
    expected = x.double() @ dequantize(name, raw.reshape(-1), (rows, cols)).double().T
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_what_the_vendors_product_cannot_take() -> None:
    linear = onednn.OneDnnLinear()
    for spec, device, words in (
        (LinearSpec(64, 8, "Q4_K"), DECLARED, "Q4_K: it takes Q4_0"),
        (LinearSpec(64, 12, "Q4_0"), DECLARED, "packed by eight"),
        (LinearSpec(64, 8, "Q4_0"), LIVE, "vllm-xpu-kernels is not installed"),
    ):
        answer = linear.supports(spec, device)
        assert isinstance(answer, Unsupported)
        assert words in answer.reason
