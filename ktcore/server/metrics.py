"""Counts and times for Prometheus, of one server: nothing is registered for the whole process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ktcore.backend.implementation import ExpertLoad
from ktcore.engine.prefix.cache import PrefixStats
from ktcore.engine.service import DeadlineError, Delta, Service

FIRST_TOKEN = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
BETWEEN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics:
    """The metrics over a service."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        place = self._registry
        Gauge("ktcore_waiting", "Requests that are not admitted yet", registry=place).set_function(
            lambda: service.waiting
        )
        Gauge("ktcore_running", "Answers that take part in steps", registry=place).set_function(lambda: service.running)
        pages = service.model.engine.scheduler.pages
        Gauge("ktcore_kv_pages", "KV pages in all", registry=place).set(pages.total)
        Gauge("ktcore_kv_pages_free", "KV pages nobody owns", registry=place).set_function(lambda: pages.free)
        scheduler, prefix = service.model.engine.scheduler, service.model.engine.prefix
        Gauge("ktcore_kv_pages_kept", "Free KV pages whose prefixes can still be shared", registry=place).set_function(
            lambda: pages.kept
        )
        place.register(
            EngineCounts(lambda: (prefix.stats, scheduler.preemptions), service.model.engine.model.expert_loads)
        )
        stored = Gauge("ktcore_prefix_bytes", "Bytes of the prefix cache", ["tier"], registry=place)
        stored.labels("memory").set_function(lambda: prefix.memory.bytes)
        stored.labels("disk").set_function(lambda: 0 if prefix.disk is None else prefix.disk.used)
        self.ended = Counter("ktcore_answers", "Answers that ended, by how", ["finish"], registry=place)
        self.prompt = Counter("ktcore_prompt_tokens", "Prompt tokens of answers that ended", registry=place)
        self.drawn = Counter("ktcore_generated_tokens", "Drawn tokens of answers that ended", registry=place)
        self.first = Histogram(
            "ktcore_first_text_seconds",
            "Until an answer's first text, waiting included",
            buckets=FIRST_TOKEN,
            registry=place,
        )
        self.between = Histogram(
            "ktcore_between_texts_seconds", "Between two texts of an answer", buckets=BETWEEN, registry=place
        )

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self._registry)

    def observer(self) -> Observer:
        """What watches the deltas of one answer that begins now."""
        return Observer(self)


class EngineCounts(Collector):
    """What the engine counts: prompt tokens that came from the prefix cache, by tier, and preemptions."""

    def __init__(
        self, counts: Callable[[], tuple[PrefixStats, int]], loads: Mapping[int, Sequence[ExpertLoad]]
    ) -> None:
        self._counts = counts
        self._loads = loads

    def collect(self) -> Iterator[Metric]:
        """The figures of this moment."""
        stats, preemptions = self._counts()
        asked = CounterMetricFamily("ktcore_prefix_asked_tokens", "Prompt tokens of admitted requests")
        asked.add_metric([], stats.asked)
        yield asked
        reused = CounterMetricFamily("ktcore_prefix_reused_tokens", "Of those, what was not computed", labels=["tier"])
        for tier, count in (("device", stats.device), ("memory", stats.memory), ("disk", stats.disk)):
            reused.add_metric([tier], count)
        yield reused
        preempted = CounterMetricFamily("ktcore_preemptions", "Times that an answer made room for others")
        preempted.add_metric([], preemptions)
        yield preempted
        yield from self._experts()

    def _experts(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "ktcore_expert_tokens", "Pairs of token and expert that ran on the host, by layer", labels=["layer"]
        )
        busiest = GaugeMetricFamily(
            "ktcore_expert_busiest_share", "Of those, the share of the layer's busiest expert", labels=["layer"]
        )
        used = GaugeMetricFamily("ktcore_experts_used", "Experts that ran at all, by layer", labels=["layer"])
        for layer, modules in sorted(self._loads.items()):
            counted = [load for module in modules if (load := module.expert_load()) is not None]
            if not counted:
                continue
            every = torch.cat(counted)
            total = int(every.sum())
            tokens.add_metric([str(layer)], total)
            busiest.add_metric([str(layer)], int(every.max()) / total if total else 0.0)
            used.add_metric([str(layer)], int((every > 0).sum()))
        yield tokens
        yield busiest
        yield used


class Observer:
    """Notes one answer's deltas, on the step loop's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._clock = time.perf_counter()
        self._spoke = False

    def note(self, delta: Delta) -> None:
        """Count a delta."""
        metrics = self._metrics
        if delta.text:
            now = time.perf_counter()
            (metrics.between if self._spoke else metrics.first).observe(now - self._clock)
            self._clock, self._spoke = now, True
        if delta.last:
            how = "deadline" if isinstance(delta.error, DeadlineError) else "error"
            metrics.ended.labels(delta.finish.value if delta.finish else how).inc()
            metrics.prompt.inc(delta.stats.prompt_tokens)
            metrics.drawn.inc(delta.stats.new_tokens)
