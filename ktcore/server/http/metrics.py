"""Counts and times for Prometheus, of one server: nothing is registered for the whole process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ktcore.backend.implementation import ExpertLoad
from ktcore.engine.service import DeadlineError, Delta, Service

FIRST_TOKEN = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
BETWEEN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics:
    """The metrics of one model, whether its service is there or not."""

    def __init__(self) -> None:
        self.registry = place = CollectorRegistry()
        self._service: Service | None = None
        place.register(EngineFigures(lambda: self._service))
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

    def attach(self, service: Service | None) -> None:
        """The model is loaded and served by `service`, or is no more."""
        self._service = service

    def observer(self) -> Observer:
        """What watches the deltas of one answer that begins now."""
        return Observer(self)


class EngineFigures(Collector):
    """What an engine shows of itself while it is there: queue, pages, the prefix cache by tier, experts by layer."""

    def __init__(self, service: Callable[[], Service | None]) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The figures of this moment."""
        service = self._service()
        if service is None:
            return
        engine = service.model.engine
        pages, prefix = engine.scheduler.pages, engine.prefix
        yield GaugeMetricFamily("ktcore_waiting", "Requests that are not admitted yet", service.waiting)
        yield GaugeMetricFamily("ktcore_running", "Answers that take part in steps", service.running)
        yield GaugeMetricFamily("ktcore_kv_pages", "KV pages in all", pages.total)
        yield GaugeMetricFamily("ktcore_kv_pages_free", "KV pages nobody owns", pages.free)
        yield GaugeMetricFamily("ktcore_kv_pages_kept", "Free KV pages whose prefixes can still be shared", pages.kept)
        yield CounterMetricFamily(
            "ktcore_preemptions", "Times that an answer made room for others", engine.scheduler.preemptions
        )
        guessed = CounterMetricFamily("ktcore_guessed_tokens", "Next tokens that were guessed", labels=["by"])
        right = CounterMetricFamily("ktcore_guessed_right_tokens", "Of those, the ones that were drawn", labels=["by"])
        for by, tally in engine.guesses.items():
            guessed.add_metric([by], tally.guessed)
            right.add_metric([by], tally.right)
        yield guessed
        yield right
        stats = prefix.stats
        yield CounterMetricFamily("ktcore_prefix_asked_tokens", "Prompt tokens of admitted requests", stats.asked)
        reused = CounterMetricFamily("ktcore_prefix_reused_tokens", "Of those, what was not computed", labels=["tier"])
        for tier, count in (("device", stats.device), ("memory", stats.memory), ("disk", stats.disk)):
            reused.add_metric([tier], count)
        yield reused
        stored = GaugeMetricFamily("ktcore_prefix_bytes", "Bytes of the prefix cache", labels=["tier"])
        stored.add_metric(["memory"], prefix.memory.bytes)
        stored.add_metric(["disk"], 0 if prefix.disk is None else prefix.disk.used)
        yield stored
        yield from self._experts(engine.model.expert_loads)

    @staticmethod
    def _experts(loads: Mapping[int, Sequence[ExpertLoad]]) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "ktcore_expert_tokens", "Pairs of token and expert that ran on the host, by layer", labels=["layer"]
        )
        busiest = GaugeMetricFamily(
            "ktcore_expert_busiest_share", "Of those, the share of the layer's busiest expert", labels=["layer"]
        )
        used = GaugeMetricFamily("ktcore_experts_used", "Experts that ran at all, by layer", labels=["layer"])
        for layer, modules in sorted(loads.items()):
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


def text_of(metrics: Mapping[str, Metrics], more: Sequence[Metric] = ()) -> bytes:
    """The metrics of models by name in Prometheus' format; of several, each sample says its model.

    Args:
        more: the server's own.
    """
    if len(metrics) == 1 and not more:
        return generate_latest(next(iter(metrics.values())).registry)
    joined = CollectorRegistry()
    joined.register(_Joined(metrics, more))
    return generate_latest(joined)


class _Joined(Collector):
    def __init__(self, metrics: Mapping[str, Metrics], more: Sequence[Metric]) -> None:
        self._metrics = metrics
        self._more = more

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, one in self._metrics.items():
            for family in one.registry.collect():
                joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                joined.samples += [s._replace(labels={"model": name, **s.labels}) for s in family.samples]
        yield from families.values()
        yield from self._more
