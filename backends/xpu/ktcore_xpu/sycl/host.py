"""C functions called in the order of an XPU stream: SYCL's host_task, the only host callback that Intel GPUs have."""

from __future__ import annotations

from ktcore.errors import BackendError
from ktcore_xpu.sycl.launcher import load_shim
from ktcore_xpu.sycl.shim import Shim


class HostCalls:
    """What a runtime's `launch_host` calls; its mode is `HostCallbackMode.EAGER`: not part of graphs.

    Args:
        shim: the one to use; by default that of the SYCL runtime found.

    Raises:
        BackendError: the shim cannot be built here.
    """

    def __init__(self, shim: Shim | None = None) -> None:
        self._shim = shim or load_shim()

    def launch(self, queue: int, function: int, data: int) -> None:
        """Call `function(data)` when all work put on the queue before is done; later work waits until it returned.

        Args:
            queue: address of a `sycl::queue`: `torch.xpu.Stream.sycl_queue`.
            function: address of a C function `void (*)(void *)`; it runs on a thread of the SYCL runtime and must not
                call SYCL or take the interpreter's lock for long.

        Raises:
            BackendError: a null function, or the runtime refuses.
        """
        if not function:
            raise BackendError("a host call of no function")
        self._shim.host(queue, function, data)
