"""Reading the shared event log on behalf of the readers of one worker.

One tailer per worker follows the store while anybody reads; a reader is little more than a
position. A slow reader delays nobody else.
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

#: Seconds between two attempts to use a store that failed.
RETRY_SECONDS = 0.5
#: Seconds between two deliveries to readers: the first event of a burst goes out at once, the rest
#: of it together.
DELIVERY_SECONDS = 0.1
#: Events that a worker keeps in memory for its readers, and the most that one read fetches.
MAX_RECENT = 2_000
#: Bytes of the events in memory, and again of those that were joined for several readers.
MAX_RECENT_BYTES = 8 << 20
#: Bytes after which a reader is written to before it gets further events.
MAX_PIECE_BYTES = 256 << 10
#: Readers of one worker; the next one gets 503.
MAX_SUBSCRIBERS = 100


class TooManySubscribers(GatewayError):
    """This worker already serves as many readers of the event stream as it can."""

    status, code = 503, "too_many_subscribers"
    headers = [("Retry-After", "30")]


class Tail:
    """The events of all workers as they arrive, for the readers of one worker.

    The tailer keeps the newest frames in memory; a reader only has a position. A reader that falls
    behind the frames in memory reads from the store, and one that falls behind the store gets a
    ``gap``.
    """

    def __init__(self, store: SharedStore) -> None:
        self._store = store
        self._recent: deque[tuple[int, str, bytes]] = deque()
        self._recent_bytes = 0
        #: Results of :meth:`frames_after` since the last change; most readers share a position.
        self._cache: dict[tuple[int, frozenset[str]], tuple[bytes, int]] = {}
        self._cache_bytes = 0
        self._changed = Event()
        self._reader: gevent.Greenlet | None = None
        self.newest = 0
        #: How many times the log has started over, e.g. because Redis lost its data.
        self.log_generation = 0
        self.stopping = False
        self.subscribers = 0

    def subscribe(self, last_id: int | None, types: frozenset[str]) -> Subscription:
        """Open a reader's stream, which counts against MAX_SUBSCRIBERS until it is closed."""
        if self.subscribers >= MAX_SUBSCRIBERS:
            raise TooManySubscribers("Too many readers of the event stream; try again later.")
        oldest, newest = self._store.span()
        if self._reader is None:
            self._clear()
            self.newest = newest
            self._reader = gevent.spawn(self._run_reader)
        self.subscribers += 1
        position = newest if last_id is None or last_id < 0 else last_id
        if position > newest:
            position = oldest - 1  # the id belongs to an earlier log: everything in this one is new
        return Subscription(self, position, types)

    def unsubscribe(self) -> None:
        """Remove a reader; the tailer stops after the last one."""
        self.subscribers -= 1
        if not self.subscribers and self._reader is not None:
            self._reader.kill(block=False)
            self._reader = None

    def stop(self) -> None:
        """End every reader's stream."""
        self.stopping = True
        self.wake()

    def wake(self) -> None:
        """Make every reader check whether there is something for it."""
        changed, self._changed = self._changed, Event()
        changed.set()

    @property
    def changed(self) -> Event:
        """An Event that the next change sets. Get it before checking, so as not to miss one."""
        return self._changed

    def frames_after(self, position: int, types: frozenset[str]) -> tuple[bytes, int]:
        """Frames after a position, about MAX_PIECE_BYTES at most, and the position after them."""
        if position >= self.newest:
            return b"", position
        if not self._recent or self._recent[0][0] > position + 1:
            return self._from_store(position, types)
        found = self._cache.get((position, types))
        if found is None:
            # the ids in memory have no gaps
            entries = itertools.islice(self._recent, position + 1 - self._recent[0][0], None)
            found = _join(entries, types)
            self._cache_bytes += len(found[0])
            if self._cache_bytes > MAX_RECENT_BYTES:
                self._clear_cache()
                self._cache_bytes = len(found[0])
            self._cache[position, types] = found
        return found

    def _from_store(self, position: int, types: frozenset[str]) -> tuple[bytes, int]:
        try:
            stored = self._store.after(position, 500)
        except StoreError:
            gevent.sleep(RETRY_SECONDS)
            return b"", position
        if not stored:
            return b"", max(position, self.newest)
        gap = b""
        if stored[0].id > position + 1:
            missed = stored[0].id - position - 1
            gap = _frame(stored[0].id - 1, "gap", _gap(missed))
        entries = ((event.id, event.type, _frame(*event)) for event in stored)
        frames, last = _join(entries, types)
        return gap + frames, last

    def _run_reader(self) -> None:
        while True:
            try:
                self._store.wait(self.newest, 1.0)
                stored = self._store.after(self.newest, MAX_RECENT)
                if not stored:
                    self._check_for_new_log(*self._store.span())
            except StoreError:
                gevent.sleep(RETRY_SECONDS)
                continue
            if stored:
                self._keep(stored)
                self.wake()
                gevent.sleep(DELIVERY_SECONDS)

    def _keep(self, stored: list[StoredEvent]) -> None:
        if stored[0].id != self.newest + 1:
            self._clear()
        self._clear_cache()
        for event in stored:
            frame = _frame(*event)
            self._recent.append((event.id, event.type, frame))
            self._recent_bytes += len(frame)
        while len(self._recent) > MAX_RECENT or self._recent_bytes > MAX_RECENT_BYTES:
            self._recent_bytes -= len(self._recent.popleft()[2])
        self.newest = stored[-1].id

    def _check_for_new_log(self, oldest: int, newest: int) -> None:
        if newest < self.newest:
            self._clear()
            self.newest = oldest - 1
            self.log_generation += 1

    def _clear(self) -> None:
        self._recent.clear()
        self._recent_bytes = 0
        self._clear_cache()

    def _clear_cache(self) -> None:
        self._cache.clear()
        self._cache_bytes = 0


