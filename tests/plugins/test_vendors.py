"""The four accelerator packages on a machine without any of their devices: they register, and tell the true reason."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ktcore.backend import API_VERSION, BackendState, Registry
from ktcore.errors import BackendError

VENDORS = ("cuda", "rocm", "xpu", "npu")
SELF_BUILT = pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None or getattr(torch.version, "xpu", None) is not None,
    reason="this torch is built for an accelerator",
)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


@pytest.mark.parametrize("name", VENDORS)
def test_the_package_registers_one_inert_backend(registry: Registry, name: str) -> None:
    record = registry.get(name)
    assert record is not None, f"ktcore-{name} is not installed: pip install ./backends/{name}"
    assert record.spec is not None
    assert record.spec.api_version == API_VERSION
    assert record.accelerator
    assert record.distribution == f"ktcore-{name} {version(f'ktcore-{name}')}"
    ids = [i.id for i in registry.backend_object(name).implementations()]
    assert len(set(ids)) == len(ids)
    assert all(i.startswith(f"{name}.") for i in ids)


@pytest.mark.parametrize("name", VENDORS)
def test_every_declared_class_says_what_plans_need(registry: Registry, name: str) -> None:
    record = registry.get(name)
    assert record is not None
    assert record.spec is not None
    arches = [caps.properties["arch"] for caps in record.spec.declared]
    assert len(set(arches)) == len(arches) >= 2
    for caps in record.spec.declared:
        assert caps.backend == name
        assert not caps.live
        assert {"f16", "bf16"} <= caps.features
        assert ("fp8_max" in caps.properties) == any(f.startswith("fp8:") for f in caps.features)


def test_the_fp8_flavour_follows_the_architecture(registry: Registry) -> None:
    record = registry.get("rocm")
    assert record is not None
    assert record.spec is not None
    by_arch = {caps.properties["arch"]: caps for caps in record.spec.declared}
    assert by_arch["gfx942"].has("fp8:e4m3fnuz")
    assert by_arch["gfx942"].properties["fp8_max"] == torch.finfo(torch.float8_e4m3fnuz).max
    assert by_arch["gfx950"].has("fp8:e4m3fn")
    assert by_arch["gfx950"].properties["fp8_max"] == torch.finfo(torch.float8_e4m3fn).max
    assert (by_arch["gfx942"].properties["subgroup"], by_arch["gfx1100"].properties["subgroup"]) == (64, 32)


@SELF_BUILT
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda", f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch; "),
        ("rocm", f"torch {torch.__version__} is built without ROCm: install a ROCm build of torch; "),
        ("xpu", f"torch {torch.__version__} is built without XPU: install an XPU build of torch; "),
    ],
)
def test_the_probe_names_the_build_of_torch(registry: Registry, name: str, reason: str) -> None:
    record = registry.get(name)
    assert record is not None
    assert record.state is BackendState.UNAVAILABLE
    assert record.reason.startswith(reason)


@SELF_BUILT
def test_loading_raises_the_backends_own_reason(registry: Registry) -> None:
    with pytest.raises(BackendError, match=r"'cuda' \(ktcore-cuda .*\) is unavailable: torch .* is built without CUDA"):
        registry.runtime("cuda")


def fake_torch(**changes: object) -> SimpleNamespace:
    """A torch as `probe` sees it; every build has all device modules."""
    parts: dict[str, object] = {"cuda": None, "hip": None, "xpu": None} | changes
    count = parts.pop("count", 0)
    device = SimpleNamespace(
        device_count=lambda: count,
        get_device_name=lambda i: f"card {i}",
        get_device_properties=lambda i: SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-"),
    )
    return SimpleNamespace(__version__="9.9", version=SimpleNamespace(**parts), cuda=device, xpu=device)


@pytest.mark.parametrize(
    ("name", "torch_build", "available", "reason"),
    [
        ("cuda", {"cuda": "13.0", "count": 2}, True, "card 0, card 1, CUDA 13.0"),
        ("cuda", {"cuda": "13.0"}, False, "torch 9.9 finds no CUDA device: "),
        ("cuda", {"hip": "7.1", "count": 1}, False, "torch 9.9 is built for ROCm"),
        ("rocm", {"hip": "7.1", "count": 1}, True, "card 0, ROCm 7.1"),
        ("rocm", {"hip": "7.1"}, False, "torch 9.9 finds no ROCm device"),
        ("rocm", {"cuda": "13.0", "count": 1}, False, "torch 9.9 is built without ROCm"),
        ("xpu", {"xpu": "20260000", "count": 1}, True, "card 0, XPU 20260000"),
        ("xpu", {"xpu": "20260000"}, False, "torch 9.9 finds no XPU device"),
    ],
)
def test_the_probe_on_other_builds_of_torch(
    monkeypatch: pytest.MonkeyPatch, name: str, torch_build: dict[str, object], available: bool, reason: str
) -> None:
    plugin = importlib.import_module(f"ktcore_{name}.plugin")
    monkeypatch.setitem(sys.modules, "torch", fake_torch(**torch_build))  # type: ignore[arg-type]
    answer = plugin.probe()
    assert answer.available is available
    assert answer.reason.startswith(reason)
    assert answer.devices == (torch_build.get("count", 0) if available else 0)


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_the_npu_probe_names_all_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plugin = importlib.import_module("ktcore_npu.plugin")
    monkeypatch.setattr(plugin, "DRIVER", tmp_path / "davinci_manager")
    for variable in plugin.TOOLKIT_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    reason = plugin.probe().reason
    assert "torch_npu is not installed" in reason
    assert "CANN is not set up" in reason
    assert "driver is not loaded" in reason


def test_the_npu_probe_never_imports_torch_npu_without_its_toolkit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its import fails hard where CANN is missing, so a trap takes its place."""
    (tmp_path / "torch_npu.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin = importlib.import_module("ktcore_npu.plugin")
    monkeypatch.setattr(plugin, "DRIVER", tmp_path)
    for variable in plugin.TOOLKIT_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    answer = plugin.probe()
    assert not answer.available
    assert answer.reason.startswith("CANN is not set up")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setattr(plugin, "DRIVER", tmp_path / "davinci_manager")
    assert "driver is not loaded" in plugin.probe().reason
    monkeypatch.setattr(plugin, "DRIVER", tmp_path)
    with pytest.raises(AssertionError, match="imported"):
        plugin.probe()


def test_plugin_modules_import_no_vendor_library_and_initialise_no_device() -> None:
    code = (
        "import sys\n"
        "from ktcore.backend import Registry\n"
        "names = [r.name for r in Registry.discover().records()]\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch_npu', 'intel_extension_for_pytorch', 'triton'}, loaded\n"
        "assert not [name for name in sys.modules if name.endswith('.backend') and name.startswith('ktcore_')]\n"
        "print(*names)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(VENDORS) <= set(done.stdout.split())


def test_an_unknown_device_is_described_by_what_its_driver_reports() -> None:
    cuda = importlib.import_module("ktcore_cuda.devices")
    old, new = cuda.live("T4", 16, 7, 5), cuda.live("B200", 192, 10, 0)
    assert not old.has("bf16")
    assert not old.has("fp8:e4m3fn")
    assert new.has("fp8:e4m3fn")
    assert new.live
    assert cuda.live("H100", 80, 9, 0).properties["mla_page_size"] == 64
    rocm = importlib.import_module("ktcore_rocm.devices")
    assert rocm.live("MI300X", 192, "gfx942:sramecc+:xnack-", 64).has("fp8:e4m3fnuz")
    assert rocm.live("RX 9060", 16, "gfx1200", 32).properties == {"arch": "gfx1200", "subgroup": 32}
    xpu = importlib.import_module("ktcore_xpu.devices")
    assert xpu.live("Intel(R) Arc(TM) B580 Graphics", 12, [16, 32], False).properties["mla_heads_per_call"] == 8
    assert xpu.live("Some iGPU", 12, [8, 16], True).properties["subgroups"] == "8,16"
    npu = importlib.import_module("ktcore_npu.devices")
    assert npu.live("Ascend910B3", 64).properties["family"] == "Atlas A2"
    assert npu.live("Ascend910_9392", 64).properties["family"] == "Atlas A3"
    assert not npu.live("Ascend310P3", 24).has("bf16")


def test_each_package_stands_alone() -> None:
    """Its own distribution brings its entry point, and ktcore's does not."""
    for entry in entry_points(group="ktcore.backends"):
        if entry.name in VENDORS:
            assert entry.dist is not None
            assert entry.dist.name == f"ktcore-{entry.name}"
    with pytest.raises(PackageNotFoundError):
        version("ktcore-cpu")
