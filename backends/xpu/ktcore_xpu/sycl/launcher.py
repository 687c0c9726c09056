"""Kernels on a SYCL queue: compiled when first used, kept for the process, launched on tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ktcore.errors import BackendError
from ktcore_xpu.sycl.build import cache_folder, shim_library
from ktcore_xpu.sycl.home import find_home
from ktcore_xpu.sycl.shim import Pointer, Shim, Value, arguments

LANES = 16
"""Width of a sub-group: every Intel GPU has it, and the CPU device too."""
FOLDER = Path(__file__).with_name("kernels")
TYPES = {torch.float32: "float", torch.float16: "sycl::half", torch.bfloat16: "brain"}
Define = int | str | bool
Argument = torch.Tensor | int | float | None


class Launcher:
    """Compiles and launches on one device's current queue.

    Args:
        shim: of the SYCL runtime.
        queue: gives the address of the `sycl::queue` to launch on now.
        blocking: wait after each launch: for tensors that the host reads without asking the queue.
        device_type: of the tensors that kernels may get.
    """

    def __init__(self, shim: Shim, queue: Callable[[], int], device_type: str, *, blocking: bool = False) -> None:
        self.shim = shim
        self.queue = queue
        self.blocking = blocking
        self._device_type = device_type
        self._facts: dict[str, str] | None = None
        self._bundles: dict[str, int] = {}
        self._kernels: dict[tuple[str, str], int] = {}

    @property
    def facts(self) -> dict[str, str]:
        """What the device says of itself."""
        if self._facts is None:
            self._facts = self.shim.describe(self.queue())
            if str(LANES) not in self._facts["widths"].split(","):
                raise BackendError(f"{self._facts['name']} has no sub-groups of {LANES}, but {self._facts['widths']}")
        return self._facts

    def kernel(self, file: str, name: str, **defines: Define) -> int:
        """The kernel `name` of a source file of this package, compiled with those macros."""
        text = source(file, **defines)
        found = self._kernels.get((text, name))
        if found is None:
            _ = self.facts
            bundle = self._bundles.get(text)
            if bundle is None:
                bundle = self._bundles[text] = self.shim.compile(self.queue(), text)
            found = self._kernels[text, name] = self.shim.kernel(bundle, name)
        return found

    def launch(self, kernel: int, groups: tuple[int, int, int], width: int, *values: Argument) -> None:
        """Put it on the current queue; tensors give their address.

        Raises:
            BackendError: a tensor is not contiguous or not on the device, or the runtime refuses.
        """
        if not all(groups):
            return
        queue = self.queue()
        self.shim.launch(queue, kernel, groups, width, arguments([self._value(v) for v in values]))
        if self.blocking:
            self.shim.wait(queue)

    def _value(self, value: Argument) -> Value:
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type != self._device_type:
            raise BackendError(f"a kernel of {self._device_type} got a tensor on {value.device}")
        if not value.is_contiguous():
            raise BackendError(f"a kernel got a tensor that is not contiguous: {list(value.shape)}")
        return Pointer(value.data_ptr())


def source(file: str, **defines: Define) -> str:
    """Text of one translation unit: what all kernels share, macros, the file.

    Macros come after SYCL's own headers, which use short names.
    """
    macros = "".join(f"#define {name} {_macro(value)}\n" for name, value in sorted(defines.items()))
    headers, shared = ((FOLDER / name).read_text() for name in ("headers.hpp", "common.hpp"))
    affine = (FOLDER / "affine.hpp").read_text() if "BITS" in defines else ""
    return f"{headers}\n#define LANES {LANES}\n{shared}\n{macros}{affine}\n{(FOLDER / file).read_text()}"


def xpu_launcher(index: int) -> Launcher:
    """For torch's XPU device: its current stream's queue, whatever that is at the launch."""

    def queue() -> int:
        return int(torch.xpu.current_stream(index).sycl_queue)

    return Launcher(load_shim(), queue, "xpu")


def cpu_launcher() -> Launcher:
    """For torch's CPU tensors on the OpenCL CPU device (package intel-opencl-rt): device code runs without a GPU."""
    home = find_home()
    # the package's own registration holds a path of the machine that it was made on
    os.environ.setdefault("OCL_ICD_FILENAMES", str(home.lib / "libintelocl.so"))
    shim = load_shim()
    queue = shim.new_queue("cpu")
    return Launcher(shim, lambda: queue, "cpu", blocking=True)


def load_shim() -> Shim:
    """Of the SYCL runtime found; compiled kernels are kept on disk if the user did not forbid it."""
    os.environ.setdefault("SYCL_CACHE_PERSISTENT", "1")
    os.environ.setdefault("SYCL_CACHE_DIR", str(cache_folder() / "kernels"))
    return Shim(shim_library(find_home()))


def launcher_for(runtime: Any) -> Launcher:
    """The launcher of a runtime's device; runtimes that bring one of their own (`sycl_launcher`) are asked for it."""
    own = getattr(runtime, "sycl_launcher", None)
    return own() if own is not None else xpu_launcher(runtime.device.index or 0)


def _macro(value: Define) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
