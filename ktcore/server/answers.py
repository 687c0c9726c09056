"""The engine's service for asynchronous code: deltas through a queue, and an end to answers that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastapi import Request as HttpRequest

from ktcore.engine.model import Stats
from ktcore.engine.sequence import Chosen, Finish
from ktcore.engine.service import Deliver, Delta, Request, Service
from ktcore.server.metrics import Metrics


@dataclass
class Answer:
    """A whole answer."""

    text: str
    finish: Finish
    stats: Stats
    chosen: tuple[Chosen, ...] = ()


class Answers:
    """Answers to the prompts of one HTTP request. They are cancelled when the client disconnects, or by `close`.

    Raises:
        KtcoreError: what `Service.submit` refuses.
    """

    def __init__(self, service: Service, requests: Seq[Request], http: HttpRequest, metrics: Metrics) -> None:
        self._count = len(requests)
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver_to(index: int) -> Deliver:
            observer = metrics.observer()

            def deliver(delta: Delta) -> None:
                observer.note(delta)
                loop.call_soon_threadsafe(self._deltas.put_nowait, (index, delta))

            return deliver

        self._tickets = service.submit([(request, deliver_to(i)) for i, request in enumerate(requests)])
        self._watch = asyncio.create_task(self._cancel_when_gone(http))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """(index of the prompt, delta) as they come, until all have ended.

        Raises:
            Exception: what an answer ended with.
        """
        try:
            left = self._count
            while left:
                index, delta = await self._deltas.get()
                if delta.error is not None:
                    raise delta.error
                left -= delta.last
                yield index, delta
        finally:
            self.close()

    async def whole(self) -> list[Answer]:
        """All answers, complete, in order of their prompts."""
        deltas: list[list[Delta]] = [[] for _ in range(self._count)]
        async for index, delta in self:
            deltas[index].append(delta)
        return [_joined(each) for each in deltas]

    def close(self) -> None:
        """End what is still under way."""
        self._watch.cancel()
        self._cancel()

    async def _cancel_when_gone(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._cancel()

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()


def _joined(deltas: list[Delta]) -> Answer:
    last = deltas[-1]
    chosen = tuple(one for delta in deltas for one in delta.chosen)
    return Answer("".join(d.text for d in deltas), last.finish or Finish.STOP, last.stats, chosen)
