"""Runs a vendor's backend on the simulated device: its own rules, packing, runtime and kernels, over stand-ins.

    python tests/vendors/simulate.py --backend cuda [--chip sm_90] [--quick] -- conformance run --backend cuda …

Everything after `--` is a command of ktcore's. Reports made so say "simulated". Kernels run in Triton's interpreter,
which is wrong in bfloat16: the simulated chip does not declare it, so products run in float16.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Triton looks at it when it is first imported, which transformers does
    os.environ.setdefault("TRITON_INTERPRET", "1")

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from ktcore_sim.options import SimOptions
from ktcore_sim.runtime import SimRuntime

from ktcore.backend import Capabilities, Probe
from ktcore.conformance import Expectations, Mode
from tests.vendors import triton_on_sim
from tests.vendors.torch_module import HostFunctions, Module

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """A simulated chip: what the vendor's module reports of it, and variables that its package reads."""

    backend: str
    name: str
    properties: SimpleNamespace
    handle: str
    graph_type: str
    environment: tuple[tuple[str, str], ...] = ()


def _cuda(name: str, major: int, minor: int) -> Chip:
    properties = SimpleNamespace(
        name=f"simulated {name}", total_memory=8 * GIB, major=major, minor=minor, multi_processor_count=4
    )
    return Chip("cuda", name, properties, "cuda_stream", "CUDAGraph")


def _rocm(name: str, wave: int) -> Chip:
    properties = SimpleNamespace(
        name=f"simulated {name}", total_memory=8 * GIB, gcnArchName=name, warp_size=wave, multi_processor_count=4
    )
    return Chip("rocm", name, properties, "cuda_stream", "CUDAGraph")


def _xpu(name: str) -> Chip:
    properties = SimpleNamespace(
        name=f"simulated {name}", total_memory=8 * GIB, sub_group_sizes=[16, 32], has_fp64=False
    )
    return Chip("xpu", name, properties, "sycl_queue", "")


def _npu(name: str) -> Chip:
    properties = SimpleNamespace(name=f"{name} (simulated)", total_memory=8 * GIB)
    return Chip("npu", name, properties, "npu_stream", "NPUGraph", (("TASK_QUEUE_ENABLE", "0"),))


CHIPS = (
    _cuda("sm_90", 9, 0),
    _cuda("sm_80", 8, 0),
    _cuda("sm_120", 12, 0),
    _rocm("gfx942", 64),
    _rocm("gfx1100", 32),
    _rocm("gfx1201", 32),
    _xpu("Battlemage"),
    _npu("Ascend910B3"),
    _npu("Ascend910_9392"),
)


