"""Products of quantised 8-bit floats in the interpreter, against torch's own numbers and float64 sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ktcore_triton.affine import affine_weight
from ktcore_triton.float8 import FLAVOURS, float8_linear, float8_weight, quantised, scaled_mm_linear
from ktcore_triton.operators import implementations

from ktcore.backend import Capabilities, LoadRequest, Unsupported
from ktcore.backend.host import HostRuntime
from ktcore.conformance.data.memory import MemoryCheckpoint
from ktcore.errors import BackendError
from ktcore.ops.linear import LinearSpec
from ktcore.weights.groups import pack_f8

from .stored import random_rows
from .test_fp8 import FORMAT, stored


@pytest.mark.parametrize("name", FLAVOURS)
def test_activations_become_torchs_numbers(name: str) -> None:
    torch.manual_seed(0)
    flavour = FLAVOURS[name]
    x = torch.randn(3, 512) * torch.logspace(-6, 4, 12).view(3, 4, 1).expand(3, 4, 128).reshape(3, 512)
    x[0, :128] = 0
    x[1, 128:256] *= torch.logspace(0, -9, 128)  # down to what becomes zero
    # ties between two numbers, and beyond the middle between the last and the next
    x[2, :128] = torch.cat((torch.arange(0, 63) + 0.5, -torch.arange(0, 64.0) - 0.25, torch.tensor([flavour.top])))
    codes, scales = quantised(x, flavour)
    groups = x.view(3, 4, 128)
    wanted = groups.abs().amax(-1) / flavour.top
    torch.testing.assert_close(scales.T, torch.where(wanted == 0, 1.0, wanted), rtol=1e-6, atol=0)
    numbers = (groups / scales.T[..., None]).clamp(-flavour.top, flavour.top).to(flavour.dtype).view(3, 512)
    assert torch.equal(codes.view(flavour.dtype).float(), numbers.float())
    assert not codes.view(flavour.dtype).float().isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FLAVOURS)
def test_what_is_not_a_number_has_no_codes_and_makes_its_token_nan(name: str, bad: float) -> None:
    torch.manual_seed(0)
    raw, _ = stored(72, 256)
    x = torch.randn(4, 256)
    clean = float8_linear(x, float8_weight(affine_weight(FORMAT, raw, 72, 256), FLAVOURS[name]))
    x[2, 77] = bad
    codes, scales = quantised(x, FLAVOURS[name])
    assert not codes[2, :128].any()
    assert not scales[0, 2].isfinite()
    found = float8_linear(x, float8_weight(affine_weight(FORMAT, raw, 72, 256), FLAVOURS[name]))
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


def test_every_code_keeps_its_value_in_the_other_flavour() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    weight = affine_weight(FORMAT, pack_f8(codes, np.full((2, 1), 0.25, np.float32)), 2, 128)
    ours, other = (float8_weight(weight, FLAVOURS[name]).values() for name in ("e4m3fn", "e4m3fnuz"))
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * 0.25
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(other, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FLAVOURS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_linear(name: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    raw, values = stored(72, 256)
    x, bias, flavour = torch.randn(tokens, 256), torch.randn(72), FLAVOURS[name]
    weight = float8_weight(affine_weight(FORMAT, raw, 72, 256), flavour)
    found = float8_linear(x, weight, bias)
    codes, scales = quantised(x, flavour)
    rounded = codes.view(flavour.dtype).double() * scales.T.double().repeat_interleave(128, 1)
    exact = rounded @ values.T + bias.double()
    assert float((found - exact).norm() / exact.norm()) < 2e-6
    whole = x.double() @ values.T + bias.double()
    # 3 bits of mantissa: a relative error of 2^-4 at most, evenly spread
    assert float((found - whole).norm() / whole.norm()) < 0.04


def test_torchs_product_is_asked_in_the_form_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, _ = stored(64, 256)
    weight = float8_weight(affine_weight(FORMAT, raw, 64, 256), FLAVOURS["e4m3fn"])

    def scaled_mm(a, b, scale_a, scale_b, out_dtype):  # type: ignore[no-untyped-def]
        for t, scale in ((a, scale_a), (b.t(), scale_b.t())):
            assert t.dtype == torch.float8_e4m3fn
            assert t.is_contiguous()
            assert scale.shape == (t.shape[0], t.shape[1] // 128)
            assert scale.stride() == (1, t.shape[0])
            assert scale.dtype == torch.float32
        wide = [t.float() * s.repeat_interleave(128, 1) for t, s in ((a, scale_a), (b.t(), scale_b.t()))]
        return (wide[0] @ wide[1].t()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    torch.manual_seed(0)
    x, bias = torch.randn(5, 256), torch.randn(64)
    torch.testing.assert_close(scaled_mm_linear(x, weight, bias), float8_linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    integers = affine_weight("Q8_0", random_rows("Q8_0", 2, 128), 2, 128)
    with pytest.raises(BackendError, match="no 8-bit floats"):
        float8_weight(integers, FLAVOURS["e4m3fn"])
    raw, _ = stored(8, 128)
    weight = float8_weight(affine_weight(FORMAT, raw, 8, 128), FLAVOURS["e4m3fn"])
    with pytest.raises(BackendError, match=r"x \[2, 64\] for a weight \[8, 128\]"):
        float8_linear(torch.zeros(2, 64), weight)
    assert float8_linear(torch.zeros(0, 128), weight).shape == (0, 8)


def test_the_operator_takes_the_flavour_of_its_device_and_no_other_format() -> None:
    operator = next(i for i in implementations("any") if i.id == "any.fp8_linear")
    raw, values = stored(64, 256)
    weight = MemoryCheckpoint().add("weight", (64, 256), FORMAT, raw.reshape(-1))
    spec, x = LinearSpec(256, 64, FORMAT), torch.randn(3, 256)
    for flavour in FLAVOURS:
        device = Capabilities("any", "device", features=frozenset({"f32", f"fp8:{flavour}"}))
        assert not isinstance(operator.supports(spec, device), Unsupported)
        module = operator.load(LoadRequest("n", spec, {"weight": weight}, HostRuntime(device), device))
        assert torch.equal(module.unpack(), values.float())
        whole = x.double() @ values.T
        assert float((module(x) - whole).norm() / whole.norm()) < 0.04
        with pytest.raises(BackendError, match="product is 'cublas'"):
            options = {"product": "cublas"}
            operator.load(LoadRequest("n", spec, {"weight": weight}, HostRuntime(device), device, options=options))
    refused = operator.supports(spec, Capabilities("any", "old", features=frozenset({"f32"})))
    assert isinstance(refused, Unsupported)
    assert "old has no FP8 products" in refused.reason
    assert isinstance(operator.supports(LinearSpec(256, 64, "Q8_0"), device), Unsupported)
