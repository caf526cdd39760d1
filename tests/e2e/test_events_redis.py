"""Gateways that share a Redis act as one, and inference goes on without Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import EventReader
from tests.processes import Gateway, Simulator, eventually, eventually_equal
from tests.redis_server import RedisServer

MODEL, OTHER = "qwen2-1.5b-instruct", "qwen2.5-7b-instruct"
MESSAGES = [{"role": "user", "content": "count to 2"}]
CHAT = "/v1/chat/completions"
Launch = Callable[..., Gateway]
Listen = Callable[..., EventReader]


@pytest.fixture(scope="module")
def shared_pair(
    redis_server: RedisServer, shared_simulator: Simulator, tmp_path_factory: Any
) -> Iterator[tuple[Gateway, Gateway]]:
    folder = tmp_path_factory.mktemp("pair")
    url = shared_simulator.url
    first = Gateway(folder / "a", url, STATE_URL=redis_server.url)
    second = Gateway(folder / "b", url, STATE_URL=redis_server.url)
    yield first, second
    first.stop()
    second.stop()


@pytest.fixture
def pair(shared_pair: tuple[Gateway, Gateway], simulator: Simulator) -> tuple[Gateway, Gateway]:
    """Two gateways with two workers each, as if on two machines."""
    return shared_pair


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that the test may stop."""
    server = RedisServer(tmp_path / "redis")
    yield server
    server.thaw()
    server.stop()


def ask(gateway: Gateway, **headers: str) -> requests.Response:
    """Send a chat without a model over its own connection."""
    url = gateway.url + CHAT
    return requests.post(url, json={"messages": MESSAGES}, headers=headers, timeout=30)


def activate(gateway: Gateway, key: str = MODEL) -> requests.Response:
    return gateway.post("/admin/models/activate", {"modelKey": key})


def status(gateway: Gateway) -> Any:
    return requests.get(f"{gateway.url}/debug/status", timeout=30).json()


def health(gateway: Gateway) -> str:
    return str(requests.get(f"{gateway.url}/health", timeout=30).json()["status"])


def model_sent(simulator: Simulator) -> str:
    return str(json.loads(simulator.last_request()["body"])["model"])


def test_an_activation_on_one_gateway_applies_to_the_next_request_on_the_other(
    pair: tuple[Gateway, Gateway], simulator: Simulator
) -> None:
    for number in range(20):
        here, there = pair if number % 2 else pair[::-1]
        key = (MODEL, OTHER)[number % 2]
        assert activate(here, key).status_code == 200
        for gateway in (there, here):
            assert ask(gateway).status_code == 200
            assert model_sent(simulator) == key


def test_a_reader_gets_the_events_of_both_gateways(
    pair: tuple[Gateway, Gateway], listen: Listen
) -> None:
    activate(pair[0])
    reader = listen(pair[1])
    reader.until("connected")
    ids = [ask(gateway).headers["X-Request-Id"] for gateway in pair * 3]
    for one in ids:
        reader.until("inference_complete", requestId=one)
    event_ids = [frame.id for frame in reader.frames[1:]]
    assert event_ids == sorted(set(event_ids))


def test_counters_and_recent_requests_cover_both_gateways(pair: tuple[Gateway, Gateway]) -> None:
    activate(pair[0])
    total = sum(map(own_requests, pair))
    eventually_equal(lambda: totals(pair), [total, total])
    ids = [ask(gateway).headers["X-Request-Id"] for gateway in (*pair, pair[0])]
    eventually_equal(lambda: totals(pair), [total + 3, total + 3])
    for gateway in pair:
        # an exchange is counted when it starts, and listed once its end is written
        eventually_equal(lambda g=gateway: recent(g), set(ids))


def recent(gateway: Gateway) -> set[str]:
    """The request ids of the three exchanges that ended last."""
    return {one["requestId"] for one in status(gateway)["recentRequests"][:3]}


def totals(pair: tuple[Gateway, Gateway]) -> list[int]:
    """The total of both gateways' exchanges as each of them reports it."""
    return [status(gateway)["totalRequests"] for gateway in pair]


def own_requests(gateway: Gateway) -> int:
    """The number of exchanges of one gateway alone: /metrics never includes other machines."""
    text = requests.get(f"{gateway.url}/metrics", timeout=30).text
    (count,) = (
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "lmstudio_gateway_requests_started_total"
    )
    return int(count)


def test_one_gateway_shows_what_is_in_flight_on_the_other(pair: tuple[Gateway, Gateway]) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "count to 9999"}]}
    pace = {"X-Simulator-Pace-Ms": "100", "X-Request-Id": "on-the-first"}
    with requests.post(
        pair[0].url + CHAT, json={**body, "stream": True}, headers=pace, stream=True, timeout=30
    ):
        eventually_equal(
            lambda: [one["requestId"] for one in status(pair[1])["inFlight"]], ["on-the-first"]
        )
        assert status(pair[1])["status"] == "processing_inference"
    eventually(lambda: status(pair[1])["status"] == "idle", 20)


