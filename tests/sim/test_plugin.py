"""The package as a plugin: inert until a runtime is opened, honest when it cannot run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from ktcore_sim.backend import SimBackend
from ktcore_sim.options import SimOptions
from ktcore_sim.plugin import ktcore_register_backends

from ktcore.backend import BackendState, GraphMode, HostCallbackMode, Registry
from ktcore.errors import BackendError
from ktcore.ops import Spec

Run = Callable[..., "subprocess.CompletedProcess[str]"]
INERT = """
import sys, threading, torch
from ktcore.backend import Registry
registry = Registry.discover(["cpu", "sim"])
record = registry.known("sim")
print(record.state.value, "|", record.reason)
ids = [i for i in registry.implementations() if i.startswith("sim.")]
assert len(ids) == 13, ids
assert "ktcore_sim._C" not in sys.modules
assert torch._C._get_privateuse1_backend_name() == "privateuseone"
threads = threading.active_count()
{more}
"""
OPENS = """
runtime = registry.runtime("sim:1")
assert torch._C._get_privateuse1_backend_name() == "sim"
assert str(runtime.device) == "sim:1"
x = torch.ones(2, device="sim:1") + 1
print(x.cpu().tolist(), x.device)
runtime.close()
"""


def test_listing_and_probing_load_nothing_and_opening_does(run_python: Run) -> None:
    done = run_python(INERT.format(more=OPENS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "loaded | 2 simulated devices, no hardware",
        "[2.0, 2.0] sim:1",
    ]


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("KTCORE_SIM_DEVICES", "0", "no device is simulated"),
        ("KTCORE_SIM_DEVICES", "many", "is no number from 0 to 16"),
        ("KTCORE_SIM_MEMORY", "lots", "cannot be read"),
        ("KTCORE_SIM_HOST_CALLBACK", "sometimes", "cannot be read"),
    ],
)
def test_a_setting_that_cannot_be_used_makes_it_unavailable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    record = Registry.discover(["cpu", "sim"]).known("sim")
    assert record is not None
    assert record.state is BackendState.UNAVAILABLE
    assert reason in record.reason


def test_another_owner_of_the_key_makes_it_unavailable(run_python: Run) -> None:
    code = """
import torch
torch.utils.rename_privateuse1_backend("other")
from ktcore.backend import Registry
print(Registry.discover(["sim"]).known("sim").reason)
from ktcore_sim.runtime import SimRuntime
SimRuntime()
"""
    done = run_python(code)
    assert "belongs to 'other'" in done.stdout
    assert done.returncode == 1
    assert "PrivateUse1 key belongs to 'other'" in done.stderr


def test_a_process_that_leaves_work_behind_ends_in_peace(run_python: Run) -> None:
    code = """
import ctypes, torch
from ktcore_sim.runtime import SimRuntime
runtime = SimRuntime()
stream = runtime.new_stream()
call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: print("called"))
runtime.sleep(stream, 0.3)
runtime.launch_host(stream, ctypes.cast(call, ctypes.c_void_p).value, 0)
with runtime.use_stream(stream):
    x = torch.ones(5, device=runtime.device)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "called\n"), done.stderr


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MEMORY": "1.5GiB",
        "SEED": "7",
        "DELAY_US": "20",
        "HOST_CALLBACK": "eager",
        "GRAPH": "none",
    }.items():
        monkeypatch.setenv(f"KTCORE_SIM_{name}", value)
    made = SimOptions.from_environment(seed=9)
    assert made == SimOptions(
        memory=3 << 29, seed=9, delay_us=20.0, host_callback=HostCallbackMode.EAGER, graph=GraphMode.NONE
    )


def test_what_is_declared_is_what_a_device_reports() -> None:
    (spec,) = ktcore_register_backends()
    runtime = SimBackend(SimOptions()).runtime(0)
    live, declared = runtime.capabilities(), spec.declared[0]
    runtime.close()
    assert live.features == declared.features
    assert live.properties == declared.properties
    assert live.live
    assert not declared.live
    assert "simulated" in declared.features


REFERENCES = {
    "sampling",
    "state_cache",
    "gated_delta_net",
    "kimi_delta_attention",
    "hyper_connection",
    "gated_streams",
    "stream_branch",
    "stream_end",
    "compressed_attention",
    "entry_cache",
    "entry_indexer",
    "window_cache",
    "block_indexer",
    "block_index_cache",
    "ngram",
    "ngram_table",
    "preceded",
}
"""Operators that it leaves to the references: what some families alone have."""


def test_there_is_an_implementation_of_every_other_operator() -> None:
    made = [i.spec_type for i in SimBackend().implementations()]
    assert len(set(made)) == len(made)
    assert set(made) == {spec for spec in _specs(Spec) if spec.op not in {"?", *REFERENCES}}
    assert {spec.op for spec in _specs(Spec)} >= REFERENCES


def test_unknown_devices_are_refused_by_the_registry() -> None:
    registry = Registry.discover(["cpu", "sim"])
    assert registry.known("sim").state is BackendState.LOADED
    with pytest.raises(BackendError, match="there is no device sim:7"):
        registry.runtime("sim:7")


def _specs(base: type[Spec]) -> set[type[Spec]]:
    return {sub for s in base.__subclasses__() if s.__module__.startswith("ktcore.ops") for sub in ({s} | _specs(s))}
