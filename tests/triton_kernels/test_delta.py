"""The gated delta net's kernels in the interpreter, against transformers' Qwen3-Next functions in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ktcore_triton.delta import Runs, convolution, delta_rule
from ktcore_triton.tuning import DeltaTiles
from torch.nn.functional import softplus
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn, torch_recurrent_gated_delta_rule

from ktcore.errors import BackendError

KEY_HEADS, VALUE_HEADS = 2, 6


def runs(tokens: tuple[int, ...], slots: tuple[int, ...], starts: tuple[bool, ...]) -> Runs:
    q_start = torch.tensor([0, *tokens]).cumsum(0).int()
    return Runs(q_start, torch.tensor(slots), torch.tensor(starts).int(), min(tokens), max(tokens))


def spans(r: Runs) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in zip(r.q_start, r.q_start[1:], strict=False)]


RAGGED = runs((1, 40, 4, 17, 2), (3, 0, 5, 1, 2), (False, True, False, False, True))
DECODE = runs((1, 1, 1), (4, 2, 0), (False, False, True))


@pytest.mark.parametrize("r", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize(("channels", "width"), [(200, 4), (64, 2), (40, 7)])
def test_convolution(r: Runs, channels: int, width: int) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(int(r.q_start[-1]), channels), torch.randn(channels, width)
    state = torch.randn(6, width - 1, channels)
    state[r.slots[r.starts != 0]] = float("nan")  # what is left there must not be read
    before = state.clone()
    found = convolution(x, weight.t().contiguous(), state, r)
    for i, (span, slot) in enumerate(zip(spans(r), r.slots.tolist(), strict=True)):
        inputs = torch.cat((torch.zeros_like(before[slot]) if r.starts[i] else before[slot], x[span])).double()
        expected = causal_conv1d_fn(inputs.T[None], weight.double(), None, activation="silu")[0].T[width - 1 :]
        torch.testing.assert_close(found[span].double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(state[slot], inputs[-(width - 1) :].float())
    others = [s for s in range(6) if s not in r.slots.tolist()]
    torch.testing.assert_close(state[others], before[others], rtol=0, atol=0)


def inputs(r: Runs, key: int, value: int) -> SimpleNamespace:
    g = torch.Generator().manual_seed(key)
    tokens = int(r.q_start[-1])
    return SimpleNamespace(
        mixed=torch.randn(tokens, 2 * KEY_HEADS * key + VALUE_HEADS * value, generator=g),
        a=torch.randn(tokens, VALUE_HEADS, generator=g) * 3,
        b=torch.randn(tokens, VALUE_HEADS, generator=g) * 2,
        # from almost no decay to a state that is gone after one token
        decay=-torch.tensor([1e-4, 0.01, 0.1, 1, 5, 40.0]),
        dt_bias=torch.randn(VALUE_HEADS, generator=g),
        state=torch.randn(6, VALUE_HEADS, key, value, generator=g),
    )


def expected(i: SimpleNamespace, r: Runs, index: int, tiled: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' recurrence of one sequence in float64: outputs and the state after it."""
    span, slot = spans(r)[index], int(r.slots[index])
    heads, key, value = i.state.shape[1:]
    q, k, v = i.mixed[span].double().split([KEY_HEADS * key, KEY_HEADS * key, heads * value], -1)
    q, k = (t.view(1, -1, KEY_HEADS, key) for t in (q, k))
    if tiled:
        q, k = (t.repeat(1, 1, heads // KEY_HEADS, 1) for t in (q, k))
    g = i.decay.double() * softplus(i.a[span].double() + i.dt_bias.double())
    state = torch.zeros_like(i.state[slot]) if r.starts[index] else i.state[slot]
    # its function computes in float32 whatever it is given
    out, last = in_float64(q, k, v.view(1, -1, heads, value), g[None], i.b[span].double().sigmoid()[None], state)
    return out[0], last[0]


def in_float64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch_recurrent_gated_delta_rule` with its casts to float32 undone."""
    kept = torch.Tensor.to
    try:
        torch.Tensor.to = lambda self, *a, **w: self if torch.float32 in a else kept(self, *a, **w)  # type: ignore
        return torch_recurrent_gated_delta_rule(  # type: ignore[no-any-return]
            q, k, v, g, beta, initial_state=state.double()[None], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
    finally:
        torch.Tensor.to = kept  # type: ignore[method-assign]


@pytest.mark.parametrize("r", [RAGGED, DECODE], ids=["ragged", "decode"])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("key", "value", "tiles"), [(32, 32, DeltaTiles(16, 32)), (24, 40, DeltaTiles())])
def test_delta_rule(r: Runs, key: int, value: int, tiles: DeltaTiles, tiled: bool) -> None:
    i = inputs(r, key, value)
    i.state[r.slots[r.starts != 0]] = float("nan")
    state = i.state.clone()
    found = delta_rule(i.mixed, i.a, i.b, i.decay, i.dt_bias, state, r, KEY_HEADS, tiled=tiled, tiles=tiles)
    for index, span in enumerate(spans(r)):
        out, last = expected(i, r, index, tiled)
        assert out.dtype == torch.float64
        assert float((found[span] - out).norm() / out.norm()) < 3e-6
        assert float((state[r.slots[index]] - last).norm() / last.norm()) < 3e-6


def test_keys_that_are_all_alike_cost_no_accuracy() -> None:
    r = runs((64,), (0,), (False,))
    i = inputs(r, 32, 32)
    i.mixed[:] = i.mixed[:1]
    i.mixed[:, 2 * KEY_HEADS * 32 :] = torch.randn(64, VALUE_HEADS * 32)
    i.b[:], i.decay[:] = 8.0, -1e-4
    state = i.state.clone()
    found = delta_rule(i.mixed, i.a, i.b, i.decay, i.dt_bias, state, r, KEY_HEADS)
    out, last = expected(i, r, 0)
    assert float((found - out).norm() / out.norm()) < 1e-5
    assert float((state[0] - last).norm() / last.norm()) < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    i = inputs(DECODE, 32, 32)
    with pytest.raises(BackendError, match="for states"):
        delta_rule(i.mixed, i.a[:2], i.b, i.decay, i.dt_bias, i.state, DECODE, KEY_HEADS)
    with pytest.raises(BackendError, match="contiguous float32"):
        delta_rule(i.mixed.half(), i.a, i.b, i.decay, i.dt_bias, i.state, DECODE, KEY_HEADS)
    with pytest.raises(BackendError, match="do not fit"):
        convolution(torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(2, 2, 8), DECODE)