class Subscription(Iterator[bytes | None]):
    """A reader's stream: SSE frames, and None when nothing has happened for HEARTBEAT seconds."""

    #: Seconds of silence after which a reader gets a comment.
    HEARTBEAT = 15.0

    def __init__(self, tail: Tail, position: int, types: frozenset[str]) -> None:
        self._tail = tail
        self._types = types
        self._position = position
        self._log_generation = tail.log_generation
        self._open = True
        self._frames = self._read()

    def __next__(self) -> bytes | None:
        return next(self._frames)

    def end(self) -> None:
        """End the stream because its reader disconnected. May be called from the event loop."""
        self.close()
        self._tail.wake()

    def close(self) -> None:
        """Free the reader's place. Idempotent."""
        if self._open:
            self._open = False
            self._tail.unsubscribe()

    def _read(self) -> Iterator[bytes | None]:
        tail = self._tail
        yield b"retry: 3000\n" + _frame(self._position, "connected", _connected())
        last = time.monotonic()
        while self._open and not tail.stopping:
            changed = tail.changed
            if self._log_generation != tail.log_generation:
                self._log_generation, self._position = tail.log_generation, 0
            frames, self._position = tail.frames_after(self._position, self._types)
            heartbeat_at = last + self.HEARTBEAT
            if frames:
                yield frames
            elif time.monotonic() >= heartbeat_at:
                yield None
            else:
                if self._position >= tail.newest:
                    changed.wait(heartbeat_at - time.monotonic())
                continue
            last = time.monotonic()


def _frame(event_id: int, event: str, data: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event_id, event.encode(), data)


def _join(entries: Iterable[tuple[int, str, bytes]], types: frozenset[str]) -> tuple[bytes, int]:
    """Join the frames of some types, at least one entry and about MAX_PIECE_BYTES at most; returns
    the id of the last entry that was looked at, too."""
    frames = []
    size = last = 0
    for number, event, frame in entries:
        last = number
        if not types or event in types:
            frames.append(frame)
            size += len(frame)
            if size >= MAX_PIECE_BYTES:
                break
    return b"".join(frames), last


def _connected() -> bytes:
    return dumps({"timestamp": timestamp(time.time()), "message": "Connected to the event stream"})


def _gap(missed: int) -> bytes:
    return dumps({"timestamp": timestamp(time.time()), "missed": missed})
