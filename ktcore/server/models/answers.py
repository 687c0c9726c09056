"""The engine's service for asynchronous code: deltas through a queue, and an end to answers that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from fastapi import Request as HttpRequest

from ktcore.dialects.base import Call
from ktcore.dialects.dialect import Part, Reader
from ktcore.engine.schedule.sequence import Chosen, Finish
from ktcore.engine.service import Deliver, Delta, Request, Service
from ktcore.engine.stream import Stats
from ktcore.server.http.metrics import Metrics


@dataclass
class Answer:
    """A whole answer."""

    content: str
    finish: Finish
    stats: Stats
    chosen: tuple[Chosen, ...] = ()
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    pooled: torch.Tensor | None = None


class Answers:
    """Answers to the prompts of one HTTP request. They are cancelled when the client disconnects, or by `close`.

    Args:
        readers: what takes each answer's text apart.

    Raises:
        KtcoreError: what `Service.submit` refuses.
    """

    def __init__(
        self,
        service: Service,
        requests: Seq[Request],
        http: HttpRequest,
        metrics: Metrics,
        readers: Seq[Reader | None],
    ) -> None:
        self._readers = readers
        self._count = len(requests)
        self._gone = False
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

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta, Part]]:
        """(index of the prompt, delta, what its text says) as they come, until all have ended.

        Raises:
            Exception: what an answer ended with.
        """
        try:
            left = self._count
            while left:
                index, delta = await self._deltas.get()
                if not self._deltas.empty():
                    # a queue that holds more gives nobody else a turn, not even to notice that the client is gone
                    await asyncio.sleep(0)
                if delta.error is not None:
                    raise delta.error
                left -= delta.last
                if self._gone and not delta.last:
                    continue  # what was drawn before the cancellation took effect: nobody is there to be told
                yield index, delta, self._part(index, delta)
        finally:
            self.close()

    async def whole(self) -> list[Answer]:
        """All answers, complete, in order of their prompts."""
        made: list[list[tuple[Delta, Part]]] = [[] for _ in range(self._count)]
        async for index, delta, part in self:
            made[index].append((delta, part))
        return [_joined(each) for each in made]

    def close(self) -> None:
        """End what is still under way."""
        self._watch.cancel()
        self._cancel()

    def _part(self, index: int, delta: Delta) -> Part:
        reader = self._readers[index]
        if reader is None:
            return Part(delta.text)
        part = reader.push(delta.text)
        if not delta.last:
            return part
        rest = reader.end()
        return Part(part.content + rest.content, part.reasoning + rest.reasoning, part.calls + rest.calls)

    async def _cancel_when_gone(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._cancel()

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()


def _joined(made: list[tuple[Delta, Part]]) -> Answer:
    last, _ = made[-1]
    return Answer(
        content="".join(part.content for _, part in made),
        finish=last.finish or Finish.STOP,
        stats=last.stats,
        chosen=tuple(one for delta, _ in made for one in delta.chosen),
        reasoning="".join(part.reasoning for _, part in made),
        calls=tuple(call for _, part in made for call in part.calls),
        pooled=last.pooled,
    )
