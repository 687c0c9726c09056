"""A stranger's backend: own linear layers and an own RMSNorm, on a device that is really the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ktcore.backend import (
    API_VERSION,
    Backend,
    BackendSpec,
    Capabilities,
    Implementation,
    LoadRequest,
    Probe,
    Supported,
    Unsupported,
    hookimpl,
)
from ktcore.backend.host import HostRuntime
from ktcore.errors import BackendError
from ktcore.ops import LinearSpec, RMSNormSpec

DECLARED = Capabilities(backend="stranger", name="stranger card", features=frozenset({"f32"}))
FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_K")


class StrangerLinear(Implementation):
    """Weights as float32, from the formats that the card's loader knows."""

    id = "stranger.linear"
    spec_type = LinearSpec
    handles = frozenset({"bias"})

    def supports(self, spec: LinearSpec, device: Capabilities) -> Supported | Unsupported:
        if spec.weight_format not in FORMATS:
            return Unsupported(f"the card's loader knows {', '.join(FORMATS)}, not {spec.weight_format}")
        return Supported()

    def packed_bytes(self, spec: LinearSpec, stored_bytes: int) -> int:
        return 4 * spec.in_features * spec.out_features + 4 * spec.out_features * spec.bias

    def load(self, request: LoadRequest) -> object:
        device = request.runtime.device
        weight = request.weights["weight"].tensor().to(device)
        bias = request.weights["bias"].tensor().to(device) if "bias" in request.weights else None
        return lambda x: torch.nn.functional.linear(x.float(), weight, bias)


class StrangerNorm(Implementation):
    """RMSNorm in float32."""

    id = "stranger.rms_norm"
    spec_type = RMSNormSpec
    handles = frozenset({"offset"})

    def supports(self, spec: RMSNormSpec, device: Capabilities) -> Supported | Unsupported:
        return Supported()

    def load(self, request: LoadRequest) -> object:
        spec = request.spec
        assert isinstance(spec, RMSNormSpec)
        stored = request.weights.get("weight")
        weight = None if stored is None else stored.tensor().to(request.runtime.device) + spec.offset
        return lambda x: torch.nn.functional.rms_norm(x.float(), (spec.dim,), weight, spec.eps)


class StrangerBackend(Backend):
    """What the entry names."""

    def implementations(self) -> list[Implementation]:
        return [StrangerLinear(), StrangerNorm()]

    def runtime(self, index: int = 0, threads: int | None = None) -> HostRuntime:
        if index != 0:
            raise BackendError(f"there is one card, stranger:0, not stranger:{index}")
        return HostRuntime(replace(DECLARED, live=True))


@hookimpl
def ktcore_register_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="stranger",
            api_version=API_VERSION,
            requirements="a stranger's card",
            entry="ktcore_stranger:StrangerBackend",
            probe=lambda: Probe(True, "one card", devices=1),
            declared=(DECLARED,),
        )
    ]


@hookimpl
def ktcore_rule_paths() -> list[Path]:
    return [Path(__file__).parent / "rules"]
