"""The device runtime: torch's CUDA module, with the driver's host function on top."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ktcore_triton.native.runtime import NativeRuntime

from ktcore_cuda.devices import live


@dataclass(frozen=True)
class CudaVendor:
    """What the runtime calls of the vendor; another one stands in where there is no device.

    Attributes:
        module: torch.cuda, or what has its surface.
        device_type: of the module's tensors.
        driver: loads the driver's library.
    """

    module: Any
    device_type: str
    driver: Callable[[], Any]


def torch_vendor() -> CudaVendor:
    """The real ones: the driver's own entry point, whatever runtime library torch carries."""
    return CudaVendor(torch.cuda, "cuda", lambda: ctypes.CDLL("libcuda.so.1"))


class CudaRuntime(NativeRuntime):
    """One CUDA device."""

    def __init__(self, index: int, vendor: CudaVendor | None = None) -> None:
        vendor = vendor or torch_vendor()
        properties = vendor.module.get_device_properties(index)
        processors = int(properties.multi_processor_count)
        found = live(properties.name, properties.total_memory, properties.major, properties.minor, processors)
        super().__init__(vendor.module, vendor.device_type, index, found, vendor.driver(), "cuLaunchHostFunc")
