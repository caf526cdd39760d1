"""Reports each exchange to metrics, events and the access log."""

from __future__ import annotations

import itertools
import secrets

from gateway.clock import Moment
from gateway.observe.access_log import AccessLog
from gateway.observe.events import EventBus
from gateway.observe.metrics import Metrics
from gateway.observe.record import Record, milliseconds


class Reporter:
    """Reports the exchanges of one worker."""

    def __init__(self, events: EventBus, metrics: Metrics, log: AccessLog) -> None:
        self._events = events
        self._metrics = metrics
        self._log = log
        self._worker = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        #: Streams in flight by operation, with their start and the number of chunks last reported.
        self._streams: dict[str, tuple[Record, Moment, int]] = {}

    def begin(self, record: Record) -> None:
        """Report the start of an exchange, just before it goes to LM Studio.

        Its end is reported by :meth:`Record.finish`.
        """
        record.on_finish = self._end
        # not the request id: a client may send the same one twice
        record.operation = f"{self._worker}-{next(self._numbers)}"
        self._metrics.begin()
        started = self._events.publish("inference_start", record.start_event(), record.operation)
        if record.stream:
            self._streams[record.operation] = (record, started, 0)

    def report_progress(self) -> None:
        """Update the chunk counts of the streams in flight; called at regular intervals."""
        for operation, (record, started, reported) in self._streams.items():
            if record.chunks != reported:
                self._streams[operation] = (record, started, record.chunks)
                data = {**record.start_event(), "chunks": record.chunks}
                self._events.update_in_flight(data, started, operation)

    def _end(self, record: Record) -> None:
        self._streams.pop(record.operation, None)
        self._metrics.end(record)
        if record.error is not None and not record.cancelled:
            error = {
                "requestId": record.request_id,
                "operation": "inference",
                "error": record.error,
                "totalTimeMs": milliseconds(record.ended - record.started),
            }
            self._events.publish("error", error)
        self._events.publish("inference_complete", record.complete_event(), record.operation)
        self._log.log_exchange(record)
