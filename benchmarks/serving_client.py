"""A light streaming client: it shares the machine with the server it measures, so it only reads and notes the time."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

# Words that are one token each in most vocabularies, a space before them.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "kid body back parent face others level office door health person art war history party result change morning "
    "reason research girl guy "
)
WORDS = _TEXT.split()


@dataclass
class Heard:
    """One answer: when it was asked for and when its texts came, in seconds of `time.perf_counter`.

    Attributes:
        tokens: of the answer, as the server counts them; without a count, as many as were asked for.
        gone: it was closed before its end.
    """

    asked: float
    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    gone: bool = False

    @property
    def first(self) -> float:
        """Seconds until the first text."""
        return self.times[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between texts."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.texts)


@dataclass(frozen=True)
class Target:
    """A server under load.

    Attributes:
        fields: further fields of every request, such as what keeps it from stopping early.
        serial: it answers one request after the other.
    """

    name: str
    port: int
    fields: dict[str, Any]
    serial: bool = False

    async def ask(self, prompt: str, new: int, until: asyncio.Event | None = None, into: Heard | None = None) -> Heard:
        """Stream an answer of exactly `new` tokens; with `until`, hang up when that is set.

        Args:
            into: filled while the answer comes, for those who watch; its texts are read at the end.

        Raises:
            RuntimeError: the server refused, or broke off.
        """
        ask = {"model": "bench", "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
        ask |= {"stream_options": {"include_usage": True}, **self.fields}
        body = json.dumps(ask).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        heard = into or Heard(0.0)
        raw, marks = bytearray(), []
        heard.asked = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head.encode() + body)
            watch = None if until is None else asyncio.create_task(until.wait())
            while True:
                read = asyncio.create_task(reader.read(65536))
                await asyncio.wait([t for t in (read, watch) if t], return_when=asyncio.FIRST_COMPLETED)
                if not read.done():
                    read.cancel()
                    heard.gone = True
                    break
                got = read.result()
                if not got:
                    break
                raw += got
                marks.append((len(raw), time.perf_counter()))
                if b"data: [DONE]" in raw[-200:]:
                    break
            if watch is not None:
                watch.cancel()
        finally:
            writer.close()
        _read(self.name, bytes(raw), marks, heard, new)
        return heard


def _read(name: str, raw: bytes, marks: list[tuple[int, float]], heard: Heard, new: int) -> None:
    """Events of an HTTP answer in chunks, each with the time of the read that completed it."""
    status, _, _ = raw.partition(b"\r\n")
    if b" 200" not in status:
        raise RuntimeError(f"{name} answered {raw[:500].decode(errors='replace')!r}")
    at, mark, pending = raw.index(b"\r\n\r\n") + 4, 0, b""
    while True:
        line = raw.find(b"\r\n", at)
        size = int(raw[at:line], 16) if line > at else 0
        if not size or line + 2 + size > len(raw):
            break
        end = line + 2 + size
        pending += raw[line + 2 : end]
        at = end + 2
        while marks[mark][0] < end:
            mark += 1
        *events, pending = pending.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            _note(event, marks[mark][1], heard)
    if not heard.gone:
        heard.tokens = heard.tokens or new
        if heard.tokens != new or not heard.times:
            raise RuntimeError(
                f"{name} gave {heard.tokens} tokens in {len(heard.times)} texts where {new} were asked for"
            )


def _note(event: bytes, when: float, heard: Heard) -> None:
    if not event.startswith(b"data: {"):
        return
    told = json.loads(event[6:])
    if "error" in told:
        raise RuntimeError(str(told["error"]))
    if told.get("usage"):
        heard.tokens = told["usage"]["completion_tokens"]
        heard.prompt_tokens = told["usage"]["prompt_tokens"]
    said = "".join(choice.get("text") or "" for choice in told["choices"])
    if said:
        heard.times.append(when)
        heard.texts.append(said)


def words(count: int, rng: random.Random) -> str:
    """A text of so many words that no server has seen before."""
    return "".join(" " + rng.choice(WORDS) for _ in range(count))
