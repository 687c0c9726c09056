"""Loads the native half on demand: only then does torch's PrivateUse1 key get the name "sim", for the whole process."""

from __future__ import annotations

import atexit
import threading
import types
from typing import Any

import torch
from torch.utils.backend_registration import rename_privateuse1_backend

from ktcore.errors import BackendError

_lock = threading.Lock()
UNNAMED = "privateuseone"


def privateuse1_name() -> str:
    """The name that torch's PrivateUse1 key has in this process."""
    return str(torch._C._get_privateuse1_backend_name())


def load_native() -> types.ModuleType:
    """The native module, with the device registered in torch as "sim".

    Raises:
        BackendError: it is not built, or another package has taken the PrivateUse1 key.
    """
    with _lock:
        taken = privateuse1_name()
        if taken not in (UNNAMED, "sim"):
            raise BackendError(f"torch's PrivateUse1 key belongs to '{taken}' in this process", "use another process")
        try:
            from ktcore_sim import _C as native
        except ImportError as error:
            raise BackendError(f"the native module of ktcore-sim does not load: {error}", "reinstall it") from error
        if taken == UNNAMED:
            rename_privateuse1_backend("sim")
            torch._register_device_module("sim", _device_module(native))  # type: ignore[no-untyped-call]
            # worker threads must not outlive the interpreter that their host functions call
            atexit.register(native.close_all)
        return native


def _device_module(native: Any) -> types.ModuleType:
    """What torch wants to find under `torch.sim`."""

    def index_of(device: Any = None) -> int:
        if device is None:
            return int(native.current_device())
        found = device if isinstance(device, int) else torch.device(device).index
        return int(native.current_device()) if found is None else int(found)

    module = types.ModuleType("torch.sim")
    members: dict[str, Any] = {
        "is_available": lambda: native.device_count() > 0,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": native.device_count,
        "current_device": native.current_device,
        "set_device": lambda device: native.set_device(index_of(device)),
        "synchronize": lambda device=None: native.synchronize(index_of(device)),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    for name, member in members.items():
        setattr(module, name, member)
    return module
