"""Publishing to the shared event log.

:meth:`EventBus.publish` appends to a bounded queue in memory and returns; one greenlet per worker
writes what is there to the store. A slow store is not felt by a request.
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

#: Events that wait in one worker for a store that does not take them; the oldest are dropped.
MAX_WAITING = 20_000
#: Events written at once, and seconds in which they are collected.
MAX_BATCH = 2_000
COLLECT_SECONDS = 0.05
#: Seconds between two looks for requests whose worker has died.
LOST_SECONDS = 1.0

#: Every event there is, in the order of the contract (§6); ``gap`` tells of lost ones.
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
    "error",
    "gap",
)

#: Events that begin and end what /debug/status shows as running
#: (the empty one stands for news about an exchange in flight).
_PROGRESS = ""
_BEGINS = {"inference_start", "model_load_start", _PROGRESS}
_ENDS = {"inference_complete", "model_load_complete", "error"}

logger = logging.getLogger(__name__)

Published = tuple[str, dict[str, Any], "Moment", str]


class EventBus:
    """The event queue of one worker."""

    def __init__(self, store: SharedStore, on_drop: Callable[[int], None] = lambda count: None):
        self._store = store
        self._on_drop = on_drop
        self._waiting: deque[Published] = deque()
        self._arrived = Event()
        self._dropped = 0
        #: Operations whose end was dropped: they are in flight no more all the same.
        self._ended_untold: set[str] = set()
        self._writer: gevent.Greenlet | None = None
        self._tail = Tail(store)
        #: Why events wait for the store; empty while it takes them.
        self.trouble = ""
        self._stuck = 0

    def publish(self, event: str, data: dict[str, Any], operation: str = "") -> Moment:
        """Tell an event. ``operation`` names what begins or ends with it (a request's id, say).

        Returns when it happened.
        """
        moment = Moment.now()
        waiting = self._waiting
        if len(waiting) >= MAX_WAITING:
            kind, _, _, ended = waiting.popleft()
            if ended and kind in _ENDS:
                self._ended_untold.add(ended)
            if kind != _PROGRESS:
                self._dropped += 1
                self._on_drop(1)
        waiting.append((event, data, moment, operation))
        if not self._arrived.is_set():
            self._arrived.set()
        return moment

    def show(self, data: dict[str, Any], began: Moment, operation: str) -> None:
        """Show more about an exchange in flight; no event."""
        if len(self._waiting) < MAX_WAITING // 2:
            self._waiting.append((_PROGRESS, data, began, operation))
            self._arrived.set()

    def start(self) -> None:
        """Start writing; in the worker, after the fork."""
        if self._writer is None:
            self._writer = gevent.spawn(self._write_for_ever)

    def subscribe(self, last_id: int | None, types: frozenset[str]) -> Subscription:
        """The event stream from behind ``last_id`` (None: from now on). Raises TooManySubscribers
        or StoreError."""
        return self._tail.subscribe(last_id, types)

    @property
    def subscribers(self) -> int:
        return self._tail.subscribers

    def stop_streams(self) -> None:
        """End all streams of this worker."""
        self._tail.stop()

    def stop(self) -> None:
        """Write what still waits, as far as the store takes it at once."""
        self.stop_streams()
        if self._writer is not None:
            self._writer.kill()
            self._writer = None
        lost = self._stuck
        while self._waiting:
            batch = self._take()
            try:
                self._store.append(batch)
            except StoreError:
                lost += len(batch.events) + len(self._waiting)
                break
        if lost:
            logger.warning("%d events were lost at the end", lost)

    def _write_for_ever(self) -> None:
        next_look = 0.0
        while True:
            self._arrived.wait(LOST_SECONDS)
            gevent.sleep(COLLECT_SECONDS)
            self._arrived.clear()
            while self._waiting:
                self._write(self._take())
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOST_SECONDS
                self._tell_lost()

    def _write(self, batch: Batch) -> None:
        """Write a batch, as often as it takes."""
        while True:
            try:
                self._store.append(batch)
                self.trouble, self._stuck = "", 0
                return
            except StoreError as error:
                if not self.trouble:
                    logger.warning("events wait: %s", error.message)
                self.trouble, self._stuck = error.message, len(batch.events)
                gevent.sleep(RETRY_SECONDS)

    def _take(self) -> Batch:
        """Up to MAX_BATCH of the waiting events, with a ``gap`` in front if some were dropped."""
        batches = []
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            batches.append(_batch("gap", {"missed": dropped}, Moment.now(), ""))
            batches.append(Batch(ended=self._ended_untold))
            self._ended_untold = set()
        for _ in range(min(len(self._waiting), MAX_BATCH)):
            batches.append(_batch(*self._waiting.popleft()))
        return merge(batches)

    def _tell_lost(self) -> None:
        try:
            lost = self._store.take_lost()
        except StoreError:
            return
        for operation in lost:
            took = {"totalTimeMs": elapsed_ms(operation)}
            told = {"operation": operation["operation"], "error": "The worker process died."}
            request_id = operation.get("requestId")
            if request_id is None:
                self.publish("error", {**told, **took})
                continue
            self.publish("error", {"requestId": request_id, **told, **took})
            self.publish("inference_complete", lost_completion(request_id, took["totalTimeMs"]))


def lost_completion(request_id: str, total_ms: int) -> dict[str, Any]:
    """``inference_complete`` of a request whose worker died."""
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
    if event != _PROGRESS:
        batch.events.append((event, dumps({"timestamp": timestamp(moment.wall), **data})))
    if operation and event in _BEGINS:
        kind = "model_load" if event == "model_load_start" else "inference"
        clocks = dict(zip(CLOCKS, (*moment, MACHINE), strict=True))
        running = {"operation": kind, **clocks, **data}
        batch.begun[operation] = dumps(running)
    elif operation and event in _ENDS:
        batch.ended.add(operation)
    return batch
