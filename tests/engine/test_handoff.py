"""The hand-off on the host runtime, in the callback mode that rides on the stream and in the one without callbacks."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from ktcore.backend.host import HostRuntime
from ktcore.backend.lane import ThreadLane
from ktcore.backend.runtime import HostCallbackMode
from ktcore.engine.experts.handoff import SIZES, SLOTS, HandOff
from ktcore.errors import ExpertsError

HIDDEN, TOP_K = 8, 2


class _NoCallbacks(HostRuntime):
    host_callback = HostCallbackMode.NONE

    def launch_host(self, *args: object) -> None:
        raise NotImplementedError("no host callbacks")


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
    with pytest.raises(ExpertsError, match="experts on the host failed: _Failing: expert 3 is on fire") as caught:
        out = hand_off(*block)
        hand_off.check()
    assert isinstance(caught.value.__cause__, _Failing)
    assert out is None or out.isnan().all()
    broken[0] = False
    torch.testing.assert_close(hand_off(*block), _weighted(*block))
    hand_off.check()


def test_more_tokens_than_the_buffers_hold_are_refused(runtime: HostRuntime, lane: ThreadLane) -> None:
    with pytest.raises(ExpertsError, match="17 tokens submitted, the hand-off buffers hold 16"):
        _hand_off(_weighted, runtime, lane).submit(*_block(17))


def test_more_tickets_than_slots_are_refused_until_one_is_waited_for(runtime: HostRuntime, lane: ThreadLane) -> None:
    hand_off = _hand_off(_weighted, runtime, lane)
    blocks = [_block(3, seed) for seed in range(4)]
    tickets = [hand_off.submit(*block) for block in blocks[:SLOTS]]
    assert sorted(ticket.slot for ticket in tickets) == list(range(SLOTS))
    for _ in range(2):
        with pytest.raises(ExpertsError, match="2 submissions are outstanding, as many as there are buffers for"):
            hand_off.submit(*blocks[2])
    # whichever is waited for, its buffers are the next ones, and the other's stay as they are
    torch.testing.assert_close(hand_off.wait(tickets[1]), _weighted(*blocks[1]))
    third = hand_off.submit(*blocks[2])
    assert third.slot == tickets[1].slot
    torch.testing.assert_close(hand_off.wait(tickets[0]), _weighted(*blocks[0]))
    fourth = hand_off.submit(*blocks[3])
    torch.testing.assert_close(hand_off.wait(third), _weighted(*blocks[2]))
    torch.testing.assert_close(hand_off.wait(fourth), _weighted(*blocks[3]))
    hand_off.check()
    assert hand_off.take_over() == []


def test_slots_take_turns(runtime: HostRuntime, lane: ThreadLane) -> None:
    hand_off = _hand_off(_weighted, runtime, lane)
    used = []
    for seed in range(4):
        ticket = hand_off.submit(*_block(2, seed))
        used.append(ticket.slot)
        hand_off.wait(ticket)
    assert used == [0, 1, 0, 1]


def test_a_ticket_is_waited_for_once_and_where_it_came_from(runtime: HostRuntime, lane: ThreadLane) -> None:
    hand_off, other = _hand_off(_weighted, runtime, lane), _hand_off(_weighted, runtime, lane)
    ticket = hand_off.submit(*_block(3))
    for wrong in (lambda: other.wait(ticket), lambda: (hand_off.wait(ticket), hand_off.wait(ticket))):
        with pytest.raises(ExpertsError, match="waited for once, by the hand-off that gave it"):
            wrong()


def test_what_a_failed_step_left_is_forgotten_once_its_jobs_have_ended(runtime: HostRuntime, lane: ThreadLane) -> None:
    released, ran = threading.Event(), []

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ran.append(released.wait(10))
        raise _Failing("nobody asks any more")

    hand_off = _hand_off(experts, runtime, lane)
    for seed in range(SLOTS):
        hand_off.submit(*_block(3, seed))
    threading.Timer(0.05, released.set).start()
    hand_off.abandon()
    assert ran == [True] * SLOTS
    hand_off.check()
    hand_off._experts = _weighted
    for seed in range(2 * SLOTS):
        block = _block(3, seed)
        torch.testing.assert_close(hand_off(*block), _weighted(*block))
    hand_off.check()
    hand_off.abandon()


def test_without_callbacks_waiting_raises_what_the_experts_raised(lane: ThreadLane) -> None:
    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        raise _Failing("at once")

    hand_off = _hand_off(experts, _NoCallbacks(), lane)
    ticket = hand_off.submit(*_block(3))
    with pytest.raises(ExpertsError, match="at once"):
        hand_off.wait(ticket)
    hand_off.check()


def test_abandoning_waits_for_the_stream_before_the_jobs_and_for_nothing_when_there_is_none(lane: ThreadLane) -> None:
    log: list[object] = []

    class Logged(HostRuntime):
        def synchronize(self, what: object = None) -> None:
            log.append(what)

    hand_off = _hand_off(_weighted, Logged(), lane)
    hand_off.abandon()
    assert log == []
    hand_off.submit(*_block(3))
    hand_off.abandon()
    assert log == [hand_off._stream]


def test_a_ticket_that_check_has_seen_is_still_abandoned(runtime: HostRuntime, lane: ThreadLane) -> None:
    hand_off = _hand_off(_weighted, runtime, lane)
    for seed in range(SLOTS):
        hand_off.submit(*_block(3, seed)).job.wait()
    hand_off.check()
    assert hand_off.take_over() == []
    hand_off.abandon()
    hand_off.wait(hand_off.submit(*_block(3)))


def test_check_keeps_what_is_still_running_and_raises_the_first_failure_once(lane: ThreadLane) -> None:
    """Without callbacks, where the lane waits and the host does not."""
    released = threading.Event()
    fails = iter([True, False])

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert released.wait(10)
        if next(fails):
            raise _Failing("first")
        return _weighted(x, ids, weights)

    hand_off = _hand_off(experts, _NoCallbacks(), lane)
    tickets = [hand_off.submit(*_block(3, seed)) for seed in range(2)]
    hand_off.check()
    assert hand_off._outstanding == tickets
    released.set()
    for ticket in tickets:
        ticket.job.wait()
    with pytest.raises(ExpertsError, match="first"):
        hand_off.check()
    hand_off.check()
    assert hand_off._outstanding == []


def test_a_failure_of_the_native_lane_is_the_same_error_without_a_cause(lane: ThreadLane) -> None:
    hand_off = _hand_off(_weighted, HostRuntime(), lane)
    ticket = hand_off.submit(*_block(3))
    ticket.job = SimpleNamespace(error="expert 3 is on fire", done=True)  # type: ignore[assignment]
    assert isinstance(ticket.error, ExpertsError)
    assert str(ticket.error) == "experts on the host failed: expert 3 is on fire"
    assert ticket.error.__cause__ is None
    ticket.job = SimpleNamespace(error="", done=True)  # type: ignore[assignment]
    assert ticket.error is None


def test_views_and_jobs_are_kept_for_the_sizes_used_last(lane: ThreadLane) -> None:
    hand_off = _hand_off(_weighted, HostRuntime(), lane, max_tokens=3 * SIZES)
    jobs = {}
    for tokens in (*range(1, 2 * SIZES), 1, 2 * SIZES - 1):
        for seed in range(SLOTS):
            block = _block(tokens, seed)
            ticket = hand_off.submit(*block)
            torch.testing.assert_close(hand_off.wait(ticket), _weighted(*block))
            hand_off.check()
            jobs.setdefault((tokens, ticket.slot), []).append(ticket.job)
    for slot, kept in enumerate(hand_off._blocks):
        assert list(kept) == [*range(SIZES + 1, 2 * SIZES - 1), 1, 2 * SIZES - 1]
        first, again = jobs[2 * SIZES - 1, slot]
        assert first is again  # views and job of a size that was used a moment ago are not made anew
        first, again = jobs[1, slot]
        assert first is not again


def test_a_job_whose_failure_nobody_has_seen_is_not_run_again(lane: ThreadLane) -> None:
    fails = iter([True, False, False])

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if next(fails):
            raise _Failing("unseen")
        return _weighted(x, ids, weights)

    hand_off = _hand_off(experts, HostRuntime(), lane)
    for seed in range(3):  # the third is in the first one's slot
        out = hand_off(*_block(3, seed))
    torch.testing.assert_close(out, _weighted(*_block(3, 2)))
    with pytest.raises(ExpertsError, match="unseen"):
        hand_off.check()


def test_what_experts_leave_unwritten_is_no_number(runtime: HostRuntime, lane: ThreadLane) -> None:
    hand_off = _hand_off(_weighted, runtime, lane)
    for seed in range(SLOTS):
        assert hand_off(*_block(3, seed)).isfinite().all()

    def broken(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        raise _Failing("nothing is written")

    hand_off._experts = broken
    ticket = hand_off.submit(*_block(3))
    ticket.job.wait()
    assert ticket.block.out.isnan().all()
    with pytest.raises(ExpertsError):
        hand_off.check()


def test_hidden_states_and_weights_of_16_bits_arrive_as_float32(runtime: HostRuntime, lane: ThreadLane) -> None:
    seen = []

    def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        seen.extend([x.dtype, ids.dtype, weights.dtype])
        return _weighted(x, ids, weights)

    x, ids, weights = _block(3)
    out = _hand_off(experts, runtime, lane)(x.bfloat16(), ids, weights.bfloat16())
    assert seen == [torch.float32, torch.int64, torch.float32]
    torch.testing.assert_close(out, _weighted(x.bfloat16().float(), ids, weights.bfloat16().float()))


def test_experts_with_jobs_of_their_own_run_no_python_on_the_lane(lane: ThreadLane) -> None:
    class Own:
        def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the plain call is not for the lane")

        def lane_job(self, lane: ThreadLane, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, out: torch.Tensor):  # type: ignore[no-untyped-def]
            return lane.job(lambda: out.copy_(_weighted(x, ids, w)))

    hand_off = _hand_off(Own(), HostRuntime(), lane)
    for seed in range(5):
        block = _block(3, seed)
        torch.testing.assert_close(hand_off(*block), _weighted(*block))
    hand_off.check()


def test_tickets_that_a_graph_takes_over_leave_their_blocks_without_a_job(lane: ThreadLane) -> None:
    hand_off = _hand_off(_weighted, HostRuntime(), lane)
    tickets = [hand_off.submit(*_block(3, seed)) for seed in range(SLOTS)]
    for ticket in tickets:
        hand_off.wait(ticket)
    assert hand_off.take_over() == tickets
    assert [ticket.block.job for ticket in tickets] == [None] * SLOTS
    for taken in tickets:
        ticket = hand_off.submit(*_block(3))
        assert ticket.job is not taken.job
        hand_off.wait(ticket)


def test_a_registered_job_runs_again_at_every_replay(lane: ThreadLane) -> None:
    """A captured graph calls the same two addresses with the same data at every replay."""
    runs: list[int] = []
    job = lane.job(lambda: runs.append(len(runs)))
    start, wait = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(a) for a in (lane.start_address, lane.wait_address))
    for expected in range(1, 4):
        start(job.address)
        wait(job.address)
        assert len(runs) == expected
