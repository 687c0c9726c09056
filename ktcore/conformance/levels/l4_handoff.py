"""The hand-off of routed experts on this device's streams: ordered, overlapping, with errors that come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ktcore.backend.lane import ThreadLane
from ktcore.backend.runtime import HostCallbackMode
from ktcore.conformance.case import Case, Check, Context
from ktcore.conformance.levels.operator import normal
from ktcore.engine.experts.handoff import HandOff
from ktcore.errors import ExpertsError

HIDDEN, TOP_K, MOST = 64, 4, 48
ROUNDS = 25
PATIENCE = 20.0

Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def cases() -> list[Case]:
    """Each with host experts that take a few milliseconds, so that nobody is saved by being quick."""
    return [
        _case("sum", "the experts see the block as it was submitted, the stream gets their sum", _sum),
        _case("two-in-flight", "two blocks in flight keep apart", _two),
        _case("many-sizes", "one token, many tokens, one again", _sizes),
        _case("inputs-may-change", "the block may be overwritten in stream order after submit", _changed),
        _case("overlap", "work submitted after it runs while the experts compute", _overlap),
        _case("error", "what the experts raise comes back to the caller, and the next block is right", _error),
    ]


def _case(name: str, about: str, run: Check) -> Case:
    return Case(f"L4.hand-off.{name}", 4, "hand-off", about, run)


def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the host computes here: each output depends on its own row, ids and weights."""
    return x * (ids * weights).sum(-1, keepdim=True) + weights.sum(-1, keepdim=True)


def slow_experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same, read at once and given late: both a block that is not there yet and a sum that is not show."""
    result = experts(x, ids, weights)
    time.sleep(0.002)
    return result


@contextmanager
def hand_off(ctx: Context, work: Callable[..., torch.Tensor]) -> Iterator[HandOff]:
    """A hand-off on the target's stream with a lane of its own."""
    lane = ThreadLane()
    try:
        yield HandOff(work, ctx.target.runtime, ctx.target.stream, lane, HIDDEN, TOP_K, MOST)
        ctx.target.runtime.synchronize(ctx.target.stream)
    finally:
        lane.close()


def _block(ctx: Context, what: str, tokens: int) -> Block:
    rng = ctx.rng(what)
    ids = torch.from_numpy(rng.integers(0, 8, (tokens, TOP_K)))
    return normal(rng, tokens, HIDDEN), ids, torch.from_numpy(rng.uniform(0.1, 1, (tokens, TOP_K))).float()


def _there(ctx: Context, block: Block) -> Block:
    x, ids, weights = (ctx.target.put(t) for t in block)
    return x, ids, weights


def _same(ctx: Context, got: torch.Tensor, block: Block, what: str) -> None:
    result = ctx.target.get(got)
    off = (result - experts(*block)).abs().max()
    ctx.require(bool(off < 1e-4), f"{what}: the sum that came back is wrong by {float(off):.3g}")


def _sum(ctx: Context) -> None:
    with hand_off(ctx, slow_experts) as hand:
        for i in range(ROUNDS):
            block = _block(ctx, f"round {i}", 1 + i % 7)
            _same(ctx, hand(*_there(ctx, block)), block, f"round {i}")
            hand.check()


def _two(ctx: Context) -> None:
    with hand_off(ctx, slow_experts) as hand:
        for i in range(ROUNDS):
            one, two = _block(ctx, f"one {i}", 5), _block(ctx, f"two {i}", 5)
            tickets = [hand.submit(*_there(ctx, block)) for block in (one, two)]
            results = [hand.wait(ticket) for ticket in tickets]
            for block, result in zip((one, two), results, strict=True):
                _same(ctx, result, block, f"round {i}")
            hand.check()


def _sizes(ctx: Context) -> None:
    with hand_off(ctx, slow_experts) as hand:
        for tokens in (1, MOST, 1, 7, 1, MOST, 3):
            block = _block(ctx, f"{tokens} tokens", tokens)
            _same(ctx, hand(*_there(ctx, block)), block, f"{tokens} tokens")


def _changed(ctx: Context) -> None:
    """The engine reuses its activations at once; only the order of the stream protects the experts' inputs."""
    runtime, stream = ctx.target.runtime, ctx.target.stream
    with hand_off(ctx, slow_experts) as hand:
        for i in range(ROUNDS):
            block = _block(ctx, f"round {i}", 6)
            there = _there(ctx, block)
            ticket = hand.submit(*there)
            with runtime.use_stream(stream):
                for tensor in there:
                    tensor.zero_()
            _same(ctx, hand.wait(ticket), block, f"round {i}")


def _overlap(ctx: Context) -> None:
    """The experts end only when the host has come back from submit: a runtime that blocks there never ends."""
    if ctx.target.runtime.host_callback is HostCallbackMode.NONE and ctx.target.is_host:
        ctx.not_applicable("without callbacks, a host has nothing that could overlap")
    released, seen = threading.Event(), []

    def patient(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(released.wait(PATIENCE))
        return experts(x, ids, weights)

    with hand_off(ctx, patient) as hand:
        block = _block(ctx, "block", 4)
        ticket = hand.submit(*_there(ctx, block))
        released.set()
        _same(ctx, hand.wait(ticket), block, "after an overlap")
    ctx.require(seen == [True], "submit came back only when the experts had ended")


def _error(ctx: Context) -> None:
    broken = [True]

    def unlucky(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if broken[0]:
            raise RuntimeError("expert 3 is broken")
        return experts(x, ids, weights)

    with hand_off(ctx, unlucky) as hand:
        block = _block(ctx, "block", 4)
        try:
            ctx.target.get(hand(*_there(ctx, block)))
            hand.check()
        except (ExpertsError, RuntimeError) as error:
            ctx.require("expert 3" in str(error), f"another error came back: {error}")
        else:
            ctx.fail("the experts raised, and nobody learned of it")
        broken[0] = False
        _same(ctx, hand(*_there(ctx, block)), block, "after an error")
        hand.check()
