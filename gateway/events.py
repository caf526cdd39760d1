"""The shared event queue: anybody publishes, every ``/debug/stream`` of every worker shows it.

:meth:`EventBus.publish` appends to a bounded queue in memory and returns; one greenlet per worker
writes what is there to the shared store, one tailer per worker, alive only while somebody listens,
reads what all workers wrote. Neither a slow store nor a slow reader is felt by a request.
"""

from __future__ import annotations

import itertools
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gevent
from gevent.event import Event

from gateway.errors import GatewayError, dumps
from gateway.store import Batch, SharedStore, StoredEvent, StoreError, merge

#: Events that wait in one worker for a store that does not take them; the oldest are dropped.
MAX_WAITING = 20_000
#: Events written at once, and seconds in which they are collected.
MAX_BATCH = 2_000
COLLECT_SECONDS = 0.05
#: Seconds between two attempts at a store that failed.
RETRY_SECONDS = 0.5
#: Seconds between two looks for requests whose worker has died.
LOST_SECONDS = 1.0
#: Seconds between two deliveries to readers: what comes first is shown at once, what comes in
#: crowds is shown together.
PAUSE_SECONDS = 0.1
#: Events that a worker keeps in memory for its readers, and the most that one read takes.
MAX_RECENT = 2_000
#: Readers of one worker; one more gets 503.
MAX_SUBSCRIBERS = 100

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

#: By what it is told how long something is in flight; see :func:`elapsed_ms`.
CLOCKS = ("startedAt", "steady", "machine")


class Moment(NamedTuple):
    """Now, by the wall clock (s since 1970), which may jump, and by the machine's steady one."""

    wall: float
    steady: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.time(), time.monotonic())


class TooManySubscribers(GatewayError):
    """This worker has as many readers of the event stream as it takes."""

    status, code = 503, "too_many_subscribers"
    headers = [("Retry-After", "30")]


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


class Tail:
    """The events of all workers as they come, for the readers of one worker.

    The tailer keeps the newest frames in memory; a reader has nothing but its place. One that is
    too slow for the memory reads the store, one that is too slow for the store gets a ``gap``.
    """

    def __init__(self, store: SharedStore) -> None:
        self._store = store
        self._recent: deque[tuple[int, str, bytes]] = deque(maxlen=MAX_RECENT)
        #: What was found for readers since the last news: most of them are at the same place.
        self._found: dict[tuple[int, frozenset[str]], tuple[bytes, int]] = {}
        self._news = Event()
        self._reader: gevent.Greenlet | None = None
        self.newest = 0
        #: Counts how often the log began anew (a Redis that lost its data, say).
        self.log_number = 0
        self.stopping = False
        self.subscribers = 0

    def subscribe(self, last_id: int | None, types: frozenset[str]) -> Subscription:
        """A reader's stream; the reader counts from here on until its ``close``."""
        if self.subscribers >= MAX_SUBSCRIBERS:
            raise TooManySubscribers("Too many readers of the event stream; try again later.")
        oldest, newest = self._store.span()
        if self._reader is None:
            self._forget()
            self.newest = newest
            self._reader = gevent.spawn(self._read_for_ever)
        self.subscribers += 1
        place = newest if last_id is None or last_id < 0 else last_id
        if place > newest:
            place = oldest - 1  # an id of another log: all that this one holds is new
        return Subscription(self, place, types)

    def leave(self) -> None:
        """A reader has gone; with the last one the tailer ends."""
        self.subscribers -= 1
        if not self.subscribers and self._reader is not None:
            self._reader.kill(block=False)
            self._reader = None

    def stop(self) -> None:
        """End every reader's stream."""
        self.stopping = True
        self.wake()

    def wake(self) -> None:
        """Let every reader look whether there is something for it."""
        news, self._news = self._news, Event()
        news.set()

    @property
    def news(self) -> Event:
        """What is set at the next news; to be taken before one looks."""
        return self._news

    def behind(self, place: int, types: frozenset[str]) -> tuple[bytes, int]:
        """The frames behind a place, and the new place."""
        if place >= self.newest:
            return b"", place
        if not self._recent or self._recent[0][0] > place + 1:
            return self._from_store(place, types)
        found = self._found.get((place, types))
        if found is None:
            # what is kept in memory has no holes
            entries = itertools.islice(self._recent, place + 1 - self._recent[0][0], None)
            found = self._found[place, types] = _join(entries, types), self.newest
        return found

    def _from_store(self, place: int, types: frozenset[str]) -> tuple[bytes, int]:
        try:
            stored = self._store.after(place, 500)
        except StoreError:
            gevent.sleep(RETRY_SECONDS)
            return b"", place
        if not stored:
            return b"", max(place, self.newest)
        gap = b""
        if stored[0].id > place + 1:
            missed = stored[0].id - place - 1
            gap = _frame(stored[0].id - 1, "gap", _gap(missed))
        entries = [(event.id, event.type, _frame(*event)) for event in stored]
        return gap + _join(entries, types), stored[-1].id

    def _read_for_ever(self) -> None:
        while True:
            try:
                self._store.wait(self.newest, 1.0)
                stored = self._store.after(self.newest, MAX_RECENT)
                if not stored:
                    self._look_for_new_log(*self._store.span())
            except StoreError:
                gevent.sleep(RETRY_SECONDS)
                continue
            if stored:
                self._take(stored)
                self.wake()
                gevent.sleep(PAUSE_SECONDS)

    def _take(self, stored: list[StoredEvent]) -> None:
        if stored[0].id != self.newest + 1:
            self._forget()
        self._found.clear()
        self._recent.extend((event.id, event.type, _frame(*event)) for event in stored)
        self.newest = stored[-1].id

    def _look_for_new_log(self, oldest: int, newest: int) -> None:
        if newest < self.newest:
            self._forget()
            self.newest = oldest - 1
            self.log_number += 1

    def _forget(self) -> None:
        self._recent.clear()
        self._found.clear()


