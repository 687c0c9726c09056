"""Device memory: out of the host's reach, poisoned, capped, and watched at its edges and after it was freed."""

from __future__ import annotations

import ctypes
import signal
import subprocess
from collections.abc import Callable

import pytest
import torch
from ktcore_sim.runtime import SimRuntime

from .conftest import Gate, Open

Run = Callable[..., "subprocess.CompletedProcess[str]"]
TOUCH = """
import ctypes, torch
from ktcore_sim.runtime import SimRuntime
runtime = SimRuntime()
x = torch.arange(8.0, device=runtime.device)
runtime.synchronize()
print("before", flush=True)
{touch}
print("not caught, touches:", runtime.host_touches(), flush=True)
runtime.synchronize()
{again}
print("again:", runtime.host_touches())
"""
READ = "ctypes.string_at(x.data_ptr() + 4, 4)"
WRITE = "ctypes.memset(x.data_ptr(), 0, 4)"


@pytest.mark.parametrize("touch", [READ, WRITE])
def test_a_host_access_is_reported_and_ends_the_process(run_python: Run, touch: str) -> None:
    done = run_python(TOUCH.format(touch=touch, again=touch))
    assert done.stdout == "before\n"
    assert done.returncode == -signal.SIGSEGV
    assert "the host touched device memory (sim:0, byte " in done.stderr
    assert "of an allocation of 32 bytes" in done.stderr


def test_host_accesses_can_be_counted_instead(run_python: Run) -> None:
    done = run_python(TOUCH.format(touch=READ, again=WRITE), KTCORE_SIM_HOST_TOUCH="count")
    assert done.returncode == 0, done.stderr
    # guarded again after a synchronize
    assert done.stdout == "before\nnot caught, touches: 1\nagain: 2\n"


def test_a_fault_elsewhere_is_left_to_others(run_python: Run) -> None:
    code = "import ctypes\nfrom ktcore_sim.runtime import SimRuntime\nSimRuntime()\nctypes.string_at(8, 4)"
    done = run_python(code)
    assert done.returncode == -signal.SIGSEGV
    assert "ktcore_sim" not in done.stderr


def test_cpu_kernels_are_not_run_on_device_addresses(runtime: SimRuntime) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=runtime.device) + torch.ones(3)
    with pytest.raises((RuntimeError, TypeError)):
        torch.ones(3, device=runtime.device).numpy()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_fresh_memory_is_nan(runtime: SimRuntime, dtype: torch.dtype) -> None:
    assert torch.empty(1000, dtype=dtype, device=runtime.device).cpu().float().isnan().all()


def test_reused_memory_is_poisoned_again(runtime: SimRuntime) -> None:
    for _ in range(600):  # more than wait in quarantine
        x = torch.empty(500, device=runtime.device)
        assert x.cpu().isnan().all()
        x.fill_(1.0)
        del x


def test_fresh_integers_are_out_of_any_range(runtime: SimRuntime) -> None:
    assert (torch.empty(64, dtype=torch.int64, device=runtime.device).cpu() > 2**61).all()
    assert (torch.empty(64, dtype=torch.int32, device=runtime.device).cpu() == 2**31 - 1).all()


@pytest.mark.parametrize("behind", [0, 1, 63])
@pytest.mark.parametrize("count", [1, 1000, 1024, 100_000])
def test_an_overrun_is_found_at_the_next_synchronize(runtime: SimRuntime, count: int, behind: int) -> None:
    stream = runtime.new_stream()
    x = torch.empty(count, device=runtime.device)
    runtime.fill_bytes(x.data_ptr() + 4 * count + behind, 0, 1, stream)
    with pytest.raises(RuntimeError, match=f"byte {behind} behind an allocation of {4 * count} bytes"):
        runtime.synchronize()
    runtime.synchronize()


