"""The Prometheus instruments, true over all workers of this machine, and ``/metrics``.

prometheus-client runs in multiprocess mode under gunicorn (see :mod:`gateway.worker`): each worker
counts in mapped files of its own, which outlive it, and any worker adds all of them up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from gateway import version
from gateway.errors import SHORTHAND
from gateway.observe.record import Record

PREFIX = "lmstudio_gateway"
#: Seconds; a local model takes its time.
_DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OVERHEADS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)
_ENDPOINTS = {path if path.startswith("/v1") else "/v1" + path for path in SHORTHAND}
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}


class Metrics:
    """The instruments of one worker. Label values are bounded: known paths and methods, numbers of
    statuses, and ``other``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.started = self._counter("requests_started", "Inference exchanges that began.")
        self._requests = self._counter(
            "requests", "Inference exchanges that ended.", "endpoint", "method", "status"
        )
        self._errors = self._counter("request_errors", "Inference exchanges that failed.")
        self._cancellations = self._counter("cancellations", "Exchanges whose client left.")
        # OpenTelemetry's names of the generative AI metrics, in Prometheus' form
        self._duration = self._histogram(
            "gen_ai_server_request_duration_seconds",
            "From the request's arrival to the last byte of its answer.",
            _DURATIONS,
        )
        self._ttft = self._histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a streaming request's arrival to the first byte of its answer's body.",
            _DURATIONS,
        )
        self._upstream = self._histogram(
            f"{PREFIX}_upstream_seconds", "Waiting for the head of LM Studio's answer.", _DURATIONS
        )
        self._overhead = self._histogram(
            f"{PREFIX}_overhead_seconds",
            "The gateway's own work before a request goes to LM Studio.",
            _OVERHEADS,
        )
        tokens = self._counter("tokens", "Tokens, as LM Studio counts them.", "type")
        self._input_tokens, self._output_tokens = tokens.labels("input"), tokens.labels("output")
        self._with_tokens = self._counter("requests_with_tokens", "Exchanges that told tokens.")
        self._auth_failures = self._counter("auth_failures", "Requests turned away.", "reason")
        self._loads = self._counter("model_loads", "Model loads that ended.", "outcome")
        self._dropped = self._counter("events_dropped", "Events that the log did not take.")
        self._in_flight = self._gauge("requests_in_flight", "Inference exchanges running now.")
        self.subscribers = self._gauge("event_subscribers", "Readers of /debug/stream.")
        self._children: dict[tuple[str, str, int], Any] = {}

    # Counting ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """An exchange begins."""
        self.started.inc()
        self._in_flight.inc()

    def end(self, record: Record) -> None:
        """An exchange has ended."""
        self._in_flight.dec()
        self._child(record).inc()
        if record.counts_as_error:
            self._errors.inc()
        if record.cancelled:
            self._cancellations.inc()
        self._duration.observe(record.ended - record.started)
        if record.stream and record.first_byte is not None:
            self._ttft.observe(record.first_byte - record.started)
        if record.upstream_sent is not None:
            self._overhead.observe(record.upstream_sent - record.started)
            if record.upstream_head is not None:
                self._upstream.observe(record.upstream_head - record.upstream_sent)
        if record.tokens:
            self._with_tokens.inc()
            self._input_tokens.inc(record.tokens.get("promptTokens", 0))
            self._output_tokens.inc(record.tokens.get("completionTokens", 0))

    def rejected(self, reason: str) -> None:
        """A request had no access; ``reason`` is the error's code."""
        self._auth_failures.labels(reason).inc()

    def load_ended(self, outcome: str) -> None:
        """A model load ended: ``loaded`` or ``failed``."""
        self._loads.labels(outcome).inc()

    def dropped(self, count: int) -> None:
        """Events were dropped because the store did not take them."""
        self._dropped.inc(count)

    # Reading ----------------------------------------------------------------------------------

    def exposition(self, upstream_up: Callable[[], bool]) -> bytes:
        """The text of ``/metrics``."""
        registry = CollectorRegistry()
        registry.register(_Build())
        registry.register(_Up(upstream_up))
        registry.register(_Everything(self._collector()))
        return generate_latest(registry)

    def totals(self) -> dict[str, float]:
        """The sums of every sample without its labels, e.g. ``lmstudio_gateway_requests_total``."""
        sums: dict[str, float] = {}
        for metric in self._collector().collect():
            for sample in metric.samples:
                if not sample.name.endswith("_bucket"):
                    name = "|".join([sample.name, *sample.labels.get("type", "").split()])
                    sums[name] = sums.get(name, 0.0) + sample.value
        return sums

    def _collector(self) -> Any:
        """All workers' values under gunicorn, this process's otherwise."""
        if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            return self._registry
        return MultiProcessCollector(None)  # type: ignore[no-untyped-call]

    def _child(self, record: Record) -> Any:
        key = (record.path, record.method, record.status)
        child = self._children.get(key)
        if child is None:
            endpoint = record.path if record.path in _ENDPOINTS else "other"
            method = record.method if record.method in _METHODS else "other"
            child = self._requests.labels(endpoint, method, str(record.status))
            if endpoint != "other" and method != "other":
                self._children[key] = child
        return child

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, text, buckets=tuple(buckets), registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        mode: Any = "livesum"
        return Gauge(f"{PREFIX}_{name}", text, multiprocess_mode=mode, registry=self._registry)


class _Build(Collector):
    """The version of the gateway and its commit, as labels."""

    def collect(self) -> Iterable[Metric]:
        labels = {"version": version.__version__, "commit": version.commit() or "unknown"}
        yield InfoMetricFamily(f"{PREFIX}_build", "The version and the commit.", value=labels)

    def describe(self) -> Iterable[Metric]:
        return []


class _Up(Collector):
    """Whether LM Studio answers, asked at each scrape."""

    def __init__(self, is_up: Callable[[], bool]) -> None:
        self._is_up = is_up

    def collect(self) -> Iterable[Metric]:
        name = f"{PREFIX}_upstream_up"
        yield GaugeMetricFamily(name, "Whether LM Studio answers.", value=float(self._is_up()))

    def describe(self) -> Iterable[Metric]:
        return []


class _Everything(Collector):
    """Another collector's metrics, for a registry of one scrape."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        found: Iterable[Metric] = self._source.collect()
        return found

    def describe(self) -> Iterable[Metric]:
        return []
