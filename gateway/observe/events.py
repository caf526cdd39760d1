"""Publishing to the shared event log.

:meth:`EventBus.publish` appends to a bounded queue in memory and returns; one greenlet per worker
writes the queue to the store in batches, so a slow store never delays a request.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent
from gevent.event import Event

from gateway.clock import CLOCKS, MACHINE, Moment, elapsed_ms, timestamp
from gateway.errors import dumps
from gateway.observe.readers import RETRY_SECONDS, Subscription, Tail
from gateway.state import Batch, SharedStore, StoreError, merge

#: Events that one worker queues while the store is unavailable; beyond that the oldest are dropped.
MAX_QUEUED = 20_000
#: Characters of all of them.
MAX_QUEUED_SIZE = 32 << 20
#: Characters of one event; a larger one loses its objects and lists.
MAX_EVENT_SIZE = 16 << 10
#: Events written in one batch, their characters, and seconds for which a batch is collected.
MAX_BATCH = 2_000
MAX_BATCH_SIZE = 4 << 20
COLLECT_SECONDS = 0.05
#: Seconds between two checks for operations whose worker has died.
LOST_CHECK_SECONDS = 1.0

#: Every event type, in the order of README.rst (*Watching it*); ``gap`` reports lost events.
TYPES = (
    "connected",
    "model_load_start",
    "model_load_progress",
    "model_load_complete",
    "model_unload_start",
    "model_unload_complete",
    "model_activate",
    "model_deactivate",
    "inference_start",
    "inference_complete",
    "host_state",
    "error",
    "gap",
)

#: Queued in place of an event type for an update of an exchange in flight; it is not published.
_UPDATE = ""
#: The events that start and end an operation which /debug/status shows as in flight.
_STARTS = {"inference_start", "model_load_start", _UPDATE}
_ENDS = {"inference_complete", "model_load_complete", "error"}

logger = logging.getLogger(__name__)

#: An event, its data, moment, operation and size.
_Queued = tuple[str, dict[str, Any], Moment, str, int]
#: The size of the events of an exchange, at most: a :class:`.Record` bounds its texts.
_INFERENCE_SIZE = 1_024


class EventBus:
    """The event queue of one worker. ``on_drop`` is called with the number of dropped events."""

    def __init__(self, store: SharedStore, on_drop: Callable[[int], None] = lambda count: None):
        self._store = store
        self._on_drop = on_drop
        self._queue: deque[_Queued] = deque()
        self._queued_size = 0
        self._wakeup = Event()
        self._dropped = 0
        #: Operations whose end event was dropped; they must not stay in flight forever.
        self._dropped_ends: set[str] = set()
        #: Operations whose start event was dropped and that have not ended: the store does not know
        #: them.
        self._dropped_starts: set[str] = set()
        self._writer: gevent.Greenlet | None = None
        self._tail = Tail(store)
        #: Why the store rejects events; empty while it accepts them.
        self.store_error = ""
        #: Events of the batch that the store has not accepted yet.
        self._unwritten = 0

    def publish(self, event: str, data: dict[str, Any], operation: str = "") -> Moment:
        """Queue an event and return the moment that it is stamped with.

        ``operation`` identifies the operation that the event starts or ends, and is unique among
        all workers.
        """
        moment = Moment.now()
        size = _INFERENCE_SIZE
        if not event.startswith("inference_"):
            size = _size(data)
            if size > MAX_EVENT_SIZE:
                data = _without_objects(data)
                size = _size(data)
        queue = self._queue
        while len(queue) >= MAX_QUEUED or self._queued_size + size > MAX_QUEUED_SIZE:
            self._drop_oldest()
        queue.append((event, data, moment, operation, size))
        self._queued_size += size
        if not self._wakeup.is_set():
            self._wakeup.set()
        return moment

    def update_in_flight(self, data: dict[str, Any], started: Moment, operation: str) -> None:
        """Replace what /debug/status shows of an exchange in flight; no event is published."""
        if len(self._queue) < MAX_QUEUED // 2 and self._queued_size < MAX_QUEUED_SIZE // 2:
            self._queue.append((_UPDATE, data, started, operation, _INFERENCE_SIZE))
            self._queued_size += _INFERENCE_SIZE
            self._wakeup.set()

    def start(self) -> None:
        """Start the writer; called in the worker, after the fork."""
        if self._writer is None:
            self._writer = gevent.spawn(self._run_writer)

    def subscribe(self, last_id: int | None, types: frozenset[str]) -> Subscription:
        """Stream the events after ``last_id`` (None: only new ones); no ``types`` means all.

        Raises :class:`TooManySubscribers` or :class:`StoreError`.
        """
        return self._tail.subscribe(last_id, types)

    @property
    def subscribers(self) -> int:
        return self._tail.subscribers

    def stop_streams(self) -> None:
        """End all event streams of this worker."""
        self._tail.stop()

    def stop(self) -> None:
        """End the streams and write the rest of the queue, without retries."""
        self.stop_streams()
        if self._writer is not None:
            self._writer.kill()
            self._writer = None
        lost = self._unwritten
        while self._queue:
            batch = self._take()
            try:
                self._store.append(batch)
            except StoreError:
                lost += len(batch.events) + len(self._queue)
                break
        if lost:
            logger.warning("%d events were lost at shutdown", lost)

    def _drop_oldest(self) -> None:
        event, _, _, operation, size = self._queue.popleft()
        self._queued_size -= size
        if operation and event in _ENDS:
            if operation in self._dropped_starts:
                self._dropped_starts.remove(operation)
            else:
                self._dropped_ends.add(operation)
        elif operation and event != _UPDATE:
            self._dropped_starts.add(operation)
        if event != _UPDATE:
            self._dropped += 1
            self._on_drop(1)

    def _run_writer(self) -> None:
        next_check = 0.0
        while True:
            self._wakeup.wait(LOST_CHECK_SECONDS)
            gevent.sleep(COLLECT_SECONDS)
            self._wakeup.clear()
            while self._queue:
                self._write(self._take())
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + LOST_CHECK_SECONDS
                self._report_lost()

    def _write(self, batch: Batch) -> None:
        """Write a batch, retrying until the store accepts it."""
        while True:
            try:
                self._store.append(batch)
                self.store_error, self._unwritten = "", 0
                return
            except StoreError as error:
                if not self.store_error:
                    logger.warning("events are waiting for the store: %s", error.message)
                self.store_error, self._unwritten = error.message, len(batch.events)
                gevent.sleep(RETRY_SECONDS)

    def _take(self) -> Batch:
        """Take up to MAX_BATCH events off the queue, after a ``gap`` if any were dropped."""
        batches = []
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            batches.append(_batch("gap", {"missed": dropped}, Moment.now(), ""))
            batches.append(Batch(ended=self._dropped_ends))
            self._dropped_ends = set()
        total = 0
        while self._queue and len(batches) < MAX_BATCH and total < MAX_BATCH_SIZE:
            event, data, moment, operation, size = self._queue.popleft()
            total += size
            self._dropped_starts.discard(operation)
            batches.append(_batch(event, data, moment, operation))
        self._queued_size -= total
        return merge(batches)

    def _report_lost(self) -> None:
        """Publish the end of every operation whose worker has died."""
        try:
            lost = self._store.take_lost()
        except StoreError:
            return
        for operation in lost:
            total_ms = elapsed_ms(operation)
            error = {
                "operation": operation["operation"],
                "error": "The worker process died.",
                "totalTimeMs": total_ms,
            }
            request_id = operation.get("requestId")
            if request_id is None:
                self.publish("error", error)
                continue
            self.publish("error", {"requestId": request_id, **error})
            self.publish("inference_complete", lost_completion(request_id, total_ms))


def _size(value: Any) -> int:
    """About how many characters a value takes as JSON."""
    if isinstance(value, str):
        return len(value) + 4
    if isinstance(value, dict):
        return sum(len(name) + _size(inner) for name, inner in value.items())
    if isinstance(value, list):
        return sum(map(_size, value))
    return 16


def _without_objects(data: dict[str, Any]) -> dict[str, Any]:
    """The data of an event that is too large, with the beginnings of its texts, and with its
    objects and lists empty."""
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict | list | str):
            kept[name] = value[:1000] if isinstance(value, str) else type(value)()
        else:
            kept[name] = value
    return kept


def lost_completion(request_id: str, total_ms: int) -> dict[str, Any]:
    """The data of ``inference_complete`` for a request whose worker died."""
    tokens = {"promptTokens": None, "completionTokens": None, "totalTokens": None}
    return {
        "requestId": request_id,
        "status": 502,
        "totalTimeMs": total_ms,
        "ttftMs": None,
        "tokenUsage": tokens,
        "tokensPerSec": None,
        "cancelled": False,
    }


def _batch(event: str, data: dict[str, Any], moment: Moment, operation: str) -> Batch:
    batch = Batch()
    if event != _UPDATE:
        batch.events.append((event, dumps({"timestamp": timestamp(moment.wall), **data})))
    if operation and event in _STARTS:
        kind = "model_load" if event == "model_load_start" else "inference"
        clocks = dict(zip(CLOCKS, (*moment, MACHINE), strict=True))
        batch.begun[operation] = dumps({"operation": kind, **clocks, **data})
    elif operation and event in _ENDS:
        batch.ended.add(operation)
    return batch
