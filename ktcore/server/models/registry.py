"""The models that a server has by name: loaded when somebody asks for them, unloaded when others need their place."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastapi import Request as HttpRequest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Receive, Scope, Send

from ktcore.engine.model import Model
from ktcore.engine.schedule.pace import STRETCH
from ktcore.engine.service import Service
from ktcore.errors import RequestError
from ktcore.placement.memory import human_bytes
from ktcore.server.http.errors import NoRoomError, UnknownModelError
from ktcore.server.http.metrics import Metrics
from ktcore.server.http.settings import Settings
from ktcore.server.models.facts import Facts, chat_template, facts_of
from ktcore.server.models.served import Served

log = logging.getLogger(__name__)
LEASES = "ktcore.leases"
WAIT_S = 60.0
"""Seconds that a request waits for other models' answers to end when its own has no place."""


@dataclass(frozen=True)
class Bounds:
    """What all loaded models together may take.

    Attributes:
        memory: device -> bytes.
        loaded: how many.
        idle_s: seconds without a request after which one is unloaded.
    """

    memory: Mapping[str, int] = field(default_factory=dict)
    loaded: int | None = None
    idle_s: float | None = None


@dataclass
class Entry:
    """One model of the server.

    Attributes:
        pinned: never unloaded.
        open: loads it; None for one that stays as it was given.
        queue: most requests that wait for admission.
        stretch: as `Service` takes it.
        leases: requests that use it, or wait for it.
        used: when the last of them began, by the monotonic clock.
        idle_s: seconds after its last request until it is unloaded; None: never.
    """

    path: Path
    settings: Settings
    facts: Facts
    pinned: bool = False
    open: Callable[[], Model] | None = None
    queue: int = 64
    stretch: float = STRETCH
    since: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    metrics: Metrics = field(default_factory=Metrics)
    served: Served | None = None
    loading: asyncio.Task[Served] | None = None
    leases: int = 0
    used: float = 0.0
    idle_s: float | None = None
    loads: int = 0
    load_s: float = 0.0

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.settings.name

    @property
    def expires(self) -> datetime | None:
        """When it will be unloaded if nobody asks for it."""
        if self.idle_s is None or self.pinned:
            return None
        left = max(0.0, self.used + self.idle_s - time.monotonic())
        return datetime.fromtimestamp(time.time() + left, timezone.utc)

    def template(self) -> str | None:
        """Its chat template, loaded or not."""
        served = self.served
        return chat_template(self.path) if served is None else served.model.tokenizer.chat_template


