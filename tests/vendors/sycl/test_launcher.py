"""The shim on a real SYCL runtime: compiler errors, refusals, host calls in the queue's order."""

from __future__ import annotations

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from ktcore_triton.affine import affine_weight
from ktcore_xpu.runtime import XpuRuntime, XpuVendor
from ktcore_xpu.sycl.host import HostCalls
from ktcore_xpu.sycl.launcher import LANES, Launcher, source
from ktcore_xpu.sycl.linear import gemm_macros, linear

from ktcore.backend import HostCallbackMode
from ktcore.errors import BackendError

from .blocks import random_rows


def test_the_device_says_what_it_is(launcher: Launcher) -> None:
    assert launcher.facts["kind"] == "cpu"
    assert str(LANES) in launcher.facts["widths"].split(",")
    assert launcher.facts["in_order"] == "1"


def test_a_compilers_error_reaches_the_user(launcher: Launcher) -> None:
    with pytest.raises(BackendError, match=r"(?s)SYCL source does not compile.*undeclared identifier 'nonsense'"):
        launcher.shim.compile(launcher.queue(), "int f() { return nonsense; }")


def test_a_kernel_that_is_not_there_is_named(launcher: Launcher) -> None:
    with pytest.raises(BackendError, match="no kernel missing"):
        launcher.kernel("gemv.cpp", "missing", X="float", TOKENS=1, ROWS=8, BITS=4, ZERO=8, GROUP=32, SPAN=64,
                        OFFSET=0, SCALE="sycl::half")  # fmt: skip


def test_tensors_of_another_device_are_refused(launcher: Launcher) -> None:
    with pytest.raises(BackendError, match="got a tensor on meta"):
        launcher.launch(0, (1, 1, 1), 1, torch.empty(1, device="meta"))


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_the_tiled_product_compiles_with_matrix_instructions(
    launcher: Launcher, compute: torch.dtype, name: str
) -> None:
    """To SPIR-V: the CPU device cannot run them."""
    weight = affine_weight(name, random_rows(name, 64, 256), 64, 256)
    text = source("gemm.cpp", **gemm_macros(True, torch.zeros(1), weight, compute))
    launcher.shim.check_source(launcher.queue(), text)


def test_host_calls_run_in_the_order_of_the_queue(launcher: Launcher) -> None:
    """A call sees what kernels before it wrote; a kernel after it sees what the call wrote."""
    weight = affine_weight("Q4_0", random_rows("Q4_0", 8, 64), 8, 64)
    x, seen, threads = torch.zeros(1, 64), [], []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def call(data: int | None) -> None:
        time.sleep(0.2)
        seen.append(data)
        threads.append(threading.get_ident())
        x.fill_(1.0)

    address = ctypes.cast(call, ctypes.c_void_p).value or 0
    HostCalls(launcher.shim).launch(launcher.queue(), address, 42)
    y = linear(launcher, x, weight)
    launcher.shim.wait(launcher.queue())
    assert seen == [42]
    assert threads[0] != threading.get_ident()
    torch.testing.assert_close(y, weight.values().sum(1)[None], rtol=1e-5, atol=1e-5)


def test_a_host_call_of_nothing_is_refused(launcher: Launcher) -> None:
    with pytest.raises(BackendError, match="no function"):
        HostCalls(launcher.shim).launch(launcher.queue(), 0, 0)


def test_the_runtime_queues_host_work_by_the_same_call(launcher: Launcher) -> None:
    properties = SimpleNamespace(name="Arc", total_memory=1, sub_group_sizes=[16], has_fp64=False)
    module = SimpleNamespace(get_device_properties=lambda index: properties)
    runtime = XpuRuntime(0, XpuVendor(module, "cpu", lambda: HostCalls(launcher.shim)))
    assert runtime.host_callback is HostCallbackMode.EAGER
    assert runtime.capabilities().has("host_callback:eager")
    assert not runtime.capabilities().has("host_callback:none")
    done = []
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(done.append)
    address = ctypes.cast(call, ctypes.c_void_p).value or 0
    runtime.launch_host(SimpleNamespace(sycl_queue=launcher.queue()), address, 7)
    launcher.shim.wait(launcher.queue())
    assert done == [7]
