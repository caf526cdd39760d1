"""Reading the shared event log: what every worker published, for the readers of one worker.

One tailer per worker, alive only while somebody reads, follows the store; a reader is little more
than a position. A slow reader is not felt by anybody else.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator

import gevent
from gevent.event import Event

from gateway.clock import timestamp
from gateway.errors import GatewayError, dumps
from gateway.state import SharedStore, StoredEvent, StoreError

#: Seconds between two attempts at a store that failed.
RETRY_SECONDS = 0.5
#: Seconds between two deliveries to readers: what comes first is shown at once, what comes in
#: crowds is shown together.
PAUSE_SECONDS = 0.1
#: Events that a worker keeps in memory for its readers, and the most that one read takes.
MAX_RECENT = 2_000
#: Readers of one worker; one more gets 503.
MAX_SUBSCRIBERS = 100


class TooManySubscribers(GatewayError):
    """This worker has as many readers of the event stream as it takes."""

    status, code = 503, "too_many_subscribers"
    headers = [("Retry-After", "30")]


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


def _frame(event_id: int, event: str, data: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event_id, event.encode(), data)


def _join(entries: Iterable[tuple[int, str, bytes]], types: frozenset[str]) -> bytes:
    return b"".join(frame for _, kind, frame in entries if not types or kind in types)


def _connected() -> bytes:
    return dumps({"timestamp": timestamp(time.time()), "message": "Connected to the event stream"})


def _gap(missed: int) -> bytes:
    return dumps({"timestamp": timestamp(time.time()), "missed": missed})
