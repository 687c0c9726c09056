"""The gated delta net against transformers' Qwen3-Next functions, and its states as slots."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import (
    causal_conv1d_fn,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from ktcore.backend.reference.linear_attention import StateSlots
from ktcore.errors import BackendError
from ktcore.ops.batch import StepBatch
from ktcore.ops.linear_attention import (
    StateCacheSpec,
    causal_conv,
    delta_rule,
    delta_rule_chunked,
    l2_normalised,
)

HEADS, KEY, VALUE = 6, 16, 24


def _inputs(tokens: int) -> SimpleNamespace:
    g = torch.Generator().manual_seed(tokens)
    return SimpleNamespace(
        q=torch.randn(tokens, HEADS // 2, KEY, generator=g),
        k=torch.randn(tokens, HEADS // 2, KEY, generator=g),
        v=torch.randn(tokens, HEADS, VALUE, generator=g),
        # from almost no decay to a state that is gone after one token
        g=-torch.rand(tokens, HEADS, generator=g) * torch.tensor([0.01, 0.1, 1, 3, 10, 40]),
        beta=torch.rand(tokens, HEADS, generator=g),
        state=torch.randn(HEADS, KEY, VALUE, generator=g),
    )


@pytest.mark.parametrize("rule", [delta_rule, delta_rule_chunked])
@pytest.mark.parametrize("tokens", [1, 5, 64, 150])
def test_both_forms_match_transformers(rule, tokens: int) -> None:  # type: ignore[no-untyped-def]
    i = _inputs(tokens)
    q, k = (l2_normalised(t).repeat_interleave(2, 1) for t in (i.q, i.k))
    out, state = rule(q * KEY**-0.5, k, i.v, i.g, i.beta, i.state)
    # repeated for their heads here: of transformers' versions some do it themselves, others leave it to the caller
    theirs = (i.q.repeat_interleave(2, 1)[None], i.k.repeat_interleave(2, 1)[None], i.v[None], i.g[None], i.beta[None])
    # transformers sums decays of a chunk in float32
    for function, within in ((torch_recurrent_gated_delta_rule, 1e-5), (torch_chunk_gated_delta_rule, 1e-4)):
        expected, last = function(
            *theirs, initial_state=i.state[None], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        torch.testing.assert_close(out, expected[0], atol=within, rtol=1e-4)
        torch.testing.assert_close(state, last[0], atol=within, rtol=1e-4)


def test_a_run_in_pieces_equals_the_run_at_once() -> None:
    i = _inputs(100)
    q, k = (l2_normalised(t).repeat_interleave(2, 1) for t in (i.q, i.k))
    whole, last = delta_rule_chunked(q, k, i.v, i.g, i.beta, i.state)
    state, parts = i.state, []
    for at in (slice(0, 33), slice(33, 34), slice(34, 100)):
        part, state = delta_rule_chunked(q[at], k[at], i.v[at], i.g[at], i.beta[at], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-4)


def test_convolution_matches_transformers_and_continues() -> None:
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(20, 10, generator=g), torch.randn(10, 4, generator=g)
    expected = causal_conv1d_fn(x.T[None], weight, None, activation="silu")[0].T
    whole, last = causal_conv(x, torch.zeros(3, 10), weight)
    torch.testing.assert_close(whole, expected)
    before, parts = torch.zeros(3, 10), []
    for at in (slice(0, 1), slice(1, 3), slice(3, 20)):
        part, before = causal_conv(x[at], before, weight)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole)
    assert torch.equal(before, last)


def _step(contexts: tuple[int, ...], counts: tuple[int, ...], slots: tuple[int, ...]) -> StepBatch:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    none = torch.zeros(len(counts), 1, dtype=torch.int32)
    ids = torch.zeros(starts[-1], dtype=torch.int64)
    return StepBatch(ids, ids, tuple(starts), contexts, none, 16, slots)


def test_slots_keep_states_apart_start_at_zero_and_can_be_copied() -> None:
    slots = StateSlots("net", StateCacheSpec(((2,), (1, 3))), torch.device("cpu"))
    slots.allocate_states(4)
    first = _step((5, 3), (5, 3), (2, 0))
    assert all(not state.any() for state in slots.read(first))
    slots.write(first, torch.tensor([[1.0, 1], [2, 2]]), torch.ones(2, 1, 3))
    # the sequence in slot 2 goes on, a new one takes slot 0
    second = _step((6, 4), (1, 4), (2, 0))
    conv, state = slots.read(second)
    assert conv.tolist() == [[1, 1], [0, 0]]
    assert state[1].sum() == 0
    assert conv[0].tolist() == [1, 1]
    slots.copy_states([2], [3])
    assert slots.read(_step((6,), (1,), (3,)))[0].tolist() == [[1, 1]]


def test_a_state_of_other_tokens_is_an_error() -> None:
    slots = StateSlots("net", StateCacheSpec(((2,),)), torch.device("cpu"))
    slots.allocate_states(2)
    slots.write(_step((5,), (5,), (0,)), torch.ones(1, 2))
    with pytest.raises(BackendError, match="after 5 tokens, 6 are needed"):
        slots.read(_step((7,), (1,), (0,)))
    with pytest.raises(BackendError, match="slot 2, 2 were allocated"):
        slots.read(_step((1,), (1,), (2,)))
    with pytest.raises(BackendError, match="1 sequences have 0 state slots"):
        slots.read(_step((1,), (1,), ()))
