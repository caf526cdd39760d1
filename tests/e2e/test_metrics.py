"""/metrics covers all workers, dead ones included, and stays small whatever clients send."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import EventReader
from tests.processes import Gateway, Simulator, eventually, eventually_equal

MODEL = "qwen2-1.5b-instruct"
CHAT = "/v1/chat/completions"
PREFIX = "lmstudio_gateway_"
KEY = "metrics-key-0123456789abc"
KEYED = {"Authorization": f"Bearer {KEY}"}
Launch = Callable[..., Gateway]
Listen = Callable[..., EventReader]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(gateway: Gateway) -> Samples:
    """Every sample of /metrics, parsed by Prometheus' own client."""
    response = requests.get(f"{gateway.url}/metrics", headers=KEYED, timeout=30)
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum of all samples with this name and these labels."""
    return sum(
        number
        for (full, sample_labels), number in samples.items()
        if full in (name, PREFIX + name) and labels.items() <= dict(sample_labels).items()
    )


def all_ended(gateway: Gateway) -> Samples:
    """The samples once every exchange has ended, just after its client has read the last byte."""

    def ended() -> Samples | None:
        samples = scrape(gateway)
        started = value(samples, "requests_started_total")
        timed = value(samples, "gen_ai_server_request_duration_seconds_count")
        return samples if started == timed else None

    samples: Samples = eventually(ended)
    return samples


def chat(stream: bool = False, count: int = 3) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"count to {count}"}]
    return {"model": MODEL, "messages": messages, "stream": stream}


def send(gateway: Gateway, method: str, path: str, **options: Any) -> int:
    """Send one request over its own connection and return its status."""
    options["headers"] = {**KEYED, **options.get("headers", {})}
    return requests.request(method, gateway.url + path, timeout=60, **options).status_code


@pytest.fixture(scope="module")
def shared_metered(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("metrics")
    gateway = Gateway(folder, shared_simulator.url, GATEWAY_API_KEY=KEY)
    yield gateway
    gateway.stop()


@pytest.fixture
def metered(shared_metered: Gateway, simulator: Simulator) -> Gateway:
    """The module's gateway, with two workers and a key."""
    return shared_metered


#: The growth of each counter in the test below.
_GROWTH: list[tuple[str, dict[str, str], int]] = [
    ("requests_started_total", {}, 49),
    ("requests_total", {}, 49),
    ("requests_total", {"endpoint": CHAT, "method": "POST", "status": "200"}, 35),
    ("requests_total", {"endpoint": CHAT, "method": "POST", "status": "500"}, 4),
    ("requests_total", {"endpoint": "/v1/embeddings", "status": "400"}, 3),
    ("requests_total", {"endpoint": "/v1/models", "method": "GET", "status": "200"}, 5),
    ("requests_total", {"endpoint": "other", "method": "GET", "status": "404"}, 2),
    ("request_errors_total", {}, 9),
    ("gen_ai_server_request_duration_seconds_count", {}, 49),
    ("gen_ai_server_time_to_first_token_seconds_count", {}, 15),
    ("requests_with_tokens_total", {}, 35),
    ("tokens_total", {"type": "output"}, 35 * 3),
    ("tokens_total", {"type": "input"}, 35 * 3),  # "count to 3" is three words
    ("cancellations_total", {}, 0),
    # malformed JSON never reaches LM Studio
    ("upstream_seconds_count", {}, 46),
    ("overhead_seconds_count", {}, 46),
]


def test_the_counters_match_the_requests(metered: Gateway) -> None:
    fault = {"headers": {"X-Simulator-Fault": "refuse-500"}}
    load: list[tuple[str, str, dict[str, Any]]] = [
        *[("POST", CHAT, {"json": chat()})] * 20,
        *[("POST", "/chat/completions", {"json": chat(stream=True)})] * 15,
        *[("POST", CHAT, {"json": chat(), **fault})] * 4,
        *[("POST", "/v1/embeddings", {"data": "{"})] * 3,
        *[("GET", "/v1/models", {})] * 5,
        *[("GET", "/v1/unheard/of", {})] * 2,
        *[("GET", "/health", {}), ("GET", "/debug/status", {}), ("GET", "/api/v0/models", {})] * 3,
    ]
    before = scrape(metered)
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda one: send(metered, one[0], one[1], **one[2]), load))
    assert [statuses.count(status) for status in (500, 400, 404)] == [4, 3, 2]

    def growth() -> list[tuple[str, dict[str, str], int]]:
        after = scrape(metered)
        return [
            (name, labels, int(value(after, name, **labels) - value(before, name, **labels)))
            for name, labels, _ in _GROWTH
        ]

    # an exchange ends just after its client has read the last byte
    eventually_equal(growth, _GROWTH)
    assert value(scrape(metered), "requests_in_flight") == 0