def test_an_overrun_is_found_when_the_memory_is_given_back(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    x = torch.empty(1000, device=runtime.device)
    runtime.fill_bytes(x.data_ptr() + 4000 + 70, 0, 1, stream)
    runtime.synchronize()  # looks at the first 64 bytes only
    del x
    with pytest.raises(RuntimeError, match="byte 70 behind an allocation of 4000 bytes"):
        runtime.synchronize()


def test_an_overrun_beyond_the_pattern_faults_on_the_stream_and_the_stream_goes_on(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    x = torch.zeros(1000, device=runtime.device)
    runtime.synchronize()
    runtime.fill_bytes(x.data_ptr() + 4096, 0, 1, stream)
    with pytest.raises(RuntimeError, match=r"illegal memory access: sim:0, byte 4096 of an allocation of 4000 bytes"):
        runtime.synchronize(stream)
    with runtime.use_stream(stream):
        assert (x + 1).sum().item() == 1000


def test_work_on_memory_that_was_given_back_is_an_error(runtime: SimRuntime) -> None:
    owner, other = runtime.new_stream(), runtime.new_stream()
    with runtime.use_stream(owner):
        x = torch.ones(100, device=runtime.device)
    runtime.synchronize()
    with Gate(runtime, other):
        with runtime.use_stream(other):
            y = x + 1
        del x  # `owner` gives it back at once, `other` has not read it
        runtime.synchronize(owner)
    with pytest.raises(RuntimeError, match="use after free"):
        runtime.synchronize()
    assert y.cpu().isnan().all()


def test_record_stream_keeps_memory_until_the_other_stream_is_done(runtime: SimRuntime) -> None:
    owner, other = runtime.new_stream(), runtime.new_stream()
    with runtime.use_stream(owner):
        x = torch.ones(100, device=runtime.device)
    runtime.synchronize()
    with Gate(runtime, other):
        with runtime.use_stream(other):
            y = x + 1
            x.record_stream(torch.accelerator.current_stream(runtime.device))
        del x
        runtime.synchronize(owner)
    runtime.synchronize()
    assert (y.cpu() == 2).all()


def test_memory_written_after_it_was_given_back_is_found_when_it_is_reused(runtime: SimRuntime) -> None:
    stream = runtime.new_stream()
    x = torch.ones(100, device=runtime.device)
    address = x.data_ptr()
    del x
    runtime.synchronize()
    runtime.fill_bytes(address, 0, 4, stream)
    runtime.synchronize()
    with pytest.raises(RuntimeError, match="write after free"):
        for _ in range(400):  # quarantine holds 256
            torch.empty(100, device=runtime.device)
            runtime.synchronize()


def test_the_cap_gives_out_of_memory_and_what_is_freed_can_be_had_again(open_runtime: Open) -> None:
    runtime = open_runtime(memory=64 << 20)
    runtime.peak_memory(reset=True)  # earlier tests of this process had peaks of their own

    def take(mebibytes: int) -> torch.Tensor:
        return torch.empty(mebibytes << 20, dtype=torch.uint8, device=runtime.device)

    held = [take(40)]
    assert runtime.memory().total == 64 << 20
    assert runtime.memory().free == 24 << 20
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: tried to allocate 41943040 bytes, 41943040 of"):
        take(40)
    for _ in range(20):  # no room is lost to fragments or to quarantine
        held.clear()
        held.append(take(60))
    assert runtime.peak_memory(reset=True) == 60 << 20


def test_devices_have_memory_of_their_own(open_runtime: Open) -> None:
    zero, one = open_runtime(0), open_runtime(1)
    x, y = torch.ones(1000, device=zero.device), torch.zeros(1000, device=one.device)
    assert (zero.memory().total - zero.memory().free, one.memory().total - one.memory().free) == (4000, 4000)
    y.copy_(x)
    assert y.cpu().sum() == 1000
    with pytest.raises(RuntimeError, match="same device"):
        x + y


def test_resize_keeps_what_was_there(runtime: SimRuntime) -> None:
    x = torch.arange(8.0, device=runtime.device)
    x.resize_(2000)
    assert torch.equal(x[:8].cpu(), torch.arange(8.0))
    assert x[8:].cpu().isnan().all()


def test_pinned_memory_is_ordinary_to_the_host(runtime: SimRuntime) -> None:
    x = runtime.pinned_buffer((4, 3), torch.float32)
    assert x.is_pinned()
    assert not torch.empty(3).is_pinned()
    ctypes.memset(x.data_ptr(), 0, 48)
    assert x.sum() == 0
