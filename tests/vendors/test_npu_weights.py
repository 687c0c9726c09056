"""Integer weights of the NPU backend: packed is what the checkpoint holds, zero points and act-order included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ktcore_sim._C", reason="the simulated accelerator is not built: pip install ./backends/sim")
pytest.importorskip("triton", reason="other vendors' kernels are interpreted by Triton")

from ktcore_npu.operators.experts import NpuExperts
from ktcore_npu.operators.linear import NpuLinear, Plain, Quantised
from ktcore_npu.runtime import NpuRuntime
from ktcore_sim.options import SimOptions
from ktcore_sim.runtime import SimRuntime

from ktcore.backend import LoadRequest
from ktcore.conformance.data.memory import MemoryCheckpoint
from ktcore.ops import ExpertsSpec, LinearSpec
from ktcore.ops.moe import routed_experts
from ktcore.weights.groups import group_formats, pack_int, pack_nibbles
from ktcore.weights.ref import Weight
from tests.vendors.npu_standin import npu_vendor
from tests.vendors.simulate import CHIPS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]
HALF = 2.0**-8
"""What a rounding to bfloat16 changes at most, of a value."""


class Stored(MemoryCheckpoint):
    """With columns in an order of their own."""

    order = np.random.default_rng(3).permutation(256)

    def input_order(self, name: str) -> np.ndarray:
        return self.order


def stored(fmt: str, shape: tuple[int, ...], seed: int = 0, zero: int | None = None) -> Weight:
    """Random codes with bfloat16 scales; zero points are random unless given."""
    found, rng = group_formats()[fmt], np.random.default_rng([seed, *shape])
    rows, cols = int(np.prod(shape[:-1])), shape[-1]
    most = 1 << found.bits
    codes = rng.integers(0, most, (rows, cols), dtype=np.uint8)
    scales = (rng.uniform(0.5, 2, (rows, cols // found.group)) / most).astype(np.float32)
    bits = (scales.view(np.uint32) >> 16).astype(np.uint16)
    zeros = rng.integers(0, most + 1, scales.shape) if zero is None else zero
    packed = pack_nibbles(codes) if found.bits == 4 else codes
    return Stored().add("w", shape, fmt, pack_int(packed, bits, zeros, found.group, bfloat16=True).reshape(-1))


@pytest.fixture(scope="module")
def runtime() -> Iterator[NpuRuntime]:
    chip = next(c for c in CHIPS if c.backend == "npu")
    sim = SimRuntime(0, SimOptions())
    sim.run_all_on_device()
    opened = NpuRuntime(0, npu_vendor(sim, chip.properties, dict(chip.environment)))
    yield opened
    opened.close()
    sim.run_all_on_device(False)
    sim.close()


def load(implementation: Any, spec: Any, weights: dict[str, Weight], runtime: NpuRuntime) -> Any:
    return implementation.load(LoadRequest("node", spec, weights, runtime, runtime.capabilities()))


@pytest.mark.parametrize("zero", [None, "middle"])
@pytest.mark.parametrize("fmt", ["INT4_G32", "INT4_G64", "INT4_G128", "INT8_G32", "INT8_G128", "INT4_G128_ORDERED"])
def test_a_linear_of_integers(fmt: str, zero: str | None, runtime: NpuRuntime) -> None:
    bits = group_formats()[fmt].bits
    weight = stored(fmt, (40, 256), zero=None if zero is None else 1 << (bits - 1))
    module = load(NpuLinear(), LinearSpec(256, 40, fmt), {"weight": weight}, runtime)
    assert isinstance(module, Quantised)
    assert module.layout == f"int{bits}.nd"
    assert (module._offset is None) == (zero is not None)
    true = weight.tensor()
    in_stored_order = true if "ORDERED" not in fmt else true[:, torch.from_numpy(Stored.order)]
    assert torch.equal(module.unpack(), in_stored_order), "scales and zero points are exact in bfloat16"
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    got = module(x.to(runtime.device)).cpu().double()
    wanted = x.bfloat16().double() @ true.double().t()
    assert float((got - wanted).abs().max()) <= HALF * float(wanted.abs().max())


def test_one_group_a_row_is_one_scale_a_column(runtime: NpuRuntime) -> None:
    weight = stored("INT4_G128", (24, 128))
    module = load(NpuLinear(), LinearSpec(128, 24, "INT4_G128"), {"weight": weight}, runtime)
    assert module._group == 0
    assert torch.equal(module.unpack(), weight.tensor())
    assert torch.isfinite(module(torch.ones(1, 128).to(runtime.device)).cpu()).all()


@pytest.mark.parametrize(("out", "kind"), [(12, Plain), (8, Plain), (16, Quantised)])
def test_columns_that_do_not_fill_words_are_held_in_16_bits(out: int, kind: type, runtime: NpuRuntime) -> None:
    weight = stored("INT4_G32", (out, 64))
    spec = LinearSpec(64, out, "INT4_G32")
    module = load(NpuLinear(), spec, {"weight": weight}, runtime)
    assert isinstance(module, kind)
    planned = NpuLinear().packed_bytes(spec, 0)
    assert (planned == 2 * 64 * out) == (kind is Plain)


@pytest.mark.parametrize("fmt", ["INT4_G32", "INT4_G64", "INT8_G32"])
def test_experts_of_integers(fmt: str, runtime: NpuRuntime) -> None:
    spec = ExpertsSpec(128, 64, 6, 3, "silu", fmt, fmt, fmt)
    weights = {
        "gate": stored(fmt, (6, 64, 128), 1),
        "up": stored(fmt, (6, 64, 128), 2),
        "down": stored(fmt, (6, 128, 64), 3),
    }
    module = load(NpuExperts(), spec, weights, runtime)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 128, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(9)])
    ids[2, 1] = ids[5, 0] = -1
    shares = torch.rand(9, 3, generator=generator)
    got = module(*(t.to(runtime.device) for t in (x, ids, shares))).cpu()
    wanted = routed_experts(
        x.double(), ids, shares.double(), *(weights[r].tensor().double() for r in ("gate", "up", "down")), spec
    )
    assert float((got - wanted).abs().max()) <= 4 * HALF * float(wanted.abs().max())