def test_loads_rejections_and_the_upstream_are_measured(
    metered: Gateway, simulator: Simulator
) -> None:
    before = scrape(metered)
    load = {"modelKey": MODEL, "instanceId": "mine"}
    assert send(metered, "POST", "/admin/models/load", json=load) == 200
    assert send(metered, "POST", "/admin/models/load", json={"modelKey": "no"}) == 404
    for path in (CHAT, "/debug/status", "/metrics"):
        assert requests.get(metered.url + path, timeout=30).status_code == 401
    after = scrape(metered)
    for outcome in ("loaded", "failed"):
        labels = {"outcome": outcome}
        loads = [value(s, "model_loads_total", **labels) for s in (before, after)]
        assert loads[1] - loads[0] == 1
    rejected = [value(s, "auth_failures_total", reason="invalid_api_key") for s in (before, after)]
    assert rejected[1] - rejected[0] == 3
    assert value(after, "upstream_up") == 1
    simulator.faults(silent_http=True)
    assert value(scrape(metered), "upstream_up") == 0
    simulator.faults(silent_http=False)
    assert value(scrape(metered), "upstream_up") == 1


def test_gauges_show_requests_in_flight_and_readers(metered: Gateway, listen: Listen) -> None:
    readers = [listen(metered, **KEYED) for _ in range(3)]
    eventually_equal(lambda: value(scrape(metered), "event_subscribers"), 3)
    before = value(scrape(metered), "cancellations_total")
    pace = {**KEYED, "X-Simulator-Pace-Ms": "200"}
    body = chat(stream=True, count=9999)
    running = [
        requests.post(metered.url + CHAT, json=body, headers=pace, stream=True, timeout=30)
        for _ in range(6)
    ]
    eventually_equal(lambda: value(scrape(metered), "requests_in_flight"), 6)
    for one in running:
        one.close()
    eventually_equal(lambda: value(scrape(metered), "requests_in_flight"), 0)
    after = all_ended(metered)
    assert value(after, "cancellations_total") - before == 6
    assert value(after, "requests_total", status="499") >= 6
    for reader in readers:
        reader.close()
    eventually_equal(lambda: value(scrape(metered), "event_subscribers"), 0)


def test_killing_a_worker_loses_no_counts(launch: Launch) -> None:
    gateway = launch(GATEWAY_API_KEY=KEY)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: send(gateway, "POST", CHAT, json=chat()), range(24)))
    # every exchange has been counted to its end: tokens come last
    eventually_equal(lambda: value(scrape(gateway), "tokens_total", type="output"), 24 * 3)
    pace = {**KEYED, "X-Simulator-Pace-Ms": "200"}
    body = chat(stream=True, count=9999)
    running = [
        requests.post(gateway.url + CHAT, json=body, headers=pace, stream=True, timeout=30)
        for _ in range(6)
    ]
    for pid in gateway.workers():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: gateway.logged().count("Booting worker") >= 4, 20)
    for one in running:
        one.close()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: send(gateway, "POST", CHAT, json=chat()), range(10)))
    eventually_equal(lambda: value(scrape(gateway), "tokens_total", type="output"), 34 * 3)
    samples = scrape(gateway)
    assert value(samples, "requests_in_flight") == 0
    assert value(samples, "requests_started_total") == 24 + 6 + 10
    assert value(samples, "requests_total", status="200") == 34
    metrics = requests.get(f"{gateway.url}/debug/metrics", headers=KEYED, timeout=30).json()
    assert metrics["performance"]["totalRequests"] == 40
    assert metrics["performance"]["totalErrors"] == 6


