"""/debug/stream is complete and in order over all workers, however often a reader reconnects."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import pytest
import requests
import sseclient

from tests.conftest import EventReader
from tests.processes import Gateway, Simulator, eventually

MODEL = "qwen2-1.5b-instruct"
REQUESTS, CLIENTS = 2000, 50
#: Seconds; generous, as two busy cores may need most of them.
TIMEOUT = 120
Listen = Callable[..., EventReader]
Launch = Callable[..., Gateway]


def chats(port: int, count: int) -> list[str]:
    """Send plain chats over one connection and return their request ids."""
    content = {"model": MODEL, "messages": [{"role": "user", "content": "count to 2"}]}
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    ids = []
    for _ in range(count):
        headers = {"Content-Type": "application/json", "X-Simulator-Pace-Ms": "0"}
        connection.request("POST", "/v1/chat/completions", json.dumps(content), headers)
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        ids.append(str(response.headers["X-Request-Id"]))
    connection.close()
    return ids


def ask_slowly(gateway: Gateway) -> requests.Response:
    """Start a stream that takes a few seconds; its headers have arrived."""
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "count to 6"}]}
    pace = {"X-Simulator-Pace-Ms": "500"}
    return gateway.post("/v1/chat/completions", body, headers=pace, stream=True)


class ReconnectingReader(threading.Thread):
    """A reader that disconnects every 200 ms and resumes after its last event."""

    def __init__(self, gateway: Gateway, by_header: bool) -> None:
        super().__init__(daemon=True)
        self.gateway, self.by_header = gateway, by_header
        self.frames: list[Any] = []
        self.connections = 0
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        last_id: int | None = None
        while not self.done.is_set():
            if last_id is None or self.by_header:
                reader = EventReader(self.gateway, last_id=last_id)
            else:
                reader = EventReader(self.gateway, f"?lastEventId={last_id}")
            time.sleep(0.2)
            reader.close()
            self.connections += 1
            if reader.frames:
                last_id = reader.frames[-1].id
                self.frames += [f for f in reader.frames if f.event != "connected"]

    def count(self, event: str) -> int:
        return sum(frame.event == event for frame in self.frames)


@dataclass
class LoadTest:
    """The request ids that were sent under load, and the readers that listened."""

    gateway: Gateway
    sent: list[str]
    steady: EventReader
    reconnecting: dict[str, ReconnectingReader]


@pytest.fixture(scope="module")
def load_test(
    state_url: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoadTest]:
    """Three readers listen while 50 clients send 2,000 requests to two workers."""
    gateway = Gateway(tmp_path_factory.mktemp("load"), shared_simulator.url, STATE_URL=state_url)
    steady = EventReader(gateway)
    reconnecting = {
        "header": ReconnectingReader(gateway, True),
        "query": ReconnectingReader(gateway, False),
    }
    eventually(
        lambda: steady.of("connected") and all(r.connections for r in reconnecting.values()), 20
    )
    with ThreadPoolExecutor(CLIENTS) as pool:
        share = REQUESTS // CLIENTS
        sent = [
            one
            for ids in pool.map(lambda _: chats(gateway.port, share), range(CLIENTS))
            for one in ids
        ]

    def all_received() -> bool:
        return len(steady.of("inference_complete")) >= REQUESTS and all(
            reader.connections > 5 and reader.count("inference_complete") >= REQUESTS
            for reader in reconnecting.values()
        )

    # a reader that never gets everything fails the tests below, not this fixture
    with suppress(AssertionError):
        eventually(all_received, TIMEOUT)
    for reader in reconnecting.values():
        reader.done.set()
        reader.join(20)
    yield LoadTest(gateway, sent, steady, reconnecting)
    steady.close()
    gateway.stop()


def test_a_reader_sees_every_request_start_and_end_exactly_once(load_test: LoadTest) -> None:
    for event in ("inference_start", "inference_complete"):
        request_ids = [data["requestId"] for data in load_test.steady.of(event)]
        assert len(request_ids) == REQUESTS
        assert set(request_ids) == set(load_test.sent)


def test_ids_increase_strictly_and_every_request_starts_before_it_ends(load_test: LoadTest) -> None:
    frames = load_test.steady.frames[1:]
    ids = [frame.id for frame in frames]
    assert ids == sorted(set(ids))
    started = {f.data["requestId"]: f.id for f in frames if f.event == "inference_start"}
    ended = {f.data["requestId"]: f.id for f in frames if f.event == "inference_complete"}
    assert started.keys() == ended.keys()
    assert all(started[one] < ended[one] for one in ended)


@pytest.mark.parametrize("by", ["header", "query"])
def test_a_reader_that_resumes_every_200_ms_sees_the_same(load_test: LoadTest, by: str) -> None:
    reader = load_test.reconnecting[by]
    assert reader.connections > 5
    received = [(frame.id, frame.event, frame.data) for frame in reader.frames]
    assert received == [(f.id, f.event, f.data) for f in load_test.steady.frames[1:]]


def test_the_first_event_is_connected_with_a_retry_interval(load_test: LoadTest) -> None:
    raw = load_test.steady.raw
    assert raw[0] == "retry: 3000\n"
    first = load_test.steady.frames[0]
    assert first.event == "connected"
    assert first.data.keys() == {"timestamp", "message"}
    assert load_test.steady.response.headers["Content-Type"].startswith("text/event-stream")
    assert load_test.steady.response.headers["X-Accel-Buffering"] == "no"
    assert load_test.steady.response.headers["Cache-Control"] == "no-cache"


def test_an_event_has_an_id_a_type_and_one_line_of_json_with_a_timestamp(
    load_test: LoadTest,
) -> None:
    timestamp = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
    for frame in load_test.steady.frames[1:]:
        assert [line.partition(":")[0] for line in frame.lines] == ["id", "event", "data"]
        assert timestamp.fullmatch(frame.data["timestamp"])


def test_types_filters_the_events(load_test: LoadTest, listen: Listen) -> None:
    reader = listen(load_test.gateway, "?types=inference_complete,error&lastEventId=0")
    reader.until("inference_complete", REQUESTS)
    assert {f.event for f in reader.frames} == {"connected", "inference_complete"}


def test_an_unknown_type_is_rejected_by_name(load_test: LoadTest) -> None:
    response = load_test.gateway.get("/debug/stream?types=inference_start,inference_begin")
    assert response.status_code == 400
    assert "inference_begin" in response.json()["error"]
    assert response.json().keys() >= {"error", "requestId"}


def test_a_real_sse_client_can_read_the_stream(load_test: LoadTest) -> None:
    last = load_test.steady.frames[-1].id
    headers = {"Last-Event-ID": str(last - 100), "Accept": "text/event-stream"}
    url = f"{load_test.gateway.url}/debug/stream"
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        events = iter(sseclient.SSEClient(response).events())
        first = next(events)
        assert (first.event, int(first.retry)) == ("connected", 3000)
        received = [next(events) for _ in range(100)]
    expected = load_test.steady.frames[-100:]
    assert [int(event.id) for event in received] == [frame.id for frame in expected]
    assert [event.event for event in received] == [frame.event for frame in expected]
    assert [json.loads(event.data) for event in received] == [frame.data for frame in expected]


@pytest.mark.both_servers
def test_readers_that_disconnected_do_not_count(launch: Launch) -> None:
    """Short-lived readers of an idle gateway never reach a worker's limit of 100."""
    gateway = launch(WEB_CONCURRENCY=1)
    statuses = set()
    for _ in range(110):
        reader = EventReader(gateway)
        statuses.add(reader.response.status)
        reader.close()
    assert statuses == {200}


