"""The engine's service for asynchronous code: deltas through a queue, and an end to answers that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from fastapi import Request as HttpRequest

from ktcore.engine.model import Stats
from ktcore.engine.sequence import Finish
from ktcore.engine.service import Deliver, Delta, Request, Service
from ktcore.server.metrics import Metrics


@dataclass
class Answer:
    """A whole answer."""

    text: str
    finish: Finish
    stats: Stats


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
        texts: list[list[str]] = [[] for _ in range(self._count)]
        ends: dict[int, Delta] = {}
        async for index, delta in self:
            texts[index].append(delta.text)
            if delta.finish is not None:
                ends[index] = delta
        return [Answer("".join(t), ends[i].finish or Finish.STOP, ends[i].stats) for i, t in enumerate(texts)]

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