class Subscription(Iterator[bytes | None]):
    """A reader's stream: SSE frames, None where nothing has happened for a while."""

    #: Seconds for which a reader waits before it gets a comment.
    HEARTBEAT = 15.0

    def __init__(self, tail: Tail, place: int, types: frozenset[str]) -> None:
        self._tail = tail
        self._types = types
        self._place = place
        self._log_number = tail.log_number
        self._open = True
        self._frames = self._read()

    def __next__(self) -> bytes | None:
        return next(self._frames)

    def end(self) -> None:
        """The reader has left: end its stream. May be called from the event loop."""
        self.close()
        self._tail.wake()

    def close(self) -> None:
        """Count no longer. Idempotent."""
        if self._open:
            self._open = False
            self._tail.leave()

    def _read(self) -> Iterator[bytes | None]:
        tail = self._tail
        yield b"retry: 3000\n" + _frame(self._place, "connected", _connected())
        last = time.monotonic()
        while self._open and not tail.stopping:
            news = tail.news
            if self._log_number != tail.log_number:
                self._log_number, self._place = tail.log_number, 0
            frames, self._place = tail.behind(self._place, self._types)
            quiet_until = last + self.HEARTBEAT
            if frames:
                yield frames
            elif time.monotonic() >= quiet_until:
                yield None
            else:
                if self._place >= tail.newest:
                    news.wait(quiet_until - time.monotonic())
                continue
            last = time.monotonic()


def timestamp(moment: float) -> str:
    """ISO 8601 in UTC with milliseconds."""
    milliseconds = int(moment * 1000)
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03}Z"


@lru_cache(maxsize=16)
def _second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def elapsed_ms(running: dict[str, Any]) -> int:
    """How long an operation in flight has run: by the steady clock if it runs on this machine, of
    which every worker has the same, else by the wall clocks."""
    if running.get("machine") == _MACHINE:
        seconds = time.monotonic() - float(running["steady"])
    else:
        seconds = time.time() - float(running["startedAt"])
    return max(0, round(seconds * 1000))


def _machine() -> str:
    """What names this machine since its last start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


_MACHINE = _machine()


def _batch(event: str, data: dict[str, Any], moment: Moment, operation: str) -> Batch:
    batch = Batch()
    if event != _PROGRESS:
        batch.events.append((event, dumps({"timestamp": timestamp(moment.wall), **data})))
    if operation and event in _BEGINS:
        kind = "model_load" if event == "model_load_start" else "inference"
        clocks = dict(zip(CLOCKS, (*moment, _MACHINE), strict=True))
        running = {"operation": kind, **clocks, **data}
        batch.begun[operation] = dumps(running)
    elif operation and event in _ENDS:
        batch.ended.add(operation)
    return batch


def _frame(event_id: int, event: str, data: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event_id, event.encode(), data)


def _join(entries: Iterable[tuple[int, str, bytes]], types: frozenset[str]) -> bytes:
    return b"".join(frame for _, kind, frame in entries if not types or kind in types)


def _connected() -> bytes:
    return dumps({"timestamp": timestamp(time.time()), "message": "Connected to the event stream"})


def _gap(missed: int) -> bytes:
    return dumps({"timestamp": timestamp(time.time()), "missed": missed})
