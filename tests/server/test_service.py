"""The step loop under many callers: batched answers equal those alone, and nobody can hold up, break or leak."""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ktcore
from ktcore.engine.output import PLAIN, Output
from ktcore.engine.schedule.scheduler import Scheduled
from ktcore.engine.schedule.sequence import Finish
from ktcore.engine.service import ClosingError, DeadlineError, Delta, QueueFullError, Request, Service
from ktcore.errors import RequestError
from ktcore.ops.sampling import SamplingParams

SEEDS = int(os.environ.get("KTCORE_TEST_SEEDS", "8"))

Opened = Callable[..., ktcore.Model]
GREEDY = SamplingParams(temperature=0)


class Caller:
    """One request and what came of it."""

    def __init__(self, service: Service, ids: list[int], new: int = 16, params: SamplingParams = GREEDY, **more: Any):
        self.deltas: queue.Queue[Delta] = queue.Queue()
        (self.ticket,) = service.submit([(Request(ids, params, new, **more), self.deltas.put)])

    def wait(self) -> tuple[str, Delta]:
        """The whole text and the last delta."""
        text = ""
        while True:
            delta = self.deltas.get(timeout=60)
            text += delta.text
            if delta.last:
                return text, delta


def _prompt(seed: int, length: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def _draws(seed: int) -> list[tuple[list[int], int, SamplingParams]]:
    """A random mix of requests: lengths, parameters, greedy and seeded ones."""
    draw = random.Random(seed)
    mix = []
    for _ in range(draw.randint(2, 8)):
        params = GREEDY
        if draw.random() < 0.4:
            params = SamplingParams(
                temperature=draw.choice([0.5, 1.0]),
                top_k=draw.choice([0, 20]),
                top_p=draw.choice([1.0, 0.9]),
                min_p=draw.choice([0.0, 0.05]),
                repetition_penalty=draw.choice([1.0, 1.2]),
                seed=draw.randint(0, 1000),
                typical_p=draw.choice([1.0, 0.9]),
                presence_penalty=draw.choice([0.0, 0.5]),
                frequency_penalty=draw.choice([0.0, 0.3]),
                logit_bias=draw.choice([{}, {65: 4.0, 66: -3.0}]),
            )
        prompt = _prompt(draw.randint(0, 10**6), draw.randint(1, 70))
        if draw.random() < 0.3:  # begins as others do
            prompt = _prompt(seed % 3, 70) + prompt[:20]
        mix.append((prompt, draw.randint(1, 60), params))
    return mix


@pytest.mark.parametrize("rules", ["reference", None])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_batched_answers_equal_those_alone(opened: Opened, name: str, rules: str | None) -> None:
    # room for all of a mix at once, or for so little that answers make room for each other
    with opened(name, rules=rules, context=512) as wide, opened(name, rules=rules, context=192) as narrow:
        for seed in range(SEEDS):
            model = (wide, narrow)[seed % 2]
            model.engine.scheduler.chunk = 24
            mix = _draws(seed)
            if model is narrow:  # two that come together and cannot both stay, however fast the machine is
                mix = [(_prompt(100 * seed + i, 60), 60, GREEDY) for i in range(2)] + mix
            with Service(wide) as service:
                alone = [Caller(service, ids, new, params).wait()[0] for ids, new, params in mix]
            with Service(model) as service:
                callers = []
                for i, (ids, new, params) in enumerate(mix):
                    output = Output(prompt_lookup=i % 3 * 2)
                    callers.append(Caller(service, ids, new, params, output=output, user=str(i % 2)))
                    if i:
                        time.sleep(random.Random(seed).random() * 0.004)
                together = [caller.wait()[0] for caller in callers]
            assert together == alone
        assert narrow.engine.scheduler.preemptions > 0
        assert wide.engine.prefix.stats.device > 0


def test_forms_in_a_batch_bind_their_own_answers_alone(opened: Opened) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `server`")
    model = opened("dense", context=512)
    digits, letters = model.structures.regex("[0-9]{5,9}"), model.structures.regex("[a-z]{4,12}")
    outputs = [PLAIN, Output(structure=digits), Output(structure=letters), PLAIN, Output(structure=digits)]
    with Service(model) as service:

        def ask(i: int) -> Caller:
            return Caller(service, _prompt(i, 9), 20, SamplingParams(temperature=1, seed=i), output=outputs[i])

        alone = [ask(i).wait()[0] for i in range(len(outputs))]
        callers = [ask(i) for i in range(len(outputs))]
        assert [caller.wait()[0] for caller in callers] == alone
    assert alone[1].isdigit()
    assert alone[2].isalpha()
    assert alone[4].isdigit()
    assert alone[1] != alone[4]
    assert not alone[0].isalnum()


def test_a_long_prompt_holds_a_running_answer_up_for_no_more_than_a_chunk(opened: Opened) -> None:
    model = opened()
    scheduler = model.engine.scheduler
    scheduler.chunk = 16
    batches: list[Scheduled] = []
    plain = scheduler.next_batch

    def noted(*limits: int | None) -> Scheduled | None:
        batch = plain(*limits)
        if batch is not None:
            batches.append(batch)
        return batch

    scheduler.next_batch = noted  # type: ignore[method-assign]
    with Service(model, stretch=0) as service:
        first = Caller(service, _prompt(1, 8), 200)
        first.deltas.get(timeout=60)
        second = Caller(service, _prompt(2, 400), 2)
        assert second.wait()[1].finish is Finish.LENGTH
        assert first.wait()[1].finish is Finish.LENGTH
    shared = [b for b in batches if len(b.sequences) == 2]
    assert len(shared) > 400 / 16
    # in each step the running answer has its token, and the newcomer what the chunk leaves
    assert all(b.counts[0] == 1 and sum(b.counts) <= 16 for b in shared)
    assert sum(1 for b in batches if len(b.sequences) == 1 and b.sequences[0].prompt_len == 400) == 0


def test_cancelling_ends_within_a_step_and_frees_the_pages(opened: Opened) -> None:
    model = opened()
    pages = model.engine.scheduler.pages
    with Service(model) as service:
        caller = Caller(service, _prompt(3, 20), 900)
        waits = Caller(service, _prompt(4, 20), 900)
        caller.deltas.get(timeout=60)
        assert pages.free < pages.total
        waits.ticket.cancel()
        assert waits.wait()[1].finish is Finish.CANCELLED
        drawn = caller.deltas.qsize()
        caller.ticket.cancel()
        text, last = caller.wait()
        assert last.finish is Finish.CANCELLED
        assert last.stats.new_tokens < 900
        assert len(text) <= drawn + 20
        assert pages.free == pages.total
        assert Caller(service, _prompt(3, 20), 4).wait()[1].finish is Finish.LENGTH


def test_a_deadline_ends_a_running_and_a_waiting_answer(opened: Opened) -> None:
    model = opened()
    with Service(model) as service:
        running = Caller(service, _prompt(5, 10), 1000, timeout_s=0.1)
        waiting = Caller(service, _prompt(6, 10), 1000, timeout_s=0.0)
        assert isinstance(waiting.wait()[1].error, DeadlineError)
        assert isinstance(running.wait()[1].error, DeadlineError)
        assert model.engine.scheduler.pages.free == model.engine.scheduler.pages.total


def test_stop_strings_end_an_answer_and_are_left_out(opened: Opened) -> None:
    with Service(opened()) as service:
        whole, _ = Caller(service, _prompt(7, 10), 40).wait()
        stop = whole[10:12]
        text, last = Caller(service, _prompt(7, 10), 40, stop=(stop,)).wait()
    assert last.finish is Finish.STOP
    assert text == whole[: whole.index(stop)]


def test_what_can_never_run_and_what_is_too_much_is_refused(opened: Opened) -> None:
    model = opened()
    with Service(model, queue_limit=2) as service:
        with pytest.raises(RequestError, match="empty"):
            Caller(service, [])
        with pytest.raises(RequestError, match="context holds 1024"):
            Caller(service, _prompt(1, 1025))
        first = Caller(service, _prompt(1, 10), 1000)
        wait_for(lambda: service.running == 1)
        others = [Caller(service, _prompt(1, 10), 1000) for _ in range(2)]
        wait_for(lambda: service.waiting == 2)
        with pytest.raises(QueueFullError):
            Caller(service, _prompt(1, 10), 1000)
        for caller in (first, *others):
            caller.ticket.cancel()
            assert caller.wait()[1].finish is Finish.CANCELLED


def test_a_step_that_fails_fails_its_answers_and_no_later_ones(opened: Opened) -> None:
    model = opened()
    plain = model.engine.model.sampler
    with Service(model) as service:
        expected, _ = Caller(service, _prompt(8, 10)).wait()

        def broken(*words: Any) -> int:
            raise ArithmeticError("broken on purpose")

        object.__setattr__(model.engine.model, "sampler", broken)
        _, last = Caller(service, _prompt(8, 10)).wait()
        assert isinstance(last.error, ArithmeticError)
        object.__setattr__(model.engine.model, "sampler", plain)
        assert model.engine.scheduler.pages.free == model.engine.scheduler.pages.total
        assert Caller(service, _prompt(8, 10)).wait()[0] == expected


def test_text_that_cannot_be_made_fails_its_answers_and_no_later_ones(opened: Opened) -> None:
    model = opened()
    with Service(model) as service:
        expected, _ = Caller(service, _prompt(8, 10)).wait()
        caller = Caller(service, _prompt(8, 10), 400)
        caller.deltas.get(timeout=60)
        caller.ticket._stream.collect = None  # type: ignore[assignment,method-assign]
        assert isinstance(caller.wait()[1].error, TypeError)
        assert Caller(service, _prompt(8, 10)).wait()[0] == expected


def test_a_caller_that_breaks_ends_its_own_answer_alone(opened: Opened) -> None:
    with Service(opened()) as service:
        expected, _ = Caller(service, _prompt(9, 10), 60).wait()
        calls = []

        def gone(delta: Delta) -> None:
            calls.append(delta)
            raise RuntimeError("the caller is gone")

        service.submit([(Request(_prompt(1, 10), GREEDY, 300), gone)])
        assert Caller(service, _prompt(9, 10), 60).wait()[0] == expected
        wait_for(lambda: service.running == 0)
    # the first piece, and the notice that it is cancelled
    assert len(calls) == 2


def test_closing_drains_or_cancels_and_takes_no_more(opened: Opened) -> None:
    model = opened()
    service = Service(model)
    with service:
        drained = Caller(service, _prompt(1, 10), 30)
        service.close(drain_s=30)
        assert drained.wait()[1].finish is Finish.LENGTH
        with pytest.raises(ClosingError):
            Caller(service, _prompt(1, 10))
    with Service(model) as again:
        cut = Caller(again, _prompt(1, 10), 1000)
        cut.deltas.get(timeout=60)
    assert cut.wait()[1].finish is Finish.CANCELLED
    assert not [t for t in threading.enumerate() if t.name == "ktcore-steps"]
    # the model is its owner's again
    assert len(model.generate("abc", 4, temperature=0)) > 0
