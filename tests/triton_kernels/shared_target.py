"""The shared operators as a backend of the host: kernels run in Triton's interpreter, on the host's tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from ktcore_triton.operators import implementations

from ktcore.backend import API_VERSION, Backend, BackendSpec, Capabilities, Implementation, Probe, Registry
from ktcore.backend.discovery import Found
from ktcore.backend.host import HostRuntime
from ktcore.backend.record import BackendRecord
from ktcore.conformance import Expectations, Precision
from ktcore.conformance.target import Target

NAME = "shared"
# without "bf16", in which the interpreter's arithmetic is wrong: products run in float16
DEVICE = Capabilities(NAME, "Triton's interpreter", features=frozenset({"f32", "f16"}), live=True)
HALF = Precision(compute="float16", kv="float16")


class SharedBackend(Backend):
    """All shared operators, on the host."""

    def implementations(self) -> Sequence[Implementation]:
        return implementations(NAME)

    def runtime(self, index: int = 0, threads: int | None = None) -> HostRuntime:
        return HostRuntime(DEVICE)


def shared_target() -> Target:
    """As the conformance kit takes it."""
    home = ModuleType("ktcore_shared_under_test")
    home.make = SharedBackend  # type: ignore[attr-defined]
    sys.modules[home.__name__] = home
    spec = BackendSpec(
        name=NAME,
        api_version=API_VERSION,
        requirements="nothing",
        entry=f"{home.__name__}:make",
        probe=lambda: Probe(True, "the host", devices=1),
        declared=(DEVICE,),
        accelerator=False,
    )
    record = BackendRecord(NAME, "shared 0", spec)
    precision = {
        f"{NAME}.{op}": HALF
        for op in ("linear", "kv_cache", "mla", "experts", "embedding", "index_cache", "block_index_cache")
    }
    return Target(Registry([Found((record,))]), NAME, Expectations(precision=precision))
