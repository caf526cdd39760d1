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
    """Tells of the exchanges of one worker."""

    def __init__(self, events: EventBus, metrics: Metrics, log: AccessLog) -> None:
        self._events = events
        self._metrics = metrics
        self._log = log
        self._worker = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        #: Streams in flight, with when they began and how many chunks were told of.
        self._streams: dict[str, tuple[Record, Moment, int]] = {}

    def begin(self, record: Record) -> None:
        """An exchange was accepted and goes to LM Studio now."""
        record.on_finish = self._end
        # a client may send the same request id twice
        record.operation = f"{self._worker}-{next(self._numbers)}"
        self._metrics.begin()
        began = self._events.publish("inference_start", record.start_event(), record.operation)
        if record.stream:
            self._streams[record.operation] = (record, began, 0)

    def report_progress(self) -> None:
        """Show how far the streams in flight have come; to be called every so often."""
        for operation, (record, began, told) in self._streams.items():
            if record.chunks != told:
                self._streams[operation] = (record, began, record.chunks)
                data = {**record.start_event(), "chunks": record.chunks}
                self._events.show(data, began, operation)

    def _end(self, record: Record) -> None:
        self._streams.pop(record.operation, None)
        self._metrics.end(record)
        if record.error is not None and not record.cancelled:
            told = {
                "requestId": record.request_id,
                "operation": "inference",
                "error": record.error,
                "totalTimeMs": milliseconds(record.ended - record.started),
            }
            self._events.publish("error", told)
        self._events.publish("inference_complete", record.complete_event(), record.operation)
        self._log.exchange(record)
