"""The device runtime: torch drives AMD devices under its CUDA names; the host function comes from the HIP runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ktcore_triton.native.runtime import NativeRuntime

from ktcore.errors import BackendError
from ktcore_rocm.devices import live


@dataclass(frozen=True)
class RocmVendor:
    """What the runtime calls of the vendor; another one stands in where there is no device.

    Attributes:
        module: torch.cuda of a ROCm build, or what has its surface.
        device_type: of the module's tensors; torch's ROCm builds call it "cuda" too.
        device_count: devices that a ROCm build of torch finds.
        runtime: loads the HIP runtime's library.
    """

    module: Any
    device_type: str
    device_count: Callable[[], int]
    runtime: Callable[[], Any]


def torch_vendor() -> RocmVendor:
    """The real ones; a torch that is not built for ROCm has no devices."""
    return RocmVendor(
        torch.cuda, "cuda", lambda: torch.cuda.device_count() if torch.version.hip is not None else 0, hip_runtime
    )


class RocmRuntime(NativeRuntime):
    """One AMD device."""

    def __init__(self, index: int, vendor: RocmVendor | None = None) -> None:
        vendor = vendor or torch_vendor()
        properties = vendor.module.get_device_properties(index)
        found = live(
            properties.name,
            properties.total_memory,
            properties.gcnArchName,
            properties.warp_size,
            int(properties.multi_processor_count),
        )
        super().__init__(vendor.module, vendor.device_type, index, found, vendor.runtime(), "hipLaunchHostFunc")


def hip_runtime(mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    """The library that torch has already loaded; a second copy would not know its streams.

    Args:
        mode: RTLD_GLOBAL lets libraries that are loaded after it find its functions.

    Raises:
        BackendError: none is loaded.
    """
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            path = line.rstrip().partition("/")[2]
            if "libamdhip64" in path:
                return ctypes.CDLL(f"/{path}", mode=mode)
    raise BackendError("torch has loaded no HIP runtime (libamdhip64)", "reinstall the ROCm build of torch")
