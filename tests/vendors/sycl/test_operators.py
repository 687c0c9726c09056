"""Modules that implementations load, run by the OpenCL CPU device, against the reference operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ktcore_xpu.sycl import implementations
from ktcore_xpu.sycl.launcher import Launcher

from ktcore.backend import Capabilities, Implementation, LoadRequest, Supported
from ktcore.backend.host import HostRuntime
from ktcore.ops.batch import StepBatch
from ktcore.ops.kv_cache import KVCacheSpec, attend, sequence_slots
from ktcore.ops.linear import LinearSpec
from ktcore.ops.moe import ExpertsSpec, RouterSpec, route, routed_experts

from .blocks import random_rows

DEVICE = Capabilities("xpu", "OpenCL CPU", None, frozenset({"f32", "f16"}), {"subgroups": "16"})


class CpuDevice(HostRuntime):
    """The host's memory, with kernels on the OpenCL CPU device."""

    def __init__(self, launcher: Launcher) -> None:
        super().__init__(DEVICE)
        self._launcher = launcher

    def sycl_launcher(self) -> Launcher:
        return self._launcher


class Stored:
    """A weight in a stored format, with the gguf package's values."""

    input_order = None

    def __init__(self, name: str, *shape: int, seed: int = 0) -> None:
        self.format, self.shape = name, shape
        rows, cols = int(np.prod(shape[:-1])), shape[-1]
        if name == "F32":
            self._raw = np.random.default_rng(seed).standard_normal((rows, cols), np.float32).view(np.uint8)
        else:
            self._raw = random_rows(name, rows, cols, seed)

    def raw(self) -> np.ndarray:
        return self._raw

    def tensor(self) -> torch.Tensor:
        kind = gguf.GGMLQuantizationType[self.format]
        return torch.from_numpy(np.array(gguf.quants.dequantize(self._raw, kind))).view(self.shape)

    def part(self, index: int) -> Any:
        each = self._raw.shape[0] // self.shape[0]
        return SimpleNamespace(raw=lambda: self._raw[index * each : (index + 1) * each])


def load(launcher: Launcher, spec: Any, **weights: Stored) -> Any:
    found: list[Implementation] = [i for i in implementations() if i.spec_type is type(spec)]
    assert len(found) == 1
    assert isinstance(found[0].supports(spec, DEVICE), Supported)
    runtime = CpuDevice(launcher)
    return found[0].load(LoadRequest("node", spec, weights, runtime, DEVICE))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 40])
def test_linear(launcher: Launcher, tokens: int) -> None:
    weight, bias, x = Stored("Q6_K", 48, 512), Stored("F32", 48), torch.randn(tokens, 512)
    module = load(launcher, LinearSpec(512, 48, "Q6_K", bias=True), weight=weight, bias=bias)
    expected = x.double() @ weight.tensor().double().T + bias.tensor().double()
    assert torch.equal(module.unpack(), weight.tensor())
    assert float((module(x) - expected).norm() / expected.norm()) < 2e-6


def test_router_and_experts(launcher: Launcher) -> None:
    torch.manual_seed(0)
    router = RouterSpec(256, 16, 4, "F32", renormalise=True)
    weight, x = Stored("F32", 16, 256), torch.randn(3, 256)
    ids, weights = load(launcher, router, weight=weight)(x)
    expected_ids, expected_weights = route(x @ weight.tensor().T, router, None)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)
    spec = ExpertsSpec(256, 512, 16, 4, "silu", "Q4_K", "Q4_K", "Q6_K")
    held = {"gate": Stored("Q4_K", 16, 512, 256), "up": Stored("Q4_K", 16, 512, 256, seed=1)}
    held["down"] = Stored("Q6_K", 16, 256, 512, seed=2)
    found = load(launcher, spec, **held)(x, ids, weights)
    values = [held[role].tensor().double() for role in ("gate", "up", "down")]
    expected = routed_experts(x.double(), ids, weights.double(), *values, spec)
    assert float((found - expected).norm() / expected.norm()) < 3e-6


@pytest.mark.parametrize(
    "spec",
    [KVCacheSpec("gqa", 8, 2, 64, 64), KVCacheSpec("gqa", 4, 4, 96, 64, window=9), KVCacheSpec("mla", 16, 1, 144, 128)],
    ids=["gqa", "window", "mla"],
)
def test_cache_over_several_steps(launcher: Launcher, spec: KVCacheSpec) -> None:
    torch.manual_seed(0)
    module = load(launcher, spec)
    module.allocate_pages(8, 16)
    table = torch.tensor([[5, 0, 3], [7, 2, -1]], dtype=torch.int32)
    width = 1 if spec.kind == "mla" else spec.kv_heads
    keys, values = torch.zeros(128, width, spec.key_dim), torch.zeros(128, width, spec.value_dim)
    lengths = (0, 0)
    for counts in ((20, 13), (1, 1), (3, 1)):
        lengths = tuple(old + new for old, new in zip(lengths, counts, strict=True))
        positions = torch.cat([torch.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
        tokens = sum(counts)
        step = StepBatch(torch.zeros(tokens).long(), positions, (0, counts[0], tokens), lengths, table, 16)
        k = torch.randn(tokens, width, spec.key_dim).half().float()
        v = torch.randn(tokens, width, spec.value_dim).half().float()
        if spec.kind == "mla":
            v = k[..., : spec.value_dim]
            module.append(step, k[:, 0, : spec.value_dim], k[:, 0, spec.value_dim :])
        else:
            module.append(step, k, v)
        keys[step.slots()], values[step.slots()] = k, v
        q = torch.randn(tokens, spec.heads, spec.key_dim)
        expected = torch.cat(
            [attend(q[span], keys[at], values[at], 0.1, spec.window) for span, at in sequence_slots(step)]
        )
        assert float((module.attend(step, q, 0.1) - expected).norm() / expected.norm()) < 1e-5