@pytest.mark.parametrize("outage", ["stopped", "frozen"])
def test_without_redis_inference_goes_on_with_the_last_known_model_and_health_is_degraded(
    launch: Launch, own_redis: RedisServer, simulator: Simulator, outage: str
) -> None:
    gateway = launch(STATE_URL=own_redis.url)
    assert activate(gateway).status_code == 200
    eventually_equal(lambda: health(gateway), "ok")
    if outage == "stopped":
        own_redis.stop()
    else:
        own_redis.freeze()
    for _ in range(6):
        assert ask(gateway).status_code == 200
        assert model_sent(simulator) == MODEL
    eventually_equal(lambda: health(gateway), "degraded")
    rejected = activate(gateway, OTHER)
    assert rejected.status_code == 503
    assert rejected.headers["Retry-After"]
    response = requests.get(f"{gateway.url}/debug/status", timeout=30)
    assert (response.status_code, response.json()["status"]) == (200, "error")
    assert response.json()["totalRequests"] == 6
    assert requests.get(f"{gateway.url}/metrics", timeout=30).status_code == 200
    stream = requests.get(f"{gateway.url}/debug/stream", timeout=30)
    assert stream.status_code == 503


@pytest.mark.parametrize("saved", [True, False], ids=["same", "empty"])
def test_events_resume_when_redis_is_back(
    launch: Launch, listen: Listen, own_redis: RedisServer, saved: bool
) -> None:
    """Redis comes back with the same data, or empty."""
    gateway = launch(STATE_URL=own_redis.url)
    assert activate(gateway).status_code == 200
    old = listen(gateway)
    old.until("connected")
    for _ in range(5):
        request_id = ask(gateway).headers["X-Request-Id"]
        old.until("inference_complete", requestId=request_id)
    (own_redis.save_and_stop if saved else own_redis.stop)()
    waiting = [ask(gateway).headers["X-Request-Id"] for _ in range(3)]
    own_redis.start()
    eventually(lambda: health(gateway) == "ok", 30)
    later = ask(gateway)
    new = listen(gateway, last_id=0)
    for reader in (new, old):
        for one in [*waiting, later.headers["X-Request-Id"]]:
            reader.until("inference_complete", requestId=one)
            assert len(reader.of("inference_complete", requestId=one)) == 1
    eventually(lambda: status(gateway)["status"] == "idle", 20)


def test_no_worker_is_declared_dead_when_redis_comes_back(
    launch: Launch, listen: Listen, own_redis: RedisServer
) -> None:
    gateway = launch(STATE_URL=own_redis.url, WEB_CONCURRENCY=4)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "count to 9999"}]}
    names = {f"long-{number}" for number in range(9)}
    with ExitStack() as running:
        for one in names:
            pace = {"X-Simulator-Pace-Ms": "500", "X-Request-Id": one}
            options: Any = {"json": {**body, "stream": True}, "headers": pace, "stream": True}
            running.enter_context(requests.post(gateway.url + CHAT, timeout=60, **options))
        eventually(lambda: len(status(gateway)["inFlight"]) == 9, 20)
        own_redis.save_and_stop()
        # the length of the outage: longer than a worker may be without a heartbeat (5 s)
        time.sleep(7)
        own_redis.start()
        eventually(lambda: health(gateway) == "ok", 30)
        marks = [ask_with_model(gateway).headers["X-Request-Id"] for _ in range(6)]
        reader = listen(gateway, last_id=0)
        for one in marks:
            reader.until("inference_complete", requestId=one)
        eventually(lambda: {o["requestId"] for o in status(gateway)["inFlight"]} == names, 20)
    for one in names:
        reader.until("inference_complete", requestId=one)
    assert not reader.of("error")
    completed = [data["requestId"] for data in reader.of("inference_complete")]
    assert sorted(completed) == sorted([*names, *marks])


def ask_with_model(gateway: Gateway) -> requests.Response:
    """Send a chat that names its model over its own connection."""
    content = {"model": MODEL, "messages": MESSAGES}
    return requests.post(gateway.url + CHAT, json=content, timeout=30)


def test_no_event_is_stored_twice_when_redis_stalls(
    launch: Launch, listen: Listen, own_redis: RedisServer
) -> None:
    gateway = launch(STATE_URL=own_redis.url)
    activate(gateway)
    own_redis.freeze()
    ids = [ask(gateway).headers["X-Request-Id"] for _ in range(4)]
    # the warning means that the first attempt to write has failed
    eventually(lambda: "events are waiting for the store" in gateway.logged(), 30)
    own_redis.thaw()
    eventually(lambda: health(gateway) == "ok", 30)
    ids.append(ask(gateway).headers["X-Request-Id"])
    reader = listen(gateway, last_id=0)
    for one in ids:
        reader.until("inference_complete", requestId=one)
    completed = [data["requestId"] for data in reader.of("inference_complete")]
    assert sorted(completed) == sorted(ids)