class Models:
    """Entries by name. Requests hold a lease on what they use, until they are answered; the event loop owns all of it.

    Args:
        entries: in the order in which they are listed; the first answers requests that name no model.
    """

    def __init__(self, entries: list[Entry], bounds: Bounds | None = None) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.bounds = bounds or Bounds()
        self.unloads = 0
        self._changes = asyncio.Lock()
        self._released = asyncio.Event()
        self._closing = False
        for entry in entries:
            if not entry.pinned:
                entry.idle_s = self.bounds.idle_s
            self._check_alone(entry)

    @staticmethod
    def around(service: Service, settings: Settings) -> Models:
        """One model that is loaded already, and stays its caller's to close."""
        facts = facts_of(service.model.checkpoint, {})
        entry = Entry(service.model.checkpoint.path, settings, facts, pinned=True)
        entry.metrics.attach(service)
        entry.served = Served(service, settings, entry.metrics)
        return Models([entry])

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self._closing and all(e.served.service.ready for e in self.loaded if e.served is not None)

    @property
    def loaded(self) -> list[Entry]:
        """Entries whose models are loaded."""
        return [entry for entry in self.entries.values() if entry.served is not None]

    @property
    def first(self) -> Entry:
        """What answers requests that name no model."""
        return next(iter(self.entries.values()))

    def entry(self, name: str) -> Entry:
        """The model of that name, loaded or not.

        Raises:
            UnknownModelError: there is none.
        """
        found = self.entries.get(name)
        if found is None:
            known = ", ".join(repr(n) for n in self.entries)
            raise UnknownModelError(f"there is no model {name!r} here", f"this server has {known}; /v1/models lists it")
        return found

    async def of(self, name: str, http: HttpRequest) -> Served:
        """The model of that name, loaded, until the request is answered.

        Raises:
            UnknownModelError: there is none.
            NoRoomError: others need the memory for too long.
            KtcoreError: it cannot be loaded, and why.
        """
        entry = self.entry(name)
        self._lease(entry, http.scope)
        entry.idle_s = None if entry.pinned else self.bounds.idle_s
        while entry.served is None:
            if entry.loading is None:
                entry.loading = asyncio.create_task(self._load(entry))
            # whoever asks first may go away: the others wait for the same task
            await asyncio.shield(entry.loading)
        return entry.served

    def keep(self, name: str, seconds: float | None) -> None:
        """Ollama's keep_alive, of a request that has a lease: unload after so many seconds without another one.

        Args:
            seconds: None: never, 0: when it is answered. The next request decides anew.
        """
        entry = self.entry(name)
        if not entry.pinned:
            entry.idle_s = seconds

    def close(self) -> None:
        """Unload what the server has loaded, once nobody asks any more."""
        self._closing = True
        for entry in self.loaded:
            if entry.open is not None:
                _close(entry)

    def load_pinned(self) -> None:
        """Load what is to be there from the start; before requests come."""
        for entry in self.entries.values():
            if entry.pinned and entry.served is None:
                _open(entry)

    def _check_alone(self, entry: Entry) -> None:
        for device, limit in self.bounds.memory.items():
            needed = entry.facts.memory.get(device, 0)
            if needed > limit:
                raise RequestError(
                    f"model {entry.name} needs {human_bytes(needed)} on {device}, "
                    f"all models together may take {human_bytes(limit)}",
                    "raise `memory`, or give the model a smaller context",
                )

    def _lease(self, entry: Entry, scope: Scope) -> None:
        entry.leases += 1
        entry.used = time.monotonic()

        def release() -> None:
            entry.leases -= 1
            entry.used = time.monotonic()
            self._released.set()
            if not entry.leases and entry.served is not None and entry.idle_s is not None:
                asyncio.get_running_loop().call_later(entry.idle_s, self._expire, entry)

        scope.setdefault(LEASES, []).append(release)

    def _expire(self, entry: Entry) -> None:
        async def unload() -> None:
            async with self._changes:
                if self._idle(entry) and entry.idle_s is not None and time.monotonic() >= entry.used + entry.idle_s:
                    await self._unload(entry)

        if not entry.leases and not self._closing:
            self._expiring = asyncio.create_task(unload())

    @staticmethod
    def _idle(entry: Entry) -> bool:
        return entry.served is not None and entry.open is not None and not entry.pinned and not entry.leases

    async def _load(self, entry: Entry) -> Served:
        try:
            async with self._changes:
                await self._make_room(entry)
                return await asyncio.to_thread(_open, entry)
        finally:
            entry.loading = None

    async def _make_room(self, entry: Entry) -> None:
        ends = time.monotonic() + WAIT_S
        while not self._fits(entry):
            self._released.clear()
            idle = [other for other in self.loaded if self._idle(other)]
            if idle:
                await self._unload(min(idle, key=lambda e: e.used))
                continue
            names = ", ".join(other.name for other in self.loaded)
            left = ends - time.monotonic()
            if left <= 0 or all(other.pinned for other in self.loaded):
                raise NoRoomError(f"{entry.name} cannot be loaded now: {names} take what memory there is", "come later")
            try:
                await asyncio.wait_for(self._released.wait(), left)
            except asyncio.TimeoutError:
                continue

    def _fits(self, entry: Entry) -> bool:
        loaded = self.loaded
        if self.bounds.loaded is not None and len(loaded) >= self.bounds.loaded:
            return False
        return all(
            sum(e.facts.memory.get(device, 0) for e in (*loaded, entry)) <= limit
            for device, limit in self.bounds.memory.items()
        )

    async def _unload(self, entry: Entry) -> None:
        log.info("%s is unloaded", entry.name)
        self.unloads += 1
        await asyncio.to_thread(_close, entry)


class Leases:
    """Gives leases back when a request's answer is complete, whatever became of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            for release in scope.pop(LEASES, []):
                release()


def entry_of(
    path: Path,
    settings: Settings,
    facts: Facts,
    pinned: bool,
    loading: Mapping[str, Any],
    queue: int = 64,
    stretch: float = STRETCH,
) -> Entry:
    """A model that is loaded by `ktcore.load` with the options `loading`."""

    def open_model() -> Model:
        from ktcore.engine.model import load

        return load(path, **loading)

    return Entry(path, settings, facts, pinned, open_model, queue, stretch)


def server_figures(models: Models) -> Iterator[Metric]:
    """Metrics of the server itself: which models are loaded, and how often they were."""
    loaded = GaugeMetricFamily("ktcore_model_loaded", "Whether a model is loaded", labels=["model"])
    loads = CounterMetricFamily("ktcore_model_loads", "Times that a model was loaded", labels=["model"])
    seconds = CounterMetricFamily("ktcore_model_load_seconds", "Time that its loads took", labels=["model"])
    for entry in models.entries.values():
        loaded.add_metric([entry.name], entry.served is not None)
        loads.add_metric([entry.name], entry.loads)
        seconds.add_metric([entry.name], entry.load_s)
    yield from (loaded, loads, seconds)
    yield CounterMetricFamily("ktcore_model_unloads", "Models that were unloaded", models.unloads)


def _open(entry: Entry) -> Served:
    assert entry.open is not None, f"{entry.name} was given loaded"
    began = time.perf_counter()
    model = entry.open()
    service = Service(model, entry.queue, entry.stretch).__enter__()
    entry.metrics.attach(service)
    entry.served = served = Served(service, entry.settings, entry.metrics)
    entry.loads += 1
    took = time.perf_counter() - began
    entry.load_s += took
    entry.used = time.monotonic()
    # which backend and device, once: a model that is loaded again takes the same
    taken = f". {model.taken}" if entry.loads == 1 else ""
    log.info("%s loaded in %.1f s%s", entry.name, took, taken)
    return served


def _close(entry: Entry) -> None:
    served, entry.served = entry.served, None
    if served is None:
        return
    entry.metrics.attach(None)
    served.service.close()
    served.model.close()
    del served
    gc.collect()  # the model's parts know each other: without this its memory would stay for a while
