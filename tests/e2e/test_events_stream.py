"""/debug/stream is complete and in order, whoever reads it however often, over all workers."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
#: As long as two busy cores may need.
PATIENCE = 60
Listen = Callable[..., EventReader]
Launch = Callable[..., Gateway]


def chats(port: int, count: int) -> list[str]:
    """So many plain chats over one connection; returns their request ids."""
    content = {"model": MODEL, "messages": [{"role": "user", "content": "count to 2"}]}
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    ids = []
    for _ in range(count):
        headers = {"Content-Type": "application/json", "X-Simulator-Pace-Ms": "0"}
        connection.request("POST", "/v1/chat/completions", json.dumps(content), headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        ids.append(str(answer.headers["X-Request-Id"]))
    connection.close()
    return ids


def ask_slowly(gateway: Gateway) -> requests.Response:
    """A stream of some seconds whose head has come."""
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "count to 6"}]}
    pace = {"X-Simulator-Pace-Ms": "500"}
    return gateway.post("/v1/chat/completions", body, headers=pace, stream=True)


class Restless(threading.Thread):
    """A reader that disconnects every 200 ms and resumes where it was."""

    def __init__(self, gateway: Gateway, by_header: bool) -> None:
        super().__init__(daemon=True)
        self.gateway, self.by_header = gateway, by_header
        self.frames: list[Any] = []
        self.visits = 0
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        place: int | None = None
        while not self.done.is_set():
            if place is None or self.by_header:
                reader = EventReader(self.gateway, last_id=place)
            else:
                reader = EventReader(self.gateway, f"?lastEventId={place}")
            time.sleep(0.2)
            reader.close()
            self.visits += 1
            if reader.frames:
                place = reader.frames[-1].id
                self.frames += [f for f in reader.frames if f.event != "connected"]

    def count(self, event: str) -> int:
        return sum(frame.event == event for frame in self.frames)


@dataclass
class Crowd:
    gateway: Gateway
    sent: list[str]
    steady: EventReader
    restless: dict[str, Restless]


@pytest.fixture(scope="module")
def crowd(
    state_url: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crowd]:
    """What three readers saw of 2,000 requests of 50 clients to two workers."""
    gateway = Gateway(tmp_path_factory.mktemp("crowd"), shared_simulator.url, STATE_URL=state_url)
    steady = EventReader(gateway)
    restless = {"header": Restless(gateway, True), "query": Restless(gateway, False)}
    eventually(lambda: steady.of("connected") and all(r.visits for r in restless.values()), 20)
    with ThreadPoolExecutor(CLIENTS) as pool:
        share = REQUESTS // CLIENTS
        sent = [
            one
            for ids in pool.map(lambda _: chats(gateway.port, share), range(CLIENTS))
            for one in ids
        ]
    readers = [steady.of, *(lambda event, r=r: range(r.count(event)) for r in restless.values())]
    deadline = time.monotonic() + PATIENCE
    # a reader that never gets everything is a failure of the tests below, not of this fixture
    while time.monotonic() < deadline:
        if all(len(of("inference_complete")) >= REQUESTS for of in readers):
            break
        time.sleep(0.1)
    for reader in restless.values():
        reader.done.set()
        reader.join(20)
    yield Crowd(gateway, sent, steady, restless)
    steady.close()
    gateway.stop()


def test_a_reader_sees_every_request_begin_and_end_exactly_once(crowd: Crowd) -> None:
    for event in ("inference_start", "inference_complete"):
        seen = [data["requestId"] for data in crowd.steady.of(event)]
        assert len(seen) == REQUESTS
        assert set(seen) == set(crowd.sent)


def test_ids_are_strictly_increasing_and_every_end_is_behind_its_beginning(crowd: Crowd) -> None:
    frames = crowd.steady.frames[1:]
    ids = [frame.id for frame in frames]
    assert ids == sorted(set(ids))
    began = {f.data["requestId"]: f.id for f in frames if f.event == "inference_start"}
    ended = {f.data["requestId"]: f.id for f in frames if f.event == "inference_complete"}
    assert began.keys() == ended.keys()
    assert all(began[one] < ended[one] for one in ended)


@pytest.mark.parametrize("by", ["header", "query"])
def test_a_reader_that_resumes_every_200_ms_sees_the_same(crowd: Crowd, by: str) -> None:
    reader = crowd.restless[by]
    assert reader.visits > 5
    seen = [(frame.id, frame.event, frame.data) for frame in reader.frames]
    assert seen == [(f.id, f.event, f.data) for f in crowd.steady.frames[1:]]


def test_the_first_event_is_connected_and_tells_when_to_come_back(crowd: Crowd) -> None:
    raw = crowd.steady.raw
    assert raw[0] == "retry: 3000\n"
    first = crowd.steady.frames[0]
    assert first.event == "connected"
    assert first.data.keys() == {"timestamp", "message"}
    assert crowd.steady.response.headers["Content-Type"].startswith("text/event-stream")
    assert crowd.steady.response.headers["X-Accel-Buffering"] == "no"
    assert crowd.steady.response.headers["Cache-Control"] == "no-cache"


def test_an_event_is_id_event_and_one_line_of_json_with_its_time(crowd: Crowd) -> None:
    moment = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
    for frame in crowd.steady.frames[1:]:
        assert [line.partition(":")[0] for line in frame.lines] == ["id", "event", "data"]
        assert moment.fullmatch(frame.data["timestamp"])


def test_types_choose_what_is_told(crowd: Crowd, listen: Listen) -> None:
    reader = listen(crowd.gateway, "?types=inference_complete,error&lastEventId=0")
    reader.until("inference_complete", REQUESTS)
    assert {f.event for f in reader.frames} == {"connected", "inference_complete"}


def test_an_unknown_type_is_refused_by_name(crowd: Crowd) -> None:
    answer = crowd.gateway.get("/debug/stream?types=inference_start,inference_begin")
    assert answer.status_code == 400
    assert "inference_begin" in answer.json()["error"]
    assert answer.json().keys() >= {"error", "requestId"}


def test_a_real_event_source_client_reads_it(crowd: Crowd) -> None:
    last = crowd.steady.frames[-1].id
    headers = {"Last-Event-ID": str(last - 100), "Accept": "text/event-stream"}
    url = f"{crowd.gateway.url}/debug/stream"
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        events = iter(sseclient.SSEClient(answer).events())
        first = next(events)
        assert (first.event, int(first.retry)) == ("connected", 3000)
        behind = [next(events) for _ in range(100)]
    expected = crowd.steady.frames[-100:]
    assert [int(event.id) for event in behind] == [frame.id for frame in expected]
    assert [event.event for event in behind] == [frame.event for frame in expected]
    assert [json.loads(event.data) for event in behind] == [frame.data for frame in expected]


@pytest.mark.both_servers
def test_readers_that_left_take_no_places(launch: Launch) -> None:
    """100 is the limit of a worker; who comes and goes on an idle gateway never reaches it."""
    gateway = launch(WEB_CONCURRENCY=1)
    statuses = set()
    for _ in range(110):
        reader = EventReader(gateway)
        statuses.add(reader.response.status)
        reader.close()
    assert statuses == {200}


def test_a_reader_resumes_across_a_restart_of_the_gateway(
    crowd: Crowd, launch: Launch, listen: Listen, state_url: str
) -> None:
    gateway = launch(STATE_URL=state_url)
    first = listen(gateway)
    chats(gateway.port, 3)
    first.until("inference_complete", 3)
    place = next(f.id for f in first.frames if f.event == "inference_start")
    gateway.process.send_signal(signal.SIGTERM)
    eventually(first.ended, 20)
    first.close()
    gateway.stop()
    gateway.start()
    second = listen(gateway, last_id=place)
    chats(gateway.port, 1)
    second.until("inference_complete", 4)
    ids = [frame.id for frame in second.frames if frame.event != "connected"]
    assert ids == list(range(place + 1, place + 1 + len(ids)))
    assert not second.of("gap")


@pytest.mark.both_servers
def test_streams_end_at_sigterm_before_the_exchanges_do(
    launch: Launch, listen: Listen, state_url: str
) -> None:
    gateway = launch(STATE_URL=state_url)
    readers = [listen(gateway) for _ in range(8)]
    slow = ask_slowly(gateway)
    gateway.process.send_signal(signal.SIGTERM)
    eventually(lambda: all(reader.ended() for reader in readers), 20)
    # the exchange was not cut: it comes to its own end after the readers' end
    assert b"[DONE]" in slow.content
    gateway.process.wait(40)


@pytest.mark.both_servers
def test_a_reader_that_keeps_its_connection_open_does_not_delay_the_end(
    launch: Launch, listen: Listen
) -> None:
    gateway = launch()
    reader = listen(gateway)
    reader.until("connected")
    gateway.process.send_signal(signal.SIGTERM)
    eventually(reader.ended, 20)
    # the reader's connection is still there, idle; the grace period (30 s) is not for it
    assert gateway.process.wait(20) == 0


@pytest.mark.both_servers
def test_an_exchange_that_ends_in_time_does_not_delay_the_end(launch: Launch) -> None:
    gateway = launch()
    slow = ask_slowly(gateway)
    gateway.process.send_signal(signal.SIGTERM)
    assert b"[DONE]" in slow.content
    gateway.http.close()
    assert gateway.process.wait(20) == 0
