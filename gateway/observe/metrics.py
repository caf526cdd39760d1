"""The Prometheus instruments, which cover all workers of this machine.

Under gunicorn, prometheus-client runs in multiprocess mode (see :mod:`gateway.serving.worker`):
each worker counts in memory-mapped files of its own, which outlive it, and any worker can add them
up.
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
#: Bucket bounds in seconds; a local model may take minutes.
_DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OVERHEADS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)
_ENDPOINTS = {path if path.startswith("/v1") else "/v1" + path for path in SHORTHAND}
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}


class Metrics:
    """The instruments of one worker.

    Label values are bounded whatever clients send: known endpoints and methods, status codes, and
    ``other``.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.started = self._counter("requests_started", "Inference exchanges that started.")
        self._requests = self._counter(
            "requests", "Inference exchanges that ended.", "endpoint", "method", "status"
        )
        self._errors = self._counter("request_errors", "Inference exchanges that failed.")
        self._cancellations = self._counter(
            "cancellations", "Inference exchanges whose client disconnected."
        )
        # OpenTelemetry's names of the generative AI metrics, in Prometheus' form
        self._duration = self._histogram(
            "gen_ai_server_request_duration_seconds",
            "Time from the arrival of a request to the last byte of its response.",
            _DURATIONS,
        )
        self._ttft = self._histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from the arrival of a streaming request to the first byte of its response body.",
            _DURATIONS,
        )
        self._upstream = self._histogram(
            f"{PREFIX}_upstream_seconds",
            "Time spent waiting for the response headers of LM Studio.",
            _DURATIONS,
        )
        self._overhead = self._histogram(
            f"{PREFIX}_overhead_seconds",
            "Time that the gateway itself needs before a request goes to LM Studio.",
            _OVERHEADS,
        )
        tokens = self._counter("tokens", "Tokens, as counted by LM Studio.", "type")
        self._input_tokens, self._output_tokens = tokens.labels("input"), tokens.labels("output")
        self._with_tokens = self._counter(
            "requests_with_tokens", "Inference exchanges for which LM Studio reported tokens."
        )
        self._auth_failures = self._counter(
            "auth_failures", "Requests rejected by access control.", "reason"
        )
        self._loads = self._counter("model_loads", "Model loads that ended.", "outcome")
        self._dropped = self._counter(
            "events_dropped", "Events dropped because the store was unavailable."
        )
        self._in_flight = self._gauge("requests_in_flight", "Inference exchanges in flight.")
        self.subscribers = self._gauge("event_subscribers", "Readers of /debug/stream.")
        self._children: dict[tuple[str, str, int], Any] = {}

    # Counting ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Count the start of an exchange."""
        self.started.inc()
        self._in_flight.inc()

    def end(self, record: Record) -> None:
        """Count the end of an exchange, and observe its times and tokens."""
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
        """Count a request rejected by access control; ``reason`` is the error code."""
        self._auth_failures.labels(reason).inc()

    def load_ended(self, outcome: str) -> None:
        """Count a model load that ended; ``outcome`` is ``loaded`` or ``failed``."""
        self._loads.labels(outcome).inc()

    def dropped(self, count: int) -> None:
        """Count events dropped because the store was unavailable."""
        self._dropped.inc(count)

    # Reading ----------------------------------------------------------------------------------

    def exposition(self, upstream_up: Callable[[], bool]) -> bytes:
        """The text of ``/metrics``; ``upstream_up`` says whether LM Studio responds."""
        registry = CollectorRegistry()
        registry.register(_BuildCollector())
        registry.register(_UpstreamCollector(upstream_up))
        registry.register(self._collector())
        return generate_latest(registry)

    def totals(self) -> dict[str, float]:
        """Each sample summed over its labels, e.g. ``lmstudio_gateway_requests_total``.

        Only the label ``type`` is kept, e.g. ``lmstudio_gateway_tokens_total|input``.
        """
        sums: dict[str, float] = {}
        for metric in self._collector().collect():
            for sample in metric.samples:
                if not sample.name.endswith("_bucket"):
                    name = "|".join([sample.name, *sample.labels.get("type", "").split()])
                    sums[name] = sums.get(name, 0.0) + sample.value
        return sums

    def _collector(self) -> Any:
        """Collects the values of all workers under gunicorn, otherwise those of this process."""
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


class _BuildCollector(Collector):
    """The version and the commit of the gateway, as labels."""

    def collect(self) -> Iterable[Metric]:
        labels = {"version": version.__version__, "commit": version.commit() or "unknown"}
        yield InfoMetricFamily(f"{PREFIX}_build", "Version and commit of the gateway.", labels)


class _UpstreamCollector(Collector):
    """The ``upstream_up`` gauge, computed at each scrape."""

    def __init__(self, is_up: Callable[[], bool]) -> None:
        self._is_up = is_up

    def collect(self) -> Iterable[Metric]:
        name = f"{PREFIX}_upstream_up"
        yield GaugeMetricFamily(name, "Whether LM Studio responds.", value=float(self._is_up()))
