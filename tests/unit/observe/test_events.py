"""The event queue of one worker: never in the way, bounded, honest about what it dropped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from gateway.clock import elapsed_ms, timestamp
from gateway.observe import EventBus
from gateway.observe.events import MAX_WAITING
from gateway.observe.readers import (
    MAX_RECENT,
    MAX_SUBSCRIBERS,
    Subscription,
    Tail,
    TooManySubscribers,
)
from gateway.state import Batch, StoredEvent, StoreError

NO_TYPES: frozenset[str] = frozenset()


class Store:
    """A store in memory that can be away, and that forgets what is older than ``keeps`` events."""

    def __init__(self, keeps: int = 100_000) -> None:
        self.keeps = keeps
        self.log: list[StoredEvent] = []
        self.running: dict[str, Any] = {}
        self.newest = 0
        self.away = False
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
        if self.away:
            raise StoreError("away")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
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
    store.away = False
    bus.stop()


def until(condition: Callable[[], Any]) -> None:
    """Let the greenlets run until something holds."""
    with gevent.Timeout(20):
        while not condition():
            gevent.sleep(0.005)


def told(store: Store, kind: str) -> list[dict[str, Any]]:
    return [json.loads(event.data) for event in store.log if event.type == kind]


def test_events_are_stored_in_order_with_the_time_they_were_told(
    bus: EventBus, store: Store
) -> None:
    before = timestamp(time.time())
    for number in range(5000):
        bus.publish("error", {"n": number})
    after = timestamp(time.time())
    until(lambda: len(store.log) == 5000)
    assert [data["n"] for data in told(store, "error")] == list(range(5000))
    assert all(before <= data["timestamp"] <= after for data in told(store, "error"))


def test_publishing_costs_microseconds(bus: EventBus) -> None:
    start = time.perf_counter()
    for _ in range(10_000):
        bus.publish("inference_start", {"requestId": "r"}, "r")
    print(f"publish: {(time.perf_counter() - start) * 100:.2f} µs")


def test_a_dead_store_takes_no_memory_and_what_was_dropped_is_told(store: Store) -> None:
    dropped: list[int] = []
    bus = EventBus(store, dropped.append)  # type: ignore[arg-type]
    store.away = True
    bus.start()
    extra = 5000
    for number in range(MAX_WAITING + extra):
        bus.publish("error", {"n": number})
    assert len(bus._waiting) == MAX_WAITING
    gevent.sleep(0.1)
    assert store.log == []
    store.away = False
    until(lambda: not bus._waiting)
    until(lambda: told(store, "error")[-1:] and told(store, "error")[-1]["n"] == number)
    kept = [data["n"] for data in told(store, "error")]
    gaps = told(store, "gap")
    assert sum(gap["missed"] for gap in gaps) == sum(dropped) == extra
    assert kept == list(range(extra, MAX_WAITING + extra))
    assert store.log[0].type == "gap"
    bus.stop()


def test_what_ended_while_its_event_was_dropped_is_not_in_flight_for_ever(
    bus: EventBus, store: Store
) -> None:
    bus.publish("inference_start", {"requestId": "r"}, "r")
    until(lambda: "r" in store.running)
    store.away = True
    bus.publish("inference_complete", {"requestId": "r"}, "r")
    for number in range(MAX_WAITING * 2):
        bus.publish("error", {"n": number})
    store.away = False
    until(lambda: not bus._waiting)
    until(lambda: told(store, "error")[-1:] and told(store, "error")[-1]["n"] == number)
    assert store.running == {}


def test_what_is_told_at_the_end_is_stored(store: Store) -> None:
    bus = EventBus(store)  # type: ignore[arg-type]
    bus.start()
    bus.publish("error", {"n": 1})
    bus.stop()
    assert [data["n"] for data in told(store, "error")] == [1]


def test_why_events_wait_and_how_many_are_lost_at_the_end_is_told(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    bus = EventBus(store)  # type: ignore[arg-type]
    bus.start()
    store.away = True
    bus.publish("error", {"n": 1})
    until(lambda: bus.trouble)
    store.away = False
    until(lambda: told(store, "error"))
    assert bus.trouble == ""
    store.away = True
    bus.publish("error", {"n": 2})
    until(lambda: bus.trouble)
    for number in range(3, 6):
        bus.publish("error", {"n": number})
    bus.stop()
    assert caplog.messages[-1] == "4 events were lost at the end"


def test_what_runs_ages_by_the_steady_clock_where_it_began(bus: EventBus, store: Store) -> None:
    bus.publish("inference_start", {"requestId": "r"}, "r")
    until(lambda: "r" in store.running)
    running = json.loads(store.running["r"])
    moved = {**running, "startedAt": running["startedAt"] + 3600}
    assert 0 <= elapsed_ms(moved) < 60_000
    hour_ago = {**running, "machine": "another", "startedAt": running["startedAt"] - 3600}
    assert 3_600_000 <= elapsed_ms(hour_ago) < 3_660_000
    assert elapsed_ms({**moved, "machine": "another"}) == 0


class Reader:
    """A greenlet that takes what a stream gives."""

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
        """The ids behind ``connected``."""
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


def test_a_reader_gets_what_comes_after_it(store: Store, read: Callable[..., Reader]) -> None:
    fill(store, 5)
    reader = read(Tail(store))  # type: ignore[arg-type]
    until(lambda: reader.pieces)
    fill(store, 3)
    until(lambda: len(reader.ids()) == 3)
    assert reader.text.startswith("retry: 3000\nid: 5\nevent: connected\ndata: {")
    assert reader.ids() == [6, 7, 8]


def test_a_reader_resumes_behind_its_last_event(store: Store, read: Callable[..., Reader]) -> None:
    fill(store, MAX_RECENT * 2)
    reader = read(Tail(store), 7)  # type: ignore[arg-type]
    until(lambda: len(reader.ids()) == MAX_RECENT * 2 - 7)
    assert reader.ids() == list(range(8, MAX_RECENT * 2 + 1))
    assert "gap" not in reader.text


def test_a_reader_that_comes_too_late_is_told_how_many_it_missed(
    read: Callable[..., Reader],
) -> None:
    store = Store(keeps=100)
    fill(store, 1000)
    reader = read(Tail(store), 400)  # type: ignore[arg-type]
    until(lambda: reader.ids()[-1:] == [1000])
    assert reader.text.count("event: gap") == 1
    assert '"missed":500' in reader.text
    assert reader.ids() == [900, *range(901, 1001)]


def test_a_slow_reader_is_told_its_gap_and_holds_no_memory() -> None:
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


def test_types_are_chosen(store: Store, read: Callable[..., Reader]) -> None:
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
    chosen = read(tail, None, frozenset({"model_activate"}))
    with gevent.Timeout(10, AssertionError("no comment while other types are told")):
        while None not in chosen.pieces:
            fill(store, 1)
            gevent.sleep(0.02)


def test_readers_are_bounded_and_those_that_leave_make_room(
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


def test_the_store_is_read_only_while_somebody_listens(
    store: Store, read: Callable[..., Reader]
) -> None:
    tail = Tail(store)  # type: ignore[arg-type]
    first, second = read(tail), read(tail)
    fill(store, 10)
    until(lambda: first.ids() and second.ids())
    assert store.reads == 1  # one read for both
    first.close()
    second.close()
    reads = store.reads
    fill(store, 10)
    gevent.sleep(0.1)
    assert store.reads == reads
    assert tail.subscribers == 0


def test_a_store_that_was_away_is_read_on(store: Store, read: Callable[..., Reader]) -> None:
    reader = read(Tail(store))  # type: ignore[arg-type]
    until(lambda: reader.pieces)
    store.away = True
    gevent.sleep(0.1)
    store.away = False
    fill(store, 3)
    until(lambda: reader.ids() == [1, 2, 3])


def test_readers_of_a_stopped_worker_end(store: Store, read: Callable[..., Reader]) -> None:
    bus = EventBus(store)  # type: ignore[arg-type]
    readers = [read(bus) for _ in range(5)]
    until(lambda: all(reader.pieces for reader in readers))
    bus.stop_streams()
    until(lambda: all(reader.greenlet.dead for reader in readers))