def test_names_and_units_follow_the_conventions_of_prometheus(metered: Gateway) -> None:
    send(metered, "POST", CHAT, json=chat(stream=True))
    text = requests.get(f"{metered.url}/metrics", headers=KEYED, timeout=30).text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families) > 10
    for family in families:
        assert family.documentation, family.name
        assert family.name.startswith((PREFIX, "gen_ai_")), family.name
        assert family.type in ("counter", "histogram", "gauge")
        if family.type == "counter":
            assert {sample.name for sample in family.samples} == {family.name + "_total"}
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        if family.type == "gauge":
            assert not family.name.endswith(("_total", "_count", "_sum"))
        for sample in family.samples:
            assert "pid" not in sample.labels


def odd_request(number: int) -> str:
    method = ("GET", "POST", f"ODD{number}", "PROPFIND")[number % 4]
    path = (f"/v1/odd/{number}", f"{CHAT}/{number}", f"/models/odd-{number}", f"/{number}")[
        number // 4 % 4
    ]
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-API-Key: {KEY}\r\n"
    )


def test_odd_requests_create_no_new_series(metered: Gateway) -> None:
    def send_odd(number: int) -> None:
        with socket.create_connection(("127.0.0.1", metered.port), 30) as client:
            client.sendall(f"{odd_request(number)}Content-Length: 0\r\n\r\n".encode())
            while client.recv(65536):
                pass

    before = value(scrape(metered), "requests_total")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send_odd, range(16)))
        settled = all_ended(metered)
        list(pool.map(send_odd, range(16, 200)))
    after = all_ended(metered)
    assert value(after, "requests_total") - before >= 140
    assert after.keys() == settled.keys()
    endpoints = {dict(labels).get("endpoint") for _, labels in after}
    assert not {one for one in endpoints if one and "odd" in one}


def test_nothing_on_disk_holds_the_counters(launch: Launch) -> None:
    """A cleaner of /tmp can't take what is not there (it once stopped the whole gateway)."""
    gateway = launch()
    assert send(gateway, "POST", CHAT, json=chat()) == 200
    for pid in (gateway.process.pid, *gateway.workers()):
        opened = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists()]
        assert not [name for name in opened if "metrics" in name or "prometheus" in name]
    eventually_equal(lambda: value(scrape(gateway), "requests_total"), 1)


def test_workers_that_die_leave_their_numbers_and_no_place_taken(launch: Launch) -> None:
    gateway = launch(GATEWAY_API_KEY=KEY, WEB_CONCURRENCY=1)
    deaths = 5
    for death in range(deaths):
        assert send(gateway, "POST", CHAT, json=chat()) == 200
        # an exchange ends just after its client has read the last byte
        eventually_equal(lambda: value(scrape(gateway), "requests_total"), death + 1)
        [pid] = gateway.workers()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda killed=pid: gateway.workers() not in ([], [killed]))
    eventually_equal(lambda: send(gateway, "POST", CHAT, json=chat()), 200)
    eventually_equal(lambda: value(scrape(gateway), "requests_total", status="200"), deaths + 1)
    performance = json.loads(gateway.get("/debug/metrics", headers=KEYED).text)
    assert performance["performance"]["totalRequests"] == deaths + 1
    assert performance["performance"]["totalErrors"] == 0
    assert performance["system"]["workers"] == 1


def shared_counters(client: Any) -> bytes:
    """The counters that the gateways share, as they are stored."""
    return b"".join(client.get(key) or b"" for key in client.keys("*counters*"))


def test_counters_start_at_zero_with_the_gateway(launch: Launch, state_url: str) -> None:
    gateway = launch(GATEWAY_API_KEY=KEY, STATE_URL=state_url)
    assert send(gateway, "POST", CHAT, json=chat()) == 200
    if state_url.startswith("redis"):
        with redis.Redis.from_url(state_url) as client:
            eventually(lambda: b'"requests": 1.0' in shared_counters(client), 20)
    gateway.stop()
    gateway.start()
    assert value(scrape(gateway), "requests_total") == 0
    performance = json.loads(gateway.get("/debug/metrics", headers=KEYED).text)["performance"]
    assert (performance["totalRequests"], performance["totalErrors"]) == (0, 0)
