"""The event queue of one worker never blocks, is bounded, and reports what it dropped; its readers
get every event in order or a gap."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from gateway.clock import elapsed_ms, timestamp
from gateway.observe import EventBus
from gateway.observe.events import MAX_BATCH_SIZE, MAX_EVENT_SIZE, MAX_QUEUED, MAX_QUEUED_SIZE
from gateway.observe.readers import (
    MAX_PIECE_BYTES,
    MAX_RECENT,
    MAX_RECENT_BYTES,
    MAX_SUBSCRIBERS,
    Subscription,
    Tail,
    TooManySubscribers,
)
from gateway.state import Batch, StoredEvent, StoreError

NO_TYPES: frozenset[str] = frozenset()


class Store:
    """A store in memory that keeps the newest ``keeps`` events and can become unavailable."""

    def __init__(self, keeps: int = 100_000) -> None:
        self.keeps = keeps
        self.log: list[StoredEvent] = []
        self.running: dict[str, Any] = {}
        self.newest = 0
        self.unavailable = False
        self.refused = 0
        self.reads = 0

    def append(self, batch: Batch) -> None:
        self._check()
        for kind, data in batch.events:
            self.newest += 1
            self.log.append(StoredEvent(self.newest, kind, data))
        self.log = self.log[-self.keeps :]
        self.running |= batch.begun
        for one in batch.ended:
            self.running.pop(one, None)

    def after(self, last_id: int, limit: int) -> list[StoredEvent]:
        self._check()
        self.reads += 1
        return [event for event in self.log if event.id > last_id][:limit]

    def span(self) -> tuple[int, int]:
        self._check()
        return (self.log[0].id if self.log else self.newest + 1), self.newest

    def wait(self, last_id: int, timeout: float) -> None:
        self._check()
        with gevent.Timeout(timeout, False):
            while self.newest == last_id:
                gevent.sleep(0.005)

    def take_lost(self) -> list[dict[str, Any]]:
        self._check()
        return []

    def _check(self) -> None:
        if self.unavailable:
            self.refused += 1
            raise StoreError("unavailable")


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("events", "readers"):
        monkeypatch.setattr(f"gateway.observe.{module}.RETRY_SECONDS", 0.02)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def bus(store: Store) -> Iterator[EventBus]:
    bus = EventBus(store)  # type: ignore[arg-type]
    bus.start()
    yield bus
    store.unavailable = False
    bus.stop()


def until(condition: Callable[[], Any]) -> None:
    """Let the greenlets run until the condition holds."""
    with gevent.Timeout(20):
        while not condition():
            gevent.sleep(0.005)


def logged(store: Store, kind: str) -> list[dict[str, Any]]:
    """The data of the events of a type in the log."""
    return [json.loads(event.data) for event in store.log if event.type == kind]


def test_events_are_stored_in_order_with_the_time_of_publishing(
    bus: EventBus, store: Store
) -> None:
    before = timestamp(time.time())
    for number in range(5000):
        bus.publish("error", {"n": number})
    after = timestamp(time.time())
    until(lambda: len(store.log) == 5000)
    assert [data["n"] for data in logged(store, "error")] == list(range(5000))
    assert all(before <= data["timestamp"] <= after for data in logged(store, "error"))


def test_an_unavailable_store_takes_no_memory_and_dropped_events_are_reported(
    store: Store,
) -> None:
    dropped: list[int] = []
    bus = EventBus(store, dropped.append)  # type: ignore[arg-type]
    store.unavailable = True
    bus.start()
    extra = 5000
    for number in range(MAX_QUEUED + extra):
        bus.publish("error", {"n": number})
    assert len(bus._queue) == MAX_QUEUED
    until(lambda: bus.store_error)
    assert store.log == []
    store.unavailable = False
    until(lambda: not bus._queue)
    until(lambda: logged(store, "error")[-1:] and logged(store, "error")[-1]["n"] == number)
    kept = [data["n"] for data in logged(store, "error")]
    gaps = logged(store, "gap")
    assert sum(gap["missed"] for gap in gaps) == sum(dropped) == extra
    assert kept == list(range(extra, MAX_QUEUED + extra))
    assert store.log[0].type == "gap"
    bus.stop()


def test_an_exchange_whose_end_event_was_dropped_does_not_stay_in_flight(
    bus: EventBus, store: Store
) -> None:
    bus.publish("inference_start", {"requestId": "r"}, "r")
    until(lambda: "r" in store.running)
    store.unavailable = True
    bus.publish("inference_complete", {"requestId": "r"}, "r")
    for number in range(MAX_QUEUED * 2):
        bus.publish("error", {"n": number})
    store.unavailable = False
    until(lambda: not bus._queue)
    until(lambda: logged(store, "error")[-1:] and logged(store, "error")[-1]["n"] == number)
    assert store.running == {}


def test_events_that_were_dropped_whole_leave_no_trace(bus: EventBus, store: Store) -> None:
    store.unavailable = True
    for number in range(MAX_QUEUED * 3):
        bus.publish("inference_start", {"requestId": "r"}, f"op-{number}")
        bus.publish("inference_complete", {"requestId": "r"}, f"op-{number}")
    assert len(bus._dropped_starts) <= 1
    # those of the batch that the writer had taken already
    assert len(bus._dropped_ends) <= 2000
    store.unavailable = False
    until(lambda: not bus._queue and not bus._unwritten)
    assert store.running == {}


def test_the_queue_is_bounded_in_size_too(store: Store) -> None:
    dropped: list[int] = []
    bus = EventBus(store, dropped.append)  # type: ignore[arg-type]
    config = {f"name{n}": "x" * 100 for n in range(100)}
    count = 2 * MAX_QUEUED_SIZE // 10_000
    for _ in range(count):
        bus.publish("model_activate", {"defaultInference": config})
    kept = len(bus._queue)
    assert kept == count - sum(dropped)
    assert kept * 10_000 < MAX_QUEUED_SIZE < kept * 15_000
    batches = 0
    while bus._queue:
        batch = bus._take()
        batches += 1
        assert sum(len(data) for _, data in batch.events) < 2 * MAX_BATCH_SIZE
    assert batches > 5
    assert bus._queued_size == 0


def test_an_event_that_is_too_large_loses_its_objects(bus: EventBus, store: Store) -> None:
    config = {"promptTemplate": ["x" * MAX_EVENT_SIZE]}
    data = {"modelKey": "k" * 5000, "instanceId": None, "loadConfig": config, "stop": ["a"]}
    bus.publish("model_load_start", data)
    until(lambda: store.log)
    (event,) = logged(store, "model_load_start")
    assert event.pop("timestamp")
    assert event == {"modelKey": "k" * 1000, "instanceId": None, "loadConfig": {}, "stop": []}


def test_events_published_just_before_the_stop_are_stored(store: Store) -> None:
    bus = EventBus(store)  # type: ignore[arg-type]
    bus.start()
    bus.publish("error", {"n": 1})
    bus.stop()
    assert [data["n"] for data in logged(store, "error")] == [1]


def test_a_store_error_and_the_number_of_events_lost_at_shutdown_are_reported(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    bus = EventBus(store)  # type: ignore[arg-type]
    bus.start()
    store.unavailable = True
    bus.publish("error", {"n": 1})
    until(lambda: bus.store_error)
    store.unavailable = False
    until(lambda: logged(store, "error"))
    assert bus.store_error == ""
    store.unavailable = True
    bus.publish("error", {"n": 2})
    until(lambda: bus.store_error)
    for number in range(3, 6):
        bus.publish("error", {"n": number})
    bus.stop()
    assert caplog.messages[-1] == "4 events were lost at shutdown"


def test_time_in_flight_is_measured_by_the_steady_clock_of_its_machine(
    bus: EventBus, store: Store
) -> None:
    bus.publish("inference_start", {"requestId": "r"}, "r")
    until(lambda: "r" in store.running)
    running = json.loads(store.running["r"])
    moved = {**running, "startedAt": running["startedAt"] + 3600}
    assert 0 <= elapsed_ms(moved) < 60_000
    hour_ago = {**running, "machine": "another", "startedAt": running["startedAt"] - 3600}
    assert 3_600_000 <= elapsed_ms(hour_ago) < 3_660_000
    assert elapsed_ms({**moved, "machine": "another"}) == 0


class Reader:
    """A greenlet that reads a stream to its end."""

    def __init__(self, tail: Any, last_id: int | None = None, types: frozenset[str] = NO_TYPES):
        self.stream = tail.subscribe(last_id, types)
        self.pieces: list[bytes | None] = []
        self.greenlet = gevent.spawn(self._read)

    def _read(self) -> None:
        for piece in self.stream:
            self.pieces.append(piece)

    @property
    def text(self) -> str:
        return b"".join(piece or b"" for piece in self.pieces).decode()

    def ids(self) -> list[int]:
        """The ids of the events after ``connected``."""
        found = [line[4:] for line in self.text.split("\n") if line.startswith("id: ")]
        return [int(one) for one in found[1:]]

    def close(self) -> None:
        self.greenlet.kill()
        self.stream.close()


@pytest.fixture
def read(store: Store) -> Iterator[Callable[..., Reader]]:
    opened: list[Reader] = []

    def start(tail: Any, *arguments: Any) -> Reader:
        opened.append(Reader(tail, *arguments))
        return opened[-1]

    yield start
    for reader in opened:
        reader.close()


def fill(store: Store, count: int, kind: str = "error") -> None:
    store.append(Batch([(kind, b'{"n": 1}')] * count))


def test_a_new_reader_gets_only_later_events(store: Store, read: Callable[..., Reader]) -> None:
    fill(store, 5)
    reader = read(Tail(store))  # type: ignore[arg-type]
    until(lambda: reader.pieces)
    fill(store, 3)
    until(lambda: len(reader.ids()) == 3)
    assert reader.text.startswith("retry: 3000\nid: 5\nevent: connected\ndata: {")
    assert reader.ids() == [6, 7, 8]


def test_a_reader_resumes_after_its_last_event(store: Store, read: Callable[..., Reader]) -> None:
    fill(store, MAX_RECENT * 2)
    reader = read(Tail(store), 7)  # type: ignore[arg-type]
    until(lambda: len(reader.ids()) == MAX_RECENT * 2 - 7)
    assert reader.ids() == list(range(8, MAX_RECENT * 2 + 1))
    assert "gap" not in reader.text


def test_a_reader_that_resumes_too_late_gets_the_number_of_missed_events(
    read: Callable[..., Reader],
) -> None:
    store = Store(keeps=100)
    fill(store, 1000)
    reader = read(Tail(store), 400)  # type: ignore[arg-type]
    until(lambda: reader.ids()[-1:] == [1000])
    assert reader.text.count("event: gap") == 1
    assert '"missed":500' in reader.text
    assert reader.ids() == [900, *range(901, 1001)]


def test_a_slow_reader_gets_a_gap_and_holds_no_memory() -> None:
    store = Store(keeps=MAX_RECENT)
    tail = Tail(store)  # type: ignore[arg-type]
    slow = tail.subscribe(None, NO_TYPES)
    next(slow)
    for _ in range(50):
        fill(store, 500)
        until(lambda: tail.newest == store.newest)
    assert len(tail._recent) <= MAX_RECENT
    text = b""
    while b"id: %d\n" % store.newest not in text:
        text += next(slow) or b""
    missed = store.newest - MAX_RECENT
    assert f'"missed":{missed}'.encode() in text
    assert text.count(b"event: error") == MAX_RECENT
    slow.close()


def test_large_events_in_memory_are_bounded_in_bytes(
    store: Store, read: Callable[..., Reader]
) -> None:
    tail = Tail(store)  # type: ignore[arg-type]
    size = 100_000
    data = b'"%b"' % (b"x" * size)
    count = 3 * MAX_RECENT_BYTES // size
    slow = tail.subscribe(None, NO_TYPES)
    next(slow)
    fast = read(tail)
    for done in range(0, count, 20):
        store.append(Batch([("error", data)] * 20))
        until(lambda done=done: len(fast.ids()) == done + 20)
        assert sum(len(frame) for _, _, frame in tail._recent) <= MAX_RECENT_BYTES
        assert sum(len(frames) for frames, _ in tail._cache.values()) <= MAX_RECENT_BYTES
    assert max(len(piece or b"") for piece in fast.pieces) < MAX_PIECE_BYTES + 2 * size
    # what is no longer in memory comes from the store
    text = b""
    while b"id: %d\n" % store.newest not in text:
        text += next(slow) or b""
    assert text.count(b"event: error") == store.newest
    assert b"event: gap" not in text
    slow.close()


def test_a_reader_gets_only_the_types_that_it_asked_for(
    store: Store, read: Callable[..., Reader]
) -> None:
    tail = Tail(store)  # type: ignore[arg-type]
    reader = read(tail, 0, frozenset({"model_activate"}))
    fill(store, 5)
    fill(store, 1, "model_activate")
    fill(store, 5)
    until(lambda: reader.ids())
    assert reader.ids() == [6]
    assert "event: error" not in reader.text


def test_a_quiet_reader_gets_comments_even_while_others_are_busy(
    store: Store, read: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subscription, "HEARTBEAT", 0.2)
    tail = Tail(store)  # type: ignore[arg-type]
    idle = read(tail)
    until(lambda: None in idle.pieces)
    filtered = read(tail, None, frozenset({"model_activate"}))
    with gevent.Timeout(10, AssertionError("no comment while only other types are published")):
        while None not in filtered.pieces:
            fill(store, 1)
            gevent.sleep(0.02)


def test_the_number_of_readers_is_bounded_and_closed_ones_free_their_place(
    store: Store, read: Callable[..., Reader]
) -> None:
    tail = Tail(store)  # type: ignore[arg-type]
    readers = [read(tail) for _ in range(MAX_SUBSCRIBERS)]
    with pytest.raises(TooManySubscribers) as caught:
        tail.subscribe(None, NO_TYPES)
    assert caught.value.status == 503
    assert ("Retry-After", "30") in caught.value.headers
    readers[0].close()
    read(tail)
    assert tail.subscribers == MAX_SUBSCRIBERS


def test_the_store_is_not_read_without_readers(store: Store, read: Callable[..., Reader]) -> None:
    tail = Tail(store)  # type: ignore[arg-type]
    first, second = read(tail), read(tail)
    fill(store, 10)
    until(lambda: first.ids() and second.ids())
    assert store.reads == 1  # one read for both
    greenlet = tail._reader
    assert greenlet is not None
    first.close()
    assert tail._reader is greenlet
    second.close()
    assert tail.subscribers == 0
    until(lambda: greenlet.dead)


def test_readers_go_on_when_the_store_is_available_again(
    store: Store, read: Callable[..., Reader]
) -> None:
    reader = read(Tail(store))  # type: ignore[arg-type]
    until(lambda: reader.pieces)
    store.unavailable = True
    until(lambda: store.refused > 1)
    store.unavailable = False
    fill(store, 3)
    until(lambda: reader.ids() == [1, 2, 3])


def test_stopping_the_streams_ends_every_reader(store: Store, read: Callable[..., Reader]) -> None:
    bus = EventBus(store)  # type: ignore[arg-type]
    readers = [read(bus) for _ in range(5)]
    until(lambda: all(reader.pieces for reader in readers))
    bus.stop_streams()
    until(lambda: all(reader.greenlet.dead for reader in readers))
