"""The kernels of residual streams in Triton's interpreter, against the reference operators in float64."""

from __future__ import annotations

import pytest
import torch
from ktcore_triton import streams
from ktcore_triton.streams import connect, gated_mean, leave, stream_norm

from ktcore.errors import BackendError
from ktcore.ops.streams import HyperConnectionSpec, connection_weights, entered, left
from ktcore.ops.streams import stream_norm as expected_norm


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(streams, "COLUMNS", 64)


@pytest.mark.parametrize(("n", "rounds"), [(4, 5), (3, 1), (2, 20)])
@pytest.mark.parametrize("eps", [1e-6, 0.2])
def test_hyper_connections_mix_as_the_reference_does(n: int, rounds: int, eps: float) -> None:
    spec = HyperConnectionSpec(150, n, eps, eps, rounds)
    x, y = torch.randn(7, n * 150) * torch.logspace(-2, 1, 7)[:, None], torch.randn(7, 150)
    fn, base, scale = torch.randn(spec.rows, n * 150) / 10, torch.randn(spec.rows), torch.rand(3) + 0.5
    pre, post, mix = connection_weights(spec, *(t.double() for t in (x, fn, base, scale)))
    found, carry = connect(x, x @ fn.T, base, scale, n, eps, eps, rounds)
    torch.testing.assert_close(found.double(), entered(x.double(), pre), atol=1e-5, rtol=2e-5)
    torch.testing.assert_close(carry[:, :n].double(), post, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(carry[:, n:].double(), mix.flatten(1), atol=1e-5, rtol=1e-5)
    expected = left(x.double(), y.double(), post, mix)
    torch.testing.assert_close(leave(x, y, carry, n).double(), expected, atol=2e-5, rtol=2e-5)


def test_the_end_of_a_model_has_no_carry() -> None:
    spec = HyperConnectionSpec(40, 4, 1e-6, 1e-6, 0, "")
    x, fn, base, scale = torch.randn(3, 160), torch.randn(4, 160), torch.randn(4), torch.rand(1)
    found, carry = connect(x, x @ fn.T, base, scale, 4, 1e-6, 1e-6, 0)
    (pre,) = connection_weights(spec, *(t.double() for t in (x, fn, base, scale)))
    torch.testing.assert_close(found.double(), entered(x.double(), pre), atol=1e-5, rtol=1e-5)
    assert carry.shape == (3, 0)


@pytest.mark.parametrize("n", [2, 3])
def test_gated_streams(n: int) -> None:
    x, up, y = torch.randn(5, n * 1100), torch.randn(5, n * 1100), torch.randn(5, 1100)
    weight, inject = torch.randn(n * 1100), torch.randn(5, n)
    normed = expected_norm(x.double(), weight.double(), n, 0.1)
    torch.testing.assert_close(stream_norm(x, weight, n, 0.1).double(), normed, atol=1e-5, rtol=1e-5)
    mean = (up.double().sigmoid() * normed).view(5, n, -1).mean(1)
    torch.testing.assert_close(gated_mean(normed.float(), up, n).double(), mean, atol=1e-5, rtol=1e-5)
    expected = x + (inject[..., None] * y[:, None]).flatten(1)
    torch.testing.assert_close(leave(x, y, inject, n), expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    x, z = torch.randn(2, 40), torch.randn(2, 24)
    with pytest.raises(BackendError, match="23 base values"):
        connect(x, z, torch.zeros(23), torch.ones(3), 4, 1e-6, 1e-6, 2)
    with pytest.raises(BackendError, match="a result"):
        leave(x, torch.zeros(2, 11), torch.zeros(2, 20), 4)
    with pytest.raises(BackendError, match="contiguous float32"):
        leave(x.half(), torch.zeros(2, 10), torch.zeros(2, 20), 4)
