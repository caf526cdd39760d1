"""The metrics of a gateway, which cover all workers of this machine, dead ones included."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway import version
from gateway.errors import SHORTHAND
from gateway.observe.instruments import Instruments, total
from gateway.observe.pages import Cell, SharedPages
from gateway.observe.record import Record

PREFIX = "lmstudio_gateway"
#: Bucket bounds in seconds; a local model may take minutes.
_DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OVERHEADS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)
_ENDPOINTS = {path if path.startswith("/v1") else "/v1" + path for path in SHORTHAND}
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}


#: What the gauges of a worker become when it dies: its exchanges in flight have failed.
LOST = {
    f"{PREFIX}_requests_in_flight": f"{PREFIX}_request_errors",
    f"{PREFIX}_event_subscribers": "",
}


class Metrics:
    """The instruments of one worker.

    Label values are bounded whatever clients send: known endpoints and methods, status codes, and
    ``other``.
    """

    def __init__(self) -> None:
        make = self._instruments = Instruments()
        self.started = make.counter(
            f"{PREFIX}_requests_started", "Inference exchanges that started."
        )
        self._requests = make.counter(
            f"{PREFIX}_requests", "Inference exchanges that ended.", "endpoint", "method", "status"
        )
        self._errors = make.counter(f"{PREFIX}_request_errors", "Inference exchanges that failed.")
        self._cancellations = make.counter(
            f"{PREFIX}_cancellations", "Inference exchanges whose client disconnected."
        )
        # OpenTelemetry's names of the generative AI metrics, in Prometheus' form
        self._duration = make.histogram(
            "gen_ai_server_request_duration_seconds",
            "Time from the arrival of a request to the last byte of its response.",
            _DURATIONS,
        )
        self._ttft = make.histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from the arrival of a streaming request to the first byte of its response body.",
            _DURATIONS,
        )
        self._upstream = make.histogram(
            f"{PREFIX}_upstream_seconds",
            "Time spent waiting for the response headers of LM Studio.",
            _DURATIONS,
        )
        self._overhead = make.histogram(
            f"{PREFIX}_overhead_seconds",
            "Time that the gateway itself needs before a request goes to LM Studio.",
            _OVERHEADS,
        )
        tokens = make.counter(f"{PREFIX}_tokens", "Tokens, as counted by LM Studio.", "type")
        self._input_tokens, self._output_tokens = tokens.labels("input"), tokens.labels("output")
        self._with_tokens = make.counter(
            f"{PREFIX}_requests_with_tokens",
            "Inference exchanges for which LM Studio reported tokens.",
        )
        self._auth_failures = make.counter(
            f"{PREFIX}_auth_failures", "Requests rejected by access control.", "reason"
        )
        self._loads = make.counter(f"{PREFIX}_model_loads", "Model loads that ended.", "outcome")
        self._dropped = make.counter(
            f"{PREFIX}_events_dropped", "Events dropped because the store was unavailable."
        )
        self._in_flight = make.gauge(
            f"{PREFIX}_requests_in_flight", "Inference exchanges in flight."
        )
        self.subscribers = make.gauge(f"{PREFIX}_event_subscribers", "Readers of /debug/stream.")
        self._children: dict[tuple[str, str, int], Cell] = {}

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

    def attach(self, shared: SharedPages, slot: int) -> None:
        """Count where the other workers can read it; in the worker, after the fork."""
        self._instruments.attach(shared, slot)

    def exposition(self, upstream_up: Callable[[], bool]) -> bytes:
        """The text of ``/metrics``; ``upstream_up`` says whether LM Studio responds."""
        registry = CollectorRegistry()
        registry.register(_BuildCollector())
        registry.register(_UpstreamCollector(upstream_up))
        registry.register(_InstrumentsCollector(self._instruments))
        return generate_latest(registry)

    @property
    def workers(self) -> int:
        """How many worker processes count together."""
        return self._instruments.workers

    def totals(self) -> dict[str, float]:
        """The counters that machines share, added up over all workers of this one, dead ones too.

        An exchange that was lost with its worker counts as an error.
        """
        sums = self._instruments.sums()
        return {
            "requests": total(sums, f"{PREFIX}_requests_started"),
            "errors": total(sums, f"{PREFIX}_request_errors"),
            "completed": total(sums, f"{PREFIX}_requests"),
            "withTokens": total(sums, f"{PREFIX}_requests_with_tokens"),
            "promptTokens": total(sums, f"{PREFIX}_tokens", "input"),
            "completionTokens": total(sums, f"{PREFIX}_tokens", "output"),
        }

    def _child(self, record: Record) -> Cell:
        key = (record.path, record.method, record.status)
        child = self._children.get(key)
        if child is None:
            endpoint = record.path if record.path in _ENDPOINTS else "other"
            method = record.method if record.method in _METHODS else "other"
            child = self._requests.labels(endpoint, method, str(record.status))
            if endpoint != "other" and method != "other":
                self._children[key] = child
        return child


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


class _InstrumentsCollector(Collector):
    """The instruments of all workers."""

    def __init__(self, instruments: Instruments) -> None:
        self._instruments = instruments

    def collect(self) -> Iterable[Metric]:
        return self._instruments.collect()
