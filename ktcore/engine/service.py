"""Many answers at once from one model: a thread of its own runs the step loop; requests come and go at any time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from types import TracebackType

import torch

from ktcore.engine.model import Model
from ktcore.engine.output import PLAIN, Output
from ktcore.engine.schedule.pace import STRETCH, Pace
from ktcore.engine.schedule.sequence import Chosen, Finish
from ktcore.engine.stream import Stats, TextStream
from ktcore.errors import RequestError
from ktcore.ops.sampling import SamplingParams

log = logging.getLogger(__name__)

SETTLED = 16
"""Pages that are copied at once to further tiers while nobody asks for anything."""


class QueueFullError(RequestError):
    """As many requests wait as may wait; the caller should come again later."""


class DeadlineError(RequestError):
    """An answer was not complete when its time was over."""


class ClosingError(RequestError):
    """The service takes no more requests, or ended before this one was answered."""


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered.

    Attributes:
        ids: the prompt's token ids.
        stop: strings that end the answer and are not part of it.
        timeout_s: seconds from now until an unfinished answer ends with DeadlineError; None waits for ever.
        user: whose it is: users are served alike, however many requests each has.
    """

    ids: list[int]
    params: SamplingParams
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    timeout_s: float | None = None
    output: Output = PLAIN
    user: str = ""


@dataclass(frozen=True)
class Delta:
    """What one step added to an answer; `finish` or `error` is set in the last one, and only there.

    Attributes:
        stats: counts and times so far; the engine's own object, complete with the last delta.
        chosen: the text's tokens, where logprobs are wanted.
        pooled: the prompt's vector, where one is wanted instead of text.
    """

    text: str
    stats: Stats
    finish: Finish | None = None
    error: Exception | None = None
    chosen: tuple[Chosen, ...] = ()
    pooled: torch.Tensor | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None


Deliver = Callable[[Delta], None]
"""Takes the deltas of one answer, on the step loop's thread: it must return at once."""


class Ticket:
    """A request under way.

    Attributes:
        begun: whether the engine has it; the step loop's own note.
    """

    def __init__(self, stream: TextStream, deliver: Deliver, timeout_s: float | None) -> None:
        self._stream = stream
        self._deliver = deliver
        self._ends = None if timeout_s is None else time.monotonic() + timeout_s
        self._cancelled = threading.Event()
        self.begun = False

    def cancel(self) -> None:
        """End the answer before the next step; from any thread, and more than once."""
        self._cancelled.set()

    @property
    def _overdue(self) -> bool:
        return self._ends is not None and time.monotonic() >= self._ends


class Service:
    """Runs a model for many callers. While it is open the model is its own: `Model.generate` waits.

    The scheduler decides each step: every sequence that decodes runs one token, what is left of the chunk goes to
    prompts, so a long prompt holds nobody up for longer than a chunk, and for less where `stretch` says so. A sequence
    is admitted when its prompt fits into the free KV pages; answers that outgrow them make room for each other.

    Args:
        queue_limit: most requests that wait for admission.
        stretch: prompts may make a step so many times as long as one without them; 0: as long as a chunk takes.
    """

    def __init__(self, model: Model, queue_limit: int = 64, stretch: float = STRETCH) -> None:
        self.model = model
        self.stretch = stretch
        self.queue_limit = queue_limit
        self._inbox: list[Ticket] = []
        self._active: list[Ticket] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ktcore-steps", daemon=True)

    def __enter__(self) -> Service:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._inbox) + len(self.model.engine.scheduler.waiting)

    @property
    def running(self) -> int:
        """Sequences that take part in the steps."""
        return len(self.model.engine.scheduler.running)

    def submit(self, requests: Seq[tuple[Request, Deliver]]) -> list[Ticket]:
        """Queue requests, all of them or none. Any thread may call it.

        Raises:
            RequestError: a prompt is empty, longer than the context, or holds an id that is no token.
            QueueFullError: too many requests wait.
            ClosingError: the service is closing.
        """
        tickets = []
        for request, deliver in requests:
            self.model._check_ids(request.ids)
            stream = TextStream(
                self.model,
                list(request.ids),
                request.max_new_tokens,
                request.params,
                request.stop,
                request.output,
                request.user,
            )
            stream.check()
            tickets.append(Ticket(stream, deliver, request.timeout_s))
        with self._changed:
            if not self.ready:
                raise ClosingError("the service is closing and takes no more requests")
            if self.waiting + len(tickets) > self.queue_limit:
                raise QueueFullError(
                    f"{self.waiting} requests wait already, at most {self.queue_limit} may", "try again later"
                )
            self._inbox += tickets
            self._changed.notify()
        return tickets

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return not self._closing and self._thread.is_alive()

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those under way end for `drain_s` seconds, and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
            self._changed.wait_for(lambda: not (self._inbox or self._active), timeout=drain_s)
            for ticket in (*self._inbox, *self._active):
                ticket.cancel()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with self.model._running():
            engine = self.model.engine
            engine.pace = Pace(self.stretch, len(engine.model.layers)) if self.stretch else None
            while self._next():
                # whatever breaks must not end the thread: callers would wait for ever
                try:
                    self._turn()
                except Exception as error:
                    log.exception("a step failed; the answers under way are lost")
                    self._fail(error)
            engine.pace = None

    def _turn(self) -> None:
        for ticket in self._active:
            if not ticket.begun:
                ticket.begun = True
                ticket._stream.begin()
        self._drop_ended()
        self.model.engine.step()
        self._hand_out()
        while not self._inbox and not self._active and self.model.engine.settle(SETTLED):
            pass

    def _next(self) -> bool:
        """Wait for work and take in what is new; False when there will be none."""
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._inbox or self._active or self._closing)
            self._active += self._inbox
            self._inbox = []
        return bool(self._active) or not self._closing

    def _drop_ended(self) -> None:
        for ticket in list(self._active):
            if ticket._cancelled.is_set():
                ticket._stream.close()
                self._end(ticket, Delta("", ticket._stream.stats, finish=Finish.CANCELLED))
            elif ticket._overdue:
                ticket._stream.close()
                late = DeadlineError("the answer was not complete in time", "allow more time, or fewer tokens")
                self._end(ticket, Delta("", ticket._stream.stats, error=late))

    def _hand_out(self) -> None:
        for ticket in list(self._active):
            stream = ticket._stream
            stream.collect()
            text = "".join(stream.drain())
            chosen = stream.drain_chosen()
            if stream.error is not None:
                self._end(ticket, Delta(text, stream.stats, error=stream.error, chosen=chosen))
            elif stream.finish is not None:
                told = Delta(text, stream.stats, finish=stream.finish, chosen=chosen, pooled=stream.pooled)
                self._end(ticket, told)
            elif text:
                self._give(ticket, Delta(text, stream.stats, chosen=chosen))

    def _fail(self, error: Exception) -> None:
        for ticket in list(self._active):
            ticket._stream.close()
            self._end(ticket, Delta("", ticket._stream.stats, error=error))

    def _end(self, ticket: Ticket, delta: Delta) -> None:
        with self._changed:
            self._active.remove(ticket)
        self._give(ticket, delta)

    def _give(self, ticket: Ticket, delta: Delta) -> None:
        try:
            ticket._deliver(delta)
        except Exception:  # a caller that went away must not end the answers of others
            log.debug("a caller takes no more", exc_info=True)
            ticket.cancel()
