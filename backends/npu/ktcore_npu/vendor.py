"""What the backend calls of the vendor: torch_npu, its device module, and the ACL runtime."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ktcore.errors import BackendError


@dataclass(frozen=True)
class NpuVendor:
    """The vendor's parts; others stand in where there is no device.

    Attributes:
        ops: torch_npu, for its operators.
        module: torch_npu.npu, the device module.
        device_type: of the module's tensors.
        acl: loads libascendcl.
        environment: the process's variables, which torch_npu has read as well.
    """

    ops: Any
    module: Any
    device_type: str
    acl: Callable[[], Any]
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


def torch_vendor() -> NpuVendor:
    """The real ones. Importing torch_npu fails where CANN is missing."""
    ops = import_module("torch_npu")
    return NpuVendor(ops, ops.npu, "npu", _acl)


def _acl() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libascendcl.so")
    except OSError as error:
        raise BackendError(f"the ACL runtime does not load: {error}", "source CANN's set_env.sh") from error