class Simulation:
    """A vendor's backend on the simulated device, for this whole process or until `undo`."""

    def __init__(self, chip: Chip, options: SimOptions | None = None) -> None:
        self.chip = chip
        self.options = options or SimOptions.from_environment()
        self._before: list[tuple[Any, str, Any]] = []
        self._tiles = "the backend's"
        self.sim = SimRuntime(0, self.options)

    def install(self) -> Simulation:
        """Exchange the probe, the vendor and what the backend declares to the kit."""
        v = self.chip.backend
        plugin, backend, conformance = (
            importlib.import_module(f"ktcore_{v}.{name}") for name in ("plugin", "backend", "conformance")
        )
        self.sim.run_all_on_device()
        self._set(plugin, "probe", lambda: Probe(True, f"{self.chip.properties.name}, no hardware", devices=1))
        self._set(backend, "torch_vendor", self._vendor)
        made = getattr(backend, f"{v.capitalize()}Runtime")
        self._set(backend, f"{v.capitalize()}Runtime", lambda *a: self._runtime(made, *a))
        declared = conformance.expectations
        self._set(conformance, "expectations", lambda: self._expectations(declared()))
        self._set(triton_on_sim.GridExecutor, "__call__", triton_on_sim.GridExecutor.__call__)
        triton_on_sim.install(self.sim)
        if v in ("cuda", "rocm"):
            from tests.vendors.emulation import Library

            build = getattr(importlib.import_module(f"ktcore_{v}.native"), {"cuda": "CudaBuild", "rocm": "HipBuild"}[v])
            self._set(build, "problem", lambda build: "")
            self._set(build, "library", lambda build: Library(self.sim, build.fragments))
        return self

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter; Ascend's operators are torch's own here, bfloat16 too."""
        return self.chip.backend != "npu"

    def large_tiles(self) -> Simulation:
        """Kernels in tiles of the simulation's own: the interpreter's time goes by programs, not by their size.

        Where nothing is interpreted nothing has tiles, and all stays as it is.
        """
        if not self.interpreted:
            return self
        from ktcore_triton.operators import implementations
        from ktcore_triton.tuning import AttentionTiles, LinearTiles, Tuning

        tuning = Tuning(
            linear=lambda call: LinearTiles(16 if call.tokens <= 16 else 64, 256),
            attention=lambda rows, width: AttentionTiles(16 if rows <= 16 else 64, 64, 2),
            experts=lambda tokens: LinearTiles(16, 256),
        )
        backend = importlib.import_module(f"ktcore_{self.chip.backend}.backend")
        self._set(backend, "implementations", lambda name, given=None: implementations(name, tuning))
        self._tiles = "large"
        return self

    def _versions(self) -> dict[str, str]:
        kernels = {"triton": f"{version('triton')}, interpreted", "tiles": self._tiles} if self.interpreted else {}
        return {"chip": self.chip.name, **kernels}

    def undo(self) -> None:
        """Everything as it was."""
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)
        self._before.clear()
        self.sim.run_all_on_device(False)
        self.sim.close()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _vendor(self) -> Any:
        """The vendor's parts over a runtime of their own, as the backend asks for them when it opens a device."""
        v, device = self.chip.backend, "sim"
        sim = SimRuntime(0, self.options)
        if v == "npu":
            from tests.vendors.npu_standin import npu_vendor

            return npu_vendor(sim, self.chip.properties, dict(self.chip.environment))
        module = Module(sim, self.chip.properties, self.chip.handle, self.chip.graph_type)
        functions = SimpleNamespace(cuLaunchHostFunc=HostFunctions(sim), hipLaunchHostFunc=HostFunctions(sim))
        kinds = importlib.import_module(f"ktcore_{v}.runtime")
        if v == "cuda":
            return kinds.CudaVendor(module, device, lambda: functions)
        if v == "rocm":
            return kinds.RocmVendor(module, device, lambda: 1, lambda: functions)
        return kinds.XpuVendor(module, device)

    def _runtime(self, kind: type, index: int, vendor: Any) -> Any:
        opened = kind(index, vendor)
        if self.interpreted:
            caps: Capabilities = opened.capabilities()
            opened._capabilities = replace(caps, features=caps.features - {"bf16"})
        close: Callable[[], None] = opened.close

        def close_all() -> None:
            close()
            vendor.module.runtime.close()

        opened.close = close_all
        return opened

    def _expectations(self, declared: Expectations) -> Expectations:
        precision = (
            declared.precision
            if not self.interpreted
            else {
                pattern: replace(p, compute=_half(p.compute), kv=_half(p.kv))
                for pattern, p in declared.precision.items()
            }
        )
        return replace(
            declared,
            mode=Mode.SIMULATED,
            precision=precision,
            versions=self._versions,
            fallbacks=lambda runtime: int(runtime._module.runtime.fallback_count()),
            fail_late=lambda runtime, stream: runtime._module.runtime.fail(stream.sim, "asked for by the kit"),
        )


def _half(name: Any) -> Any:
    return "float16" if name == "bfloat16" else name


def simulation(backend: str, chip: str | None = None, options: SimOptions | None = None) -> Simulation:
    """The simulation of a backend, of its first chip unless told otherwise.

    Raises:
        KeyError: there is no such chip.
    """
    found = [c for c in CHIPS if c.backend == backend and chip in (None, c.name)]
    if not found:
        raise KeyError(f"{backend} {chip}: known are {', '.join(f'{c.backend} {c.name}' for c in CHIPS)}")
    return Simulation(found[0], options)


def main() -> None:
    """Install, then be ktcore's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", required=True, choices=sorted({c.backend for c in CHIPS}))
    parser.add_argument("--chip")
    parser.add_argument("--quick", action="store_true", help="larger tiles than the backend's own: a third of the time")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    torch.set_num_threads(1)
    made = simulation(given.backend, given.chip).install()
    if given.quick and made.interpreted:
        made.large_tiles()
    elif given.quick:
        print(f"--quick changes nothing: no kernel of {given.backend} is interpreted here", file=sys.stderr)
    from ktcore.cli.main import main as ktcore

    sys.argv = ["ktcore", *(given.command[1:] if given.command[:1] == ["--"] else given.command)]
    ktcore()


if __name__ == "__main__":
    main()
