"""The hand-off on the host runtime, in the callback mode that rides on the stream and in the one without callbacks."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest
import torch

from ktcore.backend.host import HostRuntime
from ktcore.backend.lane import ThreadLane
from ktcore.backend.runtime import HostCallbackMode
from ktcore.engine.experts.handoff import HandOff

HIDDEN, TOP_K = 8, 2


class _NoCallbacks(HostRuntime):
    host_callback = HostCallbackMode.NONE


class _Failing(RuntimeError):
    pass


@pytest.fixture
def lane() -> Iterator[ThreadLane]:
    lane = ThreadLane()
    yield lane
    lane.close()


@pytest.fixture(params=[HostRuntime, _NoCallbacks], ids=["eager", "none"])
def runtime(request: pytest.FixtureRequest) -> HostRuntime:
    return request.param()


def _weighted(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return x * (ids * weights).sum(-1, keepdim=True)


def _hand_off(experts: object, runtime: HostRuntime, lane: ThreadLane, max_tokens: int = 16) -> HandOff:
    return HandOff(experts, runtime, runtime.new_stream(), lane, HIDDEN, TOP_K, max_tokens)  # type: ignore[arg-type]


def _block(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 5, (tokens, TOP_K), generator=g)
    return torch.randn(tokens, HIDDEN, generator=g), ids, torch.rand(tokens, TOP_K, generator=g)


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_the_sum_comes_back(runtime: HostRuntime, lane: ThreadLane, tokens: int) -> None:
    hand_off = _hand_off(_weighted, runtime, lane)
    for seed in range(5):
        block = _block(tokens, seed)
        torch.testing.assert_close(hand_off(*block), _weighted(*block))
    hand_off.check()


def test_work_between_submit_and_wait_overlaps_with_the_experts(runtime: HostRuntime, lane: ThreadLane) -> None:
    released = threading.Event()

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # ends only if the caller got control back after submit
        assert released.wait(10)
        return _weighted(x, ids, weights)

    hand_off = _hand_off(experts, runtime, lane)
    block = _block(3)
    ticket = hand_off.submit(*block)
    released.set()
    torch.testing.assert_close(hand_off.wait(ticket), _weighted(*block))


def test_an_error_is_carried_to_the_caller_and_the_lane_goes_on(runtime: HostRuntime, lane: ThreadLane) -> None:
    broken = [True]

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if broken[0]:
            raise _Failing("expert 3 is on fire")
        return _weighted(x, ids, weights)

    hand_off = _hand_off(experts, runtime, lane)
    block = _block(4)
    out = None
    with pytest.raises(_Failing, match="on fire"):
        out = hand_off(*block)
        hand_off.check()
    assert out is None or out.isnan().all()
    broken[0] = False
    torch.testing.assert_close(hand_off(*block), _weighted(*block))
    hand_off.check()


def test_more_tokens_than_the_buffers_hold_are_refused(runtime: HostRuntime, lane: ThreadLane) -> None:
    with pytest.raises(ValueError, match="17 tokens submitted, the hand-off buffers hold 16"):
        _hand_off(_weighted, runtime, lane).submit(*_block(17))


def test_a_registered_job_runs_again_at_every_replay(lane: ThreadLane) -> None:
    """A captured graph calls the same two addresses with the same data at every replay."""
    runs: list[int] = []
    job = lane.job(lambda: runs.append(len(runs)))
    start, wait = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(a) for a in (lane.start_address, lane.wait_address))
    for expected in range(1, 4):
        start(job.address)
        wait(job.address)
        assert len(runs) == expected