def test_a_reader_resumes_across_a_restart_of_the_gateway(
    load_test: LoadTest, launch: Launch, listen: Listen, state_url: str
) -> None:
    gateway = launch(STATE_URL=state_url)
    first = listen(gateway)
    chats(gateway.port, 3)
    first.until("inference_complete", 3)
    last_id = next(f.id for f in first.frames if f.event == "inference_start")
    gateway.process.send_signal(signal.SIGTERM)
    eventually(first.ended, 20)
    first.close()
    gateway.stop()
    gateway.start()
    second = listen(gateway, last_id=last_id)
    chats(gateway.port, 1)
    second.until("inference_complete", 4)
    ids = [frame.id for frame in second.frames if frame.event != "connected"]
    assert ids == list(range(last_id + 1, last_id + 1 + len(ids)))
    assert not second.of("gap")


@pytest.mark.both_servers
def test_sigterm_ends_event_streams_before_exchanges(
    launch: Launch, listen: Listen, state_url: str
) -> None:
    gateway = launch(STATE_URL=state_url)
    readers = [listen(gateway) for _ in range(8)]
    slow = ask_slowly(gateway)
    gateway.process.send_signal(signal.SIGTERM)
    eventually(lambda: all(reader.ended() for reader in readers), 20)
    # the exchange is not cut off: it ends on its own after the readers
    assert b"[DONE]" in slow.content
    gateway.process.wait(40)


@pytest.mark.both_servers
def test_a_reader_that_keeps_its_connection_open_does_not_delay_the_shutdown(
    launch: Launch, listen: Listen
) -> None:
    gateway = launch()
    reader = listen(gateway)
    reader.until("connected")
    gateway.process.send_signal(signal.SIGTERM)
    eventually(reader.ended, 20)
    # the idle connection of the reader is still open, but the grace period is for exchanges only
    assert gateway.process.wait(20) == 0


@pytest.mark.both_servers
def test_the_shutdown_does_not_outlast_the_last_exchange(launch: Launch) -> None:
    gateway = launch()
    slow = ask_slowly(gateway)
    gateway.process.send_signal(signal.SIGTERM)
    assert b"[DONE]" in slow.content
    gateway.http.close()
    assert gateway.process.wait(20) == 0
